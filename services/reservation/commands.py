"""Every write of reservation, in batches: reserve, change (confirm, cancel, extend), expire, drive on.

The package's docstring says why the order of the steps is right.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

import structlog
from holdfast.reservation.v1.reservation_pb2 import Reservation as Message

from services.reservation import codec, domain, store
from services.reservation.domain import (
    Action,
    Ask,
    Change,
    Changed,
    Held,
    Reason,
    Reservation,
    State,
    reused,
)
from services.reservation.inventory import Inventory
from shared import outbox
from shared.database import ATTEMPTS_MAX, RETRIED, Connection, Database, unavailable
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
Outcome = tuple[Reservation, bool]  # the reservation, and whether the request was known
Told = tuple[Message, bool]  # the same, as it is sent

EXPIRE_MAX = 500
DRIVE_MAX = 500


class Commands:
    """The writes, on one database, over one inventory."""

    def __init__(self, database: Database, inventory: Inventory) -> None:
        self._database = database
        self._inventory = inventory

    # -- reserve ----------------------------------------------------------------------------------

    async def reserve(self, asks: Sequence[Ask]) -> list[Told | Refusal]:
        """Decide a batch. Raises Refusal INVENTORY_UNAVAILABLE or DATABASE_UNAVAILABLE for all of it."""
        first = {ask.reservation_id: ask for ask in reversed(asks)}
        unique = list({ask.reservation_id: first[ask.reservation_id] for ask in asks}.values())
        answers = await self._inventory.place(unique)
        decided = [(ask, held) for ask, held in zip(unique, answers, strict=True) if not isinstance(held, Refusal)]
        refused = {
            ask.reservation_id: held for ask, held in zip(unique, answers, strict=True) if isinstance(held, Refusal)
        }
        made = await self._insert(decided)
        known: dict[str, Reservation] = {}
        doubtful = [ask.reservation_id for ask in unique if ask.reservation_id not in made]
        if doubtful:
            async with self._database.connection() as connection:
                known = await store.read(connection, doubtful)
        await self._give_back([pair for pair in decided if _unwanted(pair, known)])

        outcomes: list[Told | Refusal] = []
        told: set[str] = set()
        for ask in asks:
            name = ask.reservation_id
            content, message = made.get(name) or (b"", None)
            if message is None and name in known:
                content, message = known[name].fingerprint, codec.reservation(known[name])
            if message is None:
                outcomes.append(refused[name])
            elif content != ask.fingerprint:
                outcomes.append(reused(name))
            else:
                outcomes.append((message, name in known or name in told))
            told.add(name)
        return outcomes

    async def _insert(self, decided: Sequence[tuple[Ask, Held]]) -> dict[str, tuple[bytes, Message]]:
        """Insert reservations that are new, with their events; return each one's fingerprint and message."""
        fresh = {ask.reservation_id: (ask, held, codec.made(ask, held)) for ask, held in decided}
        for _ in range(ATTEMPTS_MAX):
            if not fresh:
                return {}
            rows = [(ask, held, codec.changed_payload(message)) for ask, held, message in fresh.values()]
            async with self._database.connection() as connection:
                try:
                    await store.insert(connection, rows, codec.CHANGES_TOPIC, codec.CHANGED_TYPE)
                except RETRIED:
                    for name in await store.known(connection, fresh):
                        del fresh[name]
                else:
                    return {name: (ask.fingerprint, message) for name, (ask, _, message) in fresh.items()}
        raise unavailable()

    async def _give_back(self, held: Sequence[tuple[Ask, Held]]) -> None:
        if held:
            try:
                await self._inventory.give_back(held)
            except Refusal as refusal:
                log.warning("holds are left to expire", holds=len(held), reason=refusal.reason)

    # -- confirm, cancel, extend ------------------------------------------------------------------

    async def change(self, changes: Sequence[Change]) -> list[Outcome | Refusal]:
        """Carry out a batch of changes: intent, inventory, booking; a repeat gets its first outcome."""
        async with self._database.connection() as connection:
            reservations = await store.read(connection, [change.reservation_id for change in changes])
            known = await store.read_changes(connection, changes)
        answers: list[Outcome | Refusal | None] = []
        wanted: dict[tuple[str, str], Change] = {}
        for change in changes:
            identity = (change.reservation_id, change.request_id)
            first = known[identity].change if identity in known else wanted.get(identity)
            reservation = reservations.get(change.reservation_id)
            if reservation is None:
                answers.append(_unknown(change))
            elif first and first.fingerprint != change.fingerprint:
                answers.append(reused(change.request_id))
            elif identity in known and known[identity].state != "PENDING":
                answers.append(known[identity].refusal or (reservation, True))
            elif not first and (refusal := _barred(reservation)):
                answers.append(refusal)
            else:
                wanted[identity] = change
                answers.append(None)
        booked = await self._carry_out(list(wanted.values()), reservations) if wanted else {}
        return [
            booked[change.reservation_id, change.request_id] if answer is None else answer
            for change, answer in zip(changes, answers, strict=True)
        ]

    async def _carry_out(
        self, changes: Sequence[Change], reservations: dict[str, Reservation]
    ) -> dict[tuple[str, str], Outcome | Refusal]:
        async def intend(connection: Connection) -> dict[tuple[str, str], store.KnownChange]:
            await store.insert_changes(connection, changes)
            return await store.read_changes(connection, changes)

        intents = await self._database.run(intend)
        # Another pod may have written its intent first: its content counts.
        ours = [c for c in changes if intents[c.reservation_id, c.request_id].change.fingerprint == c.fingerprint]
        outcomes: dict[tuple[str, str], Outcome | Refusal] = {
            (c.reservation_id, c.request_id): reused(c.request_id) for c in changes if c not in ours
        }
        answers = await self._inventory.change([(c, reservations[c.reservation_id]) for c in ours])
        done = list(zip(ours, answers, strict=True))
        return outcomes | await self._database.run(lambda connection: self._book(connection, done))

    async def _book(
        self, connection: Connection, done: Sequence[tuple[Change, Changed | Refusal]]
    ) -> dict[tuple[str, str], Outcome | Refusal]:
        """Book what inventory answered. What another pod has booked meanwhile is not booked twice."""
        applied = [(change, answer) for change, answer in done if not isinstance(answer, Refusal)]
        refused = [(change, answer) for change, answer in done if isinstance(answer, Refusal)]
        await store.lock(connection, [change.reservation_id for change, _ in done])
        turned = await store.apply_changes(connection, [change for change, _ in applied])
        parts: dict[tuple[str, str, str], tuple[int, int, int]] = {}
        until: dict[str, datetime] = {}
        for change, answer in applied:
            if (change.reservation_id, change.request_id) not in turned:
                continue
            until[change.reservation_id] = answer.expires_at
            for sku, location, units in answer.allocations:
                key = (change.reservation_id, sku, location)
                confirmed, cancelled, expired = parts.get(key, (0, 0, 0))
                if change.action is Action.CONFIRM:
                    confirmed += units
                else:
                    cancelled += units
                parts[key] = (confirmed, cancelled, expired)
        await store.refuse_changes(connection, refused)
        await store.move(connection, parts)
        await self._settle(connection, until)
        now = await store.read(connection, [change.reservation_id for change, _ in applied])
        by = {change.reservation_id: change.request_id for change, _ in applied}
        await outbox.write(connection, codec.changed((now[name], by[name]) for name in until))
        outcomes: dict[tuple[str, str], Outcome | Refusal] = {
            (change.reservation_id, change.request_id): answer for change, answer in refused
        }
        for change, _ in applied:
            identity = (change.reservation_id, change.request_id)
            outcomes[identity] = (now[change.reservation_id], identity not in turned)
        return outcomes

    async def _settle(self, connection: Connection, until: dict[str, datetime]) -> None:
        allocations = await store.read_allocations(connection, sorted(until))
        states = {name: (domain.settle(allocations[name]), time) for name, time in until.items()}
        await store.settle(connection, states)

    async def drive_on(self, age_seconds: float) -> int:
        """Carry out changes that have been PENDING for a while; return how many."""
        async with self._database.connection() as connection:
            changes = await store.pending_changes(connection, timedelta(seconds=age_seconds), DRIVE_MAX)
            reservations = await store.read(connection, [change.reservation_id for change in changes])
        if changes:
            await self._carry_out(changes, reservations)
        return len(changes)

    # -- expiry -----------------------------------------------------------------------------------

    async def expire(self) -> int:
        """Book what has expired; return how many reservations ended. Two at once do no harm."""
        async with self._database.connection() as connection:
            due = await store.due(connection, EXPIRE_MAX)
            reservations = list((await store.read(connection, due)).values())
        if not reservations:
            return 0
        answers = await self._inventory.expire(reservations)
        expired = {
            reservation.reservation_id: answer
            for reservation, answer in zip(reservations, answers, strict=True)
            if not isinstance(answer, Refusal)
        }
        return await self._database.run(lambda connection: self._book_expiry(connection, expired))

    async def _book_expiry(self, connection: Connection, expired: dict[str, Changed]) -> int:
        if not expired:
            return 0
        await store.lock(connection, expired)
        before = await store.read_allocations(connection, sorted(expired))
        parts = {
            (name, sku, location): (0, 0, units)
            for name, answer in expired.items()
            for sku, location, units in domain.expiry(before[name], answer.allocations)
        }
        until = {name: expired[name].expires_at for name, _, _ in parts}
        await store.move(connection, parts)
        await self._settle(connection, until)
        now = await store.read(connection, until)
        await outbox.write(connection, codec.changed((now[name], "") for name in until))
        return len(until)


def _unwanted(pair: tuple[Ask, Held], known: dict[str, Reservation]) -> bool:
    """We newly held stock, but the row that stands under the id is of other content, or is not held."""
    ask, held = pair
    stored = known.get(ask.reservation_id)
    if stored is None or held.replayed or not held.allocations:
        return False
    return stored.fingerprint != ask.fingerprint or stored.state is not State.HELD


def _barred(reservation: Reservation) -> Refusal | None:
    try:
        domain.require_held(reservation)
    except Refusal as refusal:
        return refusal
    return None


def _unknown(change: Change) -> Refusal:
    name = change.reservation_id
    return Refusal(Reason.RESERVATION_NOT_FOUND, f"there is no reservation {name}", reservation_id=name)
