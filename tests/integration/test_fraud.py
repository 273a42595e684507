"""The judge on a real database: the same cases however events come, after faults, and in a backtest."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from holdfast.analytics.v1 import events_pb2
from holdfast.analytics.v1 import fraud_pb2 as pb
from holdfast.reservation.v1 import events_pb2 as reservation_events
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local import orders
from services.analytics import cases, codec, fraud
from services.analytics.fraud import Engine
from services.analytics.fraud_servicer import FraudServicer
from services.analytics.settings import Settings
from services.analytics.turns import Turns
from shared.consumer import Batch, Elsewhere, Message, Poison
from shared.database import Database
from shared.refusal import Refusal
from shared.wire import timestamp

REAL_ORDERS = Path(__file__).parents[3] / "shared/data/online_retail_2010-12_to_2011-05.csv.gz"
PARTITIONS = 4
START = datetime(2026, 1, 1, tzinfo=UTC)
CASE = """
SELECT subject, state, decision, score, rules, reservation_ids, units, opened_at FROM desk.fraud_case ORDER BY 1, 2
"""
Context: Any = None  # the servicer does not look at it


async def bury(_message: Message, poison: Poison) -> None:
    raise poison


MANY_CASES = """
INSERT INTO desk.fraud_case (case_id, subject, kind, state, decision, score, rules, rule_ids, reservation_ids,
                             reservations, units, opened_at, updated_at, blocked_until, exempt_until)
SELECT 'c' || n, 's' || n % 500, 'CUSTOMER', 'KEPT', 'REVIEW', 50, '[]', '{}', '{}', 1, 1, now(), now(),
       CASE WHEN n % 2 = 0 THEN now() END, CASE WHEN n % 3 = 0 THEN now() END
FROM generate_series(1, 20000) AS n
"""


class Shop:
    """Makes events of reservations and shows them to judges, as Kafka would."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.settings = Settings(database_dsn="postgresql://unused")
        self.servicer = FraudServicer(self.settings, database, Turns(4, 4))
        self._offsets = [0] * PARTITIONS

    def engine(self) -> Engine:
        return Engine(self.database, self.settings)

    async def show(self, engine: Engine, events: Iterable[bytes], partition: int = 0) -> Batch:
        """One batch of one partition."""
        place = TopicPartition(codec.CHANGES_TOPIC, partition)
        start = (await engine.positions([place]))[place]
        messages = [
            ConsumerRecord(codec.CHANGES_TOPIC, partition, offset, 0, 0, b"key", value, None, 3, len(value), ())
            for offset, value in enumerate(events, start)
        ]
        batch = Batch(place, start, messages)
        await engine.apply(batch, bury)
        return batch

    async def cases(self) -> list[tuple[Any, ...]]:
        async with self.database.connection() as connection:
            return [tuple(row) for row in await connection.fetch(CASE)]

    async def verdicts(self) -> list[events_pb2.Verdict]:
        """What is to be enforced, without heartbeats."""
        async with self.database.connection() as connection:
            rows = await connection.fetch("SELECT payloads FROM desk.outbox ORDER BY id")
        told = [events_pb2.Verdict.FromString(payload) for row in rows for payload in row["payloads"]]
        return [verdict for verdict in told if verdict.WhichOneof("verdict") != "heartbeat"]


@pytest.fixture
async def shop(analytics_db: Database) -> Shop:
    await fraud.seed(analytics_db)
    return Shop(analytics_db)


def changed(
    name: str, version: int, at: datetime, *, later: timedelta = timedelta(), who: str = "", network: str = "",
    units: int = 1, sku: str = "A", held: int = 0, confirmed: int = 0, expired: int = 0, cancelled: int = 0,
    lines: Any = None, by: str = "", made: datetime | None = None,
) -> bytes:  # fmt: skip
    states = {"held": rp.RESERVATION_STATE_HELD, "confirmed": rp.RESERVATION_STATE_CONFIRMED}
    state = states["held"] if held else states["confirmed"] if confirmed else rp.RESERVATION_STATE_EXPIRED
    unlike = rp.ReservationLine(sku=name, quantity=1)  # no basket is the same
    reservation = rp.Reservation(
        reservation_id=name, version=version, state=state, create_time=timestamp(made or at),
        order_time=timestamp(at), update_time=timestamp((made or at) + later),
        lines=lines or [rp.ReservationLine(sku=sku, quantity=units), unlike],
        allocations=[
            rp.Allocation(
                sku=sku, location="MAIN", held=held, confirmed=confirmed, expired=expired, cancelled=cancelled
            )
        ],
    )  # fmt: skip
    if lines:
        del reservation.allocations[:]
        for line in lines:
            parts = {"held": line.quantity * bool(held), "confirmed": line.quantity * bool(confirmed)}
            reservation.allocations.add(sku=line.sku, location="MAIN", **parts)
    subjects = reservation_events.Subjects(customer=who, network=network)
    event = reservation_events.ReservationChanged(reservation=reservation, subjects=subjects, request_id=by)
    return event.SerializeToString()


def traffic(seed: int, count: int = 400) -> list[list[bytes]]:
    """A few customers of two networks, hasty ones among them; every reservation's events in one of the partitions."""
    dice = random.Random(seed)
    partitions: list[list[bytes]] = [[] for _ in range(PARTITIONS)]
    for n in range(count):
        at = START + timedelta(seconds=n * dice.random())
        hasty = dice.random() < 0.6
        who = f"customer:k1:{dice.randrange(3) if hasty else 100 + dice.randrange(50)}"
        network = f"network:k1:{int(hasty)}"
        units = dice.choice([1, 1, 2, 3, 6])
        of: dict[str, Any] = {"who": who, "network": network, "units": units}
        events = partitions[n % PARTITIONS]
        events.append(changed(f"r{n}", 1, at, held=units, **of))
        ends: dict[str, Any] = {"confirmed": units} if dice.random() < 0.3 else {"expired": units}
        events.append(changed(f"r{n}", 2, at, later=timedelta(seconds=30), **of, **ends))
    return partitions


async def show_all(shop: Shop, engines: Sequence[Engine], seed: int) -> None:
    """Everything, in batches of any size, by any of the judges."""
    dice = random.Random(seed)
    waiting = traffic(seed)
    while any(waiting):
        partition = dice.choice([n for n in range(PARTITIONS) if waiting[n]])
        size = dice.randint(1, 40)
        batch, waiting[partition] = waiting[partition][:size], waiting[partition][size:]
        await shop.show(dice.choice(engines), batch, partition)


async def backtest(shop: Shop, candidate: Iterable[pb.Rule] = ()) -> list[pb.BacktestRulesResponse]:
    request = pb.BacktestRulesRequest(rules=candidate or [hurry(20)], cases_max=1_000)
    request.range.start_time.FromDatetime(datetime(2000, 1, 1, tzinfo=UTC))
    request.range.end_time.FromDatetime(datetime(2090, 1, 1, tzinfo=UTC))
    return [answer async for answer in shop.servicer.BacktestRules(request, Context)]


def hurry(threshold: float, rule_id: str = "customer-in-a-hurry", score: int = 50) -> pb.Rule:
    rule = pb.Rule(
        rule_id=rule_id, feature=pb.FEATURE_HOLDS, by=pb.SUBJECT_KIND_CUSTOMER, threshold=threshold, score=score,
        comparison=pb.COMPARISON_AT_LEAST, reason="because",
    )  # fmt: skip
    rule.window.FromSeconds(60)
    return rule


def comparable(case: pb.Case) -> tuple[Any, ...]:
    rules = sorted((fired.rule_id, fired.value, fired.reservation_id) for fired in case.rules)
    return (
        case.subject,
        case.decision,
        case.score,
        rules,
        list(case.reservation_ids),
        case.units,
        case.open_time.seconds,
    )


@pytest.mark.parametrize("seed", range(3))
async def test_a_backtest_finds_what_was_found_live(shop: Shop, seed: int) -> None:
    """The same rules on the same events: the same cases, with the same numbers."""
    await show_all(shop, [shop.engine()], seed)
    live = (await shop.servicer.ListCases(pb.ListCasesRequest(page_size=1_000), Context)).cases
    assert live
    answers = await backtest(shop)
    assert [answer.events_done for answer in answers] == sorted(answer.events_done for answer in answers)
    assert answers[-1].events_done == answers[-1].events_total == 800
    found = answers[-1].active
    assert sorted(map(comparable, found.top_cases)) == sorted(map(comparable, live))
    assert found.cases == len(live)


@pytest.mark.parametrize("seed", range(3))
async def test_two_judges_at_once_do_no_harm(shop: Shop, seed: int) -> None:
    """Whoever judges knows what the other has judged: every signal once, and what a backtest of them finds."""
    await show_all(shop, [shop.engine(), shop.engine(), shop.engine()], seed)
    async with shop.database.connection() as connection:
        numbers = [row["seq"] for row in await connection.fetch("SELECT seq FROM desk.signal ORDER BY seq")]
    assert numbers == list(range(1, 801))
    live = (await shop.servicer.ListCases(pb.ListCasesRequest(page_size=1_000), Context)).cases
    assert sorted(map(comparable, (await backtest(shop))[-1].active.top_cases)) == sorted(map(comparable, live))


async def test_a_batch_counts_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that comes again is found elsewhere; one that failed half way has changed nothing and comes again."""
    engine = shop.engine()
    events = [changed(f"r{n}", 1, START, who="customer:k1:a", held=1) for n in range(19)]
    batch = await shop.show(engine, events)
    with pytest.raises(Elsewhere):
        await engine.apply(batch, bury)
    assert not await shop.cases()

    async def fail(*_: object) -> None:
        raise RuntimeError("the pod dies here")

    twentieth = [changed("r20", 1, START, who="customer:k1:a", held=1)]
    with monkeypatch.context() as patch:
        patch.setattr(cases, "write_cases", fail)
        with pytest.raises(RuntimeError, match="dies here"):
            await shop.show(engine, twentieth)
    assert not await shop.cases()
    await shop.show(engine, twentieth)
    ((subject, *_, rules, _, _, _),) = await shop.cases()
    assert subject == "customer:k1:a"
    assert [fired["value"] for fired in json.loads(rules)] == [20]


async def test_a_rule_that_is_activated_knows_the_past(shop: Shop) -> None:
    """The judge that takes over has seen what came before; the version before it is retired."""
    engine = shop.engine()
    await shop.show(engine, [changed(f"r{n}", 1, START, who="customer:k1:a", held=1) for n in range(9)])
    made = await shop.servicer.CreateRule(pb.CreateRuleRequest(request_id="q1", rule=hurry(10), actor="ann"), Context)
    again = await shop.servicer.CreateRule(pb.CreateRuleRequest(request_id="q1", rule=hurry(10), actor="ann"), Context)
    assert made == again
    assert (made.rule.version, made.rule.state) == (2, pb.RULE_STATE_DRAFT)
    with pytest.raises(Refusal, match="other content"):
        await shop.servicer.CreateRule(pb.CreateRuleRequest(request_id="q1", rule=hurry(11), actor="ann"), Context)
    request = pb.ActivateRuleRequest(rule_id="customer-in-a-hurry", version=2, actor="ann")
    assert (await shop.servicer.ActivateRule(request, Context)).rule.state == pb.RULE_STATE_ACTIVE
    versions = await shop.servicer.ListRules(pb.ListRulesRequest(rule_id="customer-in-a-hurry"), Context)
    assert [(rule.version, rule.state) for rule in versions.rules] == [
        (2, pb.RULE_STATE_ACTIVE), (1, pb.RULE_STATE_RETIRED),
    ]  # fmt: skip
    await shop.show(engine, [changed("r9", 1, START, who="customer:k1:a", held=1)])
    assert not await shop.cases(), "judged by the rules of before, while another judge learns"
    assert engine._next
    await asyncio.wait([engine._next])
    await shop.show(engine, [changed("r10", 1, START, who="customer:k1:a", held=1)])
    ((*_, rules, _, _, _),) = await shop.cases()
    assert [(fired["version"], fired["value"]) for fired in json.loads(rules)] == [(2, 11)]
    await engine.close()


async def test_deciding_a_case(shop: Shop) -> None:
    """Once, for good, with an audit; KEEP lifts the block and lets the subject be, RELEASE says what to cancel."""
    engine = shop.engine()
    for name in "ab":
        of: dict[str, Any] = {"who": f"customer:k1:{name}", "network": f"network:k1:{name}", "held": 1}
        await shop.show(engine, [changed(f"{name}{n}", 1, START, **of) for n in range(20)])
    kept, released = (await shop.servicer.ListCases(pb.ListCasesRequest(), Context)).cases[::-1]
    assert kept.subject == "customer:k1:a"
    with pytest.raises(Refusal, match="there is no case"):
        await shop.servicer.DecideCase(
            pb.DecideCaseRequest(case_id="none", decision=pb.CASE_DECISION_KEEP, actor="ann"), Context
        )
    keep = pb.DecideCaseRequest(case_id=kept.case_id, decision=pb.CASE_DECISION_KEEP, actor="ann", note="a reseller")
    first = await shop.servicer.DecideCase(keep, Context)
    assert first.case.state == pb.CASE_STATE_KEPT
    assert await shop.servicer.DecideCase(keep, Context) == first
    keep.decision = pb.CASE_DECISION_RELEASE
    with pytest.raises(Refusal) as refused:
        await shop.servicer.DecideCase(keep, Context)
    assert refused.value.reason == "CASE_CLOSED"
    audit = (await shop.servicer.GetCase(pb.GetCaseRequest(case_id=kept.case_id), Context)).entries
    assert [(entry.actor, entry.action, entry.note) for entry in audit] == [
        ("rules", "OPENED", ""), ("ann", "KEEP", "a reseller"),
    ]  # fmt: skip
    stop = pb.DecideCaseRequest(case_id=released.case_id, decision=pb.CASE_DECISION_BLOCK, actor="bob")
    assert (await shop.servicer.DecideCase(stop, Context)).case.block_time.ToDatetime(tzinfo=UTC) > datetime.now(UTC)
    release, block = (await shop.verdicts())[-2:]
    assert list(release.release.reservation_ids) == ["b19"]
    assert block.block.subject == "customer:k1:b"

    before = len(await shop.cases())
    more = START + timedelta(seconds=5)
    await shop.show(engine, [changed(f"a+{n}", 1, more, who="customer:k1:a", held=1) for n in range(5)])
    assert len(await shop.cases()) == before, "the subject is let be"
    await shop.show(engine, [changed(f"b+{n}", 1, more, who="customer:k1:b", held=1) for n in range(5)])
    assert len(await shop.cases()) == before + 1, "a new case after the decision"


async def test_the_longest_block_of_a_subject_holds(shop: Shop) -> None:
    """A person blocks for a day; the rules' quarter of an hour does not shorten that, nor does keeping a later case."""
    engine = shop.engine()
    now = datetime.now(UTC)

    async def attack(name: str, at: datetime) -> pb.Case:
        """Two rules speak against a customer: twenty holds in a minute, of the same basket."""
        lines = [rp.ReservationLine(sku="A", quantity=1)]
        of: dict[str, Any] = {"who": "customer:k1:a", "held": 1, "lines": lines}
        await shop.show(engine, [changed(f"{name}{n}", 1, at, **of) for n in range(20)])
        return (await shop.servicer.ListCases(pb.ListCasesRequest(state=pb.CASE_STATE_OPEN), Context)).cases[0]

    async def decide(case: pb.Case, decision: pb.CaseDecision.ValueType) -> pb.Case:
        request = pb.DecideCaseRequest(case_id=case.case_id, decision=decision, actor="ann")
        return (await shop.servicer.DecideCase(request, Context)).case

    async def blocks() -> list[tuple[datetime, datetime]]:
        told = [verdict.block for verdict in await shop.verdicts() if verdict.HasField("block")]
        return [(one.start_time.ToDatetime(UTC), one.end_time.ToDatetime(UTC)) for one in told]

    first = await attack("r", now)
    ((_, short),) = await blocks()
    assert short == now + timedelta(seconds=shop.settings.fraud_block_seconds)
    until = (await decide(first, pb.CASE_DECISION_BLOCK)).block_time.ToDatetime(UTC)
    assert (await blocks())[-1][1] == until > short
    second = await attack("s", now + timedelta(minutes=20))
    assert second.case_id != first.case_id
    assert second.decision == pb.DECISION_BLOCK
    assert len(await blocks()) == 2, "a shorter block is not told"
    await decide(second, pb.CASE_DECISION_KEEP)
    start, end = (await blocks())[-1]
    assert end == until, "the day goes on"
    assert start <= now
    third = (await attack("t", now + timedelta(days=2))).case_id
    assert (await blocks())[-1][1] > until
    await decide(pb.Case(case_id=third), pb.CASE_DECISION_KEEP)
    assert (await blocks())[-1][1] == until


async def test_what_a_case_cancels_speaks_against_nobody(shop: Shop) -> None:
    """Released holds are not lost ones; the customer's own cancelling is."""
    engine = shop.engine()

    async def cancelled(who: str, by: str) -> list[str]:
        for n in range(10):
            at = START + timedelta(minutes=n)
            await shop.show(engine, [changed(f"{who}{n}", 1, at, who=who, held=1)])
            await shop.show(engine, [changed(f"{who}{n}", 2, at, who=who, cancelled=1, by=by)])
        found = (await shop.servicer.ListCases(pb.ListCasesRequest(subject=who), Context)).cases
        return [rule.rule_id for case in found for rule in case.rules]

    assert await cancelled("customer:k1:a", "case/case-1") == []
    assert await cancelled("customer:k1:b", "mine") == ["holds-that-come-to-nothing"]


@pytest.mark.parametrize("ahead", [timedelta(days=400), timedelta(seconds=290)], ids=str)
async def test_an_order_of_the_future_is_of_now(shop: Shop, ahead: timedelta) -> None:
    """It would empty every window of its subjects."""
    engine = shop.engine()
    for n in range(20):
        at = START + ahead * (n == 10)
        await shop.show(engine, [changed(f"r{n}", 1, at, who="customer:k1:a", held=1, made=START)])
    ((subject, *_, rules, _, _, _),) = await shop.cases()
    assert subject == "customer:k1:a"
    assert [fired["value"] for fired in json.loads(rules)] == [20]


@pytest.mark.parametrize("of_now", [False, True], ids=["alone", "among others"])
async def test_goods_that_come_back_long_ago_stop_nobody(shop: Shop, of_now: bool) -> None:
    """Of a month of which no change ever was: they are judged one batch later, the others at once."""
    dates = [START - timedelta(days=600), *([START] if of_now else [])]
    async with shop.database.connection() as connection:
        await cases.queue_returned(connection, [(f"r{n}", "A", "MAIN", n, at, 1) for n, at in enumerate(dates)])
    engine = shop.engine()

    async def judged() -> list[datetime]:
        async with shop.database.connection() as connection:
            rows = await connection.fetch("SELECT at FROM desk.signal WHERE returned > 0 ORDER BY seq")
        return [row["at"] for row in rows]

    await shop.show(engine, [changed("first", 1, START, held=1)])
    assert await judged() == dates[1:]
    await shop.show(engine, [changed("second", 1, START, held=1)])
    assert await judged() == [*dates[1:], dates[0]]
    async with shop.database.connection() as connection:
        assert not await connection.fetch("SELECT FROM desk.returned")


async def test_a_first_order_is_first_for_good(shop: Shop) -> None:
    """A judge that was started later, or never saw it, knows a customer by what is kept."""
    usual = [changed(f"u{n}", 1, START, who=f"customer:k1:{n}", held=1, units=n % 3 + 1) for n in range(50)]
    await shop.show(shop.engine(), usual)
    await shop.show(shop.engine(), [changed("old", 1, START, who="customer:k1:7", held=1, units=1_000)])
    await shop.show(shop.engine(), [changed("new", 1, START, who="customer:k1:new", held=1, units=1_000)])
    found = (await shop.servicer.ListCases(pb.ListCasesRequest(), Context)).cases
    fired = {case.subject: {rule.rule_id for rule in case.rules} for case in found}
    assert "first-order-far-above-usual" in fired["customer:k1:new"]
    assert "first-order-far-above-usual" not in fired["customer:k1:7"]


async def test_cases_are_found_by_their_indexes(shop: Shop) -> None:
    """However many were decided: those that grow, and what a subject is blocked and exempt until."""
    async with shop.database.connection() as connection:
        await connection.execute(MANY_CASES)
        await connection.execute("ANALYZE desk.fraud_case")
        for statement, index, *more in (
            (cases.OPEN_CASES, "case_growing"), (cases.EXEMPT, "case_exempt"), (cases.BLOCKED, "case_by_subject", ""),
        ):  # fmt: skip
            await connection.execute("SET plan_cache_mode = force_generic_plan")
            plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {statement}", ["s1", "s2"], *more))
            assert index in plan, plan
            assert "Seq Scan" not in plan


async def test_a_block_is_told_and_priced(shop: Shop) -> None:
    """A network that two rules speak against is blocked; a backtest says what that would have cost and saved."""
    engine = shop.engine()
    events = []
    for n in range(100):
        at = START + timedelta(seconds=n / 4)
        who, network = f"customer:k1:{n % 6}", "network:k1:a"
        events.append(changed(f"r{n}", 1, at, who=who, network=network, held=1))
        ends: dict[str, Any] = {"confirmed": 1} if n == 90 else {"expired": 1}
        events.append(changed(f"r{n}", 2, at, later=timedelta(seconds=90), who=who, network=network, **ends))
    await shop.show(engine, events)
    (block,) = [verdict.block for verdict in await shop.verdicts() if verdict.HasField("block")]
    assert block.subject == "network:k1:a"
    assert block.end_time.seconds - block.start_time.seconds == shop.settings.fraud_block_seconds
    found = (await backtest(shop))[-1].active
    assert (found.blocks, found.refused, found.units_protected) == (1, 20, 19)
    assert (found.sales_blocked, found.units_blocked) == (1, 1)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rule.rule_id", {"rule_id": ""}),
        ("rule.feature", {"feature": pb.FEATURE_UNSPECIFIED}),
        ("rule.by", {"feature": pb.FEATURE_FIRST_ORDER_Z, "by": pb.SUBJECT_KIND_NETWORK}),
        ("rule.threshold", {"threshold": -1}),
        ("rule.threshold", {"threshold": float("nan")}),
        ("rule.score", {"score": 101}),
        ("rule.score", {"effect": pb.EFFECT_LIMIT}),
        ("rule.effect", {"effect": pb.EFFECT_LIMIT, "feature": pb.FEATURE_UNDONE}),
        ("rule.threshold", {"effect": pb.EFFECT_LIMIT, "threshold": 1.5}),
        ("rule.samples_min", {"samples_min": 1}),
        ("rule.comparison", {"comparison": pb.COMPARISON_UNSPECIFIED}),
        ("rule.reason", {"reason": "x" * 201}),
    ],
)
async def test_a_rule_that_makes_no_sense(shop: Shop, field: str, change: dict[str, Any]) -> None:
    """It is refused with the name of what is wrong, by ValidateRule as by CreateRule."""
    rule = hurry(20)
    for name, value in change.items():
        setattr(rule, name, value)
    with pytest.raises(Refusal) as refused:
        await shop.servicer.ValidateRule(pb.ValidateRuleRequest(rule=rule), Context)
    assert (refused.value.reason, refused.value.metadata["field"]) == ("FIELD_INVALID", field)


@pytest.mark.skipif(not REAL_ORDERS.exists(), reason="the real orders are not here")
async def test_the_real_orders(shop: Shop) -> None:
    """The order for 74,215 jars opens a case that names the quantity rule; fewer than one invoice in a hundred does."""
    book = orders.read(REAL_ORDERS)
    engine = shop.engine()
    events: list[bytes] = []
    invoices = 0
    for order in book.orders:
        if not order.takes:
            continue
        assert order.time
        invoices += 1
        demand: Counter[str] = Counter()
        for (sku, _), units in order.takes.items():
            demand[sku] += units
        lines = [rp.ReservationLine(sku=sku, quantity=units) for sku, units in demand.items()]
        total = demand.total()
        of: dict[str, Any] = {"who": f"customer:k1:{order.customer_id}" if order.customer_id else "", "lines": lines}
        events += [changed(order.invoice, 1, order.time, held=total, **of)]
        events += [changed(order.invoice, 2, order.time, later=timedelta(minutes=1), confirmed=total, **of)]
    for start in range(0, len(events), 1_000):
        await shop.show(engine, events[start : start + 1_000])
    found = list((await shop.servicer.ListCases(pb.ListCasesRequest(page_size=1_000), Context)).cases)
    (jars,) = [case for case in found if "541431" in case.reservation_ids]
    assert ("quantity-far-above-usual", "23166") in [(fired.rule_id, fired.sku) for fired in jars.rules]
    involved = {name for case in found for name in case.reservation_ids}
    assert len(found) <= len(involved) < invoices / 100
    for case in sorted(found, key=lambda case: (-case.score, case.open_time.seconds))[:20]:
        fired = ", ".join(f"{one.rule_id} {one.value:g}" for one in case.rules)
        print(case.score, pb.Decision.Name(case.decision), case.subject, case.reservation_ids[0], fired)
    assert sorted(map(comparable, (await backtest(shop))[-1].active.top_cases)) == sorted(map(comparable, found))


async def test_what_cannot_be_judged_stops_nobody(shop: Shop) -> None:
    """What is no event, or what the database cannot keep, is passed over; its neighbours are judged."""
    engine = shop.engine()
    events = [changed(f"r{n}", 1, START, who="customer:k1:a", held=1) for n in range(20)]
    odd = [b"\xff\xff", changed("nul", 1, START, who="customer:k1:b\0", held=1)]
    batch = await shop.show(engine, [*events[:10], *odd, *events[10:]])
    ((subject, *_),) = await shop.cases()
    assert subject == "customer:k1:a"
    assert (await engine.positions([batch.partition]))[batch.partition] == len(events) + len(odd)


async def test_cases_are_listed_by_filter_and_page(shop: Shop) -> None:
    """Each filter alone, and every case once over pages of one."""
    engine = shop.engine()
    for name in "abc":
        await shop.show(engine, [changed(f"{name}{n}", 1, START, who=f"customer:k1:{name}", held=1) for n in range(20)])

    async def listed(**filters: Any) -> list[str]:
        request, found = pb.ListCasesRequest(page_size=1, **filters), []
        while True:
            page = await shop.servicer.ListCases(request, Context)
            found += [case.subject[-1] for case in page.cases]
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    assert await listed() == ["c", "b", "a"]
    assert await listed(rule_id="customer-in-a-hurry", state=pb.CASE_STATE_OPEN) == ["c", "b", "a"]
    assert await listed(subject="customer:k1:b", decision=pb.DECISION_REVIEW, score_min=50) == ["b"]
    for none in ({"rule_id": "probing"}, {"score_min": 51}, {"state": pb.CASE_STATE_KEPT}):
        assert await listed(**none) == []
