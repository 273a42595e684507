"""In which order a rebuild reads partitions of different age."""

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndTimestamp

from services.analytics.rebuild import Ages

OLD, YOUNG, OTHER = TopicPartition("movements", 0), TopicPartition("movements", 4), TopicPartition("changes", 0)


def ages() -> Ages:
    made = Ages()
    made.begin(
        {OLD: OffsetAndTimestamp(0, 100), YOUNG: OffsetAndTimestamp(0, 500), OTHER: OffsetAndTimestamp(0, 50)}
        | {TopicPartition("movements", 5): None}
    )
    return made


def test_a_younger_partition_waits_for_the_others_of_its_topic() -> None:
    """Until these have been read up to its first event."""
    one = ages()
    assert one.waiting() == {YOUNG}
    one.read(OTHER, 900)
    one.read(OLD, 499)
    assert one.waiting() == {YOUNG}
    one.read(OLD, 500)
    assert one.waiting() == set()


def test_what_has_ended_holds_nobody_up() -> None:
    """Though its last event was before the younger one's first."""
    one = ages()
    one.read(OLD, 200)
    one.end([OLD])
    assert one.waiting() == set()
