"""What inventory does without being asked: relay, sweep, reconcile, make partitions, obey commands.

Relays, reconciler and partitions run on one pod at a time, by a lock in Redis that saves work and decides
nothing: two at once do no harm, and with Redis away each pod runs its own. The sweeper runs on every pod:
a look for what is due costs less than the seconds that a dead pod's lock would keep stock from being sold.
"""

import asyncio
import dataclasses
from datetime import UTC, datetime

import structlog
from google.protobuf.message import DecodeError
from holdfast.inventory.v1 import events_pb2

from services.inventory import codec, requests, store
from services.inventory.commands import Commands
from services.inventory.domain import Adjustment, Reason
from services.inventory.settings import Settings
from shared import check, metrics, partitions, workers
from shared.consumer import Batch, Bury, Busy, Consumer, Message, Poison
from shared.database import Connection, Database
from shared.outbox import OUTBOX, Group, Source
from shared.redis_client import Client
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
MONTHS_AHEAD = 3
PARTITIONS_SECONDS = 3600
GROUP = "holdfast.inventory"


async def unsent_movements(connection: Connection, groups_max: int) -> list[Group]:
    """The oldest movements to be sent, as events made from their rows of the ledger."""
    return [
        Group(number, event_id, codec.MOVEMENTS_TOPIC, codec.MOVED_TYPE, *codec.moved(movements), traceparent)
        for (number, event_id, traceparent), movements in await store.unsent_movements(connection, groups_max)
    ]


MOVEMENTS = Source(unsent_movements, store.DELETE_SENT_MOVEMENTS)


class Workers:
    """Tasks that `run` keeps going until it is cancelled."""

    def __init__(self, settings: Settings, database: Database, commands: Commands, client: Client) -> None:
        self._settings = settings
        self._database = database
        self._commands = commands
        self._redis = client

    async def run(self) -> None:
        """Run every worker; a fault in one is logged and it starts again, the others go on."""
        settings = self._settings

        def relay(source: Source, watermark_topic: str = "") -> workers.Work:
            brokers, poll_seconds = settings.brokers, settings.relay_poll_seconds
            return lambda: workers.relay(self._database, brokers, settings.pod, poll_seconds, source, watermark_topic)

        alone: dict[str, workers.Work] = {
            "movements": relay(MOVEMENTS, codec.MOVEMENTS_TOPIC),
            "catalog": relay(OUTBOX),
            "reconciler": self._reconciling,
            "partitions": lambda: workers.forever(self._partitions, PARTITIONS_SECONDS),
        }
        async with asyncio.TaskGroup() as group:
            for name, work in alone.items():
                group.create_task(
                    workers.alone(self._redis, f"inventory:{name}", work, lock_ttl_seconds=settings.lock_ttl_seconds)
                )
            group.create_task(workers.restarting("sweeper", self._sweeping, settings.sweep_poll_seconds))
            group.create_task(workers.restarting("commands", self._commands_consumer().run))
            group.create_task(workers.measuring(self._database, ("movement_outbox", "outbox"), measure))

    async def _sweeping(self) -> None:
        await workers.forever(
            lambda: workers.in_turns("holds expired", self._commands.sweep), self._settings.sweep_poll_seconds
        )

    async def _partitions(self) -> None:
        try:
            async with self._database.connection() as connection:
                await store.make_partitions(connection, datetime.now(UTC), MONTHS_AHEAD)
        except partitions.IN_USE:
            log.warning("months are made later, as their table is in use", table="movement")

    async def _reconciling(self) -> None:
        with metrics.measured(metrics.DRIFT_UNITS):
            await workers.forever(self._reconcile, self._settings.reconcile_poll_seconds)

    async def _reconcile(self) -> None:
        drifted, first = await self._commands.reconcile()
        metrics.DRIFT_UNITS.labels("ledger").set(sum(drift.units for drift in first))
        if drifted:
            log.error("keys drift", keys=drifted, shown=len(first))
        for drift in first:
            log.error("drift", **dataclasses.asdict(drift))

    def _commands_consumer(self) -> Consumer:
        return Consumer(
            self._settings.brokers,
            [codec.COMMANDS_TOPIC],
            GROUP,
            f"{codec.COMMANDS_TOPIC}.dlq",
            lambda batch, bury: obey(self._commands, batch, bury),
            dlq_messages_max=self._settings.dlq_messages_max,
        )


async def measure(connection: Connection) -> None:
    """The gauges of holds."""
    count, overdue_seconds = await store.measure_holds(connection)
    metrics.HOLDS_OPEN.set(count)
    metrics.EXPIRY_OVERDUE_SECONDS.set(overdue_seconds)


async def obey(commands: Commands, batch: Batch, bury: Bury) -> None:
    """Apply commands in order, each once; bury what is refused or unreadable, with its reason.

    Raises Busy while the database is away.
    """
    parsed = [_parse(message) for message in batch.messages]
    good = [ask for ask in parsed if isinstance(ask, Adjustment)]
    try:
        answers = iter(await commands.adjust(good) if good else [])
    except Refusal as refusal:
        if refusal.reason == Reason.DATABASE_UNAVAILABLE:
            raise Busy(refusal.message) from refusal
        raise
    for message, ask in zip(batch.messages, parsed, strict=True):
        answer = next(answers) if isinstance(ask, Adjustment) else ask
        if isinstance(answer, Refusal):
            await bury(message, Poison(f"{answer.reason}: {answer.message}"))


def _parse(message: Message) -> Adjustment | Refusal:
    try:
        command = events_pb2.StockCommand.FromString(message.value or b"")
        source = check.code(command.source, "source")
        source_id = check.code(command.source_id, "source_id")
        if command.HasField("time") and not command.adjustment.HasField("occur_time"):
            command.adjustment.occur_time.CopyFrom(command.time)
        # No code has a space: neither does another source's id come out the same, nor that of a caller.
        ask = requests.adjustment(command.adjustment, "adjustment", f"{source} {source_id}")
    except DecodeError:
        return Refusal(Reason.FIELD_INVALID, "not a StockCommand", field="value")
    except Refusal as refusal:
        return refusal
    return ask
