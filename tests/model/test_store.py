"""The simulated database against the real one: the same calls come to the same, and leave the same behind."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from itertools import count
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.inventory import store
from services.inventory.cache import Cache
from services.inventory.commands import Commands
from services.inventory.domain import Adjustment, Change, HoldRequest, Kind, Mode, Plan, ShortLine
from services.inventory.workers import MOVEMENTS
from services.reservation import store as reservation_store
from services.reservation.domain import Action, Ask, Held, Line
from services.reservation.domain import Allocation as Part
from services.reservation.domain import Change as ReservationChange
from services.reservation.domain import ChangeLine as ReservationLine
from services.reservation.domain import Mode as ReservationMode
from services.reservation.subjects import Identity
from services.reservation.subjects import Kind as SubjectKind
from shared.database import Connection, Database, affected
from shared.outbox import OUTBOX
from shared.refusal import Refusal
from tests.integration.goods import change, distributed, hold, whole
from tests.model import sim_statements
from tests.model.sim_database import Connection as SimConnection
from tests.model.sim_database import LocalWire, Pool, Server, Table
from tests.model.sim_redis import Client
from tests.model.sim_redis import Store as Redis

BOTH = pytest.mark.parametrize("kind", ["real", "simulated"])
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
WAITING_ON_NODES = "SELECT count(*) FROM citus_lock_waits"
Dump = Callable[[], Awaitable[dict[str, Any]]]


@dataclass
class Tried:
    """A database on which calls are tried."""

    database: Database
    tables: Sequence[Table]
    server: Server | None = None

    def commands(self) -> Commands:
        client: Any = Client(Redis(time.monotonic), _at_once)
        return Commands(self.database, Cache(self.database, client, local_seconds=0, redis_seconds=1, keys_max=1))

    async def dump(self) -> dict[str, Any]:
        """All that it holds, but for times and what is drawn by chance."""
        found: dict[str, Any] = {}
        for table in self.tables:
            if self.server:
                rows: Sequence[Mapping[str, Any]] = self.server.all(table.name)
            else:
                async with self.database.connection() as connection:
                    order = ", ".join(table.key)
                    rows = [dict(row) for row in await connection.fetch(f"SELECT * FROM {table.name} ORDER BY {order}")]
            found[table.name] = [_plain_row(row) for row in rows]
        return found

    async def blocked(self, task: "asyncio.Task[Any]") -> None:
        """Return when the task waits for a lock."""
        while not task.done():
            if self.server:
                for _ in range(20):
                    await asyncio.sleep(0)
                if any(one._waits_for for one in self.server.transactions):
                    return
            else:
                async with self.database.connection() as connection:
                    if await connection.fetchval(WAITING_ON_NODES if await distributed(connection) else WAITING):
                        return
        raise AssertionError("it did not wait")


async def _at_once() -> None:
    """Redis without a way to it."""


def simulated(tables: Sequence[Table], clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Tried:
    server = Server(tables, clock, uuid4)
    pool = Pool(lambda: SimConnection(server, sim_statements.statement, LocalWire()), 40)
    return Tried(Database(pool), tables, server)  # type: ignore[arg-type]


_JSON = ("short_lines", "allocations", "lines", "refusal")


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if not name.endswith("_at") and name not in {"id", "event_id"}}
    kept = {name: json.loads(value) if name in _JSON and value else value for name, value in kept.items()}
    if kept.get("short_lines"):
        kept["short_lines"] = [[*line[:-1], line[-1] is not None] for line in kept["short_lines"]]
    if "slot" in kept:
        kept["life"] = round((row["expires_at"] - row["created_at"]).total_seconds() / 10)
    if "outcome" in kept:
        kept["outcome"] = bool(kept["outcome"])
    if "skus" in kept:  # in no order: the relay puts them in one
        kept["skus"] = sorted(zip(kept["skus"], kept.pop("locations"), kept.pop("versions"), strict=True))
    return kept


def plain(value: Any) -> Any:
    """A result without times and random ids."""
    if isinstance(value, Refusal):
        return value.reason, {key: said for key, said in value.metadata.items() if not key.endswith("time")}
    if isinstance(value, Exception):
        return type(value).__name__
    if isinstance(value, Message):
        return plain(MessageToDict(value))
    if dataclasses.is_dataclass(value):
        return tuple(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items() if str(key).lower()[-4:] not in {"time", "asof"}}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime | UUID):
        return type(value).__name__
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


async def outcome(work: Awaitable[Any]) -> Any:
    try:
        return plain(await work)
    except asyncpg.InternalServerError:  # what a cluster says of an id that is known (shared.database.CONTESTED)
        return asyncpg.UniqueViolationError.__name__
    except (asyncpg.PostgresError, Refusal) as error:
        return plain(error)


# -- inventory, the same random calls -------------------------------------------------------------

SKUS = st.sampled_from(["A", "B"])
PLACES = st.sampled_from(["X", "Y"])
IDS = st.sampled_from(["h1", "h2", "h3", "h4"])
UNITS = st.integers(1, 6)
LIVES = st.sampled_from([0, 900])
Call = tuple[Any, ...]
_number = count()

ADJUSTS = st.tuples(
    st.just("adjust"),
    st.lists(
        st.tuples(
            st.sampled_from(list(Change)), SKUS, PLACES, st.integers(1, 9), st.sampled_from(["r1", "r2", "r3", "r4"]),
            st.sampled_from([None, 1, 2]), st.booleans(),
        ),
        min_size=1, max_size=3,
    ),
)  # fmt: skip
HOLDS = st.tuples(
    st.just("place"),
    st.lists(
        st.tuples(
            IDS,
            st.lists(
                st.one_of(
                    st.tuples(SKUS, st.sampled_from(["X", "Y", ""]), UNITS),
                    st.sampled_from([("A", "Z", 1), ("D", "", 1), ("nothing", "X", 1)]),
                ),
                min_size=1,
                max_size=3,
            ),
            st.sampled_from(list(Mode)),
            LIVES,
        ),
        min_size=1,
        max_size=3,
    ),
)
CHANGES = st.tuples(
    st.just("change"),
    st.lists(
        st.tuples(
            IDS,
            st.sampled_from([Kind.COMMIT, Kind.RELEASE, Kind.HOLD, Kind.EXPIRE]),
            st.lists(st.tuples(SKUS, st.sampled_from(["", "", "X", "Y"]), st.integers(0, 3)), min_size=1, max_size=2),
            st.sampled_from(["c1", "c2", "c3"]),
        ),
        min_size=1,
        max_size=3,
    ),
)
OTHERS = st.sampled_from([("sweep",), ("reconcile",), ("relay",), ("read",), ("unlike",)])
CALLS = st.lists(st.one_of(ADJUSTS, HOLDS, HOLDS, CHANGES, CHANGES, OTHERS), min_size=3, max_size=16)


async def call(tried: Tried, asked: Call) -> Any:
    """Make one call of inventory's commands or store."""
    commands, database = tried.commands(), tried.database
    match asked:
        case ("adjust", asks):
            return await outcome(commands.adjust([_adjustment(*one) for one in asks]))
        case ("place", holds):
            return await outcome(commands.place([_hold(number, *one) for number, one in enumerate(holds)]))
        case ("change", changes):
            return await outcome(
                commands.change(
                    [
                        change(name, kind, *lines, request_id=request_id, ttl_seconds=60 if kind is Kind.HOLD else 0)
                        for name, kind, lines, request_id in changes
                    ]
                )
            )
        case ("sweep",):
            return await outcome(commands.sweep())
        case ("reconcile",):
            return await outcome(commands.reconcile())
        case ("relay",):
            async with database.connection() as connection:
                groups = await MOVEMENTS.peek(connection, 2)
                await connection.execute(MOVEMENTS.delete, [group.id for group in groups])
                return [(group.topic, group.type, group.keys, len(group.payloads)) for group in groups]
        case ("read",):
            async with database.connection() as connection:
                return [
                    plain(await store.read_stock(connection, [("A", "X"), ("B", "Y"), ("C", "X")])),
                    {sku: list(row)[:-1] for sku, row in (await store.sum_stock(connection, ["A", "B"])).items()},
                    await store.unknown_skus(connection, ["A", "C"]),
                    await store.unknown_locations(connection, ["X", "Z"]),
                ]
        case _:
            # A decision from rows that are no longer so is refused, whole.
            stale = hold("other", ("A", "X", 10**6))
            async with database.connection() as connection:
                return await outcome(store.place(connection, [whole(stale)]))


def _adjustment(
    kind: Change, sku: str, at: str, units: int, request_id: str, version: int | None, allow: bool
) -> Adjustment:  # fmt: skip
    there = "Y" if at == "X" else "X"
    return Adjustment(
        request_id, sku, at, kind, units, to_location=there if kind is Change.TRANSFER else "",
        allow_short=allow and kind in {Change.COUNT, Change.DAMAGE}, expected_version=version,
        safety_stock=units % 3, backorder_limit=units % 4, fingerprint=repr((kind, sku, at, units)).encode(),
    )  # fmt: skip


def _hold(number: int, name: str, lines: list[tuple[str, str, int]], mode: Mode, life: int) -> HoldRequest:
    made = hold(name, *lines, mode=mode, minimum=1 if mode is Mode.MINIMUM else 0)
    return dataclasses.replace(made, ttl=timedelta(seconds=life, microseconds=number))


async def stocked(tried: Tried) -> None:
    """Two SKUs in two locations; Z is a third, where there are none, and D is sold nowhere."""
    async with tried.database.connection() as connection:
        if tried.server is None:
            names = ", ".join(table.name for table in tried.tables)
            await connection.execute(f"TRUNCATE {names} CASCADE")
        for priority, location in enumerate(("X", "Y", "Z")):
            await connection.fetchrow(store.INSERT_LOCATION, location, location, priority)
        columns = store.split([(sku, sku, "", "piece", "", 0) for sku in ("A", "B", "D")])
        await connection.fetch(store.INSERT_SKUS, *columns)
    await tried.commands().adjust(
        [
            Adjustment(f"open-{sku}-{at}", sku, at, Change.RECEIVE, 7, fingerprint=b"open")
            for sku in ("A", "B")
            for at in ("X", "Y")
        ]
    )


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS)
async def test_the_same_calls_come_to_the_same(inventory_db: Database, calls: list[Call]) -> None:
    """Whatever is asked of inventory, in whatever order: equal answers, and equal tables at the end."""
    real, made_up = Tried(inventory_db, sim_statements.INVENTORY), simulated(sim_statements.INVENTORY)
    for tried in (real, made_up):
        await stocked(tried)
    for asked in calls:
        assert await call(made_up, asked) == await call(real, asked), asked
    assert await made_up.dump() == await real.dump()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(calls=st.lists(st.one_of(HOLDS, HOLDS, ADJUSTS), min_size=1, max_size=6))
async def test_whichever_way_holds_are_decided_they_come_to_the_same(calls: list[Call]) -> None:
    """At once, as seen or exactly: equal answers, and equal stock and holds once what has expired is given back."""
    now = datetime(2024, 5, 1, tzinfo=UTC)
    quick, exact = (simulated(sim_statements.INVENTORY, lambda: now) for _ in range(2))
    await stocked(quick)
    await stocked(exact)
    commands = quick.commands()  # one, which remembers what was scarce
    for kind, asks in calls:
        if kind == "place":
            holds = [
                _hold(number, name, lines, mode, 3 + life) for number, (name, lines, mode, life) in enumerate(asks)
            ]
            assert await commands.place(holds) == await exact.commands()._place_in_order(holds)
        else:
            assert await call(quick, (kind, asks)) == await call(exact, (kind, asks))
        now += timedelta(seconds=2)
    now += timedelta(seconds=5)
    ends = []
    for tried in (quick, exact):
        await tried.commands().sweep()
        end = await tried.dump()
        ends.append((end["hold"], [{**row, "version": 0} for row in end["stock"]]))
    assert ends[0] == ends[1]


# -- reservation, the same random calls -----------------------------------------------------------

NAMES = st.sampled_from(["n1", "n2", "n3"])
INSERTS = st.tuples(st.just("insert"), st.lists(st.tuples(NAMES, st.booleans()), min_size=1, max_size=3, unique=True))
INTENTS = st.tuples(
    st.just("intend"),
    st.lists(
        st.tuples(NAMES, st.sampled_from(["c1", "c2"]), st.sampled_from(list(Action))),
        min_size=1,
        max_size=3,
        unique_by=lambda one: one[:2],
    ),
)
BOOKINGS = st.tuples(
    st.just("book"), NAMES, st.sampled_from(["c1", "c2"]), st.booleans(), st.sampled_from([0, 0, 1]), st.integers(0, 4)
)
REST = st.sampled_from([("due", ""), ("due", "n1"), ("pending",), ("peek",), ("lock",), ("subjects",)])
RESERVATION_CALLS = st.lists(st.one_of(INSERTS, INTENTS, BOOKINGS, BOOKINGS, REST), min_size=3, max_size=16)
LONG_AGO = datetime(2024, 5, 1, tzinfo=UTC)


def _ask(name: str) -> Ask:
    lines = (Line("B", "X", 2, 0, "EUR", 5), Line("A", "", 3))
    return Ask(name, f"customer-{name}", lines, ReservationMode.ALL, timedelta(seconds=9), name.encode())


async def ask_reservation(tried: Tried, asked: Call) -> Any:
    """Make one call of reservation's store."""
    async with tried.database.connection() as connection:
        match asked:
            case ("insert", names):
                rows = [
                    (
                        _ask(name),
                        Held((("A", "Y", 3), ("B", "X", 2)) if held else (), (), LONG_AGO, LONG_AGO, False),
                        b"e",
                    )
                    for name, held in names
                ]
                subjects = {f"hash-{name}": Identity(SubjectKind.CUSTOMER, name) for name, _ in names}
                return await outcome(reservation_store.insert(connection, rows, subjects, "k1", "topic", "type"))
            case ("intend", changes):
                made = [_intent(*one) for one in changes]
                return (
                    sorted(await reservation_store.insert_changes(connection, made))
                    if await _all_known(connection, made)
                    else None
                )
            case ("book", name, request_id, refused, behind, units):
                return await outcome(_book(connection, name, request_id, refused, behind, units))
            case ("due", after):
                return [name for _, name in await reservation_store.due(connection, 2, (LONG_AGO, after))]
            case ("pending",):
                found = await reservation_store.pending_changes(connection, timedelta(seconds=-60), 10)
                return sorted((one.reservation_id, one.request_id, one.action.value) for one in found)
            case ("peek",):
                groups = await OUTBOX.peek(connection, 2)
                await connection.execute(OUTBOX.delete, [group.id for group in groups])
                return [plain(group)[2:] for group in groups]
            case ("lock",):
                return await reservation_store.lock(connection, ["n1", "n9"])
            case _:
                return plain(await reservation_store.read_subjects(connection, ["hash-n1", "hash-n9"]))


def _intent(name: str, request_id: str, action: Action) -> ReservationChange:
    lines = (ReservationLine("A", "", 1),)
    return ReservationChange(name, request_id, action, lines, timedelta(seconds=3), repr((action, lines)).encode())


async def _all_known(connection: Connection, changes: Sequence[ReservationChange]) -> bool:
    names = {change.reservation_id for change in changes}
    return names == await reservation_store.known(connection, names)


async def _book(
    connection: Connection, name: str, request_id: str, refused: bool, behind: int, units: int
) -> Any:  # fmt: skip
    """Book a change of a reservation as it was `behind` versions ago."""
    found = await reservation_store.read(connection, [name])
    if name not in found:
        return None
    was = dataclasses.replace(found[name], version=found[name].version - behind)
    now = dataclasses.replace(was, allocations=tuple(_confirm(part, units) for part in was.allocations))
    change = _intent(name, request_id, Action.CONFIRM)
    decided = [(change, Refusal("SOME", "words", of=1) if refused else None)]
    await reservation_store.book(connection, [] if refused else [(was, now, b"event")], decided, "topic", "type")
    known = await reservation_store.read_changes(connection, [change])
    return [plain(one) for one in known.values()], plain((await reservation_store.read(connection, [name]))[name])


def _confirm(part: Part, units: int) -> Part:
    return dataclasses.replace(part, held=part.held - units, confirmed=part.confirmed + units)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=RESERVATION_CALLS)
async def test_the_same_bookings_come_to_the_same(reservation_db: Database, calls: list[Call]) -> None:
    """As of inventory, of the statements of reservation."""
    real, made_up = Tried(reservation_db, sim_statements.RESERVATION), simulated(sim_statements.RESERVATION)
    async with reservation_db.connection() as connection:
        await connection.execute(f"TRUNCATE {', '.join(table.name for table in real.tables)} CASCADE")
    for asked in calls:
        assert await ask_reservation(made_up, asked) == await ask_reservation(real, asked), asked
    assert await made_up.dump() == await real.dump()


# -- two at once ----------------------------------------------------------------------------------


@pytest.fixture
def tried(kind: str, request: pytest.FixtureRequest) -> Tried:
    if kind == "real":
        return Tried(request.getfixturevalue("inventory_db"), sim_statements.INVENTORY)
    return simulated(sim_statements.INVENTORY)


@BOTH
async def test_a_guard_is_judged_by_the_row_as_it_has_become(tried: Tried) -> None:
    """A hold waits for the lock, and then finds less than there was when it came."""
    await stocked(tried)
    async with tried.database.connection() as first, tried.database.connection() as second:
        async with first.transaction():
            await store.place(first, [whole(hold("h1", ("A", "X", 5)))])
            waiting = asyncio.ensure_future(store.place(second, [whole(hold("h2", ("A", "X", 3)))]))
            await tried.blocked(waiting)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await waiting
        stocks, _ = await store.place(second, [whole(hold("h3", ("A", "X", 2)))])
    assert stocks["A", "X"].held == 7


@BOTH
@pytest.mark.parametrize(("safety", "backorder", "most"), [(0, 0, 7), (3, 0, 4), (3, 5, 9)])
async def test_a_hold_may_take_what_is_available_and_no_more(
    tried: Tried, safety: int, backorder: int, most: int
) -> None:
    """On hand less what is kept for safety, and what may be sold before it comes."""
    await stocked(tried)
    policy = Adjustment("p", "A", "X", Change.POLICY, safety_stock=safety, backorder_limit=backorder)
    await tried.commands().adjust([policy])
    async with tried.database.connection() as connection:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await store.place(connection, [whole(hold("more", ("A", "X", most + 1)))])
        stocks, _ = await store.place(connection, [whole(hold("most", ("A", "X", most)))])
    assert stocks["A", "X"].held == most


@BOTH
@pytest.mark.parametrize("meanwhile", ["nothing", "moved", "expired"])
async def test_what_was_decided_from_stock_that_is_no_longer_so_is_undone(tried: Tried, meanwhile: str) -> None:
    """Stock that has moved since it was looked at, or of which a hold has expired meanwhile: nobody is refused."""
    await stocked(tried)
    refused = hold("refused", ("A", "X", 8), ("B", "Y", 1))
    plan = Plan((), (ShortLine("A", "X", 8, 5),))
    async with tried.database.connection() as connection:
        await store.place(connection, [whole(hold("first", ("A", "X", 2)))])
        ((stock, expiry),) = (await store.look(connection, [("A", "X")])).values()
        if meanwhile == "moved":
            await store.place(connection, [whole(hold("between", ("A", "X", 1)))])
        until = datetime(2020, 1, 1, tzinfo=UTC) if meanwhile == "expired" else expiry
        before = await tried.dump()
        plans = [(refused, plan), whole(hold("beside", ("A", "Y", 1)))]
        if meanwhile == "nothing":
            stocks, _ = await store.place(connection, plans, [stock], until)
            assert (stocks["A", "X"], stocks["A", "Y"].held) == (stock, 1)
            (a, b) = (await store.read_holds(connection, [("A", "refused"), ("B", "refused")]))["refused"]
            assert (a.quantity, a.held, a.expires_at - a.created_at) == (0, 0, refused.ttl)
            assert (a.short_lines, b.short_lines) == (plan.short_lines, ())
        else:
            with pytest.raises(asyncpg.DivisionByZeroError):
                await store.place(connection, plans, [stock], until)
            assert await tried.dump() == before


@BOTH
@pytest.mark.parametrize(
    ("meanwhile", "asking"),
    [("sold", Kind.COMMIT), ("extended", Kind.COMMIT), ("expired", Kind.COMMIT), ("nothing", Kind.EXPIRE)],
)
async def test_a_change_decided_from_a_row_that_is_no_longer_so_is_undone(
    tried: Tried, meanwhile: str, asking: Kind
) -> None:
    """A hold row with other units or expiry than was read, or whose time has come, or has not: nothing is written."""
    await stocked(tried)
    asked = dataclasses.replace(hold("h", ("A", "X", 3)), ttl=timedelta(seconds=0 if meanwhile == "expired" else 60))
    wanted = change("h", asking, ("A", "", 2), request_id="c")
    async with tried.database.connection() as connection:
        await store.place(connection, [whole(asked)])
        (row,) = (await store.read_holds(connection, [("A", "h")]))["h"]
        if meanwhile == "sold":
            gone = dataclasses.replace(row, held=row.held - 1, released=1)
            await store.save_holds(connection, [row], [gone])
        if meanwhile == "extended":
            later = dataclasses.replace(row, expires_at=row.expires_at + timedelta(seconds=9))
            await store.save_holds(connection, [row], [later])
        before = await tried.dump()
        with pytest.raises(asyncpg.DivisionByZeroError):
            await store.change(connection, [(wanted, [(row, 2)], (), row.expires_at)])
    assert await tried.dump() == before


@BOTH
async def test_hold_rows_are_saved_over_what_was_read(tried: Tried) -> None:
    """Those that changed, and none of which other units are held than were read."""
    await stocked(tried)
    async with tried.database.connection() as connection:
        await store.place(connection, [whole(hold("h", ("A", "X", 3), ("A", "Y", 2)))])
        first, second = (await store.read_holds(connection, [("A", "h")]))["h"]
        gone = dataclasses.replace(first, held=1, released=2)
        await store.save_holds(connection, [first, second], [second, gone])
        assert (await store.read_holds(connection, [("A", "h")]))["h"] == [gone, second]
        with pytest.raises(AssertionError):
            await store.save_holds(connection, [first], [dataclasses.replace(first, held=0, expired=3)])
        assert (await store.read_holds(connection, [("A", "h")]))["h"] == [gone, second]


@BOTH
async def test_a_row_that_was_rolled_back_is_as_before(tried: Tried) -> None:
    """Who waited goes on as if the first had never been."""
    await stocked(tried)
    async with tried.database.connection() as first, tried.database.connection() as second:
        held = first.transaction()
        await held.__aenter__()
        await store.place(first, [whole(hold("h1", ("A", "X", 5)))])
        waiting = asyncio.ensure_future(store.place(second, [whole(hold("h1", ("A", "X", 3)))]))
        await tried.blocked(waiting)
        await held.__aexit__(Refusal, None, None)
        stocks, _ = await waiting
    assert (stocks["A", "X"].held, stocks["A", "X"].version) == (3, 2)


@BOTH
async def test_two_that_insert_one_key_wait_for_each_other(tried: Tried) -> None:
    """The second fails when the first commits; ON CONFLICT DO NOTHING passes it by."""
    await stocked(tried)
    request = store.Request("A", "same", b"first")
    async with tried.database.connection() as first, tried.database.connection() as second:
        async with first.transaction():
            await store.insert_requests(first, [request])
            await first.execute("UPDATE stock SET held = held WHERE false") if tried.server is None else None
            waiting = asyncio.ensure_future(store.insert_requests(second, [request]))
            await tried.blocked(waiting)
        with pytest.raises(asyncpg.UniqueViolationError):
            await waiting
        assert not await second.fetch(store.INSERT_SKUS, ["A"], [""], [""], [""], [""], [0])


@BOTH
async def test_a_transaction_sees_what_was_committed_before_each_statement(tried: Tried) -> None:
    """READ COMMITTED: not what is under way, but what has come since the transaction began."""
    await stocked(tried)
    async with tried.database.connection() as first, tried.database.connection() as second, second.transaction():
        before = await store.read_stock(second, [("A", "X")])
        async with first.transaction():
            await store.place(first, [whole(hold("h1", ("A", "X", 5)))])
            under_way = await store.read_stock(second, [("A", "X")])
        after = await store.read_stock(second, [("A", "X")])
    assert [seen["A", "X"][0].held for seen in (before, under_way, after)] == [0, 0, 5]


@BOTH
async def test_two_that_wait_for_each_other_are_a_deadlock(tried: Tried) -> None:
    """One is undone, the other goes on."""
    await stocked(tried)
    async with tried.database.connection() as connection:
        if tried.server is None and await distributed(connection):
            pytest.skip("a cluster lets in one of two that write many shards, and then the other")

    async def both(connection: Connection, here: str, there: str, meet: asyncio.Barrier) -> None:
        async with connection.transaction():
            await store.lock(connection, [(here, "X")])
            await meet.wait()
            await store.lock(connection, [(there, "X")])

    meet = asyncio.Barrier(2)
    async with tried.database.connection() as first, tried.database.connection() as second:
        results = await asyncio.gather(
            both(first, "A", "B", meet), both(second, "B", "A", meet), return_exceptions=True
        )
    assert sorted(type(result).__name__ for result in results) == ["DeadlockDetectedError", "NoneType"]


@BOTH
async def test_what_a_constraint_forbids_is_undone_whole(tried: Tried) -> None:
    """More held than there is: the check says no, and nothing of the transaction stays."""
    await stocked(tried)
    before = await tried.dump()

    async def work(connection: Connection) -> None:
        stocks, now = await store.lock(connection, [("A", "X"), ("B", "X")])
        more = {key: dataclasses.replace(stock, held=9, version=9) for key, stock in stocks.items()}
        await store.save(connection, stocks, more, now)

    with pytest.raises(asyncpg.CheckViolationError):
        await tried.database.run(work)
    assert await tried.dump() == before


@BOTH
async def test_two_relays_delete_what_both_have_sent(tried: Tried) -> None:
    """The second waits, and finds nothing left to delete."""
    await stocked(tried)
    async with tried.database.connection() as first, tried.database.connection() as second:
        ids = [group.id for group in await MOVEMENTS.peek(first, 10)]
        async with first.transaction():
            assert affected(await first.execute(MOVEMENTS.delete, ids)) == 1
            waiting = asyncio.ensure_future(second.execute(MOVEMENTS.delete, ids))
            await tried.blocked(waiting)
        assert affected(await waiting) == 0
