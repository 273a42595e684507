"""Bearer tokens: JWTs of one issuer for one audience, verified by the keys of a file.

Signed with RS256, ES256 or EdDSA, and with nothing else: a token that claims to be unsigned, or that is signed with
a public key as if it were a shared secret (HS256), is not valid. The file is a JSON Web Key Set; when it is
replaced, tokens of keys that are gone are valid no longer.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jwt

from shared.files import Watched

ALGORITHMS = ("RS256", "ES256", "EdDSA")
REQUIRED = ("exp", "iss", "aud", "sub")
LEEWAY_SECONDS = 10
TOKENS_MAX = 10_000
CHARACTERS_MAX = 8 << 10
Keys = Mapping[str, jwt.PyJWK]


class Token(NamedTuple):
    """What a valid token says."""

    subject: str
    roles: tuple[str, ...]
    expires_at: float


class InvalidTokenError(Exception):
    """A token that is not valid, or is so no longer."""


def watch(file: str) -> Watched[Keys]:
    """The keys of a file by their ids, read again when it changes. Raises OSError or ValueError."""
    return Watched(f"keys in {file}", [Path(file)], _parse)


class Tokens:
    """Verifies each token once, and remembers it until it expires: at most TOKENS_MAX, and no token itself."""

    def __init__(self, issuer: str, audience: str, keys: Watched[Keys], now: Callable[[], float] = time.time) -> None:
        self._issuer = issuer
        self._audience = audience
        self._keys = keys
        self._now = now
        self._in_force = keys.current()
        self._known: dict[bytes, Token] = {}

    def verify(self, token: str) -> Token:
        """What it says. Raises InvalidTokenError."""
        if len(token) > CHARACTERS_MAX:
            raise InvalidTokenError
        keys = self._keys.current()
        if keys is not self._in_force:
            self._in_force = keys
            self._known.clear()
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        known = self._known.get(digest)
        if known is None:
            known = self._read(token, keys)
            if len(self._known) >= TOKENS_MAX:
                del self._known[next(iter(self._known))]
            self._known[digest] = known
        if known.expires_at + LEEWAY_SECONDS <= self._now():
            del self._known[digest]
            raise InvalidTokenError
        return known

    def _read(self, token: str, keys: Keys) -> Token:
        try:
            key_id = jwt.get_unverified_header(token).get("kid", "")
            key = keys[key_id] if key_id or len(keys) != 1 else next(iter(keys.values()))
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                issuer=self._issuer,
                audience=self._audience,
                leeway=LEEWAY_SECONDS,
                options={"require": list(REQUIRED)},
            )
            roles = (*_names(claims.get("roles")), *_names(claims.get("scope")))
            return Token(str(claims["sub"]), roles, float(claims["exp"]))
        except (jwt.PyJWTError, KeyError, TypeError, ValueError, OverflowError):
            raise InvalidTokenError from None


def _names(claim: Any) -> tuple[str, ...]:
    """A claim that is a list of names, or names with spaces between them."""
    if isinstance(claim, str):
        return tuple(claim.split())
    return tuple(name for name in claim if isinstance(name, str)) if isinstance(claim, list) else ()


def _parse(contents: Sequence[bytes]) -> Keys:
    """The keys that can verify; a set may hold others, for encryption or of algorithms that will not do."""
    try:
        found = [key for one in json.loads(contents[0])["keys"] if (key := _key(one))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("must be a JSON Web Key Set") from None
    keys = {key.key_id or "": key for key in found}
    if not keys or len(keys) != len(found):
        raise ValueError(f"must have keys for {', '.join(ALGORITHMS)}, each with an id (kid) of its own")
    return keys


def _key(content: dict[str, Any]) -> jwt.PyJWK | None:
    if content.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK(content)
    except jwt.PyJWTError:
        return None
    return key if key.algorithm_name in ALGORITHMS else None
