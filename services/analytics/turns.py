"""Turns: only so many heavy reads at once on a pod, and only so many that wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.analytics.domain import Reason
from shared.refusal import Refusal


class Turns:
    """At most `most` at once, and `waiting_max` more that wait."""

    def __init__(self, most: int, waiting_max: int) -> None:
        self._turns = asyncio.Semaphore(most)
        self._waiting_max = waiting_max
        self._waiting = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn. Raises Refusal OVERLOADED when too many wait."""
        limit = self._waiting_max
        if self._turns.locked() and self._waiting >= limit:
            raise Refusal(
                Reason.OVERLOADED, f"more than {limit} reports wait; come back later", queue="reports", limit=limit
            )
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()
