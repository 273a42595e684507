"""A part goes away under load: nobody who calls the services hears a wrong answer, or none."""

import asyncio
import os
import signal
import time

from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import Stack
from deploy.local.supervisor import Supervisor
from shared.channel import KEEPALIVE_ANSWER_MS_MAX, KEEPALIVE_MS
from shared.client import Holdfast
from tests.e2e.shop import goods, new, stock

CALLERS = 16
ROUNDS = 12
PING_SECONDS = (KEEPALIVE_MS + KEEPALIVE_ANSWER_MS_MAX) / 1000
BUSY_SECONDS = 5.0  # what the calls themselves may take on a busy machine


async def test_redis_stopped_under_load_is_slower_and_never_wrong(holdfast: Holdfast, stack: Stack) -> None:
    """While Redis does not answer, holds are placed and every caller reads what it has written."""
    sku = await goods(holdfast, 1_000_000)
    redis_pid = stack.pids["Redis"]

    async def shopper() -> None:
        for _ in range(ROUNDS):
            assert (await holdfast.reserve(new(), [(sku, "MAIN", 1)])).outcome == rp.RESERVE_OUTCOME_HELD
            before = await stock(holdfast, sku)
            assert before.held == before.version - 1
            assert (await stock(holdfast, sku, min_version=before.version)).version >= before.version

    shoppers = [asyncio.ensure_future(shopper()) for _ in range(CALLERS)]
    os.kill(redis_pid, signal.SIGSTOP)
    try:
        await asyncio.gather(*shoppers)
    finally:
        os.kill(redis_pid, signal.SIGCONT)
    seen = await stock(holdfast, sku, min_version=1 + CALLERS * ROUNDS)
    assert seen.held == CALLERS * ROUNDS


async def test_a_pod_that_stands_still_is_left_for_the_others(holdfast: Holdfast, pods: Supervisor) -> None:
    """A call that it got is answered by another pod once it misses a ping; then nobody goes to it any more."""
    sku = await goods(holdfast, 1_000_000)
    for service in ("inventory", "reservation"):
        frozen = next(pod.pid for pod in pods.pods if pod.service.name == service)
        assert frozen
        began = time.monotonic()
        os.kill(frozen, signal.SIGSTOP)
        try:
            first = await asyncio.gather(*(holdfast.reserve(new(), [(sku, "MAIN", 1)]) for _ in range(CALLERS)))
            assert time.monotonic() - began < PING_SECONDS + BUSY_SECONDS
            began = time.monotonic()
            later = [await holdfast.reserve(new(), [(sku, "MAIN", 1)]) for _ in range(CALLERS)]
            assert time.monotonic() - began < PING_SECONDS, "somebody waited for a ping"
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert {answer.outcome for answer in first + later} == {rp.RESERVE_OUTCOME_HELD}
    held = (await stock(holdfast, sku, min_version=1 + 4 * CALLERS)).held
    assert held == 4 * CALLERS
