"""Between the domain's data and the wire's: answers, events, and nothing else."""

from collections.abc import Iterable
from datetime import datetime

from holdfast.inventory.v1 import error_reason_pb2, events_pb2, inventory_pb2

from services.inventory import domain
from shared.database import Record
from shared.errors import ErrorMap
from shared.outbox import Event
from shared.refusal import Refusal
from shared.wire import timestamp

MOVEMENTS_TOPIC = "holdfast.inventory.movements.v1"
CATALOG_TOPIC = "holdfast.inventory.catalog.v1"
COMMANDS_TOPIC = "holdfast.inventory.commands.v1"
MOVED_TYPE = events_pb2.StockMoved.DESCRIPTOR.full_name
CHANGED_TYPE = events_pb2.SkuChanged.DESCRIPTOR.full_name

_KINDS = {kind: inventory_pb2.MovementKind.Value(f"MOVEMENT_KIND_{kind}") for kind in domain.Kind}
_REASONS = {reason.value: error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}") for reason in domain.Reason}


def reason(refusal: Refusal) -> error_reason_pb2.ErrorReason.ValueType:
    return _REASONS[refusal.reason]


def item_error(refusal: Refusal, errors: ErrorMap) -> inventory_pb2.ItemError:
    return inventory_pb2.ItemError(
        code=errors.code(refusal).value[0],
        reason=reason(refusal),
        message=refusal.message,
        metadata=refusal.metadata,
    )


def stock(value: domain.Stock, as_of: datetime) -> inventory_pb2.Stock:
    return inventory_pb2.Stock(
        sku=value.sku,
        location=value.location,
        on_hand=value.on_hand,
        held=value.held,
        safety_stock=value.safety_stock,
        backorder_limit=value.backorder_limit,
        short=value.short,
        available=value.available,
        version=value.version,
        as_of=timestamp(as_of),
    )


def movement(value: domain.Movement, time: datetime) -> inventory_pb2.Movement:
    after = value.after
    return inventory_pb2.Movement(
        sku=after.sku,
        location=after.location,
        version=after.version,
        kind=_KINDS[value.kind],
        on_hand_delta=value.on_hand_delta,
        held_delta=value.held_delta,
        short_delta=value.short_delta,
        on_hand=after.on_hand,
        held=after.held,
        short=after.short,
        safety_stock=after.safety_stock,
        backorder_limit=after.backorder_limit,
        hold_id=value.hold_id,
        request_id=value.request_id,
        reference=value.reference,
        time=timestamp(time),
        occur_time=timestamp(value.occurred_at) if value.occurred_at else None,
    )


def moved(movements: Iterable[tuple[domain.Movement, datetime]]) -> tuple[list[str], list[bytes]]:
    """The keys and payloads of the events of movements, in their order."""
    keys: list[str] = []
    payloads: list[bytes] = []
    for value, time in movements:
        keys.append(value.after.sku)
        payloads.append(events_pb2.StockMoved(movement=movement(value, time)).SerializeToString())
    return keys, payloads


def sku_changed(row: Record) -> Event:
    message = events_pb2.SkuChanged(sku=sku(row), version=row["version"])
    return Event(CATALOG_TOPIC, row["sku"], CHANGED_TYPE, message.SerializeToString())


def sku(row: Record) -> inventory_pb2.Sku:
    price = None
    if row["currency_code"]:
        price = inventory_pb2.Money(currency_code=row["currency_code"], micros=row["price_micros"])
    return inventory_pb2.Sku(
        sku=row["sku"],
        name=row["name"],
        category=row["category"],
        unit=row["unit"],
        unit_price=price,
        state=_state(row),
        etag=str(row["version"]),
        create_time=timestamp(row["created_at"]),
        update_time=timestamp(row["updated_at"]),
    )


def location(row: Record) -> inventory_pb2.Location:
    return inventory_pb2.Location(
        location=row["location"],
        name=row["name"],
        priority=row["priority"],
        state=_state(row),
        etag=str(row["version"]),
        create_time=timestamp(row["created_at"]),
        update_time=timestamp(row["updated_at"]),
    )


def _state(row: Record) -> inventory_pb2.LifecycleState.ValueType:
    return inventory_pb2.LIFECYCLE_STATE_ACTIVE if row["active"] else inventory_pb2.LIFECYCLE_STATE_ARCHIVED


def adjusted(movements: Iterable[domain.Movement], time: datetime) -> inventory_pb2.AdjustStockResponse:
    movements = list(movements)
    return inventory_pb2.AdjustStockResponse(
        stocks=[stock(value.after, time) for value in movements],
        movements=[movement(value, time) for value in movements],
    )


def import_error(row_number: int, refusal: Refusal) -> inventory_pb2.ImportError:
    return inventory_pb2.ImportError(row_number=row_number, reason=reason(refusal), message=refusal.message)


def allocations(values: Iterable[domain.Allocation]) -> list[inventory_pb2.HoldAllocation]:
    return [
        inventory_pb2.HoldAllocation(sku=value.sku, location=value.location, quantity=value.quantity)
        for value in values
    ]


def placed(value: domain.Placed) -> inventory_pb2.HoldResult:
    return inventory_pb2.HoldResult(
        hold_id=value.hold_id,
        outcome=inventory_pb2.HOLD_OUTCOME_HELD if value.allocations else inventory_pb2.HOLD_OUTCOME_REFUSED,
        allocations=allocations(value.allocations),
        short_lines=[
            inventory_pb2.ShortLine(
                sku=line.sku,
                location=line.location,
                requested=line.requested,
                available=line.available,
                next_expiry=timestamp(line.next_expiry) if line.next_expiry else None,
            )
            for line in value.short_lines
        ],
        expire_time=timestamp(value.expires_at),
        replayed=value.replayed,
        place_time=timestamp(value.placed_at),
    )


def changed(value: domain.Changed) -> inventory_pb2.HoldChangeResult:
    return inventory_pb2.HoldChangeResult(
        hold_id=value.hold_id,
        allocations=allocations(value.allocations),
        expire_time=timestamp(value.expires_at),
        change_time=timestamp(value.changed_at),
        replayed=value.replayed,
    )
