"""Threads for what blocks: one for each call, of which there are so many at the most. A call that hangs keeps neither
another one waiting nor the process from ending; an executor's threads would do both.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Value = TypeVar("Value")


class TooManyHangError(Exception):
    """Every thread that there may be is taken."""


class Threads:
    """At most `most` at once."""

    def __init__(self, most: int, name: str) -> None:
        self._room = threading.BoundedSemaphore(most)
        self._name = name

    async def run(self, call: Callable[[], Value]) -> Value:
        """What a call returns or raises. Who no longer waits leaves its thread to its end. Raises TooManyHangError."""
        if not self._room.acquire(blocking=False):
            raise TooManyHangError
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Value] = loop.create_future()

        def tell(value: Value | None, error: BaseException | None) -> None:
            if outcome.done():
                return
            if error is None:
                outcome.set_result(value)  # type: ignore[arg-type] # there is one where there is no error
            else:
                outcome.set_exception(error)

        def work() -> None:
            value, error = None, None
            try:
                value = call()
            except Exception as raised:  # noqa: BLE001 - whoever waits is told
                error = raised
            finally:
                self._room.release()
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, value, error)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return await outcome
