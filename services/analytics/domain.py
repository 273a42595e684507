"""What events amount to: frozen data and pure steps from what is known to what is new."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

Key = tuple[str, str]


class Reason(StrEnum):
    """The API's ErrorReason."""

    FIELD_INVALID = "FIELD_INVALID"
    TOO_MANY_ITEMS = "TOO_MANY_ITEMS"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"  # noqa: S105 - a name
    RESERVATION_NOT_FOUND = "RESERVATION_NOT_FOUND"
    NOT_CAUGHT_UP = "NOT_CAUGHT_UP"
    HISTORY_NOT_KEPT = "HISTORY_NOT_KEPT"
    OVERLOADED = "OVERLOADED"
    DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
    STOPPING = "STOPPING"
    CALLER_UNKNOWN = "CALLER_UNKNOWN"
    CALLER_FORBIDDEN = "CALLER_FORBIDDEN"
    CALLER_OVER_LIMIT = "CALLER_OVER_LIMIT"
    RULE_NOT_FOUND = "RULE_NOT_FOUND"
    CASE_NOT_FOUND = "CASE_NOT_FOUND"
    CASE_CLOSED = "CASE_CLOSED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    ALERT_RULE_NOT_FOUND = "ALERT_RULE_NOT_FOUND"
    ALERT_RULE_ALREADY_EXISTS = "ALERT_RULE_ALREADY_EXISTS"
    SUBSCRIPTION_NOT_FOUND = "SUBSCRIPTION_NOT_FOUND"
    SUBSCRIPTION_ALREADY_EXISTS = "SUBSCRIPTION_ALREADY_EXISTS"
    SUBSCRIPTION_DELETED = "SUBSCRIPTION_DELETED"
    DELIVERY_NOT_FOUND = "DELIVERY_NOT_FOUND"
    DELIVERY_NOT_DEAD = "DELIVERY_NOT_DEAD"
    LIMIT_REACHED = "LIMIT_REACHED"


class Movement(NamedTuple):
    """A row of inventory's ledger, as its event tells it. A tuple, because there are many."""

    sku: str
    location: str
    version: int
    recorded_at: datetime
    kind: str
    on_hand_delta: int
    held_delta: int
    on_hand: int
    held: int
    short: int
    safety_stock: int
    backorder_limit: int
    hold_id: str
    request_id: str
    reference: str
    occurred_at: datetime

    @property
    def available(self) -> int:
        return max(0, self.on_hand - self.held - self.safety_stock + self.backorder_limit)


class Known(NamedTuple):
    """What is known of a key: nothing of a new one."""

    version: int = 0
    available: int = 0


@dataclass(slots=True)
class StockOuts:
    """What a batch does to a key's stock-outs: ends the open one, adds whole ones, and may open one."""

    ends_at: datetime | None = None
    whole: list[tuple[int, datetime, datetime]] = field(default_factory=list)
    opens: tuple[int, datetime] | None = None

    def see(self, movement: Movement, before: int) -> None:
        after = movement.available
        if before > 0 and after == 0:
            self.opens = (movement.version, movement.recorded_at)
        elif before == 0 and after > 0:
            if self.opens:
                self.whole.append((*self.opens, movement.recorded_at))
                self.opens = None
            elif not self.whole:
                self.ends_at = movement.recorded_at


@dataclass(slots=True)
class Applied:
    """What a batch of movements adds: rows in order, each with what was available before it, and where it led."""

    rows: list[tuple[Movement, int]] = field(default_factory=list)
    last: dict[Key, Movement] = field(default_factory=dict)
    first: dict[Key, Movement] = field(default_factory=dict)
    outs: dict[Key, StockOuts] = field(default_factory=dict)
    gaps: dict[Key, int] = field(default_factory=dict)  # the version that is missing


def apply_movements(movements: Iterable[Movement], known: Mapping[Key, Known]) -> Applied:
    """Take each movement that is its key's next. A repeat changes nothing; a gap stops its key."""
    applied = Applied()
    at = dict(known)
    for movement in movements:
        key = (movement.sku, movement.location)
        version, before = at.get(key) or Known()
        if movement.version <= version or key in applied.gaps:
            continue
        if movement.version != version + 1:
            applied.gaps[key] = version + 1
            continue
        after = movement.available
        at[key] = Known(movement.version, after)
        applied.rows.append((movement, before))
        applied.last[key] = movement
        applied.first.setdefault(key, movement)
        if (before == 0) != (after == 0):
            applied.outs.setdefault(key, StockOuts()).see(movement, before)
    return applied


@dataclass(frozen=True, slots=True)
class Line:
    """What was asked for, at a price."""

    sku: str
    quantity: int
    currency_code: str
    price_micros: int


@dataclass(frozen=True, slots=True)
class Part:
    """What was held at one source, and what became of it."""

    sku: str
    location: str
    held: int
    confirmed: int
    cancelled: int
    expired: int


@dataclass(frozen=True, slots=True)
class Short:
    """A line that could not be met in full."""

    sku: str
    location: str
    requested: int
    available: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A reservation as an event tells it, and the request that made it so."""

    reservation_id: str
    version: int
    state: str
    customer_id: str
    country: str
    order_time: datetime
    created_at: datetime
    updated_at: datetime
    lines: tuple[Line, ...]
    parts: tuple[Part, ...]
    short_lines: tuple[Short, ...]
    request_id: str
    device: str = ""
    network: str = ""


@dataclass(frozen=True, slots=True)
class KnownReservation:
    """What is known of a reservation: its version, when it first sold, and what each source has sold."""

    version: int = 0
    confirmed_at: datetime | None = None
    sold: Mapping[Key, int] = field(default_factory=dict)


class Sale(NamedTuple):
    """Units sold at their price."""

    sku: str
    order_time: datetime
    reservation_id: str
    version: int
    location: str
    currency_code: str
    customer_id: str
    country: str
    units: int
    value_micros: int
    sold_at: datetime


def sales(reservation: Reservation, known: KnownReservation) -> list[Sale]:
    """What a reservation has sold since it was last seen.

    Lines of one SKU may differ in price: units are sold in the order of the lines, so that whatever the parts in
    which they were confirmed, the whole comes to the sum of the lines.
    """
    before: dict[str, int] = {}
    for (sku, _), units in known.sold.items():
        before[sku] = before.get(sku, 0) + units
    found: list[Sale] = []
    for part in reservation.parts:
        units = part.confirmed - known.sold.get((part.sku, part.location), 0)
        if units <= 0:
            continue
        start = before.get(part.sku, 0)
        before[part.sku] = start + units
        for currency, (sold, value) in sorted(_priced(reservation.lines, part.sku, start, start + units).items()):
            found.append(
                Sale(
                    part.sku, reservation.order_time, reservation.reservation_id, reservation.version, part.location,
                    currency, reservation.customer_id, reservation.country, sold, value, reservation.updated_at,
                )
            )  # fmt: skip
    return found


def _priced(lines: Sequence[Line], sku: str, start: int, end: int) -> dict[str, tuple[int, int]]:
    """Units and value, by currency, of the units from `start` to `end` of a SKU, in the order of its lines."""
    totals: dict[str, tuple[int, int]] = {}
    at = 0
    for line in lines:
        if line.sku != sku:
            continue
        units = min(end, at + line.quantity) - max(start, at)
        at += line.quantity
        if units > 0:
            sold, value = totals.get(line.currency_code, (0, 0))
            totals[line.currency_code] = (sold + units, value + units * line.price_micros)
    return totals
