"""A lock in Redis for workers of which one at a time is enough. For efficiency only.

It has an expiry, is renewed while it is held, and hands out a fencing token that grows with every
holder. It decides nothing: a paused holder may wake after its lock has passed on, and with Redis away
each pod works as if it held the lock. Every worker under it must therefore do no harm when two run.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Iterator

import structlog

from shared import metrics
from shared.cancellation import cancellable
from shared.redis_client import AWAY, Client

log = structlog.get_logger(__name__)

# KEYS: lock, counter; ARGV: owner, life in ms. The token, or 0 when someone else has it.
TAKE = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return redis.call('INCR', KEYS[2]) end
return 0
"""
# 1 when the owner still had it.
RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Lock:
    """One contender for the lock `name`. Redis being away raises what redis-py raises."""

    def __init__(self, client: Client, name: str, *, ttl_seconds: float) -> None:
        self._keys = [f"lock:{{{name}}}", f"lock:{{{name}}}:token"]
        self._owner = uuid.uuid4().hex
        self._ttl_ms = int(ttl_seconds * 1000)
        self._take = client.register_script(TAKE)
        self._renew = client.register_script(RENEW)
        self._release = client.register_script(RELEASE)

    async def take(self) -> int:
        """The fencing token, above every earlier one; 0 when another owner has the lock."""
        return int(await cancellable(self._take(keys=self._keys, args=[self._owner, self._ttl_ms])))

    async def renew(self) -> bool:
        """Start its life anew; False when it has passed on."""
        return bool(await cancellable(self._renew(keys=self._keys[:1], args=[self._owner, self._ttl_ms])))

    async def release(self) -> None:
        """Give it up, if it is still ours."""
        await cancellable(self._release(keys=self._keys[:1], args=[self._owner]))


async def run_alone(client: Client, name: str, work: Callable[[int], Awaitable[None]], *, ttl_seconds: float) -> None:
    """Run `work(token)` whenever the lock is ours, for ever; cancel it when the lock is lost.

    With Redis away the work runs all the same, with token 0. What `work` raises ends it and is raised.
    """
    lock = Lock(client, name, ttl_seconds=ttl_seconds)
    while True:
        try:
            token = await lock.take()
        except AWAY as error:
            log.warning("working without lock", lock=name, error=type(error).__name__)
            with _held(name):
                await _while(work, 0, lambda: _still_away(lock), ttl_seconds / 3)
            continue
        if token:
            log.info("lock taken", lock=name, token=token)
            try:
                with _held(name):
                    await _while(work, token, lambda: _still_ours(lock), ttl_seconds / 3)
                metrics.LOCKS_LOST.labels(name).inc()
            finally:
                with contextlib.suppress(*AWAY):
                    await lock.release()
        else:
            await asyncio.sleep(ttl_seconds / 3)


@contextlib.contextmanager
def _held(name: str) -> Iterator[None]:
    held = metrics.LOCKS_HELD.labels(name)
    held.set(1)
    try:
        yield
    finally:
        held.set(0)


async def _while(
    work: Callable[[int], Awaitable[None]],
    token: int,
    wanted: Callable[[], Awaitable[bool]],
    every_seconds: float,
) -> None:
    task = asyncio.ensure_future(work(token))
    try:
        while True:
            done, _ = await asyncio.wait([task], timeout=every_seconds)
            if done:
                return await task
            if not await wanted():
                return None
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _still_ours(lock: Lock) -> bool:
    """Redis going away under a holder changes nothing: nobody else can take the lock there either."""
    try:
        return await lock.renew()
    except AWAY:
        return True


async def _still_away(lock: Lock) -> bool:
    try:
        await lock.release()
    except AWAY:
        return True
    return False
