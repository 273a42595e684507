"""The transactional outbox: what changed is written beside the change, and a relay sends it to Kafka.

A transaction writes its events as groups, a row for each topic and type, and not a row for each event:
the row is what costs. Why this loses and reorders nothing per key:

* A group is inserted in the transaction that made its events, after that transaction has locked the rows
  that they are about. Two transactions on one row are therefore serial, and the later one draws the higher
  id: ascending id, and order within a group, is version order for each row.
* The relay does not keep a cursor (ids become visible out of order): it reads the lowest ids there are,
  sends their events, and deletes what was acknowledged. A crash in between sends them again; consumers
  apply by version, so a duplicate changes nothing.
* Two relays at once read and send the same rows: duplicates again, nothing else.

Kafka may be away for hours: rows wait. Table `outbox` belongs to each service's database. A service whose
events stand in a table already keeps no second copy of them, only where they are: it gives its relay a
`Source` of its own, and the same holds.
"""

import asyncio
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.producer.message_accumulator import BatchBuilder
from opentelemetry.trace import SpanKind

from shared import metrics, telemetry, watermark
from shared.database import Connection, Database
from shared.kafka import Brokers
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
RELAY_GROUPS_MAX = 64
WATERMARK_SECONDS = 0.5
SCHEMA_VERSION = b"1"
EVENT_IDS = 1 << 128

INSERT = """
INSERT INTO {table} (topic, type, keys, payloads, traceparent) VALUES ($1, $2, $3, $4, $5)
"""
# The lowest ids: what has waited longest, in version order for each key.
PEEK = """
SELECT id, event_id, topic, type, keys, payloads, traceparent FROM {table} ORDER BY id LIMIT $1
"""
DELETE = "DELETE FROM {table} AS waiting USING unnest($1::bigint[]) AS sent (id) WHERE waiting.id = sent.id"


@dataclass(frozen=True, slots=True)
class Event:
    """A message for `topic`, ordered by `key`; `type` names the protobuf message in `payload`."""

    topic: str
    key: str
    type: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Group:
    """Events of one type for one topic, in order. The n-th event's id is `event_id` plus n.

    `traceparent` is that of the transaction that made them, empty where it was not traced.
    """

    id: int
    event_id: uuid.UUID
    topic: str
    type: str
    keys: Sequence[str]
    payloads: Sequence[bytes]
    traceparent: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where groups wait: how the oldest are read, and the statement that deletes an array of their ids."""

    peek: Callable[[Connection, int], Awaitable[list[Group]]]
    delete: str


async def write(connection: Connection, events: Sequence[Event], table: str = "outbox") -> None:
    """Insert events in the caller's transaction, which has locked what they are about."""
    for (topic, kind), part in groupby(events, key=lambda event: (event.topic, event.type)):
        group = list(part)
        keys, payloads = [event.key for event in group], [event.payload for event in group]
        await connection.execute(INSERT.format(table=table), topic, kind, keys, payloads, telemetry.traceparent())


def source(table: str) -> Source:
    """A table as every service has it as `outbox`."""

    async def peek(connection: Connection, groups_max: int) -> list[Group]:
        return [Group(*row) for row in await connection.fetch(PEEK.format(table=table), groups_max)]

    return Source(peek, DELETE.format(table=table))


OUTBOX = source("outbox")


class Relay:
    """Moves what waits in a database to Kafka."""

    def __init__(
        self, database: Database, producer: AIOKafkaProducer, source: Source = OUTBOX, watermark_topic: str = ""
    ) -> None:
        self._database = database
        self._producer = producer
        self._source = source
        self._watermark_topic = watermark_topic

    async def relay_once(self, groups_max: int = RELAY_GROUPS_MAX) -> int:
        """Send the oldest groups, delete them when all is acknowledged; return how many.

        Raises KafkaError or Refusal(DATABASE_UNAVAILABLE), and then has deleted nothing.
        """
        async with self._database.connection() as connection:
            groups = await self._source.peek(connection, groups_max)
        if not groups:
            return 0
        spans = {
            group.id: span
            for group in groups
            if (span := telemetry.follow(f"send {group.topic}", group.traceparent, SpanKind.PRODUCER, _told(group)))
        }
        with telemetry.ending(spans.values()):
            await self._send(groups, {number: telemetry.written(span) for number, span in spans.items()})
        async with self._database.connection() as connection:
            await connection.execute(self._source.delete, [group.id for group in groups])
        return len(groups)

    async def _send(self, groups: Sequence[Group], traces: Mapping[int, str]) -> None:
        """Fill a batch for each partition and send it when it is full; return when all are acknowledged.

        `traces` has what is to be in the messages of traced groups, by the group's id.
        """
        filling: dict[tuple[str, int], BatchBuilder] = {}
        sent: list[asyncio.Future[object]] = []

        async def flush(topic: str, partition: int) -> None:
            batch = filling.pop((topic, partition))
            sent.append(await self._producer.send_batch(batch, topic, partition=partition))

        for group in groups:
            partitions = len(await self._producer.partitions_for(group.topic))
            trace = traces.get(group.id, group.traceparent)
            for number, (key, payload) in enumerate(zip(group.keys, group.payloads, strict=True)):
                raw = key.encode()
                place = (group.topic, partition_of(raw, partitions))
                message = {"timestamp": None, "key": raw, "value": payload, "headers": _headers(group, number, trace)}
                if place not in filling:
                    filling[place] = self._producer.create_batch()
                if filling[place].append(**message) is None:
                    await flush(*place)
                    filling[place] = self._producer.create_batch()
                    filling[place].append(**message)
        for place in list(filling):
            await flush(*place)
        await asyncio.gather(*sent)
        for group in groups:
            metrics.RELAYED.labels(group.topic).inc(len(group.keys))

    async def run(self, *, poll_seconds: float) -> None:
        """Relay until cancelled; wait `poll_seconds` when little was waiting, longer when Kafka is away.

        With a `watermark_topic` each of its partitions is told every half a second how far it is complete.
        """
        wait = poll_seconds
        told = 0.0
        while True:
            try:
                due = bool(self._watermark_topic) and time.monotonic() - told >= WATERMARK_SECONDS
                complete_until = await self._bound() if due else None
                full = await self.relay_once() == RELAY_GROUPS_MAX
                wait = 0 if full else poll_seconds
                if complete_until and not full:
                    await watermark.tell(self._producer, self._watermark_topic, complete_until)
                    told = time.monotonic()
            except (KafkaError, Refusal) as error:
                wait = min(max(wait, 0.1) * 2, 5)
                metrics.RELAY_WAITS.inc()
                log.warning("relay waits", error=type(error).__name__, seconds=wait)
            await asyncio.sleep(wait)

    async def _bound(self) -> datetime:
        async with self._database.connection() as connection:
            return await watermark.bound(connection)


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a key, as librdkafka chooses it by default."""
    return zlib.crc32(key) % partitions


def _told(group: Group) -> telemetry.Attributes:
    return {
        "messaging.system": "kafka",
        "messaging.destination.name": group.topic,
        "messaging.batch.message_count": len(group.keys),
    }


def _headers(group: Group, number: int, traceparent: str) -> list[tuple[str, bytes]]:
    headers = [
        ("event_id", ((group.event_id.int + number) % EVENT_IDS).to_bytes(16, "big")),
        ("type", group.type.encode()),
        ("schema_version", SCHEMA_VERSION),
    ]
    if traceparent:
        headers.append((telemetry.KEY, traceparent.encode()))
    return headers


def producer(brokers: Brokers, client: str) -> AIOKafkaProducer:
    """A producer that keeps order and sends each batch once."""
    return AIOKafkaProducer(
        **brokers.options,
        client_id=client,
        acks="all",
        enable_idempotence=True,
        linger_ms=5,
        max_batch_size=256 << 10,
    )
