"""Reads that are no reports: how fresh the database is, stock at an instant, a key's history, a reservation's audit."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from services.analytics.codec import CHANGES_TOPIC, MOVEMENTS_TOPIC
from services.analytics.domain import Key, Reason
from services.analytics.store import LAG_BASE
from shared.database import Connection, Database, Record, columns
from shared.refusal import Refusal
from shared.wire import EPOCH

LOOK_SECONDS = 0.02
FOLLOWED = (MOVEMENTS_TOPIC, CHANGES_TOPIC)

# A topic of which no partition is known yet is complete until no time at all.
FRESHNESS = """
SELECT least(coalesce(min(complete_until) FILTER (WHERE topic = $1), '-infinity'),
             coalesce(min(complete_until) FILTER (WHERE topic = $2), '-infinity')) AS as_of,
       clock_timestamp() AS now, (SELECT count(*) FROM gap) AS keys_stopped
FROM consumed
"""
# Percentiles out of the counts of an hour: the bucket in which each share of all events is passed.
LAG = """
WITH counted AS (
  SELECT bucket, sum(events) AS events FROM lag WHERE minute > now() - interval '1 hour' GROUP BY bucket
), running AS (
  SELECT bucket, sum(events) OVER (ORDER BY bucket) AS passed, sum(events) OVER () AS whole FROM counted
)
SELECT coalesce(min(bucket) FILTER (WHERE passed >= 0.50 * whole), 0) AS p50,
       coalesce(min(bucket) FILTER (WHERE passed >= 0.95 * whole), 0) AS p95,
       coalesce(min(bucket) FILTER (WHERE passed >= 0.99 * whole), 0) AS p99,
       (SELECT coalesce(sum(next_offset), 0)::bigint FROM consumed) AS events,
       (SELECT drift_units FROM reconciled) AS drift_units, (SELECT reconciled_at FROM reconciled) AS reconciled_at,
       (SELECT greatest(min(complete_until), to_timestamp(0)) FROM desk.judged_partition) AS judged_until
FROM running
"""
REACHED = """
SELECT seen.sku, seen.location
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS seen (sku, location, version)
  JOIN stock_view AS view ON view.sku = seen.sku AND view.location = seen.location
WHERE view.version >= seen.version
"""
# The last movement up to the instant, or the snapshot before it, whichever is later: two index lookups for a
# key, however long its history is.
STOCK_AT = """
SELECT view.sku, view.location, coalesce(last.on_hand, before.on_hand) AS on_hand,
       coalesce(last.held, before.held) AS held, coalesce(last.available, before.available) AS available,
       coalesce(last.version, before.version) AS version
FROM stock_view AS view
  LEFT JOIN LATERAL (
    SELECT * FROM snapshot WHERE snapshot.sku = view.sku AND snapshot.location = view.location AND taken_at <= $2
    ORDER BY taken_at DESC LIMIT 1
  ) AS before ON true
  LEFT JOIN LATERAL (
    SELECT on_hand, held, available, version FROM movement
    WHERE movement.sku = view.sku AND movement.location = view.location AND recorded_at <= $2
      AND recorded_at >= coalesce(before.taken_at, '-infinity')
    ORDER BY recorded_at DESC, version DESC LIMIT 1
  ) AS last ON true
WHERE view.sku = ANY ($1::text[]) AND (last.version IS NOT NULL OR before.version IS NOT NULL)
ORDER BY view.sku, view.location
"""
STATES = """
SELECT * FROM reservation_state WHERE reservation_id = $1 ORDER BY version
"""
MOVEMENTS_OF = """
SELECT * FROM movement WHERE hold_id = $1 ORDER BY recorded_at, sku, location, version
"""
# The start of the oldest partition of movements, where those before it have been dropped.
OLDEST_KEPT = """
SELECT taken_at FROM snapshot_taken WHERE taken_at <= (
  SELECT min(to_timestamp(substring(relname FROM 'movement_(.*)$'), 'YYYY_MM'))
  FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid WHERE inhparent = 'movement'::regclass
) ORDER BY taken_at DESC LIMIT 1
"""


class Freshness(NamedTuple):
    """Everything recorded before `as_of` is in; `now` is the database's clock."""

    as_of: datetime
    now: datetime
    keys_stopped: int

    @property
    def lag(self) -> timedelta:
        return max(timedelta(), self.now - self.as_of)


class Lag(NamedTuple):
    """How long events take from being recorded to being visible (ms), how many there were, and what they came to."""

    p50: float
    p95: float
    p99: float
    events: int
    drift_units: int
    reconciled_at: datetime
    judged_until: datetime


async def freshness(connection: Connection) -> Freshness:
    row = await connection.fetchrow(FRESHNESS, *FOLLOWED)
    assert row is not None
    return Freshness(_moment(row["as_of"]), row["now"], row["keys_stopped"])


def _moment(time: datetime) -> datetime:
    """A time of the database; its -infinity as the beginning of 1970."""
    return time if time.tzinfo else EPOCH


async def lag(connection: Connection) -> Lag:
    row = await connection.fetchrow(LAG)
    assert row is not None
    p50, p95, p99 = (round(LAG_BASE ** row[share], 1) for share in ("p50", "p95", "p99"))
    return Lag(p50, p95, p99, row["events"], row["drift_units"], _moment(row["reconciled_at"]), row["judged_until"])


async def await_time(database: Database, time: datetime, seconds: float) -> None:
    """Wait until everything recorded before `time` is in. Raises Refusal NOT_CAUGHT_UP."""

    async def look() -> Refusal | None:
        async with database.connection() as connection:
            known = await freshness(connection)
        if known.as_of > time:
            return None
        return Refusal(Reason.NOT_CAUGHT_UP, f"events are in up to {known.as_of.isoformat()}", as_of=known.as_of)

    await _await(look, seconds)


async def await_versions(database: Database, versions: Mapping[Key, int], seconds: float) -> None:
    """Wait until keys have reached versions. Raises Refusal NOT_CAUGHT_UP."""
    asked = columns(((*key, version) for key, version in sorted(versions.items())), 3)

    async def look() -> Refusal | None:
        async with database.connection() as connection:
            reached = set(map(tuple, await connection.fetch(REACHED, *asked)))
        late = next((key for key in sorted(versions) if key not in reached and versions[key] > 0), None)
        if late is None:
            return None
        (sku, location), version = late, versions[late]
        return Refusal(
            Reason.NOT_CAUGHT_UP, f"{sku} at {location} has not reached version {version}",
            sku=sku, location=location, version=version,
        )  # fmt: skip

    await _await(look, seconds)


async def _await(look: Callable[[], Awaitable[Refusal | None]], seconds: float) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while refusal := await look():
        if loop.time() + LOOK_SECONDS > until:
            raise refusal
        await asyncio.sleep(LOOK_SECONDS)


async def stock_at(connection: Connection, skus: Sequence[str], time: datetime) -> list[Record]:
    """Stock of every key of some SKUs at an instant. Raises Refusal HISTORY_NOT_KEPT."""
    oldest = await connection.fetchval(OLDEST_KEPT)
    if oldest and time < oldest:
        raise Refusal(Reason.HISTORY_NOT_KEPT, f"history begins at {oldest.isoformat()}", oldest=oldest.isoformat())
    return list(await connection.fetch(STOCK_AT, sorted(set(skus)), time))


async def states(connection: Connection, reservation_id: str) -> list[Record]:
    return list(await connection.fetch(STATES, reservation_id))


async def movements_of(connection: Connection, reservation_id: str) -> list[Record]:
    return list(await connection.fetch(MOVEMENTS_OF, reservation_id))
