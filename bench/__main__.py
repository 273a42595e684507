"""`python -m bench [--quick]`: measures every key, prints the tables, writes bench.json and bench.png."""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import analytics, costs, load, stage
from bench.capacity import CLUSTER_CALLERS, STAGE
from bench.load import Processes, Run, ghz, measure
from bench.report import Results
from bench.stage import Holdfasts, Servers
from deploy.local.certificates import Authority
from deploy.local.stack import REPOSITORY, Stack, StackError
from services.analytics import codec

SKUS = 100_000
P95_MS_MAX = 200.0
ERRORS_SHARE_MAX = 0.01
RATE_SHARE_MIN = 0.98
DEADLINE_SECONDS = 1.0
SETTLE_SECONDS_MAX = 20.0
SETTLE_LOOK_SECONDS = 0.4
SETTLED_PERCENT = 25.0
CHANGES_A_SECOND = 2_500


@dataclass(frozen=True, slots=True)
class Scale:
    """How long, how often and on how much."""

    rounds: int
    seconds: float
    pairs: int
    stage_probe_seconds: float
    stage_seconds: float
    many_skus: int
    long_ledger: int
    short_past: int
    follow_seconds: float


FULL = Scale(5, 5, 5, 6, 60, 1_000_000, 5_000_000, 50_000, 20)
QUICK = Scale(1, 2, 1, 3, 5, 200_000, 200_000, 10_000, 4)
FEW_SHARDS, MANY_SHARDS = 8, 32
FEW_SKUS, SHORT_LEDGER = 1_000, 10_000


class Bench:
    """One run of everything, on one stack."""

    def __init__(self, root: Path, scale: Scale, stack: Stack, progress: Progress) -> None:
        self._root = root
        self._scale = scale
        self._stack = stack
        self._ghz = load.ghz_binary(root)
        self._task = progress.add_task("starting", total=None)
        self._progress = progress
        self.results = Results()

    def _run(self, name: str, start: Callable[[], Processes], pids: load.Pids) -> Run:
        self._progress.update(self._task, description=name)
        _settle()
        run = measure(start, pids)
        self.results.runs.setdefault(name, []).append(run.figures())
        return run

    def _ratio(self, key: str, value: float) -> None:
        self.results.ratios.setdefault(key, []).append(value)

    def _call(
        self, name: str, pods: Sequence[str], pids: load.Pids, config: str = "reserve", *,
        seconds: float = 0, rate: float = 0, deadline_seconds: float = load.CALL_SECONDS_MAX, tls_directory: str = "",
        callers: int = 64,
    ) -> Run:  # fmt: skip
        def start() -> Processes:
            return ghz(
                self._ghz, config, pods, seconds=seconds or self._scale.seconds, rate=rate,
                deadline_seconds=deadline_seconds, tls_directory=tls_directory, callers=callers,
            )  # fmt: skip

        return self._run(name, start, pids)

    def _reserve(self, name: str, pods: Holdfasts, config: str = "reserve", **more: Any) -> Run:
        return self._call(name, pods.reservation, pods.pids, config, tls_directory=pods.tls_directory, **more)

    def _other(self, name: str, servers: Servers, config: str = "reserve", **more: Any) -> Run:
        return self._call(name, servers.pods, servers.pids, config, **more)

    # -- the keys ---------------------------------------------------------------------------------

    def against_echo_and_the_usual_way(self, pods: Holdfasts, echo: Servers, usual: Servers) -> tuple[float, float]:
        """The keys that compare calls a second; returns Reserve's capacity and echo's."""
        seconds = self._scale.seconds
        self._reserve("warming up", pods, seconds=3)
        self.results.runs.pop("warming up")
        capacities, ceilings = [], []
        for _ in range(self._scale.rounds):
            ceiling = self._other("echo, Reserve", echo)
            uniform = self._reserve("Reserve, uniform", pods)
            hot = self._reserve("Reserve, one hot SKU", pods, "reserve-hot")
            usual_uniform = self._other("the usual way, uniform", usual)
            usual_hot = self._other("the usual way, hot", usual, "reserve-hot")
            reads = self._call("GetAvailability", pods.inventory, pods.pids, "availability")
            echoed_reads = self._other("echo, GetAvailability", echo, "availability")
            batch = self._run(
                "BatchReserve, 100 a call",
                lambda: load.python("batch", pods.reservation, seconds=seconds, skus=SKUS),
                pods.pids,
            )
            stream = self._run(
                "ReserveStream", lambda: load.python("stream", pods.reservation, seconds=seconds, skus=SKUS), pods.pids
            )
            self._ratio("reserve_vs_echo", uniform.rate / ceiling.rate)
            self._ratio("hot_vs_uniform", hot.rate / uniform.rate)
            self._ratio("usual_way_uniform", uniform.rate / usual_uniform.rate)
            self._ratio("usual_way_hot", hot.rate / usual_hot.rate)
            self._ratio("availability_vs_echo", reads.rate / echoed_reads.rate)
            self._ratio("batch_items_vs_echo", batch.rate * batch.items / ceiling.rate)
            self._ratio("stream_vs_reserve", stream.rate / uniform.rate)
            capacities.append(uniform.rate)
            ceilings.append(ceiling.rate)
        return statistics.median(capacities), statistics.median(ceilings)

    def open_loop(self, pods: Holdfasts, echo: Servers, capacity: float) -> None:
        """p95 at 70 % of capacity."""
        rate = 0.7 * capacity
        for _ in range(self._scale.pairs):
            bare = self._other("echo at 70 % of Reserve's capacity", echo, rate=rate)
            held = self._reserve("Reserve at 70 % of its capacity", pods, rate=rate)
            self._ratio("reserve_p95_vs_echo", held.percentile(95) / bare.percentile(95))

    def overload(self, pods: Holdfasts, capacity: float) -> None:
        """What is answered in time at three times the capacity."""
        for _ in range(self._scale.pairs):
            flood = self._reserve(
                "Reserve at 3 x its capacity", pods, rate=3 * capacity, deadline_seconds=DEADLINE_SECONDS
            )
            self._ratio("overload_goodput", flood.rate / capacity)
            self._ratio("overload_p95_ms", flood.percentile(95))

    def stage(self, pods: Holdfasts, ceiling: float) -> None:
        """The highest rate of the mixed scenario that is sustained, in steps of 5 % of echo's."""
        share, best = 0.6, 0.0
        while share <= 1.0 and self._sustained(pods, share * ceiling, self._scale.stage_probe_seconds):
            best, share = share, share + 0.1
        if not best:
            while share > 0.1 and not self._sustained(pods, share * ceiling, self._scale.stage_probe_seconds):
                share -= 0.1
            best = share
        elif self._sustained(pods, (best + 0.05) * ceiling, self._scale.stage_probe_seconds):
            best += 0.05
        while best > 0.1 and not self._sustained(pods, best * ceiling, self._scale.stage_seconds):
            best -= 0.05
        self._ratio("stage_vs_echo", best)
        self.results.notes["stage_rps"] = round(best * ceiling)

    def _sustained(self, pods: Holdfasts, rate: float, seconds: float) -> bool:
        """Whether each kind of call keeps its rate, p95 < 200 ms and errors < 1 %."""
        files = {
            kind: self._to_change(kind, pods, int(rate * STAGE[kind] * seconds / stage.PODS) + 20)
            for kind in ("confirm", "cancel")
        }

        def start(kind: str) -> Processes:
            addresses = pods.inventory if kind == "availability" else pods.reservation
            return [
                process
                for pod, address in enumerate(addresses)
                for process in ghz(
                    self._ghz, kind, [address], seconds=seconds, callers=32,
                    rate=rate * STAGE[kind] / len(addresses), data=files[kind][pod] if kind in files else None,
                )
            ]  # fmt: skip

        run = self._run(
            f"stage at {rate:,.0f}/s for {seconds:.0f} s", lambda: [p for kind in STAGE for p in start(kind)], pods.pids
        )
        calls = run.calls + run.failed
        return (
            run.percentile(95) < P95_MS_MAX
            and run.failed < calls * ERRORS_SHARE_MAX
            and run.calls >= rate * seconds * RATE_SHARE_MIN
        )

    def _to_change(self, kind: str, pods: Holdfasts, count: int) -> list[Path]:
        """Make reservations to be confirmed or cancelled, `count` for each pod; the calls that do it, a file a pod."""
        files = []
        for pod in range(stage.PODS):
            ids = [uuid.uuid4().hex for _ in range(count)]
            asyncio.run(stage.reserved(pods, ids, SKUS))
            files.append(self._root / f"{kind}-{pod}.json")
            files[-1].write_text(json.dumps([{"reservation_id": name, "request_id": "change"} for name in ids]))
        return files

    def events_tax(self, pods: Holdfasts) -> None:
        """With relays, workers and analytics, over without."""
        with stage.holdfast(self._stack, "quiet", skus=SKUS, role="api") as quiet:
            for _ in range(self._scale.pairs):
                without = self._reserve("Reserve, relays and consumers off", quiet)
                followed = self._reserve("Reserve, relays and consumers on", pods)
                self._ratio("events_tax", followed.rate / without.rate)

    def fraud_tax(self, pods: Holdfasts) -> None:
        """With what antifraud decides enforced, over not; it is judged in both, and the callers say who they are."""
        order = ("off", "open")
        for _ in range(self._scale.pairs):
            rates = {}
            order = order[::-1]  # whatever the first of a pair has of the machine, each has as often
            for enforcement in order:
                pods.restart(["reservation"], HOLDFAST_ENFORCEMENT=enforcement)
                self._reserve("warming up", pods, "reserve-people", seconds=2)
                name = f"Reserve for people, enforcement {enforcement}"
                rates[enforcement] = self._reserve(name, pods, "reserve-people").rate
            self._ratio("fraud_tax", rates["open"] / rates["off"])
        self.results.runs.pop("warming up")
        pods.restart(["reservation"], HOLDFAST_ENFORCEMENT="open")

    def trace_tax(self, pods: Holdfasts) -> None:
        """With one call in a hundred traced, and with each, over none; a collector takes the spans."""
        services = ["inventory", "reservation", "analytics"]
        ratios = {"off": "0", "1 %": "0.01", "100 %": "1"}
        order = tuple(ratios)
        with stage.sink() as endpoint:
            for _ in range(self._scale.pairs):
                rates = {}
                order = (*order[1:], order[0])  # whatever the first has of the machine, each has as often
                for traced in order:
                    pods.restart(
                        services, HOLDFAST_OTLP_ENDPOINT="" if traced == "off" else endpoint,
                        HOLDFAST_TRACE_SAMPLE_RATIO=ratios[traced],
                    )  # fmt: skip
                    self._reserve("warming up", pods, seconds=2)
                    rates[traced] = self._reserve(f"Reserve, traces {traced}", pods).rate
                self._ratio("trace_tax", rates["1 %"] / rates["off"])
                self._ratio("trace_tax_full", rates["100 %"] / rates["off"])
        self.results.runs.pop("warming up")
        pods.restart(services, HOLDFAST_OTLP_ENDPOINT="")

    def tls_tax(self) -> None:
        """With a certificate on every side and callers looked up in the table, over plaintext and everybody."""
        with (
            stage.holdfast(self._stack, "clear", skus=SKUS) as clear,
            stage.holdfast(self._stack, "secured", skus=SKUS, authority=Authority()) as secured,
        ):
            order = {"without TLS": clear, "with TLS": secured}
            for pods in order.values():
                self._reserve("warming up", pods, seconds=2)
            self.results.runs.pop("warming up")
            for _ in range(self._scale.pairs):
                order = dict(reversed(order.items()))
                rates = {how: self._reserve(f"Reserve {how}", pods).rate for how, pods in order.items()}
                self._ratio("tls_tax", rates["with TLS"] / rates["without TLS"])

    def following(self, capacity: float) -> None:
        """What one consumer applies a second, of the events that all runs so far have made."""
        for name, topics, key in (
            ("movements", [codec.MOVEMENTS_TOPIC], "projection_per_s"),
            ("everything", codec.TOPICS, "rebuild_per_s"),
        ):
            self._progress.update(self._task, description=f"analytics, {name}")
            _settle()
            dsn = self._analytics_database(f"follow_{name}")
            asyncio.run(stage.load_mart(dsn, SKUS))
            rate = asyncio.run(
                analytics.events_per_second(dsn, self._stack.kafka_bootstrap, topics, self._scale.follow_seconds)
            )
            self.results.notes[key] = round(rate)
        self._ratio("projection_vs_reserve", self.results.notes["projection_per_s"] / capacity)

    def history(self) -> None:
        """Reports, and the past, on a long history."""
        dsns = {}
        for name, movements in (("past_short", self._scale.short_past), ("past_long", self._scale.long_ledger)):
            self._progress.update(self._task, description=f"loading {movements:,} movements into analytics")
            dsns[name] = self._analytics_database(name)
            asyncio.run(analytics.load(dsns[name], movements))
        self._progress.update(self._task, description="reports")
        self.results.notes["report_ms"] = asyncio.run(analytics.report_ms(dsns["past_long"]))
        for _ in range(self._scale.pairs):
            short, long = (asyncio.run(analytics.stock_at_seconds(dsn)) for dsn in dsns.values())
            self._ratio("stock_at_growth", long / short)

    def _analytics_database(self, name: str) -> str:
        return asyncio.run(self._stack.migrate(name, "analytics"))

    def pairs(self) -> None:
        """The keys that compare Holdfast with itself under another circumstance, on databases as young."""
        with (
            stage.holdfast(self._stack, "solo", skus=SKUS, reservation_pods=1) as solo,
            stage.holdfast(self._stack, "both", skus=SKUS) as both,
        ):
            for _ in range(self._scale.pairs):
                one = self._reserve("Reserve, one reservation pod", solo)
                two = self._reserve("Reserve, two reservation pods", both)
                self._ratio("two_pods_vs_one", _cost(two) / _cost(one))
        many = "reserve-1m" if self._scale.many_skus >= 1_000_000 else "reserve"
        with (
            stage.holdfast(self._stack, "few", skus=FEW_SKUS) as few,
            stage.holdfast(self._stack, "many", skus=self._scale.many_skus) as lots,
        ):
            for _ in range(self._scale.pairs):
                small = self._reserve(f"Reserve, {FEW_SKUS:,} SKUs", few, "reserve-1k")
                large = self._reserve(f"Reserve, {self._scale.many_skus:,} SKUs", lots, many)
                self._ratio("skus_1m_vs_1k", _cost(large) / _cost(small))
        with (
            stage.holdfast(self._stack, "short", skus=FEW_SKUS, movements=SHORT_LEDGER) as short,
            stage.holdfast(self._stack, "long", skus=FEW_SKUS, movements=self._scale.long_ledger) as long,
        ):
            for _ in range(self._scale.pairs):
                young = self._reserve(f"Reserve, {SHORT_LEDGER:,} movements", short, "reserve-1k")
                old = self._reserve(f"Reserve, {self._scale.long_ledger:,} movements", long, "reserve-1k")
                self._ratio("ledger_growth", _cost(old) / _cost(young))

    def weights(self, pods: Holdfasts) -> None:
        """What rows, keys and pods weigh after all that was done to them."""
        self.results.notes["costs"] = {
            "cores": psutil.cpu_count(),
            "pods": stage.PODS,
            "bytes_a_row": asyncio.run(costs.bytes_a_row(pods.databases)),
            "pod_bytes": costs.pod_bytes(pods),
        }

    def costs(self) -> None:
        """CPU by kind of call and size of batch, and what the relays can."""
        calls, points = {}, []
        with stage.holdfast(self._stack, "costs", skus=SKUS) as pods:
            self._reserve("warming up", pods, seconds=2)
            self.results.runs.pop("warming up")
            dsn = pods.databases["inventory"]  # and in the same PostgreSQL the others
            for callers in costs.CALLERS:
                _settle()
                watch, wal, events = costs.Watch(pods), asyncio.run(costs.wal_position(dsn)), self._kafka_bytes()
                run = self._reserve(f"Reserve, {callers} callers", pods, callers=callers)
                points.append(watch.point(callers, run).figures())
            _settle()
            wal_bytes = (asyncio.run(costs.wal_position(dsn)) - wal) / run.calls
            kafka_bytes = (self._kafka_bytes() - events) / run.calls
            calls["availability"] = self._call("GetAvailability", pods.inventory, pods.pids, "availability").cpu
            redis_bytes = costs.redis_bytes_a_key(self._stack.redis_url)
            for kind in ("confirm", "cancel"):
                calls[kind] = self._alone(kind, pods).cpu
        self._progress.update(self._task, description="relays")
        waiting = {service: self._stack.postgres_dsn(f"quiet_{service}") for service in costs.RELAYED}
        relayed = asyncio.run(costs.relayed_per_second(waiting, self._stack.kafka_bootstrap))
        self.results.notes["costs"] |= {
            "reserve": points,
            "calls": {kind: {side: round(cost, 1) for side, cost in cpu.items()} for kind, cpu in calls.items()},
            "wal_bytes_a_reserve": round(wal_bytes),
            "kafka_bytes_a_reserve": round(kafka_bytes),
            "redis_bytes_a_key": redis_bytes,
            "relayed_per_s": relayed,
        }

    def _alone(self, kind: str, pods: Holdfasts) -> Run:
        """Confirms or cancels by as many callers as Reserve has, each of another reservation."""
        seconds = self._scale.seconds
        files = self._to_change(kind, pods, int(CHANGES_A_SECOND * seconds / stage.PODS))

        def start() -> Processes:
            return [
                process
                for pod, file in zip(pods.reservation, files, strict=True)
                for process in ghz(self._ghz, kind, [pod], seconds=seconds, callers=64 // stage.PODS, data=file)
            ]

        return self._run(f"{kind.title()} alone", start, pods.pids)

    def _kafka_bytes(self) -> int:
        return costs.kafka_bytes(self._root / "stack")

    def distributed(self) -> None:
        """On a cluster of database nodes over one PostgreSQL, and in many shards over few. Only with a cluster."""
        if not self._stack.citus_dsn:
            return
        with contextlib.ExitStack() as open_:
            plain = Stack(self._root / "plain")
            open_.callback(plain.erase)
            open_.enter_context(plain.start(fresh=True))
            one = open_.enter_context(stage.holdfast(plain, "one", skus=SKUS))
            few = open_.enter_context(stage.holdfast(self._stack, "few_shards", skus=SKUS, shards=FEW_SHARDS))
            many = open_.enter_context(stage.holdfast(self._stack, "many_shards", skus=SKUS, shards=MANY_SHARDS))
            for pods in (one, few, many):
                self._reserve("warming up", pods, seconds=2, callers=CLUSTER_CALLERS)
            self.results.runs.pop("warming up")
            more = []
            for _ in range(self._scale.pairs):
                single = self._reserve("Reserve, one database node", one, callers=CLUSTER_CALLERS)
                cluster = self._reserve(f"Reserve, distributed, {FEW_SHARDS} shards", few, callers=CLUSTER_CALLERS)
                spread = self._reserve(f"Reserve, distributed, {MANY_SHARDS} shards", many, callers=CLUSTER_CALLERS)
                self._ratio("citus_vs_postgres", cluster.rate / single.rate)
                self._ratio("shards_growth", _cost(spread) / _cost(cluster))
                more.append(cluster.cpu["database"] / single.cpu["database"])
        self.results.notes["costs"]["distributed_over_one"] = round(statistics.median(more), 2)

    def everything(self) -> None:
        began = time.monotonic()
        with contextlib.ExitStack() as open_:
            pods = open_.enter_context(stage.holdfast(self._stack, "bench", skus=SKUS, analytics=True))
            self.events_tax(pods)
            self.fraud_tax(pods)
            self.trace_tax(pods)
            with stage.echo() as echo:
                with stage.usual(self._stack, skus=SKUS) as usual:
                    capacity, ceiling = self.against_echo_and_the_usual_way(pods, echo, usual)
                self.open_loop(pods, echo, capacity)
            self.stage(pods, ceiling)
            self.overload(pods, capacity)
            self.weights(pods)
            made = asyncio.run(stage.outcomes(pods, time.monotonic() - began))
            self._progress.update(self._task, description="a backtest of the default rules")
            _settle()
            self.results.notes["backtest_per_s"] = round(asyncio.run(analytics.backtested(pods.databases["analytics"])))
        self.following(capacity)
        self.history()
        self.costs()
        self.tls_tax()
        self.pairs()
        self.distributed()
        self.results.notes |= {
            "reservations": made,
            "rounds_made": self._scale.rounds,
            "machine": f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB, {platform.system()}",
            "seconds": round(time.monotonic() - began),
        }


def _settle() -> None:
    """Wait until what the run before left to be done is done, so that no run pays for another."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while psutil.cpu_percent(SETTLE_LOOK_SECONDS) > SETTLED_PERCENT and time.monotonic() < deadline:
        pass


def _cost(run: Run) -> float:
    """CPU of the services and the database for one call, in us."""
    return run.cpu["reservation"] + run.cpu["inventory"] + run.cpu["database"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same keys in under three minutes, less exact")
    quick = parser.parse_args().quick
    local = REPOSITORY / ".local"
    root = local / "bench"
    root.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    columns = (TextColumn("  {task.description}"), BarColumn(30), TimeElapsedColumn())
    stack = Stack(root / "stack", citus_dsn=os.environ.get("CITUS_DSN", ""))
    try:
        with stack.start(fresh=True), Progress(*columns, console=console) as progress:
            bench = Bench(root, QUICK if quick else FULL, stack, progress)
            bench.everything()
        stack.erase()
    except StackError as error:
        console.print(f"[bold red]The benchmark cannot run:[/] {error}", soft_wrap=True)
        return 1
    bench.results.write(local / "bench.json")
    bench.results.draw(local / "bench.png")
    bench.results.show(console)
    console.print(
        f"\n{bench.results.notes['machine']}; every run is in .local/bench.json, the picture in .local/bench.png."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
