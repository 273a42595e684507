"""What analytics has decided of subjects, enforced on Reserve from memory.

    Verdicts --apply--> Guard --judge(asks)--> refusals        one batch: what is admitted counts at once
                          ^                        |
                          +--settle(held)-- inventory          what was not held then is taken back

* A subject is blocked from the start of its block up to, not including, its end: orders of a time in it, and orders
  that come in it. Time is business time: the order's, or else now. A hash under any configured key is the subject.
* A limit lets a subject have `most` holds, or units of a SKU, in its window. What it has is what analytics tells
  (Usage, which cuts the window into PARTS, and is exact to one), and what this pod has admitted and the usage has not.
  A usage has those that it names and, once analytics has come OWN_SECONDS past it, an admission of a time that the
  usage reaches. Analytics tells not every use, so the pod remembers what it admitted until that is older than every
  window. So on one pod nothing gets past a limit, with analytics away or behind as well; over several pods a burst may,
  by what each admits until analytics has told the others, which of holds it does from half of a limit on.
* An order that says it is of later than now is of now, as it is to who judges.
* An order whose time lies before others' counts them as well: no window anywhere holds more than `most`.
* What is not heard of for `stale_seconds` is stale. Then a guard that is `closed` refuses everything, before the first
  heartbeat too; any other goes on with what it knows.
* Everything is bounded. A table that is full loses what has ended by now and then its oldest tenth, at least.

Pure: no I/O and no clock. A batch is settled before the next one is judged.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from services.reservation.domain import Ask, Held, Reason
from services.reservation.subjects import Kind, Named, Subjects
from shared.refusal import Refusal

OWN_SECONDS = 10.0
PARTS = 60  # of a window, in a Usage
BLOCKS_MAX = 100_000
USAGES_MAX = 100_000
ADMISSIONS_MAX = 200_000
_OWN = timedelta(seconds=OWN_SECONDS)
_HOLDS = ""  # in place of a SKU: all reservations, each counted once
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

Who = Mapping[Kind, Named]
Counter = tuple[str, str]  # a subject's hash under the first key, and a SKU or _HOLDS


@dataclass(frozen=True, slots=True)
class Limit:
    """The most holds that a subject of a kind may have in a window, or units of each SKU."""

    rule_id: str
    of_units: bool
    by: Kind
    window: timedelta
    most: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """All changes booked before `complete_time` are judged; these are all the limits."""

    complete_time: datetime
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A subject that is refused; lifted where it ends before it starts."""

    subject: str
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class Usage:
    """What a subject has used of a limit, as (when it leaves the window, how much), and the latest that are in it."""

    rule_id: str
    subject: str
    sku: str
    parts: tuple[tuple[datetime, int], ...]
    reservation_ids: frozenset[str]


Verdict = Heartbeat | Block | Usage


@dataclass(slots=True)
class _Admission:
    """What an ask came to, on one counter."""

    reservation_id: str
    at: datetime
    time: datetime
    amount: int


@dataclass(slots=True)
class _Own:
    """The pod's own admissions on one counter, by reservation, and their sum."""

    admissions: dict[str, _Admission] = field(default_factory=dict)
    total: int = 0


class Guard:
    """Judges by the verdicts that it was given. `subjects` makes the hashes."""

    def __init__(self, subjects: Subjects, *, closed: bool = False, stale_seconds: float = 30) -> None:
        self._subjects = subjects
        self._closed = closed
        self._stale = timedelta(seconds=stale_seconds)
        self._complete_time = _NEVER
        self._limits: tuple[Limit, ...] = ()
        self._longest = timedelta()
        self._blocks: dict[str, Block] = {}
        self._usages: dict[tuple[str, str, str], Usage] = {}
        self._own: dict[Counter, _Own] = {}
        self._recent: deque[tuple[Counter, _Admission]] = deque()  # every admission, oldest first
        self._counted: dict[str, list[tuple[Counter, _Admission, int]]] = {}  # by reservation, until settled

    def apply(self, verdict: Verdict, now: datetime) -> None:
        """Take a verdict; it replaces what was said before of the same."""
        match verdict:
            case Heartbeat():
                self._complete_time, self._limits = verdict.complete_time, verdict.limits
                self._longest = max((limit.window for limit in verdict.limits), default=timedelta())
            case Block():
                self._blocks.pop(verdict.subject, None)
                if verdict.start < verdict.end:
                    _make_room(self._blocks, BLOCKS_MAX, lambda block: block.end <= now)
                    self._blocks[verdict.subject] = verdict
            case Usage():
                key = (verdict.rule_id, verdict.subject, verdict.sku)
                self._usages.pop(key, None)
                if verdict.parts:
                    _make_room(self._usages, USAGES_MAX, lambda usage: usage.parts[-1][0] <= now)
                    self._usages[key] = verdict

    def stale(self, now: datetime) -> bool:
        """Whether nothing was heard for too long."""
        return now - self._complete_time > self._stale

    def judge(self, asks: Sequence[Ask], now: datetime) -> dict[str, Refusal]:
        """Those of a batch that are refused, by reservation id. The others count until `settle` says otherwise."""
        if self._closed and self.stale(now):
            return {ask.reservation_id: _stale() for ask in asks}
        self._forget(now)
        if not self._blocks and not self._limits:
            return {}
        refused: dict[str, Refusal] = {}
        for ask in asks:
            who = self._subjects.named(ask.customer_id, ask.device_id, ask.ip_address)
            time = min(ask.order_time or now, now)
            refusal = self._blocked(who, time, now) or self._above(ask, who, time, now)
            if refusal:
                refused[ask.reservation_id] = refusal
        return refused

    def settle(self, held: Mapping[str, Held]) -> None:
        """End a batch: take back what was counted and is not newly held, by reservation id, or not in full."""
        for name, counted in self._counted.items():
            answer = held.get(name)
            kept: dict[str, int] = {}
            if answer and answer.allocations:
                kept[_HOLDS] = 1
                for sku, _, quantity in answer.allocations:
                    kept[sku] = kept.get(sku, 0) + quantity
            for counter, admission, amount in counted:
                gone = amount - kept.get(counter[1], 0)
                if gone:
                    admission.amount -= gone
                    self._own[counter].total -= gone
                if not admission.amount:
                    self._drop(counter, admission)
        self._counted = {}

    def _blocked(self, who: Who, time: datetime, now: datetime) -> Refusal | None:
        for kind, named in who.items():
            for subject in named.hashes:
                block = self._blocks.get(subject)
                if block and (block.start <= time < block.end or block.start <= now < block.end):
                    message = f"the {kind.lower()} is blocked for a while"
                    return Refusal(Reason.SUBJECT_BLOCKED, message, subject_kind=kind, retry_time=_text(block.end))
        return None

    def _above(self, ask: Ask, who: Who, time: datetime, now: datetime) -> Refusal | None:
        """Why an ask would bring a subject above a limit; where none does, it is counted."""
        counted: dict[Counter, int] = {}
        demand: dict[str, int] = {}
        for limit in self._limits:
            named = who.get(limit.by)
            if named is None:
                continue
            if limit.of_units and not demand:
                demand = _demand(ask)
            for sku, asked in demand.items() if limit.of_units else ((_HOLDS, 1),):
                if not self._fits(limit, named, sku, asked, time):
                    return self._reached(limit, named, sku, asked, time)
                counted[named.hashes[0], sku] = asked
        for counter, amount in counted.items():
            self._count(ask.reservation_id, counter, amount, time, now)
        return None

    def _fits(self, limit: Limit, named: Named, sku: str, asked: int, time: datetime) -> bool:
        room = limit.most - asked
        told = self._told(limit, named, sku)
        for usage in told:
            room -= sum(used for leaves, used in usage.parts if leaves > time)
        own = self._own.get((named.hashes[0], sku))
        if room < 0 or own is None or own.total <= room:
            return room >= 0
        for admission in self._untold(own, told, limit, named):
            if admission.time > time - limit.window:
                room -= admission.amount
        return room >= 0

    def _untold(self, own: _Own, told: Sequence[Usage], limit: Limit, named: Named) -> list[_Admission]:
        """The pod's own admissions that no usage has."""
        names = frozenset().union(*(usage.reservation_ids for usage in told))
        judged, since, until = self._complete_time - _OWN, _NEVER, _NEVER
        for usage in told:
            if usage.subject == named.hashes[0]:  # that of another key has what was admitted under that key
                since, until = _reach(usage, limit.window)
        return [
            one
            for name, one in own.admissions.items()
            if name not in names and not (one.at <= judged and since <= one.time <= until)
        ]

    def _told(self, limit: Limit, named: Named, sku: str) -> list[Usage]:
        """What analytics tells of a subject, under each of its hashes."""
        if not self._usages:
            return []
        found = (self._usages.get((limit.rule_id, subject, sku)) for subject in named.hashes)
        return [usage for usage in found if usage]

    def _reached(self, limit: Limit, named: Named, sku: str, asked: int, time: datetime) -> Refusal:
        """The refusal, with the time at which enough will have left the window where that can be."""
        told = self._told(limit, named, sku)
        parts = [part for usage in told for part in usage.parts]
        own = self._own.get((named.hashes[0], sku), _Own())
        parts += [(one.time + limit.window, one.amount) for one in self._untold(own, told, limit, named)]
        parts = sorted(part for part in parts if part[0] > time)
        seconds = round(limit.window.total_seconds())
        metadata = {"rule_id": limit.rule_id, "subject_kind": limit.by, "limit": limit.most, "window_seconds": seconds}
        if sku:
            metadata["sku"] = sku
        over = sum(used for _, used in parts) + asked - limit.most
        for leaves, used in parts if asked <= limit.most else ():
            over -= used
            if over <= 0:
                metadata["retry_time"] = _text(leaves)
                break
        what = f"units of {sku}" if sku else "reservations"
        message = f"the {limit.by.lower()} may have {limit.most} {what} in {seconds} s"
        return Refusal(Reason.LIMIT_REACHED, message, **metadata)

    def _count(self, name: str, counter: Counter, amount: int, time: datetime, now: datetime) -> None:
        own = self._own.get(counter)
        if own is None:
            own = self._own[counter] = _Own()
        if name in own.admissions:
            return
        admission = own.admissions[name] = _Admission(name, now, time, amount)
        self._recent.append((counter, admission))
        own.total += amount
        self._counted.setdefault(name, []).append((counter, admission, amount))

    def _forget(self, now: datetime) -> None:
        """Let go of admissions that are too old, or too many."""
        since = now - self._longest
        while self._recent and (self._recent[0][1].at <= since or len(self._recent) > ADMISSIONS_MAX):
            self._drop(*self._recent.popleft())

    def _drop(self, counter: Counter, admission: _Admission) -> None:
        own = self._own.get(counter)
        if own and own.admissions.get(admission.reservation_id) is admission:
            del own.admissions[admission.reservation_id]
            own.total -= admission.amount
            if not own.admissions:
                del self._own[counter]


def _reach(usage: Usage, window: timedelta) -> tuple[datetime, datetime]:
    """From when until when a usage has everything that was judged: a later order of these times would be told at once.

    Its newest part counts in full while that ends OWN_SECONDS later: an order is booked after it is admitted.
    """
    newest, part = usage.parts[-1][0] - window, window / PARTS
    return newest - window + part, newest + max(part - _OWN, timedelta())


def _make_room(table: dict[Any, Any], most: int, ended: Callable[[Any], bool]) -> None:
    if len(table) < most:
        return
    for key in [key for key, value in table.items() if ended(value)]:
        del table[key]
    for key in list(islice(table, max(0, len(table) - most * 9 // 10))):
        del table[key]


def _demand(ask: Ask) -> dict[str, int]:
    """Units asked for, by SKU."""
    demand: dict[str, int] = {}
    for line in ask.lines:
        demand[line.sku] = demand.get(line.sku, 0) + line.quantity
    return demand


def _stale() -> Refusal:
    return Refusal(Reason.ENFORCEMENT_STALE, "what is to be enforced is not known; try again with the same request")


def _text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
