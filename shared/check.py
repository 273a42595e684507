"""Checks of what callers send. Each raises Refusal FIELD_INVALID that names the field."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from shared.refusal import Refusal

CODE = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
# Control characters, and what breaks a line or turns around what is written after it. The spaces and joiners that
# scripts are written with are none, though str.isprintable() takes them for such.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
CURRENCY = re.compile(r"[A-Z]{3}")
QUANTITY_MAX = 10**12
MICROS_MAX = 10**15
BUSINESS_YEARS = range(2000, 2100)
YEARS = range(1970, 2200)  # within which times can be added to and taken from
TTL_SECONDS_DEFAULT = 15 * 60
TTL_SECONDS_MAX = 24 * 3600


def invalid(field: str, why: str) -> Refusal:
    return Refusal("FIELD_INVALID", f"{field} {why}", field=field)


def code(value: str, field: str, *, optional: bool = False) -> str:
    """A SKU, location or id."""
    if not (CODE.fullmatch(value) or (optional and not value)):
        raise invalid(field, "must be 1 to 64 characters of A-Z a-z 0-9 . _ : / -")
    return value


def text(value: str, field: str, characters_max: int) -> str:
    """Free text of any script, without CONTROL."""
    if len(value) > characters_max:
        raise invalid(field, f"must have at most {characters_max} characters")
    if CONTROL.search(value):
        raise invalid(field, "must not have control characters")
    return value


def time_zone(value: str, field: str) -> str:
    """An IANA name; UTC where it is empty. PostgreSQL takes others too: its "UTC+2" lies to the west."""
    try:
        ZoneInfo(value or "UTC")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise invalid(field, "must be known") from None
    return value or "UTC"


def name(enum: Any, value: int, field: str, prefix: str, *, optional: bool = False) -> str:
    """The name of a value of a protobuf enum without its prefix; empty for 0, which only optional ones may be."""
    if value not in enum.values() or not (value or optional):
        raise invalid(field, "must be a known value")
    return str(enum.Name(value)).removeprefix(prefix) if value else ""


def quantity(value: int, field: str, *, least: int = 1, most: int = QUANTITY_MAX) -> int:
    if not least <= value <= most:
        raise invalid(field, f"must be from {least} to {most}")
    return value


def count(items: int, field: str, limit: int, *, least: int = 1) -> None:
    """The number of items in a call."""
    if items > limit:
        raise Refusal("TOO_MANY_ITEMS", f"{field} has more than {limit} items", field=field, limit=limit)
    if items < least:
        raise invalid(field, "must not be empty")


def money(currency_code: str, micros: int, field: str) -> tuple[str, int]:
    """A price; no currency and no micros at all means none."""
    if not currency_code and not micros:
        return "", 0
    if not CURRENCY.fullmatch(currency_code):
        raise invalid(f"{field}.currency_code", "must be three upper-case letters")
    return currency_code, quantity(micros, f"{field}.micros", least=0, most=MICROS_MAX)


def ttl(value: Duration, field: str) -> timedelta:
    """A time to live; zero means the default of 15 minutes."""
    if not value.seconds and not value.nanos:
        return timedelta(seconds=TTL_SECONDS_DEFAULT)
    return duration(value, field, least_seconds=1, most_seconds=TTL_SECONDS_MAX)


def duration(value: Duration, field: str, *, least_seconds: int, most_seconds: int) -> timedelta:
    if not 0 <= value.nanos < 10**9 or not least_seconds <= value.seconds + value.nanos / 1e9 <= most_seconds:
        raise invalid(field, f"must be from {least_seconds} to {most_seconds} seconds")
    return timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)


def business_time(message: Message, name: str, field: str) -> datetime | None:
    """When something happened, as a caller says it in the field `name`; None where it does not say."""
    if not message.HasField(name):
        return None
    asked = time(getattr(message, name), field)
    if asked.year not in BUSINESS_YEARS:
        raise invalid(field, f"must be from {BUSINESS_YEARS[0]} to {BUSINESS_YEARS[-1]}")
    return asked


def time(value: Timestamp, field: str) -> datetime:
    """A point in time from the year 1 to the year 9999."""
    try:
        return value.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise invalid(field, "is no time") from None
