"""Between Python's values and protobuf's, for every service."""

import hashlib
from datetime import datetime

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp


def fingerprint(message: Message) -> bytes:
    """16 bytes that tell whether two requests have the same type and content."""
    content = hashlib.blake2b(message.DESCRIPTOR.full_name.encode(), digest_size=16)
    content.update(message.SerializeToString(deterministic=True))
    return content.digest()


def timestamp(time: datetime) -> Timestamp:
    value = Timestamp()
    value.FromDatetime(time)
    return value
