"""What reservation does without being asked: relay, book expiries, drive on what was left half done.

Each runs on one pod at a time, by a lock in Redis that saves work and decides nothing.
"""

import asyncio

import redis.asyncio as redis

from services.reservation import codec
from services.reservation.commands import Commands
from services.reservation.settings import Settings
from shared import workers
from shared.database import Database


class Workers:
    """Tasks that `run` keeps going until it is cancelled."""

    def __init__(self, settings: Settings, database: Database, commands: Commands, client: redis.Redis) -> None:
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
                settings.kafka_bootstrap,
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
