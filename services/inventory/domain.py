"""What stock may do: frozen data, and pure transitions that either move it or refuse.

No clock, no store, no wire format: `now` and the rows come in as arguments, movements go out.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import TypeVar

from shared.refusal import Refusal

QUANTITY_MAX = 10**12
HOLD_LIFE_SECONDS_MAX = 7 * 24 * 3600

Item = TypeVar("Item")
By = TypeVar("By", bound=Hashable)
Key = tuple[str, str]  # (sku, location), in the order in which rows are locked


class Reason(StrEnum):
    """The API's ErrorReason."""

    FIELD_INVALID = "FIELD_INVALID"
    TOO_MANY_ITEMS = "TOO_MANY_ITEMS"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"  # noqa: S105 - a name
    FIELD_MASK_INVALID = "FIELD_MASK_INVALID"
    SKU_NOT_FOUND = "SKU_NOT_FOUND"
    LOCATION_NOT_FOUND = "LOCATION_NOT_FOUND"
    SKU_ALREADY_EXISTS = "SKU_ALREADY_EXISTS"
    LOCATION_ALREADY_EXISTS = "LOCATION_ALREADY_EXISTS"
    SKU_ARCHIVED = "SKU_ARCHIVED"
    LOCATION_ARCHIVED = "LOCATION_ARCHIVED"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    VERSION_MISMATCH = "VERSION_MISMATCH"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    INSUFFICIENT_STOCK = "INSUFFICIENT_STOCK"
    BELOW_HELD = "BELOW_HELD"
    QUANTITY_OUT_OF_RANGE = "QUANTITY_OUT_OF_RANGE"
    HOLD_NOT_FOUND = "HOLD_NOT_FOUND"
    HOLD_EXPIRED = "HOLD_EXPIRED"
    HOLD_NOT_EXPIRED = "HOLD_NOT_EXPIRED"
    HOLD_CLOSED = "HOLD_CLOSED"
    HOLD_QUANTITY_EXCEEDED = "HOLD_QUANTITY_EXCEEDED"
    HOLD_LIFE_EXCEEDED = "HOLD_LIFE_EXCEEDED"
    VERSION_NOT_REACHED = "VERSION_NOT_REACHED"
    WATCH_VERSION_GONE = "WATCH_VERSION_GONE"
    OVERLOADED = "OVERLOADED"
    DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
    DEADLINE_PASSED = "DEADLINE_PASSED"
    STOPPING = "STOPPING"
    CALLER_UNKNOWN = "CALLER_UNKNOWN"
    CALLER_FORBIDDEN = "CALLER_FORBIDDEN"
    CALLER_OVER_LIMIT = "CALLER_OVER_LIMIT"


class Kind(StrEnum):
    """Why stock moved: the API's MovementKind."""

    RECEIVE = "RECEIVE"
    SHIP = "SHIP"
    RETURN = "RETURN"
    COUNT = "COUNT"
    DAMAGE = "DAMAGE"
    TRANSFER_OUT = "TRANSFER_OUT"
    TRANSFER_IN = "TRANSFER_IN"
    HOLD = "HOLD"
    COMMIT = "COMMIT"
    RELEASE = "RELEASE"
    EXPIRE = "EXPIRE"
    POLICY = "POLICY"
    REPAIR = "REPAIR"


class Change(StrEnum):
    """What is asked of stock by an adjustment."""

    RECEIVE = "RECEIVE"
    SHIP = "SHIP"
    RETURN = "RETURN"
    COUNT = "COUNT"
    DAMAGE = "DAMAGE"
    TRANSFER = "TRANSFER"
    POLICY = "POLICY"


class Mode(StrEnum):
    """How much of a hold must be met."""

    ALL = "ALL"
    BEST_EFFORT = "BEST_EFFORT"
    MINIMUM = "MINIMUM"


@dataclass(frozen=True, slots=True)
class Stock:
    """The counters of one key. `active` is False when its SKU or its location is archived."""

    sku: str
    location: str
    on_hand: int = 0
    held: int = 0
    safety_stock: int = 0
    backorder_limit: int = 0
    short: int = 0
    version: int = 0
    active: bool = True

    @property
    def key(self) -> Key:
        return self.sku, self.location

    @property
    def available(self) -> int:
        """What a new hold can have."""
        if not self.active:
            return 0
        return max(0, self.on_hand - self.held - self.safety_stock + self.backorder_limit)


@dataclass(frozen=True, slots=True)
class Movement:
    """One row of the ledger: the deltas, and the stock afterwards."""

    after: Stock
    kind: Kind
    on_hand_delta: int = 0
    held_delta: int = 0
    short_delta: int = 0
    hold_id: str = ""
    request_id: str = ""
    reference: str = ""
    occurred_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Adjustment:
    """One change of stock asked for. For POLICY `quantity` is unused and the two limits are set."""

    request_id: str
    sku: str
    location: str
    change: Change
    quantity: int = 0
    relative: bool = False
    to_location: str = ""
    allow_short: bool = False
    reference: str = ""
    expected_version: int | None = None
    safety_stock: int = 0
    backorder_limit: int = 0
    occurred_at: datetime | None = None
    fingerprint: bytes = b""

    @property
    def keys(self) -> list[Key]:
        if self.change is Change.TRANSFER:
            return [(self.sku, self.location), (self.sku, self.to_location)]
        return [(self.sku, self.location)]


@dataclass(frozen=True, slots=True)
class HoldLine:
    """Units asked for; an empty location leaves the source open."""

    sku: str
    location: str
    quantity: int
    minimum: int = 0


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """A hold asked for. `lines` are summed: no two of them share SKU and location."""

    hold_id: str
    lines: tuple[HoldLine, ...]
    mode: Mode
    ttl: timedelta
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Allocation:
    """Units at one source."""

    sku: str
    location: str
    quantity: int

    @property
    def key(self) -> Key:
        return self.sku, self.location


@dataclass(frozen=True, slots=True)
class ShortLine:
    """A line that could not be met in full, and why."""

    sku: str
    location: str
    requested: int
    available: int
    next_expiry: datetime | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a hold gets. Nothing allocated means refused."""

    allocations: tuple[Allocation, ...]
    short_lines: tuple[ShortLine, ...] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """The outcome of a hold, first or repeated."""

    hold_id: str
    allocations: tuple[Allocation, ...]
    short_lines: tuple[ShortLine, ...]
    placed_at: datetime
    expires_at: datetime
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class HoldRow:
    """What a hold has at one source: `quantity` = held + committed + released + expired."""

    sku: str
    hold_id: str
    slot: int
    location: str
    quantity: int
    held: int
    committed: int
    released: int
    expired: int
    fingerprint: bytes
    created_at: datetime
    expires_at: datetime
    short_lines: tuple[ShortLine, ...] = ()

    @property
    def key(self) -> Key:
        return self.sku, self.location

    @property
    def slot_key(self) -> tuple[str, str, int]:
        """The row's own key."""
        return self.sku, self.hold_id, self.slot


@dataclass(frozen=True, slots=True)
class ChangeLine:
    """Units to commit or release; location "" for any source, quantity 0 for all that is left."""

    sku: str
    location: str
    quantity: int


@dataclass(frozen=True, slots=True)
class HoldChange:
    """A commit, release or extension of one hold. An extension has `ttl` and whole lines."""

    hold_id: str
    request_id: str
    kind: Kind
    lines: tuple[ChangeLine, ...]
    fingerprint: bytes
    ttl: timedelta = timedelta()

    @property
    def skus(self) -> list[str]:
        return sorted({line.sku for line in self.lines})


@dataclass(frozen=True, slots=True)
class Changed:
    """The outcome of a hold's change, first or repeated."""

    hold_id: str
    allocations: tuple[Allocation, ...]
    expires_at: datetime
    changed_at: datetime
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class ImportRow:
    """One row of an import, checked."""

    row_number: int
    sku: tuple[str, str, str, str, str, int]
    location: str
    quantity: int
    safety_stock: int
    backorder_limit: int
    fingerprint: bytes


@dataclass(slots=True)
class Shelf:
    """Stock, locked or as it was read, and the movements made of it so far. The one thing here that changes."""

    stocks: dict[Key, Stock]
    movements: list[Movement] = field(default_factory=list)

    def move(
        self,
        key: Key,
        kind: Kind,
        *,
        on_hand: int = 0,
        held: int = 0,
        allow_short: bool = False,
        policy: tuple[int, int] | None = None,
        hold_id: str = "",
        request_id: str = "",
        reference: str = "",
        occurred_at: datetime | None = None,
    ) -> Movement:
        """Book one movement. A shortage shrinks by itself as soon as it can; it grows only if allowed.

        Raises Refusal BELOW_HELD where more would be held than there is, and QUANTITY_OUT_OF_RANGE.
        """
        before = self.stocks[key]
        safety_stock, backorder_limit = policy or (before.safety_stock, before.backorder_limit)
        now_on_hand, now_held = before.on_hand + on_hand, before.held + held
        missing = max(0, now_held - now_on_hand - backorder_limit)
        if missing > before.short and not allow_short:
            raise Refusal(
                Reason.BELOW_HELD,
                f"{before.held} units of {before.sku} at {before.location} are held",
                sku=before.sku,
                location=before.location,
                held=before.held,
            )
        if now_on_hand > QUANTITY_MAX:
            raise Refusal(
                Reason.QUANTITY_OUT_OF_RANGE,
                f"{before.sku} at {before.location} would have more than {QUANTITY_MAX} units",
                sku=before.sku,
                location=before.location,
            )
        after = replace(
            before,
            on_hand=now_on_hand,
            held=now_held,
            short=missing,
            safety_stock=safety_stock,
            backorder_limit=backorder_limit,
            version=before.version + 1,
        )
        movement = Movement(
            after, kind, on_hand, held, missing - before.short, hold_id, request_id, reference, occurred_at
        )
        self.stocks[key] = after
        self.movements.append(movement)
        return movement


@dataclass(frozen=True, slots=True)
class Drift:
    """By how much a key's counters exceed what its ledger and (`hold`) its open holds come to."""

    key: Key
    version: int
    on_hand: int
    held: int
    short: int
    hold: int

    @property
    def units(self) -> int:
        return abs(self.on_hand) + abs(self.held) + abs(self.short) + abs(self.hold)

    @property
    def drifts(self) -> bool:
        return bool(self.version or self.units)


def repair(stock: Stock, drift: Drift, request_id: str) -> Movement | None:
    """The entry after which counters, ledger and open holds agree; None where versions are missing.

    What is on hand stands as it is counted, because it was promised against; what is held is what the open holds
    come to. The ledger gets the difference. A version that is missing cannot be made up: that takes a person.
    """
    if drift.version:
        return None
    held = stock.held - drift.hold
    short = max(0, held - stock.on_hand - stock.backorder_limit)
    after = replace(stock, held=held, short=short, version=stock.version + 1)
    return Movement(
        after,
        Kind.REPAIR,
        drift.on_hand,
        drift.held - drift.hold,
        short - (stock.short - drift.short),
        request_id=request_id,
    )


def adjust(shelf: Shelf, ask: Adjustment) -> list[Movement]:
    """Apply one adjustment; raise a Refusal and leave the shelf as it was."""
    here = shelf.stocks[ask.sku, ask.location]
    if ask.expected_version is not None and here.version != ask.expected_version:
        raise Refusal(
            Reason.VERSION_MISMATCH,
            f"version of {here.sku} at {here.location} is {here.version}, not {ask.expected_version}",
            sku=here.sku,
            location=here.location,
            version=here.version,
            expected_version=ask.expected_version,
        )
    move = partial(shelf.move, request_id=ask.request_id, reference=ask.reference, occurred_at=ask.occurred_at)
    match ask.change:
        case Change.RECEIVE | Change.RETURN:
            return [move(here.key, Kind(ask.change), on_hand=ask.quantity)]
        case Change.SHIP:
            _require_free(here, ask.quantity)
            return [move(here.key, Kind.SHIP, on_hand=-ask.quantity)]
        case Change.TRANSFER:
            _require_free(here, ask.quantity)
            there = (ask.sku, ask.to_location)
            if shelf.stocks[there].on_hand + ask.quantity > QUANTITY_MAX:
                raise Refusal(
                    Reason.QUANTITY_OUT_OF_RANGE,
                    f"{ask.sku} at {ask.to_location} would have more than {QUANTITY_MAX} units",
                    sku=ask.sku,
                    location=ask.to_location,
                )
            return [
                move(here.key, Kind.TRANSFER_OUT, on_hand=-ask.quantity),
                move(there, Kind.TRANSFER_IN, on_hand=ask.quantity),
            ]
        case Change.POLICY:
            policy = (ask.safety_stock, ask.backorder_limit)
            return [move(here.key, Kind.POLICY, policy=policy)]
        case Change.COUNT | Change.DAMAGE:
            delta = _found(here, ask)
            if delta < 0 and here.on_hand + delta < 0:
                raise Refusal(
                    Reason.BELOW_HELD,
                    f"only {here.on_hand} units of {here.sku} are at {here.location}",
                    sku=here.sku,
                    location=here.location,
                    held=here.held,
                )
            return [move(here.key, Kind(ask.change), on_hand=delta, allow_short=ask.allow_short)]


def _found(here: Stock, ask: Adjustment) -> int:
    if ask.change is Change.DAMAGE:
        return -ask.quantity
    return ask.quantity if ask.relative else ask.quantity - here.on_hand


def _require_free(here: Stock, quantity: int) -> None:
    free = max(0, here.on_hand - here.held)
    if quantity > free:
        raise Refusal(
            Reason.INSUFFICIENT_STOCK,
            f"{free} units of {here.sku} at {here.location} are free, not {quantity}",
            sku=here.sku,
            location=here.location,
            available=free,
            requested=quantity,
        )


def sum_lines(lines: Iterable[HoldLine]) -> tuple[HoldLine, ...]:
    """Sum quantities and minimums for each (sku, location), sorted; named locations before open ones.

    Two lines with one SKU must not each be checked against the same stock.
    """
    totals: dict[Key, HoldLine] = {}
    for line in lines:
        known = totals.get((line.sku, line.location))
        totals[line.sku, line.location] = (
            line
            if known is None
            else replace(known, quantity=known.quantity + line.quantity, minimum=known.minimum + line.minimum)
        )
    return tuple(sorted(totals.values(), key=lambda line: (line.sku, not line.location, line.location)))


def plan(request: HoldRequest, shelf: Shelf, sources: Mapping[str, Sequence[str]]) -> Plan:
    """Decide one hold from stock as it is known, without booking it.

    `sources` lists the locations of each SKU of an open line, in order of priority. An open line is met by the
    first source that can meet it alone, otherwise by several in that order. Lines with a location come before it,
    and leave it its minimum.
    """
    left: dict[Key, int] = {}
    spare = _spare(request, shelf, sources)
    allocated: dict[Key, int] = {}
    short_lines: list[ShortLine] = []
    enough = True
    for line in request.lines:
        keys = [(line.sku, line.location)] if line.location else [(line.sku, at) for at in sources.get(line.sku, ())]
        free = {}
        for key in keys:
            stock = shelf.stocks.get(key)
            free[key] = left.setdefault(key, stock.available if stock else 0)
        wanted = min(line.quantity, sum(free.values()))
        if line.sku in spare:
            wanted = min(wanted, line.minimum + max(0, spare[line.sku]))
            spare[line.sku] -= max(0, wanted - line.minimum)
        if wanted < line.quantity:
            short_lines.append(ShortLine(line.sku, line.location, line.quantity, wanted))
            enough = enough and request.mode is not Mode.ALL and wanted >= line.minimum
        whole = next((key for key in keys if free[key] >= wanted), None)
        for key in [whole] if whole else keys:
            taken = min(wanted, left[key])
            if taken:
                left[key] -= taken
                wanted -= taken
                allocated[key] = allocated.get(key, 0) + taken
    if not enough or not allocated:
        return Plan((), tuple(short_lines))
    return Plan(
        tuple(Allocation(sku, location, quantity) for (sku, location), quantity in sorted(allocated.items())),
        tuple(short_lines),
    )


def _spare(request: HoldRequest, shelf: Shelf, sources: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Units of each SKU of an open line that are to be had beyond what its lines must have at least."""
    least: Counter[str] = Counter()
    for line in request.lines:
        least[line.sku] += line.minimum
    found = {}
    for sku in {line.sku for line in request.lines if not line.location}:
        stocks = (shelf.stocks.get((sku, at)) for at in sources.get(sku, ()))
        found[sku] = sum(stock.available for stock in stocks if stock) - least[sku]
    return found


def grouped(items: Iterable[Item], by: Callable[[Item], By]) -> dict[By, list[Item]]:
    """Items by what they have in common, in the order in which they come."""
    found: dict[By, list[Item]] = {}
    for item in items:
        found.setdefault(by(item), []).append(item)
    return found


def take(change: HoldChange, rows: Sequence[HoldRow], now: datetime) -> list[tuple[HoldRow, int]]:
    """The rows that a commit or release takes from, and how much of each, never nothing; or a Refusal.

    `rows` are the hold's rows of the SKUs that the change names.
    """
    open_rows = _open_rows(change, rows)
    if any(row.expires_at <= now for row in open_rows):
        raise Refusal(Reason.HOLD_EXPIRED, f"the time of hold {change.hold_id} has come", hold_id=change.hold_id)
    left = {(row.sku, row.slot): row.held for row in rows}
    by_sku = grouped(rows, lambda row: row.sku)
    taken: list[tuple[HoldRow, int]] = []
    for line in change.lines:
        mine = [row for row in by_sku[line.sku] if line.location in {"", row.location}]
        if not mine:
            raise Refusal(
                Reason.HOLD_NOT_FOUND,
                f"hold {change.hold_id} holds nothing of {line.sku} at {line.location}",
                hold_id=change.hold_id,
                sku=line.sku,
            )
        held = sum(left[row.sku, row.slot] for row in mine)
        wanted = line.quantity or held
        if wanted > held:
            raise Refusal(
                Reason.HOLD_QUANTITY_EXCEEDED,
                f"{held} units of {line.sku} are still held, not {wanted}",
                hold_id=change.hold_id,
                sku=line.sku,
                held=held,
                requested=wanted,
            )
        for row in mine:
            quantity = min(wanted, left[row.sku, row.slot])
            if quantity:
                left[row.sku, row.slot] -= quantity
                wanted -= quantity
                taken.append((row, quantity))
    if not taken:
        raise _closed(change)
    return taken


def extend(change: HoldChange, rows: Sequence[HoldRow], now: datetime) -> datetime:
    """The hold's new expiry, never earlier than its old one; or a Refusal."""
    open_rows = _open_rows(change, rows)
    if any(row.expires_at <= now for row in open_rows):
        raise Refusal(Reason.HOLD_EXPIRED, f"the time of hold {change.hold_id} has come", hold_id=change.hold_id)
    until = max(now + change.ttl, *(row.expires_at for row in open_rows))
    if until > min(row.created_at for row in open_rows) + timedelta(seconds=HOLD_LIFE_SECONDS_MAX):
        raise Refusal(
            Reason.HOLD_LIFE_EXCEEDED,
            f"hold {change.hold_id} would live longer than {HOLD_LIFE_SECONDS_MAX} s",
            hold_id=change.hold_id,
            limit_seconds=HOLD_LIFE_SECONDS_MAX,
        )
    return until


def expire(change: HoldChange, rows: Sequence[HoldRow], now: datetime) -> list[tuple[HoldRow, int]]:
    """The rows that expire now, with what is left of each; HOLD_NOT_EXPIRED while their time is to come."""
    _require_known(change, rows)
    if any(row.held and row.expires_at > now for row in rows):
        raise Refusal(Reason.HOLD_NOT_EXPIRED, f"the time of hold {change.hold_id} is to come", hold_id=change.hold_id)
    return [(row, row.held) for row in rows if row.held]


def after_leaving(rows: Iterable[HoldRow], kind: Kind, parts: Iterable[tuple[HoldRow, int]]) -> list[HoldRow]:
    """A hold's rows once these parts of them were committed, released or expired."""
    gone: Counter[tuple[str, int]] = Counter()
    for row, units in parts:
        gone[row.sku, row.slot] += units
    column = {Kind.COMMIT: "committed", Kind.RELEASE: "released", Kind.EXPIRE: "expired"}[kind]
    return [
        replace(row, held=row.held - units, **{column: getattr(row, column) + units})
        if (units := gone[row.sku, row.slot])
        else row
        for row in rows
    ]


def after_extending(rows: Iterable[HoldRow], until: datetime) -> list[HoldRow]:
    """A hold's rows once it lives longer: those of which something is left."""
    return [replace(row, expires_at=until) if row.held else row for row in rows]


def _require_known(change: HoldChange, rows: Sequence[HoldRow]) -> None:
    known = {row.sku for row in rows}
    for sku in change.skus:
        if sku not in known:
            raise Refusal(
                Reason.HOLD_NOT_FOUND,
                f"hold {change.hold_id} holds nothing of {sku}",
                hold_id=change.hold_id,
                sku=sku,
            )


def _open_rows(change: HoldChange, rows: Sequence[HoldRow]) -> list[HoldRow]:
    """Rows with something left. A hold of which anything expired has expired: whole or not at all."""
    _require_known(change, rows)
    if any(row.expired for row in rows):
        raise Refusal(Reason.HOLD_EXPIRED, f"the time of hold {change.hold_id} has come", hold_id=change.hold_id)
    open_rows = [row for row in rows if row.held]
    if not open_rows:
        raise _closed(change)
    return open_rows


def _closed(change: HoldChange) -> Refusal:
    sku, *others = change.skus
    named = f"{sku} and {len(others)} more" if others else sku  # all of them would not fit into a trailer
    return Refusal(Reason.HOLD_CLOSED, f"{change.hold_id} no longer holds anything of {named}", hold_id=change.hold_id)
