"""Reservations through two pods of each service, as a shop sees them."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import grpc
import pytest
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp

from shared.client import Holdfast
from shared.refusal import Refusal
from tests.e2e.shop import goods, new, stock

HELD, REJECTED = rp.RESERVE_OUTCOME_HELD, rp.RESERVE_OUTCOME_REJECTED


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 15) -> None:
    """Wait until `await condition()` is true."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_calls_reach_both_pods_of_each_service(holdfast: Holdfast) -> None:
    """The client spreads calls over every pod, and reservation spreads its own."""
    sku = await goods(holdfast, 1000)

    async def all_connected() -> bool:
        await holdfast.reserve(new(), [(sku, "", 1)])
        await holdfast.availability([(sku, "MAIN")])
        return set(holdfast.pods) == {"inventory-0", "inventory-1", "reservation-0", "reservation-1"}

    await until(all_connected)
    holdfast.pods.clear()
    await asyncio.gather(*(holdfast.reserve(new(), [(sku, "", 1)]) for _ in range(40)))
    await asyncio.gather(*(holdfast.availability([(sku, "MAIN")]) for _ in range(40)))
    assert set(holdfast.pods.values()) == {20}


async def test_the_last_units_are_reserved_once(holdfast: Holdfast) -> None:
    """200 concurrent Reserves over two pods for the last 50 units: exactly 50 are held."""
    sku = await goods(holdfast, 50)
    answers = await asyncio.gather(*(holdfast.reserve(new(), [(sku, "MAIN", 1)]) for _ in range(200)))
    assert sum(answer.outcome == HELD for answer in answers) == 50
    refused = next(answer for answer in answers if answer.outcome == REJECTED)
    (line,) = refused.reservation.short_lines
    assert (line.sku, line.requested, line.available) == (sku, 1, 0)
    assert line.HasField("next_expiry")


async def test_a_reservation_is_confirmed_and_cancelled_in_parts(holdfast: Holdfast) -> None:
    """Parts by line and quantity, more than once; the state follows when nothing is left held."""
    sku, name = await goods(holdfast, 10), new()
    await holdfast.reserve(name, [(sku, "", 6)])
    first = await holdfast.confirm(name, "c1", [(sku, "", 2)])
    assert first.reservation.state == rp.RESERVATION_STATE_HELD
    again = await holdfast.confirm(name, "c1", [(sku, "", 2)])
    assert again.replayed
    assert again.reservation.allocations[0].confirmed == 2
    await holdfast.cancel(name, "x1", [(sku, "MAIN", 1)])
    last = await holdfast.cancel(name, "x2")
    part = last.reservation.allocations[0]
    assert (part.held, part.confirmed, part.cancelled) == (0, 2, 4)
    assert last.reservation.state == rp.RESERVATION_STATE_CONFIRMED
    assert (await stock(holdfast, sku, min_version=5)).on_hand == 8


async def test_every_write_may_be_repeated_at_once_on_any_pod(holdfast: Holdfast) -> None:
    """Reserve, Confirm, Cancel and Extend, each ten times at once: done once, told alike."""
    sku = await goods(holdfast, 100)
    first, second = new(), new()
    for answers in (
        await asyncio.gather(*(holdfast.reserve(first, [(sku, "", 5)]) for _ in range(10))),
        await asyncio.gather(*(holdfast.extend(first, "e", timedelta(hours=1)) for _ in range(10))),
        await asyncio.gather(*(holdfast.confirm(first, "c", [(sku, "", 3)]) for _ in range(10))),
        await asyncio.gather(*(holdfast.cancel(first, "x") for _ in range(10))),
    ):
        assert len({answer.reservation.SerializeToString(deterministic=True) for answer in answers}) == 1
    part = (await holdfast.get(first)).allocations[0]
    assert (part.held, part.confirmed, part.cancelled) == (0, 3, 2)
    await holdfast.reserve(second, [(sku, "", 1)])
    seen = await stock(holdfast, sku, min_version=5)
    assert (seen.on_hand, seen.held) == (97, 1)


async def test_a_stored_refusal_stays_a_refusal(holdfast: Holdfast) -> None:
    """A rejected reservation that is asked for again after a restock is still rejected."""
    sku, name = await goods(holdfast, 1), new()
    first = await holdfast.reserve(name, [(sku, "", 2)])
    await holdfast.adjust(new(), sku, "MAIN", ip.ADJUSTMENT_REASON_RECEIVE, 10)
    again = await holdfast.reserve(name, [(sku, "", 2)])
    assert (first.outcome, again.outcome, again.replayed) == (REJECTED, REJECTED, True)
    assert again.reservation == first.reservation


async def test_an_expired_reservation_says_so_and_frees_its_stock(holdfast: Holdfast) -> None:
    """Expiry is seen in the state, in the stock, and by who comes to confirm too late."""
    sku, name = await goods(holdfast, 3), new()
    await holdfast.reserve(name, [(sku, "", 3)], ttl=timedelta(seconds=1))

    async def expired() -> bool:
        return (await holdfast.get(name)).state == rp.RESERVATION_STATE_EXPIRED

    await until(expired)
    with pytest.raises(Refusal, match="has come") as late:
        await holdfast.confirm(name, "late")
    assert late.value.reason == "RESERVATION_EXPIRED"
    assert (await holdfast.get(name)).allocations[0].expired == 3
    assert (await holdfast.reserve(new(), [(sku, "", 3)])).outcome == HELD


async def test_a_line_of_which_nothing_is_held_says_so(holdfast: Holdfast) -> None:
    """Though others are held: the refusal tells the reservation's state, and leaves it."""
    gone, held, name = await goods(holdfast, 5), await goods(holdfast, 5), new()
    await holdfast.reserve(name, [(gone, "", 2), (held, "", 3)])
    await holdfast.confirm(name, "sold", [(gone, "", 2)])
    for call in (holdfast.confirm(name, "more", [(gone, "", 1)]), holdfast.cancel(name, "back", [(gone, "", 1)])):
        with pytest.raises(Refusal) as refused:
            await call
        assert refused.value.reason == "RESERVATION_NOT_HELD"
        assert refused.value.metadata == {"reservation_id": name, "state": "HELD"}
    assert (await holdfast.cancel(name, "rest")).reservation.state == rp.RESERVATION_STATE_CONFIRMED


async def test_best_effort_and_minimum(holdfast: Holdfast) -> None:
    """BEST_EFFORT holds what there is and says what is missing; MINIMUM holds at least so much."""
    sku = await goods(holdfast, 5)
    least = rp.ReservationLine(sku=sku, quantity=9, minimum_quantity=6)
    refused = await holdfast.reserve(new(), [least], mode=rp.RESERVE_MODE_MINIMUM)
    assert refused.outcome == REJECTED
    least.minimum_quantity = 2
    held = await holdfast.reserve(new(), [(sku, "", 3)])
    some = await holdfast.reserve(new(), [least], mode=rp.RESERVE_MODE_MINIMUM)
    nothing = await holdfast.reserve(new(), [(sku, "", 1)], mode=rp.RESERVE_MODE_BEST_EFFORT)
    assert (held.outcome, some.outcome, nothing.outcome) == (HELD, HELD, REJECTED)
    assert some.reservation.allocations[0].held == 2
    assert some.reservation.short_lines[0].available == 2


async def test_batches_and_streams_answer_item_by_item(holdfast: Holdfast) -> None:
    """Held, rejected and bad requests side by side, by BatchReserve and by ReserveStream."""
    sku = await goods(holdfast, 5)

    def requests() -> list[rp.ReserveRequest]:
        good = rp.ReserveRequest(reservation_id=new(), lines=[rp.ReservationLine(sku=sku, quantity=1)])
        much = rp.ReserveRequest(reservation_id=new(), lines=[rp.ReservationLine(sku=sku, quantity=99)])
        bad = rp.ReserveRequest(reservation_id=new(), lines=[rp.ReservationLine(sku=sku, quantity=-1)])
        nowhere = rp.ReserveRequest(reservation_id=new(), lines=[rp.ReservationLine(sku="nowhere", quantity=1)])
        return [good, much, bad, nowhere]

    def outcome(result: rp.ReserveResult) -> object:
        return result.response.outcome if result.HasField("response") else result.error.code

    expected = [HELD, REJECTED, grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.NOT_FOUND.value[0]]
    batch = await holdfast.reservation.BatchReserve(rp.BatchReserveRequest(requests=requests()))
    assert [outcome(result) for result in batch.results] == expected
    asked = requests()
    stream = holdfast.reservation.ReserveStream(rp.ReserveStreamRequest(request=one) for one in asked)
    answers = {answer.result.reservation_id: outcome(answer.result) async for answer in stream}
    assert [answers[one.reservation_id] for one in asked] == expected


async def test_lists_filter_and_page(holdfast: Holdfast) -> None:
    """By customer and state, the newest first, a page at a time; a token of other filters is refused."""
    sku, customer = await goods(holdfast, 100), new("customer")
    names = [new() for _ in range(5)]
    for name in names:
        await holdfast.reserve(name, [(sku, "", 1)], customer_id=customer)
    await holdfast.cancel(names[0], "x")
    request = rp.ListReservationsRequest(customer_id=customer, state=rp.RESERVATION_STATE_HELD, page_size=3)
    first = await holdfast.reservation.ListReservations(request)
    request.page_token = first.next_page_token
    second = await holdfast.reservation.ListReservations(request)
    listed = [item.reservation_id for page in (first, second) for item in page.reservations]
    assert listed == names[:0:-1]
    assert not second.next_page_token
    request.state = rp.RESERVATION_STATE_CANCELLED
    with pytest.raises(Refusal) as refused:
        await holdfast._call(holdfast.reservation.ListReservations(request))
    assert refused.value.reason == "PAGE_TOKEN_INVALID"
