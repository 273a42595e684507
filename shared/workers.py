"""How a pod's workers are kept going: alone where one is enough, again after a fault, until cancelled."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import structlog

from shared import metrics
from shared.cancellation import cancelled
from shared.database import Connection, Database
from shared.kafka import Brokers, stop
from shared.lock import run_alone
from shared.outbox import OUTBOX, Relay, Source, producer
from shared.redis_client import Client

log = structlog.get_logger(__name__)
RESTART_SECONDS = 1.0
REST_SECONDS_MAX = 0.25
MEASURE_SECONDS = 5.0
OUTBOX_AGE = "SELECT extract(epoch FROM clock_timestamp() - created_at)::float8 FROM {table} ORDER BY id LIMIT 1"
Work = Callable[[], Awaitable[None]]


async def forever(work: Work, seconds: float) -> None:
    """Do `work`, wait, and do it again."""
    while True:
        await work()
        await asyncio.sleep(seconds)


async def turns(rest: float, rest_seconds_max: float = math.inf) -> AsyncIterator[None]:
    """For a loop of heavy turns: between two of them rest `rest` times as long as the first took."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        yield
        await asyncio.sleep(min((loop.time() - began) * rest, rest_seconds_max))


async def in_turns(what: str, work: Callable[[], Awaitable[int]]) -> None:
    """Do `work` until it finds nothing to do, resting as long as each turn took: callers come first.

    But no longer than REST_SECONDS_MAX: a turn that a database held up was not heavy.
    """
    async for _ in turns(1, REST_SECONDS_MAX):
        count = await work()
        if not count:
            break
        log.info(what, count=count)


async def restarting(name: str, work: Work, seconds: float = RESTART_SECONDS) -> None:
    """Keep a worker going: a fault is logged, and after `seconds` it starts again.

    A cancellation that nobody asked for is a fault too: aiokafka lets one of its own out at times.
    """
    while True:
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:
            if cancelled():
                raise
            metrics.WORKER_RESTARTS.labels(name).inc()
            for one in _leaves(error):
                log.warning("worker starts again", worker=name, error=type(one).__name__, message=str(one))
        await asyncio.sleep(seconds)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """An error, or those that a group of errors is of."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


async def alone(client: Client, name: str, work: Work, *, lock_ttl_seconds: float) -> None:
    """As `restarting`, on one pod at a time where Redis can tell; `name` is the lock's."""

    async def once(_token: int) -> None:
        await restarting(name, work)

    await run_alone(client, name, once, ttl_seconds=lock_ttl_seconds)


async def measuring(
    database: Database, outboxes: Sequence[str], measure: Callable[[Connection], Awaitable[None]] | None = None
) -> None:
    """Keep the gauges of a service's database fresh, on every pod: what nobody works on is to be seen as well."""

    async def once() -> None:
        async with database.connection() as connection:
            for table in outboxes:
                age = await connection.fetchval(OUTBOX_AGE.format(table=table))
                metrics.OUTBOX_AGE_SECONDS.labels(table).set(max(0, age or 0))
            if measure:
                await measure(connection)

    await restarting("measures", lambda: forever(once, MEASURE_SECONDS))


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
        await stop(sender)
