"""`python -m shared.migrate SERVICE [--phase pre|post|all]`: bring a service's database up to date.

Migrations stand in `services/SERVICE/migrations/pre` (what must be there before the new code runs, and
does not disturb the old) and `.../post` (what may go once no old code is left). Each phase has its own
chain and version table, so either can be run again at any time; an advisory lock lets one run at a time.
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import sqlalchemy
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import create_async_engine

from shared.settings import DatabaseSettings, load

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("pre", "post")
LOCK = 0x686F6C64  # "hold"


def upgrade(connection: sqlalchemy.Connection, service: str, phase: str) -> None:
    """Run what is missing of one phase on an open connection, in its transaction."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "shared" / "migrations"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", str(ROOT / "services" / service / "migrations" / phase))
    config.attributes["connection"] = connection
    config.attributes["version_table"] = f"migration_{phase}"
    command.upgrade(config, "head")


async def migrate(dsn: str, service: str, phases: Sequence[str] = PHASES, schema: str = "public") -> None:
    """Migrate a schema of the database at `dsn`, phase by phase."""
    # asyncpg reads the address itself: SQLAlchemy does not know all of its options, such as sslmode.
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(dsn))
    try:
        for phase in phases:
            async with engine.begin() as connection:
                await connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({LOCK})"))
                await connection.execute(sqlalchemy.text(f"SET LOCAL search_path TO {schema}"))
                await connection.execute(sqlalchemy.text("SET LOCAL timezone TO 'UTC'"))
                await connection.run_sync(upgrade, service, phase)
    finally:
        await engine.dispose()


def main() -> None:
    services = sorted(path.parent.name for path in ROOT.glob("services/*/migrations"))
    parser = argparse.ArgumentParser(prog="python -m shared.migrate", description="Migrate a service's database.")
    parser.add_argument("service", choices=services)
    parser.add_argument("--phase", choices=(*PHASES, "all"), default="all")
    arguments = parser.parse_args()
    dsn = load(DatabaseSettings).database_dsn
    asyncio.run(migrate(dsn, arguments.service, PHASES if arguments.phase == "all" else [arguments.phase]))


if __name__ == "__main__":
    main()
