"""Calls are spread by the clients over the addresses that a name has, as a headless Service's name has those of its
ready pods; here a name server of the test says what they are, and the pods listen on addresses of the loopback net.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc
import pytest
from dnslib import QTYPE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSLogger, DNSServer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import REPOSITORY, free_port
from deploy.local.supervisor import SERVICES, Supervisor
from shared.channel import RESOLVE_SECONDS_MIN
from shared.client import Holdfast
from tests.e2e.shop import goods, new, stock

AGE_SECONDS = 2
FOUND_SECONDS_MAX = 1.1 * AGE_SECONDS + RESOLVE_SECONDS_MIN + 2  # as documented, and two to connect on a busy machine
CALLERS = 8
CHI_SQUARE_MAX = {1: 10.8, 2: 13.8}  # by degrees of freedom: one run in a thousand is above
SPREADS_MAX = 3


class Names(BaseResolver):  # type: ignore[misc] # it has no types
    """A name server for as many names as there are services."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}

    def resolve(self, request: DNSRecord, _handler: object) -> DNSRecord:
        reply = request.reply()
        if request.q.qtype == QTYPE.A:
            for address in self.addresses.get(str(request.q.qname).rstrip("."), []):
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=0))
        return reply


@contextmanager
def serving(names: Names) -> Iterator[str]:
    server = DNSServer(names, address="127.0.0.1", port=0, logger=DNSLogger("-request,-reply"))
    server.start_thread()
    try:
        yield f"127.0.0.1:{server.server.server_address[1]}"
    finally:
        server.stop()
        server.server.server_close()


class Fleet:
    """Pods of services that come and go, each on an address of its own; their names have those that are ready."""

    def __init__(self, pods: Supervisor, names: Names, name_server: str) -> None:
        self._pods = pods
        self._names = names
        self._ports = {service.name: free_port() for service in SERVICES}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._free = iter(range(10, 250))
        self.targets = {name: f"dns://{name_server}/{name}.test:{port}" for name, port in self._ports.items()}

    async def start(self, name: str) -> str:
        """A new pod of a service, in its name once it serves; what it is called."""
        address = f"127.0.0.{next(self._free)}"
        pod = f"{name}-{address}"
        self._spawn(name, address, pod)
        async with grpc.aio.insecure_channel(f"{address}:{self._ports[name]}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            check = health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            assert (await check).status == health_pb2.HealthCheckResponse.SERVING
        self._names.addresses.setdefault(f"{name}.test", []).append(address)
        return pod

    def _spawn(self, name: str, address: str, pod: str) -> None:
        service = next(service for service in SERVICES if service.name == name)
        self._running[pod] = subprocess.Popen(
            [sys.executable, "-m", service.module, "--role", "api"],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            env=os.environ
            | self._pods.environment(service)
            | {
                "HOLDFAST_LISTEN": f"{address}:{self._ports[name]}",
                "HOLDFAST_POD": pod,
                "HOLDFAST_CONNECTION_AGE_SECONDS_MAX": str(AGE_SECONDS),
                "HOLDFAST_INVENTORY_TARGET": self.targets["inventory"],
            },
        )

    async def stop(self, pod: str) -> None:
        """Take it out of its name and tell it to stop, as a cluster does, both at once."""
        name, address = pod.split("-")
        self._names.addresses[f"{name}.test"].remove(address)
        process = self._running.pop(pod)
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


@pytest.fixture
async def fleet(pods: Supervisor, following: None) -> AsyncIterator[Fleet]:  # noqa: ARG001 - it is waited for
    names = Names()
    with serving(names) as name_server:
        made = Fleet(pods, names, name_server)
        try:
            yield made
        finally:
            made.close()


@asynccontextmanager
async def calling(call: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Calls all the time, from several callers; one that fails fails the test."""
    stop = asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            await call()

    callers = [asyncio.ensure_future(caller()) for _ in range(CALLERS)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*callers)


async def until(true: Callable[[], bool], seconds_max: float) -> float:
    """Wait until it is true; how long that took."""
    began = time.monotonic()
    async with asyncio.timeout(seconds_max):
        while not true():
            await asyncio.sleep(0.01)
    return time.monotonic() - began


def chi_square(counts: Counter[str]) -> float:
    """How far counts are from even."""
    expected = counts.total() / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts.values())


async def test_calls_are_spread_evenly_and_follow_the_name(fleet: Fleet) -> None:
    """Over two pods, over a third that comes, and over the two that stay: evenly, and without a failed call."""
    first, second = await asyncio.gather(*(fleet.start("inventory") for _ in range(2)))
    async with Holdfast(fleet.targets["inventory"], "ipv4:127.0.0.1:1") as holdfast:

        async def spread(*expected: str) -> None:
            """All are called, and evenly in one of SPREADS_MAX tries: one is uneven by chance now and then."""
            for _ in range(SPREADS_MAX):
                holdfast.pods.clear()
                for _ in range(100):
                    await asyncio.gather(*(ask() for _ in range(9)))
                assert set(holdfast.pods) == set(expected)
                if chi_square(holdfast.pods) < CHI_SQUARE_MAX[len(expected) - 1]:
                    return
            pytest.fail(f"uneven each time, in the end {holdfast.pods}")

        async def ask() -> None:
            await holdfast.availability([("none", "MAIN")])

        async with calling(ask):
            await until(lambda: {first, second} <= set(holdfast.pods), FOUND_SECONDS_MAX)
        await spread(first, second)
        async with calling(ask):
            third = await fleet.start("inventory")
            took = await until(lambda: holdfast.pods[third] > 0, FOUND_SECONDS_MAX)
            print(f"a new pod was called after {took:.1f} s")
        await spread(first, second, third)
        async with calling(ask):
            await fleet.stop(second)
            holdfast.pods.clear()
            await until(lambda: min(holdfast.pods[first], holdfast.pods[third]) > 100, FOUND_SECONDS_MAX)
        await spread(first, third)


@pytest.mark.timeout(400)
async def test_a_rolling_restart_of_all_pods_fails_no_call(fleet: Fleet) -> None:
    """Every pod of inventory and of reservation gives way to a new one with a new address, under load."""
    names = ["inventory", "inventory", "reservation", "reservation"]
    old = await asyncio.gather(*(fleet.start(name) for name in names))
    async with Holdfast(fleet.targets["inventory"], fleet.targets["reservation"]) as holdfast:
        sku = await goods(holdfast, 1_000_000)
        made = 0

        async def shop() -> None:
            nonlocal made
            name = new()
            assert (await holdfast.reserve(name, [(sku, "MAIN", 1)])).outcome == rp.RESERVE_OUTCOME_HELD
            await holdfast.confirm(name, "paid")
            await holdfast.availability([(sku, "MAIN")])
            made += 1

        async with calling(shop):
            for name, gone in zip(names, old, strict=True):
                come = await fleet.start(name)
                await fleet.stop(gone)
                await until(lambda: holdfast.pods[come] > 0, 30)  # noqa: B023 - it is waited for here
                before = holdfast.pods[gone]
        assert holdfast.pods[gone] == before
        left = await stock(holdfast, sku, min_version=2 * made + 1)
        assert (left.on_hand, left.held) == (1_000_000 - made, 0)
