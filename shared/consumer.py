"""A Kafka consumer that knows three kinds of failure, and the dead letters of one.

* `Busy`: what is needed is away for the moment. The same messages are tried again, with growing waits;
  nothing is skipped.
* `Poison`: this message will never do. It goes to the dead letter topic with its reason and where it
  came from, and the partition goes on.
* Anything else is broken: nothing is committed and the consumer stops with it; whoever started it
  starts it again, and the messages come again.

Each partition is worked in order, partitions at the same time. Offsets are committed after the handler, so
a message comes at least once and handlers must be idempotent; or the handler keeps them with what it
writes, in one transaction, and then each message counts once. Too many dead letters within
a minute are a sign that the consumer is wrong and not the messages: it stops (`DeadLetterLimitError`)
before it has drained a topic into the dead letters, and run again it buries no more until the minute is over.

`python -m shared.consumer inspect TOPIC.dlq` shows dead letters; `... replay TOPIC.dlq` sends those that
were not replayed before back to where they came from, each once.
"""

import argparse
import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaConnectionError, KafkaError

from shared import metrics, telemetry
from shared.kafka import Brokers, stop
from shared.outbox import partition_of, producer
from shared.refusal import Refusal
from shared.settings import KafkaSettings, load

log = structlog.get_logger(__name__)
Message: TypeAlias = "ConsumerRecord[bytes | None, bytes | None]"

BATCH_MESSAGES_MAX = 500
BUSY_SECONDS = 0.05
BUSY_SECONDS_MAX = 5.0
DLQ_WINDOW_SECONDS = 60
IDLE_MS = 2_000
HEARTBEAT_MS = 500  # a member that joins waits for the next heartbeat of the others


class Busy(Exception):
    """Try again later."""


class DeadLetterLimitError(Exception):
    """Too many messages were poison for it to be their fault."""


class Poison(Exception):
    """A message that will never do. `reason` stands in its dead letter and holds no personal data."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Elsewhere(Exception):
    """A batch does not begin where its partition has got to: someone else has worked it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages of one partition, in order, read from the offset `start` on; the first may be later."""

    partition: TopicPartition
    start: int
    messages: Sequence[Message]

    @property
    def end(self) -> int:
        """The offset from which to read on."""
        return int(self.messages[-1].offset) + 1


Bury = Callable[[Message, Poison], Awaitable[None]]
Handler = Callable[[Batch, Bury], Awaitable[None]]
Positions = Callable[[Sequence[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]]


class Consumer:
    """Feeds `handle` with batches of one partition each. It buries what is poison, before it commits the rest.

    Offsets are Kafka's, committed after the handler. A handler that keeps them with what it writes gives
    `positions`, which tells from where partitions are to be read; then Kafka's are left alone, nothing is handled of a
    partition before that is known, and Elsewhere makes the consumer ask again. While `positions` is refused it asks
    again as well. After a small batch it waits for `linger_seconds`, so that the next one is larger.
    """

    def __init__(
        self,
        brokers: Brokers,
        topics: Sequence[str],
        group: str,
        dlq_topic: str,
        handle: Handler,
        *,
        dlq_messages_max: int = 100,
        batch_messages_max: int = BATCH_MESSAGES_MAX,
        linger_seconds: float = 0,
        positions: Positions | None = None,
    ) -> None:
        self._brokers = brokers
        self._topics = topics
        self._group = group
        self._dlq_topic = dlq_topic
        self._handle = handle
        self._dlq_messages_max = dlq_messages_max
        self._batch_messages_max = batch_messages_max
        self._linger_seconds = linger_seconds
        self._positions = positions
        self._dlq_times: deque[float] = deque()
        self._at: dict[TopicPartition, int] = {}
        self._read_to: dict[TopicPartition, int] = {}
        self._buried: set[tuple[str, int, int]] = set()
        self._astray = False

    async def run(self) -> None:
        """Consume until cancelled. Raises what is broken; KafkaError when the brokers are away.

        To be run again, on the same Consumer: it knows what it has buried, and how much of late.
        """
        consumer = AIOKafkaConsumer(
            **self._brokers.options,
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            heartbeat_interval_ms=HEARTBEAT_MS,
        )
        consumer.subscribe(self._topics, listener=_Assigned(self._at.clear, lambda: self._seek(consumer)))
        self._at.clear()
        sender = producer(self._brokers, self._group)
        try:
            await consumer.start()
            await sender.start()
            while True:
                batches = await consumer.getmany(timeout_ms=1000, max_records=self._batch_messages_max)
                if self._positions:
                    batches = self._sought(consumer, batches)
                self._tell_lag(consumer)
                if batches:
                    async with asyncio.TaskGroup() as group:
                        for partition, messages in batches.items():
                            start = self._at.get(partition, messages[0].offset)
                            batch = Batch(partition, start, messages)
                            self._read_to[partition] = batch.end
                            group.create_task(self._work(consumer, sender, batch))
                wait = BUSY_SECONDS
                while self._astray and not await self._seek(consumer):
                    await asyncio.sleep(wait)
                    wait = min(wait * 2, BUSY_SECONDS_MAX)
                if batches and sum(map(len, batches.values())) < self._batch_messages_max / 2:
                    await asyncio.sleep(self._linger_seconds)
        finally:
            for topic in self._topics:
                metrics.CONSUMER_LAG.labels(self._group, topic).set(0)
            await stop(consumer, sender)

    def _tell_lag(self, consumer: AIOKafkaConsumer) -> None:
        """How far its partitions are behind, as far as the last answers of the brokers tell."""
        behind = dict.fromkeys(self._topics, 0)
        for partition in consumer.assignment():
            end, at = consumer.highwater(partition), self._read_to.get(partition)
            if end is not None and at is not None:
                behind[partition.topic] += max(0, end - at)
        for topic, messages in behind.items():
            metrics.CONSUMER_LAG.labels(self._group, topic).set(messages)

    def _sought(
        self, consumer: AIOKafkaConsumer, batches: Mapping[TopicPartition, list[Message]]
    ) -> dict[TopicPartition, list[Message]]:
        """Those that go on from where their partitions have got to; if any do not, all are to be asked for again.

        aiokafka fetches as soon as it is assigned a partition, from the first message on as Kafka knows no offset. A
        partition may also come back while a batch of it is under way, and is then sought to where that began. One that
        ends before where it has got to was made anew: it begins again.
        """
        sought = {
            partition: messages
            for partition, messages in batches.items()
            if (at := self._at.get(partition)) is not None
            and (messages[0].offset >= at or (consumer.highwater(partition) or at) < at)
        }
        self._astray |= len(sought) < len(batches)
        return sought

    async def _seek(self, consumer: AIOKafkaConsumer) -> bool:
        """Read on from where the partitions have got to; False where it cannot be known for the moment."""
        self._astray = True
        self._at.clear()
        partitions = sorted(consumer.assignment())
        try:
            offsets = await self._positions(partitions) if self._positions and partitions else {}
        except Refusal as refusal:
            log.warning("positions are not known", group=self._group, why=refusal.message)
            return False
        for partition in consumer.assignment() & offsets.keys():
            consumer.seek(partition, offsets[partition])
            self._at[partition] = offsets[partition]
        self._astray = False
        return True

    async def _work(self, consumer: AIOKafkaConsumer, sender: AIOKafkaProducer, batch: Batch) -> None:
        # A partition that has moved to another member is worked again there; handlers are idempotent.
        topic = batch.partition.topic
        told = {
            "messaging.system": "kafka",
            "messaging.destination.name": topic,
            "messaging.consumer.group.name": self._group,
        }
        try:
            with telemetry.processing(f"process {topic}", batch.messages, told):
                await self._patiently(sender, batch)
            metrics.CONSUMED.labels(self._group, topic).inc(len(batch.messages))
            if self._positions:
                if self._at.get(batch.partition) == batch.start:  # else it was assigned anew meanwhile
                    self._at[batch.partition] = batch.end
            else:
                await consumer.commit({batch.partition: batch.end})
        except Elsewhere:
            # Not this partition alone: what has replaced the offsets of one may have replaced all of them.
            log.warning("partition was worked elsewhere", topic=topic, number=batch.partition.partition)
            self._astray = True
        except (CommitFailedError, IllegalStateError):
            pass

    async def _patiently(self, sender: AIOKafkaProducer, batch: Batch) -> None:
        async def bury(message: Message, poison: Poison) -> None:
            origin = (message.topic, message.partition, message.offset)
            if origin not in self._buried:
                await self._bury(sender, message, poison)
                self._buried.add(origin)

        wait = BUSY_SECONDS
        while True:
            try:
                await self._handle(batch, bury)
            except Busy as busy:
                metrics.CONSUMER_WAITS.labels(self._group).inc()
                log.warning("consumer waits", topic=batch.partition.topic, seconds=wait, why=str(busy))
                await asyncio.sleep(wait)
                wait = min(wait * 2, BUSY_SECONDS_MAX)
            else:
                self._buried -= {(*batch.partition, message.offset) for message in batch.messages}
                return

    async def _bury(self, sender: AIOKafkaProducer, message: Message, poison: Poison) -> None:
        now = time.monotonic()
        while self._dlq_times and self._dlq_times[0] < now - DLQ_WINDOW_SECONDS:
            self._dlq_times.popleft()
        if len(self._dlq_times) >= self._dlq_messages_max:
            raise DeadLetterLimitError(
                f"more than {self._dlq_messages_max} dead letters in {DLQ_WINDOW_SECONDS} s on {message.topic}"
            )
        self._dlq_times.append(now)
        origin = f"{message.topic}/{message.partition}/{message.offset}"
        metrics.DEAD_LETTERED.labels(self._group).inc()
        log.warning("dead letter", origin=origin, reason=poison.reason)
        kept = [(name, value) for name, value in message.headers if not name.startswith("dlq_")]
        added = [("dlq_reason", poison.reason.encode()), ("dlq_origin", origin.encode())]
        await sender.send_and_wait(self._dlq_topic, message.value, key=message.key, headers=[*kept, *added])


class _Assigned(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """Calls `forget` before partitions change hands, and `seek` after. Some of theirs may be fetched before it ends.

    What `seek` raises aiokafka logs, and goes on.
    """

    def __init__(self, forget: Callable[[], None], seek: Callable[[], Awaitable[object]]) -> None:
        self._forget = forget
        self._seek = seek

    async def on_partitions_revoked(self, _revoked: Collection[TopicPartition]) -> None:
        """What is under way finds its partition elsewhere."""
        self._forget()

    async def on_partitions_assigned(self, _assigned: Collection[TopicPartition]) -> None:
        await self._seek()


async def dead_letters(brokers: Brokers, topic: str, *, limit: int, group: str | None = None) -> list[Message]:
    """The oldest dead letters, at most `limit`; with a group those after its position, else all."""
    consumer = _reader(brokers, topic, group)
    await consumer.start()
    try:
        return await _read(consumer, limit)
    finally:
        await stop(consumer)


async def replay(brokers: Brokers, topic: str, *, limit: int) -> int:
    """Send dead letters back to the topics that they came from; each once. Returns how many."""
    consumer, sender = _reader(brokers, topic, f"{topic}.replay"), producer(brokers, "replay")
    await consumer.start()
    await sender.start()
    try:
        messages = await _read(consumer, limit)
        for message in messages:
            origin = dict(message.headers)["dlq_origin"].decode().rsplit("/", 2)[0]
            kept = [(name, value) for name, value in message.headers if not name.startswith("dlq_")]
            partition = partition_of(message.key or b"", len(await sender.partitions_for(origin)))
            await sender.send_and_wait(origin, message.value, key=message.key, partition=partition, headers=kept)
            await consumer.commit({TopicPartition(message.topic, message.partition): message.offset + 1})
        return len(messages)
    finally:
        await stop(consumer, sender)


def _reader(brokers: Brokers, topic: str, group: str | None) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        topic,
        **brokers.options,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )


async def _read(consumer: AIOKafkaConsumer, limit: int) -> list[Message]:
    messages: list[Message] = []
    while len(messages) < limit:
        batches = await consumer.getmany(timeout_ms=IDLE_MS, max_records=limit - len(messages))
        if not batches:
            break
        for batch in batches.values():
            messages += batch
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shared.consumer", description="Look at dead letters.")
    parser.add_argument("action", choices=("inspect", "replay"))
    parser.add_argument("topic", help="a dead letter topic, such as holdfast.inventory.commands.v1.dlq")
    parser.add_argument("--limit", type=int, default=100, help="at most so many (default: 100)")
    arguments = parser.parse_args()
    brokers = load(KafkaSettings).brokers
    try:
        if arguments.action == "replay":
            count = asyncio.run(replay(brokers, arguments.topic, limit=arguments.limit))
            print(f"{count} replayed")  # noqa: T201 - a command's answer
            return
        letters = asyncio.run(dead_letters(brokers, arguments.topic, limit=arguments.limit))
    except (KafkaConnectionError, KafkaError) as error:
        raise SystemExit(f"Kafka at {brokers.bootstrap} does not answer: {error}") from None
    for letter in letters:
        headers = {name: value.decode(errors="replace") for name, value in letter.headers if name.startswith("dlq")}
        at = f"{letter.partition}/{letter.offset}"
        key = (letter.key or b"").decode(errors="replace")
        print(f"{at:>10}  {headers.get('dlq_origin', ''):<50}  {key:<20}  {headers.get('dlq_reason', '')}")  # noqa: T201
    print(f"{len(letters)} dead letters")  # noqa: T201


if __name__ == "__main__":
    main()
