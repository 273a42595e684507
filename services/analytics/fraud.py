"""Antifraud as it happens: changes of reservations become signals, are judged, and what is found is kept.

One judge at a time, on any pod. What it knows is in memory and follows from the signals, which are kept in the order in
which they were judged (`desk.signal`). A batch of one partition is one transaction:

    move the partition's offset | number the signals on | keep them | open and grow cases | say what is to be enforced

* Nothing is judged twice or missed: the offset moves with the signals (as in `projection`), and the signals' number
  moves from where this judge knows it to be. Two judges at once, as when Redis is away, find the number elsewhere: the
  later one makes itself anew from what the earlier has kept, and goes on. After any fault it does so too.
* A judge that starts is made of the last `fraud_history_signals` signals. Rules that change make another one beside
  it, which takes over when it has caught up; live events are judged by the old rules meanwhile.
* What is to be enforced leaves by an outbox (`desk.outbox`), in the same transaction, and with it every second how far
  judging has come: from that reservation knows whether what it knows is fresh.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
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
RETURNED_MAX = 500


class _BehindError(Exception):
    """Someone else has judged since this judge last looked."""


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
        self._months: set[object] = set()

    async def positions(self, places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The next offset of each partition to be judged."""
        async with self._database.connection() as connection:
            return await store.positions(connection, places, cases.PARTITIONS)

    async def apply(self, batch: Batch, _bury: Bury) -> None:
        """Judge a batch of one partition. What is poison the projection buries, and nobody judges.

        Raises Busy while the database is away, Elsewhere when the partition is not where the batch begins.
        """
        await one_by_one(batch, leave, self._apply, self._judged_nothing)

    async def _judged_nothing(self, place: Place) -> None:
        async with self._turn:
            await self._judged(place, [], returned=await self._ready())

    async def _apply(self, batch: Batch, bury: Bury) -> None:
        async with self._turn:
            place = place_of(batch)
            changes = await parse(batch.messages, codec.reservation, bury)
            try:
                while not await self._judged(place, changes, returned=await self._ready()):
                    pass
            except Refusal as refusal:
                self._judge = None
                raise Busy(refusal.message) from refusal
            except BaseException:
                self._judge = None  # it may know what was not kept
                raise

    async def _judged(self, place: Place, changes: Sequence[Reservation], *, returned: bool) -> bool:
        """Judge and keep; False when someone else has judged meanwhile."""
        judge = self._judge
        assert judge is not None
        goods: Sequence[Record] = ()
        if returned:
            async with self._database.connection() as connection:
                goods = await connection.fetch(cases.RETURNED, RETURNED_MAX)
        signals, findings, usages = _see(judge, changes, goods)
        await self._make_partitions(signals)
        try:
            changed = await self._database.run(
                lambda connection: self._keep(connection, place, signals, goods, findings, usages)
            )
        except _BehindError:
            log.info("someone else has judged")
            self._judge = None
            return False
        self._seq += len(signals)
        metrics.FRAUD_SIGNALS.inc(len(signals))
        if changed != self._rules_changed and self._next is None:
            self._next = asyncio.create_task(self._made())
        return True

    async def _keep(
        self,
        connection: Connection,
        place: Place,
        signals: Sequence[Signal],
        returned: Sequence[Record],
        findings: Sequence[Finding],
        usages: Mapping[tuple[str, str, str], Usage],
    ) -> int:
        if not await store.advance(connection, place, cases.PARTITIONS):
            raise Elsewhere
        changed = await cases.write_signals(connection, self._seq, signals)
        if changed is None:
            raise _BehindError
        await cases.delete_returned(connection, returned)
        verdicts = [_usage(usage) for usage in usages.values()]
        if findings:
            verdicts += await self._open_cases(connection, findings)
        now = time.monotonic()
        if now - self._told >= HEARTBEAT_SECONDS:
            verdicts.append(await self._heartbeat(connection))
            self._told = now
        await outbox.write(connection, verdicts, table=cases.OUTBOX)
        return changed

    async def _open_cases(self, connection: Connection, findings: Sequence[Finding]) -> list[Event]:
        """Open and grow the cases of what was found; who is to be blocked."""
        subjects = {finding.subject for finding in findings}
        known = await cases.open_cases(connection, subjects)
        exempt = await cases.exempt(connection, subjects)
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
            if is_blocked:
                blocks.append(block(case.subject, finding.at, case.blocked_until or finding.at, case.case_id))
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

    async def _heartbeat(self, connection: Connection) -> Event:
        complete = await connection.fetchval(cases.COMPLETE_UNTIL)
        assert self._judge is not None
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
                        for limit in self._judge.limits
                    ],
                )
            ),
        )

    async def close(self) -> None:
        """End what it does in the background."""
        if self._next:
            self._next.cancel()
            await asyncio.wait([self._next])
            self._next = None

    # -- the judge ----------------------------------------------------------------------------------------------------

    async def _ready(self) -> bool:
        """Have a judge who knows all that was judged, by the newest rules that are ready; whether returns wait."""
        if self._next and (self._judge is None or self._next.done()):
            made, self._next = self._next, None  # a fault of its making must not be met again
            self._judge, self._seq, self._rules_changed = await made
            log.info("rules changed", signals=self._seq)
        if self._judge is None:
            self._judge, self._seq, self._rules_changed = await self._made()
        async with self._database.connection() as connection:
            last, _, returned = await cases.judged(connection)
        if last != self._seq:
            self._seq = await self._taught(self._judge, self._seq)
        return returned

    async def _made(self) -> tuple[Judge, int, int]:
        """A judge by the rules of now, and the last signal that it has seen."""
        async with self._database.connection() as connection:
            last, changed, _ = await cases.judged(connection)
            judge = Judge(await cases.rules_in_use(connection), self._policy)
        seq = await self._taught(judge, max(0, last - self._settings.fraud_history_signals))
        return judge, seq, changed

    async def _taught(self, judge: Judge, seq: int) -> int:
        """Show a judge every signal after `seq`; the last one's number."""
        while True:
            async with self._database.connection() as connection:
                rows = await connection.fetch(cases.SIGNALS_SINCE, seq, READ_SIGNALS)
            for row in rows:
                judge.see(cases.signal(row))
            await asyncio.sleep(0)
            if rows:
                seq = rows[-1]["seq"]
            if len(rows) < READ_SIGNALS:
                return seq

    async def _make_partitions(self, signals: Iterable[Signal]) -> None:
        for month in sorted({partitions.month(cases.moment(signal.at)) for signal in signals}):
            if month not in self._months:
                async with self._database.connection() as connection:
                    await partitions.make(connection, "desk.signal", month)
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


def _see(
    judge: Judge, changes: Iterable[Reservation], returned: Iterable[Record]
) -> tuple[list[Signal], list[Finding], dict[tuple[str, str, str], Usage]]:
    """Show a judge what has changed: the signals, what was found, and the last usage of each limit and subject."""
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
            see(signal(change))
    for row in returned:
        at = row["occurred_at"].timestamp()
        see(Signal(at, at, row["reservation_id"], 0, "", "", "", returned=row["units"]))
    return signals, findings, usages


def signal(change: Reservation) -> Signal:
    """What a change of a reservation means to the rules; its time is shifted into business time."""
    order_at = change.order_time.timestamp()
    seen = Signal(
        order_at + (change.updated_at - change.created_at).total_seconds(),
        order_at,
        change.reservation_id,
        change.version,
        change.customer_id,
        change.device,
        change.network,
        open=sum(part.held for part in change.parts),
        sold=sum(part.confirmed for part in change.parts),
        cancelled=sum(part.cancelled for part in change.parts),
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
        rule_id=usage.rule_id, subject=usage.subject, sku=usage.sku, as_of=timestamp(cases.moment(usage.as_of)),
        parts=[
            events_pb2.UsagePart(leave_time=timestamp(cases.moment(leaves)), used=used) for leaves, used in usage.parts
        ],
    )  # fmt: skip
    return _verdict(f"usage/{usage.rule_id}/{usage.subject}/{usage.sku}", events_pb2.Verdict(usage=told))


def _verdict(key: str, verdict: events_pb2.Verdict) -> Event:
    return Event(codec.VERDICTS_TOPIC, key, VERDICT_TYPE, verdict.SerializeToString())
