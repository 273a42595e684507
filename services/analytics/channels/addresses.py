"""Which addresses messages may go to: a subscriber must not reach what only this machine and its network can reach."""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from services.analytics.channels.threads import Threads, TooManyHangError

LOOKUPS_MAX = 500
_LOOKUPS = Threads(LOOKUPS_MAX, "lookup")


class PrivateAddressError(Exception):
    """A name or an address that is not a public one."""


def public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where it is wrapped into another one."""
    return _public(ip_address(address.partition("%")[0]))


def _public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner and not _public(inner):
            return False
    site_local = isinstance(address, IPv6Address) and address.is_site_local
    return address.is_global and not (address.is_multicast or address.is_reserved or site_local)


def literal(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class Resolver(AbstractResolver):
    """Resolves names for aiohttp, unless `private` only to public addresses: what is checked is what is connected to.

    The event loop's own resolver has few threads: name servers that do not answer would keep all of the pod from
    resolving.
    """

    def __init__(self, *, private: bool) -> None:
        self._private = private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = [
            ResolveResult(
                hostname=host, host=address[0], port=port, family=kind, proto=proto, flags=socket.AI_NUMERICHOST
            )
            for kind, _, proto, _, address in await _lookup(host, port, family)
            if self._private or public(str(address[0]))
        ]
        if not found:
            raise PrivateAddressError
        return found

    async def close(self) -> None:
        """Nothing stays open."""


async def check_public(host: str) -> None:
    """Raises PrivateAddressError where a host is, or resolves to, an address that is not public."""
    addresses = [host] if literal(host) else [address[0] for *_, address in await _lookup(host, 0, socket.AF_UNSPEC)]
    if not all(public(str(address)) for address in addresses):
        raise PrivateAddressError


async def _lookup(host: str, port: int, family: socket.AddressFamily) -> list[Any]:
    try:
        return await _LOOKUPS.run(lambda: socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))
    except TooManyHangError:
        raise OSError("too many names are being resolved") from None
