"""`python -m shared.topics [--replicas N]`: create the topics of Kafka that do not exist yet; `--partitions N`: grow.

What a topic keeps is part of what the services promise: analytics is rebuilt from movements and changes, so these
are kept for ever; verdicts are read from their beginning by every pod, so only the last of each key is kept.

Growing keeps the order of a key only if nothing is sent meanwhile and all that was sent has been read (docs/scale.md).
A topic grows by a whole multiple: then a key stays where it is or moves into a new partition, never between old ones.
"""

import argparse
import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from shared.kafka import Brokers
from shared.settings import KafkaSettings, load

LEADER_SECONDS_MAX = 60
QUIET_SECONDS = 2.0  # relays that run tell the time to their topics twice a second


class Topic(NamedTuple):
    """A Kafka topic, kept for a week as is Kafka's default, for `days`, or for ever: whole, or compacted.

    One that is compacted keeps the last value of each key; for `days`, if these are given.
    """

    name: str
    partitions: int = 4
    compacted: bool = False
    forever: bool = False
    days: int = 0

    @property
    def configuration(self) -> dict[str, str]:
        """What the broker is told. What is compacted and dropped is so within the hour: readers begin at its start."""
        if self.compacted and self.days:
            hour = {"segment.ms": "3600000", "min.cleanable.dirty.ratio": "0.1"}
            return {"cleanup.policy": "compact,delete", "retention.ms": str(self.days * 86_400_000)} | hour
        if self.compacted:
            return {"cleanup.policy": "compact"}
        kept = -1 if self.forever else self.days * 86_400_000
        return {"cleanup.policy": "delete"} | ({"retention.ms": str(kept)} if kept else {})


TOPICS = (
    Topic("holdfast.inventory.movements.v1", forever=True),
    Topic("holdfast.inventory.catalog.v1", compacted=True),
    Topic("holdfast.reservation.changes.v1", forever=True),
    Topic("holdfast.inventory.commands.v1"),
    Topic("holdfast.inventory.commands.v1.dlq"),
    Topic("holdfast.analytics.dlq"),
    Topic("holdfast.analytics.verdicts.v1", partitions=1, compacted=True, days=8),
    Topic("holdfast.reservation.dlq"),
)


async def create(brokers: Brokers, topics: Iterable[Topic] = TOPICS, *, replicas: int = 1) -> None:
    """Create the topics that do not exist yet, and wait until each can be written; the others stay as they are.

    Raises KafkaError for a topic that Kafka does not create, TimeoutError when one has no leader in time.
    """
    topics = list(topics)
    admin = AIOKafkaAdminClient(**brokers.options)
    await admin.start()
    try:
        answer = await admin.create_topics(
            [
                NewTopic(
                    name=topic.name,
                    num_partitions=topic.partitions,
                    replication_factor=replicas,
                    topic_configs=topic.configuration,
                )
                for topic in topics
            ]
        )
        for name, code, *detail in answer.topic_errors:
            if code and for_code(code) is not TopicAlreadyExistsError:
                raise KafkaError(f"Kafka did not create the topic {name}: {detail}")
        async with asyncio.timeout(LEADER_SECONDS_MAX):
            while not all(
                topic["partitions"] and all(part["leader"] >= 0 for part in topic["partitions"])
                for topic in await admin.describe_topics([topic.name for topic in topics])
            ):
                await asyncio.sleep(0.05)
    finally:
        await admin.close()


async def grow(brokers: Brokers, partitions: int, topics: Iterable[Topic] = TOPICS) -> list[str]:
    """Give each topic of several partitions so many; the names of those that have grown.

    Raises ValueError, and changes nothing, where a topic has more or no whole fraction of that, or is being written.
    """
    names = [topic.name for topic in topics if topic.partitions > 1]
    admin, reader = AIOKafkaAdminClient(**brokers.options), AIOKafkaConsumer(**brokers.options)
    await admin.start()
    await reader.start()
    try:
        known = {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics(names)}
        for name, count in known.items():
            if not count:
                raise ValueError(f"{name} does not exist")
            if partitions % count:
                raise ValueError(f"{name} has {count} partitions, of which {partitions} is no multiple")
        places = [TopicPartition(name, number) for name, count in known.items() for number in range(count)]
        before = await reader.end_offsets(places)
        await asyncio.sleep(QUIET_SECONDS)
        after = await reader.end_offsets(places)
        if written := sorted({place.topic for place in places if before[place] != after[place]}):
            raise ValueError(f"{', '.join(written)}: still being written; stop whoever sends to it first")
        growing = [name for name, count in known.items() if count < partitions]
        if growing:
            await admin.create_partitions({name: NewPartitions(partitions) for name in growing})
        return growing
    finally:
        await reader.stop()
        await admin.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shared.topics", description="Create the topics that are missing.")
    parser.add_argument("--replicas", type=int, default=1, help="brokers that keep each topic (default 1)")
    parser.add_argument("--partitions", type=int, help="give the topics that there are so many (docs/scale.md first)")
    arguments = parser.parse_args()
    brokers = load(KafkaSettings).brokers
    if arguments.partitions is None:
        asyncio.run(create(brokers, replicas=arguments.replicas))
        return
    try:
        grown = asyncio.run(grow(brokers, arguments.partitions))
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(f"{name}: {arguments.partitions} partitions" for name in grown) or "nothing to grow")  # noqa: T201


if __name__ == "__main__":
    main()
