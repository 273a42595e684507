"""Which hashes are told of a reservation, and that they resolve."""

from collections.abc import AsyncIterator, Callable
from datetime import timedelta

import asyncpg
import pytest
from holdfast.reservation.v1 import events_pb2, reservation_pb2

from deploy.local.supervisor import Supervisor
from services.reservation import codec, store
from services.reservation.commands import Commands
from services.reservation.domain import Action, Ask, Line, Mode
from services.reservation.inventory import Inventory
from services.reservation.subjects import Identity, Kind, Subjects
from shared.channel import open_channel
from shared.client import Holdfast
from shared.database import Database
from shared.refusal import Refusal
from tests.e2e.shop import goods, new

OLD, NEW = {"k1": bytes(16)}, {"k2": bytes(range(16))}
HOUR = timedelta(hours=1)


@pytest.fixture
async def under(pods: Supervisor, reservation_db: Database) -> AsyncIterator[Callable[[dict[str, bytes]], Commands]]:
    """Commands of a pod that has these keys."""
    channel = open_channel(pods.targets["inventory"])
    yield lambda keys: Commands(reservation_db, Inventory(channel), Subjects(keys))
    await channel.close(None)


def ask(sku: str, customer: str, units: int = 1) -> Ask:
    return Ask(new(), customer, (Line(sku, "", units),), Mode.ALL, HOUR, b"", None, "", "tab", "2001:db8::1")


async def told(database: Database, name: str) -> list[events_pb2.ReservationChanged]:
    """The events of a reservation."""
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT unnest(keys) AS key, unnest(payloads) AS payload FROM outbox ORDER BY id")
    return [events_pb2.ReservationChanged.FromString(row["payload"]) for row in rows if row["key"] == name]


async def confirm(commands: Commands, sku: str, name: str) -> None:
    """Sell one unit."""
    line = reservation_pb2.LineQuantity(sku=sku, quantity=1)
    request = reservation_pb2.ConfirmRequest(reservation_id=name, request_id=new(), lines=[line])
    (outcome,) = await commands.change([codec.change(request, Action.CONFIRM)])
    assert not isinstance(outcome, Refusal)


async def test_a_reservation_has_the_same_hashes_in_all_its_events(
    under: Callable[[dict[str, bytes]], Commands], reservation_db: Database, holdfast: Holdfast
) -> None:
    """Through a rotation, on pods with the new key and without it, until its key is gone."""
    sku = await goods(holdfast, 9)
    asked = ask(sku, new("customer"), 3)
    await under(OLD).reserve([asked])
    await confirm(under(NEW | OLD), sku, asked.reservation_id)
    await confirm(under(OLD), sku, asked.reservation_id)
    await confirm(under(NEW), sku, asked.reservation_id)
    events = await told(reservation_db, asked.reservation_id)
    assert [event.subjects.customer.split(":")[1] for event in events] == ["k1", "k1", "k1", "k2"]
    assert len({event.subjects.SerializeToString() for event in events}) == 2
    assert all(event.subjects.device and event.subjects.network for event in events)
    assert not any(
        event.reservation.customer_id or event.reservation.device_id or event.reservation.ip_address for event in events
    )


async def test_hashes_are_kept_with_the_first_reservation_and_not_again(
    under: Callable[[dict[str, bytes]], Commands],
    reservation_db: Database,
    holdfast: Holdfast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not remembered when the statement failed; then written, and never a second time by the same pod."""
    sku, customer, commands = await goods(holdfast, 9), new("customer"), under(NEW | OLD)
    written: list[int] = []
    insert = store.insert

    async def watched(connection: object, decided: object, subjects: dict[str, Identity], *more: object) -> None:
        written.append(len(subjects))
        if len(written) == 1:
            raise asyncpg.DeadlockDetectedError
        await insert(connection, decided, subjects, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "insert", watched)
    for _ in range(3):
        await commands.reserve([ask(sku, customer)])
    await under(NEW).reserve([ask(sku, customer)])
    assert written == [3, 3, 0, 0, 3]
    (hashed, *_) = Subjects(NEW).hashes(Identity(Kind.CUSTOMER, customer))
    async with reservation_db.connection() as connection:
        assert await store.read_subjects(connection, [hashed, "unknown"]) == {hashed: Identity(Kind.CUSTOMER, customer)}
