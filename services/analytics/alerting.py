"""What is worth telling, to whom, and when: frozen data and pure steps.

An alert of a rule and a key:

    (none) --opens--> OPEN 1 --notably worse--> OPEN 2, 3, .. --closes--> CLOSED n

A rule opens on one side of a level and closes on the other side of another one, and never on both at once: what
moves between the two changes nothing. Each step is told once, under the version it leads to.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from enum import IntEnum, StrEnum
from string import Template
from typing import NamedTuple
from zoneinfo import ZoneInfo

COVER_DAYS_MAX = 9_999.0
DIGEST_LINES_MAX = 200
SUBJECT_CHARACTERS_MAX = 300


class Kind(StrEnum):
    """The API's AlertKind."""

    AVAILABLE_BELOW = "AVAILABLE_BELOW"
    COVER_BELOW = "COVER_BELOW"
    STOCK_OUT = "STOCK_OUT"
    BACK_IN_STOCK = "BACK_IN_STOCK"
    DRIFT = "DRIFT"
    LAG = "LAG"
    FRAUD_CASE = "FRAUD_CASE"
    DEAD_LETTERS = "DEAD_LETTERS"


BELOW = frozenset({Kind.AVAILABLE_BELOW, Kind.COVER_BELOW, Kind.STOCK_OUT})  # open below their level
ABOVE = frozenset({Kind.DRIFT, Kind.LAG, Kind.DEAD_LETTERS})  # open above it


class Severity(IntEnum):
    """The API's AlertSeverity."""

    INFO = 1
    WARNING = 2
    CRITICAL = 3


class Transition(StrEnum):
    """A step of an alert."""

    OPENED = "OPENED"
    UPDATED = "UPDATED"
    CLOSED = "CLOSED"


@dataclass(frozen=True, slots=True)
class Rule:
    """When alerts open and close. Rules of kinds that have no levels leave them at 0."""

    rule_id: str
    kind: Kind
    severity: Severity
    open_level: float = 0
    close_level: float = 0
    sku_prefix: str = ""
    category: str = ""
    location: str = ""

    def opens(self, value: float) -> bool:
        return value < self.open_level if self.kind in BELOW else value > self.open_level

    def closes(self, value: float) -> bool:
        return value >= self.close_level if self.kind in BELOW else value <= self.close_level


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured of a key, by the kind of rule that it is for. Inactive goods are worth no alert."""

    key: str
    values: Mapping[Kind, float]
    sku: str = ""
    location: str = ""
    name: str = ""
    category: str = ""
    active: bool = True
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OpenAlert:
    """An alert that is open: its version, and the value that was last told of it."""

    alert_id: str
    version: int
    told: float


class Change(NamedTuple):
    """A step to be made: of `alert`, or of a new one where it is None."""

    rule: Rule
    reading: Reading
    transition: Transition
    value: float
    alert: OpenAlert | None = None


def sku_key(sku: str, location: str) -> str:
    return f"{sku}@{location}"


def below(category: str, above: str) -> bool:
    """Whether a category is another one, or lies below it."""
    return not above or category == above or category.startswith(f"{above}/")


def concerns(rule: Rule, reading: Reading) -> bool:
    return (
        reading.active
        and reading.sku.startswith(rule.sku_prefix)
        and below(reading.category, rule.category)
        and rule.location in ("", reading.location)
    )


def step(rule: Rule, value: float, told: float | None) -> Transition | None:
    """What a value means for a rule whose open alert last told `told`, or which has none open."""
    if told is None:
        return Transition.OPENED if rule.opens(value) else None
    if rule.closes(value):
        return Transition.CLOSED
    worse = value <= told / 2 and value < told if rule.kind in BELOW else value >= told * 2 and value > told
    return Transition.UPDATED if worse else None


def judge(
    rules: Sequence[Rule], readings: Iterable[Reading], alerts: Mapping[tuple[str, str], OpenAlert]
) -> Iterator[Change]:
    """The steps that readings call for; `alerts` are the open ones by rule and key.

    A key that a rule no longer concerns closes its alert. The last stock-out of a key that ends tells the rules that
    wait for goods to be back.
    """
    for reading in readings:
        back = still_out = False
        for rule in rules:
            value = reading.values.get(rule.kind)
            if value is None:
                continue
            alert = alerts.get((rule.rule_id, reading.key))
            transition: Transition | None
            if concerns(rule, reading):
                transition = step(rule, value, alert.told if alert else None)
                back = back or (transition is Transition.CLOSED and rule.kind is Kind.STOCK_OUT)
            else:
                transition = Transition.CLOSED if alert else None
            still_out = still_out or (
                rule.kind is Kind.STOCK_OUT and bool(alert) and transition is not Transition.CLOSED
            )
            if transition:
                yield Change(rule, reading, transition, value, alert)
        if back and not still_out:
            for rule in rules:
                if rule.kind is Kind.BACK_IN_STOCK and concerns(rule, reading):
                    yield Change(rule, reading, Transition.OPENED, reading.values[Kind.STOCK_OUT])


# -- subscriptions


@dataclass(frozen=True, slots=True)
class QuietHours:
    """Local times from which and before which not to disturb; an end before the start is of the next day."""

    start: time
    end: time
    zone: str

    def until(self, now: datetime) -> datetime | None:
        """The end of the quiet hours that `now` is in, and always after it; None when it is in none."""
        zone = ZoneInfo(self.zone)
        local = now.astimezone(zone)
        at = local.time()
        inside = self.start <= at < self.end if self.start < self.end else at >= self.start or at < self.end
        if not inside:
            return None
        day = local.date() + timedelta(days=at >= self.end)
        # Where the clock is put back, a local time comes twice: the first one may be over.
        ends = (datetime.combine(day, self.end, zone).replace(fold=fold).astimezone(UTC) for fold in (0, 1))
        return next(end for end in ends if end > now)


@dataclass(frozen=True, slots=True)
class Subscription:
    """Who is told of what, and how it is worded."""

    subscription_id: str
    target_id: str
    kinds: frozenset[str] = frozenset()
    severity_min: Severity = Severity.INFO
    sku_prefixes: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    locations: tuple[str, ...] = ()
    digest_period: timedelta | None = None
    subject: str = ""
    body: str = ""

    def wants(self, alert: Mapping[str, object]) -> bool:
        """Whether it is told of an alert, as its event shows it."""
        sku, category, location = str(alert["sku"]), str(alert["category"]), str(alert["location"])
        return (
            (not self.kinds or alert["kind"] in self.kinds)
            and Severity[str(alert["severity"])] >= self.severity_min
            and (not self.sku_prefixes or (sku != "" and sku.startswith(self.sku_prefixes)))
            and (not self.categories or (sku != "" and any(below(category, one) for one in self.categories)))
            and (not self.locations or location in self.locations)
        )


def period_end(now: datetime, period: timedelta) -> datetime:
    """The next whole multiple of a period since 1970."""
    return datetime.fromtimestamp(
        (math.floor(now.timestamp() / period.total_seconds()) + 1) * period.total_seconds(), UTC
    )


# -- messages

PLACEHOLDERS = frozenset(
    {
        "transition", "kind", "severity", "sku", "location", "name", "category", "key", "value", "level", "time",
        "alert_id", "version", "details",
    }
)  # fmt: skip
SUBJECTS = {
    Kind.AVAILABLE_BELOW: "[$severity] $key: $value available, below $level ($transition)",
    Kind.COVER_BELOW: "[$severity] $key: stock for $value days, below $level ($transition)",
    Kind.STOCK_OUT: "[$severity] $key: out of stock ($transition)",
    Kind.BACK_IN_STOCK: "[$severity] $key: back in stock, $value available",
    Kind.DRIFT: "[$severity] the mart differs from the ledger by $value units ($transition)",
    Kind.LAG: "[$severity] analytics is $value s behind ($transition)",
    Kind.FRAUD_CASE: "[$severity] fraud case $key ($transition)",
    Kind.DEAD_LETTERS: "[$severity] $value dead in $key ($transition)",
}
BODY = "$transition at $time\n$name $category\n$details\nalert $alert_id, version $version"


def bad_placeholder(template: str) -> str | None:
    """What is wrong with a template; None when nothing is."""
    made = Template(template)
    if not made.is_valid():
        return "a $ that begins no placeholder; write $$ for the sign"
    unknown = sorted(set(made.get_identifiers()) - PLACEHOLDERS)
    return f"unknown placeholders {', '.join(unknown)}" if unknown else None


def render(alert: Mapping[str, object], transition: str, subject: str = "", body: str = "") -> tuple[str, str]:
    """Subject (one line, bounded) and body of an alert's message; empty templates mean the defaults of its kind."""
    details = alert["details"]
    values = {name: str(alert.get(name, "")) for name in PLACEHOLDERS} | {
        "transition": transition,
        "value": _number(alert["value"]),
        "level": _number(alert["open_level"]),
        "time": str(alert["updated_at"]),
        "details": "\n".join(f"{key}: {value}" for key, value in sorted(details.items()))
        if isinstance(details, Mapping)
        else "",
    }
    default = SUBJECTS[Kind(str(alert["kind"]))]
    line = " ".join(Template(subject or default).substitute(values).split())
    text = Template(body or BODY).substitute(values)
    return line[:SUBJECT_CHARACTERS_MAX], "\n".join(row for row in text.splitlines() if row.strip() or body)


def digest(subjects: Sequence[str]) -> tuple[str, str]:
    """Subject and body of a digest of messages, in their order; its lines are bounded."""
    lines = list(subjects[:DIGEST_LINES_MAX])
    if len(subjects) > DIGEST_LINES_MAX:
        lines.append(f"and {len(subjects) - DIGEST_LINES_MAX} more")
    return f"{len(subjects)} alerts", "\n".join(lines)


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, int | float) else ""


# -- deliveries


class Outcome(NamedTuple):
    """What came of an attempt: nothing in `error` when the target has taken the message.

    `error` is the class of what went wrong and holds nothing of what was sent or answered. `permanent` says that it
    would go wrong again; `retry_after_seconds` is what the target asked for.
    """

    error: str = ""
    status: int = 0
    permanent: bool = False
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long failing targets are tried, and how they are spared."""

    backoff_seconds: float
    backoff_seconds_max: float
    circuit_failures_max: int
    circuit_seconds: float


class Settled(NamedTuple):
    """What an attempt means for its delivery, and for its target: failures in a row, and how long to leave it alone."""

    state: str
    again_seconds: float
    failures: int
    spare_seconds: float


def backoff(attempts: int, chance: float, patience: Patience) -> float:
    """Seconds until the next attempt after so many: exponential, bounded, with full jitter by a chance of 0 to 1."""
    return chance * min(patience.backoff_seconds_max, patience.backoff_seconds * 2.0 ** min(attempts - 1, 60))


def settle(
    outcome: Outcome, attempts: int, attempts_max: int, failures: int, chance: float, patience: Patience
) -> Settled:
    """What an attempt that was the `attempts`th comes to, on a target that failed `failures` times in a row."""
    if not outcome.error:
        return Settled("SENT", 0, 0, 0)
    if outcome.permanent:
        # The target answers: that it will not have this message says nothing of the next.
        return Settled("DEAD", 0, 0, 0)
    asked = min(outcome.retry_after_seconds or 0, patience.backoff_seconds_max)
    spare = patience.circuit_seconds if failures + 1 >= patience.circuit_failures_max else 0
    state = "DEAD" if attempts >= attempts_max else "PENDING"
    return Settled(state, max(asked, backoff(attempts, chance, patience)), failures + 1, max(asked, spare))


def key_of(*parts: object) -> str:
    """The idempotency key of a message, the same whoever makes it."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()
