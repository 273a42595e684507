"""`python -m shared.topics [--replicas N]`: create the topics of Kafka that do not exist yet.

What a topic keeps is part of what the services promise: analytics is rebuilt from movements and changes, so these
are kept for ever; verdicts are read from their beginning by every pod, so only the last of each key is kept.
"""

import argparse
import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from shared.kafka import Brokers
from shared.settings import KafkaSettings, load

LEADER_SECONDS_MAX = 60


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shared.topics", description="Create the topics that are missing.")
    parser.add_argument("--replicas", type=int, default=1, help="brokers that keep each topic (default 1)")
    arguments = parser.parse_args()
    asyncio.run(create(load(KafkaSettings).brokers, replicas=arguments.replicas))


if __name__ == "__main__":
    main()
