"""Adjustments on the real database: atomic each, once each, and never against what is held."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from holdfast.inventory.v1 import inventory_pb2 as ip

from services.inventory import catalogue, store
from services.inventory.cache import Cache
from services.inventory.catalogue import Catalogue
from services.inventory.commands import Commands
from services.inventory.domain import Adjustment, Change, ImportRow
from services.inventory.servicer import Servicer
from services.inventory.settings import Settings
from services.inventory.watch import Watch
from shared.database import Database
from shared.refusal import Refusal
from tests.integration.goods import assert_sound, hold, put, stock


def ask(change: Change, quantity: int, **more: object) -> Adjustment:
    content = repr((change, quantity, more)).encode()
    base = Adjustment(uuid4().hex, "A", "MAIN", change, quantity, fingerprint=content)
    return replace(base, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("adjustment", "on_hand"),
    [
        (ask(Change.RECEIVE, 5), 15),
        (ask(Change.RETURN, 5), 15),
        (ask(Change.SHIP, 4), 6),
        (ask(Change.DAMAGE, 4), 6),
        (ask(Change.COUNT, 7), 7),
        (ask(Change.COUNT, -3, relative=True), 7),
        (ask(Change.SHIP, 5), "INSUFFICIENT_STOCK"),
        (ask(Change.DAMAGE, 5), "BELOW_HELD"),
        (ask(Change.COUNT, 5), "BELOW_HELD"),
        (ask(Change.COUNT, -11, relative=True, allow_short=True), "BELOW_HELD"),
        (ask(Change.RECEIVE, 1, expected_version=7), "VERSION_MISMATCH"),
        (ask(Change.RECEIVE, 10**12), "QUANTITY_OUT_OF_RANGE"),
    ],
    ids=str,
)
async def test_ten_units_of_which_six_are_held(
    commands: Commands, inventory_db: Database, adjustment: Adjustment, on_hand: int | str
) -> None:
    """What each adjustment makes of ten units on hand, six of them held; and again by the same id."""
    await put(commands, "A", 10)
    await commands.place([hold("h", ("A", "MAIN", 6))])
    (first,) = await commands.adjust([adjustment])
    (again,) = await commands.adjust([adjustment])
    assert first == again
    if isinstance(on_hand, int):
        assert isinstance(first, ip.AdjustStockResponse)
        assert await stock(inventory_db, "A") == (on_hand, 6)
    else:
        assert isinstance(first, Refusal)
        assert first.reason == on_hand
        assert await stock(inventory_db, "A") == (10, 6)
    await assert_sound(inventory_db)


async def test_a_refusal_is_remembered(commands: Commands, inventory_db: Database) -> None:
    """A repeat is refused as it was, whatever could be done by now."""
    await put(commands, "A", 5)
    adjustment = ask(Change.SHIP, 8)
    (first,) = await commands.adjust([adjustment])
    await put(commands, "A", 10)
    (again,) = await commands.adjust([adjustment])
    assert isinstance(again, Refusal)
    assert again == first
    assert again.metadata["available"] == "5"
    assert await stock(inventory_db, "A") == (15, 0)


async def test_a_count_may_record_a_shortage_that_heals(commands: Commands, inventory_db: Database) -> None:
    """With allow_short missing goods are recorded; what comes in later makes them up."""
    await put(commands, "A", 10)
    await commands.place([hold("h", ("A", "MAIN", 6))])
    (counted,) = await commands.adjust([ask(Change.COUNT, 4, allow_short=True)])
    assert isinstance(counted, ip.AdjustStockResponse)
    assert (counted.stocks[0].short, counted.stocks[0].available) == (2, 0)
    (received,) = await commands.adjust([ask(Change.RECEIVE, 5)])
    assert isinstance(received, ip.AdjustStockResponse)
    assert (received.stocks[0].short, received.stocks[0].available) == (0, 3)
    await assert_sound(inventory_db)


async def test_a_transfer_moves_units_in_one_step(commands: Commands, inventory_db: Database) -> None:
    """Concurrent transfers in both directions lose nothing and do not deadlock."""
    await put(commands, "A", 100)
    await put(commands, "A", 100, "SHOP")
    there, back = {"location": "MAIN", "to_location": "SHOP"}, {"location": "SHOP", "to_location": "MAIN"}
    answers = await asyncio.gather(
        *(commands.adjust([ask(Change.TRANSFER, 1 + n % 3, **(there if n % 2 else back))]) for n in range(60))
    )
    assert all(isinstance(answer, ip.AdjustStockResponse) for (answer,) in answers)
    assert sum([(await stock(inventory_db, "A", at))[0] for at in ("MAIN", "SHOP")]) == 200
    await assert_sound(inventory_db)


async def test_one_adjustment_at_once_everywhere_is_one(commands: Commands, inventory_db: Database) -> None:
    """The same receipt twenty times at once, of a SKU without stock yet, is received once."""
    await put(commands, "B", 0)
    receipt = replace(ask(Change.RECEIVE, 5), sku="B")
    answers = await asyncio.gather(*(commands.adjust([receipt]) for _ in range(20)))
    assert len({repr(answer) for answer in answers}) == 1
    assert (await stock(inventory_db, "B"))[0] == 5
    (other,) = await commands.adjust([replace(receipt, quantity=6, fingerprint=b"other")])
    assert isinstance(other, Refusal)
    assert other.reason == "REQUEST_ID_REUSED"


async def test_a_refused_one_does_not_undo_the_others(commands: Commands, inventory_db: Database) -> None:
    """A batch is answered one by one, in its order."""
    await put(commands, "A", 1)
    answers = await commands.adjust(
        [
            ask(Change.SHIP, 1),
            ask(Change.SHIP, 1),
            replace(ask(Change.RECEIVE, 1), sku="nowhere"),
            ask(Change.RECEIVE, 3),
        ]
    )
    reasons = [answer.reason if isinstance(answer, Refusal) else "" for answer in answers]
    assert reasons == ["", "INSUFFICIENT_STOCK", "SKU_NOT_FOUND", ""]
    assert await stock(inventory_db, "A") == (3, 0)
    await assert_sound(inventory_db)


async def test_policy_keeps_safety_stock_and_allows_backorders(commands: Commands) -> None:
    """Holds leave safety stock alone and may go into the backorder limit; it cannot be cut below them."""
    await put(commands, "A", 10)
    (set_,) = await commands.adjust([ask(Change.POLICY, 0, safety_stock=4)])
    assert isinstance(set_, ip.AdjustStockResponse)
    assert set_.stocks[0].available == 6
    await commands.adjust([ask(Change.POLICY, 0, backorder_limit=5)])
    (placed,) = await commands.place([hold("h", ("A", "MAIN", 14))])
    assert not isinstance(placed, Refusal)
    assert placed.allocations
    (cut,) = await commands.adjust([ask(Change.POLICY, 0, backorder_limit=3)])
    assert isinstance(cut, Refusal)
    assert cut.reason == "BELOW_HELD"


async def test_one_id_at_once_on_different_keys_is_one_adjustment(commands: Commands, inventory_db: Database) -> None:
    """Nothing that both would lock stands between them: one is applied, the other is the named error."""
    for location in ("X", "Y"):
        await put(commands, "A", 0, location)
    for n in range(20):
        receipt = ask(Change.RECEIVE, 1)
        answers = await asyncio.gather(
            *(
                commands.adjust([replace(receipt, request_id=f"r{n}", location=at, fingerprint=at.encode())])
                for at in ("X", "Y")
            )
        )
        reasons = [answer.reason if isinstance(answer, Refusal) else "" for (answer,) in answers]
        assert sorted(reasons) == ["", "REQUEST_ID_REUSED"]
    await assert_sound(inventory_db)


async def test_archived_goods_leave_for_places_that_take_them(commands: Commands, inventory_db: Database) -> None:
    """They go nowhere that is unknown or archived, and what else was asked at the same time is done."""
    await put(commands, "A", 10)
    await put(commands, "B", 10, "CLOSED")
    async with inventory_db.connection() as connection:
        await connection.execute("UPDATE sku SET active = false WHERE sku = 'A'")
        await connection.execute("UPDATE stock SET active = false WHERE sku = 'A'")
        await connection.execute("UPDATE location SET active = false WHERE location = 'CLOSED'")
    answers = await commands.adjust(
        [
            ask(Change.COUNT, 3, location="NOPE"),
            ask(Change.TRANSFER, 3, to_location="NOPE"),
            ask(Change.TRANSFER, 3, to_location="CLOSED"),
            ask(Change.SHIP, 3),
        ]
    )
    reasons = [answer.reason if isinstance(answer, Refusal) else "" for answer in answers]
    assert reasons == ["LOCATION_NOT_FOUND", "LOCATION_NOT_FOUND", "LOCATION_ARCHIVED", ""]
    assert await stock(inventory_db, "A") == (7, 0)


async def test_stock_made_while_its_sku_is_archived_is_closed(commands: Commands, inventory_db: Database) -> None:
    """Goods that come to a new place just then are not received."""
    await put(commands, "A", 10)
    await put(commands, "B", 10, "NEW")
    async with inventory_db.connection() as connection, connection.transaction():
        await connection.fetchrow(store.LOCK_SKU, "A")
        await connection.execute("UPDATE sku SET active = false WHERE sku = 'A'")
        await connection.execute(store.CLOSE_STOCK_OF_SKU, "A")
        receiving = asyncio.ensure_future(commands.adjust([ask(Change.RECEIVE, 5, location="NEW")]))
        await asyncio.wait([receiving], timeout=0.5)
    (answer,) = await receiving
    assert isinstance(answer, Refusal)
    assert answer.reason == "SKU_ARCHIVED"
    async with inventory_db.connection() as connection:
        assert not await connection.fetchval("SELECT bool_or(active) FROM stock WHERE sku = 'A'")


def row(number: int, sku: str, quantity: int = 1) -> ImportRow:
    content = repr((number, sku, quantity)).encode()
    return ImportRow(number, (sku, sku, "", "piece", "", 0), "MAIN", quantity, 0, 0, content)


async def test_an_import_whose_rows_have_moved_on_is_found_out(commands: Commands, inventory_db: Database) -> None:
    """Without its first row each number stands for another SKU: all of them are bad, but for one that is new."""
    await put(commands, "A", 0)
    imports = Catalogue(inventory_db, commands)
    skus = ["A", "B", "C", "D"]
    rows = [row(n, sku) for n, sku in enumerate(skus, 1)]
    assert await imports.import_rows("R", rows) == (4, 0)
    shifted = [*(row(n, sku) for n, sku in enumerate(skus[1:], 1)), row(5, "E")]
    errors = await imports.check_import("R", shifted)
    assert [(number, refusal.reason) for number, refusal in errors] == [(n, "REQUEST_ID_REUSED") for n in (1, 2, 3)]
    with pytest.raises(Refusal):
        await imports.import_rows("R", shifted)
    assert [await stock(inventory_db, sku) for sku in skus] == [(1, 0)] * 4
    assert not await imports.check_import("R", rows)
    assert await imports.import_rows("R", rows) == (0, 4)
    assert not await imports.check_import("other", shifted)
    await assert_sound(inventory_db)


async def test_an_import_of_no_units_makes_a_stock_row_and_tells_of_it(
    commands: Commands, inventory_db: Database
) -> None:
    """By a receipt of nothing, once: the row has a version, and who follows knows of it."""
    await put(commands, "A", 0)
    imports = Catalogue(inventory_db, commands)
    assert await imports.import_rows("R", [row(1, "B", 0)]) == (1, 0)
    assert await imports.import_rows("R", [row(1, "B", 0)]) == (0, 1)
    async with inventory_db.connection() as connection:
        made = await connection.fetch("SELECT version, kind, on_hand_delta FROM movement WHERE sku = 'B'")
    assert [tuple(one) for one in made] == [(1, "RECEIVE", 0)]
    assert await stock(inventory_db, "B") == (0, 0)


async def test_an_import_that_was_interrupted_goes_on(
    commands: Commands, inventory_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever that was; rows that were begun and not applied are, and their numbers stand for them by then."""
    monkeypatch.setattr(catalogue, "IMPORT_CHUNK_ROWS", 2)
    await put(commands, "A", 0)
    imports = Catalogue(inventory_db, commands)
    rows = [row(n, sku) for n, sku in enumerate("ABCDE", 1)]
    adjust = commands.adjust
    asked = 0

    async def interrupted(adjustments: list[Adjustment]) -> object:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise ConnectionError
        return await adjust(adjustments)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "adjust", interrupted)
        with pytest.raises(ConnectionError):
            await imports.import_rows("R", rows)
    assert [number for number, _ in await imports.check_import("R", [row(3, "A"), row(5, "A")])] == [3]
    assert not await imports.check_import("R", rows)
    assert await imports.import_rows("R", rows) == (3, 2)
    assert [await stock(inventory_db, sku) for sku in "ABCDE"] == [(1, 0)] * 5
    await assert_sound(inventory_db)


async def test_an_import_that_an_earlier_release_began_goes_on(commands: Commands, inventory_db: Database) -> None:
    """It has kept what it applied, and no numbers."""
    await put(commands, "A", 0)
    imports = Catalogue(inventory_db, commands)
    await imports.import_rows("R", [row(1, "A")])
    async with inventory_db.connection() as connection:
        await connection.execute("DELETE FROM request WHERE key = 'import R'")
    assert [number for number, _ in await imports.check_import("R", [row(1, "A", 2)])] == [1]
    assert await imports.import_rows("R", [row(1, "A"), row(2, "B")]) == (1, 1)
    assert [number for number, _ in await imports.check_import("R", [row(1, "B")])] == [1]
    assert await stock(inventory_db, "A") == (1, 0)


async def test_so_many_imports_at_once_and_no_more(commands: Commands, cache: Cache, inventory_db: Database) -> None:
    """The next is OVERLOADED before it is read, and has room once one of them is done or has gone."""
    await put(commands, "A", 0)
    settings = Settings(database_dsn="postgresql://unused")
    servicer = Servicer(settings, inventory_db, commands, cache, Watch(inventory_db, poll_seconds=1, streams_max=1))
    go = asyncio.Event()

    async def messages(request_id: str) -> AsyncIterator[ip.ImportStockRequest]:
        yield ip.ImportStockRequest(header=ip.ImportHeader(request_id=request_id))
        await go.wait()
        rows = [ip.ImportRow(row_number=1, sku=ip.Sku(sku=request_id), location="MAIN", quantity=1)]
        yield ip.ImportStockRequest(rows=ip.ImportRows(rows=rows))

    def begin(request_id: str) -> asyncio.Task[ip.ImportStockResponse]:
        context: Any = None
        return asyncio.create_task(servicer.ImportStock(messages(request_id), context))

    first, gone = begin("B"), begin("C")
    with pytest.raises(Refusal) as refused:
        async with asyncio.timeout(5):
            await begin("D")
    assert (refused.value.reason, refused.value.metadata) == ("OVERLOADED", {"queue": "imports", "limit": "2"})
    gone.cancel()
    await asyncio.wait([gone])
    third = begin("D")
    go.set()
    assert [answer.rows_applied for answer in await asyncio.gather(first, third)] == [1, 1]


async def test_two_imports_of_one_id_at_once_are_one(commands: Commands, inventory_db: Database) -> None:
    """Of the same content both are answered, of other content one is refused; each row is applied once."""
    await put(commands, "A", 0)
    imports = Catalogue(inventory_db, commands)
    rows = [row(n, sku) for n, sku in enumerate("ABC", 1)]
    await asyncio.gather(imports.import_rows("R", rows), imports.import_rows("R", rows))
    assert [await stock(inventory_db, sku) for sku in "ABC"] == [(1, 0)] * 3
    answers = await asyncio.gather(*(imports.import_rows("S", [row(1, sku)]) for sku in "DE"), return_exceptions=True)
    (refused,) = [answer for answer in answers if isinstance(answer, Refusal)]
    assert refused.reason == "REQUEST_ID_REUSED"
    async with inventory_db.connection() as connection:
        assert await connection.fetchval("SELECT sum(on_hand) FROM stock WHERE sku IN ('D', 'E')") == 1
    await assert_sound(inventory_db)
