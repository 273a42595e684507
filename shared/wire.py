"""Between Python's values and protobuf's, for every service. Faster than the messages' own methods."""

import hashlib
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def fingerprint(message: Message) -> bytes:
    """16 bytes that tell whether two requests have the same type and content."""
    content = hashlib.blake2b(message.DESCRIPTOR.full_name.encode(), digest_size=16)
    content.update(message.SerializeToString(deterministic=True))
    return content.digest()


def timestamp(time: datetime) -> Timestamp:
    since = time - EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def moment(value: Timestamp) -> datetime:
    """A timestamp that one of our services made; what callers send is checked by `shared.check.time`."""
    return EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)


def duration(value: timedelta) -> Duration:
    return Duration(seconds=value.days * 86_400 + value.seconds, nanos=value.microseconds * 1000)
