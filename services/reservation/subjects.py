"""Who a reservation is for, as keyed hashes: all that leaves this service of a customer, a device or an address.

* A hash is HMAC-SHA-256 of kind and value, cut to 128 bits, under a key that only this service has: nobody else can
  tell who stands behind it, nor try out who might. It is the same for the same value, kind and key, so that others
  can count by it; one value as a customer and as a device has two.
* Of an address only its network is hashed: a /24 of IPv4, a /48 of IPv6. An IPv4 address written as IPv6 is IPv4.
* Keys rotate: the first one makes hashes, all resolve. A reservation keeps the id of the key that it was made under,
  so that its events carry the same hashes for as long as that key is configured, and those of the first key then.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

ADDRESS_CHARACTERS_MAX = 45
KEY_ID = re.compile(r"[a-z0-9]{1,8}")
KEY_BYTES_MIN = 16
HASH_BYTES = 16
CACHED_MAX = 50_000


class Kind(StrEnum):
    """What kind of personal data it is."""

    CUSTOMER = "CUSTOMER"
    DEVICE = "DEVICE"
    NETWORK = "NETWORK"


class Identity(NamedTuple):
    """Personal data in clear; of an address its network."""

    kind: Kind
    value: str


class Named(NamedTuple):
    """An identity and its hash under each key, the first key's first."""

    identity: Identity
    hashes: tuple[str, ...]


@lru_cache(CACHED_MAX)
def network(value: str) -> str:
    """The network of an address, as 203.0.113.0/24; of a network that is written so, itself. Raises ValueError."""
    text, _, bits = value.partition("/")
    if len(text) > ADDRESS_CHARACTERS_MAX or "%" in text:
        raise ValueError("not an address")
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    cut = "24" if address.version == 4 else "48"
    if bits and bits != cut:
        raise ValueError("not such a network")
    host_bits = address.max_prefixlen - int(cut)
    return f"{type(address)(int(address) >> host_bits << host_bits)}/{cut}"


def identities(customer_id: str, device_id: str, ip_address: str) -> list[Identity]:
    """What a caller said of whom it is for; what it did not say is left out."""
    said = []
    if customer_id:
        said.append(Identity(Kind.CUSTOMER, customer_id))
    if device_id:
        said.append(Identity(Kind.DEVICE, device_id))
    if ip_address:
        said.append(Identity(Kind.NETWORK, network(ip_address)))
    return said


def parse_keys(text: str) -> dict[str, bytes]:
    """Keys by id, from "k2=BASE64,k1=BASE64". Raises ValueError, whose message shows nothing of a key."""
    keys: dict[str, bytes] = {}
    for number, part in enumerate(text.split(","), 1):
        name, found, secret = part.strip().partition("=")
        if not found or not KEY_ID.fullmatch(name):
            raise ValueError(f"key {number} must be ID=BASE64, with an id of 1 to 8 characters of a-z 0-9")
        if name in keys:
            raise ValueError(f"key {number} has the id of another")
        try:
            keys[name] = base64.b64decode(secret, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"key {number} is not base64") from None
        if len(keys[name]) < KEY_BYTES_MIN:
            raise ValueError(f"key {number} must have at least {KEY_BYTES_MIN} bytes")
    return keys


class Subjects:
    """Hashes under `keys`, the first of which makes them. Caches CACHED_MAX of each kind of answer."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._numbers = {key_id: number for number, key_id in enumerate(keys)}
        self._hashers = {kind: [(f"{kind.lower()}:{key_id}:", key) for key_id, key in keys.items()] for kind in Kind}
        self.key_id = next(iter(keys))
        self.named = lru_cache(CACHED_MAX)(self._named)

    def of(self, customer_id: str, device_id: str, ip_address: str, key_id: str) -> Mapping[Kind, str]:
        """The hashes of what was said, under the key `key_id` or, if it is gone, the first."""
        number = self._numbers.get(key_id, 0)
        named = self.named(customer_id, device_id, ip_address)
        return {kind: one.hashes[number] for kind, one in named.items()}

    def hashes(self, identity: Identity) -> tuple[str, ...]:
        """The hash under each key, the first key's first."""
        kind, value = identity
        said = kind.encode() + b"\0" + value.encode()
        return tuple(
            [start + hmac.digest(key, said, "sha256")[:HASH_BYTES].hex() for start, key in self._hashers[kind]]
        )

    def _named(self, customer_id: str, device_id: str, ip_address: str) -> Mapping[Kind, Named]:
        """What was said, with its hashes under every key."""
        return {one.kind: Named(one, self.hashes(one)) for one in identities(customer_id, device_id, ip_address)}


class Lately:
    """The last `names_max` names that were added, so that what was just done is not done again."""

    def __init__(self, names_max: int) -> None:
        self._names_max = names_max
        self._names: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            self._names[name] = None
        while len(self._names) > self._names_max:
            del self._names[next(iter(self._names))]
