"""`make endurance`: minutes at capacity, minutes with three times the callers, and everything is again as it was.

`python -m tests.model.endurance [--minutes 10]`. Capacity is found with callers that each wait for their answers, ever
twice as many, until more of them get no more done. Overload is three times as many, over queues that take as many calls
as capacity needs: who is one too many is told so (RESOURCE_EXHAUSTED), rests a moment and comes with another order.
That is no error; what counts is how many others are served meanwhile. Callers are processes of their own, on the same
machine: what they take of it, the services do not have.

Between the phases it is calm, and what pods and databases hold is weighed: memory, files, threads, tasks, and rows that
are there only while something is under way. The last calm has to weigh what the first did.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import aiohttp
import asyncpg
import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from deploy.local.stack import REPOSITORY, Stack
from deploy.local.supervisor import SERVICES, Pod, Supervisor
from tests.model import auditor
from tests.model.auditor import Deployment, Report
from tests.model.history import Call, Client, End, History
from tests.model.shoppers import LOCATIONS, stock_up

SKUS = tuple(f"SKU-{number:03}" for number in range(200))
UNITS = 10_000_000
GENERATORS = 2  # processes that call
CALLERS = (32, 64, 128)  # of all generators together, until more get no more done
MORE_SHARE_MIN = 1.1  # answered of more callers over what fewer got, to count as more
TTL_SECONDS = 5.0
FINDING_SECONDS = 15.0
FOUND_TIMES_MAX = 3  # that capacity is looked for when all is over
OVER = 3
QUEUE_ITEMS = 64  # of a pod of reservation: what is more is refused
REST_SECONDS = 0.2  # of a caller that was not answered
CALM_SECONDS_MAX = 90.0
SAMPLE_SECONDS = 5.0
GOODPUT_SHARE_MIN = 0.7  # of capacity, with OVER times the callers
AGAIN_SHARE_MIN = 0.8  # of what was answered at capacity, when all is over
SLOWER_MAX = 1.5  # median latency when all is over, over what it was at capacity
MEMORY_SHARE_MAX = 1.25  # of a pod's memory, over the most that a pod of its service had after the first minutes
MORE_MAX = 8  # files, threads and tasks of a pod more than that
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

    def most(self, pod: str) -> Weight:
        """What any pod of a pod's service holds: the work that one of them does at a time may pass on to another."""
        service = pod.partition("-")[0]
        weights = [weight for name, weight in self.pods.items() if name.partition("-")[0] == service]
        return Weight(*(max(getattr(weight, one.name) for weight in weights) for one in fields(Weight)))


@dataclass
class Outcome:
    """What a run came to."""

    phases: list[Phase] = field(default_factory=list)
    calms: list[Calm] = field(default_factory=list)
    memory_mb: list[dict[str, float]] = field(default_factory=list)  # of each pod, every SAMPLE_SECONDS
    report: Report = field(default_factory=Report)

    def problems(self) -> list[str]:
        """What is not as it was, or as it has to be."""
        _, at_all, over, again = self.phases
        first, last = self.calms[0], self.calms[-1]
        wrong = list(self.report.violations)
        if over.rate < at_all.rate * GOODPUT_SHARE_MIN:
            wrong.append(f"goodput with {OVER} times the callers: {over.rate / at_all.rate:.2f} of what it was")
        if not as_before(again, at_all):
            wrong.append(
                f"afterwards: {again.rate:.0f} calls/s in {again.percentile(0.5):.3f} s,"
                f" and were {at_all.rate:.0f} in {at_all.percentile(0.5):.3f} s"
            )
        wrong += [f"{table}: {count} rows are left" for table, count in last.rows.items() if count]
        for pod, now in last.pods.items():
            was = first.most(pod)
            if now.memory_mb > was.memory_mb * MEMORY_SHARE_MAX:
                wrong.append(f"{pod}: {now.memory_mb:.0f} MB, and were {was.memory_mb:.0f} MB")
            for name in ("files", "threads", "tasks"):
                if getattr(now, name) > getattr(was, name) + MORE_MAX:
                    wrong.append(f"{pod}: {getattr(now, name)} {name}, and were {getattr(was, name)}")
        return wrong


def as_before(now: Phase, before: Phase) -> bool:
    """Whether as many calls are answered as soon."""
    soon = now.percentile(0.5) <= before.percentile(0.5) * SLOWER_MAX
    return soon and now.rate >= before.rate * AGAIN_SHARE_MIN


class Load:
    """Orders of a few lines, and what becomes of them: each a reservation that is paid, given back, or forgotten."""

    def __init__(self, client: Client, name: str, dice: random.Random) -> None:
        self._client = client
        self._name = name
        self._dice = dice
        self.phase = Phase(name)

    async def order(self) -> bool:
        """Whether it was answered, be it that there is not enough."""
        phase = self.phase
        phase.orders += 1
        name = f"{self._name}-{phase.orders}"
        skus = self._dice.sample(SKUS, self._dice.choice([1, 1, 2, 3]))
        lines = [(sku, self._dice.choice([*LOCATIONS, ""]), self._dice.randint(1, 3)) for sku in sorted(skus)]
        held = await self._client.reserve(name, lines, "ALL", TTL_SECONDS)
        phase.count(held)
        if held.outcome != "HELD":
            return held.end is not End.UNKNOWN
        fate = self._dice.random()
        if fate < 0.6:
            phase.count(await self._client.confirm(name, "paid"))
        elif fate < 0.8:
            phase.count(await self._client.cancel(name, "changed-my-mind"))
        return True

    async def run(self, seconds: float, callers: int) -> None:
        """Callers that each send an order when the one before is done."""
        until = time.monotonic() + seconds

        async def caller() -> None:
            while time.monotonic() < until:
                if not await self.order():
                    await asyncio.sleep(REST_SECONDS)

        await asyncio.gather(*(caller() for _ in range(callers)))


def generate(targets: tuple[str, str], name: str, seconds: float, callers: int) -> Phase:
    """One generator's part of a phase."""

    async def work() -> Phase:
        history = History()
        history.calls = Forgetful()
        dice = random.Random(name)
        async with Client(history, *targets, give_up=0, dice=dice) as client:
            load = Load(client, name, dice)
            began = time.monotonic()
            await load.run(seconds, callers)
            load.phase.seconds = time.monotonic() - began
        return load.phase

    return uvloop.run(work())


class Generators:
    """Processes that call, and what became of what they called."""

    def __init__(self, pool: ProcessPoolExecutor, targets: tuple[str, str]) -> None:
        self._pool = pool
        self._targets = targets
        self._runs = itertools.count()

    async def run(self, name: str, seconds: float, callers: int) -> Phase:
        run = next(self._runs)
        loop = asyncio.get_running_loop()
        parts = await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._pool, generate, self._targets, f"{run}-{number}", seconds, callers // GENERATORS
                )
                for number in range(GENERATORS)
            )
        )
        phase = Phase(name, max(part.seconds for part in parts), sum(part.orders for part in parts))
        for part in parts:
            phase.ended += part.ended
            phase.latencies += part.latencies
        return phase

    async def capacity(self, name: str) -> tuple[Phase, int]:
        """The most that is answered in a second, and by how many callers that were asked for."""
        most, wanted = await self.run(name, FINDING_SECONDS, CALLERS[0]), CALLERS[0]
        for callers in CALLERS[1:]:
            more = await self.run(name, FINDING_SECONDS, callers)
            if more.rate < most.rate * MORE_SHARE_MIN:
                break
            most, wanted = more, callers
        return most, wanted


async def run(root: Path, *, seconds: float, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Find capacity; so many seconds at it, as many with OVER times the callers; find it again. Audit."""
    outcome = Outcome()
    stack = Stack(root)
    queue = {"HOLDFAST_QUEUE_ITEMS_MAX": str(QUEUE_ITEMS)}
    services = [one._replace(settings=queue) if one.name == "reservation" else one for one in SERVICES]
    with (
        stack.start(fresh=True),
        Supervisor(stack, services=services).start() as pods,
        ProcessPoolExecutor(GENERATORS, multiprocessing.get_context("spawn")) as pool,
    ):
        targets = pods.targets["inventory"], pods.targets["reservation"]
        await stock_up(History(), targets, SKUS, UNITS)
        generators = Generators(pool, targets)
        weighing = asyncio.ensure_future(_weigh(pods, outcome))
        try:
            say("finding capacity")
            found, callers = await generators.capacity("capacity")
            say(f"at capacity, {callers} callers")
            at_all = await generators.run("at capacity", seconds, callers)
            say("calm")
            outcome.calms.append(await _calm(stack, pods))
            say(f"{OVER * callers} callers")
            over = await generators.run(f"{OVER} times", seconds, OVER * callers)
            say("calm")
            outcome.calms.append(await _calm(stack, pods))
            again = Phase("capacity again")
            for _ in range(FOUND_TIMES_MAX):
                say("finding capacity again")
                again = max(again, await generators.run(again.name, FINDING_SECONDS, callers), key=lambda one: one.rate)
                if as_before(again, at_all):
                    break
            outcome.phases = [found, at_all, over, again]
            outcome.calms.append(await _calm(stack, pods))
        finally:
            weighing.cancel()
        say("auditing")
        outcome.report.add(await auditor.audit(Deployment.of(stack)))
    return outcome


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
