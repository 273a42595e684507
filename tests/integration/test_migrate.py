"""A pod waits for its schema, and a release may go back one."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

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


async def test_a_database_that_is_ahead_has_what_is_needed(dsn: str) -> None:
    """Pods of the release before start on the newer schema, and their migrations change nothing."""
    await migrate(dsn, "inventory", ["pre"])
    await execute(dsn, "UPDATE migration_pre SET version_num = '9999'")
    await wait(dsn, "inventory", ["pre"], seconds_max=0)
    await migrate(dsn, "inventory", ["pre"])
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("SELECT version_num FROM migration_pre") == "9999"
    await connection.close()
