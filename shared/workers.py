"""How a pod's workers are kept going: alone where one is enough, again after a fault, until cancelled."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import redis.asyncio as redis
import structlog

from shared.database import Database
from shared.kafka import Brokers
from shared.lock import run_alone
from shared.outbox import OUTBOX, Relay, Source, producer

log = structlog.get_logger(__name__)
RESTART_SECONDS = 1.0
Work = Callable[[], Awaitable[None]]


async def forever(work: Work, seconds: float) -> None:
    """Do `work`, wait, and do it again."""
    while True:
        await work()
        await asyncio.sleep(seconds)


async def turns(rest: float) -> AsyncIterator[None]:
    """For a loop of heavy turns: between two of them rest `rest` times as long as the first took."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        yield
        await asyncio.sleep((loop.time() - began) * rest)


async def in_turns(what: str, work: Callable[[], Awaitable[int]]) -> None:
    """Do `work` until it finds nothing to do, resting as long as each turn took: callers come first."""
    async for _ in turns(rest=1):
        count = await work()
        if not count:
            break
        log.info(what, count=count)


async def restarting(name: str, work: Work) -> None:
    """Keep a worker going: a fault is logged, and after a second it starts again."""
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - whatever it was, the worker must come back
            for one in _leaves(error):
                log.warning("worker starts again", worker=name, error=type(one).__name__, message=str(one))
        await asyncio.sleep(RESTART_SECONDS)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """An error, or those that a group of errors is of."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


async def alone(client: redis.Redis, name: str, work: Work, *, lock_ttl_seconds: float) -> None:
    """As `restarting`, on one pod at a time where Redis can tell; `name` is the lock's."""

    async def once(_token: int) -> None:
        await restarting(name, work)

    await run_alone(client, name, once, ttl_seconds=lock_ttl_seconds)


async def relay(
    database: Database,
    brokers: Brokers,
    client_id: str,
    poll_seconds: float,
    source: Source = OUTBOX,
    watermark_topic: str = "",
) -> None:
    """Move what waits to Kafka until cancelled. Raises KafkaError when the brokers cannot be found."""
    sender = producer(brokers, client_id)
    try:
        await sender.start()
        await Relay(database, sender, source, watermark_topic).run(poll_seconds=poll_seconds)
    finally:
        await sender.stop()
