"""What a reservation may do: frozen data and pure transitions."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from shared.refusal import Refusal


class Reason(StrEnum):
    """The API's ErrorReason."""

    FIELD_INVALID = "FIELD_INVALID"
    TOO_MANY_ITEMS = "TOO_MANY_ITEMS"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"  # noqa: S105 - a name
    SKU_NOT_FOUND = "SKU_NOT_FOUND"
    LOCATION_NOT_FOUND = "LOCATION_NOT_FOUND"
    SKU_ARCHIVED = "SKU_ARCHIVED"
    LOCATION_ARCHIVED = "LOCATION_ARCHIVED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    RESERVATION_NOT_FOUND = "RESERVATION_NOT_FOUND"
    RESERVATION_NOT_HELD = "RESERVATION_NOT_HELD"
    RESERVATION_EXPIRED = "RESERVATION_EXPIRED"
    QUANTITY_EXCEEDED = "QUANTITY_EXCEEDED"
    LIFE_EXCEEDED = "LIFE_EXCEEDED"
    OVERLOADED = "OVERLOADED"
    DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
    INVENTORY_UNAVAILABLE = "INVENTORY_UNAVAILABLE"
    DEADLINE_PASSED = "DEADLINE_PASSED"
    STOPPING = "STOPPING"
    CALLER_UNKNOWN = "CALLER_UNKNOWN"
    CALLER_FORBIDDEN = "CALLER_FORBIDDEN"
    CALLER_OVER_LIMIT = "CALLER_OVER_LIMIT"
    LINE_NOT_FOUND = "LINE_NOT_FOUND"
    SUBJECT_BLOCKED = "SUBJECT_BLOCKED"
    LIMIT_REACHED = "LIMIT_REACHED"
    ENFORCEMENT_STALE = "ENFORCEMENT_STALE"


class State(StrEnum):
    """Where a reservation is in its life."""

    HELD = "HELD"
    CONFIRMED = "CONFIRMED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    REJECTED = "REJECTED"


class Mode(StrEnum):
    """How much must be met."""

    ALL = "ALL"
    BEST_EFFORT = "BEST_EFFORT"
    MINIMUM = "MINIMUM"


class Action(StrEnum):
    """What is done to a reservation later."""

    CONFIRM = "CONFIRM"
    CANCEL = "CANCEL"
    EXTEND = "EXTEND"


@dataclass(frozen=True, slots=True)
class Line:
    """What was asked for; an empty location leaves the source open."""

    sku: str
    location: str
    quantity: int
    minimum: int = 0
    currency_code: str = ""
    price_micros: int = 0


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was held at one source, and what became of it."""

    sku: str
    location: str
    held: int
    confirmed: int = 0
    cancelled: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class ShortLine:
    """A line that could not be met in full, as it was when it was decided."""

    sku: str
    location: str
    requested: int
    available: int
    next_expiry: datetime | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A Reserve, checked."""

    reservation_id: str
    customer_id: str
    lines: tuple[Line, ...]
    mode: Mode
    ttl: timedelta
    fingerprint: bytes
    order_time: datetime | None = None
    country: str = ""
    device_id: str = ""
    ip_address: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """Inventory's answer to a Reserve: what it allocated (nothing: refused), when, and until when."""

    allocations: tuple[tuple[str, str, int], ...]
    short_lines: tuple[ShortLine, ...]
    placed_at: datetime
    expires_at: datetime
    replayed: bool


@dataclass(frozen=True, slots=True)
class Reservation:
    """A promise, with its lines and allocations. `key_id` is the key that its events' hashes are made with."""

    reservation_id: str
    customer_id: str
    state: State
    mode: Mode
    fingerprint: bytes
    lines: tuple[Line, ...]
    allocations: tuple[Allocation, ...]
    short_lines: tuple[ShortLine, ...]
    expires_at: datetime
    created_at: datetime
    updated_at: datetime
    order_time: datetime
    country: str
    version: int = 1
    device_id: str = ""
    ip_address: str = ""
    key_id: str = ""

    @property
    def skus(self) -> list[str]:
        return sorted({allocation.sku for allocation in self.allocations})

    @property
    def rows(self) -> int:
        """How much it is to read and to send."""
        return len(self.lines) + len(self.allocations) + len(self.short_lines)


@dataclass(frozen=True, slots=True)
class ChangeLine:
    """Units to confirm or cancel; location "" for any source, quantity 0 for all that is left."""

    sku: str
    location: str
    quantity: int


@dataclass(frozen=True, slots=True)
class Change:
    """A Confirm, Cancel or Extend, checked. No lines means all that is held."""

    reservation_id: str
    request_id: str
    action: Action
    lines: tuple[ChangeLine, ...]
    ttl: timedelta
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Changed:
    """Inventory's answer to a change: quantities by (sku, location), until when the rest is held, and when it was."""

    allocations: tuple[tuple[str, str, int], ...]
    expires_at: datetime
    changed_at: datetime


def reused(request_id: str) -> Refusal:
    return Refusal(Reason.REQUEST_ID_REUSED, f"{request_id} was used with other content", request_id=request_id)


def barred(reservation: Reservation) -> Refusal:
    """Why a reservation that is not HELD cannot change; an expired one says so."""
    name, state = reservation.reservation_id, reservation.state
    if state is State.EXPIRED:
        return Refusal(Reason.RESERVATION_EXPIRED, f"the time of {name} has come", reservation_id=name)
    return Refusal(
        Reason.RESERVATION_NOT_HELD, f"{name} is {state}: nothing of it is held", reservation_id=name, state=state
    )


def settle(allocations: Iterable[Allocation]) -> State:
    """The state that quantities amount to."""
    parts = list(allocations)
    if any(part.held for part in parts):
        return State.HELD
    if any(part.confirmed for part in parts):
        return State.CONFIRMED
    if any(part.expired for part in parts):
        return State.EXPIRED
    return State.CANCELLED


def book(reservation: Reservation, action: Action, changed: Changed) -> Reservation:
    """The reservation after inventory has carried out a change of it."""
    units = {(sku, location): quantity for sku, location, quantity in changed.allocations}
    column = "confirmed" if action is Action.CONFIRM else "cancelled"
    return _moved(reservation, changed, column, units)


def book_expiry(reservation: Reservation, expired: Changed) -> Reservation:
    """The reservation after what `expired` says has ever expired of it; never more than is held here.

    The same reservation where all of that is booked already.
    """
    total = {(sku, location): quantity for sku, location, quantity in expired.allocations}
    due = {
        (part.sku, part.location): units
        for part in reservation.allocations
        if (units := min(total.get((part.sku, part.location), 0) - part.expired, part.held)) > 0
    }
    return _moved(reservation, expired, "expired", due) if due else reservation


def _moved(reservation: Reservation, changed: Changed, column: str, units: dict[tuple[str, str], int]) -> Reservation:
    """Move units from held to another column; the state follows, and neither time runs backwards."""
    allocations = tuple(
        replace(part, **{"held": part.held - gone, column: getattr(part, column) + gone})
        if (gone := units.get((part.sku, part.location), 0))
        else part
        for part in reservation.allocations
    )
    return replace(
        reservation,
        allocations=allocations,
        state=settle(allocations),
        expires_at=max(reservation.expires_at, changed.expires_at),
        updated_at=max(reservation.updated_at, changed.changed_at),
    )
