"""A cluster grows while orders run: a node more, shards moved to it, one SKU's shard by itself (docs/scale.md)."""

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest
from grpc import aio
from holdfast.inventory.v1 import inventory_pb2_grpc

from deploy.local.stack import CITUS_SHARDS, Stack
from deploy.local.supervisor import SERVICES, Supervisor
from shared import distribution
from tests.model import auditor
from tests.model.auditor import Deployment
from tests.model.history import Client, History
from tests.model.shoppers import Shoppers, stock_up

CITUS_DSN, SPARE = os.environ.get("CITUS_DSN", ""), os.environ.get("CITUS_SPARE", "")
SKUS = tuple(f"SKU-{number:02}" for number in range(12))
CALLERS = 8
SETTLE_SECONDS = 20.0  # longer than a hold can last
MOVED_SECONDS_MAX = 180

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not SPARE, reason="CITUS_SPARE names no node (host:port) outside CITUS_DSN's cluster"),
]
MOVING = "SELECT count(*) FROM citus_rebalance_status() WHERE state NOT IN ('finished', 'failed', 'cancelled')"
PLACED = "SELECT count(*) FROM citus_shards WHERE nodename = $1 AND nodeport = $2"
SHARD_OF = "SELECT get_shard_id_for_distribution_column('stock', $1::text)"
NODES_OF = "SELECT nodename || ':' || nodeport FROM pg_dist_shard_placement WHERE shardid = $1"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Its databases are dropped before the spare node is forgotten."""
    with Stack(tmp_path, citus_dsn=CITUS_DSN).start() as running:
        yield running
    running.erase()
    with suppress(asyncpg.PostgresError):  # where the test has failed before it was added
        asyncio.run(_on(CITUS_DSN, "SELECT citus_remove_node($1, $2)", *_spare()))


def _spare() -> tuple[str, int]:
    host, _, port = SPARE.rpartition(":")
    return host, int(port)


async def _on(dsn: str, statement: str, *arguments: object) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(statement, *arguments)
    finally:
        await connection.close()


async def _add_node(stack: Stack) -> None:
    """As documented: tell the cluster, have each service's database follow, move shards."""
    await _on(CITUS_DSN, "SELECT citus_add_node($1, $2)", *_spare())
    for service in SERVICES:
        dsn = stack.postgres_dsn(service.database)
        await distribution.prepare(dsn, CITUS_DSN)
        await distribution.distribute(dsn, service.name, CITUS_SHARDS)
        await _on(dsn, "SELECT citus_rebalance_start()")
        async with asyncio.timeout(MOVED_SECONDS_MAX):
            while await _on(dsn, MOVING):
                await asyncio.sleep(0.5)
        assert await _on(dsn, PLACED, *_spare()), f"{service.name} has no shard on the new node"


async def _isolate(dsn: str, sku: str) -> None:
    """As documented: the shard that has only this SKU, moved to the new node."""
    whole = await _on(dsn, SHARD_OF, sku)
    await _on(dsn, "SELECT isolate_tenant_to_new_shard('stock', $1::text, 'CASCADE', 'block_writes')", sku)
    alone = await _on(dsn, SHARD_OF, sku)
    assert alone != whole
    place = await _on(dsn, NODES_OF, alone)
    host, _, port = str(place).rpartition(":")
    if (host, int(port)) != _spare():
        await _on(dsn, "SELECT citus_move_shard_placement($1, $2, $3, $4, $5)", alone, host, int(port), *_spare())
    assert await _on(dsn, NODES_OF, alone) == SPARE


async def test_a_node_is_added_while_orders_run(stack: Stack) -> None:
    """Shards of every service move to it, a hot SKU gets one of its own, and the auditor finds nothing."""
    history = History()
    with Supervisor(stack).start() as pods:
        targets = pods.targets["inventory"], pods.targets["reservation"]
        async with (
            Client(history, *targets, give_up=20, dice=random.Random(0)) as client,
            aio.insecure_channel(targets[0]) as channel,
        ):
            await stock_up(client, inventory_pb2_grpc.InventoryServiceStub(channel), SKUS)
        shoppers = Shoppers(history, SKUS, 1)
        shopping = asyncio.ensure_future(shoppers.shop(*targets, CALLERS))
        try:
            await _add_node(stack)
            await _isolate(stack.postgres_dsn("inventory"), SKUS[0])
            made = len(history.calls)
            while len(history.calls) < made + 100:
                await asyncio.sleep(0.1)
        finally:
            shoppers.stop.set()
            with suppress(asyncio.CancelledError):
                await shopping
        await asyncio.sleep(SETTLE_SECONDS)
        dsn = stack.postgres_dsn
        deployment = Deployment(dsn("inventory"), dsn("reservation"), dsn("analytics"), stack.kafka_bootstrap)
        report = await auditor.audit(deployment, history)
    assert not report.violations
    assert report.looked_at["movements"] > len(SKUS)
