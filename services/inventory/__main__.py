"""`python -m services.inventory [--role api|worker|all]`: builds the parts and runs them.

`python -m services.inventory repair [--apply]` says which entries would mend what the reconciler finds, and
writes them.
"""

import argparse
import sys
import uuid
from typing import Any

import uvloop
from holdfast.inventory.v1 import inventory_pb2, inventory_pb2_grpc

from services.inventory.cache import Cache
from services.inventory.commands import Commands
from services.inventory.servicer import ERRORS, Servicer
from services.inventory.settings import Settings
from services.inventory.watch import Watch
from services.inventory.workers import Workers
from shared import logs, server
from shared.database import Database
from shared.redis_client import connect
from shared.settings import load

NAME = inventory_pb2.DESCRIPTOR.services_by_name["InventoryService"].full_name


async def run(settings: Settings, role: str) -> None:
    """Run a pod until it is told to stop. A worker serves health alone."""
    database = await Database.connect(
        settings.database_dsn,
        name=settings.pod,
        connections_max=settings.database_connections_max,
        timeout_seconds=settings.database_timeout_seconds,
        idle_seconds_max=settings.database_idle_seconds_max,
    )
    client = connect(settings.redis_url, cluster=settings.redis_cluster)
    cache = Cache(
        database,
        client,
        local_seconds=settings.cache_local_seconds,
        redis_seconds=settings.cache_redis_seconds,
        keys_max=settings.cache_keys_max,
    )
    commands = Commands(database, cache)
    watch = Watch(database, poll_seconds=settings.watch_poll_seconds, streams_max=settings.watch_streams_max)
    servicer = Servicer(settings, database, commands, cache, watch)
    api = role in {"api", "all"}
    services = [NAME] if api else []

    def register(target: Any) -> None:
        if api:
            inventory_pb2_grpc.add_InventoryServiceServicer_to_server(servicer, target)

    workers = Workers(settings, database, commands, client).run() if role in {"worker", "all"} else None
    try:
        await server.run(settings, ERRORS, register, services, workers)
    finally:
        await cache.close()
        await client.aclose()
        await database.close()


async def repair(settings: Settings, *, apply: bool) -> int:
    """Reconcile once and print what drifts, with the entries that mend it; 1 while anything drifts."""
    database = await Database.connect(settings.database_dsn, name=f"{settings.pod} repair")
    client = connect(settings.redis_url, cluster=settings.redis_cluster)
    cache = Cache(database, client, local_seconds=0, redis_seconds=settings.cache_redis_seconds, keys_max=1)
    commands = Commands(database, cache)
    try:
        drifted, first = await commands.reconcile()
        entries = await commands.repair(first, f"repair-{uuid.uuid4().hex[:12]}", apply=apply) if first else []
    finally:
        await cache.close()
        await client.aclose()
        await database.close()
    mended = {entry.after.key: entry for entry in entries}
    for drift in first:
        entry = mended.get(drift.key)
        entry_says = (
            f"on hand {entry.on_hand_delta:+}, held {entry.held_delta:+}, short {entry.short_delta:+}"
            if entry
            else "versions are missing: it takes a person"
        )
        sys.stdout.write(f"{drift.key[0]} at {drift.key[1]}: {drift.units} units; entry: {entry_says}\n")
    done = "written" if apply else "not written: --apply writes them"
    sys.stdout.write(f"{drifted} keys drift; {len(entries)} entries {done}\n")
    return int(drifted > (len(entries) if apply else 0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.inventory", description="Run an inventory pod.")
    parser.add_argument("command", nargs="?", choices=("serve", "repair"), default="serve")
    parser.add_argument("--role", choices=("api", "worker", "all"), default="all", help="of a pod that serves")
    parser.add_argument("--apply", action="store_true", help="write what repair would write")
    arguments = parser.parse_args()
    settings = load(Settings)
    logs.configure(level=settings.log_level, style=settings.log_format, pod=settings.pod)
    if arguments.command == "repair":
        sys.exit(uvloop.run(repair(settings, apply=arguments.apply)))
    uvloop.run(run(settings, arguments.role))


if __name__ == "__main__":
    main()
