"""Events applied twice, in any batches, come to what they come to once; and a batch counts once."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from aiokafka import ConsumerRecord, TopicPartition
from holdfast.analytics.v1 import analytics_pb2 as ap
from holdfast.inventory.v1 import events_pb2 as inventory_events
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import events_pb2 as reservation_events
from holdfast.reservation.v1 import reservation_pb2 as rp

from services.analytics import codec, store
from services.analytics.projection import Projection
from services.analytics.servicer import Servicer
from services.analytics.settings import Settings
from services.analytics.turns import Turns
from shared import metrics
from shared.consumer import Batch, Busy, Elsewhere, Message, Poison
from shared.database import Database
from shared.refusal import Refusal
from shared.wire import timestamp
from tests.integration.ledger import movements

CONTENT = (
    "stock_view", "activity", "movement", "stock_out", "goods_return", "reservation", "reservation_state", "sale",
    "gap",
)  # fmt: skip


def message(topic: str, offset: int, value: bytes) -> Message:
    return ConsumerRecord(topic, 0, offset, 0, 0, b"key", value, None, 3, len(value), ())


def moved(seed: int) -> list[bytes]:
    now = datetime.now(UTC)
    ledger = movements(random.Random(seed), ["A", "B", "C"], [now - timedelta(minutes=n) for n in range(120)])
    return [
        inventory_events.StockMoved(
            movement=ip.Movement(
                sku=m.sku, location=m.location, version=m.version,
                kind=ip.MovementKind.Value(f"MOVEMENT_KIND_{m.kind}"),
                on_hand_delta=m.on_hand_delta, held_delta=m.held_delta, on_hand=m.on_hand, held=m.held,
                hold_id=m.hold_id, time=timestamp(m.recorded_at),
            )
        ).SerializeToString()
        for m in ledger
    ]  # fmt: skip


def changed(seed: int) -> list[bytes]:
    """Reservations of six units that are confirmed by and by, some to the end."""
    dice, now = random.Random(seed), timestamp(datetime.now(UTC))
    events = []
    for n in range(20):
        for version, confirmed in enumerate(sorted(dice.sample(range(7), dice.randint(1, 4))), 1):
            state = rp.RESERVATION_STATE_HELD if confirmed < 6 else rp.RESERVATION_STATE_CONFIRMED
            reservation = rp.Reservation(
                reservation_id=f"r{n}", version=version, state=state, create_time=now, update_time=now,
                lines=[rp.ReservationLine(sku="A", quantity=6, unit_price=rp.Money(currency_code="GBP", micros=5))],
                allocations=[rp.Allocation(sku="A", location="MAIN", held=6 - confirmed, confirmed=confirmed)],
            )  # fmt: skip
            events.append(reservation_events.ReservationChanged(reservation=reservation).SerializeToString())
    return events


async def bury(_message: Message, poison: Poison) -> None:
    raise poison


async def applied(database: Database, topic: str, values: Sequence[bytes], dice: random.Random) -> None:
    """Apply events in batches of any size; some batches come a second time, as after a crash of another pod."""
    projection = Projection(database)
    place = TopicPartition(topic, 0)
    at = (await projection.positions([place]))[place]
    messages = [message(topic, offset, value) for offset, value in enumerate(values, at)]
    while messages:
        size = dice.randint(1, 40)
        batch, messages = Batch(place, at, messages[:size]), messages[size:]
        await projection.apply(batch, bury)
        at = batch.end
        if dice.random() < 0.3:
            with pytest.raises(Elsewhere):
                await projection.apply(batch, bury)


async def content(database: Database) -> dict[str, list[object]]:
    async with database.connection() as connection:
        return {
            table: [dict(row) for row in await connection.fetch(f"SELECT * FROM {table} AS t ORDER BY t::text")]
            for table in CONTENT
        }


@pytest.mark.parametrize("seed", range(4))
async def test_every_event_twice_is_every_event_once(analytics_db: Database, seed: int) -> None:
    """Right behind each other, or all of them again: the content is the same, and no key stops."""
    dice = random.Random(seed)
    told = {codec.MOVEMENTS_TOPIC: moved(seed), codec.CHANGES_TOPIC: changed(seed)}
    for topic, values in told.items():
        await applied(analytics_db, topic, values, dice)
    once = await content(analytics_db)
    assert all(once[table] for table in CONTENT if table != "gap")
    assert not once["gap"]
    sold = sum(row["units"] for row in once["sale"] if isinstance(row, dict))
    assert sold == sum(row["sold"][0] for row in once["reservation"] if isinstance(row, dict))

    for topic, values in told.items():
        await applied(analytics_db, topic, values, dice)
    assert await content(analytics_db) == once
    async with analytics_db.connection() as connection:
        await connection.execute(f"TRUNCATE {', '.join(CONTENT)}, consumed")
    for topic, values in told.items():
        await applied(analytics_db, topic, [value for value in values for _ in range(2)], dice)
    assert await content(analytics_db) == once


async def test_what_the_database_cannot_keep_is_buried_alone(analytics_db: Database) -> None:
    """A text that PostgreSQL refuses, or a value beyond 64 bits, is poison; its neighbours are applied."""
    now = timestamp(datetime.now(UTC))
    line = rp.ReservationLine(sku="A", quantity=10, unit_price=rp.Money(currency_code="GBP", micros=10**18))
    sold = rp.Allocation(sku="A", location="MAIN", confirmed=10)
    good: dict[str, Any] = {
        "version": 1,
        "state": rp.RESERVATION_STATE_CONFIRMED,
        "create_time": now,
        "update_time": now,
    }
    told = [
        rp.Reservation(reservation_id="good", **good),
        rp.Reservation(reservation_id="nul", country="a\0b", **good),
        rp.Reservation(reservation_id="dear", lines=[line], allocations=[sold], **good),
        rp.Reservation(reservation_id="last", **good),
    ]
    values = [reservation_events.ReservationChanged(reservation=one).SerializeToString() for one in told]
    place = TopicPartition(codec.CHANGES_TOPIC, 0)
    projection = Projection(analytics_db)
    await projection.positions([place])
    buried: list[tuple[int, str]] = []

    async def keep(message: Message, poison: Poison) -> None:
        buried.append((message.offset, poison.reason))

    messages = [message(codec.CHANGES_TOPIC, offset, value) for offset, value in enumerate(values)]
    await projection.apply(Batch(place, 0, messages), keep)
    assert [offset for offset, _ in buried] == [1, 2]
    assert (await projection.positions([place]))[place] == 4
    kept = await content(analytics_db)
    assert [row["reservation_id"] for row in kept["reservation"] if isinstance(row, dict)] == ["good", "last"]


async def test_months_are_made_again_where_the_tables_were_replaced(analytics_db: Database) -> None:
    """A rebuild's tables need not have the months that were made in those before; its offsets are asked for first."""
    place = TopicPartition(codec.CHANGES_TOPIC, 0)
    projection = Projection(analytics_db)
    old = timestamp(datetime(2019, 3, 5, tzinfo=UTC))
    for version in (1, 2):
        one = rp.Reservation(
            reservation_id="old", version=version, state=rp.RESERVATION_STATE_HELD, create_time=old, order_time=old,
            update_time=old,
        )  # fmt: skip
        value = reservation_events.ReservationChanged(reservation=one).SerializeToString()
        at = (await projection.positions([place]))[place]
        await projection.apply(Batch(place, at, [message(codec.CHANGES_TOPIC, at, value)]), bury)
        async with analytics_db.connection() as connection:
            assert await connection.fetchval("SELECT version FROM reservation") == version
            await connection.execute("TRUNCATE reservation")
            for table in ("reservation", "reservation_state", "sale"):
                await connection.execute(f"DROP TABLE {table}_2019_03")


async def test_a_month_that_cannot_be_made_is_waited_for(analytics_db: Database) -> None:
    """Busy while somebody else has the table; the same batch is applied afterwards."""
    place = TopicPartition(codec.CHANGES_TOPIC, 0)
    old = timestamp(datetime(2018, 3, 5, tzinfo=UTC))
    one = rp.Reservation(
        reservation_id="old", version=1, state=rp.RESERVATION_STATE_HELD, create_time=old, order_time=old,
        update_time=old,
    )  # fmt: skip
    value = reservation_events.ReservationChanged(reservation=one).SerializeToString()
    projection = Projection(analytics_db, lock_seconds_max=0.1)
    batch = Batch(place, 0, [message(codec.CHANGES_TOPIC, 0, value)])
    await projection.positions([place])
    async with analytics_db.connection() as reader, reader.transaction():
        await reader.fetch("SELECT FROM reservation")
        with pytest.raises(Busy):
            await projection.apply(batch, bury)
    await projection.apply(batch, bury)
    assert (await projection.positions([place]))[place] == 1
    async with analytics_db.connection() as connection:
        for table in ("reservation", "reservation_state", "sale"):
            await connection.execute(f"DROP TABLE {table}_2018_03")


async def test_units_are_counted_once_they_are_kept(analytics_db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that is started again counts its movements once, one that comes to nothing counts none."""
    counters = [metrics.UNITS_MOVED.labels(kind) for kind in ("RECEIVE", "RETURN", "HOLD", "COMMIT", "RELEASE")]
    count, faults = store.count_lag, [asyncpg.DeadlockDetectedError(), ValueError()]

    async def failing(*arguments: Any) -> None:
        if faults:
            raise faults.pop()
        await count(*arguments)

    monkeypatch.setattr(store, "count_lag", failing)
    place = TopicPartition(codec.MOVEMENTS_TOPIC, 0)
    projection = Projection(analytics_db)
    at = (await projection.positions([place]))[place]
    values = moved(8)
    batch = Batch(place, at, [message(codec.MOVEMENTS_TOPIC, offset, value) for offset, value in enumerate(values, at)])
    before = sum(counter._value.get() for counter in counters)
    with pytest.raises(ValueError):  # noqa: PT011 - the test's own
        await projection.apply(batch, bury)
    assert sum(counter._value.get() for counter in counters) == before
    await projection.apply(batch, bury)
    told = [inventory_events.StockMoved.FromString(value).movement for value in values]
    units = sum(max(abs(m.on_hand_delta), abs(m.held_delta)) for m in told)
    assert sum(counter._value.get() for counter in counters) == before + units


async def test_a_key_that_is_named_twice_is_waited_for_at_its_highest_version(analytics_db: Database) -> None:
    """In whichever order."""
    settings = Settings(database_dsn="postgresql://unused", wait_seconds_max=0.01)
    servicer = Servicer(settings, analytics_db, Turns(1, 1))
    context: Any = SimpleNamespace(time_remaining=lambda: None)
    for versions in ((1, 9), (9, 1)):
        seen = [ap.SeenVersion(sku="A", location="MAIN", version=version) for version in versions]
        with pytest.raises(Refusal) as refused:
            await servicer.ListStockView(ap.ListStockViewRequest(min_versions=seen), context)
        assert refused.value.metadata["version"] == "9"
