"""The reconciler: counters, ledger and holds are compared, cheaply, and what does not agree is named."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from services.inventory import store, watch
from services.inventory.commands import Commands
from services.inventory.domain import Kind, Movement
from services.inventory.watch import Watch
from services.inventory.workers import MONTHS_AHEAD, Workers
from shared import partitions
from shared.database import Database
from tests.integration.goods import assert_sound, change, hold, put


async def scene(commands: Commands) -> None:
    """Ten keys with a receipt, a hold and a sale each."""
    for n in range(10):
        await put(commands, f"S{n}", 10)
    await commands.place([hold(f"h{n}", (f"S{n}", "MAIN", 3)) for n in range(10)])
    await commands.change([change(f"h{n}", Kind.COMMIT, (f"S{n}", "", 1)) for n in range(10)])


async def test_books_that_agree_are_compared_once(commands: Commands, inventory_db: Database) -> None:
    """Only what has moved since is looked at again, by one reconciler or by two at once."""
    await scene(commands)
    drifts = await asyncio.gather(commands.reconcile(keys_max=3), commands.reconcile(keys_max=4))
    assert [drifted for drifted, _ in drifts] == [0, 0]
    async with inventory_db.connection() as connection:
        checked = "SELECT count(*) FROM checkpoint WHERE checked_at > $1"
        now = await connection.fetchval("SELECT clock_timestamp()")
        await put(commands, "S4", 1)
        assert await store.balance(connection, ("", ""), 100) == (10, ("S9", "MAIN"), [])
        assert await connection.fetchval(checked, now) == 1
    assert await commands.reconcile() == (0, [])


@pytest.mark.parametrize(
    ("tampering", "drift", "units"),
    [
        ("UPDATE stock SET on_hand = on_hand + 2 WHERE sku = 'S4'", "on_hand", 2),
        ("UPDATE stock SET held = held + 1 WHERE sku = 'S4'", "held", 1),
        ("UPDATE stock SET short = 1 WHERE sku = 'S4'", "short", 1),
        ("UPDATE hold SET held = held - 1, released = 1 WHERE sku = 'S4'", "hold", 1),
        ("DELETE FROM movement WHERE sku = 'S4' AND version = 2", "version", 1),
    ],
)
async def test_books_that_disagree_are_named_until_they_are_mended(
    commands: Commands, inventory_db: Database, tampering: str, drift: str, units: int
) -> None:
    """Each kind of tampering is found on its key, again and again, and on no other key; one entry mends it.

    Only a version that is missing takes a person. A dry run says the same, and changes nothing.
    """
    await scene(commands)
    async with inventory_db.connection() as connection:
        await connection.execute(tampering)
    for _ in range(2):
        drifted, (found,) = await commands.reconcile()
        assert drifted == 1
        assert (found.key, getattr(found, drift)) == (("S4", "MAIN"), units)
    entries = await commands.repair([found], "mend", apply=False)
    assert (await commands.reconcile())[0] == 1
    assert await commands.repair([found], "mend", apply=True) == entries
    if drift == "version":
        assert not entries
        return
    assert [(entry.kind, entry.after.version, entry.request_id) for entry in entries] == [(Kind.REPAIR, 4, "mend")]
    assert await commands.reconcile() == (0, [])
    await assert_sound(inventory_db)


async def test_counters_that_change_without_a_movement_are_found(commands: Commands, inventory_db: Database) -> None:
    """Even where the books were found to agree before, and nothing has moved since."""
    await scene(commands)
    assert await commands.reconcile() == (0, [])
    async with inventory_db.connection() as connection:
        await connection.execute("UPDATE stock SET on_hand = on_hand + 3 WHERE sku = 'S7'")
    drifted, (found,) = await commands.reconcile()
    assert (drifted, found.key, found.on_hand, found.units) == (1, ("S7", "MAIN"), 3, 3)
    await commands.repair([found], "mend", apply=True)
    assert await commands.reconcile() == (0, [])
    await assert_sound(inventory_db)


async def test_partitions_are_made_ahead(inventory_db: Database) -> None:
    """Every month of the year to come has a place for its movements; making them again changes nothing."""
    count = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'movement'::regclass"
    async with inventory_db.connection() as connection:
        for _ in range(2):
            await store.make_partitions(connection, datetime.now(UTC), 12)
            assert await connection.fetchval(count) == 13


async def test_a_watch_reads_so_many_movements_at_a_time_of_however_many_keys(
    commands: Commands, inventory_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While there are more it goes on at once, and sees each of them once and in order."""
    keys = [(f"S{n}", "MAIN") for n in range(4)]
    for sku, _ in keys:
        for _ in range(10):
            await put(commands, sku, 1)
    versions = dict.fromkeys(keys, 1)
    async with inventory_db.connection() as connection:
        for most, found in ((9, 8), (2, 4), (1_000, 36)):
            assert len(await store.movements_after(connection, versions, most)) == found
    monkeypatch.setattr(watch, "MOVEMENTS_MAX", 9)
    follow = Watch(inventory_db, poll_seconds=60, streams_max=1).follow([(key, 1) for key in keys])
    async with asyncio.timeout(20):
        seen = [(await anext(follow))[0] for _ in range(36)]
    await follow.aclose()  # type: ignore[attr-defined]
    moved = [movement.after for movement in seen if isinstance(movement, Movement)]
    assert sorted((stock.sku, stock.version) for stock in moved) == [(sku, n) for sku, _ in keys for n in range(2, 11)]


async def test_a_month_is_made_when_nobody_reads_the_ledger(inventory_db: Database) -> None:
    """While a backup does, the worker leaves it for its next turn."""
    unused: Any = None
    worker = Workers(unused, inventory_db, unused, unused)
    last = partitions.following(partitions.month(datetime.now(UTC)), MONTHS_AHEAD)
    name = f"movement_{last:%Y_%m}"
    async with inventory_db.connection() as reader:
        await reader.execute(f"DROP TABLE IF EXISTS {name}")
        async with reader.transaction():
            await reader.fetch("SELECT FROM movement")
            await worker._partitions()
            assert not await reader.fetchval(partitions.IS_MADE, name)
        await worker._partitions()
        assert await reader.fetchval(partitions.IS_MADE, name)
