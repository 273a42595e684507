"""Antifraud as it happens: changes of reservations become signals, are judged, and what is found is kept.

One judge at a time, on any pod. What it knows is in memory and follows from the signals, which are kept in the order in
which they were judged (`desk.signal`). A batch of one partition is one transaction:

    lock | move the partition's offset | see what others have kept | judge | keep the signals | open and grow cases |
    say what is to be enforced

* Nothing is judged twice or missed: the offset moves with the signals (as in `projection`). Two judges at once, as when
  Redis is away, take turns by the lock, and each sees first what the other has kept. A judge whose transaction failed
  knows what was not kept: it is made anew.
* A judge that starts is made of the last `fraud_history_signals` signals. Rules that change make another one beside
  it, which takes over when it has caught up; live events are judged by the old rules meanwhile.
* Time is business time. An order that says it is of later than it was created is of then: it could empty every window.
* What a decided case cancels is no sign of anything: its subject did not do it.
* What is to be enforced leaves by an outbox (`desk.outbox`), in the same transaction, and with it every second how far
  judging has come: from that reservation knows whether what it knows is fresh.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial

import structlog
from aiokafka import TopicPartition
from holdfast.analytics.v1 import events_pb2
from holdfast.analytics.v1 import fraud_pb2 as pb

from services.analytics import alerts, cases, codec, rules, store
from services.analytics.domain import Reservation
from services.analytics.judge import Case, Finding, Judge, Policy, Signal, Usage, grow
from services.analytics.projection import leave, one_by_one, parse, place_of
from services.analytics.settings import Settings
from services.analytics.store import Place
from shared import metrics, outbox, partitions, telemetry
from shared.consumer import Batch, Bury, Busy, Elsewhere
from shared.database import Connection, Database, Record
from shared.outbox import Event
from shared.refusal import Refusal
from shared.wire import duration, timestamp

log = structlog.get_logger(__name__)
VERDICT_TYPE = events_pb2.Verdict.DESCRIPTOR.full_name
HEARTBEAT_SECONDS = 1.0
READ_SIGNALS = 1_000
BREATH_SIGNALS = 100  # other work of the pod has its turn in between
RETURNED_MAX = 500
BY_CASE = "case/"  # before a case's id: the request that cancels what a decided case releases


def policy(settings: Settings) -> Policy:
    return Policy(settings.fraud_review_score, settings.fraud_block_score, settings.fraud_block_seconds)


class Engine:
    """Judges batches, of any partition, one after the other."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._policy = policy(settings)
        self._turn = asyncio.Lock()
        self._judge: Judge | None = None
        self._seq = 0
        self._rules_changed = 0
        self._next: asyncio.Task[tuple[Judge, int, int]] | None = None
        self._told = 0.0
        self._months: set[datetime] = set()
        self._returned_months: set[datetime] = set()

    async def positions(self, places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The next offset of each partition to be judged."""
        async with self._database.connection() as connection:
            return await store.positions(connection, places, cases.PARTITIONS)

    async def apply(self, batch: Batch, _bury: Bury) -> None:
        """Judge a batch of one partition. What is poison the projection buries, and nobody judges.

        Raises Busy while the database is away or a table that needs another month is in use, Elsewhere when the
        partition is not where the batch begins.
        """
        await one_by_one(batch, leave, self._apply, self._judged_nothing)

    async def _judged_nothing(self, place: Place) -> None:
        await self._judged(place, [])

    async def _apply(self, batch: Batch, bury: Bury) -> None:
        await self._judged(place_of(batch), await parse(batch.messages, codec.reservation, bury))

    async def _judged(self, place: Place, changes: Sequence[Reservation]) -> None:
        """Judge and keep, in one transaction."""
        async with self._turn:
            try:
                judge = await self._ready()
                await self._make_partitions(changes)
                changed = await self._database.run(
                    lambda connection: self._judge_and_keep(connection, judge, place, changes)
                )
            except Refusal as refusal:
                raise Busy(refusal.message) from refusal
            self._judge = judge
            if changed != self._rules_changed and self._next is None:
                self._next = asyncio.create_task(self._made())

    async def _judge_and_keep(
        self, connection: Connection, judge: Judge, place: Place, changes: Sequence[Reservation]
    ) -> int:
        """How often rules have changed by now. Raises Elsewhere, and Busy when an attempt before it has failed."""
        last, changed, returned = await cases.lock_judged(connection)
        if not await store.advance(connection, place, cases.PARTITIONS):
            raise Elsewhere
        if self._judge is not judge:
            raise Busy("what was judged could not be kept")
        self._judge = None  # it is not to be used again until what it sees now is kept
        if last != self._seq:
            await _teach(judge, self._seq, partial(connection.fetch, cases.SIGNALS_SINCE))
        goods = await self._goods(connection) if returned else []
        ordering = {change.customer_id for change in changes if change.version == 1 and change.customer_id}
        first = await cases.first_orders(connection, ordering) if ordering else set()
        signals, findings, usages = _see(judge, changes, first, goods)
        await cases.write_signals(connection, last, signals)
        await cases.delete_returned(connection, goods)
        self._seq = last + len(signals)
        metrics.FRAUD_SIGNALS.inc(len(signals))
        verdicts = [_usage(usage) for usage in usages.values()]
        if findings:
            verdicts += await self._open_cases(connection, findings)
        now = time.monotonic()
        if now - self._told >= HEARTBEAT_SECONDS:
            verdicts.append(await _heartbeat(connection, judge))
            self._told = now
        await outbox.write(connection, verdicts, table=cases.OUTBOX)
        return changed

    async def _goods(self, connection: Connection) -> list[Record]:
        """Goods that came back, and can be kept: those of a month without a partition wait for the next batch, which
        makes it. When they came back their callers say.
        """
        rows = await connection.fetch(cases.RETURNED, RETURNED_MAX)
        self._returned_months = {partitions.month(row["occurred_at"]) for row in rows}
        return [row for row in rows if partitions.month(row["occurred_at"]) in self._months]

    async def _open_cases(self, connection: Connection, findings: Sequence[Finding]) -> list[Event]:
        """Open and grow the cases of what was found; who is to be blocked."""
        subjects = {finding.subject for finding in findings}
        known = await cases.open_cases(connection, subjects)
        exempt = await cases.exempt(connection, subjects)
        blocked = await cases.blocked(connection, subjects)
        before = {one.case_id for one in known.values()}
        grown: dict[str, Case] = {}
        causes: dict[str, str] = {}
        blocks = []
        for finding in findings:
            place = (finding.subject, finding.shadow)
            if place not in known and finding.at < exempt.get(finding.subject, 0):
                continue
            case, is_blocked = grow(known.get(place), finding, self._policy)
            known[place] = grown[case.case_id] = case
            causes.setdefault(case.case_id, telemetry.traceparent_of(finding.reservation_id))
            until = case.blocked_until or finding.at
            if is_blocked and until > blocked.get(case.subject, (0, 0))[1]:
                blocked[case.subject] = (finding.at, until)
                blocks.append(block(case.subject, finding.at, until, case.case_id))
        opened = [case for case in grown.values() if case.case_id not in before]
        if grown:
            await cases.write_cases(connection, list(grown.values()), opened)
        for case in opened:
            metrics.FRAUD_CASES.labels("SHADOW" if case.shadow else case.decision).inc()
            with telemetry.following("decide case", causes[case.case_id], attributes=_told(case)) as span:
                if not case.shadow:
                    trace = telemetry.written(span) if span else ""
                    await alerts.fraud_case_opened(connection, case.case_id, _details(case), trace)
                log.info("case opened", case=case.case_id, decision=case.decision, score=case.score, shadow=case.shadow)
        return blocks

    async def close(self) -> None:
        """End what it does in the background."""
        if self._next:
            self._next.cancel()
            await asyncio.wait([self._next])
            self._next = None

    # -- the judge ----------------------------------------------------------------------------------------------------

    async def _ready(self) -> Judge:
        """A judge who knows all that was judged until lately, by the newest rules that are ready."""
        if self._next and (self._judge is None or self._next.done()):
            made, self._next = self._next, None  # a fault of its making must not be met again
            self._judge, self._seq, self._rules_changed = await made
            log.info("rules changed", signals=self._seq)
        if self._judge is None:
            self._judge, self._seq, self._rules_changed = await self._made()
        judge, self._judge = self._judge, None  # a fault half way must not be gone on from
        self._seq = await _teach(judge, self._seq, self._signals)
        self._judge = judge
        return judge

    async def _made(self) -> tuple[Judge, int, int]:
        """A judge by the rules of now, and the last signal that it has seen."""
        async with self._database.connection() as connection:
            last, changed = await cases.judged(connection)
            judge = Judge(await cases.rules_in_use(connection), self._policy)
        seq = await _teach(judge, max(0, last - self._settings.fraud_history_signals), self._signals)
        return judge, seq, changed

    async def _signals(self, seq: int, most: int) -> Sequence[Record]:
        async with self._database.connection() as connection:
            return await connection.fetch(cases.SIGNALS_SINCE, seq, most)

    async def _make_partitions(self, changes: Iterable[Reservation]) -> None:
        wanted = {partitions.month(cases.moment(_times(change)[0])) for change in changes} | self._returned_months
        for month in sorted(wanted - self._months):
            try:
                async with self._database.connection() as connection:
                    await partitions.make(connection, "desk.signal", month)
            except partitions.IN_USE as error:
                raise Busy("a table that needs another month is in use") from error
            self._months.add(month)


async def seed(database: Database) -> None:
    """Keep the rules of the file of defaults, those that were never kept."""
    for message, state in rules.defaults():
        keep = partial(
            cases.insert_rule, new=rules.rule(message), state=state, actor="defaults",
            request_id=f"default/{message.rule_id}", fingerprint=rules.content(message),
        )  # fmt: skip
        with suppress(Refusal):  # it was changed in the file since: what was kept stays
            await database.run(keep)


async def _teach(judge: Judge, seq: int, read: Callable[[int, int], Awaitable[Sequence[Record]]]) -> int:
    """Show a judge every signal after `seq`; the last one's number."""
    while True:
        rows = await read(seq, READ_SIGNALS)
        for number, row in enumerate(rows):
            judge.see(cases.signal(row))
            if number % BREATH_SIGNALS == 0:
                await asyncio.sleep(0)
        if rows:
            seq = rows[-1]["seq"]
        if len(rows) < READ_SIGNALS:
            return seq


def _see(
    judge: Judge, changes: Iterable[Reservation], first: set[str], returned: Iterable[Record]
) -> tuple[list[Signal], list[Finding], dict[tuple[str, str, str], Usage]]:
    """Show a judge what has changed, and whose orders are their `first`: the signals, what was found, and the last
    usage of each limit and subject.
    """
    signals: list[Signal] = []
    findings: list[Finding] = []
    usages: dict[tuple[str, str, str], Usage] = {}

    def see(signal: Signal) -> None:
        found, used = judge.see(signal)
        signals.append(signal)
        findings.extend(found)
        usages.update({(usage.rule_id, usage.subject, usage.sku): usage for usage in used})

    for change in changes:
        known = judge.version(change.reservation_id)
        if change.version > known and (known or change.version == 1):
            new = signal(change)
            see(new._replace(first=new.customer in first) if new.skus else new)
            first.discard(new.customer)
    for row in returned:
        at = row["occurred_at"].timestamp()
        see(Signal(at, at, row["reservation_id"], 0, "", "", "", returned=row["units"]))
    return signals, findings, usages


def _times(change: Reservation) -> tuple[float, float]:
    """When a reservation changed, shifted into business time, and when it was ordered."""
    order_at = min(change.order_time, change.created_at).timestamp()
    return order_at + (change.updated_at - change.created_at).total_seconds(), order_at


def signal(change: Reservation) -> Signal:
    """What a change of a reservation means to the rules."""
    seen = Signal(
        *_times(change),
        change.reservation_id,
        change.version,
        change.customer_id,
        change.device,
        change.network,
        open=sum(part.held for part in change.parts),
        sold=sum(part.confirmed for part in change.parts),
        cancelled=0 if change.request_id.startswith(BY_CASE) else sum(part.cancelled for part in change.parts),
        expired=sum(part.expired for part in change.parts),
    )
    return seen if change.version > 1 else _with_order(seen, change)


def _with_order(seen: Signal, change: Reservation) -> Signal:
    asked = dict.fromkeys(sorted(line.sku for line in change.lines), 0)
    held = dict(asked)
    for line in change.lines:
        asked[line.sku] += line.quantity
    for part in change.parts:
        held[part.sku] = held.get(part.sku, 0) + part.held
    currencies = {line.currency_code for line in change.lines}
    value = sum(line.quantity * line.price_micros for line in change.lines) if len(currencies) == 1 else 0
    return seen._replace(
        skus=tuple(asked), asked=tuple(asked.values()), held=tuple(held[sku] for sku in asked),
        currency_code=currencies.pop() if value else "", value_micros=value,
    )  # fmt: skip


async def _heartbeat(connection: Connection, judge: Judge) -> Event:
    complete = await connection.fetchval(cases.COMPLETE_UNTIL)
    return _verdict(
        "heartbeat",
        events_pb2.Verdict(
            heartbeat=events_pb2.Heartbeat(
                complete_time=timestamp(complete),
                limits=[
                    events_pb2.Limit(
                        rule_id=limit.rule_id,
                        feature=pb.Feature.Value(f"FEATURE_{limit.feature}"),
                        by=pb.SubjectKind.Value(f"SUBJECT_KIND_{limit.by}"),
                        window=duration(timedelta(seconds=limit.window_seconds)),
                        most=int(limit.threshold),
                    )
                    for limit in judge.limits
                ],
            )
        ),
    )


def block(subject: str, start: float, end: float, case_id: str) -> Event:
    """The verdict that a subject is refused from `start` until `end`."""
    told = events_pb2.Block(
        subject=subject, start_time=timestamp(cases.moment(start)), end_time=timestamp(cases.moment(end)),
        case_id=case_id,
    )  # fmt: skip
    return _verdict(f"block/{subject}", events_pb2.Verdict(block=told))


def release(case_id: str, reservation_ids: Sequence[str]) -> Event:
    """The verdict that reservations are to be cancelled."""
    told = events_pb2.Release(case_id=case_id, reservation_ids=reservation_ids)
    return _verdict(f"release/{case_id}", events_pb2.Verdict(release=told))


def _told(case: Case) -> telemetry.Attributes:
    return {
        "holdfast.fraud.decision": case.decision,
        "holdfast.fraud.score": case.score,
        "holdfast.fraud.rules": len(case.rules),
        "holdfast.fraud.shadow": case.shadow,
    }


def _details(case: Case) -> dict[str, str]:
    """What an alert tells of a case: why it was opened, and nothing of who it is."""
    return {
        "decision": case.decision,
        "score": str(case.score),
        "of": case.kind.lower(),
        "reservation": case.reservation_ids[0],
    } | {f"rule {fired.rule_id}": f"{fired.value:g}, from {fired.threshold:g} on" for fired in case.rules.values()}


def _usage(usage: Usage) -> Event:
    told = events_pb2.Usage(
        rule_id=usage.rule_id, subject=usage.subject, sku=usage.sku, reservation_ids=usage.reservation_ids,
        parts=[
            events_pb2.UsagePart(leave_time=timestamp(cases.moment(leaves)), used=used) for leaves, used in usage.parts
        ],
    )  # fmt: skip
    return _verdict(f"usage/{usage.rule_id}/{usage.subject}/{usage.sku}", events_pb2.Verdict(usage=told))


def _verdict(key: str, verdict: events_pb2.Verdict) -> Event:
    return Event(codec.VERDICTS_TOPIC, key, VERDICT_TYPE, verdict.SerializeToString())
