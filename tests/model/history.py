"""What clients asked for and what they were told: every call, with the times at which it was sent and answered.

A caller asks again with the same ids until it is answered or gives up; that is one call. It ends as

    OK        told what happened
    REFUSED   told that nothing happened, and why
    UNKNOWN   not told: it happened once, or not at all

The stubs are called bare, without the project's client: what judges the services must not lean on them.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.inventory.v1 import inventory_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2 as rp
from holdfast.reservation.v1 import reservation_pb2_grpc

ATTEMPT_SECONDS_MAX = 4.0
BACKOFF_SECONDS_MAX = 1.0
# Statuses that say that the call was decided, and not carried out.
DECIDED = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.OUT_OF_RANGE,
}
ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
Line = tuple[str, str, int]  # sku, location ("" for any), units


class End(StrEnum):
    """How a call ended for its caller."""

    OK = "OK"
    REFUSED = "REFUSED"
    UNKNOWN = "UNKNOWN"


@dataclass(slots=True)
class Call:
    """One call. Times are seconds since 1970, by the caller's clock; `units` are what an answer says, by key."""

    kind: str  # reserve, confirm, cancel, extend, receive, read
    reservation_id: str
    request_id: str
    lines: list[Line]
    mode: str = ""
    again: bool = False  # a repeat of an earlier call, with the same ids
    sent: float = 0.0
    answered: float = 0.0
    attempts: int = 0
    end: End = End.UNKNOWN
    reason: str = ""  # of a refusal, or the last status of what is unknown
    outcome: str = ""  # HELD, REJECTED
    units: dict[str, int] = field(default_factory=dict)  # "sku@location": units
    version: int = 0  # of a read, what it was of
    min_version: int = 0


class History:
    """The calls of all clients, in the order in which they were made."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def save(self, file: Path) -> None:
        """One JSON object a line."""
        file.write_text("".join(json.dumps(asdict(call)) + "\n" for call in self.calls))


class Client:
    """Calls the services and records it. `give_up` seconds after it was sent a call is UNKNOWN."""

    def __init__(
        self, history: History, inventory: str, reservation: str, *, give_up: float, dice: random.Random
    ) -> None:
        self._history = history
        self._give_up = give_up
        self._dice = dice
        self._channels = [
            grpc.aio.insecure_channel(
                target, options=[("grpc.service_config", ROUND_ROBIN), ("grpc.enable_retries", 0)]
            )
            for target in (inventory, reservation)
        ]
        self._inventory = inventory_pb2_grpc.InventoryServiceStub(self._channels[0])
        self._reservation = reservation_pb2_grpc.ReservationServiceStub(self._channels[1])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close(None)

    async def reserve(
        self, reservation_id: str, lines: Iterable[Line], mode: str, ttl: float, *, again: bool = False
    ) -> Call:
        call = Call("reserve", reservation_id, reservation_id, list(lines), mode, again)
        request = rp.ReserveRequest(
            reservation_id=reservation_id,
            mode=rp.ReserveMode.Value(f"RESERVE_MODE_{mode}"),
            ttl=_seconds(ttl),
            lines=[rp.ReservationLine(sku=sku, location=at, quantity=units) for sku, at, units in call.lines],
        )
        answer = await self._made(call, lambda seconds: self._reservation.Reserve(request, timeout=seconds))
        if answer:
            call.outcome = rp.ReserveOutcome.Name(answer.outcome).removeprefix("RESERVE_OUTCOME_")
            # A replay shows the reservation as it now is: what was held is the sum of what became of it.
            for part in answer.reservation.allocations:
                call.units[f"{part.sku}@{part.location}"] = part.held + part.confirmed + part.cancelled + part.expired
        return call

    async def confirm(
        self, reservation_id: str, request_id: str, lines: Iterable[Line] = (), *, again: bool = False
    ) -> Call:
        call = Call("confirm", reservation_id, request_id, list(lines), again=again)
        request = rp.ConfirmRequest(reservation_id=reservation_id, request_id=request_id, lines=_parts(call.lines))
        await self._made(call, lambda seconds: self._reservation.Confirm(request, timeout=seconds))
        return call

    async def cancel(self, reservation_id: str, request_id: str, lines: Iterable[Line] = ()) -> Call:
        call = Call("cancel", reservation_id, request_id, list(lines))
        request = rp.CancelRequest(reservation_id=reservation_id, request_id=request_id, lines=_parts(call.lines))
        await self._made(call, lambda seconds: self._reservation.Cancel(request, timeout=seconds))
        return call

    async def extend(self, reservation_id: str, request_id: str, ttl: float) -> Call:
        call = Call("extend", reservation_id, request_id, [])
        request = rp.ExtendRequest(reservation_id=reservation_id, request_id=request_id, ttl=_seconds(ttl))
        await self._made(call, lambda seconds: self._reservation.Extend(request, timeout=seconds))
        return call

    async def receive(self, request_id: str, line: Line) -> Call:
        """Goods that come in."""
        sku, at, units = line
        call = Call("receive", "", request_id, [line])
        adjustment = ip.StockAdjustment(
            request_id=request_id, key=ip.StockKey(sku=sku, location=at), reason=ip.ADJUSTMENT_REASON_RECEIVE,
            quantity=units,
        )  # fmt: skip
        request = ip.AdjustStockRequest(adjustment=adjustment)
        await self._made(call, lambda seconds: self._inventory.AdjustStock(request, timeout=seconds))
        return call

    async def read(self, sku: str, at: str, min_version: int = 0) -> Call:
        """Stock of a key, not older than a version."""
        call = Call("read", "", "", [(sku, at, 0)], min_version=min_version)
        key = ip.AvailabilityKey(sku=sku, location=at, min_version=min_version)
        request = ip.GetAvailabilityRequest(keys=[key])
        answer = await self._made(call, lambda seconds: self._inventory.GetAvailability(request, timeout=seconds))
        if answer:
            stock = answer.stocks[0]
            call.version, call.units = stock.version, {"on_hand": stock.on_hand, "held": stock.held}
        return call

    async def _made(self, call: Call, attempt: Callable[[float], Awaitable[Any]]) -> Any:
        """Make a call until it is answered, and record it; the answer, or None."""
        self._history.calls.append(call)
        call.sent = time.time()
        until = call.sent + self._give_up
        while True:
            call.attempts += 1
            try:
                answer = await attempt(ATTEMPT_SECONDS_MAX)
            except grpc.aio.AioRpcError as error:
                call.reason = _reason(error)
                if error.code() in DECIDED:
                    call.end, call.answered = End.REFUSED, time.time()
                    return None
            else:
                call.end, call.answered, call.reason = End.OK, time.time(), ""
                return answer
            if time.time() >= until:
                return None
            await asyncio.sleep(self._dice.uniform(0, min(BACKOFF_SECONDS_MAX, 0.05 * 2**call.attempts)))


def _reason(error: grpc.aio.AioRpcError) -> str:
    """The reason of a refusal; of anything else, its status."""
    status: Any = rpc_status.from_call(cast("Any", error))
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return str(error.code().name)


def _seconds(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=int(value % 1 * 1e9))


def _parts(lines: Iterable[Line]) -> list[rp.LineQuantity]:
    return [rp.LineQuantity(sku=sku, location=at, quantity=units) for sku, at, units in lines]
