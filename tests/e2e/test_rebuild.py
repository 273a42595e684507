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
from shared.kafka import Brokers
from shared.topics import grow
from tests.e2e.shop import goods, new, view

pytestmark = pytest.mark.timeout(400)  # a deployment is stopped and started within a test

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


def environment(own: Supervisor) -> dict[str, str]:
    return own.environment(next(pod.service for pod in own.pods if pod.service.name == "analytics"))


async def rebuild(own: Supervisor) -> subprocess.CompletedProcess[str]:
    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.analytics", "rebuild"]
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment(own), capture_output=True, text=True, check=False
        )

    return await asyncio.to_thread(run)


async def content(dsn: str) -> dict[str, list[asyncpg.Record]]:
    connection = await asyncpg.connect(dsn)
    try:
        return {table: await connection.fetch(f"SELECT * FROM {table} AS t ORDER BY t::text") for table in TABLES}
    finally:
        await connection.close()


async def test_a_rebuild_is_the_live_one_row_for_row_and_goes_on(own: Supervisor) -> None:
    """Everything but the offsets is as it was; what comes during and after the rebuild arrives as well."""
    dsn = environment(own)["HOLDFAST_DATABASE_DSN"]
    async with Holdfast(*(own.targets[name] for name in ("inventory", "reservation", "analytics"))) as holdfast:
        replay = Replay(holdfast, orders.invent(300), run_id=new(), opening_stock=20)
        await replay.load()
        await replay.run(concurrency=16, done=lambda: None)
        await caught_up(holdfast)
        before = await content(dsn)
        assert all(before[table] for table in TABLES if table not in {"snapshot", "gap"})

        done = await rebuild(own)
        assert done.returncode == 0, done.stderr
        assert "events [####" in done.stderr
        assert "rebuilt from" in done.stdout
        assert await content(dsn) == before

        rebuilding = asyncio.create_task(rebuild(own))
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


async def test_topics_grow_and_every_key_keeps_its_order(own: Supervisor) -> None:
    """Refused while events are sent and for what is no multiple; then nothing stops, and a rebuild is the live one."""
    dsn = environment(own)["HOLDFAST_DATABASE_DSN"]
    brokers = Brokers(environment(own)["HOLDFAST_KAFKA_BOOTSTRAP"])
    async with Holdfast(*(own.targets[name] for name in ("inventory", "reservation", "analytics"))) as holdfast:
        skus = [await goods(holdfast, 100) for _ in range(24)]
        await asyncio.gather(*(holdfast.reserve(new(), [(sku, "MAIN", 1)]) for sku in skus))
        await caught_up(holdfast)
        with pytest.raises(ValueError, match="no multiple"):
            await grow(brokers, 6)
        with pytest.raises(ValueError, match="still being written"):
            await grow(brokers, 8)
    await asyncio.to_thread(own.stop)
    grown = await grow(brokers, 8)
    assert "holdfast.inventory.movements.v1" in grown
    assert "holdfast.reservation.changes.v1" in grown
    await asyncio.to_thread(own.start)
    async with Holdfast(*(own.targets[name] for name in ("inventory", "reservation", "analytics"))) as holdfast:
        await asyncio.gather(*(holdfast.reserve(new(), [(sku, "MAIN", 1)]) for sku in skus for _ in range(3)))
        await caught_up(holdfast)
        assert [(row.held, row.version) for row in [await view(holdfast, sku) for sku in skus]] == [(4, 5)] * len(skus)
        before = await content(dsn)
        assert not before["gap"]
        done = await rebuild(own)
        assert done.returncode == 0, done.stderr
        assert await content(dsn) == before
