"""`make endurance`: minutes at capacity, minutes at three times of it, and everything is again as it was.

`python -m tests.model.endurance [--minutes 10]`. What a pod can do is found with callers that each wait for their
answers: as many as ever go on is capacity. Overload is orders that come whether the ones before were answered or not,
three times as many; a caller gives up after four seconds and does not come again. To be refused as one too many
(RESOURCE_EXHAUSTED) is then no error; what counts is how many others are served meanwhile.

Between the phases it is calm, and what pods and databases hold is weighed: memory, files, threads, tasks, and rows that
are there only while something is under way. The last calm has to weigh what the first did.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import asyncpg
import psutil
import uvloop
from grpc import aio
from holdfast.inventory.v1 import inventory_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from deploy.local.stack import REPOSITORY, Stack
from deploy.local.supervisor import Pod, Supervisor
from tests.model import auditor
from tests.model.auditor import Deployment, Report
from tests.model.history import Call, Client, End, History
from tests.model.shoppers import LOCATIONS, stock_up

SKUS = tuple(f"SKU-{number:03}" for number in range(200))
UNITS = 10_000_000
CLIENTS, CALLERS = 2, 16  # CLIENTS connections, and so many callers on each
TTL_SECONDS = 5.0
FINDING_SECONDS = 20.0
OVER = 3
CALM_SECONDS_MAX = 90.0
SAMPLE_SECONDS = 5.0
GOODPUT_SHARE_MIN = 0.7  # of capacity, at three times of it
AGAIN_SHARE_MIN = 0.8  # of capacity, when all is over
SLOWER_MAX = 1.5  # median latency when all is over, over what it was
MEMORY_SHARE_MAX = 1.25  # of a pod's memory, over what it was after the first minutes
MORE_MAX = 8  # files, threads and tasks of a pod more than there were
# Rows that are there only while something is under way.
PASSING = {
    "inventory": ("movement_outbox", "outbox", "hold WHERE held > 0"),
    "reservation": ("outbox", "reservation_change WHERE state = 'PENDING'", "reservation WHERE state = 'HELD'"),
    "analytics": ("desk.outbox", "gap"),
}


class Forgetful(list[Call]):
    """Calls that are counted when they end, and not kept."""

    def append(self, _call: Call) -> None:
        pass


@dataclass
class Phase:
    """What became of the calls of one load, and in what time (seconds)."""

    name: str
    seconds: float = 0.0
    orders: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    def count(self, call: Call) -> None:
        """OK, or why not; a refusal that has to do with the order itself is an answer."""
        good = call.end is not End.UNKNOWN
        self.ended["OK" if good else call.reason] += 1
        if good:
            self.latencies.append(call.answered - call.sent)

    @property
    def rate(self) -> float:
        """Calls answered well in a second."""
        return self.ended["OK"] / self.seconds if self.seconds else 0.0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.latencies) or [0.0]
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


@dataclass
class Weight:
    """What a pod holds at a moment."""

    memory_mb: float
    files: int
    threads: int
    tasks: int


@dataclass
class Calm:
    """What there is when nothing is under way."""

    pods: dict[str, Weight]
    rows: dict[str, int]
    connections: int  # to PostgreSQL


@dataclass
class Outcome:
    """What a run came to."""

    phases: list[Phase] = field(default_factory=list)
    calms: list[Calm] = field(default_factory=list)
    memory_mb: list[dict[str, float]] = field(default_factory=list)  # of each pod, every SAMPLE_SECONDS
    report: Report = field(default_factory=Report)

    def problems(self) -> list[str]:
        """What is not as it was, or as it has to be."""
        found, at_all, over, again = self.phases
        first, last = self.calms[0], self.calms[-1]
        wrong = list(self.report.violations)
        for what, value, least in (
            (f"goodput at {OVER} times capacity", over.rate / at_all.rate, GOODPUT_SHARE_MIN),
            ("capacity afterwards", again.rate / found.rate, AGAIN_SHARE_MIN),
        ):
            if value < least:
                wrong.append(f"{what}: {value:.2f} of what it was")
        if again.percentile(0.5) > found.percentile(0.5) * SLOWER_MAX:
            wrong.append(f"median latency: {again.percentile(0.5):.3f} s, and was {found.percentile(0.5):.3f} s")
        wrong += [f"{table}: {count} rows are left" for table, count in last.rows.items() if count]
        for pod, was in first.pods.items():
            now = last.pods[pod]
            if now.memory_mb > was.memory_mb * MEMORY_SHARE_MAX:
                wrong.append(f"{pod}: {now.memory_mb:.0f} MB, and were {was.memory_mb:.0f} MB")
            for name in ("files", "threads", "tasks"):
                if getattr(now, name) > getattr(was, name) + MORE_MAX:
                    wrong.append(f"{pod}: {getattr(now, name)} {name}, and were {getattr(was, name)}")
        return wrong


class Load:
    """Orders of a few lines, and what becomes of them: each a reservation that is paid, given back, or forgotten."""

    def __init__(self, clients: list[Client], dice: random.Random) -> None:
        self._clients = clients
        self._dice = dice
        self._number = 0

    async def order(self, phase: Phase) -> None:
        self._number += 1
        phase.orders += 1
        name, client = f"o-{self._number}", self._clients[self._number % len(self._clients)]
        skus = self._dice.sample(SKUS, self._dice.choice([1, 1, 2, 3]))
        lines = [(sku, self._dice.choice([*LOCATIONS, ""]), self._dice.randint(1, 3)) for sku in sorted(skus)]
        held = await client.reserve(name, lines, "ALL", TTL_SECONDS)
        phase.count(held)
        if held.outcome != "HELD":
            return
        fate = self._dice.random()
        if fate < 0.6:
            phase.count(await client.confirm(name, "paid"))
        elif fate < 0.8:
            phase.count(await client.cancel(name, "changed-my-mind"))

    async def closed(self, phase: Phase, seconds: float) -> None:
        """Callers that each send an order when the one before is done."""
        began = time.monotonic()

        async def caller() -> None:
            while time.monotonic() < began + seconds:
                await self.order(phase)

        await asyncio.gather(*(caller() for _ in range(CLIENTS * CALLERS)))
        phase.seconds = time.monotonic() - began

    async def open(self, phase: Phase, seconds: float, orders_per_second: float) -> None:
        """Orders that come at random, so many in a second."""
        began = due = time.monotonic()
        under_way: set[asyncio.Task[None]] = set()
        while (due := due + self._dice.expovariate(orders_per_second)) < began + seconds:
            await asyncio.sleep(max(0, due - time.monotonic()))
            task = asyncio.ensure_future(self.order(phase))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if under_way:
            await asyncio.wait(under_way)
        phase.seconds = time.monotonic() - began


async def run(root: Path, *, seconds: float, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Find capacity; so many seconds at it, as many at OVER times of it; find it again. Calm between, and audit."""
    outcome = Outcome()
    stack = Stack(root)
    with stack.start(fresh=True), Supervisor(stack).start() as pods:
        dice = random.Random(0)
        targets = pods.targets["inventory"], pods.targets["reservation"]
        await _stock_up(targets, dice)
        history = History()
        history.calls = Forgetful()
        clients = [Client(history, *targets, give_up=0, dice=dice) for _ in range(CLIENTS)]
        load = Load(clients, dice)
        found, at_all, over, again = outcome.phases = [
            Phase("capacity"), Phase("at capacity"), Phase(f"{OVER} times"), Phase("capacity again")
        ]  # fmt: skip
        weighing = asyncio.ensure_future(_weigh(pods, outcome))
        try:
            say("finding capacity")
            await load.closed(found, FINDING_SECONDS)
            say("at capacity")
            await load.closed(at_all, seconds)
            say("calm")
            outcome.calms.append(await _calm(stack, pods))
            say(f"{OVER} times capacity")
            await load.open(over, seconds, OVER * at_all.orders / at_all.seconds)
            say("calm")
            outcome.calms.append(await _calm(stack, pods))
            say("finding capacity again")
            await load.closed(again, FINDING_SECONDS)
            outcome.calms.append(await _calm(stack, pods))
        finally:
            weighing.cancel()
            for client in clients:
                await client.__aexit__()
        say("auditing")
        dsn = stack.postgres_dsn
        at = Deployment(dsn("inventory"), dsn("reservation"), dsn("analytics"), stack.kafka_bootstrap)
        outcome.report.add(await auditor.audit(at))
    return outcome


async def _stock_up(targets: tuple[str, str], dice: random.Random) -> None:
    async with (
        Client(History(), *targets, give_up=20, dice=dice) as client,
        aio.insecure_channel(targets[0]) as channel,
    ):
        await stock_up(client, inventory_pb2_grpc.InventoryServiceStub(channel), SKUS, UNITS)


async def _weigh(pods: Supervisor, outcome: Outcome) -> None:
    while True:
        outcome.memory_mb.append({pod.name: psutil.Process(pod.pid).memory_info().rss / 1e6 for pod in pods.pods})
        await asyncio.sleep(SAMPLE_SECONDS)


async def _calm(stack: Stack, pods: Supervisor) -> Calm:
    """What there is once nothing passes any more, or when CALM_SECONDS_MAX have gone by."""
    until = time.monotonic() + CALM_SECONDS_MAX
    await asyncio.sleep(TTL_SECONDS)
    while any((rows := await _rows(stack)).values()) and time.monotonic() < until:
        await asyncio.sleep(1)
    await asyncio.sleep(SAMPLE_SECONDS)
    weights = {pod.name: await _weight(pod) for pod in pods.pods}
    connection = await asyncpg.connect(stack.postgres_dsn("postgres"))
    try:
        count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        return Calm(weights, rows, await connection.fetchval(count))
    finally:
        await connection.close()


async def _rows(stack: Stack) -> dict[str, int]:
    found = {}
    for database, tables in PASSING.items():
        connection = await asyncpg.connect(stack.postgres_dsn(database))
        try:
            for table in tables:
                found[f"{database}: {table}"] = await connection.fetchval(f"SELECT count(*) FROM {table}")
        finally:
            await connection.close()
    return found


async def _weight(pod: Pod) -> Weight:
    process = psutil.Process(pod.pid)
    async with aiohttp.ClientSession() as http, http.get(f"http://{pod.metrics_address}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    tasks = next(sample.value for family in families for sample in family.samples if sample.name == "holdfast_tasks")
    return Weight(process.memory_info().rss / 1e6, process.num_fds(), process.num_threads(), int(tasks))


# -- the command ------------------------------------------------------------------------------------------------------


def show(console: Console, outcome: Outcome) -> None:
    loads = Table("load", "calls/s", "p50 ms", "p99 ms", "answered", "not answered", box=None, pad_edge=False)
    for phase in outcome.phases:
        others = ", ".join(f"{count:,} {why}" for why, count in phase.ended.most_common() if why != "OK")
        loads.add_row(
            phase.name, f"{phase.rate:.0f}", f"{phase.percentile(0.5) * 1000:.0f}",
            f"{phase.percentile(0.99) * 1000:.0f}", f"{phase.ended['OK']:,}", others or "0",
        )  # fmt: skip
    console.print(loads)
    pods = Table("pod", "MB", "most", "files", "threads", "tasks", box=None, pad_edge=False)
    for pod in outcome.calms[0].pods:
        calm = [one.pods[pod] for one in outcome.calms]
        pods.add_row(
            pod, " > ".join(f"{one.memory_mb:.0f}" for one in calm),
            f"{max(sample[pod] for sample in outcome.memory_mb):.0f}",
            *(" > ".join(str(getattr(one, name)) for one in calm) for name in ("files", "threads", "tasks")),
        )  # fmt: skip
    console.print(pods)
    rows = Table("rows that pass", "when calm", box=None, pad_edge=False)
    for table in outcome.calms[0].rows:
        rows.add_row(table, " > ".join(str(one.rows[table]) for one in outcome.calms))
    rows.add_row("connections to PostgreSQL", " > ".join(str(one.connections) for one in outcome.calms))
    console.print(rows)
    problems = outcome.problems()
    console.print(f"movements audited: {outcome.report.looked_at['movements']:,}; not as it was: {len(problems)}")
    for problem in problems[:40]:
        console.print(f"[red]{problem}[/]", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.endurance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="at capacity, and again over it")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="holdfast-endurance-") as root:
        outcome = uvloop.run(
            run(Path(root), seconds=arguments.minutes * 60, say=lambda line: console.print(f"{line} ...", style="dim"))
        )
    show(console, outcome)
    kept = REPOSITORY / ".local" / "endurance.json"
    kept.parent.mkdir(exist_ok=True)
    figures = {
        "minutes": arguments.minutes,
        "phases": [
            {"name": phase.name, "seconds": round(phase.seconds, 1), "ended": dict(phase.ended), "rate": phase.rate,
             "p50": phase.percentile(0.5), "p99": phase.percentile(0.99)}
            for phase in outcome.phases
        ],
        "calms": [asdict(calm) for calm in outcome.calms],
        "memory_mb": outcome.memory_mb,
        "problems": outcome.problems(),
    }  # fmt: skip
    kept.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(outcome.problems()))


if __name__ == "__main__":
    sys.exit(main())
