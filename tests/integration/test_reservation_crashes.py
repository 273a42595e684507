"""A reservation pod that dies between any two steps: nothing is lost, nothing is done twice."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from holdfast.reservation.v1.reservation_pb2 import RESERVATION_STATE_HELD

from deploy.local.supervisor import Supervisor
from services.reservation.commands import Commands, Outcome, Told
from services.reservation.domain import Action, Ask, Change, ChangeLine, Line, Mode, Reservation, State
from services.reservation.inventory import Inventory
from services.reservation.subjects import Subjects
from shared.channel import open_channel
from shared.client import Holdfast
from shared.database import Database
from shared.refusal import Refusal
from tests.e2e.shop import goods, new, stock


class Crash(Exception):
    """Where the pod dies."""


@pytest.fixture
async def reservations(pods: Supervisor, reservation_db: Database) -> AsyncIterator[Commands]:
    """Commands on a database of the test's, over the real inventory."""
    channel = open_channel(pods.targets["inventory"])
    yield Commands(reservation_db, Inventory(channel), Subjects({"k1": bytes(16)}))
    await channel.close(None)


def ask(sku: str, units: int, name: str = "", location: str = "", ttl_seconds: float = 900) -> Ask:
    line = Line(sku, location, units)
    content = repr(line).encode()
    return Ask(name or new(), "", (line,), Mode.ALL, timedelta(seconds=ttl_seconds), content)


def change(name: str, action: Action, *lines: ChangeLine, request_id: str = "r") -> Change:
    return Change(name, request_id, action, lines, timedelta(), repr((action, lines)).encode())


def value(outcome: Outcome | Refusal) -> Reservation:
    assert not isinstance(outcome, Refusal), outcome
    return outcome[0]


def held(outcome: Told | Refusal) -> str:
    """The id of a reservation that is held."""
    assert not isinstance(outcome, Refusal), outcome
    assert outcome[0].state == RESERVATION_STATE_HELD
    return outcome[0].reservation_id


async def test_dead_between_hold_and_row(
    reservations: Commands, holdfast: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retry finds the hold: one hold, one row."""
    sku = await goods(holdfast, 5)
    asked = ask(sku, 3)

    async def dies(_decided: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(reservations, "_insert", dies)
        with pytest.raises(Crash):
            await reservations.reserve([asked])
    (outcome,) = await reservations.reserve([asked])
    assert held(outcome) == asked.reservation_id
    assert (await stock(holdfast, sku, min_version=2)).held == 3


async def test_dead_between_inventory_and_booking(
    reservations: Commands, holdfast: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What inventory sold is booked by the driver or by the retry, once."""
    sku = await goods(holdfast, 10)
    (made,) = await reservations.reserve([ask(sku, 6)])
    name = held(made)
    part = change(name, Action.CONFIRM, ChangeLine(sku, "", 2), request_id="first")
    other = change(name, Action.CANCEL, ChangeLine(sku, "", 1), request_id="second")

    async def dies(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(reservations, "_book", dies)
        for lost in (part, other):
            with pytest.raises(Crash):
                await reservations.change([lost])
    assert await reservations.drive_on(age_seconds=0) == 2
    assert await reservations.drive_on(age_seconds=0) == 0
    first, second = await reservations.change([part, other])
    assert not isinstance(first, Refusal)
    assert first[1], "known already"
    allocation = value(second).allocations[0]
    assert (allocation.held, allocation.confirmed, allocation.cancelled) == (3, 2, 1)
    seen = await stock(holdfast, sku, min_version=4)
    assert (seen.on_hand, seen.held) == (8, 3)


async def test_an_unbooked_sale_is_not_taken_for_expired(
    reservations: Commands, holdfast: Holdfast, monkeypatch: pytest.MonkeyPatch, reservation_db: Database
) -> None:
    """The sweeper books what inventory says has expired; the sale waits for its own booking."""
    sku = await goods(holdfast, 10)
    (made,) = await reservations.reserve([ask(sku, 6, ttl_seconds=1)])
    name = held(made)
    part = change(name, Action.CONFIRM, ChangeLine(sku, "", 2))

    async def dies(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(reservations, "_book", dies)
        with pytest.raises(Crash):
            await reservations.change([part])
    async with reservation_db.connection() as connection:
        await connection.fetch("SELECT pg_sleep(1.1)")
    while not await reservations.expire():
        pass
    await reservations.drive_on(age_seconds=0)
    (outcome,) = await reservations.change([part])
    allocation = value(outcome).allocations[0]
    assert (allocation.held, allocation.confirmed, allocation.expired) == (0, 2, 4)
    assert value(outcome).state is State.CONFIRMED


async def test_a_refused_change_stays_refused(reservations: Commands, holdfast: Holdfast) -> None:
    """What was refused once is refused again by the same id, with the same words."""
    sku = await goods(holdfast, 10)
    (made,) = await reservations.reserve([ask(sku, 2)])
    name = held(made)
    (first,) = await reservations.change([change(name, Action.CONFIRM, ChangeLine(sku, "", 3))])
    (again,) = await reservations.change([change(name, Action.CONFIRM, ChangeLine(sku, "", 3))])
    (other,) = await reservations.change([change(name, Action.CONFIRM, ChangeLine(sku, "", 1))])
    assert isinstance(first, Refusal)
    assert first == again
    assert first.reason == "QUANTITY_EXCEEDED"
    assert isinstance(other, Refusal)
    assert other.reason == "REQUEST_ID_REUSED"


async def test_other_content_under_an_id_gives_back_what_it_held(reservations: Commands, holdfast: Holdfast) -> None:
    """Two requests with one id and nothing in common: the first stands, the second's stock is free again."""
    first, second = await goods(holdfast, 5), await goods(holdfast, 5)
    asked = ask(first, 1)
    (first_held,) = await reservations.reserve([asked])
    (refused,) = await reservations.reserve([ask(second, 1, name=asked.reservation_id)])
    assert held(first_held) == asked.reservation_id
    assert isinstance(refused, Refusal)
    assert refused.reason == "REQUEST_ID_REUSED"
    assert (await stock(holdfast, second, min_version=3)).held == 0
