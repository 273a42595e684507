"""What is measured: pods of Holdfast on databases of a given size, echo servers, and the usual way."""

import asyncio
import contextlib
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import asyncpg

from bench.load import Pids
from deploy.local.certificates import Authority
from deploy.local.stack import CITUS_SHARDS, REPOSITORY, Stack, StackError, free_ports
from deploy.local.supervisor import SERVICES, Supervisor
from shared.client import Holdfast
from shared.migrate import migrate

PODS = 2
READY_SECONDS_MAX = 30
RECEIPT = 10**9
LOAD_LOCATION = "INSERT INTO location (location, name, priority) VALUES ('MAIN', 'Main', 0)"
LOAD_SKUS = """
INSERT INTO sku (sku, name, category, unit, currency_code, price_micros)
SELECT 'S' || n, '', '', 'piece', '', 0 FROM generate_series(0, $1::int - 1) AS n
"""
# A history of receipts and, as a pod that has run for a while would have left it, all added up and found right.
LOAD_LEDGER = """
INSERT INTO movement (sku, location, version, kind, on_hand_delta, held_delta, short_delta, on_hand, held, short,
                      safety_stock, backorder_limit, hold_id, request_id, reference, recorded_at)
SELECT 'S' || n % $2, 'MAIN', n / $2 + 1, 'RECEIVE', $3::bigint, 0, 0, $3::bigint * (n / $2 + 1),
       0, 0, 0, 0, '', '', '', now()
FROM generate_series(0, $1::int - 1) AS n
"""
LOAD_STOCK = """
INSERT INTO stock (sku, location, on_hand, version)
SELECT sku, 'MAIN', count(*) * $1::bigint, count(*) FROM movement GROUP BY sku
"""
LOAD_CHECKPOINTS = """
INSERT INTO checkpoint (sku, location, version, on_hand, held, short)
SELECT sku, location, version, on_hand, held, short FROM stock
"""
# Not the tables that are still empty: planned for no row, their statements would be slow until the next ANALYZE.
# The mart as it follows from that history, as if all of it had been followed.
LOAD_MART = """
INSERT INTO stock_view
SELECT 'S' || n, 'MAIN', '', '', $2::bigint * $3, 0, 0, 0, 0, $2::bigint * $3, 0, 0, 0, 0, 0, 0, now(), now(), $2
FROM generate_series(0, $1::int - 1) AS n
"""
SERVER = "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int"
LOADED = "VACUUM ANALYZE location, sku, movement, stock, checkpoint"


@dataclass(frozen=True, slots=True)
class Holdfasts:
    """Running pods of both services, and where their CPU is counted."""

    reservation: list[str]
    inventory: list[str]
    targets: dict[str, str]
    databases: dict[str, str]
    metrics: dict[str, list[str]]  # addresses of /metrics, by service
    tls_directory: str  # the client's certificate; empty without TLS
    pids: Pids
    restart: Callable[..., None]  # restart(services, SETTING="value"): their pods, with these settings from now on


@dataclass(frozen=True, slots=True)
class Servers:
    """Other servers' addresses, and where their CPU is counted."""

    pods: list[str]
    pids: Pids


async def _load(dsn: str, skus: int, movements: int) -> None:
    connection = await asyncpg.connect(dsn, command_timeout=600)
    try:
        if await connection.fetchval("SELECT EXISTS (SELECT 1 FROM sku)"):
            return
        await connection.execute(LOAD_LOCATION)
        await connection.execute(LOAD_SKUS, skus)
        await connection.execute(LOAD_LEDGER, max(movements, skus), skus, RECEIPT)
        await connection.execute(LOAD_STOCK, RECEIPT)
        await connection.execute(LOAD_CHECKPOINTS)
        await connection.execute(LOADED)
    finally:
        await connection.close()


async def load_mart(dsn: str, skus: int) -> None:
    """The stock view of a migrated analytics database, as it is before the first event of a run."""
    connection = await asyncpg.connect(dsn)
    try:
        if not await connection.fetchval("SELECT EXISTS (SELECT 1 FROM stock_view)"):
            await connection.execute(LOAD_MART, skus, 1, RECEIPT)
    finally:
        await connection.close()


@contextlib.contextmanager
def holdfast(
    stack: Stack,
    name: str,
    *,
    skus: int,
    movements: int = 0,
    reservation_pods: int = PODS,
    role: str = "all",
    analytics: bool = False,
    authority: Authority | None = None,
    shards: int = CITUS_SHARDS,
) -> Iterator[Holdfasts]:
    """Two pods of each service on databases of their own, with stock of `skus` and a history of `movements`.

    All share the topics, so that only the first that runs, and nothing beside it but in role "api", can have
    `analytics`. With an `authority` all speak TLS.
    """
    settings: dict[str, dict[str, str]] = {service.name: {} for service in SERVICES}
    services = [
        service._replace(
            database=f"{name}_{service.name}",
            pods=reservation_pods if service.name == "reservation" else PODS,
            settings=settings[service.name],
        )
        for service in SERVICES
        if analytics or service.name != "analytics"
    ]
    dsns = {service.name: asyncio.run(stack.migrate(service.database, service.name, shards)) for service in services}
    asyncio.run(_load(dsns["inventory"], skus, movements))
    if analytics:
        asyncio.run(load_mart(dsns["analytics"], skus))
    with Supervisor(stack, services=services, role=role, authority=authority).start() as supervisor:
        pods = {service.name: [pod for pod in supervisor.pods if pod.service is service] for service in services}
        pids = {service.name: [pod.pid for pod in pods.get(service.name, []) if pod.pid] for service in SERVICES}

        def restart(services: Sequence[str], **changed: str) -> None:
            for changing in services:
                settings[changing] |= changed
                for pod in pods[changing]:
                    supervisor.restart(pod)
                pids[changing][:] = [pod.pid for pod in pods[changing] if pod.pid]

        yield Holdfasts(
            [pod.address for pod in pods["reservation"]],
            [pod.address for pod in pods["inventory"]],
            supervisor.targets,
            dsns,
            {service: [pod.metrics_address for pod in those] for service, those in pods.items()},
            supervisor.tls_directory,
            {
                **pids,
                "database": _database(stack),
                "kafka": [stack.pids["Kafka"]],
                "redis": [stack.pids["Redis"]],
            },
            restart,
        )


@contextlib.contextmanager
def echo() -> Iterator[Servers]:
    """As many bare servers as a service has pods."""
    with _servers("bench.echo", {}) as (pods, pids):
        yield Servers(pods, {"server": pids})


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """The address of a collector that takes spans and throws them away."""
    with _servers("bench.sink", {}, pods=1) as (pods, _):
        yield f"http://{pods[0]}"


@contextlib.contextmanager
def usual(stack: Stack, *, skus: int) -> Iterator[Servers]:
    """The usual way, on a database with the tables of both services."""
    dsn = stack.postgres_dsn("usual")  # on one node: what it does, a cluster refuses
    stack.databases("usual")
    asyncio.run(migrate(dsn, "inventory"))
    asyncio.run(_load(dsn, skus, 0))
    asyncio.run(_reservation_tables(dsn))
    with _servers("bench.usual", {"HOLDFAST_DATABASE_DSN": dsn}) as (pods, pids):
        yield Servers(pods, {"server": pids, "database": _database(stack)})


def _database(stack: Stack) -> list[int]:
    """The processes of PostgreSQL, of a cluster on this machine those of all its nodes."""
    return asyncio.run(_servers_of(stack.citus_dsn)) if stack.citus_dsn else [stack.pids["PostgreSQL"]]


async def _servers_of(dsn: str) -> list[int]:
    connection = await asyncpg.connect(dsn)
    try:
        workers = await connection.fetch("SELECT result FROM run_command_on_workers($1)", SERVER)
        return [await connection.fetchval(SERVER), *(int(row["result"]) for row in workers)]
    finally:
        await connection.close()


async def _reservation_tables(dsn: str) -> None:
    migration = runpy.run_path(str(REPOSITORY / "services/reservation/migrations/pre/0001_start.py"))
    connection = await asyncpg.connect(dsn)
    try:
        if await connection.fetchval("SELECT to_regclass('reservation')") is None:
            for statement in migration["STATEMENTS"]:
                if "outbox" not in statement:
                    await connection.execute(statement)
    finally:
        await connection.close()


@contextlib.contextmanager
def _servers(module: str, environment: dict[str, str], pods: int = PODS) -> Iterator[tuple[list[str], list[int]]]:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(pods)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=REPOSITORY,
            env=os.environ | environment | {"HOLDFAST_LISTEN": address},
        )
        for address in addresses
    ]
    try:
        for address, process in zip(addresses, processes, strict=True):
            _await_listening(address, process)
        yield addresses, [process.pid for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(READY_SECONDS_MAX)


def _await_listening(address: str, process: subprocess.Popen[bytes]) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + READY_SECONDS_MAX
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise StackError(f"the server on {address} did not start")
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        time.sleep(0.05)


async def reserved(pods: Holdfasts, ids: list[str], skus: int) -> None:
    """Make reservations of one unit each, to be confirmed or cancelled later."""
    async with Holdfast(pods.targets["inventory"], pods.targets["reservation"]) as client:
        for start in range(0, len(ids), 50):
            part = ids[start : start + 50]
            await asyncio.gather(
                *(client.reserve(name, [(f"S{(start + n) % skus}", "MAIN", 1)]) for n, name in enumerate(part))
            )


async def outcomes(pods: Holdfasts, since: float) -> dict[str, int]:
    """How many reservations each state has of those made in the last `since` seconds."""
    connection = await asyncpg.connect(pods.databases["reservation"])
    try:
        rows = await connection.fetch(
            "SELECT state, count(*) AS n FROM reservation WHERE created_at > now() - make_interval(secs => $1)"
            " GROUP BY state",
            since,
        )
        return {row["state"]: row["n"] for row in rows}
    finally:
        await connection.close()
