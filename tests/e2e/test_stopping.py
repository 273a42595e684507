"""A pod that is told to stop takes no caller by surprise."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psutil
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.inventory.v1 import inventory_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2 as rp
from holdfast.reservation.v1 import reservation_pb2_grpc

from deploy.local.stack import Stack
from deploy.local.supervisor import STOP_SECONDS_MAX, Supervisor
from shared.client import Holdfast
from shared.errors import refusal_of
from tests.e2e.shop import goods, new, stock

HELD = rp.RESERVE_OUTCOME_HELD
CALLERS = 32


async def test_stopping_a_pod_under_load_fails_no_call(holdfast: Holdfast, pods: Supervisor) -> None:
    """Each pod in turn gets SIGTERM and starts again while calls go on: every call is answered."""
    sku = await goods(holdfast, 1_000_000)
    stop = asyncio.Event()
    made = 0

    async def shopper() -> None:
        nonlocal made
        while not stop.is_set():
            name = new()
            assert (await holdfast.reserve(name, [(sku, "MAIN", 1)])).outcome == HELD
            await holdfast.confirm(name, "c")
            made += 1

    shoppers = [asyncio.ensure_future(shopper()) for _ in range(CALLERS)]
    try:
        for name in ("reservation-0", "inventory-0", "reservation-1", "inventory-1"):
            await asyncio.to_thread(pods.restart, pods.pod(name))
    finally:
        stop.set()
        await asyncio.gather(*shoppers)
    assert made > 50
    seen = await stock(holdfast, sku, min_version=2 * made + 1)
    assert (seen.on_hand, seen.held) == (1_000_000 - made, 0)


async def ending(stream: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ends that is read to its end: its status, and the reason in it."""
    try:
        while await stream.read():
            pass
    except grpc.aio.AioRpcError as error:
        refusal = refusal_of(error)
        return error.code(), refusal.reason if refusal else ""
    return grpc.StatusCode.OK, ""


async def test_streams_are_told_to_go_on_elsewhere(holdfast: Holdfast, pods: Supervisor) -> None:
    """An open watch and an open ReserveStream end with UNAVAILABLE (STOPPING); what was answered counts."""
    sku = await goods(holdfast, 10)
    inventory, reservation = pods.pod("inventory-0"), pods.pod("reservation-0")
    asked = rp.ReserveRequest(reservation_id=new(), lines=[rp.ReservationLine(sku=sku, quantity=1)])
    stopped = asyncio.Event()

    async def one() -> AsyncIterator[rp.ReserveStreamRequest]:
        yield rp.ReserveStreamRequest(request=asked)
        await stopped.wait()

    async with (
        grpc.aio.insecure_channel(inventory.address) as to_inventory,
        grpc.aio.insecure_channel(reservation.address) as to_reservation,
    ):
        key = ip.WatchKey(sku=sku, location="MAIN")
        watch: Any = inventory_pb2_grpc.InventoryServiceStub(to_inventory).WatchStock(ip.WatchStockRequest(keys=[key]))
        stream: Any = reservation_pb2_grpc.ReservationServiceStub(to_reservation).ReserveStream(one())
        assert (await watch.read()).snapshot.on_hand == 10
        assert (await stream.read()).result.response.outcome == HELD
        ends = asyncio.gather(ending(watch), ending(stream))
        await asyncio.gather(*(asyncio.to_thread(pods.restart, pod) for pod in (inventory, reservation)))
        assert set(await ends) == {(grpc.StatusCode.UNAVAILABLE, "STOPPING")}
        stopped.set()
    assert (await holdfast.reservation.Reserve(asked)).replayed


async def test_a_pod_stops_while_no_server_answers(pods: Supervisor, stack: Stack, following: None) -> None:  # noqa: ARG001
    """Whatever its workers were about to do there: it does not wait to be killed."""
    stopped = pods.pod("inventory-0"), pods.pod("inventory-1"), pods.pod("analytics-0")
    frozen: list[psutil.Process] = []
    try:
        for server, seconds in (("Kafka", 1.0), ("PostgreSQL", 0.0), ("Redis", 0.5)):
            for process in _family(stack.pids.get(server)):
                process.suspend()
                frozen.append(process)
            await asyncio.sleep(seconds)  # relays have told the time to a Kafka that hears nothing, and ask for more
        told = [pod.process for pod in stopped if pod.process]
        for each in told:
            each.terminate()
        codes = [await asyncio.to_thread(each.wait, STOP_SECONDS_MAX) for each in told]
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        for pod in stopped:
            await asyncio.to_thread(pods.restart, pod)
    assert codes == [0, 0, 0]


def _family(pid: int | None) -> list[psutil.Process]:
    """A server's processes; none of one that is not of this stack, as PostgreSQL where there is a cluster."""
    if pid is None:
        return []
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]
