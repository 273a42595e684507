"""`python -m services.analytics [--role api|worker|all]`: builds the parts and runs them.

`python -m services.analytics rebuild` makes the database anew from the topics (`rebuild`).
"""

import argparse
import sys
from typing import Any

import uvloop
from holdfast.analytics.v1 import (
    analytics_pb2,
    analytics_pb2_grpc,
    fraud_pb2,
    fraud_pb2_grpc,
    notification_pb2,
    notification_pb2_grpc,
)

from services.analytics.delivery import channels
from services.analytics.fraud_servicer import FraudServicer
from services.analytics.notification_servicer import NotificationServicer
from services.analytics.rebuild import rebuild
from services.analytics.servicer import ERRORS, Servicer
from services.analytics.settings import Settings
from services.analytics.turns import Turns
from services.analytics.workers import Workers
from shared import logs, server
from shared.database import Database
from shared.redis_client import connect
from shared.settings import load

APIS = (
    analytics_pb2.DESCRIPTOR.services_by_name["AnalyticsService"].full_name,
    fraud_pb2.DESCRIPTOR.services_by_name["FraudService"].full_name,
    notification_pb2.DESCRIPTOR.services_by_name["NotificationService"].full_name,
)


async def run(settings: Settings, role: str) -> None:
    """Run a pod until it is told to stop. A worker serves health alone."""
    # Reports choose their own joins; following events is by key, in order, as it is for the other services.
    reads = await Database.connect(
        settings.database_dsn,
        name=settings.pod,
        connections_max=settings.database_connections_max,
        timeout_seconds=settings.report_seconds_max,
        planner={"jit": "off"},
        pool_name="reports",
    )
    writes = await Database.connect(
        settings.database_dsn,
        name=f"{settings.pod} worker",
        connections_max=settings.database_connections_max,
        timeout_seconds=settings.report_seconds_max,
    )
    client = connect(settings.redis_url, cluster=settings.redis_cluster)
    api = role in {"api", "all"}
    services = APIS if api else ()
    turns = Turns(settings.reports_max, settings.reports_waiting_max)
    backtests = Turns(1, settings.reports_waiting_max)
    adapters = channels(settings)

    def register(target: Any) -> None:
        if api:
            analytics_pb2_grpc.add_AnalyticsServiceServicer_to_server(Servicer(settings, reads, turns), target)
            fraud_pb2_grpc.add_FraudServiceServicer_to_server(FraudServicer(settings, reads, backtests), target)
            notifications = NotificationServicer(settings, reads, adapters)
            notification_pb2_grpc.add_NotificationServiceServicer_to_server(notifications, target)

    workers = Workers(settings, writes, client, adapters).run() if role in {"worker", "all"} else None
    try:
        await server.run(settings, ERRORS, register, services, workers)
    finally:
        for adapter in adapters.values():
            await adapter.close()
        await client.aclose()
        await writes.close()
        await reads.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.analytics", description="Run an analytics pod.")
    parser.add_argument("command", nargs="?", choices=("serve", "rebuild"), default="serve")
    parser.add_argument("--role", choices=("api", "worker", "all"), default="all", help="of a pod that serves")
    arguments = parser.parse_args()
    settings = load(Settings)
    logs.configure(level=settings.log_level, style=settings.log_format, pod=settings.pod)
    if arguments.command == "rebuild":
        events = uvloop.run(rebuild(settings))
        sys.stdout.write(f"rebuilt from {events:,} events\n")
        return
    uvloop.run(run(settings, arguments.role))


if __name__ == "__main__":
    main()
