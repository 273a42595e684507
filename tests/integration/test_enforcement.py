"""Verdicts told over Kafka, and what Reserve makes of them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from google.protobuf.duration_pb2 import Duration
from holdfast.analytics.v1 import events_pb2 as ep
from holdfast.analytics.v1 import fraud_pb2 as fp
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import Stack, free_port
from deploy.local.supervisor import Pod, Supervisor
from services.reservation import codec
from services.reservation.commands import Commands
from services.reservation.domain import Action, Ask, Line, Mode, Reason
from services.reservation.guard import Guard, Verdict
from services.reservation.inventory import Inventory
from services.reservation.subjects import Identity, Kind, Subjects
from services.reservation.verdicts import Follower
from services.reservation.workers import DLQ_TOPIC, release
from shared.channel import open_channel
from shared.client import Holdfast
from shared.consumer import Batch, Bury, Busy, Consumer, dead_letters
from shared.database import Database
from shared.kafka import Brokers
from shared.outbox import producer
from shared.refusal import Refusal
from shared.topics import Topic
from shared.wire import timestamp
from tests.e2e.shop import goods, new, stock

SUBJECTS = Subjects({"k1": bytes(16)})
HOUR = timedelta(hours=1)


class Heard(Guard):
    """A guard that lets a test wait for what it is told."""

    def __init__(self, *, closed: bool = False) -> None:
        super().__init__(SUBJECTS, closed=closed)
        self.heard: asyncio.Queue[Verdict] = asyncio.Queue()

    def apply(self, verdict: Verdict, now: datetime) -> None:
        super().apply(verdict, now)
        self.heard.put_nowait(verdict)


class Judge:
    """What analytics would tell, told by hand, with the keys that the contract names."""

    def __init__(self, sender: AIOKafkaProducer, topic: str) -> None:
        self._sender = sender
        self._topic = topic

    async def says(self, key: str, value: bytes) -> None:
        await self._sender.send_and_wait(self._topic, value, key=key.encode())

    async def beats(self, *limits: ep.Limit, age: timedelta = timedelta()) -> None:
        beat = ep.Heartbeat(complete_time=timestamp(datetime.now(UTC) - age), limits=limits)
        await self.says("heartbeat", ep.Verdict(heartbeat=beat).SerializeToString())

    async def blocks(self, subject: str, lasting: timedelta = HOUR) -> None:
        start = datetime.now(UTC) - timedelta(minutes=1)
        block = ep.Block(
            subject=subject, start_time=timestamp(start), end_time=timestamp(start + lasting), case_id=new("case")
        )
        await self.says(f"block/{subject}", ep.Verdict(block=block).SerializeToString())

    async def lifts(self, subject: str) -> None:
        await self.blocks(subject, timedelta())

    async def counts(self, rule_id: str, subject: str, used: int, leaves: datetime) -> None:
        part = ep.UsagePart(leave_time=timestamp(leaves), used=used)
        usage = ep.Usage(rule_id=rule_id, subject=subject, parts=[part], as_of=timestamp(datetime.now(UTC)))
        await self.says(f"usage/{rule_id}/{subject}/", ep.Verdict(usage=usage).SerializeToString())

    async def releases(self, case_id: str, *names: str) -> None:
        told = ep.Release(case_id=case_id, reservation_ids=names)
        await self.says(f"release/{case_id}", ep.Verdict(release=told).SerializeToString())


def limit(most: int, feature: fp.Feature.ValueType = fp.FEATURE_HOLDS) -> ep.Limit:
    return ep.Limit(
        rule_id="rule", feature=feature, by=fp.SUBJECT_KIND_CUSTOMER, window=Duration(seconds=3600), most=most
    )


def ask(customer: str, sku: str, name: str = "") -> Ask:
    return Ask(name or new(), customer, (Line(sku, "", 1),), Mode.ALL, HOUR, b"same")


def hashed(customer: str) -> str:
    return SUBJECTS.hashes(Identity(Kind.CUSTOMER, customer))[0]


@pytest.fixture
async def sender(stack: Stack) -> AsyncIterator[AIOKafkaProducer]:
    sender = producer(stack.brokers, "test")
    await sender.start()
    yield sender
    await sender.stop()


@pytest.fixture
def judge(stack: Stack, sender: AIOKafkaProducer) -> Judge:
    """On a topic of the test's own."""
    topic = new("verdicts")
    stack.create_topics(Topic(topic, partitions=1, compacted=True, days=8))
    return Judge(sender, topic)


@pytest.fixture
async def at(pods: Supervisor, reservation_db: Database) -> AsyncIterator[Callable[[Guard], Commands]]:
    """Commands with a guard, on a database of the test's, over the real inventory."""
    channel = open_channel(pods.targets["inventory"])
    yield lambda guard: Commands(reservation_db, Inventory(channel), SUBJECTS, guard)
    await channel.close(None)


@asynccontextmanager
async def following(stack: Stack, judge: Judge, guard: Guard, follower: Follower | None = None) -> AsyncIterator[None]:
    """A follower at work, which has read what was told before."""
    follower = follower or Follower(stack.brokers, guard, judge._topic)
    task = asyncio.create_task(follower.run())
    try:
        assert await follower.complete(20)
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def heard(guard: Heard) -> Verdict:
    return await asyncio.wait_for(guard.heard.get(), 20)


async def reasons(commands: Commands, *asked: Ask) -> list[str]:
    """What came of a batch: why each was refused, or "" where it was not."""
    return [outcome.reason if isinstance(outcome, Refusal) else "" for outcome in await commands.reserve(asked)]


async def test_a_block_is_enforced_until_it_is_lifted_and_a_retry_gets_its_first_outcome(
    stack: Stack, judge: Judge, at: Callable[[Guard], Commands], holdfast: Holdfast
) -> None:
    """What was held before the block is told again; new orders are refused and hold nothing."""
    sku, customer, guard = await goods(holdfast, 10), new("customer"), Heard()
    commands = at(guard)
    before = ask(customer, sku)
    async with following(stack, judge, guard):
        assert await reasons(commands, before) == [""]
        await judge.blocks(hashed(customer))
        await heard(guard)
        other = ask(new("customer"), sku)
        assert await reasons(commands, before, ask(customer, sku), other) == ["", Reason.SUBJECT_BLOCKED, ""]
        (again,) = await commands.reserve([before])
        assert not isinstance(again, Refusal)
        assert again[1], "replayed"
        assert (await stock(holdfast, sku, min_version=3)).held == 2
        await judge.lifts(hashed(customer))
        await heard(guard)
        assert await reasons(commands, ask(customer, sku)) == [""]


async def test_limits_count_what_is_told_and_what_was_just_held(
    stack: Stack, judge: Judge, at: Callable[[Guard], Commands], holdfast: Holdfast
) -> None:
    """A burst in one batch, one order after another, and usage; what inventory refused does not count."""
    sku, scarce, guard = await goods(holdfast, 50), await goods(holdfast, 1), Heard()
    ann, bob = new("customer"), new("customer")
    commands = at(guard)
    await judge.beats(limit(3))
    await judge.counts("rule", hashed(bob), 2, datetime.now(UTC) + HOUR)
    async with following(stack, judge, guard):
        assert await reasons(commands, *(ask(ann, scarce) for _ in range(3))) == ["", "", ""]
        outcomes = await reasons(commands, *(ask(ann, sku) for _ in range(30)))
        assert outcomes == [""] * 2 + [Reason.LIMIT_REACHED] * 28
        assert [await reasons(commands, ask(bob, sku)) for _ in range(2)] == [[""], [Reason.LIMIT_REACHED]]
        await judge.beats(limit(4, fp.FEATURE_UNITS_OF_SKU))
        while not guard._limits[0].of_units:
            await heard(guard)
        assert await reasons(commands, ask(ann, sku)) == [""]


async def test_a_closed_service_refuses_while_it_has_heard_nothing_for_too_long(
    stack: Stack, judge: Judge, at: Callable[[Guard], Commands], holdfast: Holdfast
) -> None:
    """Before the first heartbeat, not after one, and again when the last one is old."""
    sku, guard = await goods(holdfast, 10), Heard(closed=True)
    commands, known = at(guard), ask("", sku)
    async with following(stack, judge, guard):
        assert await reasons(commands, ask("", sku)) == [Reason.ENFORCEMENT_STALE]
        await judge.beats()
        await heard(guard)
        assert await reasons(commands, known) == [""]
        await judge.beats(age=timedelta(seconds=31))
        await heard(guard)
        assert await reasons(commands, ask("", sku), known) == [Reason.ENFORCEMENT_STALE, ""]


async def test_a_follower_skips_poison_and_goes_on_where_it_stopped(stack: Stack, judge: Judge) -> None:
    """What is unreadable harms nothing; run again, nothing is read twice."""
    guard = Heard()
    follower = Follower(stack.brokers, guard, judge._topic)
    await judge.says("block/x", b"\xffnonsense")
    await judge.says("heartbeat", ep.Verdict(heartbeat=ep.Heartbeat(limits=[ep.Limit()])).SerializeToString())
    await judge.releases("case")
    await judge.blocks("customer:k1:first")
    async with following(stack, judge, guard, follower):
        assert list(guard._blocks) == ["customer:k1:first"]
    await judge.blocks("customer:k1:second")
    async with following(stack, judge, guard, follower):
        told = [await heard(guard), await heard(guard)]
    assert [getattr(one, "subject", "") for one in told] == ["customer:k1:first", "customer:k1:second"]
    assert guard.heard.empty()


async def test_with_kafka_away_what_is_known_goes_on(
    stack: Stack, judge: Judge, at: Callable[[Guard], Commands], holdfast: Holdfast
) -> None:
    """Blocks hold meanwhile; afterwards the next verdict arrives."""
    sku, customer, guard = await goods(holdfast, 10), new("customer"), Heard()
    commands = at(guard)
    await judge.blocks(hashed(customer))
    async with following(stack, judge, guard):
        assert await heard(guard)
        os.kill(stack.pids["Kafka"], signal.SIGSTOP)
        try:
            lifted = asyncio.create_task(judge.lifts(hashed(customer)))
            assert await reasons(commands, ask(customer, sku), ask("", sku)) == [Reason.SUBJECT_BLOCKED, ""]
        finally:
            os.kill(stack.pids["Kafka"], signal.SIGCONT)
        await lifted
        await heard(guard)
        assert await reasons(commands, ask(customer, sku)) == [""]


async def test_a_pod_serves_without_kafka() -> None:
    """A follower that finds no broker raises, to be started again; who waits for it gives up in time."""
    follower = Follower(Brokers(f"127.0.0.1:{free_port()}"), Heard())
    with pytest.raises(KafkaError):
        await follower.run()
    assert not await follower.complete(0.01)


async def test_a_decided_case_cancels_what_is_held(
    stack: Stack, judge: Judge, at: Callable[[Guard], Commands], holdfast: Holdfast
) -> None:
    """Whole, once; what is gone already is no error; Busy waits; what can never be is set aside."""
    sku, case, dlq = await goods(holdfast, 10), new("case"), new(DLQ_TOPIC)
    stack.create_topics(Topic(dlq, partitions=1))
    commands = at(Heard())
    held, sold = ask("", sku), ask("", sku)
    assert await reasons(commands, held, sold) == ["", ""]
    confirm = rp.ConfirmRequest(reservation_id=sold.reservation_id, request_id="paid")
    await commands.change([codec.change(confirm, Action.CONFIRM)])
    done, turns = asyncio.Event(), 0

    async def handle(batch: Batch, bury: Bury) -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            raise Busy("not yet")
        await release(commands, batch, bury)
        if any(message.key == b"release/last" for message in batch.messages):
            done.set()

    await judge.beats()
    await judge.says("release/bad", b"\xffnonsense")
    await judge.releases("a b", held.reservation_id)
    for _ in range(2):
        await judge.releases(case, held.reservation_id, sold.reservation_id, "nowhere")
    await judge.releases("last")
    consumer = Consumer(stack.brokers, [judge._topic], new("group"), dlq, handle)
    task = asyncio.create_task(consumer.run())
    try:
        await asyncio.wait_for(done.wait(), 30)
    finally:
        task.cancel()
        await asyncio.wait([task])
    (outcome,) = await commands.reserve([held])
    assert not isinstance(outcome, Refusal)
    assert outcome[0].state == rp.RESERVATION_STATE_CANCELLED
    letters = await dead_letters(stack.brokers, dlq, limit=10)
    assert [dict(letter.headers)["dlq_reason"] for letter in letters] == [
        b"not a Verdict",
        b"a Release whose request_id must be 1 to 64 characters of A-Z a-z 0-9 . _ : / -",
    ]


async def refusal_by(pod: Pod, call: Callable[[Holdfast], Awaitable[object]], pods: Supervisor) -> Refusal:
    """Call one pod until it refuses."""
    async with Holdfast(pods.targets["inventory"], f"ipv4:{pod.address}") as direct, asyncio.timeout(20):
        while True:
            try:
                await call(direct)
            except Refusal as refusal:
                return refusal


async def test_pods_refuse_a_blocked_device_and_release_what_a_case_says(
    pods: Supervisor, sender: AIOKafkaProducer, holdfast: Holdfast
) -> None:
    """Through every call and both pods, by the contract's code and reason, without naming anyone."""
    judge = Judge(sender, codec.VERDICTS_TOPIC)
    sku, device, held = await goods(holdfast, 100), new("device"), new()
    await holdfast.reserve(held, [(sku, "", 1)], device_id=device)
    (named,) = await holdfast.resolve(devices=[device])
    await judge.blocks(named.subject)

    def request() -> rp.ReserveRequest:
        return rp.ReserveRequest(
            reservation_id=new(), device_id=device, lines=[rp.ReservationLine(sku=sku, quantity=1)]
        )

    refusals = [
        await refusal_by(pod, lambda direct: direct._call(direct.reservation.Reserve(request())), pods)
        for pod in pods.pods
        if pod.service.name == "reservation"
    ]
    assert {refusal.reason for refusal in refusals} == {Reason.SUBJECT_BLOCKED}
    assert all(set(refusal.metadata) == {"subject_kind", "retry_time"} for refusal in refusals)
    assert not any(named.subject in refusal.message for refusal in refusals)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await holdfast.reservation.Reserve(request())
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    batch = await holdfast.reservation.BatchReserve(rp.BatchReserveRequest(requests=[request(), request()]))
    stream = holdfast.reservation.ReserveStream(rp.ReserveStreamRequest(request=request()) for _ in range(2))
    results = [*batch.results, *[answer.result async for answer in stream]]
    assert [result.error.code for result in results] == [grpc.StatusCode.PERMISSION_DENIED.value[0]] * 4
    again = await holdfast.reserve(held, [(sku, "", 1)], device_id=device)
    assert again.replayed

    await judge.releases(new("case"), held)
    async with asyncio.timeout(20):
        while (await holdfast.get(held)).state != rp.RESERVATION_STATE_CANCELLED:
            await asyncio.sleep(0.05)
    await judge.lifts(named.subject)
