"""How workers are kept going, on a clock that does not wait."""

import asyncio
from collections.abc import Iterator

from shared import workers
from tests.model.sim_loop import SimLoop, run


def test_a_turn_that_was_held_up_is_not_rested_for() -> None:
    """A turn is rested for as long as it took; one that hung on a frozen database, a quarter of a second at most."""
    loop = SimLoop(1)
    turns: Iterator[float] = iter([0.1, 3, 0])
    began = []

    async def work() -> int:
        began.append(loop.time())
        seconds = next(turns)
        await asyncio.sleep(seconds)
        return round(seconds * 10)

    run(loop, workers.in_turns("done", work))
    rests = [round(after - before - took, 6) for before, after, took in zip(began, began[1:], (0.1, 3), strict=False)]
    assert rests == [0.1, workers.REST_SECONDS_MAX]


def test_a_worker_that_fails_starts_again_when_it_would_have_looked_again() -> None:
    """Not later: a sweeper is there again as soon as its database. A library's own cancellation ends it no more."""
    loop = SimLoop(1)
    began = []

    async def work() -> None:
        began.append(loop.time())
        if len(began) == 3:
            task = asyncio.current_task()
            assert task
            task.cancel()
            await asyncio.sleep(1)
        raise OSError("away") if len(began) == 1 else asyncio.CancelledError

    async def main() -> None:
        await asyncio.wait([asyncio.ensure_future(workers.restarting("work", work, 0.25))])

    run(loop, main())
    assert began == [0, 0.25, 0.5]
