"""Between events and the domain's data."""

from datetime import datetime

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from holdfast.inventory.v1 import events_pb2 as inventory_events
from holdfast.inventory.v1 import inventory_pb2
from holdfast.reservation.v1 import events_pb2 as reservation_events
from holdfast.reservation.v1 import reservation_pb2

from services.analytics.domain import Line, Movement, Part, Reservation, Short
from shared.check import BUSINESS_YEARS
from shared.consumer import Message, Poison
from shared.wire import moment

MOVEMENTS_TOPIC = "holdfast.inventory.movements.v1"
CATALOG_TOPIC = "holdfast.inventory.catalog.v1"
CHANGES_TOPIC = "holdfast.reservation.changes.v1"
VERDICTS_TOPIC = "holdfast.analytics.verdicts.v1"
TOPICS = (MOVEMENTS_TOPIC, CATALOG_TOPIC, CHANGES_TOPIC)

_KINDS = {number: name.removeprefix("MOVEMENT_KIND_") for name, number in inventory_pb2.MovementKind.items() if number}
_STATES = {
    number: name.removeprefix("RESERVATION_STATE_")
    for name, number in reservation_pb2.ReservationState.items()
    if number
}


def movement(message: Message) -> Movement:
    """The movement of a StockMoved. Raises Poison."""
    try:
        told = inventory_events.StockMoved.FromString(message.value or b"").movement
    except DecodeError:
        raise Poison("not a StockMoved") from None
    kind = _KINDS.get(told.kind)
    if not kind or not told.sku or not told.location or told.version < 1 or not told.HasField("time"):
        raise Poison("a StockMoved without kind, key, version or time")
    recorded_at = moment(told.time)
    occurred_at = _business_time(told.occur_time) if told.HasField("occur_time") else recorded_at
    return Movement(
        told.sku, told.location, told.version, recorded_at, kind, told.on_hand_delta, told.held_delta, told.on_hand,
        told.held, told.short, told.safety_stock, told.backorder_limit, told.hold_id, told.request_id, told.reference,
        occurred_at,
    )  # fmt: skip


def sku(message: Message) -> tuple[str, str, str, str, str, int, bool, int]:
    """The columns of a SkuChanged, as `store.write_skus` takes them. Raises Poison."""
    try:
        told = inventory_events.SkuChanged.FromString(message.value or b"")
    except DecodeError:
        raise Poison("not a SkuChanged") from None
    if not told.sku.sku or told.version < 1:
        raise Poison("a SkuChanged without code or version")
    active = told.sku.state == inventory_pb2.LIFECYCLE_STATE_ACTIVE
    price = told.sku.unit_price
    return (
        told.sku.sku, told.sku.name, told.sku.category, told.sku.unit, price.currency_code, price.micros, active,
        told.version,
    )  # fmt: skip


def reservation(message: Message) -> Reservation:
    """The reservation of a ReservationChanged. Raises Poison."""
    try:
        event = reservation_events.ReservationChanged.FromString(message.value or b"")
    except DecodeError:
        raise Poison("not a ReservationChanged") from None
    told = event.reservation
    state = _STATES.get(told.state)
    if not state or not told.reservation_id or told.version < 1 or not told.HasField("create_time"):
        raise Poison("a ReservationChanged without state, id, version or time")
    created_at = moment(told.create_time)
    return Reservation(
        told.reservation_id,
        told.version,
        state,
        event.subjects.customer,
        told.country,
        _business_time(told.order_time) if told.HasField("order_time") else created_at,
        created_at,
        moment(told.update_time),
        tuple(
            Line(line.sku, line.quantity, line.unit_price.currency_code, line.unit_price.micros) for line in told.lines
        ),
        tuple(
            Part(part.sku, part.location, part.held, part.confirmed, part.cancelled, part.expired)
            for part in told.allocations
        ),
        tuple(Short(line.sku, line.location, line.requested, line.available) for line in told.short_lines),
        event.request_id,
        event.subjects.device,
        event.subjects.network,
    )


def _business_time(value: Timestamp) -> datetime:
    time = moment(value)
    if time.year not in BUSINESS_YEARS:
        raise Poison("a business time out of range")
    return time
