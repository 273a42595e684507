"""WatchStock: a snapshot of each key, then its movements out of the ledger, in order and without gaps.

The ledger is the source, not a broadcast: nothing is missed while nobody watches, and a caller resumes
after any version that the ledger still has, on any pod. A stream looks again after `poll_seconds`; one
statement tells which of its keys have moved.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime

from services.inventory import store
from services.inventory.domain import Key, Movement, Reason, Stock
from shared.database import Database
from shared.refusal import Refusal
from shared.slots import Slots

MOVEMENTS_MAX = 5_000  # read at a time, of all keys of a stream


class Watch:
    """Streams of movements; at most `streams_max` at once."""

    def __init__(self, database: Database, *, poll_seconds: float, streams_max: int) -> None:
        self._database = database
        self._poll_seconds = poll_seconds
        self._slots = Slots("watch", streams_max, "too many watch streams on this pod")

    async def follow(self, keys: Sequence[tuple[Key, int]]) -> AsyncIterator[tuple[Stock | Movement, datetime]]:
        """Stock of each key whose version is 0, then movements of every key after its version, for ever."""
        with self._slots.take():
            async with self._database.connection() as connection:
                stocks = await store.read_stock(connection, [key for key, _ in keys])
            versions: dict[Key, int] = {}
            for key, version in keys:
                stock, as_of = stocks[key]
                if version > stock.version:
                    raise _gone(key, version)
                versions[key] = version or stock.version
                if not version:
                    yield stock, as_of
            while True:
                async with self._database.connection() as connection:
                    moved = await store.movements_after(connection, versions, MOVEMENTS_MAX)
                for movement, time in moved:
                    key = movement.after.key
                    if movement.after.version != versions[key] + 1:
                        raise _gone(key, versions[key])
                    versions[key] += 1
                    yield movement, time
                if not moved:
                    await asyncio.sleep(self._poll_seconds)


def _gone(key: Key, version: int) -> Refusal:
    sku, location = key
    return Refusal(
        Reason.WATCH_VERSION_GONE,
        f"movements of {sku} at {location} after version {version} are not there; watch from a snapshot",
        sku=sku,
        location=location,
        version=version,
    )
