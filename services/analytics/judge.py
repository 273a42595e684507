"""How reservations are judged: features over sliding windows, rules, scores and cases. Pure, and the same for live
events and for backtests.

A `Judge` sees signals one by one, in one order, and keeps what its rules need of them:

    signal --> windows and histories --> features --> rules that fire --> score of a subject --> Finding --> Case

What it knows follows from the signals it has seen, in their order, and from nothing else: it knows no clock. Two
judges of the same rules that saw the same signals say the same. Windows go by the signals' own times, which need not
be in order: what comes late, by up to the length of a window, is counted where it belongs.

Everything is bounded: windows have PARTS parts, histories HISTORY_MAX quantities, and of subjects and reservations
those not seen for longest are forgotten. Each window of a rule has room of its own: what floods one of them (an order
of thousands of SKUs, say) makes no other forget.
"""

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple, TypeVar

ORDER = "order:"  # before the id of a reservation without customer, which stands for itself
PARTS = 60  # of a window; events.proto says so, and the guard goes by it
# Subjects of a window; about 50 MB for each rule when all of it is used, as by so many customers within minutes.
SUBJECTS_MAX = 100_000
OPEN_MAX = 300_000
ENDED_MAX = 200_000
HISTORIES_MAX = 20_000
DISTINCT_MAX = 1_000
HISTORY_MAX = 127
HISTORY_MIN = 30
USUAL_MAX = 4_095
CASE_RESERVATIONS_MAX = 1_000
RECENT_MAX = 200
UNITS_MAX = 2**62
MAD_TO_SIGMA = 1.4826
SCALE_MIN = math.log(2)  # a quantity twice as large is never more than one sigma away


class Feature(StrEnum):
    """What a rule looks at; fraud.proto says what each means."""

    HOLDS = "HOLDS"
    REFUSALS_IN_ROW = "REFUSALS_IN_ROW"
    UNITS_OPEN = "UNITS_OPEN"
    LOST_SHARE = "LOST_SHARE"
    QUANTITY_Z = "QUANTITY_Z"
    FIRST_ORDER_Z = "FIRST_ORDER_Z"
    SAME_BASKET = "SAME_BASKET"
    UNDONE = "UNDONE"
    CUSTOMERS_ON_SKU = "CUSTOMERS_ON_SKU"
    UNITS_OF_SKU = "UNITS_OF_SKU"


class Kind(StrEnum):
    """What a subject is."""

    CUSTOMER = "CUSTOMER"
    DEVICE = "DEVICE"
    NETWORK = "NETWORK"
    SKU = "SKU"


class Comparison(StrEnum):
    """How a feature is compared with its threshold."""

    AT_LEAST = "AT_LEAST"
    AT_MOST = "AT_MOST"


class Effect(StrEnum):
    """What follows when a rule fires."""

    SCORE = "SCORE"
    LIMIT = "LIMIT"


class Decision(StrEnum):
    """What a score amounts to, above ALLOW."""

    REVIEW = "REVIEW"
    BLOCK = "BLOCK"


Key = TypeVar("Key")
Value = TypeVar("Value")
PEOPLE = frozenset({Kind.CUSTOMER, Kind.DEVICE, Kind.NETWORK})
ALL = frozenset(Kind)
# Whose feature each can be.
KINDS = {
    Feature.HOLDS: ALL,
    Feature.REFUSALS_IN_ROW: PEOPLE,
    Feature.UNITS_OPEN: PEOPLE,
    Feature.LOST_SHARE: ALL,
    Feature.QUANTITY_Z: PEOPLE,
    Feature.FIRST_ORDER_Z: frozenset({Kind.CUSTOMER}),
    Feature.SAME_BASKET: PEOPLE,
    Feature.UNDONE: PEOPLE,
    Feature.CUSTOMERS_ON_SKU: frozenset({Kind.DEVICE, Kind.NETWORK}),
    Feature.UNITS_OF_SKU: ALL,
}
LIMITS = frozenset({Feature.HOLDS, Feature.UNITS_OF_SKU})
# Features of an order and not of what a subject has done by now: they fire with the order alone.
OF_ORDER = frozenset({Feature.QUANTITY_Z, Feature.FIRST_ORDER_Z, Feature.SAME_BASKET})


@dataclass(frozen=True, slots=True)
class Rule:
    """A version of a rule."""

    rule_id: str
    version: int
    feature: Feature
    by: Kind
    window_seconds: float
    comparison: Comparison
    threshold: float
    samples_min: int
    score: int
    effect: Effect
    reason: str
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """From which scores on a subject is reviewed or blocked, and for how long it then is."""

    review_score: int
    block_score: int
    block_seconds: float


class Signal(NamedTuple):
    """What a change of a reservation means to the rules. Times are seconds since 1970, in business time.

    `skus`, `asked` and `held` go together, and stand in a reservation's first signal alone, as do its currency and
    value, and whether it is its customer's `first`. `open` is what is still held of it; `sold`, `cancelled` and
    `expired` are all that ever was. A signal of goods that came back has `returned` and nothing else of these.
    """

    at: float
    order_at: float
    reservation_id: str
    version: int
    customer: str
    device: str
    network: str
    skus: tuple[str, ...] = ()
    asked: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    open: int = 0
    sold: int = 0
    cancelled: int = 0
    expired: int = 0
    returned: int = 0
    currency_code: str = ""
    value_micros: int = 0
    first: bool = False


class Fired(NamedTuple):
    """A rule that fired, with its numbers."""

    rule_id: str
    version: int
    value: float
    threshold: float
    score: int
    reason: str
    sku: str
    reservation_id: str


class Finding(NamedTuple):
    """A subject whose score amounts to a decision, at a signal. `shadow`: by rules in the shadow alone."""

    subject: str
    kind: Kind
    decision: Decision
    score: int
    fired: tuple[Fired, ...]
    at: float
    reservation_id: str
    units: int
    shadow: bool


class Usage(NamedTuple):
    """How much of a limit a subject has used: (when it leaves the window, how much), oldest first; and the latest
    RECENT_MAX reservations that are in it.
    """

    rule_id: str
    subject: str
    sku: str
    parts: tuple[tuple[float, int], ...]
    reservation_ids: tuple[str, ...]


class Counts:
    """Amounts over a sliding window of PARTS parts: at a time count the part that holds it and those before.

    `names` are of the latest amounts that were added with one, where they are wanted.
    """

    __slots__ = ("_amounts", "_parts", "_width", "names")

    def __init__(self, window_seconds: float, *, named: bool = False) -> None:
        self._width = window_seconds / PARTS
        self._parts: list[int] = []
        self._amounts: list[int] = []
        self.names: deque[str] | None = deque(maxlen=RECENT_MAX) if named else None

    def add(self, at: float, amount: int, name: str = "") -> None:
        """What is earlier than two windows before `at` is forgotten."""
        if self.names is not None and name:
            self.names.append(name)
        parts, amounts = self._parts, self._amounts
        part = int(at // self._width)
        if parts and parts[-1] == part:
            amounts[-1] += amount
            return
        place = bisect_left(parts, part)
        if place < len(parts) and parts[place] == part:
            amounts[place] += amount
            return
        parts.insert(place, part)
        amounts.insert(place, amount)
        gone = bisect_left(parts, part - 2 * PARTS + 1)
        gone = max(gone, len(parts) - 4 * PARTS)
        if gone > 0:
            del parts[:gone], amounts[:gone]

    def total(self, at: float) -> int:
        """The sum of what the window that ends at `at` holds."""
        parts, part = self._parts, int(at // self._width)
        if parts[-1:] == [part] and parts[0] > part - PARTS:
            return sum(self._amounts)
        return sum(self._amounts[bisect_left(parts, part - PARTS + 1) : bisect_left(parts, part + 1)])

    def last(self) -> tuple[tuple[float, int], ...]:
        """What the window that ends with the latest amount holds: when each part leaves it, and its amount."""
        return tuple(
            ((one + PARTS) * self._width, amount)
            for one, amount in zip(self._parts, self._amounts, strict=True)
            if one > self._parts[-1] - PARTS and amount
        )


class Distinct:
    """Different names over a sliding window, at most DISTINCT_MAX."""

    __slots__ = ("_last", "_width")

    def __init__(self, window_seconds: float) -> None:
        self._width = window_seconds / PARTS
        self._last: dict[str, int] = {}

    def add(self, at: float, name: str) -> None:
        self._last[name] = max(int(at // self._width), self._last.pop(name, 0))
        if len(self._last) > DISTINCT_MAX:
            del self._last[next(iter(self._last))]

    def total(self, at: float) -> int:
        part = int(at // self._width)
        return sum(part - PARTS < last <= part for last in self._last.values())


class History:
    """The last `most` values, and how far another is above what is usual for them."""

    __slots__ = ("_most", "_order", "_scale", "_scale_age", "_sorted")

    def __init__(self, most: int) -> None:
        self._most = most
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._scale = 0.0
        self._scale_age = 0

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        self._order.append(value)
        insort(self._sorted, value)
        if len(self._order) > self._most:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._scale_age += 1

    def z(self, value: float) -> float:
        """The robust z-score: the distance from the median in units of the scaled MAD (at least SCALE_MIN).

        The MAD is reckoned anew when a sixteenth of the values is new.
        """
        values = self._sorted
        if not values:
            return 0.0
        median = values[len(values) // 2]
        above = value - median
        if above <= SCALE_MIN:
            return above / SCALE_MIN
        if not self._scale or self._scale_age > len(values) // 16:
            deviations = sorted(abs(one - median) for one in values)
            self._scale = max(MAD_TO_SIGMA * deviations[len(deviations) // 2], SCALE_MIN)
            self._scale_age = 0
        return above / self._scale


@dataclass(slots=True)
class _Known:
    """What is kept of a reservation."""

    version: int
    order_at: float
    subjects: tuple[tuple[Kind, str], ...]
    skus: tuple[str, ...]
    asked: int
    open: int = 0
    sold: int = 0
    cancelled: int = 0
    expired: int = 0
    sold_at: float = 0.0
    ended: bool = False
    undone: bool = False

    @property
    def named(self) -> tuple[tuple[Kind, str], ...]:
        """The subjects that have a past: not a reservation that stands for itself."""
        return self.subjects[1:] if self.subjects[0][1].startswith(ORDER) else self.subjects


@dataclass(slots=True, eq=False)
class _Window:
    """What a window is kept of, and what it holds by subject and what else; rules that share it share its counts."""

    feature: Feature
    by: Kind
    seconds: float
    limits: bool
    counts: OrderedDict[tuple[str, ...], Counts] = field(default_factory=OrderedDict)
    sets: OrderedDict[tuple[str, ...], Distinct] = field(default_factory=OrderedDict)

    def count(self, *key: str) -> Counts:
        return _recall(self.counts, key, lambda: Counts(self.seconds, named=self.limits), SUBJECTS_MAX)

    def names(self, *key: str) -> Distinct:
        return _recall(self.sets, key, lambda: Distinct(self.seconds), SUBJECTS_MAX)

    def total(self, at: float, *key: str) -> int:
        counts = self.counts.get(key)
        return counts.total(at) if counts else 0

    def different(self, at: float, *key: str) -> int:
        names = self.sets.get(key)
        return names.total(at) if names else 0


class Judge:
    """Sees signals in order and says what its rules find.

    SHADOW versions stand in for the deciding version of their rule, in a second reckoning beside the first.
    """

    def __init__(self, rules: Iterable[Rule], policy: Policy) -> None:
        rules = list(rules)
        self._policy = policy
        scoring = [rule for rule in rules if rule.effect is Effect.SCORE]
        self._shadowed = {rule.rule_id for rule in scoring if rule.shadow}
        self.limits = [rule for rule in rules if rule.effect is Effect.LIMIT and not rule.shadow]
        limited = {_place(rule) for rule in self.limits}
        places = {_place(rule) for rule in scoring} | limited
        wanted = {place: _Window(*place, limits=place in limited) for place in places}
        self._windows = {kind: [one for one in wanted.values() if one.by is kind] for kind in Kind}
        self._rules = {kind: [(rule, wanted[_place(rule)]) for rule in scoring if rule.by is kind] for kind in Kind}
        self._limits = [(rule, wanted[_place(rule)]) for rule in self.limits]
        self._histories: OrderedDict[str, History] = OrderedDict()
        self._usual_quantity = History(USUAL_MAX)
        self._usual_order = History(USUAL_MAX)
        self._open: OrderedDict[str, _Known] = OrderedDict()
        self._ended: OrderedDict[str, _Known] = OrderedDict()

    def version(self, reservation_id: str) -> int:
        """The last version of a reservation that was seen; 0 when none is remembered."""
        known = self._known(reservation_id)
        return known.version if known else 0

    def see(self, signal: Signal) -> tuple[list[Finding], list[Usage]]:
        """Take a signal into account; what is found of its subjects, and what they have used of limits."""
        if signal.returned:
            return self._returned(signal), []
        known = self._known(signal.reservation_id)
        if known is None:
            return self._asked(signal) if signal.skus else ([], [])
        return self._changed(signal, known), []

    def _known(self, reservation_id: str) -> _Known | None:
        return self._open.get(reservation_id) or self._ended.get(reservation_id)

    # -- what signals are ---------------------------------------------------------------------------------------------

    def _asked(self, signal: Signal) -> tuple[list[Finding], list[Usage]]:
        at = signal.order_at
        held = sum(signal.held)
        people = _people(signal)
        known = _Known(signal.version, at, people, signal.skus, sum(signal.asked))
        quantity = self._quantity(signal)
        first = self._first_order(signal)
        basket = _basket(signal)
        for kind, subject in known.named:
            for window in self._windows[kind]:
                self._count_order(window, subject, signal, held, basket)
        for sku, units in _held(signal):
            for window in self._windows[Kind.SKU]:
                if window.feature is Feature.HOLDS:
                    window.count(sku).add(at, 1)
                elif window.feature is Feature.UNITS_OF_SKU:
                    window.count(sku, sku).add(at, units)
        self._book(signal, known)
        order = {Feature.QUANTITY_Z: quantity, Feature.FIRST_ORDER_Z: (first, "")}
        findings = self._findings(known, signal, at, order, basket)
        return findings, self._usages(known, signal) if held else []

    def _count_order(  # noqa: C901 - a case for each feature
        self, window: _Window, subject: str, signal: Signal, held: int, basket: str
    ) -> None:
        at = signal.order_at
        match window.feature:
            case Feature.SAME_BASKET:
                window.count(subject, basket).add(at, 1)
            case Feature.REFUSALS_IN_ROW if not held:
                window.count(subject).add(at, 1)
            case Feature.REFUSALS_IN_ROW:
                window.counts.pop((subject,), None)
            case _ if not held:
                pass
            case Feature.HOLDS:
                window.count(subject).add(at, 1, signal.reservation_id)
            case Feature.UNITS_OPEN:
                window.count(subject).add(at, held)
            case Feature.UNITS_OF_SKU:
                for sku, units in _held(signal):
                    window.count(subject, sku).add(at, units, signal.reservation_id)
            case Feature.CUSTOMERS_ON_SKU if signal.customer:
                for sku, _ in _held(signal):
                    window.names(subject, sku).add(at, signal.customer)

    def _changed(self, signal: Signal, known: _Known) -> list[Finding]:
        if signal.version <= known.version:
            return []
        known.version = signal.version
        lost, undone = self._book(signal, known)
        return self._findings(known, signal, signal.at, {}, "") if lost or undone else []

    def _returned(self, signal: Signal) -> list[Finding]:
        known = self._known(signal.reservation_id)
        if known is None or not self._undo(known, signal.at):
            return []
        return self._findings(known, signal, signal.at, {}, "")

    def _book(self, signal: Signal, known: _Known) -> tuple[bool, bool]:
        """Take over a reservation's quantities; whether it is lost now, and whether something sold was undone."""
        if known.open:
            self._give_back(known, known.open - signal.open)
        undone = known.sold > 0 and signal.cancelled > known.cancelled and self._undo(known, signal.at)
        if signal.sold and not known.sold:
            known.sold_at = signal.at
        ended = not signal.open and not known.ended and (signal.sold + signal.cancelled + signal.expired) > 0
        known.open, known.sold = signal.open, signal.sold
        known.cancelled, known.expired = signal.cancelled, signal.expired
        lost = ended and not signal.sold
        self._file(signal.reservation_id, known)
        if ended:
            known.ended = True
            skus = tuple((Kind.SKU, sku) for sku in known.skus)
            for kind, subject in known.named + skus:
                for window in self._windows[kind]:
                    if window.feature is Feature.LOST_SHARE:
                        window.count(subject, "ended").add(known.order_at, 1)
                        window.count(subject, "lost").add(known.order_at, int(lost))
        return lost, undone

    def _file(self, reservation_id: str, known: _Known) -> None:
        """Keep a reservation among those that hold something, or among the others; of each the oldest is let go."""
        if known.open:
            self._open[reservation_id] = known
            if len(self._open) > OPEN_MAX:
                _, oldest = self._open.popitem(last=False)
                self._give_back(oldest, oldest.open)
        else:
            self._open.pop(reservation_id, None)
            _keep(self._ended, reservation_id, known, ENDED_MAX)

    def _give_back(self, known: _Known, units: int) -> None:
        for kind, subject in known.named if units else ():
            for window in self._windows[kind]:
                # Of a subject that was forgotten meanwhile its holds were as well.
                if window.feature is Feature.UNITS_OPEN and (counts := window.counts.get((subject,))):
                    counts.add(known.order_at, -units)

    def _undo(self, known: _Known, at: float) -> bool:
        if known.undone or not known.sold_at:
            return False
        known.undone = True
        for kind, subject in known.named:
            for window in self._windows[kind]:
                if window.feature is Feature.UNDONE and at - known.sold_at <= window.seconds:
                    window.count(subject).add(at, 1)
        return True

    def _quantity(self, signal: Signal) -> tuple[float, str]:
        """The highest z-score of a SKU's quantity, and the SKU; the quantities become part of their histories."""
        highest, of = 0.0, ""
        for sku, units in zip(signal.skus, signal.asked, strict=True):
            value = math.log(units)
            history = _recall(self._histories, sku, lambda: History(HISTORY_MAX), HISTORIES_MAX)
            usual = history if len(history) >= HISTORY_MIN else self._usual_quantity
            z = usual.z(value) if len(usual) >= HISTORY_MIN else 0.0
            if z > highest:
                highest, of = z, sku
            history.add(value)
            self._usual_quantity.add(value)
        return highest, of

    def _first_order(self, signal: Signal) -> float:
        value = math.log(sum(signal.asked))
        z = max(0.0, self._usual_order.z(value)) if signal.first and len(self._usual_order) >= HISTORY_MIN else 0.0
        self._usual_order.add(value)
        return z

    # -- what rules say -----------------------------------------------------------------------------------------------

    def _findings(
        self,
        known: _Known,
        signal: Signal,
        at: float,
        order: dict[Feature, tuple[float, str]],
        basket: str,
    ) -> list[Finding]:
        found = []
        for kind, subject in (*known.subjects, *((Kind.SKU, sku) for sku in known.skus)):
            fired: list[tuple[Rule, Fired]] = []
            for rule, window in self._rules[kind]:
                value, sku = self._value(rule, window, subject, known.skus, at, order, basket)
                if value is not None and _fires(rule, value):
                    fired.append((rule, _fired(rule, value, sku, signal.reservation_id)))
            if fired:
                found += self._decide(kind, subject, fired, at, signal.reservation_id, known.asked)
        return found

    def _value(
        self,
        rule: Rule,
        window: _Window,
        subject: str,
        skus: Sequence[str],
        at: float,
        order: dict[Feature, tuple[float, str]],
        basket: str,
    ) -> tuple[float | None, str]:
        """A feature's value and the SKU that it is about; None where it says nothing."""
        feature = rule.feature
        if feature in OF_ORDER:
            if not order:
                return None, ""
            return order[feature] if feature in order else (window.total(at, subject, basket), "")
        if feature is Feature.LOST_SHARE:
            ended = window.total(at, subject, "ended")
            if ended < max(rule.samples_min, 1):
                return None, ""
            return window.total(at, subject, "lost") / ended, ""
        if feature is Feature.CUSTOMERS_ON_SKU:
            return _highest((window.different(at, subject, sku), sku) for sku in skus)
        if feature is Feature.UNITS_OF_SKU:
            of = skus if rule.by is not Kind.SKU else (subject,)
            return _highest((window.total(at, subject, sku), sku) for sku in of)
        return window.total(at, subject), ""

    def _decide(
        self,
        kind: Kind,
        subject: str,
        fired: Sequence[tuple[Rule, Fired]],
        at: float,
        reservation_id: str,
        units: int,
    ) -> list[Finding]:
        deciding = tuple(one for rule, one in fired if not rule.shadow)
        score = sum(one.score for one in deciding)
        decision = self._decision(kind, subject, score)
        found = []
        if decision:
            found.append(Finding(subject, kind, decision, score, deciding, at, reservation_id, units, shadow=False))
        if self._shadowed:
            candidate = tuple(one for rule, one in fired if rule.shadow or rule.rule_id not in self._shadowed)
            score = sum(one.score for one in candidate)
            other = self._decision(kind, subject, score)
            if other and other is not decision and decision is not Decision.BLOCK:
                found.append(Finding(subject, kind, other, score, candidate, at, reservation_id, units, shadow=True))
        return found

    def _decision(self, kind: Kind, subject: str, score: int) -> Decision | None:
        if score >= self._policy.block_score and can_be_blocked(kind, subject):
            return Decision.BLOCK
        return Decision.REVIEW if score >= self._policy.review_score else None

    def _usages(self, known: _Known, signal: Signal) -> list[Usage]:
        """What the subjects have used of limits: of holds where it is half of one or more, as each is one; of units,
        of which the next order may want all that is left, from the first.
        """
        found = []
        for rule, window in self._limits:
            for kind, subject in known.named:
                if kind is not rule.by:
                    continue
                for sku in signal.skus if rule.feature is Feature.UNITS_OF_SKU else ("",):
                    counts = window.counts.get((subject, sku) if sku else (subject,))
                    parts = counts.last() if counts else ()
                    least = rule.threshold / 2 if rule.feature is Feature.HOLDS else 1
                    if counts and sum(used for _, used in parts) >= least:
                        found.append(Usage(rule.rule_id, subject, sku, parts, tuple(counts.names or ())))
        return found


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Case:
    """A subject under review; `rules` has the highest value of each that fired, `reservation_ids` the latest."""

    case_id: str
    subject: str
    kind: Kind
    shadow: bool
    decision: Decision
    score: int
    opened_at: float
    updated_at: float
    rules: dict[tuple[str, int], Fired] = field(default_factory=dict)
    reservation_ids: list[str] = field(default_factory=list)
    reservations: int = 0
    units: int = 0
    blocked_until: float | None = None


def grow(case: Case | None, finding: Finding, policy: Policy) -> tuple[Case, bool]:
    """The open case of a subject, or a new one, with what was found; and whether the subject is to be blocked now."""
    if case is None:
        name = blake2b(
            repr((finding.subject, finding.at, finding.reservation_id, finding.shadow)).encode(), digest_size=10
        )
        case = Case(
            f"case-{name.hexdigest()}", finding.subject, finding.kind, finding.shadow, finding.decision, finding.score,
            finding.at, finding.at,
        )  # fmt: skip
    if finding.decision is Decision.BLOCK:
        case.decision = Decision.BLOCK
    case.score = max(case.score, finding.score)
    case.updated_at = max(case.updated_at, finding.at)
    for fired in finding.fired:
        known = case.rules.get((fired.rule_id, fired.version))
        if known is None or fired.value > known.value:
            case.rules[fired.rule_id, fired.version] = fired
    if finding.reservation_id not in case.reservation_ids:
        case.reservations += 1
        case.units = min(case.units + finding.units, UNITS_MAX)
        case.reservation_ids.append(finding.reservation_id)
        del case.reservation_ids[:-CASE_RESERVATIONS_MAX]
    blocks = finding.decision is Decision.BLOCK and not finding.shadow and finding.at >= (case.blocked_until or 0)
    if blocks:
        case.blocked_until = finding.at + policy.block_seconds
    return case, blocks


def can_be_blocked(kind: Kind, subject: str) -> bool:
    """Neither a SKU can, nor a reservation that stands for its unknown customer."""
    return kind is not Kind.SKU and not subject.startswith(ORDER)


def _place(rule: Rule) -> tuple[Feature, Kind, float]:
    return rule.feature, rule.by, rule.window_seconds


def _people(signal: Signal) -> tuple[tuple[Kind, str], ...]:
    """The subjects of a reservation; without a customer it stands for itself."""
    named = (
        (Kind.CUSTOMER, signal.customer or f"{ORDER}{signal.reservation_id}"),
        (Kind.DEVICE, signal.device),
        (Kind.NETWORK, signal.network),
    )
    return tuple((kind, subject) for kind, subject in named if subject)


def _held(signal: Signal) -> Iterable[tuple[str, int]]:
    """The SKUs of which something is held, and the units."""
    return ((sku, units) for sku, units in zip(signal.skus, signal.held, strict=True) if units)


def _basket(signal: Signal) -> str:
    content = repr(sorted(zip(signal.skus, signal.asked, strict=True)))
    return blake2b(content.encode(), digest_size=8).hexdigest()


def _fires(rule: Rule, value: float) -> bool:
    return value >= rule.threshold if rule.comparison is Comparison.AT_LEAST else value <= rule.threshold


def _fired(rule: Rule, value: float, sku: str, reservation_id: str) -> Fired:
    return Fired(
        rule.rule_id, rule.version, round(float(value), 4), rule.threshold, rule.score, rule.reason, sku, reservation_id
    )


def _highest(values: Iterable[tuple[float, str]]) -> tuple[float, str]:
    return max(values, key=lambda one: one[0], default=(0.0, ""))


def _keep(kept: OrderedDict[Key, Value], key: Key, value: Value, most: int) -> Value:
    """Remember a value, and forget the one that was not used for longest when there are more than `most`."""
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)
    return value


def _recall(kept: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], most: int) -> Value:
    """What is remembered under a key, used just now; where there is nothing, what is made is remembered."""
    value = kept.get(key)
    if value is None:
        return _keep(kept, key, make(), most)
    kept.move_to_end(key)
    return value
