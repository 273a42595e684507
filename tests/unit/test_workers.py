"""How workers are kept going, on a clock that does not wait."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition

from shared import consumer, workers
from shared.consumer import Batch, Bury, Busy, Consumer, Elsewhere, Message
from shared.kafka import Brokers
from tests.model.sim_loop import SimLoop, run


def test_a_turn_that_was_held_up_is_not_rested_for() -> None:
    """A turn is rested for as long as it took; one that hung on a frozen database, a quarter of a second at most."""
    loop = SimLoop(1)
    turns: Iterator[float] = iter([0.1, 3, 0])
    began = []

    async def work() -> int:
        began.append(loop.time())
        seconds = next(turns)
        await asyncio.sleep(seconds)
        return round(seconds * 10)

    run(loop, workers.in_turns("done", work))
    rests = [round(after - before - took, 6) for before, after, took in zip(began, began[1:], (0.1, 3), strict=False)]
    assert rests == [0.1, workers.REST_SECONDS_MAX]


def test_a_worker_that_fails_starts_again_when_it_would_have_looked_again() -> None:
    """Not later: a sweeper is there again as soon as its database. A library's own cancellation ends it no more."""
    loop = SimLoop(1)
    began = []

    async def work() -> None:
        began.append(loop.time())
        if len(began) == 3:
            task = asyncio.current_task()
            assert task
            task.cancel()
            await asyncio.sleep(1)
        raise OSError("away") if len(began) == 1 else asyncio.CancelledError

    async def main() -> None:
        await asyncio.wait([asyncio.ensure_future(workers.restarting("work", work, 0.25))])

    run(loop, main())
    assert began == [0, 0.25, 0.5]


PLACE = TopicPartition("topic", 0)


class Kafka:
    """A partition of ten messages, as aiokafka gives it to a group that commits nothing."""

    def __init__(self, **_options: object) -> None:
        self.listener: Any = None
        self._at = 0
        self._owned: set[TopicPartition] = set()

    def subscribe(self, _topics: Sequence[str], *, listener: object) -> None:
        self.listener = listener

    async def start(self) -> None:
        if self.listener:
            await self.assign()

    async def assign(self) -> None:
        """A rebalance gives the partition back: it is read from its first message on, until it is sought."""
        await self.listener.on_partitions_revoked(self._owned)
        self._owned, self._at = {PLACE}, 0
        await self.listener.on_partitions_assigned(self._owned)

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Message]]:
        if self._at > 10:  # a place that there is not
            self._at = 0
        offsets = range(self._at, min(self._at + max_records, 10))
        self._at = offsets.stop
        await asyncio.sleep(0 if offsets else timeout_ms / 1000)
        found: list[Message] = [ConsumerRecord(*PLACE, n, 0, 0, b"", b"", None, 0, 0, ()) for n in offsets]
        return {PLACE: found} if found else {}

    def assignment(self) -> set[TopicPartition]:
        return self._owned

    def seek(self, _partition: TopicPartition, offset: int) -> None:
        self._at = offset

    def highwater(self, _partition: TopicPartition) -> int:
        return 10

    async def stop(self) -> None:
        """There is nothing to stop."""


class Kept:
    """A handler that keeps where the partition has got to, as the projection does."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.handled: list[tuple[int, int]] = []  # first and after last, of each batch

    async def positions(self, places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return dict.fromkeys(places, self.at)

    async def handle(self, batch: Batch, _bury: Bury) -> None:
        if batch.start != self.at:
            raise Elsewhere
        self.handled.append((batch.messages[0].offset, batch.end))
        self.at = batch.end

    def consume(self, kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
        """All there is, in batches of four."""
        monkeypatch.setattr(consumer, "AIOKafkaConsumer", lambda **_: kafka)
        monkeypatch.setattr(consumer, "producer", lambda *_: Kafka())

        async def main() -> None:
            brokers, positions = Brokers("unused"), self.positions
            one = Consumer(brokers, ["topic"], "group", "dlq", self.handle, batch_messages_max=4, positions=positions)
            running = asyncio.ensure_future(one.run())
            await asyncio.wait([running], timeout=60)
            assert not running.done()

        run(SimLoop(1), main())


def test_a_partition_that_comes_back_during_a_batch_does_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sought to where the batch began, before that is kept: what is read again there is left."""
    kafka = Kafka()

    class Moved(Kept):
        moved = False

        async def handle(self, batch: Batch, bury: Bury) -> None:
            if not self.moved:
                self.moved = True
                await kafka.assign()
                raise Busy("the database is away")
            await super().handle(batch, bury)

    kept = Moved(0)
    kept.consume(kafka, monkeypatch)
    assert kept.handled == [(0, 4), (4, 8), (8, 10)]


def test_a_topic_that_was_made_anew_is_read_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before the place that is kept: what it has is handled, and kept is where that has got to."""
    kept = Kept(20)
    kept.consume(Kafka(), monkeypatch)
    assert kept.handled == [(0, 4), (4, 8), (8, 10)]
