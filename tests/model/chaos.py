"""`make chaos`: shoppers on the real parts, faults at random, and the auditor's judgement at the end.

`python -m tests.model.chaos [--minutes 15] [--every 5] [--seed N]`. The seed gives the faults, their order and the
shoppers' choices; when each call meets which fault is the machine's affair. First a quarter of the time without faults:
what is then done in a second is what the rest is compared with.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deploy.local.stack import REPOSITORY, Stack, free_port, free_ports
from deploy.local.supervisor import SERVICES, Pod, Service, Supervisor
from tests.model import auditor, releases
from tests.model.auditor import Deployment, Report
from tests.model.history import End, History
from tests.model.proxy import Proxy, through
from tests.model.shoppers import Shoppers, stock_up
from tests.model.skewed import Clock

SKUS = tuple(f"SKU-{number:02}" for number in range(24))
SKEWED = Path(__file__).with_name("skewed.py")
CLIENTS, CALLERS = 3, 6
CALM_SHARE = 0.25
BOOKS_SECONDS = 30.0
SETTLE_SECONDS = 20.0  # longer than a hold can last, and than a change may be left half done
BACK_SECONDS_MAX = 30.0
BEFORE_SECONDS = 2.0
GOODPUT_SHARE_MIN = 0.7
AWAY = {"PostgreSQL killed", "PostgreSQL frozen", "disk full", "connections cut", "requests lost", "answers lost"}


class Wired(Supervisor):
    """Pods that reach PostgreSQL through a proxy, and have clocks that can be set."""

    def __init__(self, stack: Stack, port: int, code: Path) -> None:
        super().__init__(stack, code=code)
        self._port = port

    def clock(self, pod: Pod) -> Clock:
        """What a pod takes the time of day from; its namesakes have the same."""
        return Clock(self._root / f"{pod.name}.clock")

    def command(self, pod: Pod) -> list[str]:
        python, _, *program = super().command(pod)
        return [python, "-P", str(SKEWED), str(self.clock(pod).file), *program]

    def environment(self, service: Service) -> dict[str, str]:
        made = super().environment(service)
        made["HOLDFAST_DATABASE_DSN"] = through(made["HOLDFAST_DATABASE_DSN"], self._port)
        return made | {"HOLDFAST_LOG_LEVEL": "warning", "PYTHONPATH": str(self.code)}


@dataclass
class Scene:
    """What faults are done to, and how: each is done and undone within one call."""

    stack: Stack
    pods: Wired
    proxy: Proxy
    dice: random.Random
    releases: Iterator[Path]  # that pods are still to be upgraded to

    def pod(self) -> Pod:
        return self.dice.choice(self.pods.pods)

    async def kill_pod(self) -> None:
        """SIGKILL; the supervisor starts it again."""
        if (process := self.pod().process) is not None:
            process.kill()

    async def freeze_pod(self) -> None:
        """SIGSTOP for a while: it goes on where it was, and may think that it still has its locks."""
        with _frozen([self.pod().pid]):
            await asyncio.sleep(self.dice.uniform(0.5, 4))

    async def kill_postgres(self) -> None:
        """The server process; its connections end, what was not committed is gone."""
        await asyncio.to_thread(self.stack.revive, "PostgreSQL")

    async def freeze_postgres(self) -> None:
        """Every process of it."""
        with _frozen(_tree(self.stack.pids["PostgreSQL"])):
            await asyncio.sleep(self.dice.uniform(0.5, 3))

    async def fill_disk(self) -> None:
        """Every write of PostgreSQL beyond a file's first pages fails, as on a disk that is full; it may fall over."""
        processes = _tree(self.stack.pids["PostgreSQL"])
        for pid in processes:
            with suppress(psutil.Error, OSError):
                psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (1 << 16, psutil.RLIM_INFINITY))
        await asyncio.sleep(self.dice.uniform(0.5, 2))
        for pid in _tree(self.stack.pids["PostgreSQL"]):
            with suppress(psutil.Error, OSError):
                psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        if not psutil.pid_exists(self.stack.pids["PostgreSQL"]):
            await asyncio.to_thread(self.stack.revive, "PostgreSQL")

    async def kill_redis(self) -> None:
        """And with it the cache and the workers' locks."""
        await asyncio.to_thread(self.stack.revive, "Redis")

    async def freeze_redis(self) -> None:
        with _frozen([self.stack.pids["Redis"]]):
            await asyncio.sleep(self.dice.uniform(0.5, 4))

    async def kill_kafka(self) -> None:
        await asyncio.to_thread(self.stack.revive, "Kafka")

    async def freeze_kafka(self) -> None:
        with _frozen([self.stack.pids["Kafka"]]):
            await asyncio.sleep(self.dice.uniform(0.5, 4))

    async def cut(self) -> None:
        """Every connection to PostgreSQL is reset."""
        self.proxy.cut()

    async def lose_requests(self) -> None:
        """What is said to PostgreSQL is lost, and the connection: it is not done."""
        await self._losing(answers=False)

    async def lose_answers(self) -> None:
        """What PostgreSQL answers is lost, and the connection: it is done, and nobody knows."""
        await self._losing(answers=True)

    async def _losing(self, *, answers: bool) -> None:
        self.proxy.lose(answers=answers)
        await asyncio.sleep(self.dice.uniform(0.05, 0.5))
        self.proxy.heal()

    async def delay(self) -> None:
        """Each packet between pods and PostgreSQL is late."""
        self.proxy.delay_seconds = self.dice.uniform(0.005, 0.05)
        await asyncio.sleep(self.dice.uniform(1, 4))
        self.proxy.heal()

    async def throttle(self) -> None:
        """A narrow wire to PostgreSQL."""
        self.proxy.bytes_per_second = self.dice.uniform(100_000, 500_000)
        await asyncio.sleep(self.dice.uniform(1, 4))
        self.proxy.heal()

    async def twin(self) -> None:
        """A second process with the identity of a pod: its name, its client ids, its place in the groups."""
        port, metrics_port = free_ports(2)
        second = replace(self.pod(), port=port, metrics_port=metrics_port)
        self.pods.spawn(second)
        await asyncio.sleep(self.dice.uniform(3, 6))
        await asyncio.to_thread(self.pods.kill, second)

    async def jump(self) -> None:
        """The clock on the wall of a pod is minutes ahead or behind for a while, then right again."""
        clock = self.pods.clock(self.pod())
        clock.set(self.dice.choice([-1, 1]) * self.dice.uniform(60, 600))
        await asyncio.sleep(self.dice.uniform(2, 6))
        clock.set(0)

    async def roll(self) -> None:
        """A rolling restart of a service, its migrations before it."""
        service = self.pod().service
        await asyncio.to_thread(self.pods.migrate, service)
        for pod in self.pods.pods:
            if pod.service is service:
                await asyncio.to_thread(self.pods.restart, pod)

    async def upgrade(self) -> None:
        """The next release: what it needs is migrated, pods change one by one, what it does not need is dropped."""
        await asyncio.to_thread(self._upgrade, next(self.releases))

    def _upgrade(self, code: Path) -> None:
        with ThreadPoolExecutor(len(SERVICES)) as pool:
            list(pool.map(lambda service: self.pods.migrate(service, "pre", code), SERVICES))
            self.pods.code = code
            for pod in self.pods.pods:
                self.pods.restart(pod)
            list(pool.map(lambda service: self.pods.migrate(service, "post"), SERVICES))

    @property
    def faults(self) -> dict[str, Callable[[], Awaitable[None]]]:
        return {
            "pod killed": self.kill_pod,
            "pod frozen": self.freeze_pod,
            "pod doubled": self.twin,
            "clock jumped": self.jump,
            "service rolled": self.roll,
            "suite upgraded": self.upgrade,
            "PostgreSQL killed": self.kill_postgres,
            "PostgreSQL frozen": self.freeze_postgres,
            "disk full": self.fill_disk,
            "Redis killed": self.kill_redis,
            "Redis frozen": self.freeze_redis,
            "Kafka killed": self.kill_kafka,
            "Kafka frozen": self.freeze_kafka,
            "connections cut": self.cut,
            "requests lost": self.lose_requests,
            "answers lost": self.lose_answers,
            "packets late": self.delay,
            "narrow wire": self.throttle,
        }


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    calm_per_second: float = 0.0
    per_second: float = 0.0
    back_seconds: list[float] = field(default_factory=list)
    befell: list[tuple[str, float, float]] = field(default_factory=list)  # which fault, from when until when
    lateness: list[tuple[float, float]] = field(default_factory=list)  # see auditor.lateness
    report: Report = field(default_factory=Report)

    @property
    def goodput(self) -> float:
        """Calls answered in a second under faults over those without."""
        return self.per_second / self.calm_per_second if self.calm_per_second else 0.0

    @property
    def away(self) -> list[tuple[float, float]]:
        """From when until when the database was."""
        return [(began, ended) for name, began, ended in self.befell if name in AWAY]

    @property
    def late(self) -> float:
        """By how many seconds 99 of 100 holds were given back at most after their time, or the database's return."""
        return self.lateness[len(self.lateness) * 99 // 100][0] if self.lateness else 0.0

    @property
    def latest(self) -> tuple[float, str]:
        """By how many seconds the latest was, and what befell meanwhile or since shortly before."""
        seconds, done = self.lateness[-1] if self.lateness else (0.0, 0.0)
        since = done - seconds - BEFORE_SECONDS
        names = [name for name, began, ended in self.befell if began < done and since < ended]
        return seconds, ", ".join(names) or "no fault"

    @property
    def passed(self) -> bool:
        """Whether nothing was violated, enough was answered, and holds were given back in time."""
        in_time = self.late <= auditor.LATE_SECONDS_MAX
        return not self.report.violations and self.goodput >= GOODPUT_SHARE_MIN and in_time


async def run(
    root: Path,
    *,
    seed: int,
    calm_seconds: float,
    fault_seconds: float,
    every: float,
    only: Sequence[str] = (),
    base: Path = REPOSITORY,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Shop without faults, then with; audit. `only`: these faults, one after the other, instead of any.

    `base` is the checkout that pods are of until they are upgraded, first to this one.
    """
    outcome = Outcome(seed)
    stack = Stack(root)
    with stack.start(fresh=True):
        proxy, port = Proxy(_port(stack.postgres_dsn("x"))), free_port()
        await proxy.start(port)
        pods = Wired(stack, port, base)
        await asyncio.to_thread(pods.start)
        try:
            history = History()
            scene = Scene(stack, pods, proxy, random.Random(seed), releases.after(base, root))
            shoppers = Shoppers(history, SKUS, seed)
            targets = pods.targets["inventory"], pods.targets["reservation"]
            await stock_up(history, targets, SKUS)
            shopping = [asyncio.ensure_future(shoppers.shop(*targets, CALLERS)) for _ in range(CLIENTS)]
            auditing = asyncio.ensure_future(_audit_under_load(stack, outcome.report))
            try:
                say("shopping without faults")
                outcome.calm_per_second = await _pace(history, calm_seconds)
                began = time.time()
                await _trouble(scene, history, outcome, fault_seconds, every, only, say)
                outcome.per_second = _answered(history, began) / (time.time() - began)
                shoppers.stop.set()
                await asyncio.gather(*shopping)
            finally:
                for task in (*shopping, auditing):
                    task.cancel()
                await asyncio.wait([*shopping, auditing])
            say("letting everything settle")
            await asyncio.sleep(SETTLE_SECONDS)
            say("auditing")
            outcome.report.add(await auditor.audit(Deployment.of(stack), history))
            outcome.lateness = await auditor.lateness(stack.postgres_dsn("inventory"), outcome.away)
            outcome.calls = Counter(str(call.end) for call in history.calls)
            history.save(root / "history.jsonl")
        finally:
            await asyncio.to_thread(pods.stop)
            await proxy.stop()
    return outcome


async def _trouble(
    scene: Scene,
    history: History,
    outcome: Outcome,
    seconds: float,
    every: float,
    only: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """A fault each `every` seconds, all kinds in some order and then again in another, and after each the time until
    calls are answered again.
    """
    until = time.monotonic() + seconds
    names = iter(only) if only else _rounds(scene)
    while time.monotonic() < until and (name := next(names, "")):
        due = time.monotonic() + every
        say(name)
        began = time.time()
        await scene.faults[name]()
        outcome.befell.append((name, began, time.time()))
        outcome.faults[name] += 1
        outcome.back_seconds.append(await _back(history))
        await asyncio.sleep(max(0, due - time.monotonic()))


def _rounds(scene: Scene) -> Iterator[str]:
    while True:
        yield from scene.dice.sample(sorted(scene.faults), len(scene.faults))


async def _back(history: History) -> float:
    """Wait until a reservation that was asked for after now is answered; how long that took."""
    began = time.time()
    while time.time() < began + BACK_SECONDS_MAX:
        recent = history.calls[-200:]
        if any(call.kind == "reserve" and call.sent > began and call.end is End.OK for call in recent):
            break
        await asyncio.sleep(0.02)
    return time.time() - began


async def _pace(history: History, seconds: float) -> float:
    began = time.time()
    await asyncio.sleep(seconds)
    return _answered(history, began) / seconds


def _answered(history: History, since: float) -> int:
    return sum(call.answered >= since for call in history.calls)


async def _audit_under_load(stack: Stack, report: Report) -> None:
    """The books, again and again while calls and faults go on."""
    while True:
        await asyncio.sleep(BOOKS_SECONDS)
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            found = await auditor.books(stack.postgres_dsn("inventory"))
            report.looked_at["audits under load"] += 1
            report.violations += found.violations


def _port(dsn: str) -> int:
    return int(dsn.rpartition(":")[2].partition("/")[0])


def _tree(pid: int) -> list[int]:
    with suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


@contextmanager
def _frozen(pids: Sequence[int | None]) -> Iterator[None]:
    """Processes that stand still; those that are gone by then are left alone."""
    alive = [pid for pid in pids if pid]
    _signal(alive, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(alive, signal.SIGCONT)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


# -- the command ------------------------------------------------------------------------------------------------------


def show(console: Console, outcome: Outcome) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    looked, calls = outcome.report.looked_at, outcome.calls
    lost = [one for one in outcome.report.violations if "lost" in one or "not what was answered" in one]
    oversold = [one for one in outcome.report.violations if one.startswith("oversold")]
    rows: list[tuple[str, Any, str]] = [
        ("seed", outcome.seed, "gives the same faults and shoppers again"),
        ("calls made", f"{calls.total():,}", f"{calls['OK']:,} answered, {calls['REFUSED']:,} refused"),
        ("outcome unknown", f"{calls['UNKNOWN']:,}", "never answered: done once, or not at all"),
        ("faults injected", outcome.faults.total(), ", ".join(f"{n} {name}" for name, n in outcome.faults.items())),
        ("acknowledged and lost", len(lost), "of " + f"{looked['movements']:,} movements on {looked['keys']} keys"),
        ("oversold", len(oversold), "in every row of the ledger"),
        ("drift", len(outcome.report.violations) - len(lost) - len(oversold), "other violations of any kind"),
        ("goodput", f"{outcome.goodput:.2f}", f"{outcome.per_second:.0f} calls/s of {outcome.calm_per_second:.0f}"),
        ("back after", f"{max(outcome.back_seconds, default=0):.1f} s", "at most, until a reservation was answered"),
        ("expired late", f"{outcome.late:.2f} s",
         "p99 of {:,}; at most {:.2f} s ({})".format(len(outcome.lateness), *outcome.latest)),
        ("refusals justified", looked["refusals justified"], f"{looked['audits under load']} audits under load"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    for violation in outcome.report.violations[:40]:
        console.print(f"[red]{violation}[/]", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--every", type=float, default=5, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", action="append", default=[], help="this fault, and no other; may be repeated")
    parser.add_argument("--base", type=Path, default=REPOSITORY, help="a checkout of the release to begin with")
    arguments = parser.parse_args()
    console = Console()
    seconds = arguments.minutes * 60
    with tempfile.TemporaryDirectory(prefix="holdfast-chaos-") as root:
        columns = (TextColumn("{task.description:28}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("starting", total=seconds)
            done = threading.Event()

            def tick() -> None:
                while not done.wait(1):
                    progress.advance(task)

            threading.Thread(target=tick, daemon=True).start()
            outcome = asyncio.run(
                run(
                    Path(root),
                    seed=arguments.seed,
                    calm_seconds=seconds * CALM_SHARE,
                    fault_seconds=seconds * (1 - CALM_SHARE),
                    every=arguments.every,
                    only=arguments.only,
                    base=arguments.base.resolve(),
                    say=lambda line: progress.update(task, description=line),
                )
            )
            done.set()
        show(console, outcome)
        kept = REPOSITORY / ".local" / "chaos.json"
        kept.parent.mkdir(exist_ok=True)
        figures = {
            "seed": outcome.seed, "minutes": arguments.minutes, "faults": dict(outcome.faults),
            "calls": dict(outcome.calls), "goodput": round(outcome.goodput, 3),
            "looked_at": dict(outcome.report.looked_at), "violations": outcome.report.violations,
            "back_seconds": outcome.back_seconds, "late_seconds": outcome.late,
            "latest": outcome.latest,
        }  # fmt: skip
        kept.write_text(json.dumps(figures, indent=2) + "\n")
    return int(not outcome.passed)


if __name__ == "__main__":
    sys.exit(main())
