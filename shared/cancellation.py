"""That a task ends when it is told to, also where a library loses the cancellation or lets out one of its own.

What is cancelled once and then waited for, as every worker of a pod that stops is, would otherwise keep its pod.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any


def cancelled() -> bool:
    """Whether somebody wants the current task to end."""
    task = asyncio.current_task()
    return bool(task and task.cancelling())


async def cancellable(call: Awaitable[Any]) -> Any:
    """What a call answers; a cancellation ends it for certain.

    Before Python 3.12 `asyncio.wait_for`, through which redis-py sends, loses one that comes just when it is done.
    `asyncio.wait` loses none.
    """
    asking = asyncio.ensure_future(call)
    try:
        await asyncio.wait([asking])
    except asyncio.CancelledError:
        asking.cancel()
        await asyncio.wait([asking])
        raise
    return asking.result()
