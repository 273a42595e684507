"""An event loop whose clock is virtual and whose order is chosen by a seed.

When nothing is ready the clock jumps to the next timer, so that hours pass in the time that their events take.
Ready callbacks run in an order that the seed shuffles. Tasks are numbered, and hashed by their number: what
asyncio keeps in sets of tasks comes in the same order in every run.
"""

import asyncio
import collections
import contextvars
import gc
import random
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")


class StuckError(Exception):
    """Nothing is ready and no timer is set: what is waited for can never come."""


class SimTask(asyncio.Task[Any]):
    """A task with a number in place of its address."""

    def __init__(self, number: int, *arguments: Any, **keywords: Any) -> None:
        self.number = number
        super().__init__(*arguments, **keywords)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimLoop(asyncio.BaseEventLoop):
    """Deterministic: the same seed and the same coroutine make the same steps."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._now = 0.0
        self._shuffle = random.Random(seed).shuffle
        self._selector = self
        self._ready: collections.deque[asyncio.Handle]
        self._tasks = 0
        self.on_task: Callable[[asyncio.Task[Any], contextvars.Context], None] = lambda _task, _context: None
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[object]:
        """What the base class asks before each turn: wait for events, which here never come."""
        if timeout is None:
            raise StuckError
        self._now += timeout
        if len(self._ready) > 1:
            self._shuffle(self._ready)
        return []

    def _process_events(self, _events: list[object]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""

    def _make_task(
        self,
        _loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        context: contextvars.Context | None = None,
    ) -> SimTask:
        self._tasks += 1
        context = context or contextvars.copy_context()
        task = SimTask(self._tasks, coroutine, loop=self, context=context)
        self.on_task(task, context)
        return task


def run(loop: SimLoop, main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end, then cancel what it left behind, and close the loop.

    Meanwhile no garbage is collected: when it would be is not the seed's choice.
    """
    asyncio.set_event_loop(loop)
    gc.disable()
    try:
        return loop.run_until_complete(main)
    finally:
        left = sorted(asyncio.all_tasks(loop), key=lambda task: getattr(task, "number", 0))
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        gc.enable()
        asyncio.set_event_loop(None)
        loop.close()
