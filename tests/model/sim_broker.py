"""Kafka in memory: the part of aiokafka's producer and consumer that the services use.

A producer is idempotent: what it sends to a partition stands there in order, and with a batch that fails those fail
that were sent behind it meanwhile. A batch may stand there though its sender was told that it failed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, KafkaConnectionError

PARTITIONS = 2
BATCH_MESSAGES_MAX = 8
POLL_SECONDS = 1.0
Hop = Callable[[str], Awaitable[str]]


@dataclass(frozen=True)
class Message:
    """A message where it stands."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


@dataclass
class Group:
    """A group of consumers: how far it has come, and who of it reads what."""

    offsets: dict[TopicPartition, int] = field(default_factory=dict)
    members: list["KafkaConsumer"] = field(default_factory=list)

    def owner(self, partition: TopicPartition) -> "KafkaConsumer | None":
        readers = [member for member in self.members if partition.topic in member.topics]
        return readers[partition.partition % len(readers)] if readers else None


class Broker:
    """What stands in each partition of each topic. `appended` is called with each message."""

    def __init__(self) -> None:
        self.logs: dict[TopicPartition, list[Message]] = {}
        self.groups: dict[str, Group] = {}
        self.away = False
        self.appended: Callable[[Message], None] = lambda _message: None

    def log(self, partition: TopicPartition) -> list[Message]:
        return self.logs.setdefault(partition, [])

    def append(
        self, at: TopicPartition, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> None:
        log = self.log(at)
        log.append(Message(at.topic, at.partition, len(log), key, value, tuple(headers)))
        self.appended(log[-1])

    def leave(self, gone: "Callable[[KafkaConsumer], bool]") -> None:
        for group in self.groups.values():
            group.members = [member for member in group.members if not gone(member)]


class Batch:
    """What `create_batch` makes."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes]]]] = []

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> object | None:
        assert timestamp is None
        if len(self.messages) == BATCH_MESSAGES_MAX:
            return None
        self.messages.append((key, value, headers))
        return self


class Producer:
    """As `shared.outbox.producer` makes it. `hop` carries a batch and tells what fault it meets."""

    def __init__(self, broker: Broker, hop: Hop) -> None:
        self._broker = broker
        self._hop = hop
        self._last: dict[TopicPartition, asyncio.Task[None]] = {}

    async def start(self) -> None:
        await self._hop("start")
        self._require_broker()

    async def stop(self) -> None:
        for task in self._last.values():
            task.cancel()

    async def partitions_for(self, _topic: str) -> set[int]:
        self._require_broker()
        return set(range(PARTITIONS))

    def create_batch(self) -> Batch:
        return Batch()

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> "asyncio.Task[None]":
        at = TopicPartition(topic, partition)
        before = self._last.get(at)
        under_way = before if before and not before.done() else None
        task = asyncio.get_running_loop().create_task(self._append(at, batch, under_way))
        self._last[at] = task
        return task

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int,
        headers: Sequence[tuple[str, bytes]],
    ) -> "asyncio.Task[None]":
        batch = Batch()
        batch.append(timestamp=None, key=key, value=value, headers=headers)
        return await self.send_batch(batch, topic, partition=partition)

    async def send_and_wait(
        self, topic: str, value: bytes | None, *, key: bytes | None, headers: Sequence[tuple[str, bytes]]
    ) -> None:
        await (await self.send(topic, value, key=key, partition=0, headers=headers))

    async def _append(self, at: TopicPartition, batch: Batch, before: "asyncio.Task[None] | None") -> None:
        if before:
            await asyncio.wait([before])
            if before.cancelled() or before.exception():
                raise KafkaConnectionError("a batch before it failed")
        fault = await self._hop("send")
        if fault == "lost before" or self._broker.away:
            raise KafkaConnectionError("no broker")
        for key, value, headers in batch.messages:
            self._broker.append(at, key, value, headers)
        if fault == "lost after":
            raise KafkaConnectionError("no acknowledgement")
        await self._hop("sent")

    def _require_broker(self) -> None:
        if self._broker.away:
            raise KafkaConnectionError("no broker")


class KafkaConsumer:
    """A member of a group. It learns with its next look which partitions are its own."""

    def __init__(self, broker: Broker, hop: Hop, group: str, pod: object) -> None:
        self._broker = broker
        self._hop = hop
        self._group = broker.groups.setdefault(group, Group())
        self._read: dict[TopicPartition, int] = {}
        self.topics: Sequence[str] = ()
        self.pod = pod

    def subscribe(self, topics: Sequence[str], *, listener: object) -> None:
        assert listener is not None
        self.topics = topics

    async def start(self) -> None:
        await self._hop("start")
        if self._broker.away:
            raise KafkaConnectionError("no broker")
        self._group.members.append(self)

    async def stop(self) -> None:
        if self in self._group.members:
            self._group.members.remove(self)

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Message]]:
        found = self._fetch(max_records)
        if not found:
            await asyncio.sleep(timeout_ms / 1000 * POLL_SECONDS)
            await self._hop("fetch")
            found = self._fetch(max_records)
        return found

    def assignment(self) -> set[TopicPartition]:
        return set(self._read)

    def highwater(self, at: TopicPartition) -> int:
        return len(self._broker.log(at))

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        if await self._hop("commit") == "lost before" or any(self._group.owner(at) is not self for at in offsets):
            raise CommitFailedError
        self._group.offsets.update(offsets)

    def _fetch(self, messages_max: int) -> dict[TopicPartition, list[Message]]:
        if self._broker.away:
            return {}
        mine = [
            at
            for topic in self.topics
            for number in range(PARTITIONS)
            if self._group.owner(at := TopicPartition(topic, number)) is self
        ]
        self._read = {at: self._read.get(at, self._group.offsets.get(at, 0)) for at in mine}
        found = {}
        for at in mine:
            if messages := self._broker.log(at)[self._read[at] :][:messages_max]:
                found[at] = messages
                self._read[at] += len(messages)
        return found
