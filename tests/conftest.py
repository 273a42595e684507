"""Real PostgreSQL, Redis and Kafka for every test that asks for them; started once, stopped at the end."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis.asyncio as redis

from deploy.local.analysis import caught_up
from deploy.local.stack import Stack
from deploy.local.supervisor import SERVICES, Supervisor
from services.inventory.cache import Cache
from services.inventory.commands import Commands
from shared.client import Holdfast
from shared.database import Database
from tests.collector import Collector, collecting

# No example fails by its time on a busy machine, and one that fails is printed so that it can be run again. It inherits
# Hypothesis's own profile for CI where that is loaded.
hypothesis.settings.register_profile("holdfast", deadline=None, print_blob=True)
hypothesis.settings.load_profile("holdfast")


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="holdfast-test-") as root:
        running = Stack(Path(root), citus_dsn=os.environ.get("CITUS_DSN", ""))
        with running.start():
            yield running
        running.erase()


@pytest.fixture(scope="session")
async def inventory_dsn(stack: Stack) -> str:
    """A migrated inventory database."""
    return await stack.migrate("inventory_test", "inventory")


@pytest.fixture
async def inventory_db(inventory_dsn: str) -> AsyncIterator[Database]:
    """The inventory database, emptied."""
    database = await Database.connect(inventory_dsn, name="test", connections_max=40)
    async with database.connection() as connection:
        await connection.execute(
            "TRUNCATE location, sku, stock, hold, hold_change, request, movement, checkpoint, movement_outbox, outbox"
            " CASCADE"
        )
    yield database
    await database.close()


@pytest.fixture
async def redis_client(stack: Stack) -> AsyncIterator[redis.Redis]:
    client = redis.Redis.from_url(stack.redis_url, socket_timeout=1, socket_connect_timeout=1)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def cache(inventory_db: Database, redis_client: redis.Redis) -> AsyncIterator[Cache]:
    made = Cache(inventory_db, redis_client, local_seconds=0.05, redis_seconds=2, keys_max=1000)
    yield made
    await made.close()


@pytest.fixture
def commands(inventory_db: Database, cache: Cache) -> Commands:
    return Commands(inventory_db, cache)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the pods send their traces."""
    with collecting() as running:
        yield running


@pytest.fixture(scope="session")
def pods(stack: Stack, collector: Collector) -> Iterator[Supervisor]:
    """Two pods of each service, on databases of their own; what a test changes in their settings it puts back."""
    traces = {"HOLDFAST_OTLP_ENDPOINT": collector.endpoint}
    services = [service._replace(settings=dict(traces)) for service in SERVICES]
    with Supervisor(stack, services=services).start() as supervisor:
        yield supervisor


@pytest.fixture(scope="session")
async def following(pods: Supervisor) -> None:
    """Analytics follows: a pod serves before its consumers have joined their groups, which may take a while."""
    async with Holdfast(*(pods.targets[name] for name in ("inventory", "reservation", "analytics"))) as client:
        await caught_up(client)


@pytest.fixture
async def holdfast(pods: Supervisor, following: None) -> AsyncIterator[Holdfast]:  # noqa: ARG001 - it is waited for
    """A client of all services, balanced over their pods."""
    async with Holdfast(*(pods.targets[name] for name in ("inventory", "reservation", "analytics"))) as client:
        yield client


@pytest.fixture(scope="session")
async def reservation_dsn(stack: Stack) -> str:
    """A migrated reservation database."""
    return await stack.migrate("reservation_test", "reservation")


@pytest.fixture
async def reservation_db(reservation_dsn: str) -> AsyncIterator[Database]:
    """The reservation database, emptied."""
    database = await Database.connect(reservation_dsn, name="test", connections_max=20)
    async with database.connection() as connection:
        await connection.execute(
            "TRUNCATE reservation, reservation_line, allocation, reservation_change, outbox CASCADE"
        )
    yield database
    await database.close()


@pytest.fixture(scope="session")
async def analytics_dsn(stack: Stack) -> str:
    """A migrated analytics database."""
    return await stack.migrate("analytics_test", "analytics")


@pytest.fixture
async def analytics_db(analytics_dsn: str) -> AsyncIterator[Database]:
    """The analytics database, emptied, as those who follow use it."""
    database = await Database.connect(analytics_dsn, name="test", connections_max=20)
    async with database.connection() as connection:
        await connection.execute(
            "TRUNCATE consumed, gap, lag, sku, stock_view, activity, movement, snapshot, snapshot_taken, stock_out,"
            " goods_return, reservation, reservation_state, sale, refusal, desk.rule, desk.judged_partition,"
            " desk.signal, desk.returned, desk.fraud_case, desk.case_entry, desk.outbox"
        )
        await connection.execute("UPDATE desk.judged SET seq = 0, rules_changed = rules_changed + 1")
        await connection.execute("UPDATE aging SET aged_to = date_trunc('hour', now())")
        await connection.execute("UPDATE reconciled SET reconciled_at = '-infinity', keys = 0, drift_units = 0")
        await connection.execute(
            "TRUNCATE desk.alert_rule, desk.alert, desk.alert_event, desk.subscription, desk.target, desk.delivery,"
            " desk.attempt, desk.request"
        )
    yield database
    await database.close()
