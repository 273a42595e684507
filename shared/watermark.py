"""How a consumer knows that nothing is missing: a time before which everything recorded stands earlier.

A relay that has emptied its outbox tells each partition of its topic a time, in a message without key and
content. The time is taken before the outbox is read: it is now, or the start of the oldest transaction that has
written and not yet ended, if that is earlier. A change recorded before it was committed by then, so that the
read saw it, and has been sent. Times of recording are read after a transaction's first write, which is why
those that have not written do not count. (Reservation's events carry the time of inventory's change, which is
before that; of them it holds by the time of their booking.) Two relays at once tell two times, and both are true.
"""

from datetime import UTC, datetime

from aiokafka import AIOKafkaProducer, ConsumerRecord

from shared.database import Connection

TYPE = b"watermark"
MICROSECOND = 1_000_000
BOUND = """
SELECT least(statement_timestamp(), min(xact_start)) FROM pg_stat_activity
WHERE datname = current_database() AND backend_xid IS NOT NULL
"""


async def bound(connection: Connection) -> datetime:
    """A time before which no change will be recorded any more. To be asked before the outbox is read."""
    time = await connection.fetchval(BOUND)
    assert isinstance(time, datetime)
    return time


async def tell(producer: AIOKafkaProducer, topic: str, time: datetime) -> None:
    """Tell every partition of a topic that all that was recorded before `time` has been sent."""
    micros = b"%d" % round(time.timestamp() * MICROSECOND)
    for partition in await producer.partitions_for(topic):
        await producer.send(topic, b"", partition=partition, headers=[("type", TYPE), ("time", micros)])


def of(message: "ConsumerRecord[bytes | None, bytes | None]") -> datetime | None:
    """The time that a message tells; None for an event."""
    if message.key is not None or message.value:
        return None
    headers = dict(message.headers)
    if headers.get("type") != TYPE:
        return None
    try:
        return datetime.fromtimestamp(int(headers["time"]) / MICROSECOND, UTC)
    except (KeyError, ValueError, OverflowError, OSError):
        return None
