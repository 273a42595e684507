"""Events: nothing lost, nothing out of order per key, poison set aside, whatever is killed in between."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from holdfast.inventory.v1 import events_pb2
from holdfast.inventory.v1 import inventory_pb2 as ip

from deploy.local.stack import Stack
from services.inventory import codec
from services.inventory.commands import Commands
from services.inventory.workers import MOVEMENTS, obey
from shared import watermark
from shared.consumer import Batch, Bury, Busy, Consumer, DeadLetterLimitError, Message, Poison, dead_letters, replay
from shared.database import Database, unavailable
from shared.outbox import Event, Relay, producer, write
from shared.topics import Topic
from tests.e2e.shop import new
from tests.integration.goods import hold, put, stock


@pytest.fixture
async def sender(stack: Stack) -> AsyncIterator[AIOKafkaProducer]:
    sender = producer(stack.brokers, "test")
    await sender.start()
    yield sender
    await sender.stop()


async def read(stack: Stack, topic: str, count: int) -> list[Message]:
    """The first `count` messages of a topic."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=stack.kafka_bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    messages: list[Message] = []
    try:
        async with asyncio.timeout(20):
            while len(messages) < count:
                for batch in (await consumer.getmany(timeout_ms=200)).values():
                    messages += batch
    finally:
        await consumer.stop()
    return messages


class Crash(Exception):
    """Where a relay is killed."""


class CrashingRelay(Relay):
    """A relay that dies after Kafka has acknowledged and before it deletes, when told to."""

    crash = False

    async def relay_once(self, groups_max: int = 2000) -> int:
        connection = self._database.connection
        calls = 0

        def guarded() -> object:
            nonlocal calls
            calls += 1
            if self.crash and calls == 2:
                raise Crash
            return connection()

        self._database.connection = guarded  # type: ignore[method-assign, assignment]
        try:
            return await super().relay_once(groups_max)
        finally:
            del self._database.connection


async def test_a_relay_killed_before_it_deletes_loses_and_reorders_nothing(
    stack: Stack, inventory_db: Database, sender: AIOKafkaProducer
) -> None:
    """What was sent twice is a duplicate: applied by version, every key is whole and in order."""
    topic = new("events")
    stack.create_topics(Topic(topic))
    keys = [f"k{n}" for n in range(5)]
    async with inventory_db.connection() as connection, connection.transaction():
        for v in range(1, 41):
            await write(connection, [Event(topic, key, "t", f"{key}:{v}".encode()) for key in keys])
    relay = CrashingRelay(inventory_db, sender)
    for turn in range(4):
        relay.crash = turn % 2 == 0
        try:
            await relay.relay_once(groups_max=14)
        except Crash:
            continue
    relay.crash = False
    other = Relay(inventory_db, sender)
    while sum(await asyncio.gather(relay.relay_once(6), other.relay_once(6))):
        pass
    async with inventory_db.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM outbox") == 0
    messages = await read(stack, topic, 200)
    assert len(messages) > 200
    applied = dict.fromkeys(keys, 0)
    for message in messages:
        key, version = (message.value or b"").decode().split(":")
        assert int(version) <= applied[key] + 1, "a gap"
        applied[key] = max(applied[key], int(version))
    assert applied == dict.fromkeys(keys, 40)
    names = {name for name, _ in messages[0].headers}
    assert {"event_id", "type", "schema_version"} <= names


async def test_no_time_is_told_that_something_under_way_may_still_come_before(inventory_db: Database) -> None:
    """Not while a transaction has written and goes on; who has not written yet holds nothing up."""
    async with inventory_db.connection() as writer, inventory_db.connection() as reader:
        writing, reading = writer.transaction(), reader.transaction()
        await reading.start()
        await reader.fetchval("SELECT count(*) FROM movement")
        await writing.start()
        began = await writer.fetchval("SELECT now()")
        await writer.execute("INSERT INTO location (location, name, priority) VALUES ('MAIN', 'Main', 0)")
        async with inventory_db.connection() as connection:
            assert await watermark.bound(connection) <= began
            await writing.commit()
            assert await watermark.bound(connection) > began
        await reading.commit()


async def test_every_change_is_an_event_in_version_order(
    stack: Stack, commands: Commands, inventory_db: Database, sender: AIOKafkaProducer
) -> None:
    """Expiry too: what Kafka tells of a key is its ledger."""
    sku = new("SKU")
    await put(commands, sku, 5)
    await commands.place([hold(new(), (sku, "MAIN", 5), ttl_seconds=0.001)])
    async with inventory_db.connection() as connection:
        await connection.fetch("SELECT pg_sleep(0.01)")
    assert await commands.sweep() == 1
    assert await commands.sweep() == 0
    stack.create_topics(Topic(codec.MOVEMENTS_TOPIC))
    await Relay(inventory_db, sender, MOVEMENTS).relay_once()
    consumer = AIOKafkaConsumer(
        codec.MOVEMENTS_TOPIC, bootstrap_servers=stack.kafka_bootstrap, auto_offset_reset="earliest"
    )
    await consumer.start()
    seen: list[tuple[int, int, int]] = []
    try:
        async with asyncio.timeout(20):
            while len(seen) < 3:
                message = await consumer.getone()
                if message.key == sku.encode():
                    moved = events_pb2.StockMoved.FromString(message.value or b"").movement
                    seen.append((moved.version, moved.kind, moved.held))
    finally:
        await consumer.stop()
    kinds = (ip.MOVEMENT_KIND_RECEIVE, ip.MOVEMENT_KIND_HOLD, ip.MOVEMENT_KIND_EXPIRE)
    assert seen == [(1, kinds[0], 0), (2, kinds[1], 5), (3, kinds[2], 0)]


def command(source_id: str, sku: str, units: int, source: str = "erp") -> bytes:
    adjustment = ip.StockAdjustment(
        key=ip.StockKey(sku=sku, location="MAIN"), reason=ip.ADJUSTMENT_REASON_RECEIVE, quantity=units
    )
    return events_pb2.StockCommand(source=source, source_id=source_id, adjustment=adjustment).SerializeToString()


async def test_commands_are_obeyed_once_and_poison_is_set_aside(
    stack: Stack, commands: Commands, inventory_db: Database, sender: AIOKafkaProducer
) -> None:
    """A duplicate changes nothing, another source's id is none; poison goes to the dead letters, and is replayed."""
    topic = new("commands")
    stack.create_topics(Topic(topic), Topic(f"{topic}.dlq"))
    await put(commands, "A", 0)
    obeyed = asyncio.Event()

    async def handle(batch: Batch, bury: Bury) -> None:
        await obey(commands, batch, bury)
        if any(message.key == b"last" for message in batch.messages):
            obeyed.set()

    for key, value in (
        (b"A", command("1", "A", 5)),
        (b"A", command("1", "A", 5)),
        (b"A", b"\xffnonsense"),
        (b"B", command("2", "B", 7)),
        (b"A", command("3", "A", 2)),
        (b"A", command("x:1", "A", 1)),
        (b"A", command("1", "A", 1, source="erp:x")),
        (b"last", command("4", "A", 1)),
    ):
        await sender.send_and_wait(topic, value, key=key, partition=0)
    running = asyncio.ensure_future(Consumer(stack.brokers, [topic], new("group"), f"{topic}.dlq", handle).run())
    try:
        await asyncio.wait_for(obeyed.wait(), 20)
        letters = await read(stack, f"{topic}.dlq", 2)
        reasons = [dict(letter.headers)["dlq_reason"].decode().split(":")[0] for letter in letters]
        assert sorted(reasons) == ["FIELD_INVALID", "SKU_NOT_FOUND"]
        assert await stock(inventory_db, "A") == (10, 0)
        assert len(await dead_letters(stack.brokers, f"{topic}.dlq", limit=10)) == 2
        await put(commands, "B", 0)
        assert await replay(stack.brokers, f"{topic}.dlq", limit=10) == 2
        async with asyncio.timeout(20):
            while (await stock(inventory_db, "B"))[0] != 7:
                await asyncio.sleep(0.05)
        assert await replay(stack.brokers, f"{topic}.dlq", limit=1) == 1
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_busy_waits_and_too_many_dead_letters_stop(stack: Stack, sender: AIOKafkaProducer) -> None:
    """Busy tries the same messages again; the limit keeps a topic from draining into its dead letters."""
    topic = new("busy")
    stack.create_topics(Topic(topic), Topic(f"{topic}.dlq"))
    for n in range(5):
        await sender.send_and_wait(topic, json.dumps(n).encode())
    tries = 0

    async def handle(batch: Batch, bury: Bury) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Busy("not yet")
        for message in batch.messages:
            await bury(message, Poison("no good"))

    consumer = Consumer(
        stack.brokers,
        [topic],
        new("group"),
        f"{topic}.dlq",
        handle,
        dlq_messages_max=3,
    )
    with pytest.raises(ExceptionGroup) as stopped:
        await asyncio.wait_for(consumer.run(), 30)
    assert stopped.group_contains(DeadLetterLimitError)
    assert tries >= 3
    assert len(await read(stack, f"{topic}.dlq", 3)) == 3


@pytest.mark.parametrize("trouble", ["away", "slow"])
async def test_nothing_is_handled_before_its_place_is_known(
    stack: Stack, sender: AIOKafkaProducer, trouble: str
) -> None:
    """Where the offsets are not to be had at once: what Kafka gives meanwhile, from the first message on, is left."""
    topic = new("sought")
    stack.create_topics(Topic(topic))
    place = TopicPartition(topic, 0)
    for n in range(10):
        await sender.send_and_wait(topic, json.dumps(n).encode(), partition=0)
    at, asked, ended = 6, 0, asyncio.Event()
    handled: list[tuple[int, int]] = []

    async def positions(places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        nonlocal asked
        asked += 1
        if trouble == "away" and asked < 4:
            raise unavailable()
        if trouble == "slow":
            await asyncio.sleep(2)  # longer than what is fetched meanwhile needs to come
        return {one: at if one == place else 0 for one in places}

    async def handle(batch: Batch, _bury: Bury) -> None:
        nonlocal at
        handled.append((batch.start, batch.messages[0].offset))
        at = batch.end
        if at == 10:
            ended.set()

    running = asyncio.ensure_future(
        Consumer(stack.brokers, [topic], new("group"), f"{topic}.dlq", handle, positions=positions).run()
    )
    try:
        await asyncio.wait_for(ended.wait(), 30)
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert handled == [(6, 6)]
