"""What calls cost by kind, part and size of batch, and what rows weigh: `bench.capacity` reckons with it."""

import time
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import asyncpg
import psutil
import redis
from prometheus_client.parser import text_string_to_metric_families

from bench.load import Run
from bench.stage import Holdfasts
from services.inventory.workers import MOVEMENTS
from shared.database import Database
from shared.kafka import Brokers
from shared.outbox import OUTBOX, Relay, producer

CALLERS = (4, 16, 64, 256)
ROWS = {
    "inventory": ("sku", "stock", "hold", "movement", "checkpoint"),
    "reservation": ("reservation", "reservation_line", "allocation", "reservation_change"),
    "analytics": ("stock_view", "movement", "reservation", "reservation_state", "sale"),
}
RELAYED = {"inventory": MOVEMENTS, "reservation": OUTBOX}
WAITING = {
    "inventory": "SELECT coalesce(sum(cardinality(skus)), 0) FROM movement_outbox",
    "reservation": "SELECT coalesce(sum(cardinality(keys)), 0) FROM outbox",
}
WEIGHT = """
SELECT sum(pg_total_relation_size(part)) FROM (
  SELECT $1::regclass AS part UNION ALL SELECT inhrelid FROM pg_inherits WHERE inhparent = $1::regclass
) AS parts
"""


@dataclass(frozen=True, slots=True)
class Point:
    """Reserve with so many callers: calls a second, calls in a batch of a reservation pod and the seconds it takes, of
    which inventory's transaction takes `lock_seconds`, and the CPU of each side, in us a call.
    """

    callers: int
    rate: float
    batch: float
    batch_seconds: float
    lock_seconds: float
    cpu: Mapping[str, float]

    def figures(self) -> dict[str, object]:
        return asdict(self)


class Watch:
    """What the pods counted of their batches since it was made."""

    def __init__(self, pods: Holdfasts) -> None:
        self._pods = pods
        self._before = self._sums()

    def point(self, callers: int, run: Run) -> Point:
        now = self._sums()
        count = {name: now[name] - self._before.get(name, 0.0) for name in now}

        def mean(series: str) -> float:
            return count[f"{series}_sum"] / max(count[f"{series}_count"], 1)

        return Point(
            callers,
            round(run.rate, 1),
            round(mean("reservation holdfast_batch_items reserves"), 2),
            round(mean("reservation holdfast_batch_seconds reserves"), 6),
            round(mean("inventory holdfast_batch_seconds holds"), 6),
            {side: round(cost, 1) for side, cost in run.cpu.items()},
        )

    def _sums(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for service, addresses in self._pods.metrics.items():
            for address in addresses:
                for name, queue, value in _histograms(address):
                    series, _, part = name.rpartition("_")
                    key = f"{service} {series} {queue}_{part}"
                    found[key] = found.get(key, 0.0) + value
        return found


def _histograms(address: str) -> Iterable[tuple[str, str, float]]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith(("_sum", "_count")) and "queue" in sample.labels:
                yield sample.name, sample.labels["queue"], sample.value


async def bytes_a_row(dsns: Mapping[str, str]) -> dict[str, float]:
    """What a row of each table takes with its indexes, dead rows of the run before included."""
    found = {}
    for service, tables in ROWS.items():
        if service not in dsns:
            continue
        connection = await asyncpg.connect(dsns[service], command_timeout=600)
        try:
            for table in tables:
                rows = await connection.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608 - our own names
                if rows:
                    found[f"{service}.{table}"] = round(float(await connection.fetchval(WEIGHT, table)) / rows, 1)
        finally:
            await connection.close()
    return found


async def wal_position(dsn: str) -> int:
    """How many bytes of log PostgreSQL has written since it was made."""
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"))
    finally:
        await connection.close()


async def relayed_per_second(dsns: Mapping[str, str], bootstrap: str) -> dict[str, float]:
    """Send the events that wait for each service's relay; how many a second it does."""
    found = {}
    for service, source in RELAYED.items():
        database = await Database.connect(dsns[service], name="bench")
        sender = producer(Brokers(bootstrap), "bench")
        await sender.start()
        try:
            async with database.connection() as connection:
                waiting = await connection.fetchval(WAITING[service])
            began = time.monotonic()
            relay = Relay(database, sender, source)
            while await relay.relay_once():
                pass
            found[service] = round(waiting / (time.monotonic() - began), 1)
        finally:
            await sender.stop()
            await database.close()
    return found


def redis_bytes_a_key(url: str) -> int:
    """What a key of the cache takes, with its place in Redis' tables; 0 where there is none just now."""
    with redis.Redis.from_url(url) as client:
        return int(client.memory_usage(client.randomkey() or "") or 0)


def kafka_bytes(root: Path) -> int:
    """What all of Holdfast's topics take."""
    return sum(file.stat().st_size for file in root.glob("data/kafka/holdfast.*/*.log"))


def pod_bytes(pods: Holdfasts) -> dict[str, int]:
    """Memory of the largest pod of each service."""
    return {
        service: max(psutil.Process(pid).memory_info().rss for pid in pods.pids[service]) for service in pods.metrics
    }
