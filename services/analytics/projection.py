"""From events to rows: batches of one partition, each in one transaction with its offset.

The package's docstring says why nothing is lost or doubled.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

import asyncpg
import structlog
from aiokafka import TopicPartition

from services.analytics import cases, codec, domain, store
from services.analytics.alerts import Crossings
from services.analytics.domain import KnownReservation, Movement, Reservation
from services.analytics.store import Place
from shared import metrics, partitions, watermark
from shared.consumer import Batch, Bury, Busy, Elsewhere, Message, Poison
from shared.database import Connection, Database
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
Item = TypeVar("Item")
NEVER = datetime.min.replace(tzinfo=UTC)  # before any watermark


class Projection:
    """Applies events to a database. With `crossings` it is the live one, and the desk is told as well.

    `lock_seconds_max` is how long it waits for a table that needs another month.
    """

    def __init__(
        self,
        database: Database,
        crossings: Crossings | None = None,
        *,
        lock_seconds_max: float = partitions.LOCK_SECONDS_MAX,
    ) -> None:
        self._database = database
        self._crossings = crossings
        self._lock_seconds_max = lock_seconds_max
        self._made: set[tuple[str, datetime]] = set()

    async def positions(self, places: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """The next offset of each partition."""
        self._made.clear()  # a rebuild may have replaced the tables, with months that are its own
        async with self._database.connection() as connection:
            return await store.positions(connection, places)

    async def apply(self, batch: Batch, bury: Bury) -> None:
        """Apply a batch of one partition.

        Raises Busy while the database is away or a table that needs another month is in use, Elsewhere when the
        partition is not where the batch begins.
        """
        await one_by_one(batch, bury, self._apply, self._pass)

    async def _apply(self, batch: Batch, bury: Bury) -> None:
        topic = batch.partition.topic
        place = place_of(batch)
        try:
            match topic:
                case codec.MOVEMENTS_TOPIC:
                    await self._movements(place, await parse(batch.messages, codec.movement, bury))
                case codec.CATALOG_TOPIC:
                    await self._skus(place, await parse(batch.messages, codec.sku, bury))
                case _:
                    await self._reservations(place, await parse(batch.messages, codec.reservation, bury))
        except Refusal as refusal:
            raise Busy(refusal.message) from refusal
        except partitions.IN_USE as error:
            raise Busy("a table that needs another month is in use") from error

    async def _run(
        self,
        place: Place,
        work: Callable[[Connection], Awaitable[Item]],
        recorded: Iterable[datetime] = (),
    ) -> Item:
        """Pass a batch and do its work, in one transaction; `recorded` are the times of its events."""

        async def advanced(connection: Connection) -> Item:
            if not await store.advance(connection, place):
                raise Elsewhere
            done = await work(connection)
            await store.count_lag(connection, place, recorded)
            return done

        return await self._database.run(advanced)

    async def _pass(self, place: Place) -> None:
        await self._run(place, _nothing)

    async def _movements(self, place: Place, movements: Sequence[Movement]) -> None:
        await self._make_partitions(
            {("movement", partitions.month(m.recorded_at)) for m in movements}
            | {("goods_return", partitions.month(m.occurred_at)) for m in movements if m.kind == "RETURN"}
        )
        written = await self._run(
            place,
            lambda connection: write_movements(connection, place.partition, movements, self._crossings),
            [movement.recorded_at for movement in movements],
        )
        count_units(written)

    async def _skus(self, place: Place, rows: Sequence[tuple[str, str, str, str, str, int, bool, int]]) -> None:
        await self._run(place, (lambda connection: store.write_skus(connection, rows)) if rows else _nothing)

    async def _reservations(self, place: Place, reservations: Sequence[Reservation]) -> None:
        months = {partitions.month(one.order_time) for one in reservations}
        await self._make_partitions(
            {(table, month) for table in ("reservation", "reservation_state", "sale") for month in months}
            | {("refusal", partitions.month(one.created_at)) for one in reservations if one.short_lines}
        )
        await self._run(
            place,
            lambda connection: _write_reservations(connection, reservations),
            [one.updated_at for one in reservations],
        )

    async def _make_partitions(self, wanted: set[tuple[str, datetime]]) -> None:
        for table, month in sorted(wanted - self._made):
            async with self._database.connection() as connection:
                await partitions.make(connection, table, month, lock_seconds_max=self._lock_seconds_max)
            self._made.add((table, month))


async def write_movements(
    connection: Connection, partition: int, movements: Sequence[Movement], crossings: Crossings | None = None
) -> list[Movement]:
    """Write the movements that are their keys' next, in the transaction that has locked the partition; return them."""
    if not movements:
        return []
    known = await store.known_keys(connection, ((m.sku, m.location) for m in movements))
    applied = domain.apply_movements(movements, known)
    for (sku, location), version in applied.gaps.items():
        log.warning("key stops at a gap", sku=sku, location=location, missing_version=version)
    await store.write_movements(connection, partition, applied, known)
    if crossings:
        await crossings.judge(connection, applied, known)
        returned = [
            (m.reference, m.sku, m.location, m.version, m.occurred_at, m.on_hand_delta)
            for m, _ in applied.rows
            if m.kind == "RETURN" and m.reference
        ]
        if returned:
            await cases.queue_returned(connection, returned)
    return [m for m, _ in applied.rows]


def count_units(movements: Iterable[Movement]) -> None:
    """Tell of movements, once the transaction that wrote them is committed."""
    for m in movements:
        metrics.UNITS_MOVED.labels(m.kind).inc(max(abs(m.on_hand_delta), abs(m.held_delta)))


async def _nothing(_connection: Connection) -> None:
    """The work of a batch that has none."""


async def _write_reservations(connection: Connection, reservations: Sequence[Reservation]) -> None:
    if not reservations:
        return
    known = await store.known_reservations(connection, reservations)
    new: list[Reservation] = []
    sales = []
    for one in reservations:
        before = known.get(one.reservation_id) or KnownReservation()
        if one.version <= before.version:
            continue
        sold = domain.sales(one, before)
        first = one.updated_at if sold and not before.confirmed_at else before.confirmed_at
        parts = {(part.sku, part.location): part.confirmed for part in one.parts}
        known[one.reservation_id] = replace(before, version=one.version, confirmed_at=first, sold=parts)
        new.append(one)
        sales += sold
    if new:
        await store.write_reservations(connection, new, known, sales)


def place_of(batch: Batch) -> Place:
    """Where a batch stands, and the latest time that its watermarks tell."""
    told = [time for message in batch.messages if (time := watermark.of(message))]
    return Place(batch.partition.topic, batch.partition.partition, batch.start, batch.end, max(told, default=NEVER))


async def leave(message: Message, poison: Poison) -> None:
    """For who reads what the live projection has read, or will: that one buries it."""
    log.debug("poison", topic=message.topic, offset=message.offset, reason=poison.reason)


async def one_by_one(
    batch: Batch,
    bury: Bury,
    apply: Callable[[Batch, Bury], Awaitable[None]],
    skip: Callable[[Place], Awaitable[None]],
) -> None:
    """Apply a batch; where the database cannot keep something in it, each of its messages alone, to find which."""
    try:
        await apply(batch, bury)
    except (asyncpg.DataError, OverflowError) as error:
        start = batch.start
        if len(batch.messages) == 1:
            await bury(batch.messages[0], Poison(f"not to be kept: {type(error).__name__}"))
            await skip(place_of(batch))
            return
        for message in batch.messages:
            one = Batch(batch.partition, start, [message])
            await one_by_one(one, bury, apply, skip)
            start = one.end


async def parse(messages: Sequence[Message], parse: Callable[[Message], Item], bury: Bury) -> list[Item]:
    """What the messages say, without watermarks; those that will never do are buried first."""
    items: list[Item] = []
    for message in messages:
        if watermark.of(message):
            continue
        try:
            items.append(parse(message))
        except Poison as poison:
            await bury(message, poison)
    return items
