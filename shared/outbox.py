"""The transactional outbox: what changed is written beside the change, and a relay sends it to Kafka.

Why this loses and reorders nothing per key:

* An event is inserted in the transaction that made it, after that transaction has locked the row that
  it is about. Two transactions on one row are therefore serial, and the later one draws higher ids:
  ascending id is version order for each row.
* The relay does not keep a cursor (ids become visible out of order): it reads the lowest ids there are,
  sends them, and deletes what was acknowledged. A crash in between sends them again; consumers apply
  by version, so a duplicate changes nothing.
* Two relays at once read and send the same rows: duplicates again, nothing else.

Kafka may be away for hours: rows wait. Table `outbox` belongs to each service's database.
"""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from shared.database import Connection, Database
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
RELAY_EVENTS_MAX = 2_000
SCHEMA_VERSION = b"1"

# One row for each event, in the order given; ids ascend with it.
INSERT = """
INSERT INTO outbox (key, event_id, topic, type, payload, traceparent)
SELECT key, event_id, topic, type, payload, traceparent
FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::bytea[], $6::text[])
  WITH ORDINALITY AS event (key, event_id, topic, type, payload, traceparent, position)
ORDER BY position
"""
# The lowest ids: what has waited longest, in version order for each key.
PEEK = """
SELECT id, key, event_id, topic, type, payload, traceparent FROM outbox ORDER BY id LIMIT $1
"""
# By key as well, so that each delete goes to one shard.
DELETE = """
DELETE FROM outbox USING unnest($1::text[], $2::bigint[]) AS sent (key, id)
WHERE outbox.key = sent.key AND outbox.id = sent.id
"""
# How much waits, and for how long.
LAG = """
SELECT count(*) AS events, coalesce(extract(epoch FROM now() - min(created_at)), 0) AS seconds FROM outbox
"""


@dataclass(frozen=True, slots=True)
class Event:
    """A message for `topic`, ordered by `key`; `type` names the protobuf message in `payload`."""

    topic: str
    key: str
    type: str
    payload: bytes
    traceparent: str = ""


async def write(connection: Connection, events: Sequence[Event]) -> None:
    """Insert events in the caller's transaction, which has locked what they are about."""
    if events:
        await connection.execute(
            INSERT,
            [event.key for event in events],
            [uuid.uuid4() for _ in events],
            [event.topic for event in events],
            [event.type for event in events],
            [event.payload for event in events],
            [event.traceparent for event in events],
        )


class Relay:
    """Moves a database's outbox to Kafka."""

    def __init__(self, database: Database, producer: AIOKafkaProducer) -> None:
        self._database = database
        self._producer = producer

    async def relay_once(self, events_max: int = RELAY_EVENTS_MAX) -> int:
        """Send the oldest events, delete them when all are acknowledged; return how many.

        Raises KafkaError or Refusal(DATABASE_UNAVAILABLE), and then has deleted nothing.
        """
        async with self._database.connection() as connection:
            rows = await connection.fetch(PEEK, events_max)
        if not rows:
            return 0
        sent = [
            await self._producer.send(
                row["topic"],
                value=row["payload"],
                key=row["key"].encode(),
                headers=[
                    ("event_id", row["event_id"].bytes),
                    ("type", row["type"].encode()),
                    ("schema_version", SCHEMA_VERSION),
                    *([("traceparent", row["traceparent"].encode())] if row["traceparent"] else ()),
                ],
            )
            for row in rows
        ]
        await asyncio.gather(*sent)
        async with self._database.connection() as connection:
            await connection.execute(DELETE, [row["key"] for row in rows], [row["id"] for row in rows])
        return len(rows)

    async def run(self, *, poll_seconds: float) -> None:
        """Relay until cancelled; wait `poll_seconds` when there is nothing, longer when Kafka is away."""
        wait = poll_seconds
        while True:
            try:
                wait = 0 if await self.relay_once() == RELAY_EVENTS_MAX else poll_seconds
            except (KafkaError, Refusal) as error:
                wait = min(max(wait, 0.1) * 2, 5)
                log.warning("relay waits", error=type(error).__name__, seconds=wait)
            await asyncio.sleep(wait)


def producer(bootstrap: str, client: str) -> AIOKafkaProducer:
    """A producer that keeps order and sends each batch once."""
    return AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        client_id=client,
        acks="all",
        enable_idempotence=True,
        linger_ms=5,
        max_batch_size=256 << 10,
    )
