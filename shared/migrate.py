"""`python -m shared.migrate SERVICE [--phase pre|post|all] [--wait | --distributed]`: bring a database up to date.

Migrations stand in `services/SERVICE/migrations/pre` (what must be there before the new code runs, and
does not disturb the old) and `.../post` (what may go once no old code is left). Each phase has its own
chain and version table, so either can be run again at any time; an advisory lock lets one run at a time.

A migration shares its tables with pods that serve. It waits LOCK_SECONDS_MAX for the lock of one, since everybody else
waits behind it meanwhile, and a deadlock may choose it: it is then rolled back, and begins again a little later.

`--wait` migrates nothing and ends once the database has what this code needs, which is what a pod does before it
serves. A database that is ahead, because a newer release has migrated it, has that: pods of the release before may
start again, and its migrations change nothing.

`--distributed` also spreads the tables over a Citus cluster (`shared.distribution`), or says what it lacks for that.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from shared import distribution
from shared.settings import DistributionSettings, load

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("pre", "post")
LOCK = 0x686F6C64  # "hold"
WAIT_SECONDS_MAX = 300
POLL_SECONDS = 0.5
CONNECT_SECONDS_MAX = 5
LOCK_SECONDS_MAX = 2
ATTEMPTS_MAX = 30
BUSY = {asyncpg.LockNotAvailableError.sqlstate, asyncpg.DeadlockDetectedError.sqlstate}


def upgrade(connection: sqlalchemy.Connection, service: str, phase: str) -> None:
    """Run what is missing of one phase on an open connection, in its transaction."""
    if reached(connection, service, phase):
        return
    config = _config(service, phase)
    config.attributes["connection"] = connection
    config.attributes["version_table"] = _version_table(phase)
    command.upgrade(config, "head")


def reached(connection: sqlalchemy.Connection, service: str, phase: str) -> bool:
    """Whether the database is where this code's migrations of a phase end, or ahead of it."""
    script = ScriptDirectory.from_config(_config(service, phase))
    context = MigrationContext.configure(connection, opts={"version_table": _version_table(phase)})
    version = context.get_current_revision()
    known = {revision.revision for revision in script.walk_revisions()}
    return version is not None and (version == script.get_current_head() or version not in known)


def _version_table(phase: str) -> str:
    return f"migration_{phase}"


def _config(service: str, phase: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "shared" / "migrations"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", str(ROOT / "services" / service / "migrations" / phase))
    return config


async def migrate(dsn: str, service: str, phases: Sequence[str] = PHASES, schema: str = "public") -> None:
    """Migrate a schema of the database at `dsn`, phase by phase, each in one transaction.

    Raises what PostgreSQL refuses: a lock too, when others had the tables for ATTEMPTS_MAX times.
    """
    # asyncpg reads the address itself: SQLAlchemy does not know all of its options, such as sslmode.
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(dsn))
    try:
        for phase in phases:
            for attempt in range(1, ATTEMPTS_MAX + 1):
                try:
                    await _migrate(engine, service, phase, schema)
                except sqlalchemy.exc.DBAPIError as error:
                    if getattr(error.orig, "sqlstate", None) not in BUSY or attempt == ATTEMPTS_MAX:
                        raise
                    await asyncio.sleep(random.uniform(0, POLL_SECONDS))  # noqa: S311 - jitter
                else:
                    break
    finally:
        await engine.dispose()


async def _migrate(engine: AsyncEngine, service: str, phase: str, schema: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        await connection.execute(sqlalchemy.text(f"SET LOCAL lock_timeout TO '{LOCK_SECONDS_MAX * 1000:.0f}'"))
        await connection.execute(sqlalchemy.text(f"SET LOCAL search_path TO {schema}"))
        await connection.execute(sqlalchemy.text("SET LOCAL timezone TO 'UTC'"))
        await connection.run_sync(upgrade, service, phase)


async def wait(dsn: str, service: str, phases: Sequence[str], seconds_max: float = WAIT_SECONDS_MAX) -> None:
    """Return once the phases are in the database, which may not answer yet, saying once that it waits.

    Raises TimeoutError.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(dsn, timeout=CONNECT_SECONDS_MAX)
    )
    deadline = time.monotonic() + seconds_max
    try:
        for phase in phases:
            told = False
            while not await _reached(engine, service, phase):
                if not told:
                    sys.stdout.write(f"waiting for the {phase} migrations of {service}\n")
                    sys.stdout.flush()
                    told = True
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the {phase} migrations of {service} did not come within {seconds_max:.0f} s")
                await asyncio.sleep(POLL_SECONDS)
    finally:
        await engine.dispose()


async def _reached(engine: AsyncEngine, service: str, phase: str) -> bool:
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(reached, service, phase)
    except (OSError, TimeoutError, sqlalchemy.exc.DBAPIError, asyncpg.PostgresError):
        return False


def main() -> None:
    services = sorted(path.parent.name for path in ROOT.glob("services/*/migrations"))
    parser = argparse.ArgumentParser(prog="python -m shared.migrate", description="Migrate a service's database.")
    parser.add_argument("service", choices=services)
    parser.add_argument("--phase", choices=(*PHASES, "all"), default="all")
    parser.add_argument("--wait", action="store_true", help="until someone else has migrated it")
    parser.add_argument("--distributed", action="store_true", help="and spread its tables over a Citus cluster")
    arguments = parser.parse_args()
    if arguments.distributed and arguments.wait:
        parser.error("--wait changes nothing, so it does not go with --distributed")
    settings = load(DistributionSettings)
    dsn = settings.database_dsn
    phases = PHASES if arguments.phase == "all" else [arguments.phase]
    try:
        if arguments.wait:
            asyncio.run(wait(dsn, arguments.service, phases))
        elif arguments.distributed:
            asyncio.run(_distribute(settings, arguments.service, phases))
        else:
            asyncio.run(migrate(dsn, arguments.service, phases))
    except (TimeoutError, distribution.MissingError) as error:
        sys.exit(str(error))


async def _distribute(settings: DistributionSettings, service: str, phases: Sequence[str]) -> None:
    """Migrate and distribute, once it is known that the latter can be done."""
    dsn = settings.database_dsn
    await distribution.prepare(dsn, settings.citus_dsn)
    await migrate(dsn, service, phases)
    for table in await distribution.distribute(dsn, service, settings.citus_shard_count):
        sys.stdout.write(f"{service}: distributed {table}\n")


if __name__ == "__main__":
    main()
