"""What inventory does without being asked: relay, sweep, reconcile, make partitions, obey commands.

Relay, sweeper, reconciler and partitions run on one pod at a time, by a lock in Redis that saves work
and decides nothing: two at once do no harm, and with Redis away each pod runs its own.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import redis.asyncio as redis
import structlog
from google.protobuf.message import DecodeError
from holdfast.inventory.v1 import events_pb2

from services.inventory import codec, requests, store
from services.inventory.commands import Commands
from services.inventory.domain import Adjustment, Reason
from services.inventory.settings import Settings
from shared import check
from shared.consumer import Busy, Consumer, Message, Poison
from shared.database import Database
from shared.lock import run_alone
from shared.outbox import Relay, producer
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
MONTHS_AHEAD = 3
RECONCILE_KEYS = 1_000
GROUP = "holdfast.inventory"


class Workers:
    """Tasks that `run` keeps going until it is cancelled."""

    def __init__(self, settings: Settings, database: Database, commands: Commands, client: redis.Redis) -> None:
        self._settings = settings
        self._database = database
        self._commands = commands
        self._redis = client

    async def run(self) -> None:
        """Run every worker; a fault in one is logged and it starts again, the others go on."""
        alone: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "relay": self._relay,
            "sweeper": lambda: _forever(self._sweep, self._settings.sweep_poll_seconds),
            "reconciler": lambda: _forever(self._reconcile, self._settings.reconcile_poll_seconds),
            "partitions": lambda: _forever(self._partitions, 3600),
        }
        async with asyncio.TaskGroup() as group:
            for name, work in alone.items():
                group.create_task(self._alone(name, work))
            group.create_task(_restarting("commands", self._obey))

    async def _alone(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def once(_token: int) -> None:
            await _restarting(name, work)

        await run_alone(self._redis, f"inventory:{name}", once, ttl_seconds=self._settings.lock_ttl_seconds)

    async def _relay(self) -> None:
        sender = producer(self._settings.kafka_bootstrap, self._settings.pod)
        try:
            await sender.start()
            await Relay(self._database, sender).run(poll_seconds=self._settings.relay_poll_seconds)
        finally:
            await sender.stop()

    async def _sweep(self) -> None:
        while swept := await self._commands.sweep():
            log.info("holds expired", rows=swept)

    async def _partitions(self) -> None:
        async with self._database.connection() as connection:
            await store.make_partitions(connection, datetime.now(UTC), MONTHS_AHEAD)

    async def _reconcile(self) -> None:
        """Compare counters, ledger and holds of every key; say where they differ. Changes nothing."""
        after, drifted = ("", ""), 0
        while True:
            async with self._database.connection() as connection:
                rows = await connection.fetch(store.DRIFT, *after, RECONCILE_KEYS)
            for row in rows:
                if row["on_hand_drift"] or row["held_drift"] or row["hold_drift"]:
                    drifted += 1
                    log.error("drift", **dict(row))
            if len(rows) < RECONCILE_KEYS:
                break
            after = (rows[-1]["sku"], rows[-1]["location"])
        log.debug("reconciled", drifted=drifted)

    async def _obey(self) -> None:
        await Consumer(
            self._settings.kafka_bootstrap,
            codec.COMMANDS_TOPIC,
            GROUP,
            f"{codec.COMMANDS_TOPIC}.dlq",
            lambda messages: obey(self._commands, messages),
            dlq_messages_max=self._settings.dlq_messages_max,
        ).run()


async def obey(commands: Commands, messages: Sequence[Message]) -> list[Poison | None]:
    """Apply commands in order, each once; a refused or unreadable one is poison, with its reason.

    Raises Busy while the database is away.
    """
    parsed = [_parse(message) for message in messages]
    good = [ask for ask in parsed if isinstance(ask, Adjustment)]
    try:
        answers = iter(await commands.adjust(good) if good else [])
    except Refusal as refusal:
        if refusal.reason == Reason.DATABASE_UNAVAILABLE:
            raise Busy(refusal.message) from refusal
        raise
    outcomes: list[Poison | None] = []
    for ask in parsed:
        answer = next(answers) if isinstance(ask, Adjustment) else ask
        outcomes.append(Poison(f"{answer.reason}: {answer.message}") if isinstance(answer, Refusal) else None)
    return outcomes


def _parse(message: Message) -> Adjustment | Refusal:
    try:
        command = events_pb2.StockCommand.FromString(message.value or b"")
        source = check.code(command.source, "source")
        source_id = check.code(command.source_id, "source_id")
        ask = requests.adjustment(command.adjustment, "adjustment", f"{source}:{source_id}")
    except DecodeError:
        return Refusal(Reason.FIELD_INVALID, "not a StockCommand", field="value")
    except Refusal as refusal:
        return refusal
    return ask


async def _forever(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        await work()
        await asyncio.sleep(seconds)


async def _restarting(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Keep a worker going: a fault waits a second and starts it again."""
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - whatever it was, the worker must come back
            log.warning("worker starts again", worker=name, error=type(error).__name__, message=str(error))
        await asyncio.sleep(1)
