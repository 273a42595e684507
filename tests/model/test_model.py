"""Reservations against a model of a few lines: the same random calls, on the simulated database and on the real one.

One caller at a time: what stock and reservations come to is then exactly known. Time is the database's: on the
simulated one it is moved on, on the real one a hold's expiry is moved back.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

import pytest
from holdfast.reservation.v1.reservation_pb2 import ListReservationsRequest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr

from services.inventory import store
from services.inventory.cache import Ask as Wanted
from services.inventory.cache import Cache
from services.inventory.commands import Commands as Inventory
from services.inventory.domain import Adjustment, HoldChange, Kind
from services.inventory.domain import Change as StockChange
from services.inventory.domain import ChangeLine as HoldChangeLine
from services.inventory.servicer import ERRORS, Servicer
from services.inventory.settings import Settings
from services.inventory.watch import Watch
from services.reservation import commands
from services.reservation import store as reservation_store
from services.reservation.commands import Commands
from services.reservation.domain import Action, Ask, Change, ChangeLine, Line, Mode
from services.reservation.inventory import Inventory as Client
from services.reservation.servicer import Servicer as ReservationServicer
from services.reservation.settings import Settings as ReservationSettings
from services.reservation.subjects import Subjects
from shared.database import Database
from shared.refusal import Refusal
from tests.model import sim_redis, sim_statements
from tests.model.sim_database import Connection, LocalWire, Pool, Server, Table
from tests.model.sim_loop import SimLoop, run
from tests.model.sim_world import NOWHERE, failed

T = TypeVar("T")
SKUS = ("A", "B")
PLACES = ("X", "Y")
Key = tuple[str, str]
KEYS = tuple((sku, place) for sku in SKUS for place in PLACES)
LONG = 900.0
BRIEF = 1.0  # a life whose end is brought about


@dataclass
class Part:
    """What the model knows of an allocation."""

    held: int
    confirmed: int = 0
    cancelled: int = 0
    expired: int = 0


@dataclass
class Promise:
    """What the model knows of a reservation: its parts by key, and what was asked for."""

    name: str
    lines: tuple[Line, ...]
    mode: Mode
    seconds: float
    parts: dict[Key, Part] = field(default_factory=dict)

    def state(self) -> str:
        parts = self.parts.values()
        for name, state in (("held", "HELD"), ("confirmed", "CONFIRMED"), ("expired", "EXPIRED")):
            if any(getattr(part, name) for part in parts):
                return state
        return "CANCELLED" if self.parts else "REJECTED"


class Direct:
    """A channel that calls a servicer in this process, with real messages."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    def unary_unary(self, path: str, *_: object, **__: object) -> Callable[[Any], Awaitable[Any]]:
        method = getattr(self._servicer, path.rpartition("/")[2])

        async def call(request: Any) -> Any:
            try:
                return await method(type(request).FromString(request.SerializeToString()), Patient())
            except Refusal as refusal:
                raise failed(ERRORS.code(refusal), ERRORS.details(refusal)) from refusal

        return call

    def unary_stream(self, *_: object, **__: object) -> None:
        """Not asked for."""

    stream_unary = stream_stream = unary_stream


class Unhurried(LocalWire):
    """A wire on which each round trip takes a little, so that the clock goes on."""

    async def back(self) -> None:
        await asyncio.sleep(0.000_01)


class Patient:
    """A call's context without a deadline."""

    def time_remaining(self) -> float | None:
        return None


@dataclass
class Services:
    """Both services on two databases, in one process; how they run, and how a hold's time comes."""

    inventory_db: Database
    reservation_db: Database
    redis: sim_redis.Store
    run: Callable[[Awaitable[Any]], Any]
    bring_to_end: Callable[[str], None]

    def __post_init__(self) -> None:
        async def hop() -> None:
            """Redis is close by."""

        client: Any = sim_redis.Client(self.redis, hop)
        self.cache = Cache(self.inventory_db, client, local_seconds=0.05, redis_seconds=2, keys_max=10)
        self.inventory = Inventory(self.inventory_db, self.cache)
        watch = Watch(self.inventory_db, poll_seconds=1, streams_max=1)
        servicer = Servicer(
            Settings(database_dsn="postgresql://nobody@localhost/nothing"),
            self.inventory_db,
            self.inventory,
            self.cache,
            watch,
        )
        channel: Any = Direct(servicer)
        self.reservation = Commands(self.reservation_db, Client(channel), Subjects({"k1": bytes(16)}))


class Shop(RuleBasedStateMachine):
    """The machine: rules are calls, the model is `stock` and the promises in the bundles."""

    make: ClassVar[Callable[[], Services]]
    promises = Bundle("promises")

    def __init__(self) -> None:
        super().__init__()
        self.services = type(self).make()
        self.numbers = count()
        self.on_hand = dict.fromkeys(KEYS, 0)
        self.all: list[Promise] = []
        self.known: dict[tuple[str, str], tuple[Change, Any]] = {}

    def run(self, work: Awaitable[T]) -> T:
        answer: T = self.services.run(work)
        return answer

    def free(self, key: Key) -> int:
        return self.on_hand[key] - sum(one.parts[key].held for one in self.all if key in one.parts)

    # -- rules ------------------------------------------------------------------------------------

    @initialize(units=st.integers(0, 8))
    def open(self, units: int) -> None:
        for key in KEYS:
            self.adjust(key, StockChange.RECEIVE, units + 1)

    @rule(
        target=promises,
        lines=st.lists(
            st.tuples(st.sampled_from(SKUS), st.sampled_from((*PLACES, "")), st.integers(1, 5)), min_size=1, max_size=3
        ),
        mode=st.sampled_from(list(Mode)),
    )
    def reserve(self, lines: list[tuple[str, str, int]], mode: Mode) -> Promise:
        return self._reserve(lines, mode, LONG)

    @rule(
        target=promises,
        sku=st.sampled_from(SKUS),
        place=st.sampled_from((*PLACES, "")),
        units=st.integers(1, 5),
        swept=st.booleans(),
    )
    def reserve_and_let_expire(self, sku: str, place: str, units: int, swept: bool) -> Promise:
        """A hold's time comes: the sweepers book it, or whoever needs its units next reclaims them."""
        promise = self._reserve([(sku, place, units)], Mode.BEST_EFFORT, BRIEF)
        self.services.bring_to_end(promise.name)
        for part in promise.parts.values():
            part.expired, part.held = part.held, 0
        if swept:
            self._sweep()
        return promise

    @rule(promise=promises, kind=st.sampled_from((Action.CONFIRM, Action.CANCEL)))
    def settle_whole(self, promise: Promise, kind: Action) -> None:
        self._change(promise, kind, ())

    @rule(promise=promises, kind=st.sampled_from((Action.CONFIRM, Action.CANCEL)), part=st.data())
    def settle_part(self, promise: Promise, kind: Action, part: st.DataObject) -> None:
        line = part.draw(st.sampled_from(promise.lines))
        self._change(promise, kind, (ChangeLine(line.sku, "", part.draw(st.integers(1, line.quantity + 1))),))

    @rule(promise=promises)
    def extend(self, promise: Promise) -> None:
        change = self._ask(promise, Action.EXTEND, ())
        answer = self._make(change)
        assert isinstance(answer, Refusal) == (promise.state() != "HELD"), answer

    @rule(promise=promises)
    def repeat(self, promise: Promise) -> None:
        """Any earlier request of a reservation, again: its first outcome, and nothing moves."""
        (again,) = self.run(self.services.reservation.reserve([_request(promise)]))
        assert not isinstance(again, Refusal)
        assert again[1], "it was known"
        for (name, _), (change, first) in self.known.items():
            if name == promise.name:
                answer = self._make(change)
                assert isinstance(answer, Refusal) == isinstance(first, Refusal)
                assert not isinstance(first, Refusal) or answer == first

    @rule(promise=promises)
    def reuse(self, promise: Promise) -> None:
        """Other content under a reservation's id is refused, and what it held is given back."""
        request = _request(promise, Line("A", "", 7))
        (answer,) = self.run(self.services.reservation.reserve([request]))
        assert isinstance(answer, Refusal)
        assert answer.reason == "REQUEST_ID_REUSED"

    @rule(key=st.sampled_from(KEYS), units=st.integers(1, 6))
    def restock(self, key: Key, units: int) -> None:
        self.adjust(key, StockChange.RECEIVE, units)

    @rule(sku=st.sampled_from(SKUS), here=st.sampled_from(PLACES), units=st.integers(1, 6))
    def transfer(self, sku: str, here: str, units: int) -> None:
        there = PLACES[1 - PLACES.index(here)]
        self._sweep()
        fits = units <= self.free((sku, here))
        answer = self.adjust((sku, here), StockChange.TRANSFER, units, there)
        assert isinstance(answer, Refusal) != fits, answer

    @rule()
    def wipe_cache(self) -> None:
        self.services.redis.wipe()

    @rule(key=st.sampled_from(KEYS))
    def read(self, key: Key) -> None:
        """What a reader who knows the newest version is told is what the model says."""
        version = self._stocks()[key].version
        (seen,) = self.run(self.services.cache.read([Wanted(key, version)]))
        assert not isinstance(seen, Refusal)
        assert seen.stock.on_hand == self.on_hand[key]

    @invariant()
    def agree(self) -> None:
        """On hand as the model has it; held as its promises come to, but for what has expired and was not swept."""
        stocks = self._stocks()
        for key, stock in stocks.items():
            assert stock.on_hand == self.on_hand[key], key
            held = self.on_hand[key] - self.free(key)
            unswept = sum(one.parts[key].expired for one in self.all if key in one.parts)
            assert held <= stock.held <= held + unswept, key
            assert 0 <= stock.held <= stock.on_hand, key

    def teardown(self) -> None:
        """When all is swept, both services have every reservation as the model has it, and nothing drifts."""
        if not self.all:
            return
        self._sweep()
        names = [one.name for one in self.all]
        found = self.run(_read_reservations(self.services.reservation_db, names))
        for one in self.all:
            parts = {(p.sku, p.location): Part(p.held, p.confirmed, p.cancelled, p.expired) for p in found[one.name]}
            assert parts == one.parts, one
        assert self.run(self.services.inventory.reconcile()) == (0, [])

    # -- how --------------------------------------------------------------------------------------

    def adjust(self, key: Key, kind: StockChange, units: int, there: str = "") -> Any:
        ask = Adjustment(f"a{next(self.numbers)}-{uuid4().hex}", *key, kind, units, to_location=there)
        (answer,) = self.run(self.services.inventory.adjust([ask]))
        (again,) = self.run(self.services.inventory.adjust([ask]))
        assert answer == again
        if not isinstance(answer, Refusal):
            self.on_hand[key] += -units if there else units
            if there:
                self.on_hand[key[0], there] += units
        return answer

    def _reserve(self, lines: Sequence[tuple[str, str, int]], mode: Mode, seconds: float) -> Promise:
        asked = tuple(Line(*line, minimum=int(mode is Mode.MINIMUM)) for line in lines)
        promise = Promise(f"p{next(self.numbers)}-{uuid4().hex}", asked, mode, seconds)
        before = {key: self.free(key) for key in KEYS}
        (answer,) = self.run(self.services.reservation.reserve([_request(promise)]))
        assert not isinstance(answer, Refusal), answer
        promise.parts = {(p.sku, p.location): Part(p.held) for p in answer[0].allocations}
        self.all.append(promise)
        got = {sku: sum(part.held for key, part in promise.parts.items() if key[0] == sku) for sku in SKUS}
        wanted = {sku: sum(line.quantity for line in asked if line.sku == sku) for sku in SKUS}
        assert all(part.held <= before[key] for key, part in promise.parts.items()), "more than was free"
        for place in PLACES:
            named = sum(line.quantity for line in asked if line.location == place)
            assert (
                not promise.parts
                or named == 0
                or mode is not Mode.ALL
                or named <= sum(part.held for key, part in promise.parts.items() if key[1] == place)
            ), "not where it was asked for"
        if mode is Mode.ALL:
            assert got in (wanted, dict.fromkeys(SKUS, 0))
            assert bool(promise.parts) == _fits(asked, before)
        else:
            assert all(got[sku] <= wanted[sku] for sku in SKUS)
        if mode is Mode.BEST_EFFORT:
            could = any(sum(before[k] for k in _keys(line)) for line in asked)
            assert bool(promise.parts) == could
        return promise

    def _ask(self, promise: Promise, action: Action, lines: tuple[ChangeLine, ...]) -> Change:
        ttl = timedelta(seconds=LONG if action is Action.EXTEND else 0)
        return Change(promise.name, f"c{next(self.numbers)}", action, lines, ttl, repr((action, lines)).encode())

    def _make(self, change: Change) -> Any:
        (answer,) = self.run(self.services.reservation.change([change]))
        self.known.setdefault((change.reservation_id, change.request_id), (change, answer))
        return answer

    def _change(self, promise: Promise, action: Action, lines: tuple[ChangeLine, ...]) -> None:
        """Confirm or cancel; the model takes units from the parts in the order of their places."""
        wanted = {line.sku: line.quantity for line in lines} or {
            sku: sum(part.held for key, part in promise.parts.items() if key[0] == sku) for sku in SKUS
        }
        held = {sku: sum(part.held for key, part in promise.parts.items() if key[0] == sku) for sku in wanted}
        may = promise.state() == "HELD" and all(0 < wanted[sku] <= held[sku] for sku in wanted if lines or held[sku])
        answer = self._make(self._ask(promise, action, lines))
        assert isinstance(answer, Refusal) != may, answer
        if not may:
            return
        for key in sorted(promise.parts):
            part = promise.parts[key]
            units = min(wanted.get(key[0], 0), part.held)
            wanted[key[0]] = wanted.get(key[0], 0) - units
            part.held -= units
            if action is Action.CONFIRM:
                part.confirmed += units
                self.on_hand[key] -= units
            else:
                part.cancelled += units
        assert answer[0].state.value == promise.state()

    def _sweep(self) -> None:
        self.run(self.services.inventory.sweep())
        self.run(self.services.reservation.expire())

    def _stocks(self) -> dict[Key, Any]:
        async def read() -> dict[Key, Any]:
            async with self.services.inventory_db.connection() as connection:
                return {key: stock for key, (stock, _) in (await store.read_stock(connection, KEYS)).items()}

        return self.run(read())


async def _read_reservations(database: Database, names: Sequence[str]) -> dict[str, Any]:
    async with database.connection() as connection:
        return {name: one.allocations for name, one in (await reservation_store.read(connection, names)).items()}


def _request(promise: Promise, *lines: Line) -> Ask:
    asked = lines or promise.lines
    return Ask(promise.name, "", asked, promise.mode, timedelta(seconds=promise.seconds), repr(asked).encode())


def _keys(line: Line) -> list[Key]:
    return [(line.sku, place) for place in PLACES if line.location in {"", place}]


def _fits(lines: Sequence[Line], free: dict[Key, int]) -> bool:
    """Whether all lines can be met: those with a place there, the others from what is left."""
    left = dict(free)
    for line in lines:
        if line.location:
            left[line.sku, line.location] -= line.quantity
    if min(left.values()) < 0:
        return False
    return all(
        sum(line.quantity for line in lines if line.sku == sku and not line.location)
        <= sum(left[sku, place] for place in PLACES)
        for sku in SKUS
    )


CATALOGUE = store.split([(sku, sku, "", "piece", "", 0) for sku in SKUS])


async def _open(inventory: Database) -> None:
    async with inventory.connection() as connection:
        for priority, place in enumerate(PLACES):
            await connection.fetch(store.INSERT_LOCATION, place, place, priority)
        await connection.fetch(store.INSERT_SKUS, *CATALOGUE)


def _run(shop: type[Shop], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        shop,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def _simulated(loop: SimLoop) -> Services:
    """Both services on simulated databases."""

    def database(tables: Sequence[Table]) -> Database:
        server = Server(tables, lambda: datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=loop.time()), uuid4)
        pool: Any = Pool(lambda: Connection(server, sim_statements.statement, Unhurried()))
        return Database(pool)

    def wait(_name: str) -> None:
        loop.run_until_complete(asyncio.sleep(2 * BRIEF))

    inventory, reservation = database(sim_statements.INVENTORY), database(sim_statements.RESERVATION)
    loop.run_until_complete(_open(inventory))
    return Services(inventory, reservation, sim_redis.Store(loop.time), loop.run_until_complete, wait)


def test_reservations_are_as_the_model_says_on_the_simulated_database() -> None:
    """Any sequence of calls: stock and reservations are what a few lines say they are."""
    loop = SimLoop(0)

    class Simulated(Shop):
        @staticmethod
        def make() -> Services:
            return _simulated(loop)

    _run(Simulated, examples=60, steps=25)
    run(loop, asyncio.sleep(1))


@pytest.fixture
async def loop() -> asyncio.AbstractEventLoop:
    """The loop that the databases live on."""
    return asyncio.get_running_loop()


def test_reservations_are_as_the_model_says_on_the_real_database(
    loop: asyncio.AbstractEventLoop, inventory_db: Database, reservation_db: Database
) -> None:
    """The same machine, on PostgreSQL."""

    async def clear() -> None:
        for database, tables in (
            (inventory_db, sim_statements.INVENTORY),
            (reservation_db, sim_statements.RESERVATION),
        ):
            async with database.connection() as connection:
                await connection.execute(f"TRUNCATE {', '.join(table.name for table in tables)} CASCADE")
        await _open(inventory_db)

    async def bring_to_end(name: str) -> None:
        for database, statement in (
            (inventory_db, "UPDATE hold SET expires_at = statement_timestamp() WHERE hold_id = $1"),
            (reservation_db, "UPDATE reservation SET expires_at = statement_timestamp() WHERE reservation_id = $1"),
        ):
            async with database.connection() as connection:
                await connection.execute(statement, name)

    class Real(Shop):
        @staticmethod
        def make() -> Services:
            loop.run_until_complete(clear())
            redis = sim_redis.Store(time.monotonic)
            do = loop.run_until_complete
            return Services(inventory_db, reservation_db, redis, do, lambda name: do(bring_to_end(name)))

    _run(Real, examples=15, steps=20)


# -- what one caller at a time does not come to -----------------------------------------------------


@pytest.fixture
def services() -> Iterator[Services]:
    """Both services on simulated databases, with a hundred units everywhere."""
    loop = SimLoop(0)
    made = _simulated(loop)
    asks = [Adjustment(f"opening {sku} {at}", sku, at, StockChange.RECEIVE, 100) for sku, at in KEYS]
    made.run(made.inventory.adjust(asks))
    yield made
    run(loop, asyncio.sleep(1))


def _asked(name: str, *lines: Line, seconds: float = LONG) -> Ask:
    asked = lines or (Line("A", "X", 1),)
    return Ask(name, "", asked, Mode.ALL, timedelta(seconds=seconds), repr(asked).encode())


@pytest.mark.parametrize(("due_max", "rows_max"), [(2, 100), (100, 3)])
def test_what_is_due_and_does_not_end_keeps_back_nothing_younger(
    services: Services, monkeypatch: pytest.MonkeyPatch, due_max: int, rows_max: int
) -> None:
    """As of a database that was restored from an older backup, whose holds inventory has sold meanwhile."""
    monkeypatch.setattr(commands, "EXPIRE_MAX", due_max)
    monkeypatch.setattr(reservation_store, "READ_ROWS_MAX", rows_max)
    stuck, younger = [f"stuck-{number}" for number in range(5)], ["younger-0", "younger-1"]
    services.run(services.reservation.reserve([_asked(name, seconds=BRIEF) for name in stuck]))
    sold = [HoldChange(name, "sold", Kind.COMMIT, (HoldChangeLine("A", "", 0),), b"") for name in stuck]
    services.run(services.inventory.change(sold))
    services.bring_to_end("")
    for name in younger:
        services.run(services.reservation.reserve([_asked(name, seconds=BRIEF)]))
        services.bring_to_end(name)
        ended = [services.run(services.reservation.expire()) for _ in range(7)]
        assert sum(ended) == 1, name
    found = services.run(_read_reservations(services.reservation_db, [*stuck, *younger]))
    assert [found[name][0].expired for name in younger] == [1, 1]
    assert {found[name][0].held for name in stuck} == {1}


def test_other_content_at_once_is_not_told_why_the_first_was_refused(services: Services) -> None:
    """But that the id is used twice; as nothing is kept of the first, it may be used again later."""
    first, second = _asked("a", Line("nowhere", "", 1)), _asked("a")
    told = services.run(services.reservation.reserve([first, second, first]))
    assert [one.reason for one in told] == ["SKU_NOT_FOUND", "REQUEST_ID_REUSED", "SKU_NOT_FOUND"]
    (later,) = services.run(services.reservation.reserve([second]))
    assert not isinstance(later, Refusal)


@pytest.mark.parametrize("apart", [False, True])
def test_who_comes_second_is_told_what_the_first_made_of_it(
    services: Services, monkeypatch: pytest.MonkeyPatch, *, apart: bool
) -> None:
    """Two that confirm all of it at once, in one batch or on two pods: the refusal has the state that it then has."""
    services.run(services.reservation.reserve([_asked("a")]))
    first, second = (Change("a", name, Action.CONFIRM, (), timedelta(), b"") for name in ("first", "second"))
    if apart:
        inventory = services.reservation._inventory
        other = Commands(services.reservation_db, inventory, Subjects({"k1": bytes(16)}))
        ask = inventory.change

        async def overtaken(changes: Any) -> Any:
            monkeypatch.setattr(inventory, "change", ask)
            await other.change([first])
            return await ask(changes)

        monkeypatch.setattr(inventory, "change", overtaken)
    told = services.run(services.reservation.change([second] if apart else [first, second]))
    again = services.run(services.reservation.change([first, second]))
    (refusal,) = [one for one in told if isinstance(one, Refusal)]
    assert [one for one in again if isinstance(one, Refusal)] == [refusal]
    assert refusal.reason == "RESERVATION_NOT_HELD"
    assert refusal.metadata == {"reservation_id": "a", "state": "CONFIRMED"}


def test_changes_of_large_reservations_are_driven_on_in_turns(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at once as may be read; none is left out."""
    changes = [Change(name, "sold", Action.CONFIRM, (), timedelta(), b"") for name in ("a", "b")]
    services.run(services.reservation.reserve([_asked("a"), _asked("b")]))

    async def dies(*_: object) -> None:
        raise ArithmeticError

    with monkeypatch.context() as patch:
        patch.setattr(services.reservation, "_book", dies)
        with pytest.raises(ArithmeticError):
            services.run(services.reservation.change(changes))
    monkeypatch.setattr(reservation_store, "READ_ROWS_MAX", 3)
    assert [services.run(services.reservation.drive_on(0)) for _ in range(3)] == [1, 1, 0]
    found = services.run(_read_reservations(services.reservation_db, ["a", "b"]))
    assert [part.confirmed for parts in found.values() for part in parts] == [1, 1]


async def test_a_page_of_large_reservations_is_shorter(
    inventory_db: Database, reservation_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All come, over as many pages as they need; one that is larger than a page may be has a page to itself."""
    await _open(inventory_db)
    do = asyncio.get_running_loop().run_until_complete
    services = Services(inventory_db, reservation_db, sim_redis.Store(time.monotonic), do, lambda _: None)
    opening = [Adjustment(f"opening {sku} {at}", sku, at, StockChange.RECEIVE, 100) for sku, at in KEYS]
    await services.inventory.adjust(opening)
    for number, lines in enumerate((3, 3, 9, 1, 1, 3, 3)):
        asks = [_asked(f"{number}", *[Line("A", "X", 1)] * lines)]
        assert not isinstance((await services.reservation.reserve(asks))[0], Refusal)
    monkeypatch.setattr(reservation_store, "READ_MAX", 2)
    monkeypatch.setattr(reservation_store, "READ_ROWS_MAX", 8)
    edge = ReservationServicer(
        ReservationSettings(database_dsn=NOWHERE, inventory_target="", subject_keys=SecretStr("k1=" + "A" * 24)),
        reservation_db,
        services.reservation,
        Subjects({"k1": bytes(16)}),
    )
    request, sizes, listed = ListReservationsRequest(page_size=3), [], []
    while True:
        page = await edge.ListReservations(request, Patient())  # type: ignore[arg-type] # it asks for no deadline
        sizes.append(len(page.reservations))
        listed += [one.reservation_id for one in page.reservations]
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    assert listed == list("6543210")
    assert sizes == [2, 2, 1, 2]
