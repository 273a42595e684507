"""Every write of stock. Each takes a batch, decides it in one transaction, and answers item by item.

The package's docstring says why this is right. Here: `place` (holds), `change` (commit, release, extend
and expire), `sweep`, `adjust`, and what mends a ledger. What is sold where: `catalogue`.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
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

SHORT_SKUS_MAX = 100_000
SWEEP_HOLDS_MAX = 500
SWEEP_LOOKS = 2  # before keys are locked: who was first to what is due was another pod, most of the time
AT_ONCE_LINES_MAX = 1_000
RECONCILE_KEYS = 500
RECONCILE_REST = 9
DRIFTS_MAX = 20
_EARLY, _LATE = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
Answer = TypeVar("Answer", bound=Message)


class _NoStockRowError(Exception):
    """A key to be adjusted has no stock row yet; nothing was changed."""


def reused(request_id: str) -> Refusal:
    return Refusal(Reason.REQUEST_ID_REUSED, f"{request_id} was used with other content", request_id=request_id)


class Commands:
    """The writes, on one database; `cache` is told what was committed."""

    def __init__(self, database: Database, cache: Cache) -> None:
        self._database = database
        self._cache = cache
        self._short: set[str] = set()  # SKUs of which somebody was refused lately: whom to look at first

    # -- holds ------------------------------------------------------------------------------------

    async def place(self, requests: Sequence[HoldRequest]) -> list[Placed | Refusal]:
        """Place holds in order of arrival; a repeat gets its first outcome.

        Those for which there is not enough are told apart from the others, and do not cost them the fast way: first
        where somebody was refused the same SKU before, else once it has failed.
        """
        if (
            len({request.hold_id for request in requests}) < len(requests)
            or sum(len(request.lines) for request in requests) > AT_ONCE_LINES_MAX
        ):
            return await self._commit(lambda connection: self._place_exactly(connection, requests))
        answers: dict[str, Placed | Refusal] = {}
        left = requests
        hurried = not any(line.sku in self._short for request in requests for line in request.lines)
        if hurried:
            answers |= await self._place_at_once(left)
        if not answers:
            answers |= await self._refuse_at_once(requests)
            left = [request for request in requests if request.hold_id not in answers]
            if answers or not hurried:
                answers |= await self._place_at_once(left)
        left = [request for request in left if request.hold_id not in answers]
        if left:
            exactly = await self._commit(lambda connection: self._place_exactly(connection, left))
            answers |= zip((request.hold_id for request in left), exactly, strict=True)
        return [answers[request.hold_id] for request in requests]

    async def _place_at_once(self, requests: Sequence[HoldRequest]) -> dict[str, Placed]:
        """Place them all in one statement; none of them, and nothing is changed, where it takes more than that."""
        if not requests or not all(request.mode is Mode.ALL for request in requests):
            return {}
        async with self._database.connection() as connection:
            try:
                located = await self._locate(connection, requests)
                if located is None:
                    return {}
                stocks, now = await store.place(connection, located)
            except (*CONTESTED, asyncpg.DivisionByZeroError):
                return {}
        self._cache.wrote(stocks.values(), now)
        return {
            request.hold_id: Placed(
                request.hold_id,
                tuple(Allocation(line.sku, line.location, line.quantity) for line in request.lines),
                (),
                now,
                now + request.ttl,
            )
            for request in located
        }

    async def _refuse_at_once(self, requests: Sequence[HoldRequest]) -> dict[str, Placed]:
        """Refuse in one statement those for which there is not enough, by stock as it is read; nobody if it moves."""
        lines = [line for request in requests for line in request.lines]
        async with self._database.connection() as connection:
            open_skus = {line.sku for line in lines if not line.location}
            sources = await store.sources(connection, open_skus) if open_skus else {}
            keys = {line: _keys(line.sku, line.location, sources) for line in lines}
            seen = await store.look(connection, {key for some in keys.values() for key in some})
            shelf = Shelf({key: stock for key, (stock, _) in seen.items() if stock.active})
            plans = {
                request.hold_id: (request, plan)
                for request in requests
                if all(keys[line] and all(key in shelf.stocks for key in keys[line]) for line in request.lines)
                and not (plan := domain.plan(request, shelf, sources)).allocations
            }
            self._short -= {line.sku for line in lines}
            if not plans:
                return {}
            if len(self._short) > SHORT_SKUS_MAX:
                self._short.clear()
            self._short |= {line.sku for _, plan in plans.values() for line in plan.short_lines}
            deciding = {key for request, _ in plans.values() for line in request.lines for key in keys[line]}
            until = {key: expiry for key in deciding if (expiry := seen[key][1])}
            explained = _explained(plans, sources, until)
            rows = [
                (request, sku, [line for line in plan.short_lines if line.sku == sku])
                for request, plan in explained.values()
                for sku in {line.sku for line in request.lines}
            ]
            try:
                now = await store.refuse(
                    connection, [shelf.stocks[key] for key in deciding], rows, min(until.values(), default=None)
                )
            except (*CONTESTED, asyncpg.DivisionByZeroError):
                return {}
        return {
            hold_id: Placed(hold_id, (), plan.short_lines, now, now + request.ttl)
            for hold_id, (request, plan) in explained.items()
        }

    async def _locate(self, connection: Connection, requests: Sequence[HoldRequest]) -> Sequence[HoldRequest] | None:
        """Give each open line its first source: where that one alone can meet it, it is the one to take."""
        open_skus = {line.sku for request in requests for line in request.lines if not line.location}
        if not open_skus:
            return requests
        sources = await store.sources(connection, open_skus)
        if len(sources) < len(open_skus):
            return None
        return [
            replace(
                request,
                lines=domain.sum_lines(
                    line if line.location else replace(line, location=sources[line.sku][0]) for line in request.lines
                ),
            )
            for request in requests
        ]

    async def _place_exactly(
        self, connection: Connection, requests: Sequence[HoldRequest]
    ) -> tuple[list[Placed | Refusal], Shelf, datetime]:
        lines = [line for request in requests for line in request.lines]
        sources = await store.sources(connection, [line.sku for line in lines if not line.location])
        keys = {(line.sku, line.location) for line in lines if line.location}
        keys |= {(sku, location) for sku, locations in sources.items() for location in locations}
        before, now = await store.lock(connection, keys)
        known = await store.read_holds(connection, [(line.sku, r.hold_id) for r in requests for line in r.lines])
        refused = await self._unsellable(connection, requests, before, sources)
        shelf = Shelf(dict(before))
        await self._reclaim(connection, shelf, _short_keys(requests, before, sources), now)

        answers: list[Placed | Refusal | None] = []
        plans: dict[str, tuple[HoldRequest, Plan]] = {}
        for request in requests:
            first = plans.get(request.hold_id)
            if first or request.hold_id in known:
                content = first[0].fingerprint if first else known[request.hold_id][0].fingerprint
                same = content == request.fingerprint
                answers.append(None if same else reused(request.hold_id))
            elif refusal := refused.get(request.hold_id):
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
        looks = await store.look(connection, doubtful) if doubtful else {}
        plans = _explained(plans, sources, {key: expiry for key, (_, expiry) in looks.items() if expiry})
        rows = [row for request, plan in plans.values() for row in _rows(request, plan, now)]
        await store.insert_holds(connection, rows, now)
        await store.save(connection, before, shelf.stocks, now)
        await store.insert_movements(connection, shelf.movements, now)

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
    ) -> dict[str, Refusal]:
        """Holds that name a SKU or a location that is unknown or archived, by hold id."""
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
        refused: dict[str, Refusal] = {}
        for request in requests:
            for line in request.lines:
                refusal = unknown(line.sku, line.location, skus, locations)
                if refusal and request.hold_id not in refused:
                    refused[request.hold_id] = refusal
        return refused

    async def _reclaim(self, connection: Connection, shelf: Shelf, keys: Iterable[Key], now: datetime) -> int:
        """Give back what has expired on locked keys; return how many hold rows it was."""
        rows = await store.expired_on_keys(connection, keys, now)
        for row in rows:
            shelf.move(row.key, Kind.EXPIRE, held=-row.held, hold_id=row.hold_id)
            metrics.EXPIRY_DELAY_SECONDS.observe((now - row.expires_at).total_seconds())
        await store.move_holds(connection, Kind.EXPIRE, [(row, row.held) for row in rows])
        return len(rows)

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
                if not all(taken or change.kind is Kind.EXPIRE for change, taken, _, _ in made):
                    return None
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
        # A hold placed in between stands on keys that are not locked: it is not known yet.
        found = await store.read_holds(connection, ids)
        holds = {
            hold_id: ours
            for hold_id, rows in found.items()
            if (ours := [row for row in rows if row.key in before or not row.location])
        }
        known = await store.read_changes(connection, changes)
        shelf = Shelf(dict(before))
        answers: list[Changed | Refusal] = []
        made: dict[tuple[str, str], tuple[HoldChange, tuple[Allocation, ...], datetime]] = {}
        taken: dict[Kind, list[tuple[HoldRow, int]]] = {Kind.COMMIT: [], Kind.RELEASE: [], Kind.EXPIRE: []}
        extended: dict[tuple[str, str], datetime] = {}
        for change in changes:
            identity = (change.hold_id, change.request_id)
            if identity in made and change.kind is not Kind.EXPIRE:
                first, allocations, expires_at = made[identity]
                same = first.fingerprint == change.fingerprint
                replayed = Changed(change.hold_id, allocations, expires_at, now, replayed=True)
                answers.append(replayed if same else reused(change.request_id))
                continue
            if identity in known:
                same = all(part.fingerprint == change.fingerprint for part in known[identity])
                parts = tuple(a for part in known[identity] for a in part.allocations)
                first_part = known[identity][0]
                replayed = Changed(change.hold_id, parts, first_part.expires_at, first_part.changed_at, replayed=True)
                answers.append(replayed if same else reused(change.request_id))
                continue
            rows = [row for row in holds.get(change.hold_id, ()) if row.sku in change.skus]
            try:
                outcome = _apply(shelf, change, rows, now, taken, extended)
            except Refusal as refusal:
                answers.append(refusal)
                continue
            if change.hold_id in holds:
                holds[change.hold_id] = _after(holds[change.hold_id], change, taken, extended)
            if change.kind is not Kind.EXPIRE:
                made[identity] = (change, outcome.allocations, outcome.expires_at)
            answers.append(outcome)
        for kind, rows_taken in taken.items():
            await store.move_holds(connection, kind, rows_taken)
        await store.extend_holds(connection, [(*key, until) for key, until in extended.items()])
        await store.insert_changes(connection, made.values(), now)
        await store.save(connection, before, shelf.stocks, now)
        await store.insert_movements(connection, shelf.movements, now)
        return answers, shelf, now

    async def sweep(self, holds_max: int = SWEEP_HOLDS_MAX) -> int:
        """Expire holds whose time has come; return how many rows. Two sweepers at once do no harm."""
        due: list[HoldRow] = []
        for _ in range(SWEEP_LOOKS):
            async with self._database.connection() as connection:
                due = await store.expired(connection, holds_max)
                if not due or await self._expire_at_once(connection, due):
                    return len(due)

        async def work(connection: Connection) -> tuple[int, Shelf, datetime]:
            before, now = await store.lock(connection, {row.key for row in due})
            shelf = Shelf(dict(before))
            swept = await self._reclaim(connection, shelf, before, now)
            await store.save(connection, before, shelf.stocks, now)
            await store.insert_movements(connection, shelf.movements, now)
            return swept, shelf, now

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
                await store.save(connection, before, shelf.stocks, now)
                await store.insert_movements(connection, entries, now)
            return entries, shelf if apply else Shelf({}), now

        return await self._commit(work)

    # -- adjustments ------------------------------------------------------------------------------

    async def adjust(self, adjustments: Sequence[Adjustment]) -> list[inventory_pb2.AdjustStockResponse | Refusal]:
        """Apply adjustments in order, each atomic; a repeat gets its first outcome, refusals included."""
        keys = {key for ask in adjustments for key in ask.keys}

        async def work(
            connection: Connection,
        ) -> tuple[list[inventory_pb2.AdjustStockResponse | Refusal], Shelf, datetime]:
            return await self._adjust(connection, adjustments, keys)

        try:
            return await self._commit(work)
        except _NoStockRowError:
            # Some key has no stock row yet: make those that can be, on their own, and do it again.
            await self._database.run(lambda connection: store.make_stock(connection, keys))
            keys = set()
            return await self._commit(work)

    async def _adjust(
        self, connection: Connection, adjustments: Sequence[Adjustment], required: set[Key]
    ) -> tuple[list[inventory_pb2.AdjustStockResponse | Refusal], Shelf, datetime]:
        before, now = await store.lock(connection, {key for ask in adjustments for key in ask.keys})
        if not required <= before.keys():
            raise _NoStockRowError
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
            missing = next(
                (r for sku, at in ask.keys if (r := unknown(sku, at, skus, locations)) and _bars(ask, r)),
                None,
            )
            if missing:
                answers.append(missing)
                continue
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
        await store.save(connection, before, shelf.stocks, now)
        await store.insert_movements(connection, shelf.movements, now)
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
            (part.sku, part.location),
            Kind.HOLD,
            held=part.quantity,
            hold_id=request.hold_id,
            request_id=request.hold_id,
        )


def _rows(request: HoldRequest, plan: Plan, now: datetime) -> list[HoldRow]:
    """The hold's rows. Each SKU has slot 0, even with nothing held, so that a repeat always meets it."""
    rows: list[HoldRow] = []
    for sku in sorted({line.sku for line in request.lines}):
        parts = [(part.location, part.quantity) for part in plan.allocations if part.sku == sku] or [("", 0)]
        short = tuple(line for line in plan.short_lines if line.sku == sku)
        rows += [
            HoldRow(
                sku, request.hold_id, slot, location, quantity, quantity, 0, 0, 0, request.fingerprint,
                now, now + request.ttl, () if slot else short,
            )
            for slot, (location, quantity) in enumerate(parts)
        ]  # fmt: skip
    return rows


def _explained(
    plans: dict[str, tuple[HoldRequest, Plan]], sources: dict[str, list[str]], until: dict[Key, datetime]
) -> dict[str, tuple[HoldRequest, Plan]]:
    """The plans, with when the next hold on the keys of each short line expires."""
    explained = {}
    for hold_id, (request, plan) in plans.items():
        lines = []
        for line in plan.short_lines:
            times = [until[key] for key in _keys(line.sku, line.location, sources) if key in until]
            lines.append(replace(line, next_expiry=min(times, default=None)))
        explained[hold_id] = (request, replace(plan, short_lines=tuple(lines)))
    return explained


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


def unknown(sku: str, location: str, skus: dict[str, bool], locations: dict[str, bool]) -> Refusal | None:
    if sku in skus:
        if skus[sku]:
            return Refusal(Reason.SKU_ARCHIVED, f"SKU {sku} is archived", sku=sku)
        return Refusal(Reason.SKU_NOT_FOUND, f"there is no SKU {sku}", sku=sku)
    if location in locations:
        if locations[location]:
            return Refusal(Reason.LOCATION_ARCHIVED, f"location {location} is archived", location=location)
        return Refusal(Reason.LOCATION_NOT_FOUND, f"there is no location {location}", location=location)
    return None


def _bars(ask: Adjustment, refusal: Refusal) -> bool:
    """Archived goods and places may still be emptied, counted and given back; they take nothing new."""
    archived = refusal.reason in {Reason.SKU_ARCHIVED, Reason.LOCATION_ARCHIVED}
    leaving = refusal.metadata.get("location", ask.location) == ask.location and ask.change not in {
        Change.RECEIVE,
        Change.POLICY,
    }
    return not (archived and leaving)


def _apply(
    shelf: Shelf,
    change: HoldChange,
    rows: Sequence[HoldRow],
    now: datetime,
    taken: dict[Kind, list[tuple[HoldRow, int]]],
    extended: dict[tuple[str, str], datetime],
) -> Changed:
    """Decide and book one change of a hold."""
    if change.kind is Kind.HOLD:
        until = domain.extend(change, rows, now)
        extended.update({(sku, change.hold_id): until for sku in change.skus})
        return Changed(change.hold_id, (), until, now)
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
    taken[change.kind] += parts
    return Changed(change.hold_id, allocations, max(row.expires_at for row in rows), now)


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


def _after(
    rows: Sequence[HoldRow],
    change: HoldChange,
    taken: dict[Kind, list[tuple[HoldRow, int]]],
    extended: dict[tuple[str, str], datetime],
) -> list[HoldRow]:
    """A hold's rows after a change, for the next change of it in the batch."""
    if change.kind is Kind.HOLD:
        return [replace(row, expires_at=extended.get((row.sku, row.hold_id), row.expires_at)) for row in rows]
    gone: dict[tuple[str, int], int] = {}
    for row, quantity in taken[change.kind]:
        if row.hold_id == change.hold_id and any(row is known for known in rows):
            gone[row.sku, row.slot] = gone.get((row.sku, row.slot), 0) + quantity
    column = {Kind.COMMIT: "committed", Kind.RELEASE: "released", Kind.EXPIRE: "expired"}[change.kind]
    return [
        replace(row, held=row.held - units, **{column: getattr(row, column) + units})
        if (units := gone.get((row.sku, row.slot), 0))
        else row
        for row in rows
    ]


def first_outcome(request: store.Request, fingerprint: bytes, answer_type: type[Answer]) -> Answer | Refusal:
    """A write's first outcome, or the refusal of other content under its id."""
    if request.fingerprint != fingerprint:
        return reused(request.request_id)
    if request.refusal:
        reason, message, metadata = request.refusal
        return Refusal(reason, message, **metadata)
    return answer_type.FromString(request.outcome)
