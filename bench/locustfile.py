"""The stage scenario for who measures with Locust: 80 % GetAvailability, 14 % Reserve, 5 % Confirm, 1 % Cancel.

    make up
    .venv/bin/locust -f bench/locustfile.py --headless -u 64 -r 32 -t 30s

Reads the addresses of what `make up` started out of .local/endpoints.json; the SKUs are those of its
catalogue, or S0 to S99999 with HOLDFAST_SKUS=100000. Prometheus metrics of every call (count by outcome,
seconds) are on port HOLDFAST_METRICS_PORT, 9646 unless told.
"""

import grpc.experimental.gevent as grpc_gevent

grpc_gevent.init_gevent()

import json  # noqa: E402 - gevent must be told first
import os  # noqa: E402
import random  # noqa: E402
import time  # noqa: E402
import uuid  # noqa: E402
from collections import deque  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import grpc  # noqa: E402
from holdfast.inventory.v1 import inventory_pb2, inventory_pb2_grpc  # noqa: E402
from holdfast.reservation.v1 import reservation_pb2, reservation_pb2_grpc  # noqa: E402
from locust import User, constant_pacing, events, task  # noqa: E402
from prometheus_client import Counter, Histogram, start_http_server  # noqa: E402

ENDPOINTS = Path(__file__).parents[1] / ".local" / "endpoints.json"
SKUS = int(os.environ.get("HOLDFAST_SKUS", "0"))
CALLS = Counter("holdfast_load_calls", "Calls by method and outcome.", ["method", "outcome"])
SECONDS = Histogram("holdfast_load_seconds", "How long calls took.", ["method"])
HELD_MAX = 1_000


@events.init.add_listener
def serve_metrics(**_: Any) -> None:
    start_http_server(int(os.environ.get("HOLDFAST_METRICS_PORT", "9646")), "127.0.0.1")


class Shopper(User):
    """A customer who looks often, reserves sometimes, and pays or leaves."""

    wait_time = constant_pacing(0.05)

    def on_start(self) -> None:
        targets = json.loads(ENDPOINTS.read_text())["targets"]
        options = [("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}))]
        self._channels = [grpc.insecure_channel(targets[name], options) for name in ("inventory", "reservation")]
        self._inventory: Any = inventory_pb2_grpc.InventoryServiceStub(self._channels[0])
        self._reservation: Any = reservation_pb2_grpc.ReservationServiceStub(self._channels[1])
        self._held: deque[str] = deque(maxlen=HELD_MAX)
        self._skus = [f"S{n}" for n in range(SKUS)] or self._catalogue()

    def on_stop(self) -> None:
        for channel in self._channels:
            channel.close()

    @task(80)
    def look(self) -> None:
        key = inventory_pb2.AvailabilityKey(sku=random.choice(self._skus), location="MAIN")
        self._call("GetAvailability", self._inventory.GetAvailability, inventory_pb2.GetAvailabilityRequest(keys=[key]))

    @task(14)
    def reserve(self) -> None:
        name = uuid.uuid4().hex
        line = reservation_pb2.ReservationLine(sku=random.choice(self._skus), location="MAIN", quantity=1)
        request = reservation_pb2.ReserveRequest(reservation_id=name, lines=[line])
        answer = self._call("Reserve", self._reservation.Reserve, request)
        if answer and answer.outcome == reservation_pb2.RESERVE_OUTCOME_HELD:
            self._held.append(name)

    @task(5)
    def confirm(self) -> None:
        if self._held:
            request = reservation_pb2.ConfirmRequest(reservation_id=self._held.popleft(), request_id="paid")
            self._call("Confirm", self._reservation.Confirm, request)

    @task(1)
    def cancel(self) -> None:
        if self._held:
            request = reservation_pb2.CancelRequest(reservation_id=self._held.popleft(), request_id="left")
            self._call("Cancel", self._reservation.Cancel, request)

    def _catalogue(self) -> list[str]:
        listed = self._inventory.ListSkus(inventory_pb2.ListSkusRequest(page_size=1000))
        return [sku.sku for sku in listed.skus] or ["S0"]

    def _call(self, name: str, method: Callable[[Any], Any], request: Any) -> Any:
        """Make a call and tell Locust and Prometheus what came of it; None when it failed."""
        began, answer, error = time.perf_counter(), None, None
        try:
            answer = method(request)
        except grpc.RpcError as failure:
            error = failure
        seconds = time.perf_counter() - began
        outcome = "OK" if error is None else error.code().name
        CALLS.labels(name, outcome).inc()
        SECONDS.labels(name).observe(seconds)
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=seconds * 1000,
            response_length=answer.ByteSize() if answer else 0,
            exception=error,
            context={},
        )
        return answer
