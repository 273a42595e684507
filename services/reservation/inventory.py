"""Inventory as reservation sees it: batches of holds in, this service's own data and refusals out."""

import asyncio
from collections.abc import Iterable, Sequence

import grpc
import structlog
from holdfast.inventory.v1 import error_reason_pb2, inventory_pb2, inventory_pb2_grpc

from services.reservation.domain import Action, Ask, Change, Changed, Held, Mode, Reason, Reservation, ShortLine
from shared import telemetry
from shared.errors import refusal_of
from shared.refusal import Refusal
from shared.wire import duration, moment

log = structlog.get_logger(__name__)
_MODES = {
    Mode.ALL: inventory_pb2.HOLD_MODE_ALL,
    Mode.BEST_EFFORT: inventory_pb2.HOLD_MODE_BEST_EFFORT,
    Mode.MINIMUM: inventory_pb2.HOLD_MODE_MINIMUM,
}
_REASONS = {
    "HOLD_EXPIRED": Reason.RESERVATION_EXPIRED,
    "HOLD_CLOSED": Reason.RESERVATION_NOT_HELD,
    "HOLD_QUANTITY_EXCEEDED": Reason.QUANTITY_EXCEEDED,
    "HOLD_LIFE_EXCEEDED": Reason.LIFE_EXCEEDED,
    "HOLD_NOT_FOUND": Reason.LINE_NOT_FOUND,
    "DATABASE_UNAVAILABLE": Reason.INVENTORY_UNAVAILABLE,
    "OVERLOADED": Reason.INVENTORY_UNAVAILABLE,
    "DEADLINE_PASSED": Reason.INVENTORY_UNAVAILABLE,
    "STOPPING": Reason.INVENTORY_UNAVAILABLE,
    # These are about this service and not about its caller.
    "CALLER_UNKNOWN": Reason.INVENTORY_UNAVAILABLE,
    "CALLER_FORBIDDEN": Reason.INVENTORY_UNAVAILABLE,
    "CALLER_OVER_LIMIT": Reason.INVENTORY_UNAVAILABLE,
}


class Inventory:
    """Calls over one balanced channel. What cannot be reached is Refusal INVENTORY_UNAVAILABLE."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = telemetry.traced(inventory_pb2_grpc.InventoryServiceStub(channel))

    async def place(self, asks: Sequence[Ask]) -> list[Held | Refusal]:
        """Place a hold for each, by its reservation id."""
        try:
            response = await self._stub.PlaceHolds(inventory_pb2.PlaceHoldsRequest(holds=[_hold(ask) for ask in asks]))
        except grpc.RpcError as error:
            raise _unreachable(error) from error
        return [_placed(result) for result in response.results]

    async def change(self, changes: Sequence[tuple[Change, Reservation]]) -> list[Changed | Refusal]:
        """Commit, release or extend, each by its request id."""
        chosen = [[item for item in changes if item[0].action is action] for action in Action]
        calls = (self._change(action, items) for action, items in zip(Action, chosen, strict=True) if items)
        answered = iter(await asyncio.gather(*calls))
        answers = {action: iter(next(answered)) for action, items in zip(Action, chosen, strict=True) if items}
        return [next(answers[change.action]) for change, _ in changes]

    async def expire(self, reservations: Sequence[Reservation]) -> list[Changed | Refusal]:
        """All that ever expired of each hold; a Refusal where its time is to come or it is unknown."""
        changes = [
            inventory_pb2.HoldChange(
                hold_id=reservation.reservation_id,
                request_id="expire",
                lines=[inventory_pb2.HoldChangeLine(sku=sku) for sku in reservation.skus],
            )
            for reservation in reservations
        ]
        try:
            response = await self._stub.ReleaseHolds(
                inventory_pb2.ReleaseHoldsRequest(changes=changes, expired_only=True)
            )
        except grpc.RpcError as error:
            raise _unreachable(error) from error
        return [_changed(result) for result in response.results]

    async def give_back(self, held: Iterable[tuple[Ask, Held]]) -> None:
        """Release holds that no reservation stands for; what fails expires by itself."""
        changes = [
            inventory_pb2.HoldChange(
                hold_id=ask.reservation_id,
                request_id="give-back",
                lines=[
                    inventory_pb2.HoldChangeLine(sku=sku) for sku in sorted({sku for sku, _, _ in answer.allocations})
                ],
            )
            for ask, answer in held
        ]
        try:
            await self._stub.ReleaseHolds(inventory_pb2.ReleaseHoldsRequest(changes=changes))
        except grpc.RpcError as error:
            raise _unreachable(error) from error

    async def _change(self, action: Action, items: Sequence[tuple[Change, Reservation]]) -> list[Changed | Refusal]:
        try:
            if action is Action.EXTEND:
                extended = await self._stub.ExtendHolds(
                    inventory_pb2.ExtendHoldsRequest(extensions=[_extension(*item) for item in items])
                )
                return [_changed(result) for result in extended.results]
            changes = [_hold_change(*item) for item in items]
            if action is Action.CONFIRM:
                committed = await self._stub.CommitHolds(inventory_pb2.CommitHoldsRequest(changes=changes))
                return [_changed(result) for result in committed.results]
            released = await self._stub.ReleaseHolds(inventory_pb2.ReleaseHoldsRequest(changes=changes))
            return [_changed(result) for result in released.results]
        except grpc.RpcError as error:
            raise _unreachable(error) from error


def _hold(ask: Ask) -> inventory_pb2.HoldRequest:
    return inventory_pb2.HoldRequest(
        hold_id=ask.reservation_id,
        lines=[
            inventory_pb2.HoldLine(
                sku=line.sku, location=line.location, quantity=line.quantity, minimum_quantity=line.minimum
            )
            for line in ask.lines
        ],
        mode=_MODES[ask.mode],
        ttl=duration(ask.ttl),
    )


def _hold_change(change: Change, reservation: Reservation) -> inventory_pb2.HoldChange:
    lines = [
        inventory_pb2.HoldChangeLine(sku=line.sku, location=line.location, quantity=line.quantity)
        for line in change.lines
    ] or [inventory_pb2.HoldChangeLine(sku=sku) for sku in reservation.skus]
    return inventory_pb2.HoldChange(hold_id=change.reservation_id, request_id=change.request_id, lines=lines)


def _extension(change: Change, reservation: Reservation) -> inventory_pb2.HoldExtension:
    return inventory_pb2.HoldExtension(
        hold_id=change.reservation_id, request_id=change.request_id, skus=reservation.skus, ttl=duration(change.ttl)
    )


def _parts(
    result: inventory_pb2.HoldResult | inventory_pb2.HoldChangeResult,
) -> tuple[tuple[str, str, int], ...]:
    return tuple((part.sku, part.location, part.quantity) for part in result.allocations)


def _placed(result: inventory_pb2.HoldResult) -> Held | Refusal:
    if result.HasField("error"):
        return _refusal(result.hold_id, result.error)
    short_lines = tuple(
        ShortLine(
            line.sku,
            line.location,
            line.requested,
            line.available,
            moment(line.next_expiry) if line.HasField("next_expiry") else None,
        )
        for line in result.short_lines
    )
    return Held(_parts(result), short_lines, moment(result.place_time), moment(result.expire_time), result.replayed)


def _changed(result: inventory_pb2.HoldChangeResult) -> Changed | Refusal:
    if result.HasField("error"):
        return _refusal(result.hold_id, result.error)
    return Changed(_parts(result), moment(result.expire_time), moment(result.change_time))


def _refusal(hold_id: str, error: inventory_pb2.ItemError) -> Refusal:
    """Inventory's refusal in this API's words."""
    name = error_reason_pb2.ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")
    metadata = dict(error.metadata)
    if metadata.pop("hold_id", None):
        metadata["reservation_id"] = hold_id
    return Refusal(_REASONS.get(name, name), error.message, **metadata)


def _unreachable(error: grpc.RpcError) -> Refusal:
    """Losing inventory is worth a retry; a call that it refused as a whole is not."""
    refusal = refusal_of(error)
    if refusal and refusal.reason not in _REASONS:
        return refusal
    if refusal and refusal.reason.startswith("CALLER_"):
        log.error("inventory does not let reservation in", reason=refusal.reason, **refusal.metadata)
    return Refusal(Reason.INVENTORY_UNAVAILABLE, "inventory cannot be reached; try again with the same request")
