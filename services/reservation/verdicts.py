"""Feeds a guard with the verdicts of analytics, as long as the pod runs.

Every pod reads the topic for itself, without a group, from its beginning and then on. With Kafka away, Reserve goes
on with what is known; once it is back, reading goes on where it stopped. What is no verdict is skipped with a line in
the log.
"""

import asyncio
from datetime import UTC, datetime

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from services.reservation import codec
from services.reservation.guard import Guard
from shared.consumer import Message, Poison
from shared.kafka import Brokers, stop

log = structlog.get_logger(__name__)
POLL_MS = 1000
RECORDS_MAX = 500  # read at a stretch: callers wait meanwhile


class Follower:
    """Reads all verdicts of `topic` into `guard`. To be run again, on the same Follower, when it raises."""

    def __init__(self, brokers: Brokers, guard: Guard, topic: str = codec.VERDICTS_TOPIC) -> None:
        self._brokers = brokers
        self._guard = guard
        self._partition = TopicPartition(topic, 0)
        self._next: int | None = None
        self._complete = asyncio.Event()

    async def complete(self, seconds_max: float) -> bool:
        """Wait until all that was told before is read, at most so long; whether it is."""
        try:
            await asyncio.wait_for(self._complete.wait(), seconds_max)
        except TimeoutError:
            log.warning("serving without all verdicts", waited_seconds=seconds_max)
        return self._complete.is_set()

    async def run(self) -> None:
        """Read until cancelled. Raises KafkaError when the brokers are away."""
        consumer = AIOKafkaConsumer(**self._brokers.options, enable_auto_commit=False, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([self._partition])
            if self._next is not None:
                consumer.seek(self._partition, self._next)
            end = (await consumer.end_offsets([self._partition]))[self._partition]
            while True:
                if not self._complete.is_set() and await consumer.position(self._partition) >= end:
                    self._complete.set()
                for messages in (await consumer.getmany(timeout_ms=POLL_MS, max_records=RECORDS_MAX)).values():
                    for message in messages:
                        self._take(message)
                        self._next = message.offset + 1
        finally:
            await stop(consumer)

    def _take(self, message: Message) -> None:
        if message.value is None:  # the end of a key that was compacted
            return
        try:
            verdict = codec.verdict(message)
        except Poison as poison:
            log.warning("verdict skipped", offset=message.offset, reason=poison.reason)
            return
        if verdict:
            self._guard.apply(verdict, datetime.now(UTC))
