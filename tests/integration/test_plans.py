"""The hot statements stay on their indexes, in key order, on tables of real size."""

import asyncpg
import pytest

from services.inventory import store as inventory
from services.reservation import store as reservation
from shared import outbox
from shared.database import Database
from tests.integration.goods import distributed

ROWS = 200_000
LOAD_SECONDS_MAX = 600  # longer than a pool would wait
KEYS = "array['S000100', 'S000200'], array['MAIN', 'MAIN']"
IDS = "array['S000100', 'S000200'], array['h100', 'h200']"

SCENE = (
    "INSERT INTO location VALUES ('MAIN', 'Main', 0)",
    "INSERT INTO sku SELECT 'S' || lpad(n::text, 6, '0'), '', '', '', '', 0 FROM generate_series(1, $1) n",
    """
    INSERT INTO stock (sku, location, on_hand, held)
    SELECT 'S' || lpad(n::text, 6, '0'), 'MAIN', 10, 1 FROM generate_series(1, $1) n
    """,
    """
    INSERT INTO hold (sku, hold_id, slot, location, quantity, held, fingerprint, created_at, expires_at)
    SELECT 'S' || lpad(n::text, 6, '0'), 'h' || n, 0, 'MAIN', 1, 1, '', now(), now() + interval '1 hour'
    FROM generate_series(1, $1) n
    """,
)


@pytest.fixture
async def large(inventory_db: Database, inventory_dsn: str) -> Database:
    """200,000 SKUs, each with a hold."""
    connection = await asyncpg.connect(inventory_dsn, command_timeout=LOAD_SECONDS_MAX)
    for statement in SCENE:
        await connection.execute(statement, *([ROWS] if "$1" in statement else []))
    await connection.execute("ANALYZE")
    await connection.close()
    return inventory_db


HOT = {
    "PLACE": f"{KEYS}, array[1, 1], array[1, 1], array[1, 2], array[null, 1], array['h', 'h'], array[1, 1],"
    f" array[1, 1], {KEYS}, array[0, 0], array[''::bytea, ''], array[interval '1 h', '1 h'], array[null, '[]'],"
    " null, ''",
    "CHANGE": f"{KEYS}, array[1, 1], array[1, 1], array[1, 1], array[1, 2], array['h100', 'h200'], array['r', 'r'],"
    " array['COMMIT', 'COMMIT'], array[1, 1], array[1, 1], array[1, 1], array[1, 1],"
    f" {IDS}, array[0, 0], array[1, 1], array[now(), now()], array[1, 1], array[0, 0], array[0, 0],"
    f" {IDS}, array['r', 'r'], array['COMMIT', 'COMMIT'], array[''::bytea, ''], array['[]', '[]'],"
    " array[now(), now()], ''",
    "LOCK": KEYS,
    "LOCK_SKUS": "array['S000100', 'S000200']",
    "READ_STOCK": KEYS,
    "KNOWN_SKUS": "array['S000100', 'S000200']",
    "READ_HOLDS": IDS,
    "SAVE_HOLDS": f"{IDS}, array[0, 0], array[1, 1], array[0, 0], array[0, 0], array[0, 0], array[now(), now()],"
    " array[1, 1]",
    "READ_CHANGES": f"{IDS}, array['r', 'r']",
    "READ_REQUESTS": "array['S000100', 'S000200'], array['r', 'r']",
    "EXPIRED_ON_KEYS": f"{KEYS}, now(), 100",
    "EXPIRED": "100",
    "LOOK": KEYS,
    "LOOK_OPEN": "array['S000100', 'S000200']",
    "SOURCES": "array['S000100', 'S000200']",
    "MOVEMENTS_AFTER": f"{KEYS}, array[1, 1], 10",
    "MOVED": f"{KEYS}, array[1, 1]",
    "SUM_STOCK": "array['S000100', 'S000200']",
    "NEXT_KEYS": "'', '', 10",
    "COMPARE": KEYS,
}

BOOKED = (
    "array['a'], array[1], array['HELD'], array[now()], array[now()], array['a'], array['r'], array['APPLIED'],"
    f" array[null::text], array['a'], array['A'], array['X'], {'array[0],' * 4} 't', 'k', array[''::bytea], ''"
)


async def test_inventory_reads_and_writes_by_index(large: Database) -> None:
    """No hot statement of inventory scans a table, for two keys or as its general plan."""
    for name, arguments in HOT.items():
        await assert_by_index(large, getattr(inventory, name), arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("READ", "array['a', 'b']"),
        ("READ_CHANGES", "array['a', 'b'], array['r', 'r']"),
        ("LOCK", "array['a', 'b']"),
        ("KNOWN", "array['a', 'b']"),
        ("READ_SUBJECTS", "array['a', 'b']"),
        ("BOOK", BOOKED),
        ("PENDING_CHANGES", "interval '5 s', 10"),
        ("DUE", "10, now(), 'a'"),
    ],
)
async def test_reservation_reads_and_writes_by_index(reservation_db: Database, name: str, arguments: str) -> None:
    """No hot statement of reservation scans a table."""
    await assert_by_index(reservation_db, getattr(reservation, name), arguments)


async def test_the_relay_reads_and_deletes_by_index(inventory_db: Database) -> None:
    """The oldest events by id, what was sent by key and id."""
    await assert_by_index(inventory_db, outbox.PEEK.format(table="outbox"), "10")
    await assert_by_index(inventory_db, inventory.UNSENT, "10")
    await assert_by_index(inventory_db, inventory.MOVEMENTS_AT, f"{KEYS}, array[1, 1], array[now(), now()]")
    await assert_by_index(inventory_db, inventory.DELETE_SENT_MOVEMENTS, "array[1]")
    await assert_by_index(inventory_db, outbox.OUTBOX.delete, "array[1]")


async def assert_by_index(database: Database, statement: str, arguments: str) -> None:
    async with database.connection() as connection:
        # Citus plans with the parameters, as they tell it the shard.
        modes = ("force_custom_plan",) if await distributed(connection) else ("force_custom_plan", "force_generic_plan")
        for mode in modes:
            await connection.execute(f"SET plan_cache_mode = {mode}")
            await connection.execute(f"PREPARE hot AS {statement}")
            rows = await connection.fetch(f"EXPLAIN EXECUTE hot ({arguments})")
            await connection.execute("DEALLOCATE hot")
            plan = "\n".join(row[0] for row in rows)
            assert "Seq Scan" not in plan, plan
            assert "Hash Join" not in plan, plan
            assert "Merge Join" not in plan, plan
        await connection.execute("RESET plan_cache_mode")
