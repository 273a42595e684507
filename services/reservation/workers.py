"""What reservation does without being asked: relay, book expiries, drive on what was left half done, release.

Each but the last runs on one pod at a time, by a lock in Redis that saves work and decides nothing.
"""

import asyncio

from services.reservation import codec
from services.reservation.commands import Commands
from services.reservation.domain import Reason
from services.reservation.settings import Settings
from shared import workers
from shared.consumer import Batch, Bury, Busy, Consumer, Poison
from shared.database import Database
from shared.redis_client import Client
from shared.refusal import Refusal

GROUP = "holdfast.reservation.verdicts"
DLQ_TOPIC = "holdfast.reservation.dlq"
AWAY = {Reason.DATABASE_UNAVAILABLE, Reason.INVENTORY_UNAVAILABLE}
ENDED = {Reason.RESERVATION_NOT_FOUND, Reason.RESERVATION_NOT_HELD, Reason.RESERVATION_EXPIRED}


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
        work = {
            "relay": lambda: workers.relay(
                self._database,
                settings.brokers,
                settings.pod,
                settings.relay_poll_seconds,
                watermark_topic=codec.CHANGES_TOPIC,
            ),
            "sweeper": lambda: workers.forever(
                lambda: workers.in_turns("reservations expired", self._commands.expire), settings.sweep_poll_seconds
            ),
            "driver": lambda: workers.forever(
                lambda: workers.in_turns(
                    "changes driven on", lambda: self._commands.drive_on(settings.pending_seconds_min)
                ),
                max(settings.pending_seconds_min / 2, 0.1),
            ),
        }
        async with asyncio.TaskGroup() as group:
            for name, job in work.items():
                group.create_task(
                    workers.alone(self._redis, f"reservation:{name}", job, lock_ttl_seconds=settings.lock_ttl_seconds)
                )
            group.create_task(workers.restarting("releases", self._releases().run))
            group.create_task(workers.measuring(self._database, ("outbox",)))

    def _releases(self) -> Consumer:
        return Consumer(
            self._settings.brokers,
            [codec.VERDICTS_TOPIC],
            GROUP,
            DLQ_TOPIC,
            lambda batch, bury: release(self._commands, batch, bury),
        )


async def release(commands: Commands, batch: Batch, bury: Bury) -> None:
    """Cancel what decided cases release; what is not held any more is done. Bury what is unreadable.

    Raises Busy while the database or inventory is away.
    """
    for message in batch.messages:
        try:
            changes = codec.releases(message)
        except Poison as poison:
            await bury(message, poison)
            continue
        try:
            outcomes = await commands.change(changes) if changes else []
        except Refusal as away:
            outcomes = [away]
        for refusal in [outcome for outcome in outcomes if isinstance(outcome, Refusal)]:
            if refusal.reason in AWAY:
                raise Busy(refusal.message)
            if refusal.reason not in ENDED:
                await bury(message, Poison(f"{refusal.reason}: {refusal.message}"))
