"""Every write of stock. Each takes a batch, decides it in one transaction, and answers item by item.

The package's docstring says why this is right. Here: `place` (holds), `change` (commit, release, extend
and expire), `sweep`, `adjust`, and what mends a ledger. What is sold where: `catalogue`.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

import asyncpg
from google.protobuf.message import Message
from holdfast.inventory.v1 import inventory_pb2

from services.inventory import codec, domain, store
from services.inventory.cache import Cache
from services.inventory.domain import (
    Adjustment,
    Allocation,
    Change,
    Changed,
    Drift,
    HoldChange,
    HoldRequest,
    HoldRow,
    Key,
    Kind,
    Mode,
    Movement,
    Placed,
    Plan,
    Reason,
    Shelf,
    Stock,
)
from shared import metrics
from shared.database import CONTESTED, RETRIED, Connection, Database
from shared.refusal import Refusal
from shared.workers import turns

SCARCE_SKUS_MAX = 100_000
SWEEP_HOLDS_MAX = 500
RECLAIM_HOLDS_MAX = 2_000  # in one transaction, whose locks others wait for
SWEEP_LOOKS = 2  # before keys are locked: who was first to what is due was another pod, most of the time
AT_ONCE_LINES_MAX = 1_000
RECONCILE_KEYS = 500
RECONCILE_REST = 9
DRIFTS_MAX = 20
_EARLY, _LATE = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
Answer = TypeVar("Answer", bound=Message)


class _ContestedError(Exception):
    """A batch failed with one of CONTESTED; nothing was written."""


class _NoStockRowError(Exception):
    """A key to be adjusted has no stock row yet; nothing was changed."""


def reused(request_id: str) -> Refusal:
    return Refusal(Reason.REQUEST_ID_REUSED, f"{request_id} was used with other content", request_id=request_id)


class Commands:
    """The writes, on one database; `cache` is told what was committed."""

    def __init__(self, database: Database, cache: Cache) -> None:
        self._database = database
        self._cache = cache
        self._scarce: set[str] = set()  # SKUs that not everybody had at once lately: what to look at first

    # -- holds ------------------------------------------------------------------------------------

    async def place(self, requests: Sequence[HoldRequest]) -> list[Placed | Refusal]:
        """Place holds in order of arrival; a repeat gets its first outcome."""
        if (
            len({request.hold_id for request in requests}) < len(requests)
            or sum(len(request.lines) for request in requests) > AT_ONCE_LINES_MAX
        ):
            return await self._place_in_order(requests)
        answers: dict[str, Placed | Refusal] = {}
        with suppress(_ContestedError, *RETRIED):  # a hold is known, and only the exact way finds which
            if all(request.mode is Mode.ALL for request in requests) and not any(
                line.sku in self._scarce for request in requests for line in request.lines
            ):
                answers |= await self._place_at_once(requests)
            if not answers:
                answers |= await self._place_as_seen(requests)
        left = [request for request in requests if request.hold_id not in answers]
        answers |= zip((request.hold_id for request in left), await self._place_in_order(left), strict=True)
        return [answers[request.hold_id] for request in requests]

    async def _place_at_once(self, requests: Sequence[HoldRequest]) -> dict[str, Placed]:
        """Place them all, each whole, in one statement; else nothing is changed. Raises as `_place_planned` does.

        An open line takes from its first source: where that one alone can meet it, it is the one to take.
        """
        open_skus = {line.sku for request in requests for line in request.lines if not line.location}
        async with self._database.connection() as connection:
            sources = await store.sources(connection, open_skus)
            if len(sources) < len(open_skus):
                return {}
            plans = []
            for request in requests:
                units: dict[Key, int] = {}
                for line in request.lines:
                    key = (line.sku, line.location or sources[line.sku][0])
                    units[key] = units.get(key, 0) + line.quantity
                plans.append(
                    (request, Plan(tuple(Allocation(*key, quantity) for key, quantity in sorted(units.items()))))
                )
            return await self._place_planned(connection, plans)

    async def _place_as_seen(self, requests: Sequence[HoldRequest]) -> dict[str, Placed]:
        """Decide by stock that is read without a lock, and write that in one statement, where it still is so.

        Who is left out (`_planned`) has no answer. Raises as `_place_planned` does.
        """
        lines = [line for request in requests for line in request.lines]
        async with self._database.connection() as connection:
            seen = await store.look_open(connection, {line.sku for line in lines if not line.location})
            sources = {sku: [at for _, at in keys] for sku, keys in domain.grouped(seen, lambda key: key[0]).items()}
            seen |= await store.look(connection, {(line.sku, line.location) for line in lines if line.location})
            shelf = Shelf({key: stock for key, (stock, _) in seen.items() if stock.active})
            plans, deciding, left_out = _planned(requests, shelf, sources)
            self._remember({sku for sku, _ in deciding | left_out}, {line.sku for line in lines})
            until = {key: expiry for key in deciding if (expiry := seen[key][1])}
            explained = [(request, _explained(plan, sources, until)) for request, plan in plans]
            return await self._place_planned(
                connection, explained, [seen[key][0] for key in deciding], min(until.values(), default=None)
            )

    async def _place_planned(
        self,
        connection: Connection,
        plans: Sequence[tuple[HoldRequest, Plan]],
        seen: Sequence[Stock] = (),
        until: datetime | None = None,
    ) -> dict[str, Placed]:
        """Write plans in one statement, or none of them, where one can no longer be kept.

        Raises _ContestedError, and nothing is written, where a hold is known.
        """
        if not plans:
            return {}
        try:
            stocks, now = await store.place(connection, plans, seen, until)
        except asyncpg.DivisionByZeroError:
            return {}
        except CONTESTED as error:  # of which outside of the connection some would mean that the database is away
            raise _ContestedError from error
        self._cache.wrote(stocks.values(), now)
        return {
            request.hold_id: Placed(request.hold_id, plan.allocations, plan.short_lines, now, now + request.ttl)
            for request, plan in plans
        }

    def _remember(self, scarce: set[str], skus: set[str]) -> None:
        """Note which of some SKUs were scarce just now."""
        self._scarce -= skus
        if len(self._scarce) > SCARCE_SKUS_MAX:
            self._scarce.clear()
        self._scarce |= scarce

    async def _place_in_order(self, requests: Sequence[HoldRequest]) -> list[Placed | Refusal]:
        """Place them exactly, once all that has expired in their way was given back."""
        placed: list[Placed | Refusal] = []
        while len(placed) < len(requests):
            placed = await self._commit(lambda connection: self._place_exactly(connection, requests))
        return placed

    async def _place_exactly(
        self, connection: Connection, requests: Sequence[HoldRequest]
    ) -> tuple[list[Placed | Refusal], Shelf, datetime]:
        """One answer after the other; none yet, where more has expired in their way than is given back at a time."""
        lines = [line for request in requests for line in request.lines]
        sources = await store.sources(connection, [line.sku for line in lines if not line.location])
        keys = {(line.sku, line.location) for line in lines if line.location}
        keys |= {(sku, location) for sku, locations in sources.items() for location in locations}
        before, now = await store.lock(connection, keys)
        known = await store.read_holds(connection, [(line.sku, r.hold_id) for r in requests for line in r.lines])
        refused = await self._unsellable(connection, requests, before, sources)
        shelf = Shelf(dict(before))
        short = _short_keys(requests, before, sources)
        due = await store.expired_on_keys(connection, short, now, RECLAIM_HOLDS_MAX)
        await self._give_back(connection, shelf, due, now)
        if len(due) == RECLAIM_HOLDS_MAX:
            await self._save(connection, before, shelf, now)
            return [], shelf, now

        answers: list[Placed | Refusal | None] = []
        plans: dict[str, tuple[HoldRequest, Plan]] = {}
        for request in requests:
            first = plans.get(request.hold_id)
            if first or request.hold_id in known:
                content = first[0].fingerprint if first else known[request.hold_id][0].fingerprint
                same = content == request.fingerprint
                answers.append(None if same else reused(request.hold_id))
            elif refusal := refused.get(request):
                answers.append(refusal)
            else:
                plan = domain.plan(request, shelf, sources)
                plans[request.hold_id] = (request, plan)
                _book(shelf, request, plan)
                answers.append(None)

        doubtful = {
            key
            for _, plan in plans.values()
            for line in plan.short_lines
            for key in _keys(line.sku, line.location, sources)
        }
        looks = await store.look(connection, doubtful)
        until = {key: expiry for key, (_, expiry) in looks.items() if expiry}
        for hold_id, (request, plan) in plans.items():
            plans[hold_id] = (request, _explained(plan, sources, until))
            for part in plan.allocations:
                until[part.key] = min(until.get(part.key, _LATE), now + request.ttl)
        rows = [row for request, plan in plans.values() for row in _rows(request, plan, now)]
        await store.insert_holds(connection, rows, now)
        await self._save(connection, before, shelf, now)

        fresh: set[str] = set()
        placed: list[Placed | Refusal] = []
        for request, answer in zip(requests, answers, strict=True):
            if answer is not None:
                placed.append(answer)
            elif request.hold_id in plans:
                plan = plans[request.hold_id][1]
                again = request.hold_id in fresh
                fresh.add(request.hold_id)
                placed.append(
                    Placed(request.hold_id, plan.allocations, plan.short_lines, now, now + request.ttl, again)
                )
            else:
                placed.append(_replay(known[request.hold_id]))
        return placed, shelf, now

    async def _unsellable(
        self,
        connection: Connection,
        requests: Sequence[HoldRequest],
        stocks: dict[Key, Stock],
        sources: dict[str, list[str]],
    ) -> dict[HoldRequest, Refusal]:
        """The requests that name a SKU or a location that is unknown or archived."""
        doubtful = [
            line
            for request in requests
            for line in request.lines
            if (line.sku not in sources if not line.location else not _active(stocks, (line.sku, line.location)))
        ]
        if not doubtful:
            return {}
        skus = await store.unknown_skus(connection, [line.sku for line in doubtful])
        locations = await store.unknown_locations(connection, [x.location for x in doubtful if x.location])
        refused: dict[HoldRequest, Refusal] = {}
        for request in requests:
            for line in request.lines:
                for refusal in unknown(line.sku, line.location, skus, locations):
                    refused.setdefault(request, refusal)
        return refused

    async def _give_back(self, connection: Connection, shelf: Shelf, due: Sequence[HoldRow], now: datetime) -> None:
        """Expire holds on locked keys, whose time has come."""
        parts = [(row, row.held) for row in due]
        for row, units in parts:
            shelf.move(row.key, Kind.EXPIRE, held=-units, hold_id=row.hold_id)
            metrics.EXPIRY_DELAY_SECONDS.observe((now - row.expires_at).total_seconds())
        after = [replace(row, held=0, expired=row.expired + units) for row, units in parts]
        await store.save_holds(connection, due, after)

    async def _save(self, connection: Connection, before: dict[Key, Stock], shelf: Shelf, now: datetime) -> None:
        """Write what was decided of locked stock, and the ledger of it."""
        await store.save(connection, before, shelf.stocks, now)
        await store.insert_movements(connection, shelf.movements, now)

    async def change(self, changes: Sequence[HoldChange]) -> list[Changed | Refusal]:
        """Commit (COMMIT), release (RELEASE), extend (HOLD) or expire (EXPIRE) holds, each whole or not.

        An expiry answers with all that ever expired of the hold, so that its caller can book it once.
        """
        changed = await self._change_at_once(changes)
        if changed is not None:
            return changed
        return await self._commit(lambda connection: self._change_exactly(connection, changes))

    async def _change_at_once(self, changes: Sequence[HoldChange]) -> list[Changed | Refusal] | None:
        """Commit, release, expire in one statement, from rows as they are read; None where it takes more than that."""
        if (
            len({change.hold_id for change in changes}) < len(changes)
            or sum(len(change.lines) for change in changes) > AT_ONCE_LINES_MAX
            or any(change.kind is Kind.HOLD for change in changes)
        ):
            return None
        async with self._database.connection() as connection:
            holds = await store.read_holds(connection, {(sku, one.hold_id) for one in changes for sku in one.skus})
            try:
                made = [_taking(change, holds.get(change.hold_id, ())) for change in changes]
                stocks, now = await store.change(connection, made)
            except (*CONTESTED, asyncpg.DivisionByZeroError, Refusal):
                return None
        self._cache.wrote(stocks.values(), now)
        return [Changed(change.hold_id, allocations, until, now) for change, _, allocations, until in made]

    async def _change_exactly(
        self, connection: Connection, changes: Sequence[HoldChange]
    ) -> tuple[list[Changed | Refusal], Shelf, datetime]:
        ids = {(sku, change.hold_id) for change in changes for sku in change.skus}
        # Where a hold's units are never changes, so this may be read before the lock; what is left may not.
        where = await store.read_holds(connection, ids)
        before, now = await store.lock(connection, {row.key for rows in where.values() for row in rows if row.location})
        # A hold placed in between stands on keys that are not all locked: it is not known yet.
        found = [
            row
            for rows in (await store.read_holds(connection, ids)).values()
            if all(row.key in before or not row.location for row in rows)
            for row in rows
        ]
        holds = _by_sku(found)
        known = await store.read_changes(connection, changes)
        shelf = Shelf(dict(before))
        made: list[tuple[HoldChange, tuple[Allocation, ...], datetime]] = []
        answers: list[Changed | Refusal] = []
        for change in changes:
            first = known.get((change.hold_id, change.request_id))
            if first and change.kind is not Kind.EXPIRE:
                answers.append(_repeated(change, first))
                continue
            rows = [row for sku in change.skus for row in holds.get((sku, change.hold_id), ())]
            try:
                changed, after = _apply(shelf, change, rows, now)
            except Refusal as refusal:
                answers.append(refusal)
                continue
            answers.append(changed)
            holds |= _by_sku(after)
            if change.kind is not Kind.EXPIRE:
                made.append((change, changed.allocations, changed.expires_at))
                outcome = store.KnownChange(change.fingerprint, changed.allocations, changed.expires_at, now)
                known[change.hold_id, change.request_id] = [outcome]
        await store.save_holds(connection, found, (row for rows in holds.values() for row in rows))
        await store.insert_changes(connection, made, now)
        await self._save(connection, before, shelf, now)
        return answers, shelf, now

    async def sweep(self, holds_max: int = SWEEP_HOLDS_MAX) -> int:
        """Expire holds whose time has come; return how many rows. Two sweepers at once do no harm."""
        due: list[HoldRow] = []
        for _ in range(SWEEP_LOOKS):
            async with self._database.connection() as connection:
                due = await store.expired(connection, holds_max)
                if not due or await self._expire_at_once(connection, due):
                    return len(due)
        try:
            return await self._expire_exactly(due)
        except asyncpg.CheckViolationError:
            # A key that drifts, with less held than its holds come to, keeps its own and no others from being expired.
            return sum([await self._expire_alone(key, due) for key in sorted({row.key for row in due})])

    async def _expire_alone(self, key: Key, due: Iterable[HoldRow]) -> int:
        try:
            return await self._expire_exactly([row for row in due if row.key == key])
        except asyncpg.CheckViolationError:
            return 0  # the reconciler tells of it

    async def _expire_exactly(self, due: Sequence[HoldRow]) -> int:
        """Expire those of the holds that still are as they were read, under locks; return how many."""

        async def work(connection: Connection) -> tuple[int, Shelf, datetime]:
            before, now = await store.lock(connection, {row.key for row in due})
            shelf = Shelf(dict(before))
            found = await store.read_holds(connection, {(row.sku, row.hold_id) for row in due})
            seen = {row.slot_key for row in due}
            left = [
                row
                for rows in found.values()
                for row in rows
                if row.slot_key in seen and row.held and row.expires_at <= now
            ]
            await self._give_back(connection, shelf, left, now)
            await self._save(connection, before, shelf, now)
            return len(left), shelf, now

        return await self._commit(work)

    async def _expire_at_once(self, connection: Connection, due: Sequence[HoldRow]) -> bool:
        """Expire holds in one statement, from rows as they were read; whether they still were so."""
        try:
            stocks, now = await store.change(
                connection,
                [
                    (HoldChange(row.hold_id, "", Kind.EXPIRE, (), b""), [(row, row.held)], (), row.expires_at)
                    for row in due
                ],
            )
        except (*RETRIED, asyncpg.DivisionByZeroError):
            return False
        self._cache.wrote(stocks.values(), now)
        for row in due:
            metrics.EXPIRY_DELAY_SECONDS.observe((now - row.expires_at).total_seconds())
        return True

    async def reconcile(self, keys_max: int = RECONCILE_KEYS) -> tuple[int, list[Drift]]:
        """Compare counters, ledger and open holds of every key that has moved since it was last compared.

        Returns how many do not agree, and the first DRIFTS_MAX of them. Stock is left as it is. It rests between
        pages, so that it takes a tenth of a connection's time at the most. Two at once do no harm.
        """
        after, drifted, first = ("", ""), 0, list[Drift]()
        async for _ in turns(rest=RECONCILE_REST):
            async with self._database.connection() as connection:
                looked, after, wrong = await store.balance(connection, after, keys_max)
            drifted += len(wrong)
            first += wrong[: DRIFTS_MAX - len(first)]
            if looked < keys_max:
                break
        return drifted, first

    async def repair(self, drifts: Sequence[Drift], request_id: str, *, apply: bool) -> list[Movement]:
        """The entries that mend keys that drift, as they now do; written when `apply`, each with its event."""

        async def work(connection: Connection) -> tuple[list[Movement], Shelf, datetime]:
            before, now = await store.lock(connection, [drift.key for drift in drifts])
            found = await store.balance_of(connection, before)
            entries = [entry for one in found if (entry := domain.repair(before[one.key], one, request_id))]
            shelf = Shelf(dict(before) | {entry.after.key: entry.after for entry in entries}, entries)
            if apply:
                await self._save(connection, before, shelf, now)
            return entries, shelf if apply else Shelf({}), now

        return await self._commit(work)

    # -- adjustments ------------------------------------------------------------------------------

    async def adjust(self, adjustments: Sequence[Adjustment]) -> list[inventory_pb2.AdjustStockResponse | Refusal]:
        """Apply adjustments in order, each atomic; a repeat gets its first outcome, refusals included."""
        keys = {key for ask in adjustments for key in ask.keys}
        while True:
            try:
                return await self._commit(lambda connection: self._adjust(connection, adjustments, keys))
            except _NoStockRowError:
                # Made on their own, and then it is done again. None ever goes, so this comes to an end.
                await self._database.run(lambda connection: store.make_stock(connection, keys))

    async def _adjust(
        self, connection: Connection, adjustments: Sequence[Adjustment], keys: Iterable[Key]
    ) -> tuple[list[inventory_pb2.AdjustStockResponse | Refusal], Shelf, datetime]:
        before, now = await store.lock(connection, keys)
        known = await store.read_requests(connection, [(ask.sku, ask.request_id) for ask in adjustments])
        doubtful = [ask for ask in adjustments if not all(_active(before, key) for key in ask.keys)]
        skus, locations = {}, {}
        if doubtful:
            skus = await store.unknown_skus(connection, [ask.sku for ask in doubtful])
            places = [location for ask in doubtful for _, location in ask.keys]
            locations = await store.unknown_locations(connection, places)
        shelf = Shelf(dict(before))
        fresh: list[store.Request] = []
        answers: list[inventory_pb2.AdjustStockResponse | Refusal] = []
        for ask in adjustments:
            if first := known.get((ask.sku, ask.request_id)):
                answers.append(first_outcome(first, ask.fingerprint, inventory_pb2.AdjustStockResponse))
                continue
            barred = [one for key in ask.keys for one in unknown(*key, skus, locations) if _bars(ask, one)]
            if barred:
                answers.append(barred[0])
                continue
            if not before.keys() >= set(ask.keys):
                raise _NoStockRowError
            try:
                answer = codec.adjusted(domain.adjust(shelf, ask), now)
                request = store.Request(ask.sku, ask.request_id, ask.fingerprint, answer.SerializeToString())
                answers.append(answer)
            except Refusal as refusal:
                said = (refusal.reason, refusal.message, refusal.metadata)
                request = store.Request(ask.sku, ask.request_id, ask.fingerprint, refusal=said)
                answers.append(refusal)
            known[ask.sku, ask.request_id] = request
            fresh.append(request)
        await store.insert_requests(connection, fresh)
        await self._save(connection, before, shelf, now)
        return answers, shelf, now

    # -- both -------------------------------------------------------------------------------------

    async def _commit(self, work: Callable[[Connection], Awaitable[tuple["Result", Shelf, datetime]]]) -> "Result":
        result, shelf, now = await self._database.run(work)
        self._cache.wrote(shelf.stocks.values(), now)
        return result


Result = TypeVar("Result")


def _book(shelf: Shelf, request: HoldRequest, plan: Plan) -> None:
    for part in plan.allocations:
        shelf.move(
            part.key,
            Kind.HOLD,
            held=part.quantity,
            hold_id=request.hold_id,
            request_id=request.hold_id,
        )


def _rows(request: HoldRequest, plan: Plan, now: datetime) -> list[HoldRow]:
    """The hold's rows. Each SKU has slot 0, even with nothing held, so that a repeat always meets it."""
    rows: list[HoldRow] = []
    held = domain.grouped(plan.allocations, lambda part: part.sku)
    short = domain.grouped(plan.short_lines, lambda line: line.sku)
    for sku in sorted({line.sku for line in request.lines}):
        rows += [
            HoldRow(
                sku, request.hold_id, slot, part.location, part.quantity, part.quantity, 0, 0, 0, request.fingerprint,
                now, now + request.ttl, () if slot else tuple(short.get(sku, ())),
            )
            for slot, part in enumerate(held.get(sku) or [Allocation(sku, "", 0)])
        ]  # fmt: skip
    return rows


def _explained(plan: Plan, sources: dict[str, list[str]], until: dict[Key, datetime]) -> Plan:
    """The plan, with when the next hold on the keys of each short line expires."""
    lines = []
    for line in plan.short_lines:
        times = [until[key] for key in _keys(line.sku, line.location, sources) if key in until]
        lines.append(replace(line, next_expiry=min(times, default=None)))
    return replace(plan, short_lines=tuple(lines))


def _replay(rows: Sequence[HoldRow]) -> Placed:
    return Placed(
        rows[0].hold_id,
        tuple(Allocation(row.sku, row.location, row.quantity) for row in rows if row.quantity),
        tuple(line for row in rows for line in row.short_lines),
        rows[0].created_at,
        max(row.expires_at for row in rows),
        replayed=True,
    )


def _keys(sku: str, location: str, sources: dict[str, list[str]]) -> list[Key]:
    return [(sku, location)] if location else [(sku, at) for at in sources.get(sku, ())]


def _planned(
    requests: Iterable[HoldRequest], shelf: Shelf, sources: dict[str, list[str]]
) -> tuple[list[tuple[HoldRequest, Plan]], set[Key], set[Key]]:
    """Plans of requests, in order, booked on the shelf; the keys that decide them; the keys of who is left out.

    Left out are those that name a key without stock, those that come out short where others of them take from, since
    the next expiry may be that of these, and those that come after one that is left out and ask for the same.
    """
    plans: list[tuple[HoldRequest, Plan]] = []
    booked, deciding, left_out = set[Key](), set[Key](), set[Key]()
    for request in requests:
        by_line = [_keys(line.sku, line.location, sources) for line in request.lines]
        keys = {key for some in by_line for key in some}
        if not all(by_line) or not keys <= shelf.stocks.keys() or keys & left_out:
            left_out |= keys
            continue
        plan = domain.plan(request, shelf, sources)
        decided_by = _deciding(request, plan, sources)
        if plan.short_lines and decided_by & booked:
            left_out |= keys
            continue
        plans.append((request, plan))
        deciding |= decided_by
        booked |= {part.key for part in plan.allocations}
        _book(shelf, request, plan)
    return plans, deciding, left_out


def _deciding(request: HoldRequest, plan: Plan, sources: dict[str, list[str]]) -> set[Key]:
    """The keys by whose stock a plan is what it is; of others it needs no more than that its units are there.

    Of a SKU that is short all keys decide, and of an open line that is met those before the one that meets it alone.
    """
    short = {line.sku for line in plan.short_lines}
    units = Counter({part.key: part.quantity for part in plan.allocations})
    deciding: set[Key] = set()
    for line in request.lines:  # the open one of a SKU comes after those with a location
        keys = _keys(line.sku, line.location, sources)
        if line.sku in short:
            deciding.update(keys)
        elif line.location:
            units[keys[0]] -= line.quantity
        elif plan.allocations:
            before = next((n for n, key in enumerate(keys) if units[key] == line.quantity), len(keys))
            deciding.update(keys[:before])
    return deciding


def _short_keys(requests: Iterable[HoldRequest], stocks: dict[Key, Stock], sources: dict[str, list[str]]) -> list[Key]:
    """Locked keys on which someone might be refused."""
    demand: dict[Key, int] = {}
    for request in requests:
        for line in request.lines:
            for key in _keys(line.sku, line.location, sources):
                demand[key] = demand.get(key, 0) + line.quantity
    return [key for key, units in demand.items() if key in stocks and stocks[key].available < units]


def _active(stocks: dict[Key, Stock], key: Key) -> bool:
    return key in stocks and stocks[key].active


def unknown(sku: str, location: str, skus: dict[str, bool], locations: dict[str, bool]) -> Iterator[Refusal]:
    """What speaks against a key: of those that take nothing new, `skus` and `locations` have True where archived."""
    if sku in skus:
        if skus[sku]:
            yield Refusal(Reason.SKU_ARCHIVED, f"SKU {sku} is archived", sku=sku)
        else:
            yield Refusal(Reason.SKU_NOT_FOUND, f"there is no SKU {sku}", sku=sku)
    if location in locations:
        if locations[location]:
            yield Refusal(Reason.LOCATION_ARCHIVED, f"location {location} is archived", location=location)
        else:
            yield Refusal(Reason.LOCATION_NOT_FOUND, f"there is no location {location}", location=location)


def _bars(ask: Adjustment, refusal: Refusal) -> bool:
    """Archived goods and places may still be emptied, counted and given back; they take nothing new."""
    archived = refusal.reason in {Reason.SKU_ARCHIVED, Reason.LOCATION_ARCHIVED}
    leaving = refusal.metadata.get("location", ask.location) == ask.location and ask.change not in {
        Change.RECEIVE,
        Change.POLICY,
    }
    return not (archived and leaving)


def _by_sku(rows: Iterable[HoldRow]) -> dict[tuple[str, str], list[HoldRow]]:
    """Rows of holds by SKU and hold id."""
    return domain.grouped(rows, lambda row: (row.sku, row.hold_id))


def _repeated(change: HoldChange, first: Sequence[store.KnownChange]) -> Changed | Refusal:
    """What a change whose id is known came to, SKU by SKU; or the refusal of other content under its id."""
    if any(part.fingerprint != change.fingerprint for part in first):
        return reused(change.request_id)
    allocations = tuple(allocation for part in first for allocation in part.allocations)
    return Changed(change.hold_id, allocations, first[0].expires_at, first[0].changed_at, replayed=True)


def _apply(shelf: Shelf, change: HoldChange, rows: Sequence[HoldRow], now: datetime) -> tuple[Changed, list[HoldRow]]:
    """Decide and book one change of a hold; its answer, and the hold's rows afterwards."""
    if change.kind is Kind.HOLD:
        until = domain.extend(change, rows, now)
        return Changed(change.hold_id, (), until, now), domain.after_extending(rows, until)
    parts, allocations = _leaving(change, rows, now)
    for row, quantity in parts:
        shelf.move(
            row.key,
            change.kind,
            on_hand=-quantity if change.kind is Kind.COMMIT else 0,
            held=-quantity,
            hold_id=change.hold_id,
            request_id="" if change.kind is Kind.EXPIRE else change.request_id,
        )
    changed = Changed(change.hold_id, allocations, max(row.expires_at for row in rows), now)
    return changed, domain.after_leaving(rows, change.kind, parts)


def _taking(
    change: HoldChange, rows: Sequence[HoldRow]
) -> tuple[HoldChange, list[tuple[HoldRow, int]], tuple[Allocation, ...], datetime]:
    """What a change takes from a hold's rows as they were read. Whether its time has come `store.change` says."""
    taken, allocations = _leaving(change, rows, _LATE if change.kind is Kind.EXPIRE else _EARLY)
    return change, taken, allocations, max(row.expires_at for row in rows)


def _leaving(
    change: HoldChange, rows: Sequence[HoldRow], now: datetime
) -> tuple[list[tuple[HoldRow, int]], tuple[Allocation, ...]]:
    """What leaves a hold's rows, and what its answer tells: of an expiry, all that ever expired."""
    if change.kind is Kind.EXPIRE:
        parts = domain.expire(change, rows, now)
        return parts, _allocations([*((row, row.expired) for row in rows), *parts])
    parts = domain.take(change, rows, now)
    return parts, _allocations(parts)


def _allocations(taken: Iterable[tuple[HoldRow, int]]) -> tuple[Allocation, ...]:
    units: dict[Key, int] = {}
    for row, quantity in taken:
        units[row.key] = units.get(row.key, 0) + quantity
    return tuple(Allocation(*key, quantity) for key, quantity in sorted(units.items()) if quantity)


def first_outcome(request: store.Request, fingerprint: bytes, answer_type: type[Answer]) -> Answer | Refusal:
    """A write's first outcome, or the refusal of other content under its id."""
    if request.fingerprint != fingerprint:
        return reused(request.request_id)
    if request.refusal:
        reason, message, metadata = request.refusal
        return Refusal(reason, message, **metadata)
    return answer_type.FromString(request.outcome)
