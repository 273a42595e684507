"""`python -m deploy.local run|demo|up|down`: everything on this machine, with one command."""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.local import orders, report
from deploy.local.analysis import analyse, caught_up, notified, subscribe
from deploy.local.receiver import Receiver
from deploy.local.replay import Replay, look
from deploy.local.stack import REPOSITORY, Stack, StackError, until_interrupted
from deploy.local.supervisor import Supervisor
from shared.client import Holdfast

UP_SECONDS_MAX = 240
DOWN_SECONDS_MAX = 60


class StoppedError(BaseException):
    """SIGTERM, raised where the program is, so that everything is stopped on the way out."""


@contextlib.contextmanager
def running(root: Path, console: Console, *, fresh: bool) -> Iterator[tuple[Stack, Supervisor]]:
    """The stack and its pods; stopped however the block ends."""

    def say(line: str) -> None:
        console.print(f"  {line}", style="dim", highlight=False)

    stack = Stack(root, say=say, citus_dsn=os.environ.get("CITUS_DSN", ""))
    with stack.start(fresh=fresh), Supervisor(stack, say=say).start() as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        yield stack, supervisor


def demo(arguments: argparse.Namespace, console: Console, *, stay: bool) -> int:
    """Replay, say what happened, write demo.json; 0 when nothing was oversold, nothing drifted, no error."""
    book = _book(arguments)
    console.print("[bold]Starting[/] PostgreSQL, Redis, Kafka and two pods of each service")
    notifications = arguments.root / "notifications"
    shutil.rmtree(notifications, ignore_errors=True)
    with (
        Receiver(notifications / "webhook.jsonl") as receiver,
        running(arguments.root, console, fresh=True) as (stack, supervisor),
    ):
        orders.write_rejects(book, arguments.root / "rejects.csv")
        console.print(
            f"[bold]Replaying[/] {len(book.orders):,} orders of {len(book.catalogue):,} SKUs"
            f" with {arguments.opening_stock:,} units each, {arguments.concurrency} at a time"
        )
        result = asyncio.run(_replay(arguments, book, stack, supervisor, receiver, console))
        report.show(console, result)
        report.show_reports(console, result["reports"])
        report.show_cases(console, result)
        report.show_notifications(console, result, os.path.relpath(notifications))
        file = arguments.root / "demo.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"\nAll figures are in {os.path.relpath(file)}.")
        if stay:
            report.how(console, supervisor.targets, next(iter(book.catalogue), "20000"))
            console.print("[bold]Running until Ctrl-C.[/]")
            until_interrupted()
    return 0 if report.sound(result) else 1


async def _replay(
    arguments: argparse.Namespace,
    book: orders.Book,
    stack: Stack,
    supervisor: Supervisor,
    receiver: Receiver,
    console: Console,
) -> dict[str, Any]:
    columns = (TextColumn("  orders"), BarColumn(40), MofNCompleteColumn(), TimeRemainingColumn())
    async with Holdfast(*(supervisor.targets[name] for name in ("inventory", "reservation", "analytics"))) as holdfast:
        replay = Replay(holdfast, book, run_id=uuid.uuid4().hex[:8], opening_stock=arguments.opening_stock)
        await subscribe(holdfast, receiver)
        await replay.load()
        await caught_up(holdfast)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("orders", total=len(book.orders))
            await replay.run(concurrency=arguments.concurrency, done=lambda: progress.advance(task))
        truth = await look(replay.tally, stack.postgres_dsn("inventory"), stack.postgres_dsn("reservation"))
        insights = await analyse(holdfast, stack.postgres_dsn("inventory"), stack.postgres_dsn("analytics"))
        insights |= await notified(holdfast)
        pods = {
            service: sorted(pod for pod in holdfast.pods if pod.startswith(service)) for service in supervisor.targets
        }
    return report.figures(book, replay.tally, truth, pods) | insights


def _book(arguments: argparse.Namespace) -> orders.Book:
    if arguments.orders is None:
        return orders.invent(arguments.limit or 3_000)
    try:
        return orders.read(arguments.orders, arguments.limit)
    except OSError as error:
        raise StackError(f"cannot read the orders: {error}") from None


def serve(arguments: argparse.Namespace, console: Console) -> int:
    """Everything up, in the foreground, with the data of earlier runs."""
    with running(arguments.root, console, fresh=False):
        until_interrupted()
    return 0


def up(arguments: argparse.Namespace, console: Console) -> int:
    """`serve` in the background; returns when every pod serves."""
    endpoints = arguments.root / "endpoints.json"
    if endpoints.exists() and _alive(endpoints):
        console.print("Already up: `make down` stops it.")
        return 0
    endpoints.unlink(missing_ok=True)
    log = arguments.root / "log" / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", "serve", "--root", str(arguments.root)],
            cwd=REPOSITORY, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    began = time.monotonic()
    while not endpoints.exists():
        if process.poll() is not None or time.monotonic() - began > UP_SECONDS_MAX:
            console.print(log.read_text().strip(), highlight=False)
            return 1
        time.sleep(0.1)
    found = json.loads(endpoints.read_text())
    for service, target in found["targets"].items():
        console.print(f"{service:<12} {target}", highlight=False)
    console.print("Up. `make down` stops it.")
    return 0


def down(arguments: argparse.Namespace, console: Console) -> int:
    """Stop what `up` started, and wait for it."""
    endpoints = arguments.root / "endpoints.json"
    if not endpoints.exists() or not _alive(endpoints):
        endpoints.unlink(missing_ok=True)
        console.print("Nothing is up.")
        return 0
    supervisor = json.loads(endpoints.read_text())["pids"]["supervisor"]
    os.kill(supervisor, signal.SIGTERM)
    began = time.monotonic()
    while _alive(endpoints) and time.monotonic() - began < DOWN_SECONDS_MAX:
        time.sleep(0.1)
    console.print("Down.")
    return 0


def _alive(endpoints: Path) -> bool:
    try:
        os.kill(json.loads(endpoints.read_text())["pids"]["supervisor"], 0)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _stopped(_number: int, _frame: FrameType | None) -> None:
    raise StoppedError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("command", choices=("run", "demo", "up", "down", "serve"))
    parser.add_argument("--orders", type=Path, help="a file in the Online Retail format, plain or gzip")
    parser.add_argument("--limit", type=int, help="replay only so many orders")
    parser.add_argument("--concurrency", type=int, default=32, help="orders at a time (1: reproducible)")
    parser.add_argument("--opening-stock", type=int, default=300, help="units of each SKU at the start")
    parser.add_argument("--root", type=Path, default=REPOSITORY / ".local", help="where data and logs are kept")
    arguments = parser.parse_args()
    if arguments.concurrency < 1 or arguments.opening_stock < 0 or (arguments.limit or 1) < 1:
        parser.error("--concurrency and --limit are at least 1, --opening-stock at least 0")
    arguments.root = arguments.root.resolve()
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _stopped)
    try:
        match arguments.command:
            case "run":
                return demo(arguments, console, stay=True)
            case "demo":
                return demo(arguments, console, stay=False)
            case "up":
                return up(arguments, console)
            case "down":
                return down(arguments, console)
            case _:
                return serve(arguments, console)
    except StackError as error:
        console.print(f"[bold red]Holdfast cannot start:[/] {error}", soft_wrap=True)
        return 1
    except (KeyboardInterrupt, StoppedError):
        console.print("\nStopped.")
        return 0


if __name__ == "__main__":
    sys.exit(main())
