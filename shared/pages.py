"""Page tokens: the position after the last row, bound to the filters of the list it came from."""

import base64
import binascii
import hashlib
import json
from datetime import datetime

from shared.check import YEARS
from shared.refusal import Refusal

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000
DIGITS_MAX = 9
TOKEN_CHARACTERS_MAX = 4096


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
    if len(token) > TOKEN_CHARACTERS_MAX:
        raise _invalid()
    try:
        digest, *position = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, binascii.Error, TypeError, RecursionError):
        digest, position = "", []
    well = len(position) == fields and all(isinstance(part, str) and _is_text(part) for part in position)
    if digest != _digest(filters) or not well:
        raise _invalid()
    return [str(part) for part in position]


def instant(text: str) -> datetime:
    """A part of a position that is a time, as isoformat() writes it. Raises Refusal PAGE_TOKEN_INVALID."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise _invalid() from None
    if found.tzinfo is None or found.year not in YEARS:
        raise _invalid()
    return found


def number(text: str) -> int:
    """A part of a position that is a number. Raises Refusal PAGE_TOKEN_INVALID."""
    if not text.isascii() or not text.isdigit() or len(text) > DIGITS_MAX:
        raise _invalid()
    return int(text)


def _is_text(part: str) -> bool:
    """Whether PostgreSQL takes it: no zero, and no half of a surrogate pair, which JSON can spell."""
    try:
        return b"\0" not in part.encode()
    except UnicodeEncodeError:
        return False


def _invalid() -> Refusal:
    return Refusal("PAGE_TOKEN_INVALID", "the page token is not of this list")
