"""What analytics does without being asked: follow, judge, heal, age, take snapshots, drop what is too old.

Every pod follows: Kafka shares the partitions among them. The rest runs on one pod at a time, by a lock in
Redis that saves work and decides nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from services.analytics import alerts, cases, codec, fraud, history, store
from services.analytics.alerts import Crossings
from services.analytics.channels import Channel
from services.analytics.domain import Key, Movement
from services.analytics.fraud import Engine
from services.analytics.notification_workers import NotificationWorkers
from services.analytics.projection import Projection, count_units, write_movements
from services.analytics.settings import Settings
from shared import metrics, outbox, partitions, watermark, workers
from shared.consumer import Consumer, Poison
from shared.database import Connection, Database
from shared.kafka import Brokers, stop
from shared.redis_client import Client
from shared.wire import EPOCH

log = structlog.get_logger(__name__)
GROUP = "holdfast.analytics"
FRAUD_GROUP = "holdfast.analytics.fraud"
JUDGE_MESSAGES_MAX = 2_000
DLQ_TOPIC = "holdfast.analytics.dlq"
MONTHS_SECONDS = 3600
MONTHS_AHEAD = 3
HEAL_SECONDS_MAX = 300.0
HEAL_MARGIN = timedelta(minutes=5)
READ_MS = 1_000
RECONCILE_KEYS = 1_000
RECONCILE_REST = 9


class Workers:
    """Tasks that `run` keeps going until it is cancelled."""

    def __init__(self, settings: Settings, database: Database, client: Client, adapters: Mapping[str, Channel]) -> None:
        self._settings = settings
        self._database = database
        self._redis = client
        self._crossings = Crossings()
        self._notifications = NotificationWorkers(settings, database, adapters)
        self._unhealed: dict[int, tuple[float, float]] = {}
        self._engine = Engine(database, settings)
        self._judging = Consumer(
            settings.brokers,
            (codec.CHANGES_TOPIC,),
            FRAUD_GROUP,
            DLQ_TOPIC,
            self._engine.apply,
            dlq_messages_max=settings.dlq_messages_max,
            batch_messages_max=JUDGE_MESSAGES_MAX,
            linger_seconds=settings.judge_linger_seconds,
            positions=self._engine.positions,
        )

    async def run(self) -> None:
        """Run every worker; a fault in one is logged and it starts again, the others go on."""
        settings = self._settings
        alone: dict[str, workers.Work] = {
            "healer": lambda: workers.forever(self._heal, settings.heal_poll_seconds),
            "aging": lambda: workers.forever(self._age, settings.aging_poll_seconds),
            "reconciler": lambda: workers.forever(self._reconcile, settings.reconcile_poll_seconds),
            "months": lambda: workers.forever(self._months, MONTHS_SECONDS),
            "judge": self._judge,
            "verdicts": lambda: workers.relay(
                self._database,
                settings.brokers,
                settings.pod,
                settings.relay_poll_seconds,
                outbox.source(cases.OUTBOX),
            ),
            **self._notifications.works(),
        }
        async with asyncio.TaskGroup() as group:
            group.create_task(workers.restarting("projection", self._follower().run))
            group.create_task(workers.measuring(self._database, (cases.OUTBOX,), measure))
            for name, work in alone.items():
                group.create_task(
                    workers.alone(self._redis, f"analytics:{name}", work, lock_ttl_seconds=settings.lock_ttl_seconds)
                )

    def _follower(self) -> Consumer:
        projection = Projection(self._database, self._crossings)
        return Consumer(
            self._settings.brokers,
            codec.TOPICS,
            GROUP,
            DLQ_TOPIC,
            projection.apply,
            dlq_messages_max=self._settings.dlq_messages_max,
            batch_messages_max=self._settings.batch_messages_max,
            linger_seconds=self._settings.follow_linger_seconds,
            positions=projection.positions,
        )

    async def _judge(self) -> None:
        await fraud.seed(self._database)
        try:
            await self._judging.run()
        finally:
            await self._engine.close()

    async def _heal(self) -> None:
        async with self._database.connection() as connection:
            stopped = await store.partitions_with_gaps(connection)
        now = time.monotonic()
        for partition in stopped:
            since, wait = self._unhealed.get(partition, (0.0, 0.0))
            if now - since < wait:
                continue
            healed = await heal(self._database, self._settings.brokers, partition, self._crossings)
            log.info("gaps healed", partition=partition, keys=healed)
            # What is missing may never come: each time in vain the next is further away.
            self._unhealed[partition] = (now, 0 if healed else min(max(wait * 2, 1), HEAL_SECONDS_MAX))

    async def _age(self) -> None:
        hours = await self._database.run(store.age)
        if hours:
            log.info("sums aged", hours=hours)
        # A turn forgets an hour: however much there is, the sums are aged in between.
        await self._database.run(store.forget)

    async def _reconcile(self) -> None:
        keys, units = await reconcile(self._database)
        if units:
            log.error("the mart differs from the ledger; rebuild it", units=units, keys=keys)

    async def _months(self) -> None:
        # Business times of other months get their partitions when they come.
        async with self._database.connection() as connection:
            for table in store.MONTHLY:
                try:
                    for ahead in range(MONTHS_AHEAD + 1):
                        await partitions.make(connection, table, partitions.following(_this_month(), ahead))
                except partitions.IN_USE:
                    log.warning("months are made later, as their table is in use", table=table)
            fresh = await history.freshness(connection)
        for start in await self._database.run(lambda connection: store.take_snapshots(connection, fresh.as_of)):
            log.info("snapshot taken", month=start.isoformat())
        oldest = datetime.now(UTC) - timedelta(days=31 * self._settings.retention_months)
        try:
            async with self._database.connection() as connection:
                for table in await store.drop_old(connection, oldest):
                    log.info("dropped", table=table)
        except partitions.IN_USE:
            log.warning("months are dropped later, as their table is in use")


async def measure(connection: Connection) -> None:
    """The gauges of the mart and of deliveries. What has not been measured yet is not told."""
    fresh = await history.freshness(connection)
    if fresh.as_of != EPOCH:
        metrics.MART_LAG_SECONDS.set(fresh.lag.total_seconds())
    metrics.MART_KEYS_STOPPED.set(fresh.keys_stopped)
    metrics.DRIFT_UNITS.labels("mart").set(await connection.fetchval(alerts.DRIFT_UNITS) or 0)
    metrics.DELIVERIES_DEAD.set(await connection.fetchval(alerts.DEAD_DELIVERIES))


def _this_month() -> datetime:
    return partitions.month(datetime.now(UTC))


async def reconcile(database: Database, keys_max: int = RECONCILE_KEYS) -> tuple[int, int]:
    """Compare the mart with the ledger's copy, and remember what it came to: keys looked at, units of drift.

    It rests between pages, so that it takes a tenth of a connection's time at the most.
    """
    after, keys, units = ("", ""), 0, 0
    async for _ in workers.turns(rest=RECONCILE_REST):
        async with database.connection() as connection:
            page = await store.mart_drift(connection, after, keys_max)
        keys += len(page)
        units += sum(drift for _, drift in page)
        if len(page) < keys_max:
            break
        after = page[-1][0]
    async with database.connection() as connection:
        await connection.execute(store.RECONCILED, keys, units)
    return keys, units


async def heal(database: Database, brokers: Brokers, partition: int, crossings: Crossings | None = None) -> int:
    """Read a partition of movements again for what its stopped keys are missing; return how many go on.

    Most of it is read beforehand. The rest, up to where live events have got to, is read under the partition's
    lock: live events wait for it, as otherwise they would run ahead of it for ever.
    """
    async with database.connection() as connection:
        stopped = await store.gaps(connection, partition)
    if not stopped:
        return 0
    async with _reading(brokers, partition, stopped) as (read_until, end):
        await read_until(end)

        async def work(connection: Connection) -> tuple[int, list[Movement]]:
            movements = await read_until(await store.lock_partition(connection, codec.MOVEMENTS_TOPIC, partition))
            await store.delete_gaps(connection, stopped)
            missing = sorted(movements, key=lambda movement: movement.version)
            written = await write_movements(connection, partition, missing, crossings)
            return len(stopped.keys() - (await store.gaps(connection, partition)).keys()), written

        healed, written = await database.run(work)
        count_units(written)
        return healed


@asynccontextmanager
async def _reading(
    brokers: Brokers, partition: int, stopped: Mapping[Key, datetime]
) -> AsyncIterator[tuple[Callable[[int], Awaitable[list[Movement]]], int]]:
    """What reads the movements of stopped keys, from the last that was applied, up to an offset; and the end."""
    since = min(stopped.values()) - HEAL_MARGIN
    place = TopicPartition(codec.MOVEMENTS_TOPIC, partition)
    consumer = AIOKafkaConsumer(**brokers.options, enable_auto_commit=False)
    movements: list[Movement] = []

    async def read_until(end: int) -> list[Movement]:
        while await consumer.position(place) < end:
            for message in (await consumer.getmany(place, timeout_ms=READ_MS)).get(place, []):
                if watermark.of(message) is None:
                    with contextlib.suppress(Poison):
                        movement = codec.movement(message)
                        if (movement.sku, movement.location) in stopped:
                            movements.append(movement)
        return movements

    await consumer.start()
    try:
        consumer.assign([place])
        found = (await consumer.offsets_for_times({place: max(0, int(since.timestamp() * 1000))}))[place]
        end = (await consumer.end_offsets([place]))[place]
        consumer.seek(place, found.offset if found else end)
        yield read_until, end
    finally:
        await stop(consumer)
