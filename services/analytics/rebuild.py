"""`python -m services.analytics rebuild`: the whole database anew from the topics, beside the live one, and swap.

The second one is a schema of its own, filled by the same projection from the first offset on. When it has come
as far as the topics had when it last looked, the two change names in one transaction, which waits for the
batches under way. Live pods find their partitions elsewhere (`shared.consumer.Elsewhere`) and read on from where
the new one has got to: what came during the swap comes again, to it. Stopped half way it leaves the live one
as it is; the next rebuild begins anew.

A topic may have been given more partitions (`shared.topics`): a key's later events then lie in another partition than
its earlier ones. Partitions were added while nothing was sent, so a younger one is read once the others have been read
up to its first event.
"""

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import OffsetAndTimestamp

from services.analytics import codec, history, store
from services.analytics.projection import Projection, leave
from services.analytics.settings import Settings
from shared import distribution
from shared.consumer import Batch, Message
from shared.database import PLANNER, Connection, Database
from shared.kafka import stop
from shared.migrate import migrate

log = structlog.get_logger(__name__)
SERVICE = "analytics"
LIVE, NEW, OLD = "public", "rebuilding", "replaced"
BEHIND_MAX = 1_000
READ_MS = 1_000
BAR = 40

# Everything that follows from the topics is new; how long events took to be visible does not.
SWAP = (
    f"LOCK TABLE {LIVE}.consumed, {LIVE}.aging IN ACCESS EXCLUSIVE MODE",
    f"TRUNCATE {NEW}.lag",
    f"INSERT INTO {NEW}.lag SELECT * FROM {LIVE}.lag",  # noqa: S608 - of constants
    f"ALTER SCHEMA {LIVE} RENAME TO {OLD}",
    f"ALTER SCHEMA {NEW} RENAME TO {LIVE}",
)


class Bar:
    """A line that tells how far the reading is; on what is no terminal, a line for each tenth."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = -1

    def show(self, done: int, whole: int) -> None:
        share = min(done / whole, 1) if whole else 1
        rate = done / max(time.monotonic() - self._began, 0.001)
        line = f"  events [{'#' * int(share * BAR):<{BAR}}] {done:,} of {whole:,}  {rate:,.0f}/s"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{line}" + "\n" * (done >= whole))
        elif int(share * 10) > self._shown:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        self._shown = int(share * 10)


class Ages:
    """Which partitions are younger than the others of their topics, and when they may be read."""

    def __init__(self) -> None:
        self._first: dict[TopicPartition, float] = {}
        self._read: dict[TopicPartition, float] = {}

    def begin(self, first: Mapping[TopicPartition, OffsetAndTimestamp | None]) -> None:
        """`first`: the first event of each partition, None where there is none."""
        self._first = {place: found.timestamp for place, found in first.items() if found}
        self._read = dict.fromkeys(self._first, -1.0)

    def read(self, place: TopicPartition, timestamp: float) -> None:
        """A partition has been read up to this time."""
        self._read[place] = timestamp

    def end(self, places: Iterable[TopicPartition]) -> None:
        """Of these nothing is left."""
        self._read |= dict.fromkeys(places, math.inf)

    def waiting(self) -> set[TopicPartition]:
        """Those that begin later than another of their topic has been read."""
        return {
            place
            for place, first in self._first.items()
            if any(
                other.topic == place.topic and self._first[other] < first and self._read[other] < first
                for other in self._first
            )
        }


async def rebuild(settings: Settings) -> int:
    """Build, swap, drop what was replaced; return how many events were read."""
    async with _connected(settings, LIVE) as live, live.connection() as connection:
        for schema in (NEW, OLD):
            await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        await connection.execute(f"CREATE SCHEMA {NEW}")
    await migrate(settings.database_dsn, SERVICE, schema=NEW)
    if shards := await distribution.shards(settings.database_dsn):
        await distribution.distribute(settings.database_dsn, SERVICE, shards, schema=NEW)
    async with _connected(settings, NEW) as new:
        read = await _fill(settings, new)
        async with new.connection() as connection:
            fresh = await history.freshness(connection)
        await new.run(lambda connection: store.take_snapshots(connection, fresh.as_of))
        await new.run(_swap)
        async with new.connection() as connection:
            await connection.execute(f"DROP SCHEMA {OLD} CASCADE")
    return read


async def _swap(connection: Connection) -> None:
    for statement in SWAP:
        await connection.execute(statement)


@asynccontextmanager
async def _connected(settings: Settings, schema: str) -> AsyncIterator[Database]:
    database = await Database.connect(
        settings.database_dsn,
        name=f"{settings.pod} rebuild",
        timeout_seconds=settings.report_seconds_max,
        planner={**PLANNER, "search_path": schema},
    )
    try:
        yield database
    finally:
        await database.close()


async def _fill(settings: Settings, database: Database) -> int:
    """Apply every event there is, and those that come meanwhile until few are left; return how many."""
    # Without a group it is assigned every partition there is.
    consumer = AIOKafkaConsumer(
        *codec.TOPICS,
        **settings.brokers.options,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    projection = Projection(database, lock_seconds_max=0)  # nobody but itself has these tables
    ages = Ages()
    at: dict[TopicPartition, int] = {}
    read, bar = 0, Bar()

    async def apply(place: TopicPartition, messages: list[Message]) -> None:
        batch = Batch(place, at[place], messages)
        await projection.apply(batch, leave)
        at[place] = batch.end
        ages.read(place, messages[-1].timestamp)

    async def behind(ends: Mapping[TopicPartition, int]) -> int:
        return sum([max(0, end - await consumer.position(place)) for place, end in ends.items()])

    await consumer.start()
    try:
        places = sorted(consumer.assignment())
        at.update(await projection.positions(places))
        ages.begin(await consumer.offsets_for_times(dict.fromkeys(places, 0)))
        consumer.pause(*ages.waiting())
        while left := await behind(ends := await consumer.end_offsets(places)):
            whole = read + left
            while await behind(ends):
                batches = await consumer.getmany(timeout_ms=READ_MS, max_records=settings.batch_messages_max)
                async with asyncio.TaskGroup() as group:
                    for place, messages in batches.items():
                        group.create_task(apply(place, messages))
                read += sum(map(len, batches.values()))
                ages.end(place for place, end in ends.items() if at[place] >= end)
                consumer.resume(*(consumer.paused() - ages.waiting()))
                bar.show(read, whole)
            if left <= BEHIND_MAX:
                break
        return read
    finally:
        await stop(consumer)
