"""Page tokens: the position after the last row, bound to the filters of the list it came from."""

import base64
import binascii
import hashlib
import json
from datetime import datetime

from shared.refusal import Refusal

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000


def size(asked: int) -> int:
    """Rows on a page; more than there may be is cut to PAGE_SIZE_MAX (AIP-158)."""
    if asked < 0:
        raise Refusal("FIELD_INVALID", "page_size must not be negative", field="page_size")
    return min(asked or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def _digest(filters: object) -> str:
    return hashlib.blake2b(repr(filters).encode(), digest_size=6).hexdigest()


def encode(position: list[str], filters: object) -> str:
    return base64.urlsafe_b64encode(json.dumps([_digest(filters), *position]).encode()).decode()


def decode(token: str, filters: object, fields: int) -> list[str] | None:
    """The position in a token, None for the first page. Raises Refusal PAGE_TOKEN_INVALID."""
    if not token:
        return None
    try:
        digest, *position = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, binascii.Error, TypeError):
        digest, position = "", []
    well = len(position) == fields and all(isinstance(part, str) and "\0" not in part for part in position)
    if digest != _digest(filters) or not well:
        raise Refusal("PAGE_TOKEN_INVALID", "the page token is not of this list")
    return [str(part) for part in position]


def instant(text: str) -> datetime:
    """A time out of a position. Raises Refusal PAGE_TOKEN_INVALID."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise Refusal("PAGE_TOKEN_INVALID", "the page token is not of this list")
    return time
