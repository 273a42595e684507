"""A pod waits for its schema, and a release may go back one."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator

import asyncpg
import pytest
import sqlalchemy

from deploy.local.stack import Stack
from shared.migrate import migrate, wait

NAME = "migrate_test"


@pytest.fixture
async def dsn(stack: Stack) -> AsyncIterator[str]:
    """An empty database."""
    stack.databases(NAME)
    yield stack.postgres_dsn(NAME)
    stack.drop_database(NAME)


async def execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def test_waiting_ends_when_someone_has_migrated(dsn: str) -> None:
    """Nothing is migrated by who waits; it goes on as soon as the phase is there."""
    waiting = asyncio.ensure_future(wait(dsn, "inventory", ["pre"]))
    with pytest.raises(TimeoutError, match="pre migrations of inventory"):
        await wait(dsn, "inventory", ["pre"], seconds_max=0)
    assert not waiting.done()
    await migrate(dsn, "inventory", ["pre"])
    await waiting
    with pytest.raises(TimeoutError, match="post migrations"):
        await wait(dsn, "inventory", ["pre", "post"], seconds_max=0)


async def test_waiting_outlives_a_database_that_is_not_there(stack: Stack) -> None:
    """A database that does not exist yet is waited for, and not an error."""
    with pytest.raises(TimeoutError):
        await wait(stack.postgres_dsn("not_there"), "inventory", ["pre"], seconds_max=0)


async def test_a_migration_waits_for_those_who_serve_without_stopping_them(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the lock of a table up that it does not get soon, and takes it when it can."""
    monkeypatch.setattr("shared.migrate.LOCK_SECONDS_MAX", 0.1)
    await execute(dsn, "CREATE TABLE stock (busy int)")
    serving = await asyncpg.connect(dsn)
    transaction = serving.transaction()
    await transaction.start()
    await serving.execute("SELECT FROM stock")
    changed = 0

    def upgrade(connection: sqlalchemy.Connection, *_: str) -> None:
        nonlocal changed
        connection.execute(sqlalchemy.text("ALTER TABLE stock ADD COLUMN more int"))
        changed += 1

    monkeypatch.setattr("shared.migrate.upgrade", upgrade)
    migrating = asyncio.ensure_future(migrate(dsn, "inventory", ["pre"]))
    for _ in range(3):
        await execute(dsn, "SELECT FROM stock")  # behind the migration, until that gives up
        await asyncio.sleep(0.1)
    assert not migrating.done()
    await transaction.rollback()
    await migrating
    assert changed == 1
    await serving.close()


async def test_a_database_that_is_ahead_has_what_is_needed(dsn: str) -> None:
    """Pods of the release before start on the newer schema, and their migrations change nothing."""
    await migrate(dsn, "inventory", ["pre"])
    await execute(dsn, "UPDATE migration_pre SET version_num = '9999'")
    await wait(dsn, "inventory", ["pre"], seconds_max=0)
    await migrate(dsn, "inventory", ["pre"])
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT version_num FROM migration_pre") == "9999"
    await connection.close()


@pytest.mark.skipif(bool(os.environ.get("CITUS_DSN")), reason="there is a cluster")
async def test_plain_postgresql_says_what_it_lacks_to_be_distributed(dsn: str) -> None:
    """Each thing on a line of its own; and nothing was changed, so that not even the tables are there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shared.migrate", "inventory", "--distributed",
        env=os.environ | {"HOLDFAST_DATABASE_DSN": dsn}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await process.communicate()
    assert process.returncode == 1
    lines = said.decode().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "this PostgreSQL has no Citus",
        "Citus is not loaded",
        "max_prepared_transactions is 0",
    ]
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT to_regclass('stock')") is None
    await connection.close()
