"""What notifications do without being asked: measure, judge, tell and send.

Each worker runs on one pod at a time, by a lock that saves work and decides nothing.
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from services.analytics import alerts, delivery, desk, history
from services.analytics.alerting import Kind, Subscription
from services.analytics.channels import Channel
from services.analytics.delivery import Sender
from services.analytics.desk import Wanted
from services.analytics.domain import Key
from services.analytics.settings import Settings
from shared import metrics, workers
from shared.database import Database
from shared.kafka import stop
from shared.wire import EPOCH

log = structlog.get_logger(__name__)
SWEEP_KEYS = 1_000
SWEEP_REST = 9
FORGET_SECONDS = 3600
DLQ_SUFFIX = ".dlq"
DEFAULT_SUBSCRIPTION, DEFAULT_FILE = "default:file", "alerts"


class NotificationWorkers:
    """The workers of notifications, by the names of their locks."""

    def __init__(self, settings: Settings, database: Database, adapters: Mapping[str, Channel]) -> None:
        self._settings = settings
        self._database = database
        self._channels = adapters

    def works(self) -> dict[str, workers.Work]:
        settings = self._settings
        sender = Sender(settings, self._database, self._channels)
        return {
            "alert-sweep": self._sweeps,
            "alert-monitor": lambda: workers.forever(self._monitor, settings.alert_poll_seconds),
            "alert-dead-letters": self._dead_letters,
            "dispatcher": lambda: workers.forever(self._dispatch, settings.notify_poll_seconds),
            "sender": sender.run,
            "forgetter": lambda: workers.forever(self._forget, FORGET_SECONDS),
        }

    async def _sweeps(self) -> None:
        await self._prepare()
        await workers.forever(self._sweep, self._settings.alert_sweep_seconds)

    async def _prepare(self) -> None:
        """Insert the default rules, and a subscription that writes everything to a file where there is a directory."""
        await self._database.run(alerts.insert_defaults)
        if self._settings.notification_directory:
            config = {"name": DEFAULT_FILE}
            target_id, shown = desk.described(self._channels, "file", config)
            wanted = Wanted(Subscription(DEFAULT_SUBSCRIPTION, target_id), "file", config, shown)
            await self._database.run(lambda connection: desk.insert_subscription(connection, wanted))

    async def _sweep(self) -> None:
        steps = await sweep(self._database)
        if steps:
            log.info("swept", steps=steps)

    async def _monitor(self) -> None:
        await monitor(self._database)

    async def _dead_letters(self) -> None:
        options = self._settings.brokers.options
        admin = AIOKafkaAdminClient(**options)
        consumer = AIOKafkaConsumer(**options, enable_auto_commit=False)
        try:
            await admin.start()
            await consumer.start()
            with metrics.measured(metrics.DEAD_LETTERS):
                while True:
                    counts = await dead_letters(admin, consumer)
                    for topic, count in counts.items():
                        metrics.DEAD_LETTERS.labels(topic).set(count)
                    await self._database.run(
                        lambda connection, counts=counts: alerts.judge_system(connection, Kind.DEAD_LETTERS, counts)  # type: ignore[misc]
                    )
                    await asyncio.sleep(self._settings.alert_dlq_poll_seconds)
        finally:
            await stop(consumer)
            await admin.close()

    async def _dispatch(self) -> None:
        most = self._settings.notify_attempts_max
        while await self._database.run(lambda connection: delivery.dispatch(connection, most)):
            pass
        await delivery.digests(self._database, most)

    async def _forget(self) -> None:
        before = datetime.now(UTC) - timedelta(days=self._settings.notify_retention_days)
        await delivery.forget(self._database, before)


async def sweep(database: Database, keys_max: int = SWEEP_KEYS) -> int:
    """Judge every key of the mart, page by page, resting in between; return how many steps were made."""
    after: Key | None = ("", "")
    made = 0
    async for _ in workers.turns(rest=SWEEP_REST):
        assert after is not None
        steps, after = await alerts.sweep_page(database, after, keys_max)
        made += steps
        if after is None:
            break
    return made


async def monitor(database: Database) -> None:
    """Judge lag, drift and dead deliveries, and close what deleted rules have left open."""
    async with database.connection() as connection:
        fresh = await history.freshness(connection)
        drift = await connection.fetchval(alerts.DRIFT_UNITS)
        dead = await connection.fetchval(alerts.DEAD_DELIVERIES)
    measured = {Kind.DEAD_LETTERS: {alerts.DELIVERIES_KEY: dead}}
    # What has not been measured yet is not bad news.
    if fresh.as_of != EPOCH:
        measured[Kind.LAG] = {alerts.LAG_KEY: fresh.lag.total_seconds()}
    if drift is not None:
        measured[Kind.DRIFT] = {alerts.DRIFT_KEY: drift}
    for kind, values in measured.items():
        await database.run(
            lambda connection, kind=kind, values=values: alerts.judge_system(connection, kind, values)  # type: ignore[misc]
        )
    while await database.run(alerts.close_orphans):
        pass


async def dead_letters(admin: AIOKafkaAdminClient, consumer: AIOKafkaConsumer) -> dict[str, float]:
    """Of each dead letter topic, the messages that are kept and were not replayed (`shared.consumer.replay`)."""
    counts: dict[str, float] = {}
    names = [name for name in await admin.list_topics() if name.endswith(DLQ_SUFFIX)]
    for topic in await admin.describe_topics(names) if names else []:
        name = topic["topic"]
        places = [TopicPartition(name, one["partition"]) for one in topic["partitions"]]
        begins, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
        replayed = await admin.list_consumer_group_offsets(f"{name}.replay", partitions=places)
        counts[name] = sum(
            ends[place] - max(begins[place], replayed[place].offset if place in replayed else -1) for place in places
        )
    return counts
