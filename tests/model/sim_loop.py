"""An event loop whose clock is virtual and whose order is chosen by a seed.

When nothing is ready the clock jumps to the next timer, so that hours pass in the time that their events take.
Ready callbacks run in an order that the seed shuffles. Tasks are numbered, and hashed by their number: what
asyncio keeps in sets of tasks comes in the same order in every run.
"""

import asyncio
import collections
import contextvars
import gc
import heapq
import itertools
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


class SimHandle(asyncio.TimerHandle):
    """A callback that is to be run. It has what the loop needs and no more."""

    __slots__ = ("arguments", "callback", "context", "dead")

    def __init__(self, callback: Any, arguments: tuple[Any, ...], context: contextvars.Context) -> None:
        self.callback = callback
        self.arguments = arguments
        self.context = context
        self.dead = False

    def cancel(self) -> None:
        self.dead = True
        self.callback, self.arguments = None, ()

    def cancelled(self) -> bool:
        return self.dead


class SimLoop(asyncio.BaseEventLoop):
    """Deterministic: the same seed and the same coroutine make the same steps.

    Scheduling is said again, in fewer steps than the base class takes: most of a simulation's time is spent in it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._now = 0.0
        self._shuffle = random.Random(seed).shuffle
        self._ready: collections.deque[SimHandle]
        self._timers: list[tuple[float, int, SimHandle]] = []
        self._numbers = itertools.count()
        self._tasks = 0
        self.on_task: Callable[[asyncio.Task[Any], contextvars.Context], None] = lambda _task, _context: None
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Any, *arguments: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        handle = SimHandle(callback, arguments, contextvars.copy_context() if context is None else context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment] # there is one thread

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *arguments: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        return self.call_at(self._now + delay, callback, *arguments, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *arguments: Any, context: contextvars.Context | None = None
    ) -> SimHandle:
        handle = SimHandle(callback, arguments, contextvars.copy_context() if context is None else context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def after(self, seconds: float) -> asyncio.Future[None]:
        """Done when so many seconds have passed; what it is that waits need not be woken to cancel a timer."""
        future = self.create_future()
        self.call_later(seconds, _done, future)
        return future

    def _run_once(self) -> None:
        """One turn: what is ready, in an order that is drawn; when nothing is, first the clock jumps."""
        ready, timers = self._ready, self._timers
        if len(ready) > 1:
            self._shuffle(ready)
        while timers and timers[0][2].dead:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise StuckError
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.dead:
                try:
                    handle.context.run(handle.callback, *handle.arguments)
                except Exception as error:  # noqa: BLE001 - as the base class does
                    self.call_exception_handler({"message": "a callback failed", "exception": error})

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""

    def _make_task(
        self,
        _loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        context: contextvars.Context | None = None,
    ) -> SimTask:
        self._tasks += 1
        if context is None:  # one that is empty is false
            context = contextvars.copy_context()
        task = SimTask(self._tasks, coroutine, loop=self, context=context)
        self.on_task(task, context)
        return task


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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
