"""What analytics costs: events applied a second, reports on a long history, a past instant on one long and short."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from holdfast.analytics.v1 import analytics_pb2 as pb

from services.analytics import history, reports, rules
from services.analytics.backtest import Trial, backtest
from services.analytics.fraud import policy
from services.analytics.projection import Projection
from services.analytics.reports import Range, Report
from services.analytics.settings import Settings
from shared import partitions
from shared.consumer import Batch, Message, Poison
from shared.database import Database

BATCH_MESSAGES_MAX = 20_000
MONTHS, SKUS, DAYS = 6, 1_000, 180
END = datetime(2026, 7, 1, tzinfo=UTC)
START = datetime(2026, 1, 1, tzinfo=UTC)
INSTANTS, SKUS_ASKED = 200, 20

# Movements of SKUs in turn, evenly over half a year; every third a sale.
LOAD_MOVEMENTS = """
INSERT INTO movement (sku, location, version, recorded_at, kind, on_hand_delta, held_delta, on_hand, held, short,
                      available, available_before, hold_id, request_id, reference)
SELECT 'S' || n % $2, 'MAIN', n / $2 + 1, $3::timestamptz + n * ($4::timestamptz - $3) / $1::int,
       (ARRAY['RECEIVE', 'HOLD', 'COMMIT'])[n % 3 + 1], 0, 0, 100, 0, 0, 100, 100, '', '', ''
FROM generate_series(0, $1::int - 1) AS n
"""
LOAD_VIEW = """
INSERT INTO stock_view
SELECT 'S' || n, 'MAIN', 'Goods ' || n, 'category/' || n % 20, 100, 0, 0, 0, 0, 100, n % 7, n % 40, n % 150, 0, 0,
       n % 3, $2, $3, 1000 FROM generate_series(0, $1::int - 1) AS n
"""
LOAD_SKUS = "INSERT INTO sku SELECT sku, name, category, 'piece', 'GBP', 1000000, true, 1 FROM stock_view"
LOAD_SALES = """
INSERT INTO sale
SELECT 'S' || (n::bigint * 7919) % $2, $3::timestamptz + n * ($4::timestamptz - $3) / $1::int, 'r' || n / 3, 2, 'MAIN',
        'GBP', 'c' || (n / 3 * 31) % 20000, 'country ' || n % 30, n % 5 + 1, (n % 5 + 1) * 1250000, now()
FROM generate_series(0, $1::int - 1) AS n
"""
LOAD_RESERVATIONS = """
INSERT INTO reservation SELECT 'r' || n, $2::timestamptz + n * ($3::timestamptz - $2) / $1::int, 'c' || n % 20000,
       'country ' || n % 30, (ARRAY['CONFIRMED', 'CONFIRMED', 'CANCELLED', 'EXPIRED', 'REJECTED'])[n % 5 + 1], 2,
       now(), now(), now() + n % 100 * interval '1 s', '{}', '{}', '{}'
FROM generate_series(0, $1::int - 1) AS n
"""
LOAD_RETURNS = """
INSERT INTO goods_return SELECT 'S' || n % $2, 'MAIN', n, $3::timestamptz + n * ($4::timestamptz - $3) / $1::int, 1
FROM generate_series(0, $1::int - 1) AS n
"""
LOAD_STOCK_OUTS = """
INSERT INTO stock_out SELECT 'S' || n % $2, 'MAIN', n, $3::timestamptz + n * ($4::timestamptz - $3) / $1::int,
       $3::timestamptz + (n + 50) * ($4::timestamptz - $3) / $1::int
FROM generate_series(0, $1::int - 1) AS n
"""


async def load(dsn: str, movements: int) -> None:
    """Half a year of history in a migrated database: a third of the movements are sales, of three lines an order."""
    connection = await asyncpg.connect(dsn, command_timeout=600)
    try:
        if await connection.fetchval("SELECT EXISTS (SELECT 1 FROM movement)"):
            return
        for table in ("movement", "sale", "reservation", "goods_return", "refusal"):
            for ahead in range(MONTHS):
                await partitions.make(connection, table, partitions.following(START, ahead))
        await connection.execute(LOAD_MOVEMENTS, movements, SKUS, START, END)
        await connection.execute(LOAD_VIEW, SKUS, START, END)
        await connection.execute(LOAD_SKUS)
        await connection.execute(LOAD_SALES, movements // 3, SKUS, START, END)
        await connection.execute(LOAD_RESERVATIONS, movements // 9, START, END)
        await connection.execute(LOAD_RETURNS, movements // 100, SKUS, START, END)
        await connection.execute(LOAD_STOCK_OUTS, movements // 1_000, SKUS, START, END)
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


async def report_ms(dsn: str) -> dict[str, float]:
    """How long a page of 100 of each report takes, over a month or, where it tells a pace, over three."""
    month = Range(datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC), "Europe/London")
    quarter = Range(END - timedelta(days=90), END, "Europe/London")
    by_country = pb.ReportSalesRequest(period=pb.PERIOD_DAY, dimensions=[pb.SALES_DIMENSION_COUNTRY], rollup=True)
    asked: dict[str, Report] = {
        "stock_view": reports.stock_view(pb.ListStockViewRequest(order=pb.STOCK_ORDER_DAYS_OF_COVER), END),
        "sales": reports.sales(by_country, month),
        "top_skus": reports.top_skus(pb.ReportTopSkusRequest(), month),
        "stock_outs": reports.stock_outs(pb.ReportStockOutsRequest(), month),
        "funnel": reports.funnel(pb.ReportFunnelRequest(period=pb.PERIOD_DAY), month),
        "cover": reports.cover(pb.ReportCoverRequest(), quarter),
        "customers": reports.customers(pb.ReportCustomersRequest(), month),
        "returns": reports.returns(pb.ReportReturnsRequest(), month),
    }
    database = await Database.connect(dsn, name="bench", timeout_seconds=120, planner={"jit": "off"})
    took = {}
    try:
        async with database.connection() as connection:
            for name, report in asked.items():
                began = time.perf_counter()
                await report.page(connection, None, 100)
                took[name] = round((time.perf_counter() - began) * 1000, 1)
    finally:
        await database.close()
    return took


async def stock_at_seconds(dsn: str) -> float:
    """The median time of asking for some SKUs at a random instant, warm: each was asked once before."""
    dice = random.Random(1)
    asked = [
        ([f"S{dice.randrange(SKUS)}" for _ in range(SKUS_ASKED)], START + dice.random() * (END - START))
        for _ in range(INSTANTS)
    ]
    database = await Database.connect(dsn, name="bench", planner={"jit": "off"})
    took: list[float] = []
    try:
        async with database.connection() as connection:
            for skus, instant in asked * 2:
                began = time.perf_counter()
                await history.stock_at(connection, skus, instant)
                took.append(time.perf_counter() - began)
    finally:
        await database.close()
    return statistics.median(took[INSTANTS:])


async def events_per_second(dsn: str, bootstrap: str, topics: Sequence[str], seconds: float) -> float:
    """Events that one consumer applies a second, from the beginning of topics, for some seconds or to their end."""
    database = await Database.connect(dsn, name="bench follow")
    consumer = AIOKafkaConsumer(*topics, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    projection = Projection(database)
    at: dict[TopicPartition, int] = {}

    async def apply(place: TopicPartition, messages: list[Message]) -> None:
        batch = Batch(place, at[place], messages)
        await projection.apply(batch, never)
        at[place] = batch.end

    async def never(_message: Message, poison: Poison) -> None:
        raise poison

    await consumer.start()
    try:
        at.update(await projection.positions(sorted(consumer.assignment())))
        events, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            batches = await consumer.getmany(timeout_ms=1_000, max_records=BATCH_MESSAGES_MAX)
            if not batches:
                break
            async with asyncio.TaskGroup() as group:
                for place, messages in batches.items():
                    group.create_task(apply(place, messages))
            events += sum(map(len, batches.values()))
        return events / (time.perf_counter() - began)
    finally:
        await consumer.stop()
        await database.close()


async def backtested(dsn: str) -> float:
    """Events a second that the default rules are backtested on: those that were judged so far."""
    database = await Database.connect(dsn, name="bench", timeout_seconds=120)
    active = [rules.rule(message) for message, state in rules.defaults() if state == "ACTIVE"]
    trial = Trial(active, policy(Settings(database_dsn=dsn)), 0)
    until = datetime.now(UTC) + timedelta(hours=1)
    try:
        began = time.perf_counter()
        events = [done async for done, _ in backtest(database, [trial], START, until)][-1]
        return events / (time.perf_counter() - began)
    finally:
        await database.close()
