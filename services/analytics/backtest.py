"""What rules would have done: the stored signals of a range, shown to a judge of the candidate rules and to one of the
rules that are active now. It is the judge of live events, and the same order of signals.

A block is played out: what the subject held while it lasted would have been refused. What of that sold nothing in the
end is what the block would have protected; what was sold is its price. (Refused reservations stay in the windows:
what their customers would have done instead, nobody knows.)
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from services.analytics import cases
from services.analytics.judge import Case, Effect, Judge, Policy, Rule, Signal, grow
from shared.database import Database

READ_SIGNALS = 1_000
BREATH_SIGNALS = 100  # other calls of the pod have their turn in between


@dataclass(slots=True)
class Outcome:
    """What a set of rules came to in a range."""

    cases: dict[str, Case] = field(default_factory=dict)
    refused: int = 0
    units_protected: int = 0
    sales_blocked: int = 0
    units_blocked: int = 0
    value_blocked: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Refused:
    """A reservation that a block would have refused."""

    units: int
    asked: int
    open: int
    sold: int = 0
    currency_code: str = ""
    value_micros: int = 0


class Trial:
    """A judge by the rules that score, and what follows from what it finds when nobody decides about it."""

    def __init__(self, rules: Iterable[Rule], policy: Policy, start: float) -> None:
        self._judge = Judge([rule for rule in rules if rule.effect is Effect.SCORE], policy)
        self._policy = policy
        self._start = start
        self._blocked: dict[str, tuple[float, float]] = {}
        self._refused: dict[str, _Refused] = {}
        self._outcome = Outcome()

    def see(self, signal: Signal) -> None:
        """Take the next signal; what is found before the start only fills the windows."""
        findings, _ = self._judge.see(signal)
        if signal.skus:
            self._refuse(signal)
        elif not signal.returned and signal.reservation_id in self._refused:
            refused = self._refused[signal.reservation_id]
            refused.open, refused.sold = signal.open, signal.sold
        for finding in findings:
            if finding.shadow or finding.at < self._start:
                continue
            case, is_blocked = grow(self._outcome.cases.get(finding.subject), finding, self._policy)
            self._outcome.cases[finding.subject] = case
            if is_blocked:
                self._blocked[finding.subject] = (finding.at, case.blocked_until or finding.at)

    def _refuse(self, signal: Signal) -> None:
        units, at = sum(signal.held), signal.order_at
        spans = (self._blocked.get(subject) for subject in (signal.customer, signal.device, signal.network))
        if units and any(span and span[0] < at < span[1] for span in spans):
            self._refused[signal.reservation_id] = _Refused(
                units,
                sum(signal.asked),
                signal.open,
                currency_code=signal.currency_code,
                value_micros=signal.value_micros,
            )

    def outcome(self) -> Outcome:
        """What it has come to by now."""
        outcome = self._outcome
        sold = [one for one in self._refused.values() if one.sold]
        outcome.refused = len(self._refused)
        outcome.units_protected = sum(one.units - one.open - one.sold for one in self._refused.values())
        outcome.sales_blocked, outcome.units_blocked = len(sold), sum(one.sold for one in sold)
        outcome.value_blocked = Counter()
        for one in sold:
            outcome.value_blocked[one.currency_code] += one.value_micros * one.sold // max(one.asked, one.sold)
        return outcome


async def backtest(
    database: Database, trials: Iterable[Trial], start: datetime, end: datetime
) -> AsyncIterator[tuple[int, int]]:
    """Show trials the signals from `start` until `end`, in the order in which they were judged; how many are done, and
    of how many.
    """
    trials = list(trials)
    async with database.connection() as connection:
        total = int(await connection.fetchval(cases.COUNT_SIGNALS, start, end))
    done, seq = 0, 0
    yield done, total
    while True:
        async with database.connection() as connection:
            rows = await connection.fetch(cases.SIGNALS_BETWEEN, seq, start, end, READ_SIGNALS)
        for number, row in enumerate(rows):
            signal = cases.signal(row)
            for trial in trials:
                trial.see(signal)
            if number % BREATH_SIGNALS == 0:
                await asyncio.sleep(0)
        done += len(rows)
        if rows:
            seq = rows[-1]["seq"]
            yield done, max(done, total)
        if len(rows) < READ_SIGNALS:
            return
