"""Micro-batching: while one batch is in flight, the next one gathers.

A caller that comes alone waits for nobody. Under load a batch is followed by a short look for the callers
that it has just answered, as most of them are on their way back: never longer than the batch took, nor
than 50 ms, and only until about as many wait as there are. Without it callers fall into two halves that are served in
turn, in batches of half the size at the same latency.

What waits is bounded in items, in bytes and in time, and what finds the queue full is refused at once
(OVERLOADED). In time: when batches are full and yet leave something behind, more comes than can be done, and
waiting helps nobody; then who comes after the oldest has waited for `queue_seconds_max` is refused. A burst,
or a batch that takes long, is no such sign: what comes meanwhile waits. An item whose caller has gone, or
whose deadline will have passed when a batch like the last one is done, is dropped before the work begins.
Order of arrival is kept.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from prometheus_client import Histogram

from shared import metrics, telemetry
from shared.refusal import Refusal

GATHER_SHARE = 0.9
GATHER_TICK_SECONDS = 0.001
GATHER_SECONDS_MAX = 0.05
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    lines: int
    size_bytes: int
    since: float
    deadline: float
    done: asyncio.Future[Result]
    span: telemetry.Span | None


@dataclass(slots=True)
class Batcher(Generic[Item, Result]):
    """Turns many concurrent `submit`s into few calls of `handle`.

    `handle` gets the items in order of arrival and returns one result or exception for each, in the
    same order; what it raises is raised to every caller of the batch. `name` is said in refusals.
    """

    name: str
    handle: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]]
    batch_items_max: int = 512
    batch_lines_max: int = 4096
    queue_items_max: int = 4096
    queue_bytes_max: int = 32 << 20
    queue_seconds_max: float = 0.25
    _queue: deque[_Waiting[Item, Result]] = field(default_factory=deque, init=False)
    _queue_bytes: int = field(default=0, init=False)
    _left_behind: bool = field(default=False, init=False)
    _batch_seconds: float = field(default=0, init=False)
    _worker: asyncio.Task[None] | None = field(default=None, init=False)
    _items: Histogram = field(init=False)
    _waited: Histogram = field(init=False)
    _seconds: Histogram = field(init=False)

    def __post_init__(self) -> None:
        self._items = metrics.BATCH_ITEMS.labels(self.name)
        self._waited = metrics.QUEUE_SECONDS.labels(self.name)
        self._seconds = metrics.BATCH_SECONDS.labels(self.name)
        for reason in ("full", "slow", "late"):
            metrics.SHEDS.labels(self.name, reason)  # a counter is at 0 before it is at 1
        metrics.QUEUE_ITEMS.labels(self.name).set_function(lambda: len(self._queue))

    async def submit(
        self, item: Item, *, lines: int = 1, size_bytes: int = 0, seconds_left: float | None = None
    ) -> Result:
        """Wait for the item's turn and return its result; raises what `enqueue` does, and what it came to."""
        return await self.enqueue(item, lines=lines, size_bytes=size_bytes, seconds_left=seconds_left)

    def enqueue(
        self, item: Item, *, lines: int = 1, size_bytes: int = 0, seconds_left: float | None = None
    ) -> asyncio.Future[Result]:
        """Put an item into the queue, for who has many and wants no task for each.

        Raises Refusal OVERLOADED when the queue is full. The future has the item's result or exception, or
        Refusal DEADLINE_PASSED when `seconds_left` were too few for the item's batch.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if len(self._queue) >= self.queue_items_max or self._queue_bytes + size_bytes > self.queue_bytes_max:
            raise self._overloaded("full", f"more than {self.queue_items_max} calls wait", self.queue_items_max)
        if self._left_behind and now - self._queue[0].since > self.queue_seconds_max:
            raise self._overloaded(
                "slow", f"calls wait for more than {self.queue_seconds_max} s", self.queue_seconds_max
            )
        deadline = float("inf") if seconds_left is None else now + seconds_left
        waiting: _Waiting[Item, Result] = _Waiting(
            item, lines, size_bytes, now, deadline, loop.create_future(), telemetry.current()
        )
        self._queue.append(waiting)
        self._queue_bytes += size_bytes
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        return waiting.done

    async def close(self) -> None:
        """Wait until everything submitted has been answered."""
        while self._worker is not None:
            await asyncio.wait([self._worker])

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        telemetry.leave()
        while batch := self._take():
            began = loop.time()
            try:
                results = await self._handled(batch, began - batch[0].since)
            except Exception as error:  # noqa: BLE001 - raised again to each caller
                results = [error] * len(batch)
            for waiting, result in zip(batch, results, strict=True):
                if waiting.done.done():
                    continue
                if isinstance(result, Exception):
                    waiting.done.set_exception(result)
                else:
                    waiting.done.set_result(result)
            self._batch_seconds = loop.time() - began
            self._seconds.observe(self._batch_seconds)
            if len(batch) > 1:
                await self._gather(len(batch) + len(self._queue), min(self._batch_seconds, GATHER_SECONDS_MAX))
        self._worker = None

    async def _handled(
        self, batch: Sequence[_Waiting[Item, Result]], oldest_seconds: float
    ) -> Sequence[Result | Exception]:
        self._items.observe(len(batch))
        self._waited.observe(oldest_seconds)
        told = {"holdfast.batch.calls": len(batch), "holdfast.batch.oldest_seconds": oldest_seconds}
        with telemetry.batch(self.name, (waiting.span for waiting in batch), told) as span:
            results = await self.handle([waiting.item for waiting in batch])
            assert len(results) == len(batch), f"{self.name}: not one result for each item"
            if span:
                span.set_attribute("holdfast.batch.refused", sum(isinstance(one, Exception) for one in results))
            return results

    async def _gather(self, callers: int, seconds_max: float) -> None:
        """Wait until most of the callers there are have come (back), at most `seconds_max`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds_max
        while len(self._queue) < callers * GATHER_SHARE and (now := loop.time()) < until:
            await asyncio.sleep(min(GATHER_TICK_SECONDS, until - now))

    def _take(self) -> list[_Waiting[Item, Result]]:
        answered_at = asyncio.get_running_loop().time() + (self._batch_seconds if len(self._queue) > 1 else 0)
        batch: list[_Waiting[Item, Result]] = []
        lines = 0
        while self._queue and len(batch) < self.batch_items_max:
            waiting = self._queue[0]
            if batch and lines + waiting.lines > self.batch_lines_max:
                break
            self._queue.popleft()
            self._queue_bytes -= waiting.size_bytes
            if waiting.done.done():
                continue
            if waiting.deadline <= answered_at:
                metrics.SHEDS.labels(self.name, "late").inc()
                waiting.done.set_exception(Refusal("DEADLINE_PASSED", "the caller's time is too short for the work"))
                continue
            batch.append(waiting)
            lines += waiting.lines
        self._left_behind = bool(self._queue)
        if not batch:
            # Nothing could be in time for a batch like the last one: the next is not judged by it.
            self._batch_seconds = 0
        return batch

    def _overloaded(self, why: str, message: str, limit: float) -> Refusal:
        metrics.SHEDS.labels(self.name, why).inc()
        return Refusal("OVERLOADED", f"{message}; come back later", queue=self.name, limit=limit)
