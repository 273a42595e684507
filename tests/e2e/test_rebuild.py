"""The database of analytics made anew from the topics, beside the live one."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from deploy.local import orders
from deploy.local.analysis import caught_up
from deploy.local.replay import Replay
from deploy.local.stack import REPOSITORY, Stack
from deploy.local.supervisor import Supervisor
from shared.client import Holdfast
from tests.e2e.shop import goods, new, view

TABLES = (
    "sku", "stock_view", "activity", "movement", "stock_out", "goods_return", "reservation", "reservation_state",
    "sale", "refusal", "snapshot", "gap",
)  # fmt: skip


@pytest.fixture(scope="module")
def own() -> Iterator[Supervisor]:
    """Pods on topics of their own, which hold nothing but what this test does."""
    with tempfile.TemporaryDirectory(prefix="holdfast-test-") as root:
        stack = Stack(Path(root), citus_dsn=os.environ.get("CITUS_DSN", ""))
        with stack.start(), Supervisor(stack).start() as supervisor:
            yield supervisor
        stack.erase()


async def content(dsn: str) -> dict[str, list[asyncpg.Record]]:
    connection = await asyncpg.connect(dsn)
    try:
        return {table: await connection.fetch(f"SELECT * FROM {table} AS t ORDER BY t::text") for table in TABLES}
    finally:
        await connection.close()


async def test_a_rebuild_is_the_live_one_row_for_row_and_goes_on(own: Supervisor) -> None:
    """Everything but the offsets is as it was; what comes during and after the rebuild arrives as well."""
    analytics = next(pod.service for pod in own.pods if pod.service.name == "analytics")
    environment = own.environment(analytics)
    dsn = environment["HOLDFAST_DATABASE_DSN"]
    async with Holdfast(*(own.targets[name] for name in ("inventory", "reservation", "analytics"))) as holdfast:
        replay = Replay(holdfast, orders.invent(300), run_id=new(), opening_stock=20)
        await replay.load()
        await replay.run(concurrency=16, done=lambda: None)
        await caught_up(holdfast)
        before = await content(dsn)
        assert all(before[table] for table in TABLES if table not in {"snapshot", "gap"})

        def run() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "services.analytics", "rebuild"]
            return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

        done = await asyncio.to_thread(run)
        assert done.returncode == 0, done.stderr
        assert "events [####" in done.stderr
        assert "rebuilt from" in done.stdout
        assert await content(dsn) == before

        rebuilding = asyncio.create_task(asyncio.to_thread(run))
        sku = await goods(holdfast, 100_000)  # a rebuild takes as long as it takes
        while not rebuilding.done():
            await holdfast.reserve(new(), [(sku, "MAIN", 1)])
            await asyncio.sleep(0.05)
        assert rebuilding.result().returncode == 0, rebuilding.result().stderr
        last = await holdfast.reserve(new(), [(sku, "MAIN", 1)])
        assert last.reservation.allocations
        await caught_up(holdfast)
        row = await view(holdfast, sku)
        assert row.held == row.version - 1 > 1
