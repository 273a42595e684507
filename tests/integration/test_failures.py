"""What happens when a part is away: fast, clear answers, and never a wrong one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc
import pytest
import redis.asyncio as redis
from holdfast.inventory.v1 import inventory_pb2

from deploy.local.stack import Stack, free_port
from services.inventory.cache import Ask as Read
from services.inventory.cache import Cache, Seen
from services.inventory.commands import Commands as Inventory
from services.reservation.commands import Commands
from services.reservation.domain import Ask, Line, Mode
from services.reservation.inventory import Inventory as InventoryClient
from services.reservation.subjects import Subjects
from shared import redis_client as redis_client_module
from shared.channel import MESSAGE_BYTES_MAX, open_channel
from shared.client import Holdfast
from shared.database import Connection, Database
from shared.lock import Lock, run_alone
from shared.refusal import Refusal
from tests.e2e.shop import new
from tests.integration.goods import hold, put
from tests.model.proxy import through


@asynccontextmanager
async def serving(service: str, **methods: Any) -> AsyncIterator[str]:
    """The target of a server that has these methods."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"ipv4:127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_losing_the_database_is_said_at_once(stack: Stack) -> None:
    """Lost connections and connects to nowhere are DATABASE_UNAVAILABLE; once it is back, work goes on."""
    real = urlsplit(stack.postgres_dsn("postgres"))
    writers: list[asyncio.StreamWriter] = []

    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
        target.close()

    async def accept(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        reader, writer = await asyncio.open_connection(real.hostname, real.port)
        writers.extend((target, writer))
        await asyncio.gather(pipe(source, writer), pipe(reader, target), return_exceptions=True)

    port = free_port()
    proxy = await asyncio.start_server(accept, "127.0.0.1", port)
    database = await Database.connect(through(real.geturl(), port), name="test", timeout_seconds=2)
    assert await database.run(lambda connection: connection.fetchval("SELECT 1")) == 1
    proxy.close()
    for writer in writers:
        writer.transport.abort()
    for _ in range(3):
        with pytest.raises(Refusal) as refused:
            async with asyncio.timeout(8):
                await database.run(lambda connection: connection.fetchval("SELECT 1"))
        assert refused.value.reason == "DATABASE_UNAVAILABLE"
    proxy = await asyncio.start_server(accept, "127.0.0.1", port)
    assert await database.run(lambda connection: connection.fetchval("SELECT 1")) == 1
    await database.close()
    proxy.close()


async def test_a_deadlock_is_retried(stack: Stack) -> None:
    """Two transactions that lock in opposite orders both end well."""
    stack.databases("deadlock")
    database = await Database.connect(stack.postgres_dsn("deadlock"), name="deadlock")
    async with database.connection() as connection:
        await connection.execute("DROP TABLE IF EXISTS pair; CREATE TABLE pair (id int PRIMARY KEY, n int)")
        await connection.execute("INSERT INTO pair VALUES (1, 0), (2, 0)")
    both = asyncio.Barrier(2)
    met: set[int] = set()

    async def swap(first: int, second: int) -> None:
        async def work(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
            await connection.execute("UPDATE pair SET n = n + 1 WHERE id = $1", first)
            if first not in met:
                met.add(first)
                await both.wait()
            await connection.execute("UPDATE pair SET n = n + 1 WHERE id = $1", second)

        await database.run(work)  # type: ignore[arg-type]

    await asyncio.gather(swap(1, 2), swap(2, 1))
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT sum(n) FROM pair") == 4
    await database.close()


async def test_a_transaction_that_stands_still_keeps_nobody_waiting(stack: Stack) -> None:
    """PostgreSQL ends it, and others get its rows; whoever goes on with it is told that the database was lost."""
    stack.databases("silent")
    database = await Database.connect(stack.postgres_dsn("silent"), name="silent", idle_seconds_max=1)
    async with database.connection() as connection:
        await connection.execute(
            "DROP TABLE IF EXISTS silent; CREATE TABLE silent (n int); INSERT INTO silent VALUES (0)"
        )
    locked, waited = asyncio.Event(), asyncio.Event()

    async def still(connection: Connection) -> None:
        await connection.execute("UPDATE silent SET n = n + 10")
        locked.set()
        await waited.wait()
        await connection.execute("UPDATE silent SET n = n + 10")

    standing = asyncio.ensure_future(database.run(still))
    standing.add_done_callback(lambda _: locked.set())
    await locked.wait()
    assert not standing.done(), "it was ended before it stood still"
    await database.run(lambda connection: connection.execute("UPDATE silent SET n = n + 1"))
    waited.set()
    with pytest.raises(Refusal) as refused:
        await standing
    assert refused.value.reason == "DATABASE_UNAVAILABLE"
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT n FROM silent") == 1
    await database.close()


async def test_a_table_may_change_under_a_transaction(stack: Stack) -> None:
    """A column that a migration adds, or drops, fails no transaction that has prepared its statements before."""
    stack.databases("changing")
    database = await Database.connect(stack.postgres_dsn("changing"), name="changing", connections_max=2)
    other = await asyncpg.connect(stack.postgres_dsn("changing"))
    await other.execute(
        "DROP TABLE IF EXISTS changing; CREATE TABLE changing (id int); INSERT INTO changing VALUES (1)"
    )

    async def read() -> list[dict[str, object]]:
        return await database.run(
            lambda connection: connection.fetch("SELECT changing.* FROM changing")  # type: ignore[arg-type, return-value]
        )

    assert [dict(row) for row in await read()] == [{"id": 1}]
    await other.execute("ALTER TABLE changing ADD COLUMN more text NOT NULL DEFAULT ''")
    assert [dict(row) for row in await read()] == [{"id": 1, "more": ""}]
    await other.execute("ALTER TABLE changing DROP COLUMN more")
    assert [dict(row) for row in await read()] == [{"id": 1}]
    await other.close()
    await database.close()


async def test_inventory_away_is_unavailable_and_nothing_is_stored(stack: Stack) -> None:
    """Reserve fails with INVENTORY_UNAVAILABLE, and there is no row to be found later."""
    channel = open_channel(f"ipv4:127.0.0.1:{free_port()}")
    database = await Database.connect(stack.postgres_dsn("postgres"), name="test")
    ask = Ask(new(), "", (Line("A", "", 1),), Mode.ALL, timedelta(minutes=1), b"")
    with pytest.raises(Refusal) as refused:
        await Commands(database, InventoryClient(channel), Subjects({"k1": bytes(16)})).reserve([ask])
    assert refused.value.reason == "INVENTORY_UNAVAILABLE"
    await channel.close(None)
    await database.close()


async def test_a_list_that_goes_on_beyond_what_is_asked_for_is_no_list() -> None:
    """The client says so, rather than return the half of it."""

    async def listed(request: inventory_pb2.ListSkusRequest, _context: object) -> inventory_pb2.ListSkusResponse:
        sku = inventory_pb2.Sku(sku=f"after {request.page_token}")
        return inventory_pb2.ListSkusResponse(skus=[sku], next_page_token="" if request.page_token else "first")

    method = grpc.unary_unary_rpc_method_handler(
        listed, inventory_pb2.ListSkusRequest.FromString, inventory_pb2.ListSkusResponse.SerializeToString
    )
    service, request = "holdfast.inventory.v1.InventoryService", inventory_pb2.ListSkusRequest()
    async with serving(service, ListSkus=method) as target, Holdfast(target, target) as client:
        skus = await client.every(client.inventory.ListSkus, request, "skus", pages_max=2)
        assert [sku.sku for sku in skus] == ["after ", "after first"]
        with pytest.raises(ValueError, match="pages_max=1"):
            await client.every(client.inventory.ListSkus, request, "skus", pages_max=1)


async def test_a_call_as_large_as_a_message_may_be_is_tried_again() -> None:
    """UNAVAILABLE is retried whatever the call's size: a full batch takes a stopping pod no worse than a single one."""
    sizes: list[int] = []

    async def answer(request: bytes, context: Any) -> bytes:
        sizes.append(len(request))
        if len(sizes) < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "come again")
        return b""

    size = MESSAGE_BYTES_MAX - 1_024
    method = grpc.unary_unary_rpc_method_handler(answer)
    async with serving("any.Service", Call=method) as target, open_channel(target) as channel:
        await channel.unary_unary("/any.Service/Call", bytes, bytes)(bytes(size))
    assert sizes == [size] * 3


async def test_redis_away_changes_no_answer(inventory_db: Database) -> None:
    """With Redis nowhere reads come from PostgreSQL; writes notice nothing."""
    client = redis.Redis.from_url(f"redis://127.0.0.1:{free_port()}", socket_connect_timeout=0.2, retry=None)
    cache = Cache(inventory_db, client, local_seconds=0, redis_seconds=2, keys_max=10)
    alone = Inventory(inventory_db, cache)
    await put(alone, "A", 5)
    await alone.place([hold(new(), ("A", "MAIN", 2))])
    (seen,) = await cache.read([Read(("A", "MAIN"))])
    assert isinstance(seen, Seen)
    assert (seen.stock.on_hand, seen.stock.held) == (5, 2)
    await cache.close()
    await client.aclose()


async def test_redis_wiped_under_load_is_never_wrong(
    commands: Inventory, cache: Cache, redis_client: redis.Redis
) -> None:
    """Read-your-writes holds through every wipe: no read is older than the version that it names."""
    await put(commands, "A", 1000)
    for n in range(60):
        (_, seen, _) = await asyncio.gather(
            commands.place([hold(new(), ("A", "MAIN", 1))]),
            cache.read([Read(("A", "MAIN"), 1 + n)]),
            redis_client.flushall(),
        )
        assert isinstance(seen[0], Seen)
        assert seen[0].stock.held == seen[0].stock.version - 1 >= n
        cache._local.clear()


async def test_the_cache_keeps_the_newer_version(commands: Inventory, cache: Cache) -> None:
    """A late write of an older version changes nothing in Redis."""
    await put(commands, "A", 5)
    (old,) = await cache.read([Read(("A", "MAIN"))])
    await commands.place([hold(new(), ("A", "MAIN", 2))])
    await cache.close()
    assert isinstance(old, Seen)
    cache._behind[old.stock.key] = old
    await cache._write_behind()
    cache._local.clear()
    (seen,) = await cache.read([Read(("A", "MAIN"))])
    assert isinstance(seen, Seen)
    assert seen.stock.version == old.stock.version + 1


async def test_what_redis_could_not_be_told_keeps_nothing_later_from_it(
    commands: Inventory, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the error is, the next commit is told."""

    async def broken(*_: object) -> None:
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr(redis_client_module, "run", broken)
        await put(commands, "A", 5)
        await cache.close()
    await put(commands, "A", 1)
    await cache.close()
    told = await cache._from_redis([("A", "MAIN")])
    assert [seen.stock.on_hand for seen in told.values()] == [6]


async def test_what_redis_is_told_next_is_the_newer_version(commands: Inventory, cache: Cache) -> None:
    """What was read before a commit and comes back after it tells nothing older."""
    await put(commands, "A", 5)
    (old,) = await cache.read([Read(("A", "MAIN"))])
    await commands.place([hold(new(), ("A", "MAIN", 2))])
    assert isinstance(old, Seen)
    cache.wrote([old.stock], old.as_of)
    assert cache._behind["A", "MAIN"].stock.version == old.stock.version + 1


async def test_a_cache_that_is_always_missed_is_left_alone(
    commands: Inventory, cache: Cache, redis_client: redis.Redis
) -> None:
    """Many SKUs each read once stop going by Redis; a few that are read often come back to it."""
    for n in range(60):
        await put(commands, f"S{n}", 1)
    await cache.close()

    async def asked() -> int:
        stats: dict[str, dict[str, int]] = await redis_client.info("commandstats")
        return stats.get("cmdstat_mget", {}).get("calls", 0)

    async def read(sku: str) -> None:
        cache._local.clear()
        (seen,) = await cache.read([Read((sku, "MAIN"))])
        assert isinstance(seen, Seen)
        assert seen.stock.on_hand == 1

    await redis_client.flushall()
    for n in range(40):
        await read(f"S{n}")
    before = await asked()
    for n in range(40, 56):
        await read(f"S{n}")
    assert await asked() - before <= 2
    for _ in range(200):
        await read("S1")
        await cache.close()
    before = await asked()
    for _ in range(10):
        await read("S1")
    assert await asked() - before == 10


async def test_the_lock_has_one_holder_and_growing_tokens(redis_client: redis.Redis) -> None:
    """Taken once, renewed by its holder alone, passed on with a higher token."""
    first = Lock(redis_client, "job", ttl_seconds=5)
    second = Lock(redis_client, "job", ttl_seconds=5)
    token = await first.take()
    assert token
    assert not await second.take()
    assert await first.renew()
    assert not await second.renew()
    await second.release()
    assert await first.renew()
    await first.release()
    assert await second.take() > token


async def test_lost_work_is_cancelled_and_taken_up_elsewhere(redis_client: redis.Redis) -> None:
    """When the lock vanishes its holder stops; someone works again, with a higher token."""
    tokens: asyncio.Queue[int] = asyncio.Queue()

    async def work(token: int) -> None:
        tokens.put_nowait(token)
        await asyncio.Event().wait()

    pods = [asyncio.ensure_future(run_alone(redis_client, "work", work, ttl_seconds=0.15)) for _ in range(2)]
    try:
        first = await asyncio.wait_for(tokens.get(), 5)
        await redis_client.delete("lock:{work}")
        assert await asyncio.wait_for(tokens.get(), 5) > first
    finally:
        for pod in pods:
            pod.cancel()
        await asyncio.wait(pods)


async def test_a_pod_that_stops_is_not_held_up_by_the_lock(redis_client: redis.Redis) -> None:
    """Its worker ends whenever it is cancelled, were it in the midst of taking or renewing."""

    async def work(_: int) -> None:
        await asyncio.Event().wait()

    for steps in range(200):
        pod = asyncio.ensure_future(run_alone(redis_client, "work", work, ttl_seconds=0.003))
        for _ in range(steps):
            await asyncio.sleep(0)
        pod.cancel()
        ended, _waiting = await asyncio.wait([pod], timeout=5)
        assert ended, f"cancelled after {steps} steps of the loop"
