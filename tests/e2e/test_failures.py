"""A part goes away under load: nobody who calls the services hears a wrong answer, or none."""

import asyncio
import os
import signal

from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import Stack
from shared.client import Holdfast
from tests.e2e.shop import goods, new, stock

CALLERS = 16
ROUNDS = 12


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
