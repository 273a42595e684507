"""Tables that are cut by time, a partition a month, in UTC.

To add or drop a month PostgreSQL wants the whole table for a moment. It waits LOCK_SECONDS_MAX at the most for those
who have it, a backup or a long report, since everybody else waits behind it meanwhile; then it is to be tried again.
"""

from contextlib import suppress
from datetime import UTC, datetime

import asyncpg

from shared.database import Connection

LOCK_SECONDS_MAX = 2
IS_MADE = "SELECT to_regclass($1) IS NOT NULL AS made"
IN_USE = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)


def month(time: datetime) -> datetime:
    """The first instant of a time's month."""
    time = time.astimezone(UTC)
    return datetime(time.year, time.month, 1, tzinfo=UTC)


def following(start: datetime, months: int = 1) -> datetime:
    """The first instant of a month so many months later."""
    years, number = divmod(start.month - 1 + months, 12)
    return datetime(start.year + years, number + 1, 1, tzinfo=UTC)


async def make(
    connection: Connection, table: str, start: datetime, *, lock_seconds_max: float = LOCK_SECONDS_MAX
) -> None:
    """Make a table's partition of a month, if it is not there. Not for use within a transaction.

    Raises what is IN_USE while others have the table for longer than `lock_seconds_max` (0: waits for them).
    """
    name = f"{table}_{start:%Y_%m}"
    if await connection.fetchval(IS_MADE, name):
        return
    # IF NOT EXISTS does not keep two from making it at the same time; the later one finds it made.
    with suppress(asyncpg.DuplicateTableError, asyncpg.UniqueViolationError):
        await _change(
            connection,
            f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF {table}"
            f" FOR VALUES FROM ('{start.isoformat()}') TO ('{following(start).isoformat()}')",
            lock_seconds_max,
        )


async def drop(connection: Connection, partition: str) -> None:
    """Drop a partition. Not for use within a transaction. Raises what is IN_USE."""
    await _change(connection, f"DROP TABLE IF EXISTS {partition}", LOCK_SECONDS_MAX)


async def _change(connection: Connection, statement: str, lock_seconds_max: float) -> None:
    """Run a statement that wants its table for itself."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout TO '{lock_seconds_max * 1000:.0f}'")
        await connection.execute(statement)
