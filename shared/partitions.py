"""Tables that are cut by time, a partition a month, in UTC."""

from contextlib import suppress
from datetime import UTC, datetime

import asyncpg

from shared.database import Connection


def month(time: datetime) -> datetime:
    """The first instant of a time's month."""
    time = time.astimezone(UTC)
    return datetime(time.year, time.month, 1, tzinfo=UTC)


def following(start: datetime, months: int = 1) -> datetime:
    """The first instant of a month so many months later."""
    years, number = divmod(start.month - 1 + months, 12)
    return datetime(start.year + years, number + 1, 1, tzinfo=UTC)


async def make(connection: Connection, table: str, start: datetime) -> None:
    """Make a table's partition of a month, if it is not there. Not for use within a transaction."""
    # IF NOT EXISTS does not keep two from making it at the same time; the later one finds it made.
    with suppress(asyncpg.DuplicateTableError, asyncpg.UniqueViolationError):
        await connection.execute(
            f"CREATE TABLE IF NOT EXISTS {table}_{start:%Y_%m} PARTITION OF {table}"
            f" FOR VALUES FROM ('{start.isoformat()}') TO ('{following(start).isoformat()}')"
        )
