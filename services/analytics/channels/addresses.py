"""Which addresses messages may go to: a subscriber must not reach what only this machine and its network can reach."""

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver


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
    return address.is_global and not address.is_multicast and not address.is_reserved


def literal(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class PublicResolver(AbstractResolver):
    """Resolves names for aiohttp, and only to public addresses: what is checked is what is connected to."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = [one for one in await self._inner.resolve(host, port, family) if public(one["host"])]
        if not found:
            raise PrivateAddressError
        return found

    async def close(self) -> None:
        await self._inner.close()


async def check_public(host: str) -> None:
    """Raises PrivateAddressError where a host is, or resolves to, an address that is not public."""
    if not literal(host):
        infos: list[Any] = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = [info[4][0] for info in infos]
    else:
        addresses = [host]
    if not all(public(address) for address in addresses):
        raise PrivateAddressError
