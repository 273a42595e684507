"""What a reservation may do: frozen data and pure transitions."""

from collections.abc import Iterable
from dataclasses import dataclass
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
    LINE_NOT_FOUND = "LINE_NOT_FOUND"


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
    """A promise, with its lines and allocations."""

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
    version: int = 1

    @property
    def skus(self) -> list[str]:
        return sorted({allocation.sku for allocation in self.allocations})


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
    """Inventory's answer to a change: quantities by (sku, location), and until when the rest is held."""

    allocations: tuple[tuple[str, str, int], ...]
    expires_at: datetime


def reused(request_id: str) -> Refusal:
    return Refusal(Reason.REQUEST_ID_REUSED, f"{request_id} was used with other content", request_id=request_id)


def require_held(reservation: Reservation) -> None:
    """Only what is HELD can change; an expired reservation says so."""
    name, state = reservation.reservation_id, reservation.state
    if state is State.HELD:
        return
    if state is State.EXPIRED:
        raise Refusal(Reason.RESERVATION_EXPIRED, f"the time of {name} has come", reservation_id=name)
    raise Refusal(
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


def expiry(allocations: Iterable[Allocation], expired: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """What is still to be booked of all that ever expired; never more than is held here."""
    known = {(part.sku, part.location): part for part in allocations}
    booked = []
    for sku, location, total in expired:
        part = known[sku, location]
        units = min(total - part.expired, part.held)
        if units > 0:
            booked.append((sku, location, units))
    return booked
