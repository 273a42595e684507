"""`python -m services.reservation [--role api|worker|all]`: builds the parts and runs them."""

import argparse
import asyncio
from typing import Any

import uvloop
from holdfast.reservation.v1 import reservation_pb2, reservation_pb2_grpc

from services.reservation.commands import Commands
from services.reservation.guard import Guard
from services.reservation.inventory import Inventory
from services.reservation.servicer import ERRORS, Servicer
from services.reservation.settings import Settings
from services.reservation.subjects import Subjects, parse_keys
from services.reservation.verdicts import Follower
from services.reservation.workers import Workers
from shared import logs, server
from shared.channel import open_channel
from shared.database import Database
from shared.redis_client import connect
from shared.settings import load
from shared.workers import restarting

NAME = reservation_pb2.DESCRIPTOR.services_by_name["ReservationService"].full_name


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
    channel = open_channel(settings.inventory_target, settings.tls_directory)
    subjects = Subjects(parse_keys(settings.subject_keys.get_secret_value()))
    api = role in {"api", "all"}
    guard, following = None, None
    if api and settings.enforcement != "off":
        closed, stale_seconds = settings.enforcement == "closed", settings.enforcement_stale_seconds
        guard = Guard(subjects, closed=closed, stale_seconds=stale_seconds)
        follower = Follower(settings.brokers, guard)
        following = asyncio.create_task(restarting("verdicts", follower.run))
        await follower.complete(settings.enforcement_start_seconds)
    commands = Commands(database, Inventory(channel), subjects, guard)
    services = [NAME] if api else []

    def register(target: Any) -> None:
        if api:
            servicer = Servicer(settings, database, commands, subjects)
            reservation_pb2_grpc.add_ReservationServiceServicer_to_server(servicer, target)

    workers = Workers(settings, database, commands, client).run() if role in {"worker", "all"} else None
    try:
        await server.run(settings, ERRORS, register, services, workers)
    finally:
        if following:
            following.cancel()
            await asyncio.wait([following])
        await channel.close(None)
        await client.aclose()
        await database.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.reservation", description="Run a reservation pod.")
    parser.add_argument("--role", choices=("api", "worker", "all"), default="all")
    role = parser.parse_args().role
    settings = load(Settings)
    logs.configure(level=settings.log_level, style=settings.log_format, pod=settings.pod)
    uvloop.run(run(settings, role))


if __name__ == "__main__":
    main()
