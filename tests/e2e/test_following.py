"""Analytics follows through crashes, duplicates, gaps, poison and a broker that goes away."""

import asyncio
import os
import random
import signal
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from google.protobuf.timestamp_pb2 import Timestamp
from holdfast.analytics.v1 import analytics_pb2 as ap
from holdfast.inventory.v1 import events_pb2
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.analysis import caught_up
from deploy.local.stack import Stack
from deploy.local.supervisor import Supervisor
from services.analytics.codec import MOVEMENTS_TOPIC
from services.analytics.workers import DLQ_TOPIC
from shared.client import Holdfast
from shared.consumer import dead_letters
from shared.outbox import producer
from tests.e2e.shop import goods, new, view

INSTANTS = 200


@pytest.fixture
async def sender(stack: Stack) -> AsyncIterator[AIOKafkaProducer]:
    made = producer(stack.brokers, "test")
    await made.start()
    yield made
    await made.stop()


async def send(sender: AIOKafkaProducer, sku: str, value: bytes) -> None:
    """Put a message where the relay would put those of a SKU."""
    partition = zlib.crc32(sku.encode()) % len(await sender.partitions_for(MOVEMENTS_TOPIC))
    await sender.send_and_wait(MOVEMENTS_TOPIC, value, key=sku.encode(), partition=partition)


def received(sku: str, version: int) -> bytes:
    """The event of a receipt of one unit, the first, second, ... of its SKU."""
    now = Timestamp()
    now.GetCurrentTime()
    movement = ip.Movement(
        sku=sku, location="MAIN", version=version, kind=ip.MOVEMENT_KIND_RECEIVE, on_hand_delta=1, on_hand=version,
        time=now,
    )  # fmt: skip
    return events_pb2.StockMoved(movement=movement).SerializeToString()


async def stopped_keys(holdfast: Holdfast) -> int:
    return (await holdfast.freshness()).freshness.keys_stopped


async def trade(holdfast: Holdfast, skus: list[str], orders: int) -> None:
    """Reservations of which some are confirmed, some cancelled and some left, sixteen at a time."""
    dice = random.Random(orders)
    room = asyncio.Semaphore(16)

    async def order() -> None:
        async with room:
            name = new("order")
            answer = await holdfast.reserve(name, [(dice.choice(skus), "MAIN", dice.randint(1, 3))])
            if answer.outcome == rp.RESERVE_OUTCOME_HELD:
                end = dice.random()
                if end < 0.6:
                    await holdfast.confirm(name, "paid")
                elif end < 0.8:
                    await holdfast.cancel(name, "gone")

    await asyncio.gather(*(order() for _ in range(orders)))


async def assert_the_mart_equals_the_ledger(stack: Stack, skus: list[str]) -> None:
    """Counters and versions, key by key; and every movement once."""
    inventory = await asyncpg.connect(stack.postgres_dsn("inventory"))
    analytics = await asyncpg.connect(stack.postgres_dsn("analytics"))
    try:
        counters = "SELECT sku, location, on_hand, held, version FROM {} WHERE sku = ANY ($1) ORDER BY 1, 2"
        stock = await inventory.fetch(counters.format("stock"), skus)
        mart = await analytics.fetch(counters.format("stock_view"), skus)
        ledger = (
            "SELECT sku, version, kind, on_hand, held, hold_id, recorded_at FROM movement"
            " WHERE sku = ANY ($1) ORDER BY 1, 2"
        )
        assert [tuple(row) for row in mart] == [tuple(row) for row in stock]
        assert await analytics.fetch(ledger, skus) == await inventory.fetch(ledger, skus)
        assert await analytics.fetchval("SELECT coalesce(sum(units), 0) FROM sale WHERE sku = ANY ($1)", skus) == -(
            await inventory.fetchval(
                "SELECT sum(on_hand_delta) FROM movement WHERE kind = 'COMMIT' AND sku = ANY ($1)", skus
            )
        )
    finally:
        await inventory.close()
        await analytics.close()


async def test_killed_pods_neither_lose_nor_double(holdfast: Holdfast, pods: Supervisor, stack: Stack) -> None:
    """Under load each pod of analytics is killed and started again: partitions move, and nothing else does."""
    dice = random.Random(4)
    skus = [await goods(holdfast, 10_000) for _ in range(8)]
    trading = asyncio.ensure_future(trade(holdfast, skus, 1_200))
    for name in ("analytics-0", "analytics-1", "analytics-0"):
        await asyncio.sleep(dice.uniform(0.1, 0.5))
        await asyncio.to_thread(pods.kill, pods.pod(name))
        await asyncio.to_thread(pods.restart, pods.pod(name))
    await trading
    await caught_up(holdfast)
    await assert_the_mart_equals_the_ledger(stack, skus)


async def test_a_broker_that_is_away_is_waited_for(holdfast: Holdfast, stack: Stack) -> None:
    """While Kafka does not answer, holds go on and events wait; afterwards they arrive, each once."""
    skus = [await goods(holdfast, 1_000) for _ in range(4)]
    await caught_up(holdfast)
    os.kill(stack.pids["Kafka"], signal.SIGSTOP)
    try:
        await trade(holdfast, skus, 200)
    finally:
        os.kill(stack.pids["Kafka"], signal.SIGCONT)
    await caught_up(holdfast)
    await assert_the_mart_equals_the_ledger(stack, skus)


async def test_a_repeat_changes_nothing_and_a_gap_heals(holdfast: Holdfast, sender: AIOKafkaProducer) -> None:
    """Versions 1, 1, 2, 4, 2: the key stands at 2 and is reported; when 3 comes late, it goes on to 4."""
    sku = new("GAP")
    for version in (1, 1, 2, 4, 2):
        await send(sender, sku, received(sku, version))
    row = await view(holdfast, sku, 2)
    async with asyncio.timeout(20):
        while not await stopped_keys(holdfast):
            await asyncio.sleep(0.05)
    row = await view(holdfast, sku)
    assert (row.version, row.on_hand) == (2, 2)
    await send(sender, sku, received(sku, 3))
    row = await view(holdfast, sku, 4)
    assert row.on_hand == 4
    async with asyncio.timeout(20):
        while await stopped_keys(holdfast):
            await asyncio.sleep(0.05)
    await send(sender, sku, received(sku, 5))
    assert (await view(holdfast, sku, 5)).on_hand == 5


async def test_poison_is_set_aside_and_the_partition_goes_on(
    holdfast: Holdfast, sender: AIOKafkaProducer, stack: Stack
) -> None:
    """What cannot be read goes to the dead letters with its reason; what comes after it is applied."""
    sku = new("POISON")
    await send(sender, sku, b"\xffnonsense")
    await send(sender, sku, events_pb2.StockMoved().SerializeToString())
    await send(sender, sku, received(sku, 1))
    assert (await view(holdfast, sku, 1)).on_hand == 1
    letters = [
        letter for letter in await dead_letters(stack.brokers, DLQ_TOPIC, limit=100) if letter.key == sku.encode()
    ]
    reasons = [dict(letter.headers)["dlq_reason"].decode() for letter in letters]
    assert reasons == ["not a StockMoved", "a StockMoved without kind, key, version or time"]


async def test_stock_at_any_instant_is_the_ledger_replayed_to_it(holdfast: Holdfast, stack: Stack) -> None:
    """200 random instants, open holds included, against inventory's own ledger."""
    skus = [await goods(holdfast, 500) for _ in range(5)]
    began = datetime.now(UTC)
    await trade(holdfast, skus, 300)
    ended = datetime.now(UTC)
    inventory = await asyncpg.connect(stack.postgres_dsn("inventory"))
    ledger = await inventory.fetch("SELECT * FROM movement WHERE sku = ANY ($1) ORDER BY sku, version", skus)
    await inventory.close()
    dice = random.Random(7)
    for _ in range(INSTANTS):
        instant = began + dice.random() * (ended - began + timedelta(seconds=0.2))
        balance: dict[str, tuple[int, int, int]] = {}
        for row in ledger:
            if row["recorded_at"] <= instant:
                on_hand, held, _ = balance.get(row["sku"], (0, 0, 0))
                balance[row["sku"]] = (on_hand + row["on_hand_delta"], held + row["held_delta"], row["version"])
        stamp = Timestamp()
        stamp.FromDatetime(instant)
        answer = await holdfast._call(holdfast.analytics.GetStockAt(ap.GetStockAtRequest(time=stamp, skus=skus)))
        assert {stock.sku: (stock.on_hand, stock.held, stock.version) for stock in answer.stocks} == balance
