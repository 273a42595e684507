"""`python -m bench.capacity --rate N ...`: what a rate of requests takes, and what breaks first on the way there.

It reckons with what `make bench` measured: CPU by kind of call and part, by size of batch; bytes a row; events a
second of the workers that are one at a time. Nothing else is assumed but what it prints.

A pod has one batch of a kind in flight, and the next gathers meanwhile. So at r calls a second on a pod a batch has
b = r (t0 + t1 b) calls, where a batch of b takes t0 + t1 b seconds, and a call costs each part c0 / b + c1 of CPU: both
lines are fitted to the measured points. A busier pod is a cheaper one, up to the batch that it may have.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.local.stack import REPOSITORY

KEPT = Path(__file__).with_name("costs.json")
MEASURED = REPOSITORY / ".local" / "bench.json"
KINDS = ("availability", "reserve", "confirm", "cancel")
CALLERS, CLUSTER_CALLERS = 64, 256  # a call of a cluster takes longer: it takes more of them to fill a machine
STAGE = {"availability": 0.80, "reserve": 0.14, "confirm": 0.05, "cancel": 0.01}
POD_BUSY = 0.6  # of the one core that a pod's loop can use: room for a pod that goes, and for bursts
DATABASE_BUSY = 0.6
CONSUMER_BUSY = 0.5  # of what a consumer can: it catches up as fast as it falls behind
WORKER_BUSY = 0.7  # of what a worker can of which there is one
NODE_CORES = 16
BATCH_MAX = 512
CONNECTIONS_A_POD = 10
CONNECTIONS_MAX = 2_000  # of one PostgreSQL, without a pooler
MOVES = {"availability": 0, "reserve": 1, "confirm": 1, "cancel": 1}
DAY = 86_400
SKU_ROWS = ("inventory.sku", "inventory.stock", "inventory.checkpoint", "analytics.stock_view")
CHANGE_ROWS = ("inventory.movement", "analytics.movement")
RESERVATION_ROWS = (
    "inventory.hold", "reservation.reservation", "reservation.reservation_line", "reservation.allocation",
    "analytics.reservation", "analytics.reservation_state",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """y = fixed + each * x, fitted by least squares of the relative error."""

    fixed: float
    each: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """At least two points of different x; neither part is negative."""
        weights = [1 / (y * y) if y else 1.0 for _, y in points]
        total = sum(weights)
        x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        slope = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True)) / spread
        each = min(max(slope, 0.0), y_mean / x_mean)
        return cls(y_mean - each * x_mean, each)

    def at(self, x: float) -> float:
        return self.fixed + self.each * x


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured. CPU in seconds a call."""

    reserve: Mapping[str, Line]  # by part (the generator is one), of 1 / batch
    batch_seconds: Line  # of a batch of reservations, by its calls
    lock_seconds: Line  # of inventory's transaction, by the same
    calls: Mapping[str, Mapping[str, float]]  # the other kinds, by part
    bytes_a_row: Mapping[str, float]
    wal_bytes: float  # a reservation, of both databases
    relays: Mapping[str, float]  # events a second of one relay, by service
    projection: float  # movements a second of one consumer
    judge: float  # changes a second of the one judge
    redis_bytes: float  # a key
    kafka_bytes: float  # a reservation's events
    pod_bytes: Mapping[str, float]  # memory of one, by service
    distributed: float  # CPU of a distributed database over that of one PostgreSQL
    gathered: float  # of a pod's callers in a closed loop, those in one batch
    busy: float  # of the machine that was measured, in a closed loop of 64 callers
    cores: int

    @classmethod
    def read(cls, measured: Mapping[str, Any]) -> "Costs":
        """Out of what `make bench` writes. Raises KeyError where it has no costs."""
        told = measured["costs"]
        points = told["reserve"]
        parts = points[0]["cpu"]
        return cls(
            {part: Line.through([(1 / one["batch"], one["cpu"][part] / 1e6) for one in points]) for part in parts},
            Line.through([(one["batch"], one["batch_seconds"]) for one in points]),
            Line.through([(one["batch"], one["lock_seconds"]) for one in points]),
            {kind: {part: cost / 1e6 for part, cost in cpu.items()} for kind, cpu in told["calls"].items()},
            told["bytes_a_row"],
            told["wal_bytes_a_reserve"],
            told["relayed_per_s"],
            measured["projection_per_s"],
            measured["backtest_per_s"],
            told["redis_bytes_a_key"],
            told["kafka_bytes_a_reserve"],
            told["pod_bytes"],
            told.get("distributed_over_one", 1.0),
            statistics.mean(one["batch"] * told["pods"] / one["callers"] for one in points),
            statistics.mean(one["rate"] * sum(one["cpu"].values()) / 1e6 for one in points[-2:]) / told["cores"],
            told["cores"],
        )

    def of(self, kind: str, part: str, batch: float) -> float:
        """CPU seconds a call of a kind costs a part."""
        if kind == "reserve":
            return self.reserve[part].at(1 / batch) if part in self.reserve else 0.0
        return self.calls[kind].get(part, 0.0)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of Holdfast."""

    rate: float  # requests a second
    mix: Mapping[str, float]  # kinds of calls, which add up to 1
    skus: int
    skew: float  # Zipf's exponent: 0 is uniform
    retention_days: float

    def of(self, kind: str) -> float:
        return self.rate * self.mix[kind]

    @property
    def changes(self) -> float:
        """Calls a second that change stock."""
        return sum(self.of(kind) * MOVES[kind] for kind in KINDS)

    def hottest(self) -> float:
        """The share of the SKU most asked for."""
        return 1 / harmonic(self.skus, self.skew)

    def hot_skus(self, share: float) -> float:
        """How many SKUs make up this share of all calls, the most asked for first."""
        low, high = 1.0, float(self.skus)
        whole = harmonic(self.skus, self.skew)
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if harmonic(middle, self.skew) >= share * whole else (middle, high)
        return high


def harmonic(n: float, exponent: float) -> float:
    """The sum of k ** -exponent for k from 1 to n; beyond 1,000 terms by the integral (Euler and Maclaurin)."""
    first = min(int(n), 1_000)
    total = math.fsum(float(k) ** -exponent for k in range(1, first + 1))
    if n <= first:
        return total
    if exponent == 1:
        return total + math.log(n / first)
    power = 1 - exponent
    tail = (math.pow(n, power) - math.pow(first, power)) / power
    return total + tail + (math.pow(n, -exponent) - math.pow(first, -exponent)) / 2


def batch_at(costs: Costs, rate: float) -> float:
    """Calls in a batch of a pod that gets `rate` Reserves a second; infinite where it cannot keep up."""
    slack = 1 - rate * costs.batch_seconds.each
    return max(1.0, rate * costs.batch_seconds.fixed / slack) if slack > 0 else math.inf


def fewest(enough: Callable[[int], bool]) -> int:
    """The smallest n from 1 on that is enough, where every greater one is too."""
    high = 1
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class Plan:
    """What a demand takes."""

    reservation_pods: int
    batch: float  # Reserves in a batch of such a pod
    inventory_pods: int
    analytics_workers: int
    memory_bytes: float  # of all pods
    database_cores: float
    database_nodes: int
    partitions: int  # of each topic
    redis_bytes: float
    hot_bytes: float  # of PostgreSQL, to be kept in memory
    disk_bytes: float
    wal_bytes_a_second: float
    kafka_bytes_a_day: float


def plan(costs: Costs, demand: Demand) -> Plan:
    def cpu(part: str, batch: float) -> float:
        return sum(demand.of(kind) * costs.of(kind, part, batch) for kind in KINDS)

    def gathered(pods: int) -> float:
        return batch_at(costs, demand.of("reserve") / pods)

    def enough(pods: int) -> bool:
        batch = gathered(pods)
        return batch <= BATCH_MAX and cpu("reservation", batch) <= POD_BUSY * pods

    pods = fewest(enough)
    batch = gathered(pods)
    cores = cpu("database", batch)
    nodes = math.ceil(cores / DATABASE_BUSY / NODE_CORES)
    if nodes > 1:
        cores *= costs.distributed
        nodes = math.ceil(cores / DATABASE_BUSY / NODE_CORES)
    inventory = math.ceil(cpu("inventory", batch) / POD_BUSY)
    consumers = math.ceil(demand.changes / (costs.projection * CONSUMER_BUSY))
    rows = costs.bytes_a_row
    hot = demand.hot_skus(0.95)
    days = demand.changes * DAY
    reservations = demand.of("reserve") * DAY
    return Plan(
        pods,
        batch,
        inventory,
        consumers,
        pods * costs.pod_bytes["reservation"]
        + inventory * costs.pod_bytes["inventory"]
        + consumers * costs.pod_bytes["analytics"],
        cores / DATABASE_BUSY,
        nodes,
        2 ** math.ceil(math.log2(max(consumers, 1))) * 2,
        hot * costs.redis_bytes,
        hot * (rows["inventory.stock"] + rows["inventory.sku"] + rows["analytics.stock_view"]),
        demand.skus * sum(rows[name] for name in SKU_ROWS)
        + days * demand.retention_days * sum(rows[name] for name in CHANGE_ROWS)
        + reservations * demand.retention_days * sum(rows[name] for name in RESERVATION_ROWS),
        demand.of("reserve") * costs.wal_bytes,
        demand.changes * DAY * costs.kafka_bytes,
    )


@dataclass(frozen=True, slots=True)
class Limit:
    """What breaks at a rate of requests, whatever pods and nodes are added, and what is done then."""

    what: str
    rate: float
    then: str


def limits(costs: Costs, demand: Demand) -> list[Limit]:
    """In order of the rate at which each breaks, for the mix and the skew of a demand."""
    changes = replace(demand, rate=1).changes
    reserves = demand.mix["reserve"]
    share = demand.hottest()
    lock = costs.lock_seconds.at(BATCH_MAX)
    waits = min(1.0, BATCH_MAX * share)  # of the batches, those that hold the hottest row
    one = plan(costs, replace(demand, rate=1000))
    pods = (one.inventory_pods + one.reservation_pods) / 1000
    found = [
        Limit("antifraud's judge, of which there is one", costs.judge * WORKER_BUSY / max(changes, 1e-9),
              "HOLDFAST_ENFORCEMENT=off, or a Holdfast for each market"),
        Limit("inventory's relay, of which there is one", costs.relays["inventory"] * WORKER_BUSY / max(changes, 1e-9),
              "a Holdfast for each market: order by key is one relay's"),
        Limit("reservation's relay, of which there is one",
              costs.relays["reservation"] * WORKER_BUSY / max(changes, 1e-9), "as above"),
        Limit("the row of the SKU most asked for", BATCH_MAX / (lock * waits) / max(reserves, 1e-9),
              "its stock over more locations: a lock is a row's"),
        Limit("connections of one PostgreSQL", CONNECTIONS_MAX / (pods * CONNECTIONS_A_POD),
              "a pooler (docs/scale.md)"),
        Limit(f"{NODE_CORES} cores of one PostgreSQL",
              1000 * NODE_CORES / one.database_cores,
              "a distributed one (docs/scale.md)"),
    ]  # fmt: skip
    return sorted(found, key=lambda limit: limit.rate)


def closed_loop(costs: Costs, callers: int, pods: int, database: float = 1.0) -> float:
    """Reserves a second of so many callers on the machine that was measured, everything on its cores.

    `database`: CPU of the database over that of the one PostgreSQL that was measured.
    """
    batch = max(1.0, callers / pods * costs.gathered)
    cpu = {part: line.at(1 / batch) for part, line in costs.reserve.items()}
    cpu["database"] *= database
    return min(
        costs.cores * costs.busy / sum(cpu.values()),
        pods / cpu["reservation"],
        pods * batch / costs.batch_seconds.at(batch),
    )


@dataclass(frozen=True, slots=True)
class Checked:
    """A rate that was measured apart from the costs, and what they say of it."""

    what: str
    measured: float
    predicted: float

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1


def check(measured: Mapping[str, Any]) -> list[Checked]:
    """Against every point that `make bench` has measured on its own."""
    costs = Costs.read(measured)
    points = {
        "one reservation pod, one PostgreSQL": ("Reserve, one reservation pod", CALLERS, 1, 1.0),
        "two reservation pods, one PostgreSQL": ("Reserve, two reservation pods", CALLERS, 2, 1.0),
        "two reservation pods, a coordinator and two workers": (
            "Reserve, distributed, 8 shards", CLUSTER_CALLERS, 2, costs.distributed,
        ),
    }  # fmt: skip
    return [
        Checked(
            what,
            statistics.median(one["rate"] for one in measured["runs"][run]),
            closed_loop(costs, callers, pods, more),
        )
        for what, (run, callers, pods, more) in points.items()
        if run in measured["runs"]
    ]


# -- the command ------------------------------------------------------------------------------------------------------


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} PiB"


def show(console: Console, costs: Costs, demand: Demand, seen: Sequence[Checked]) -> None:
    needed = plan(costs, demand)
    mix = ", ".join(f"{share:.0%} {kind}" for kind, share in demand.mix.items())
    console.print(
        f"[bold]{demand.rate:,.0f} requests/s[/] ({mix}), {demand.skus:,} SKUs, Zipf {demand.skew:g},"
        f" {demand.retention_days:g} days kept\n"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, justify in (("what it takes", "left"), ("", "right"), ("because", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in (
        ("reservation pods", f"{needed.reservation_pods:,}",
         f"{POD_BUSY:.0%} of a core each, batches of {needed.batch:.0f}"),
        ("inventory pods", f"{needed.inventory_pods:,}", f"{POD_BUSY:.0%} of a core each"),
        ("analytics workers", f"{needed.analytics_workers:,}",
         f"each can {costs.projection:,.0f} movements/s, and has {CONSUMER_BUSY:.0%} of that to do"),
        ("memory of the pods", _bytes(needed.memory_bytes), "as measured, by service"),
        ("Kafka partitions a topic", f"{needed.partitions:,}", "twice what the workers need, as a power of two"),
        ("Kafka's disk, a day", _bytes(needed.kafka_bytes_a_day),
         "times its replicas; movements and changes are kept for ever"),
        ("database cores", f"{needed.database_cores:,.1f}", f"{DATABASE_BUSY:.0%} busy"),
        ("database nodes", f"{needed.database_nodes:,}",
         f"of {NODE_CORES} cores; from two on distributed, at {costs.distributed:.2f} times the CPU"),
        ("kept in memory there", _bytes(needed.hot_bytes), "rows of the SKUs of 95 % of the calls"),
        ("disk of the databases", _bytes(needed.disk_bytes), "times its replicas"),
        ("log of the databases", f"{_bytes(needed.wal_bytes_a_second)}/s", f"{costs.wal_bytes:,.0f} bytes a Reserve"),
        ("Redis", _bytes(needed.redis_bytes), "the same SKUs"),
    ):  # fmt: skip
        table.add_row(*row)
    console.print(table)
    broken = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, justify in (("\nwhat breaks first", "left"), ("\nat requests/s", "right"), ("\nthen", "left")):
        broken.add_column(name, justify=justify)  # type: ignore[arg-type]
    for limit in limits(costs, demand):
        style = "bold red" if limit.rate < demand.rate else ""
        broken.add_row(limit.what, f"{limit.rate:,.0f}", limit.then, style=style)
    console.print(broken)
    console.print("\n[dim]Costs are those of the measured machine's cores; network and disks are taken to keep up.[/]")
    for one in seen:
        console.print(
            f"[dim]Checked: {one.what}: {one.predicted:,.0f}/s, measured {one.measured:,.0f}/s ({one.off:+.0%}).[/]"
        )


def mix_of(text: str) -> dict[str, float]:
    """Shares of kinds, as `availability=0.8,reserve=0.2`. Raises ValueError with what is wrong."""
    told = dict.fromkeys(KINDS, 0.0)
    for part in text.split(","):
        kind, _, share = part.partition("=")
        if kind not in told:
            raise ValueError(f"{kind!r} is no kind of call: {', '.join(KINDS)}")
        told[kind] = float(share)
    if min(told.values()) < 0 or abs(sum(told.values()) - 1) > 1e-6:
        raise ValueError("the shares of a mix must be at least 0 and add up to 1")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description="What a rate of requests takes.")
    parser.add_argument("--rate", type=float, default=2_100, help="requests a second (2100)")
    parser.add_argument(
        "--mix", type=mix_of, default=STAGE, help="availability=0.8,reserve=0.14,confirm=0.05,cancel=0.01"
    )
    parser.add_argument("--skus", type=lambda text: int(float(text)), default=100_000, help="how many (1e5)")
    parser.add_argument("--skew", type=float, default=1.0, help="Zipf's exponent of what is asked for (1)")
    parser.add_argument("--retention-days", type=float, default=90, help="for which reservations are kept (90)")
    parser.add_argument("--costs", type=Path, help="what `make bench` wrote (.local/bench.json, else the kept one)")
    told = parser.parse_args()
    if told.rate <= 0 or told.skus < 1 or told.skew < 0 or told.retention_days < 0:
        parser.error("--rate must be more than 0, --skus at least 1, --skew and --retention-days not negative")
    file = told.costs or (MEASURED if MEASURED.exists() else KEPT)
    try:
        measured = json.loads(file.read_text())
        costs = Costs.read(measured)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{file} has no costs ({error!r}): run make bench")
    show(
        Console(highlight=False),
        costs,
        Demand(told.rate, told.mix, told.skus, told.skew, told.retention_days),
        check(measured),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
