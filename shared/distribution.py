"""Spreads a migrated database over a Citus cluster: what `python -m shared.migrate SERVICE --distributed` does.

Which table goes where stands in `services/SERVICE/migrations/distribution.toml`. Tables are distributed one by one,
each whole or not at all, so that it may be stopped and run again at any time; one that is distributed is left alone.
Where `wal_level` is `logical` (and `output_plugin_libraries`, on servers that have it, names citus) a table's rows are
moved while others write them, and only the last change of hands keeps writers waiting; otherwise they wait all along.

A table cannot be distributed while a foreign key ties it to one that is not: keys between the tables are kept in
`migration_foreign_key` meanwhile, and put back at the end.

Citus lets one write of several shards at a time into each shard, by locks that it takes in the order of the shards and
holds until the transaction ends; within a shard rows are locked in the order of their keys. Two batches therefore
cannot deadlock. What stands on several nodes it commits in two phases. It is told to use one connection to a worker for
all shards there, so that a transaction is one on each worker.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from shared.database import Connection

ROOT = Path(__file__).resolve().parent.parent
LOCK = 0x73706C74  # "splt"
# The second: otherwise each look into the catalogue asks of every relation whether it is a shard, for seconds.
COORDINATOR = {
    "citus.multi_shard_modify_mode": "sequential",
    "citus.override_table_visibility": "off",
}

AVAILABLE = "SELECT count(*) FROM pg_available_extensions WHERE name = 'citus'"
LOADED = "SELECT current_setting('citus.shard_count', true) IS NOT NULL"
PREPARED_MAX = "SELECT current_setting('max_prepared_transactions')::int"
EXTEND = "CREATE EXTENSION IF NOT EXISTS citus"
# Views that the extension puts into `public`. They would go with it where a rebuild replaces that schema, and the
# extension with them.
OUTSIDE = tuple(f"ALTER VIEW IF EXISTS public.{view} SET SCHEMA citus" for view in ("citus_tables", "citus_schemas"))
EXTENDED = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')"
NODES = """
SELECT nodename, nodeport, groupid = 0 AS coordinator FROM pg_dist_node WHERE noderole = 'primary' ORDER BY groupid
"""
# Of some tables, those that Citus has spread or copied already.
SPREAD = """
SELECT logicalrelid::text FROM pg_dist_partition
WHERE logicalrelid = ANY ($1::regclass[]) AND (partmethod = 'h' OR repmodel = 't')
"""
SHARDS = """
SELECT coalesce(max(count), 0) FROM (SELECT count(*) FROM pg_dist_shard GROUP BY logicalrelid) AS tables
"""
# The foreign keys of some tables; those of partitions follow their parents.
KEYS = """
SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) AS drop,
       format('ALTER TABLE %s ADD CONSTRAINT %I %s', conrelid::regclass, conname, pg_get_constraintdef(oid)) AS make
FROM pg_constraint WHERE contype = 'f' AND conparentid = 0 AND conrelid = ANY ($1::regclass[])
"""
# Moving rows while others write takes logical decoding by Citus, which some servers let no library do unasked.
ONLINE = r"""
SELECT current_setting('wal_level') = 'logical'
   AND coalesce(current_setting('output_plugin_libraries', true) ~ '\ycitus\y', true)
"""
KEEP_KEYS = "CREATE TABLE IF NOT EXISTS migration_foreign_key (statement text PRIMARY KEY)"
KEEP_KEY = "INSERT INTO migration_foreign_key VALUES ($1)"
KEPT_KEYS = "DELETE FROM migration_foreign_key RETURNING statement"


class MissingError(Exception):
    """The database cannot be distributed yet; the message says, a line for each, what is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which tables are spread by which column, which are copied, and what the workers' databases are set to."""

    distributed: Mapping[str, str]
    reference: Sequence[str]
    workers: Mapping[str, str]


def plan(service: str) -> Plan:
    """What a service's `distribution.toml` says."""
    file = ROOT / "services" / service / "migrations" / "distribution.toml"
    content = tomllib.loads(file.read_text())
    return Plan(content["distributed"], content["reference"]["tables"], content["workers"])


async def shards(dsn: str) -> int:
    """Into how many shards the database's tables are spread; 0 where they are not."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval(SHARDS)) if await connection.fetchval(EXTENDED) else 0
    finally:
        await connection.close()


async def prepare(dsn: str, cluster_dsn: str = "") -> None:
    """Make the database one of a cluster: the extension, the nodes.

    Of the workers that `cluster_dsn`, another database of the same coordinator, knows, it takes up what it lacks;
    then the database is made on them as well. Raises MissingError, and then has changed nothing.
    """
    connection = await asyncpg.connect(dsn)
    cluster = await asyncpg.connect(cluster_dsn or dsn)
    try:
        missing = await _missing(connection)
        if missing:
            raise MissingError("\n".join(missing))
        # Databases that are added to a node at the same time would both write there what they share: the roles.
        await cluster.execute("SELECT pg_advisory_lock($1)", LOCK)
        known, told = await _nodes(connection), await _nodes(cluster)
        if all(node["coordinator"] for node in (*known, *told)):
            raise MissingError(
                "no worker node is known: on this database run SELECT citus_set_coordinator_host('HOST', PORT) and, for"
                " each worker, which has a database of the same name with the extension, SELECT citus_add_node('HOST',"
                " PORT); or set HOLDFAST_CITUS_DSN to a database of this coordinator that has done so"
            )
        database = await connection.fetchval("SELECT current_database()")
        await connection.execute(EXTEND)
        for node in told:
            place = (node["nodename"], node["nodeport"])
            if node in known:
                continue
            if node["coordinator"]:
                await connection.execute("SELECT citus_set_coordinator_host($1, $2)", *place)
            else:
                await _make_database(cluster_dsn, *place, database)
                await connection.execute("SELECT citus_add_node($1, $2)", *place)
    finally:
        await cluster.close()
        await connection.close()


async def distribute(dsn: str, service: str, shards: int, schema: str = "public") -> list[str]:
    """Spread what is not spread yet of a schema of a prepared database; return the names of these tables."""
    wanted = plan(service)
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
        await connection.execute(f"SET search_path TO {schema}")
        await connection.execute(f"SET citus.shard_count TO {shards}")
        for name, value in COORDINATOR.items():
            await connection.execute(f"SET {name} TO {value}")
        for statement in OUTSIDE:
            await connection.execute("SELECT run_command_on_all_nodes($1)", statement)
        await _set(connection, wanted)
        tables = [*wanted.reference, *wanted.distributed]
        spread = {row[0] for row in await connection.fetch(SPREAD, tables)}
        fresh = [table for table in tables if table not in spread]
        if fresh:
            await _drop_keys(connection, tables)
        online = await connection.fetchval(ONLINE)
        for table in fresh:
            await _spread(connection, table, wanted.distributed.get(table), online=online)
        await _restore_keys(connection)
        return fresh
    finally:
        await connection.close()


async def _missing(connection: Connection) -> list[str]:
    missing = []
    if not await connection.fetchval(AVAILABLE):
        missing.append("this PostgreSQL has no Citus: install it on the coordinator and on every worker")
    if not await connection.fetchval(LOADED):
        missing.append("Citus is not loaded: put it first in shared_preload_libraries on every node, and restart them")
    if not await connection.fetchval(PREPARED_MAX):
        missing.append("max_prepared_transactions is 0: set it to max_connections or more on every node, and restart")
    return missing


async def _nodes(connection: Connection) -> list[asyncpg.Record]:
    return await connection.fetch(NODES) if await connection.fetchval(EXTENDED) else []


async def _make_database(cluster_dsn: str, host: str, port: int, database: str) -> None:
    """Make the database on a worker, reached as the coordinator is."""
    connection = await asyncpg.connect(cluster_dsn, host=host, port=port)
    try:
        await connection.execute(f'CREATE DATABASE "{database}"')
    except asyncpg.DuplicateDatabaseError:
        pass
    finally:
        await connection.close()
    connection = await asyncpg.connect(cluster_dsn, host=host, port=port, database=database)
    try:
        await connection.execute(EXTEND)
    finally:
        await connection.close()


async def _set(connection: Connection, wanted: Plan) -> None:
    """Settings of the database, for the sessions to come: of clients on the coordinator, of Citus on the workers."""
    database = await connection.fetchval("SELECT quote_ident(current_database())")
    for name, value in COORDINATOR.items():
        await connection.execute(f"ALTER DATABASE {database} SET {name} TO '{value}'")
    for name, value in wanted.workers.items():
        await connection.execute(
            "SELECT run_command_on_workers($1)", f"ALTER DATABASE {database} SET {name} TO '{value}'"
        )


async def _drop_keys(connection: Connection, tables: Sequence[str]) -> None:
    async with connection.transaction():
        await connection.execute(KEEP_KEYS)
        for row in await connection.fetch(KEYS, tables):
            await connection.execute(KEEP_KEY, row["make"])
            await connection.execute(row["drop"])


async def _restore_keys(connection: Connection) -> None:
    async with connection.transaction():
        await connection.execute(KEEP_KEYS)
        for row in await connection.fetch(KEPT_KEYS):
            await connection.execute(row["statement"])


async def _spread(connection: Connection, table: str, column: str | None, *, online: bool) -> None:
    if column is None:
        await connection.execute("SELECT create_reference_table($1::regclass)", table)
    elif online and await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table})"):  # noqa: S608 - of our own file
        await connection.execute("SELECT create_distributed_table_concurrently($1::regclass, $2)", table, column)
    else:
        await connection.execute("SELECT create_distributed_table($1::regclass, $2)", table, column)
        await connection.execute("SELECT truncate_local_data_after_distributing_table($1::regclass)", table)
