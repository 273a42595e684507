"""Runs in a pod: customers reserve and confirm by the headless names until stdin ends; a line of JSON each half second.

Few and slow on purpose: it is about who answers, and not about how many.
"""

import asyncio
import json
import sys
import uuid
from collections import Counter
from typing import Any

import grpc
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp

from shared.client import Holdfast
from shared.refusal import Refusal

TARGETS = [f"dns:///{name}.holdfast.svc.cluster.local:50051" for name in ("inventory", "reservation", "analytics")]
CUSTOMERS = 4
REST_SECONDS = 0.05
SKU = f"SKU-{uuid.uuid4().hex[:8]}"
LOCATION = f"SHELF-{uuid.uuid4().hex[:8]}"


async def shop(holdfast: Holdfast, stop: asyncio.Event, seen: dict[str, Any]) -> None:
    """One customer after another: hold, look, buy."""
    while not stop.is_set():
        name = uuid.uuid4().hex
        try:
            answer = await holdfast.reserve(name, [(SKU, LOCATION, 1)])
            assert answer.outcome == rp.RESERVE_OUTCOME_HELD
            await holdfast.availability([(SKU, LOCATION)])
            await holdfast.confirm(name, f"{name}-paid")
        except (grpc.aio.AioRpcError, Refusal, AssertionError) as error:
            seen["failed"].append(f"{type(error).__name__}: {error}")
        seen["made"] += 1
        await asyncio.sleep(REST_SECONDS)


async def stock(holdfast: Holdfast) -> None:
    """Something to sell."""
    location = ip.CreateLocationRequest(
        request_id=f"location-{SKU}", location=ip.Location(location=LOCATION, name="Shelf")
    )
    await holdfast.inventory.CreateLocation(location)
    row = ip.ImportRow(row_number=1, sku=ip.Sku(sku=SKU, name="Lantern"), location=LOCATION, quantity=1_000_000)
    answer = await holdfast.import_stock(f"import-{SKU}", [row])
    assert not answer.errors, answer.errors


async def main() -> None:
    """Report until nobody listens any more."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_reader(sys.stdin, stop.set)
    async with Holdfast(*TARGETS, tls_directory="/etc/holdfast/tls") as holdfast:
        await stock(holdfast)
        seen: dict[str, Any] = {"made": 0, "failed": []}
        customers = [asyncio.ensure_future(shop(holdfast, stop, seen)) for _ in range(CUSTOMERS)]
        while not all(customer.done() for customer in customers):
            await asyncio.wait(customers, timeout=0.5)
            sys.stdout.write(json.dumps(seen | {"pods": holdfast.pods}) + "\n")
            sys.stdout.flush()
            seen.update(made=0, failed=[])
            holdfast.pods = Counter()


asyncio.run(main())
