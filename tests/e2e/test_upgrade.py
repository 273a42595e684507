"""A release and the one before it on one database: forward, back, and forward for good (`make upgrade-test`)."""

import asyncio
import os
from pathlib import Path

import pytest
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import REPOSITORY, Stack
from deploy.local.supervisor import SERVICES, Supervisor
from shared.client import Holdfast
from shared.migrate import migrate
from tests.e2e.shop import goods, new, stock

BASE = os.environ.get("HOLDFAST_BASE", "")
BEFORE = Path(BASE).resolve()
UNITS = 1_000_000
CALLERS = 4

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not BASE, reason="HOLDFAST_BASE names no checkout of the release before: `make upgrade-test`"),
]


async def test_the_release_before_serves_on_the_new_schema(tmp_path: Path) -> None:
    """Pods change one by one, each way, while calls go on; every call is answered and no unit is lost."""
    stop = asyncio.Event()
    sold = 0

    async def shopper(holdfast: Holdfast, sku: str) -> None:
        nonlocal sold
        while not stop.is_set():
            name = new()
            answer = await holdfast.reserve(name, [(sku, "MAIN", 1)])
            assert answer.outcome == rp.RESERVE_OUTCOME_HELD
            await holdfast.confirm(name, "paid")
            sold += 1

    async def a_few_more() -> None:
        wanted = sold + 10 * CALLERS
        while sold < wanted:
            assert not any(shopping.done() for shopping in shoppers), [shopping.exception() for shopping in shoppers]
            await asyncio.sleep(0.05)

    with Stack(tmp_path).start() as stack, Supervisor(stack, code=BEFORE).start() as supervisor:

        async def change_to(code: Path) -> None:
            supervisor.code = code
            for pod in supervisor.pods:
                await asyncio.to_thread(supervisor.restart, pod)
                await a_few_more()

        async with Holdfast(*(supervisor.targets[name] for name in ("inventory", "reservation"))) as holdfast:
            sku = await goods(holdfast, UNITS)
            shoppers = [asyncio.ensure_future(shopper(holdfast, sku)) for _ in range(CALLERS)]
            try:
                for service in SERVICES:
                    await migrate(stack.postgres_dsn(service.database), service.name, ["pre"])
                await a_few_more()
                await change_to(REPOSITORY)
                await change_to(BEFORE)
                await change_to(REPOSITORY)
                for service in SERVICES:
                    await migrate(stack.postgres_dsn(service.database), service.name, ["post"])
                await a_few_more()
            finally:
                stop.set()
                await asyncio.gather(*shoppers)
            seen = await stock(holdfast, sku, min_version=2 * sold + 1)
            assert (seen.on_hand, seen.held) == (UNITS - sold, 0)
