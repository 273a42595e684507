"""On a Citus cluster (CITUS_DSN): where queries go, and nodes that crash, stand still or lose their coordinator."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import TypeVar
from uuid import uuid4

import asyncpg
import psutil
import pytest
import redis.asyncio as redis

from deploy.local.stack import Stack
from services.inventory import store
from services.inventory.cache import Cache
from services.inventory.commands import Commands
from services.inventory.domain import Kind, Placed
from shared import distribution
from shared.database import Database
from shared.migrate import migrate
from shared.refusal import Refusal
from tests.integration.goods import change, hold, put, whole
from tests.model import auditor

pytestmark = pytest.mark.skipif(not os.environ.get("CITUS_DSN"), reason="needs CITUS_DSN, a coordinator of Citus")

T = TypeVar("T")
SKUS = [f"S{n}" for n in range(12)]
UNITS = 40
SHARDS = 8
PREPARED = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
SETTLE_SECONDS_MAX = 90


async def explain(database: Database, statement: str, arguments: str) -> str:
    async with database.connection() as connection:
        await connection.execute("SET citus.explain_all_tasks = on")
        await connection.execute(f"PREPARE asked AS {statement}")
        rows = await connection.fetch(f"EXPLAIN EXECUTE asked ({arguments})")
        await connection.execute("DEALLOCATE asked")
        await connection.execute("RESET citus.explain_all_tasks")
    return "\n".join(row[0] for row in rows)


async def test_a_database_in_use_is_distributed_and_twice_is_once(stack: Stack) -> None:
    """Its rows and foreign keys are there afterwards, rows written meanwhile as well; nothing is left to do."""
    stack.databases("grown")
    dsn = stack.postgres_dsn("grown")
    await migrate(dsn, "inventory")
    database = await Database.connect(dsn, name="test")
    try:
        async with database.connection() as connection:
            await connection.execute("INSERT INTO location VALUES ('MAIN', 'Main', 0)")
            await connection.execute(
                "INSERT INTO sku SELECT 'S' || n, '', '', '', '', 0 FROM generate_series(1, 500) n"
            )
            await connection.execute("INSERT INTO stock (sku, location, on_hand) SELECT sku, 'MAIN', 5 FROM sku")
        await distribution.prepare(dsn, stack.citus_dsn)
        work = asyncio.ensure_future(distribution.distribute(dsn, "inventory", SHARDS))
        written = 0
        while not work.done():
            async with database.connection() as connection:
                await connection.execute(
                    "INSERT INTO request (key, request_id, fingerprint, outcome) VALUES ('S1', $1, '', '')",
                    str(written),
                )
            written += 1
        assert set(await work) == {*distribution.plan("inventory").distributed, "location"}
        assert await distribution.distribute(dsn, "inventory", SHARDS) == []
        async with database.connection() as connection:
            counts = [
                await connection.fetchval(f"SELECT count(*) FROM {table}") for table in ("sku", "stock", "request")
            ]
            assert counts == [500, 500, written]
            with pytest.raises(asyncpg.ForeignKeyViolationError):
                await connection.execute("INSERT INTO stock (sku, location) VALUES ('unknown', 'MAIN')")
    finally:
        await database.close()
        stack.drop_database("grown")


async def test_a_key_is_one_shard_and_a_time_is_one_partition(inventory_db: Database) -> None:
    """Pruned by key, by time, by both and by neither."""
    async with inventory_db.connection() as connection:
        months = await connection.fetchval("SELECT count(*) FROM pg_inherits WHERE inhparent = 'movement'::regclass")
    by_key, by_time = "sku = $1", "recorded_at = $2"
    for where, shards, partitions in (
        (f"{by_key} AND {by_time}", 1, 1),
        (by_key, 1, months),
        (by_time, SHARDS, 1),
        ("true", SHARDS, months),
    ):
        statement = f"SELECT * FROM movement WHERE {where} AND $1::text <> '' AND $2::timestamptz IS NOT NULL"
        plan = await explain(inventory_db, statement, "'A', date_trunc('month', now())")
        assert f"Task Count: {shards}" in plan, plan
        scans = plan.count(" on movement_2") // shards
        assert scans == partitions, plan


async def test_what_names_its_skus_by_value_goes_to_their_shard(inventory_db: Database) -> None:
    """A single SKU's rows are one task; an array joined is a task for each shard, on indexes alone."""
    one = await explain(inventory_db, "SELECT * FROM sku WHERE sku = $1::text", "'A'")
    assert "Task Count: 1" in one
    many = await explain(inventory_db, store.READ_STOCK, "array['A'], array['MAIN']")
    assert f"Task Count: {SHARDS}" in many
    assert "Distributed Subplan" not in many


async def test_pages_are_cut_on_the_shards(inventory_db: Database) -> None:
    """Each shard gives a page at the most, by its index, and the coordinator merges them."""
    plan = await explain(inventory_db, store.NEXT_KEYS, "'A', 'MAIN', 10")
    assert plan.count("Limit") == SHARDS + 1, plan
    assert plan.count("Index") >= SHARDS
    assert "Seq Scan" not in plan


async def test_sums_are_made_on_the_shards(analytics_db: Database) -> None:
    """A report's sums are made where its rows are."""
    statement = "SELECT country, sum(units), sum(value_micros) FROM sale WHERE order_time > $1 GROUP BY country"
    plan = await explain(analytics_db, statement, "now() - interval '1 day'")
    assert plan.count("Aggregate") == SHARDS + 1, plan


class Node:
    """A node of the cluster that runs on this machine."""

    def __init__(self, pid: int) -> None:
        self._postmaster = psutil.Process(pid)

    async def crash(self) -> None:
        """All its sessions end at once, as when the machine loses power; it comes up again by itself."""
        async with asyncio.timeout(SETTLE_SECONDS_MAX):
            while True:
                for process in self._postmaster.children():
                    with contextlib.suppress(psutil.Error):
                        if "checkpointer" in " ".join(process.cmdline()):
                            process.kill()
                            return
                await asyncio.sleep(0.05)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """It answers nobody, and then goes on as if nothing had been."""
        tree = [self._postmaster, *self._postmaster.children()]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)


@pytest.fixture
async def nodes(inventory_dsn: str) -> dict[str, Node]:
    """The coordinator and the workers. Skips where they are not processes of this machine."""
    found: dict[str, Node] = {}
    coordinator = await asyncpg.connect(inventory_dsn)
    places = await coordinator.fetch("SELECT nodename, nodeport, groupid FROM pg_dist_node ORDER BY groupid")
    await coordinator.close()
    for place in places:
        connection = await asyncpg.connect(inventory_dsn, host=place["nodename"], port=place["nodeport"])
        try:
            backend = await connection.fetchval("SELECT pg_backend_pid()")
            if not psutil.pid_exists(backend) or "postgres" not in psutil.Process(backend).name():
                pytest.skip("the nodes are not on this machine")
            name = f"worker{place['groupid']}" if place["groupid"] else "coordinator"
            found[name] = Node(psutil.Process(backend).ppid())
        finally:
            await connection.close()
    return found


@pytest.fixture
async def shops(inventory_dsn: str, inventory_db: Database, redis_client: redis.Redis) -> AsyncIterator[list[Commands]]:
    """Three pods on one cluster, with stock on every shard."""
    databases = [
        await Database.connect(inventory_dsn, name=f"shop{n}", connections_max=4, timeout_seconds=5) for n in range(3)
    ]
    cache = Cache(inventory_db, redis_client, local_seconds=0.05, redis_seconds=2, keys_max=1000)
    shops = [Commands(database, cache) for database in databases]
    for sku in SKUS:
        await put(shops[0], sku, UNITS)
    yield shops
    await cache.close()
    for database in databases:
        await database.close()


async def shopping(shop: Commands, number: int, stopped: asyncio.Event, done: list[str]) -> None:
    """Hold several SKUs in either order and commit them, each call again until it is answered."""
    turn = 0
    while not stopped.is_set():
        turn += 1
        skus = SKUS[(number + turn) % 6 :: 2]
        skus = skus if turn % 2 else skus[::-1]
        name = uuid4().hex
        lines = [(sku, "MAIN", 1) for sku in skus]
        placing, committing = hold(name, *lines), change(name, Kind.COMMIT, *lines)
        (placed,) = await _answered(partial(shop.place, [placing]))
        if isinstance(placed, Placed) and not placed.short_lines:
            (committed,) = await _answered(partial(shop.change, [committing]))
            assert not isinstance(committed, Refusal)
            done.append(name)


async def _answered(call: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await call()
        except Refusal as refusal:
            if refusal.reason != "DATABASE_UNAVAILABLE":
                raise
            await asyncio.sleep(0.05)


async def _settled(inventory_dsn: str) -> None:
    """No prepared transaction is left on any node."""
    async with asyncio.timeout(SETTLE_SECONDS_MAX):
        while True:
            with contextlib.suppress(OSError, asyncpg.PostgresError):
                connection = await asyncpg.connect(inventory_dsn)
                try:
                    rows = await connection.fetch("SELECT * FROM run_command_on_workers($1)", PREPARED)
                    if all(row["success"] and row["result"] == "0" for row in rows):
                        return
                finally:
                    await connection.close()
            await asyncio.sleep(0.5)


@pytest.mark.parametrize("fault", ["worker crashes", "coordinator crashes", "worker stands still"])
async def test_a_fault_under_load_loses_nothing_and_oversells_nothing(
    inventory_dsn: str, shops: list[Commands], nodes: dict[str, Node], fault: str
) -> None:
    """Every call is answered in the end, no transaction is half there, and the auditor finds the books right."""
    stopped = asyncio.Event()
    done: list[str] = []
    async with asyncio.TaskGroup() as group:
        for number, shop in enumerate(shops * 2):
            group.create_task(shopping(shop, number, stopped, done))
        for turn in range(3):
            before = len(done)
            async with asyncio.timeout(SETTLE_SECONDS_MAX):
                while len(done) == before:
                    await asyncio.sleep(0.05)
            name = "coordinator" if fault.startswith("coordinator") else f"worker{(2, 3)[turn % 2]}"
            node = nodes.get(name) or nodes[max(nodes)]
            if fault.endswith("still"):
                with node.standing_still():
                    await asyncio.sleep(7)
            else:
                await node.crash()
        before = len(done)
        async with asyncio.timeout(SETTLE_SECONDS_MAX):
            while len(done) == before:
                await asyncio.sleep(0.05)
        stopped.set()
    await _settled(inventory_dsn)
    report = await auditor.books(inventory_dsn)
    assert not report.violations
    assert report.looked_at["sales"] >= len(done)


async def test_what_is_prepared_on_one_node_when_the_coordinator_dies_is_undone(
    inventory_dsn: str, shops: list[Commands], nodes: dict[str, Node]
) -> None:
    """The coordinator dies after one worker has prepared and before it has decided: no unit is held anywhere."""
    workers = await _rows(inventory_dsn, "SELECT nodename, nodeport, groupid FROM pg_dist_node WHERE groupid > 0")
    first, last = workers[0], workers[-1]
    connection = await asyncpg.connect(inventory_dsn)
    watching = await asyncpg.connect(inventory_dsn, host=first["nodename"], port=first["nodeport"])
    await connection.execute("BEGIN")
    await store.place(connection, [whole(hold("h", *((sku, "MAIN", 1) for sku in SKUS)))])
    with nodes[f"worker{last['groupid']}"].standing_still():
        commit = asyncio.ensure_future(connection.execute("COMMIT"))
        async with asyncio.timeout(SETTLE_SECONDS_MAX):
            while not await watching.fetchval(PREPARED):
                await asyncio.sleep(0.01)
        await nodes["coordinator"].crash()
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await commit
    await watching.close()
    await _settled(inventory_dsn)
    assert await _rows(inventory_dsn, "SELECT sku FROM stock WHERE held > 0 OR version <> 1") == []
    (answer,) = await _answered(partial(shops[1].place, [hold("h", *((sku, "MAIN", 1) for sku in SKUS))]))
    assert isinstance(answer, Placed)
    assert not answer.replayed
    assert not (await auditor.books(inventory_dsn)).violations


async def _rows(dsn: str, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()
