"""Micro-batching: order, bounds, and what becomes of those who leave or come too late."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.protobuf.message import Message
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp
from pydantic import SecretStr, ValidationError

from services.inventory import requests
from services.inventory import servicer as inventory
from services.inventory.settings import Settings as InventorySettings
from services.reservation import servicer as reservation
from services.reservation.commands import Told
from services.reservation.domain import Ask
from services.reservation.settings import Settings as ReservationSettings
from shared.batching import Batcher
from shared.refusal import Refusal
from shared.settings import Settings


class Work:
    """A handler that can be held up, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        self.running = 0
        self.most = 0

    async def handle(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.running += 1
        self.most = max(self.most, self.running)
        await self.go.wait()
        self.running -= 1
        return [ValueError(item) if item < 0 else item * 10 for item in items]


async def started(work: Work, batches: int = 1) -> None:
    async with asyncio.timeout(5):
        while len(work.batches) < batches:
            await asyncio.sleep(0)


async def test_while_one_batch_is_in_flight_the_next_gathers() -> None:
    """One batch at a time; what came meanwhile is the next, in order of arrival, bounded in items and lines."""
    work = Work()
    batcher = Batcher("test", work.handle, batch_items_max=3, batch_lines_max=4)
    tasks = [asyncio.ensure_future(batcher.submit(0))]
    await started(work)
    tasks += [asyncio.ensure_future(batcher.submit(n, lines=3 if n == 6 else 1)) for n in range(1, 7)]
    await asyncio.sleep(0)
    work.go.set()
    assert list(await asyncio.gather(*tasks)) == [n * 10 for n in range(7)]
    assert work.batches == [[0], [1, 2, 3], [4, 5], [6]]
    assert work.most == 1


async def test_a_full_queue_refuses_at_once() -> None:
    """OVERLOADED by items and by bytes, with the queue's name and limit; what waits is not harmed."""
    work = Work()
    batcher = Batcher("test", work.handle, queue_items_max=2, queue_bytes_max=100)
    first = asyncio.ensure_future(batcher.submit(0))
    await started(work)
    second = asyncio.ensure_future(batcher.submit(1, size_bytes=60))
    await asyncio.sleep(0)
    with pytest.raises(Refusal) as large:
        await batcher.submit(2, size_bytes=60)
    third = asyncio.ensure_future(batcher.submit(3))
    await asyncio.sleep(0)
    with pytest.raises(Refusal) as many:
        await batcher.submit(4)
    assert large.value.reason == many.value.reason == "OVERLOADED"
    assert many.value.metadata == {"queue": "test", "limit": "2"}
    work.go.set()
    assert list(await asyncio.gather(first, second, third)) == [0, 10, 30]


STOCK = ip.StockAdjustment(
    request_id="r", key=ip.StockKey(sku="A", location="MAIN"), reason=ip.ADJUSTMENT_REASON_RECEIVE, quantity=1
)
HOLD = ip.HoldRequest(hold_id="h", lines=[ip.HoldLine(sku="A", quantity=1)])
CHANGE = ip.HoldChange(hold_id="h", request_id="r", lines=[ip.HoldChangeLine(sku="A")])
CALLS = [
    ip.SetStockPolicyRequest(request_id="r", key=STOCK.key),
    ip.AdjustStockRequest(adjustment=STOCK),
    ip.BatchAdjustStockRequest(adjustments=[STOCK]),
    ip.GetAvailabilityRequest(keys=[ip.AvailabilityKey(sku="A", location="MAIN")]),
    ip.PlaceHoldsRequest(holds=[HOLD]),
    ip.CommitHoldsRequest(changes=[CHANGE]),
    ip.ReleaseHoldsRequest(changes=[CHANGE]),
    ip.ExtendHoldsRequest(extensions=[ip.HoldExtension(hold_id="h", request_id="r", skus=["A"])]),
    rp.ReserveRequest(reservation_id="x", lines=[rp.ReservationLine(sku="A", quantity=1)]),
    rp.ConfirmRequest(reservation_id="x", request_id="r"),
    rp.CancelRequest(reservation_id="x", request_id="r"),
    rp.ExtendRequest(reservation_id="x", request_id="r"),
]


@pytest.mark.parametrize("request_", CALLS, ids=lambda call: call.DESCRIPTOR.name)
async def test_a_call_that_waits_counts_by_its_bytes(request_: Message) -> None:
    """Behind one that is decided there is room for one, and not for two."""
    began, go = asyncio.Event(), asyncio.Event()

    async def handle(items: Sequence[object]) -> list[Refusal]:
        began.set()
        await go.wait()
        return [Refusal("DATABASE_UNAVAILABLE", "") for _ in items]

    settings: dict[str, Any] = {
        "database_dsn": "postgresql://nobody@localhost/nothing",
        "queue_bytes_max": request_.ByteSize() * 3 // 2,
    }
    commands: Any = SimpleNamespace(place=handle, change=handle, adjust=handle, reserve=handle)
    nothing: Any = SimpleNamespace(read=handle, local=lambda _ask: None)
    context: Any = SimpleNamespace(time_remaining=lambda: None)
    servicer: object
    if request_.DESCRIPTOR.file.package.startswith("holdfast.inventory"):
        servicer = inventory.Servicer(InventorySettings(**settings), nothing, commands, nothing, nothing)
    else:
        settings |= {"inventory_target": "ipv4:127.0.0.1:1", "subject_keys": "k1=AAAAAAAAAAAAAAAAAAAAAA=="}
        servicer = reservation.Servicer(ReservationSettings(**settings), nothing, commands, nothing)
    call = getattr(servicer, request_.DESCRIPTOR.name.removesuffix("Request"))
    waiting = [asyncio.ensure_future(call(request_, context))]
    await began.wait()
    waiting.append(asyncio.ensure_future(call(request_, context)))
    await asyncio.sleep(0)
    with pytest.raises(Refusal) as refused:
        async with asyncio.timeout(1):
            await call(request_, context)
    assert refused.value.reason == "OVERLOADED"
    go.set()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(
    ("name", "most"), [("batch_items_max", requests.BATCH_ITEMS_MAX), ("batch_lines_max", requests.BATCH_LINES_MAX)]
)
def test_a_batch_of_reservation_fits_into_one_call_of_inventory(name: str, most: int) -> None:
    """A setting with which all of it would be refused is none."""
    dsn = "postgresql://nobody@localhost/nothing"
    Settings.model_validate({"database_dsn": dsn, name: most})
    with pytest.raises(ValidationError):
        Settings.model_validate({"database_dsn": dsn, name: most + 1})


async def test_a_queue_that_full_batches_do_not_empty_refuses_who_would_wait_too_long() -> None:
    """A slow batch is waited for; when a full one leaves something behind, the oldest's wait is the bound."""
    work = Work()
    batcher = Batcher("test", work.handle, batch_items_max=2, queue_seconds_max=0)
    tasks = [asyncio.ensure_future(batcher.submit(0))]
    await started(work)
    tasks += [asyncio.ensure_future(batcher.submit(n)) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    work.go.set()
    await tasks[0]
    work.go.clear()
    await started(work, 2)
    with pytest.raises(Refusal) as late:
        await batcher.submit(4)
    assert late.value.reason == "OVERLOADED"
    assert late.value.metadata == {"queue": "test", "limit": "0"}
    work.go.set()
    assert list(await asyncio.gather(*tasks)) == [0, 10, 20, 30]
    assert await batcher.submit(5) == 50


async def test_who_is_late_or_gone_costs_nothing() -> None:
    """A passed deadline is refused and a cancelled caller dropped, both before the work begins."""
    work = Work()
    batcher = Batcher("test", work.handle)
    first = asyncio.ensure_future(batcher.submit(0))
    await started(work)
    late = asyncio.ensure_future(batcher.submit(1, seconds_left=0))
    gone = asyncio.ensure_future(batcher.submit(2))
    good = asyncio.ensure_future(batcher.submit(3, seconds_left=60))
    await asyncio.sleep(0)
    gone.cancel()
    work.go.set()
    assert list(await asyncio.gather(first, good)) == [0, 30]
    with pytest.raises(Refusal) as refused:
        await late
    assert refused.value.reason == "DEADLINE_PASSED"
    assert work.batches == [[0], [3]]


async def test_one_bad_item_harms_no_other() -> None:
    """An item's exception is its caller's alone; a batch's is everyone's, and the next batch goes on."""
    work = Work()
    work.go.set()
    batcher = Batcher("test", work.handle)
    good, bad = await asyncio.gather(batcher.submit(1), batcher.submit(-1), return_exceptions=True)
    assert good == 10
    assert isinstance(bad, ValueError)
    handle, work_handle = work.handle, OSError("away")

    async def broken(_items: Sequence[int]) -> list[int | Exception]:
        raise work_handle

    batcher.handle = broken
    both = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)
    assert list(both) == [work_handle] * 2
    batcher.handle = handle
    assert await batcher.submit(3) == 30
    await batcher.close()


class Desk(Work):
    """Reservation's commands in so far as its edge calls them; one decides as `Work` does."""

    async def reserve(self, asks: Sequence[Ask]) -> list[Told | Exception]:
        await self.handle([int(ask.reservation_id) for ask in asks])
        return [(rp.Reservation(reservation_id=ask.reservation_id), False) for ask in asks]

    async def change(self, changes: Sequence[object]) -> list[Exception]:
        raise NotImplementedError(changes)


class Patient:
    """A call's context without a deadline."""

    def time_remaining(self) -> float | None:
        return None


def asked(number: int) -> rp.ReserveRequest:
    return rp.ReserveRequest(reservation_id=str(number), lines=[rp.ReservationLine(sku="A", quantity=1)])


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_a_caller_that_has_left_asked_for_is_not_reserved(*, streamed: bool) -> None:
    """Many in one call or over a stream, behind a batch that takes its time."""
    desk, context, nothing = Desk(), cast("Any", Patient()), cast("Any", None)
    settings = ReservationSettings(
        database_dsn="postgresql://nobody@localhost/nothing",
        inventory_target="",
        subject_keys=SecretStr("k1=" + "A" * 24),
    )
    edge = reservation.Servicer(settings, nothing, cast("Any", desk), nothing)

    async def requests() -> AsyncIterator[rp.ReserveStreamRequest]:
        for number in (1, 2):
            yield rp.ReserveStreamRequest(request=asked(number))
        await asyncio.Event().wait()

    async def stream() -> None:
        async for answer in edge.ReserveStream(requests(), context):
            raise AssertionError(answer)

    first = asyncio.ensure_future(edge.Reserve(asked(0), context))
    await started(desk)
    batch = rp.BatchReserveRequest(requests=[asked(1), asked(2)])
    leaving = asyncio.ensure_future(stream() if streamed else edge.BatchReserve(batch, context))
    while len(edge._reserve._queue) < 2:
        await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    desk.go.set()
    await first
    await edge._reserve.close()
    assert desk.batches == [[0]]
