"""What analytics does as time goes by: sums that age, snapshots at the turn of a month, months that are dropped."""

import asyncio
import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from services.analytics import history, projection, store, workers
from services.analytics.domain import Movement
from shared import partitions
from shared.database import Connection, Database
from shared.refusal import Refusal
from tests.integration.ledger import movements

SKUS = [f"S{n}" for n in range(6)]
ON_CLUSTER = bool(os.environ.get("CITUS_DSN"))
WINDOWS = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30)}


async def write(database: Database, ledger: Sequence[Movement]) -> None:
    for start in {partitions.month(movement.recorded_at) for movement in ledger}:
        async with database.connection() as connection:
            await partitions.make(connection, "movement", start)
            await partitions.make(connection, "goods_return", start)
    await database.run(lambda connection: projection.write_movements(connection, 0, ledger))


@pytest.mark.parametrize("seed", range(5))
async def test_sums_are_those_of_their_windows_whenever_they_are_aged(analytics_db: Database, seed: int) -> None:
    """Written in parts, aged in between: sold and returned of each window are what counting them all gives."""
    dice = random.Random(seed)
    now = datetime.now(UTC)
    hour = now.replace(minute=0, second=0, microsecond=0)
    ledger = movements(dice, SKUS, [now - dice.random() * timedelta(days=33) for _ in range(600)])
    async with analytics_db.connection() as connection:
        await connection.execute("UPDATE aging SET aged_to = $1", hour - timedelta(hours=dice.randint(1, 900)))
    cuts = sorted(dice.sample(range(len(ledger)), 4))
    for start, end in zip([0, *cuts], [*cuts, len(ledger)], strict=True):
        await write(analytics_db, ledger[start:end])
        if dice.random() < 0.5:
            await analytics_db.run(store.age)
    await analytics_db.run(store.age)
    async with analytics_db.connection() as connection:
        hour = await connection.fetchval("SELECT aged_to FROM aging")  # the next one, if it began meanwhile
        rows = {row["sku"]: row for row in await connection.fetch("SELECT * FROM stock_view")}
    for sku, row in rows.items():
        for window, length in WINDOWS.items():
            inside = [
                m for m in ledger
                if m.sku == sku and m.recorded_at.replace(minute=0, second=0, microsecond=0) >= hour - length
            ]  # fmt: skip
            assert row[f"sold_{window}"] == -sum(m.on_hand_delta for m in inside if m.kind == "COMMIT")
            assert row[f"returned_{window}"] == sum(m.on_hand_delta for m in inside if m.kind == "RETURN")


@pytest.mark.skipif(ON_CLUSTER, reason="each shard has an order of its own")
async def test_sums_are_aged_in_the_order_of_their_keys(analytics_db: Database) -> None:
    """However many there are: who follows events locks rows of the mart in this order as well."""
    fill = """
    INSERT INTO {} SELECT 'S' || n % 5000, 'L' || n / 5000, {} FROM generate_series(1, 20000) AS n
    """
    async with analytics_db.connection() as connection, connection.transaction():
        await connection.execute(fill.format("activity", "date_trunc('hour', now()) - interval '24 hours', 1, 0"))
        await connection.execute(
            fill.format("stock_view", "'', '', 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, now(), now(), 1")
        )
        await connection.execute("ANALYZE activity, stock_view")
        hour, age = timedelta(hours=1), store.AGE.format(window="24h") + " RETURNING view.sku, view.location"
        now = await connection.fetchval("SELECT date_trunc('hour', now())")
        aged = await connection.fetch(age, now, now + hour, WINDOWS["24h"])
    keys = [(row["sku"], row["location"]) for row in aged]
    assert len(keys) == 20_000
    assert keys == sorted(keys)


async def test_what_no_window_counts_is_not_written_by_the_hour(analytics_db: Database) -> None:
    """A history that is read anew leaves none of it, and the sums are those of what is younger."""
    now = datetime.now(UTC)
    times = [now - timedelta(days=40, minutes=n) for n in range(100)] + [now - timedelta(days=2)] * 50
    ledger = movements(random.Random(7), SKUS, times)
    await write(analytics_db, ledger)
    async with analytics_db.connection() as connection:
        oldest, sold = await connection.fetchrow("SELECT min(hour), sum(sold) FROM activity") or (now, 0)
        sums = await connection.fetchrow("SELECT sum(sold_24h), sum(sold_7d), sum(sold_30d) FROM stock_view")
    assert oldest > now - timedelta(days=3)
    assert sold == -sum(m.on_hand_delta for m in ledger[100:] if m.kind == "COMMIT")
    assert tuple(sums or ()) == (0, sold, sold)


async def test_old_hours_are_forgotten_one_by_one_and_nobody_waits(analytics_db: Database) -> None:
    """Aging deletes none; forgetting takes an hour of each, and events are written meanwhile."""
    fill = "INSERT INTO activity SELECT 'S' || n % 7, 'L' || n, $1::timestamptz, 1, 0 FROM generate_series(1, $2) AS n"
    async with analytics_db.connection() as connection:
        aged_to = await connection.fetchval("UPDATE aging SET aged_to = aged_to - interval '1 hour' RETURNING aged_to")
        for days, hours, count in ((50, 0, 30), (40, 0, 20), (40, -1, 10), (31, -2, 5), (30, 0, 3)):
            await connection.execute(fill, aged_to - timedelta(days=days, hours=hours), count)
        await connection.execute("INSERT INTO lag VALUES (now() - interval '2 days', 't', 0, 0, 1)")
    assert await analytics_db.run(store.age)

    async def forgotten(connection: Connection) -> int:
        count = await store.forget(connection)
        async with analytics_db.connection() as other, other.transaction():
            await other.execute("SET LOCAL lock_timeout = '1s'")
            assert await other.fetchval(store.SHARE_AGING)
        return count

    assert [await analytics_db.run(forgotten) for _ in range(4)] == [31, 20, 10, 0]
    async with analytics_db.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM activity") == 8


async def test_a_table_in_use_gets_its_month_later(analytics_db: Database) -> None:
    """While a backup reads it: nobody waits long behind a missing month, and one that is there waits for none."""
    table, missing = "goods_return", datetime(2031, 1, 1, tzinfo=UTC)
    blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'goods_return'::regclass"
    async with analytics_db.connection() as reader, analytics_db.connection() as other, asyncio.timeout(10):
        await partitions.make(other, table, partitions.month(datetime.now(UTC)))
        async with reader.transaction():
            await reader.fetch(f"SELECT FROM {table}")

            async def make() -> None:
                async with analytics_db.connection() as connection:
                    await partitions.make(connection, table, missing)

            making = asyncio.create_task(make())
            while not await other.fetchval(blocked):
                await asyncio.sleep(0.01)
            await other.execute(f"INSERT INTO {table} VALUES ('A', 'MAIN', 1, now(), 1)")
            with pytest.raises(partitions.IN_USE):
                await making
            await partitions.make(other, table, partitions.month(datetime.now(UTC)))
        await partitions.make(other, table, missing)
        await other.execute(f"DROP TABLE {table}_2031_01")


async def test_stock_at_an_instant_survives_snapshots_and_dropped_months(analytics_db: Database) -> None:
    """The same answer from the whole ledger, with snapshots, and with old months gone; before them, a clear no."""
    dice = random.Random(3)
    begin, end = datetime(2026, 1, 10, tzinfo=UTC), datetime(2026, 8, 20, tzinfo=UTC)
    ledger = movements(dice, SKUS, [begin + dice.random() * (end - begin) for _ in range(400)])
    dormant = movements(dice, ["DORMANT"], [begin])
    await write(analytics_db, [*dormant, *ledger])
    instants = [begin + dice.random() * (end - begin) for _ in range(50)]

    async def asked(times: Sequence[datetime]) -> list[list[tuple[object, ...]]]:
        async with analytics_db.connection() as connection:
            found = [await history.stock_at(connection, [*SKUS, "DORMANT"], time) for time in times]
        return [[tuple(row) for row in rows] for rows in found]

    whole = await asked(instants)
    assert all(("DORMANT", "MAIN", dormant[0].on_hand, 0, dormant[0].on_hand, 1) in rows for rows in whole)
    taken = await analytics_db.run(lambda connection: store.take_snapshots(connection, end))
    assert taken == [datetime(2026, month, 1, tzinfo=UTC) for month in range(2, 9)]
    assert not await analytics_db.run(lambda connection: store.take_snapshots(connection, end))
    assert await asked(instants) == whole

    oldest = datetime(2026, 5, 15, tzinfo=UTC)
    async with analytics_db.connection() as connection:
        dropped = await store.drop_old(connection, oldest)
    assert dropped == [f"movement_2026_0{month}" for month in range(1, 5)]
    kept = [n for n, time in enumerate(instants) if time >= datetime(2026, 5, 1, tzinfo=UTC)]
    assert await asked([instants[n] for n in kept]) == [whole[n] for n in kept]
    with pytest.raises(Refusal) as refused:
        await asked([datetime(2026, 4, 30, tzinfo=UTC)])
    assert refused.value.reason == "HISTORY_NOT_KEPT"


@pytest.mark.skipif(ON_CLUSTER, reason="its nodes lock rows where this cannot see it")
async def test_a_month_is_dropped_while_nobody_has_its_table(analytics_db: Database) -> None:
    """Not while a backup reads it; and others go on while the snapshots before its end are forgotten."""
    begin, end = datetime(2026, 1, 10, tzinfo=UTC), datetime(2026, 4, 20, tzinfo=UTC)
    await write(analytics_db, movements(random.Random(4), SKUS, [begin, begin + timedelta(days=30), end]))
    await analytics_db.run(lambda connection: store.take_snapshots(connection, end))
    async with analytics_db.connection() as other, analytics_db.connection() as watcher, asyncio.timeout(10):

        async def drop() -> list[str]:
            async with analytics_db.connection() as connection:
                return await store.drop_old(connection, datetime(2026, 3, 1, tzinfo=UTC))

        async with other.transaction():
            await other.fetch("SELECT FROM movement")
            with pytest.raises(partitions.IN_USE):
                await drop()
        async with other.transaction():
            assert await other.fetch("SELECT FROM snapshot WHERE taken_at = '2026-02-01' FOR UPDATE")
            dropping = asyncio.create_task(drop())
            while not await watcher.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            assert await watcher.fetchval("SELECT to_regclass('movement_2026_02') IS NULL")
            assert await watcher.fetchval("SELECT count(*) FROM movement") == 1
        assert await dropping == ["movement_2026_01", "movement_2026_02"]
        assert await watcher.fetchval("SELECT min(taken_at) FROM snapshot") == datetime(2026, 3, 1, tzinfo=UTC)


async def test_a_mart_that_differs_from_the_ledger_is_told(analytics_db: Database) -> None:
    """By how many units, in whatever pages it is looked at; a mart that agrees drifts by nothing."""
    now = datetime.now(UTC)
    await write(analytics_db, movements(random.Random(5), SKUS, [now - timedelta(hours=n) for n in range(100)]))
    assert await workers.reconcile(analytics_db, keys_max=4) == (len(SKUS), 0)
    async with analytics_db.connection() as connection:
        await connection.execute("UPDATE stock_view SET on_hand = on_hand + 3 WHERE sku = 'S1'")
        await connection.execute("UPDATE stock_view SET version = version - 1 WHERE sku = 'S4'")
    assert await workers.reconcile(analytics_db, keys_max=2) == (len(SKUS), 4)
    async with analytics_db.connection() as connection:
        assert (await history.lag(connection)).drift_units == 4


async def test_the_last_movement_is_that_of_the_highest_version(analytics_db: Database) -> None:
    """Though the one before was recorded later, as its transaction began later: a mart that agrees does not drift."""
    now = datetime.now(UTC)
    first, second = movements(random.Random(6), ["A"], [now - timedelta(minutes=2), now - timedelta(minutes=1)])
    first = first._replace(recorded_at=now)
    await write(analytics_db, [first, second])
    assert await workers.reconcile(analytics_db) == (1, 0)
