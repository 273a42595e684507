"""Pods behind PgBouncer, with the files of `deploy/pgbouncer`: as without it, on fewer connections."""

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import REPOSITORY, UNPRIVILEGED_USER, Stack, free_port
from deploy.local.supervisor import SERVICES, Service, Supervisor
from shared.client import Holdfast
from shared.database import PLANNER
from shared.settings import Settings
from tests.e2e.shop import goods, new, stock
from tests.model.proxy import through

PGBOUNCER = shutil.which("pgbouncer")
FILES = REPOSITORY / "deploy" / "pgbouncer"
DATABASES = ("pooled_inventory", "pooled_reservation")
POOL, READY_SECONDS_MAX = 3, 10

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not on the PATH")


class Pooled(Supervisor):
    """Pods of inventory and reservation that reach PostgreSQL through a pooler."""

    def __init__(self, stack: Stack, port: int, root: Path) -> None:
        databases = dict(zip(("inventory", "reservation"), DATABASES, strict=True))
        services = [one._replace(database=databases[one.name]) for one in SERVICES if one.name in databases]
        super().__init__(stack, services=services, root=root)
        self._port = port

    def environment(self, service: Service) -> dict[str, str]:
        made = super().environment(service)
        made["HOLDFAST_DATABASE_DSN"] = through(made["HOLDFAST_DATABASE_DSN"], self._port)
        return made


@pytest.fixture(scope="module")
def pooler(stack: Stack) -> Iterator[int]:
    """The port of a PgBouncer with the shipped settings, but for addresses, the size of its pools and who may come."""
    assert PGBOUNCER
    if stack.citus_dsn:
        pytest.skip("the pooler of this test stands before the local PostgreSQL")
    stack.databases(*DATABASES)
    for database in DATABASES:
        asyncio.run(prepare(stack.postgres_dsn(database)))
    port, postgres = free_port(), urlsplit(stack.postgres_dsn("postgres"))
    told = (FILES / "pgbouncer.ini").read_text()
    for service, database in zip(("inventory", "reservation"), DATABASES, strict=True):
        told = told.replace(f"{service} = host=postgres port=5432", f"{database} = host=127.0.0.1 port={postgres.port}")
    user = UNPRIVILEGED_USER if os.geteuid() == 0 else None  # as root it refuses to run
    with tempfile.TemporaryDirectory(prefix="holdfast-test-", dir="/var/tmp") as root:
        changed = {"listen_addr": "127.0.0.1", "listen_port": port, "default_pool_size": POOL, "auth_type": "trust"}
        for name, value in {**changed, "auth_file": f"{root}/users.txt"}.items():
            told = re.sub(rf"^{name} = .*$", f"{name} = {value}", told, flags=re.MULTILINE)
        Path(root).chmod(0o755)
        Path(root, "users.txt").write_text(f'"{postgres.username}" ""\n')
        Path(root, "pgbouncer.ini").write_text(f"{told}admin_users = {postgres.username}\nunix_socket_dir =\n")
        process = subprocess.Popen([PGBOUNCER, "-q", f"{root}/pgbouncer.ini"], user=user)
        try:
            asyncio.run(listening(through(stack.postgres_dsn(DATABASES[0]), port)))
            yield port
        finally:
            process.kill()
            process.wait()


async def prepare(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute((FILES / "roles.sql").read_text())
    await connection.close()


async def listening(dsn: str) -> None:
    async with asyncio.timeout(READY_SECONDS_MAX):
        while True:
            try:
                await (await asyncpg.connect(dsn, statement_cache_size=0)).close()
            except OSError:
                await asyncio.sleep(0.05)
            else:
                return


async def test_pods_share_a_few_connections(
    stack: Stack, pooler: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Four pods and their workers on three connections a database; sessions are told what the pods would tell them."""
    callers, each, units = 16, 10, 100
    with Pooled(stack, pooler, tmp_path_factory.mktemp("pooled")).start() as supervisor:
        async with Holdfast(supervisor.targets["inventory"], supervisor.targets["reservation"]) as holdfast:
            sku = await goods(holdfast, units)

            async def shop() -> int:
                held = 0
                for _ in range(each):
                    name = new()
                    answer = await holdfast.reserve(name, [(sku, "MAIN", 1)])
                    if answer.outcome == rp.RESERVE_OUTCOME_HELD:
                        await holdfast.confirm(name, "paid")
                        held += 1
                return held

            assert sum(await asyncio.gather(*(shop() for _ in range(callers)))) == units
            assert (await stock(holdfast, sku, min_version=1 + 2 * units)).on_hand == 0
        dsn = stack.postgres_dsn(DATABASES[0])
        connection = await asyncpg.connect(dsn)
        serving = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
        assert await connection.fetchval(serving, DATABASES[0]) <= POOL
        await connection.close()
        behind = await asyncpg.connect(through(dsn, pooler))
        idle = Settings.model_fields["database_idle_seconds_max"].default
        for name, value in {**PLANNER, "idle_in_transaction_session_timeout": f"{idle * 1000:.0f}ms"}.items():
            assert await behind.fetchval("SELECT current_setting($1)", name) == value
        await behind.close()
