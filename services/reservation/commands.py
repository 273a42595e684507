"""Every write of reservation, in batches: reserve, change (confirm, cancel, extend), expire, drive on.

The package's docstring says why the order of the steps is right.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import asyncpg
import structlog
from holdfast.reservation.v1.reservation_pb2 import Reservation as Message

from services.reservation import codec, domain, store
from services.reservation.domain import (
    Ask,
    Change,
    Changed,
    Held,
    Reason,
    Reservation,
    State,
    reused,
)
from services.reservation.guard import Guard
from services.reservation.inventory import Inventory
from services.reservation.subjects import Identity, Lately, Subjects
from shared import metrics
from shared.database import ATTEMPTS_MAX, CONTESTED, RETRIED, Connection, Database, unavailable
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
Item = TypeVar("Item")
Outcome = tuple[Reservation, bool]  # the reservation, and whether the request was known
Told = tuple[Message, bool]  # the same, as it is sent
ChangeId = tuple[str, str]  # reservation id and request id of a change

EXPIRE_MAX = 500
DRIVE_MAX = 500
PORTION_LINES_MAX = 5_000  # more than a full batch of callers has
SUBJECTS_WRITTEN_MAX = 100_000


class Commands:
    """The writes, on one database, over one inventory; events carry the hashes that `subjects` makes.

    Without a guard nothing is enforced.
    """

    def __init__(
        self, database: Database, inventory: Inventory, subjects: Subjects, guard: Guard | None = None
    ) -> None:
        self._database = database
        self._inventory = inventory
        self._subjects = subjects
        self._guard = guard
        self._written = Lately(SUBJECTS_WRITTEN_MAX)
        self._expired_to = store.FIRST

    # -- reserve ----------------------------------------------------------------------------------

    async def reserve(self, asks: Sequence[Ask]) -> list[Told | Refusal]:
        """Decide a batch. Raises Refusal INVENTORY_UNAVAILABLE or DATABASE_UNAVAILABLE for all of it."""
        first = {ask.reservation_id: ask for ask in reversed(asks)}
        unique = list({ask.reservation_id: first[ask.reservation_id] for ask in asks}.values())
        decided, refused, made = await self._decide(unique)
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
                # Nothing is kept of what is refused, so that other content under its id is refused with it alone.
                outcomes.append(refused[name] if ask.fingerprint == first[name].fingerprint else reused(name))
            elif content != ask.fingerprint:
                outcomes.append(reused(name))
            else:
                outcomes.append((message, name in known or name in told))
            told.add(name)
        return outcomes

    async def _decide(
        self, asks: Sequence[Ask]
    ) -> tuple[list[tuple[Ask, Held]], dict[str, Refusal], dict[str, tuple[bytes, Message]]]:
        """What inventory decided, what it or the guard refused, and what is new and inserted.

        Who is refused by the guard may still be known: a retry gets its first outcome.
        """
        refused = self._guard.judge(asks, datetime.now(UTC)) if self._guard else {}
        for refusal in refused.values():
            metrics.FRAUD_REFUSALS.labels(refusal.reason).inc()
        held: dict[str, Held] = {}
        try:
            admitted = [ask for ask in asks if ask.reservation_id not in refused]
            answers = await self._inventory.place(admitted) if admitted else []
            decided = []
            for ask, answer in zip(admitted, answers, strict=True):
                if isinstance(answer, Refusal):
                    refused[ask.reservation_id] = answer
                else:
                    decided.append((ask, answer))
            made = await self._insert(decided)
            held = {ask.reservation_id: answer for ask, answer in decided if ask.reservation_id in made}
            got = sum(bool(answer.allocations) for answer in held.values())
            metrics.RESERVATIONS.labels("held").inc(got)
            metrics.RESERVATIONS.labels("rejected").inc(len(held) - got)
            metrics.RESERVATIONS.labels("refused").inc(len(refused))
        finally:
            if self._guard:
                self._guard.settle(held)
        return decided, refused, made

    async def _insert(self, decided: Sequence[tuple[Ask, Held]]) -> dict[str, tuple[bytes, Message]]:
        """Insert reservations that are new, with their events; return each one's fingerprint and message."""
        fresh = {ask.reservation_id: (ask, held, codec.made(ask, held)) for ask, held in decided}
        key_id = self._subjects.key_id
        for _ in range(ATTEMPTS_MAX):
            if not fresh:
                return {}
            rows = [(ask, held, self._event(message, key_id)) for ask, held, message in fresh.values()]
            subjects = self._unwritten(ask for ask, _, _ in rows)
            async with self._database.connection() as connection:
                try:
                    await store.insert(connection, rows, subjects, key_id, codec.CHANGES_TOPIC, codec.CHANGED_TYPE)
                except CONTESTED:
                    for name in await store.known(connection, fresh):
                        del fresh[name]
                else:
                    self._written.add(subjects)
                    return {name: (ask.fingerprint, message) for name, (ask, _, message) in fresh.items()}
        raise unavailable()

    def _unwritten(self, asks: Iterable[Ask]) -> dict[str, Identity]:
        """The hashes of new reservations that have to be kept, so that they resolve: not those that were lately."""
        return {
            one.hashes[0]: one.identity
            for ask in asks
            for one in self._subjects.named(ask.customer_id, ask.device_id, ask.ip_address).values()
            if one.hashes[0] not in self._written
        }

    def _event(self, message: Message, key_id: str, request_id: str = "") -> bytes:
        """The event of a reservation as it now is, whose hashes are made with one key all its life."""
        subjects = self._subjects.of(message.customer_id, message.device_id, message.ip_address, key_id)
        return codec.changed_payload(message, subjects, request_id)

    async def _give_back(self, held: Sequence[tuple[Ask, Held]]) -> None:
        if held:
            try:
                await self._inventory.give_back(held)
            except Refusal as refusal:
                log.warning("holds are left to expire", holds=len(held), reason=refusal.reason)

    # -- confirm, cancel, extend ------------------------------------------------------------------

    async def change(self, changes: Sequence[Change]) -> list[Outcome | Refusal]:
        """Carry out a batch of changes: intent, inventory, booking; a repeat gets its first outcome."""
        first = {_identity(change): change for change in reversed(changes)}
        async with self._database.connection() as connection:
            reservations = await store.read(connection, {name for name, _ in first})
            held = [c for c in first.values() if _state(reservations, c) is State.HELD]
            new = await store.insert_changes(connection, held)
            others = [c for c in first.values() if c.reservation_id in reservations and _identity(c) not in new]
            known = await store.read_changes(connection, others) if others else {}
            # What was booked by another pod since the reservations were read: a repeat sees what it came to.
            done = {name for (name, _), one in known.items() if one.state != "PENDING"}
            reservations |= await store.read(connection, done) if done else {}
        wanted = {identity: first[identity] for identity in new}
        wanted |= {identity: one.change for identity, one in known.items() if one.state == "PENDING"}
        booked = await self._carry_out(list(wanted.values()), reservations) if wanted else {}

        outcomes: list[Outcome | Refusal] = []
        for change in changes:
            identity = _identity(change)
            reservation = reservations.get(change.reservation_id)
            before = known[identity].change if identity in known else wanted.get(identity)
            if reservation is None:
                outcomes.append(_unknown(change))
            elif before is None:
                outcomes.append(domain.barred(reservation))
            elif before.fingerprint != change.fingerprint:
                outcomes.append(reused(change.request_id))
            elif identity in booked:
                outcomes.append(booked[identity])
            else:
                outcomes.append(known[identity].refusal or (reservation, True))
        return outcomes

    async def _carry_out(
        self, changes: Sequence[Change], reservations: Mapping[str, Reservation]
    ) -> dict[ChangeId, Outcome | Refusal]:
        """Ask inventory for changes whose intents are kept, and book its answers, portion by portion."""
        booked: dict[ChangeId, Outcome | Refusal] = {}
        for portion in _portions(changes, lambda change: reservations[change.reservation_id]):
            booked |= await self._carry_out_portion(portion, reservations)
        return booked

    async def _carry_out_portion(
        self, changes: Sequence[Change], reservations: Mapping[str, Reservation]
    ) -> dict[ChangeId, Outcome | Refusal]:
        answers = await self._inventory.change([(c, reservations[c.reservation_id]) for c in changes])
        done = list(zip(changes, answers, strict=True))
        ended = {change.reservation_id for change, answer in done if _not_held(answer)}
        try:
            async with self._database.connection() as connection:
                if ended:  # what ended them may have been booked since they were read
                    reservations = {**reservations, **await store.read(connection, ended)}
                return await self._book(connection, reservations, done)
        except (*RETRIED, asyncpg.DivisionByZeroError):
            pass
        for _ in range(ATTEMPTS_MAX):
            # A refusal books no reservation, and so waits for no lock: it may still come in between.
            with suppress(asyncpg.DivisionByZeroError):
                return await self._database.run(lambda connection: self._book_locked(connection, done))
        raise unavailable()

    async def _book_locked(
        self, connection: Connection, done: Sequence[tuple[Change, Changed | Refusal]]
    ) -> dict[ChangeId, Outcome | Refusal]:
        """As `_book`, from reservations that nobody else can change; what was booked meanwhile is left as it is."""
        names = {change.reservation_id for change, _ in done}
        await store.lock(connection, names)
        reservations = await store.read(connection, names)
        known = await store.read_changes(connection, [change for change, _ in done])
        pending = [(change, answer) for change, answer in done if known[_identity(change)].state == "PENDING"]
        booked = await self._book(connection, reservations, pending)
        return {
            identity: booked.get(identity) or one.refusal or (reservations[identity[0]], True)
            for identity, one in known.items()
        }

    async def _book(
        self,
        connection: Connection,
        reservations: Mapping[str, Reservation],
        done: Sequence[tuple[Change, Changed | Refusal]],
    ) -> dict[ChangeId, Outcome | Refusal]:
        """Book what inventory answered, on reservations as they were read, in one statement."""
        now: dict[str, Reservation] = {}
        by: dict[str, str] = {}
        for change, answer in done:
            name = change.reservation_id
            if not isinstance(answer, Refusal):
                now[name] = domain.book(now.get(name, reservations[name]), change.action, answer)
                by[name] = change.request_id
        done = [
            (change, _told(answer, now.get(change.reservation_id, reservations[change.reservation_id])))
            for change, answer in done
        ]
        written = await self._write(
            connection,
            [(reservations[name], after, by[name]) for name, after in now.items()],
            [(change, answer if isinstance(answer, Refusal) else None) for change, answer in done],
        )
        return {
            _identity(change): answer if isinstance(answer, Refusal) else (written[change.reservation_id], False)
            for change, answer in done
        }

    async def _write(
        self,
        connection: Connection,
        settled: Sequence[tuple[Reservation, Reservation, str]],
        decided: Sequence[tuple[Change, Refusal | None]] = (),
    ) -> dict[str, Reservation]:
        """Write reservations (as read, as they now are, the request that did it), one version on, with their events."""
        rows = [(was, replace(now, version=was.version + 1), by) for was, now, by in settled]
        events = [(was, now, self._event(codec.reservation(now), now.key_id, by)) for was, now, by in rows]
        await store.book(connection, events, decided, codec.CHANGES_TOPIC, codec.CHANGED_TYPE)
        for change, refusal in decided:
            metrics.RESERVATION_CHANGES.labels("refused" if refusal else change.action.lower()).inc()
        return {now.reservation_id: now for _, now, _ in rows}

    async def drive_on(self, age_seconds: float) -> int:
        """Carry out changes that have been PENDING for a while; return how many."""
        async with self._database.connection() as connection:
            pending = await store.pending_changes(connection, timedelta(seconds=age_seconds), DRIVE_MAX)
            names = list(dict.fromkeys(change.reservation_id for change in pending))
            first, _ = await store.read_first(connection, names)
        reservations = {reservation.reservation_id: reservation for reservation in first}
        changes = [change for change in pending if change.reservation_id in reservations]
        if changes:
            await self._carry_out(changes, reservations)
        return len(changes)

    # -- expiry -----------------------------------------------------------------------------------

    async def expire(self) -> int:
        """Book what has expired; return how many reservations ended. Two at once do no harm.

        Each call goes on where the last one stopped, and after the end begins anew. What is due and does not end, as
        inventory knows of nothing that expired of it, would otherwise be found each time, and nothing younger.
        """
        async with self._database.connection() as connection:
            due = await store.due(connection, EXPIRE_MAX, self._expired_to)
            reservations, taken = await store.read_first(connection, [name for _, name in due])
        self._expired_to = due[taken - 1] if taken and (taken < len(due) or taken == EXPIRE_MAX) else store.FIRST
        return sum([await self._expire(portion) for portion in _portions(reservations, lambda one: one)])

    async def _expire(self, reservations: Sequence[Reservation]) -> int:
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
        before = await store.read(connection, expired)
        after = {name: domain.book_expiry(before[name], answer) for name, answer in expired.items()}
        ended = [(before[name], now, "") for name, now in after.items() if now is not before[name]]
        await self._write(connection, ended)
        metrics.RESERVATION_CHANGES.labels("expire").inc(len(ended))
        return len(ended)


def _portions(items: Iterable[Item], reservation: Callable[[Item], Reservation]) -> Iterator[list[Item]]:
    """Items in lists of few enough lines for one call and one statement."""
    portion: list[Item] = []
    lines = 0
    for item in items:
        more = len(reservation(item).allocations)
        if portion and lines + more > PORTION_LINES_MAX:
            yield portion
            portion, lines = [], 0
        portion.append(item)
        lines += more
    if portion:
        yield portion


def _unwanted(pair: tuple[Ask, Held], known: dict[str, Reservation]) -> bool:
    """We newly held stock, but the row that stands under the id is of other content, or is not held."""
    ask, held = pair
    stored = known.get(ask.reservation_id)
    if stored is None or held.replayed or not held.allocations:
        return False
    return stored.fingerprint != ask.fingerprint or stored.state is not State.HELD


def _identity(change: Change) -> ChangeId:
    return change.reservation_id, change.request_id


def _not_held(answer: Changed | Refusal) -> bool:
    return isinstance(answer, Refusal) and answer.reason == Reason.RESERVATION_NOT_HELD


def _told(answer: Changed | Refusal, reservation: Reservation) -> Changed | Refusal:
    """Inventory does not know a reservation's state, of which one line may be HELD while another is not."""
    if isinstance(answer, Refusal) and _not_held(answer):
        return Refusal(answer.reason, answer.message, **answer.metadata | {"state": reservation.state})
    return answer


def _state(reservations: Mapping[str, Reservation], change: Change) -> State | None:
    reservation = reservations.get(change.reservation_id)
    return reservation.state if reservation else None


def _unknown(change: Change) -> Refusal:
    name = change.reservation_id
    return Refusal(Reason.RESERVATION_NOT_FOUND, f"there is no reservation {name}", reservation_id=name)
