"""`python -m tests.model.audit`: judges a deployment that runs, without changing anything in it.

By default the one that `make up` or `make run` started; any other by its addresses. It reads inventory's books in one
snapshot, and then whether reservations, topics and mart follow: what differs gets `--patience` seconds to do so.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.model.auditor import Deployment, Report, audit, lateness

ROOT = Path(__file__).parents[2]


def show(console: Console, report: Report, late: list[tuple[float, float]]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, count in sorted(report.looked_at.items()):
        table.add_row(name, f"{count:,}")
    if late:
        table.add_row("expired late, p99", f"{late[len(late) * 99 // 100][0]:.2f} s")
    table.add_row("violations", f"{len(report.violations):,}")
    console.print(table)
    for violation in report.violations:
        console.print(violation, style="red", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.audit", description=__doc__)
    parser.add_argument("--endpoints", type=Path, default=ROOT / ".local/endpoints.json", help="as `make up` writes it")
    parser.add_argument("--inventory-dsn", default="")
    parser.add_argument("--reservation-dsn", default="")
    parser.add_argument("--analytics-dsn", default="")
    parser.add_argument("--kafka", default="", help="host:port")
    parser.add_argument("--patience", type=float, default=60, help="seconds in which what follows may follow")
    asked = parser.parse_args()
    at = Deployment(asked.inventory_dsn, asked.reservation_dsn, asked.analytics_dsn, asked.kafka)
    if not at.inventory_dsn:
        if not asked.endpoints.exists():
            parser.error(f"{asked.endpoints} is not there: `make up`, or say --inventory-dsn")
        told = json.loads(asked.endpoints.read_text())
        dsns = told["dsns"]
        at = Deployment(dsns["inventory"], dsns["reservation"], dsns["analytics"], told["kafka"])

    async def work() -> tuple[Report, list[tuple[float, float]]]:
        return await audit(at, patience=asked.patience), await lateness(at.inventory_dsn)

    report, late = asyncio.run(work())
    show(Console(), report, late)
    return int(bool(report.violations))


if __name__ == "__main__":
    sys.exit(main())
