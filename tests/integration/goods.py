"""Short ways to set a scene on the inventory database, and what must always be true of it."""

from datetime import timedelta
from uuid import uuid4

from services.inventory.commands import Commands
from services.inventory.domain import (
    Adjustment,
    Allocation,
    Change,
    ChangeLine,
    HoldChange,
    HoldLine,
    HoldRequest,
    Kind,
    Mode,
    Plan,
    sum_lines,
)
from shared.database import Connection, Database


async def put(commands: Commands, sku: str, units: int, location: str = "MAIN", priority: int = 0) -> None:
    """Make SKU and location where they are new, and receive units."""
    async with commands._database.connection() as connection:
        await connection.execute(
            "INSERT INTO location (location, name, priority) VALUES ($1, $1, $2) ON CONFLICT DO NOTHING",
            location,
            priority,
        )
        await connection.execute(
            "INSERT INTO sku (sku, name, category, unit, currency_code, price_micros)"
            " VALUES ($1, $1, '', 'piece', '', 0) ON CONFLICT DO NOTHING",
            sku,
        )
    (answer,) = await commands.adjust([Adjustment(uuid4().hex, sku, location, Change.RECEIVE, units)])
    assert not isinstance(answer, Exception)


async def distributed(connection: Connection) -> bool:
    """Whether the database is spread over a cluster."""
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')"))


def hold(
    hold_id: str,
    *lines: tuple[str, str, int],
    mode: Mode = Mode.ALL,
    ttl_seconds: float = 900,
    minimum: int = 0,
) -> HoldRequest:
    asked = sum_lines(HoldLine(sku, location, units, minimum) for sku, location, units in lines)
    return HoldRequest(hold_id, asked, mode, timedelta(seconds=ttl_seconds), repr((asked, mode)).encode())


def whole(request: HoldRequest) -> tuple[HoldRequest, Plan]:
    """A hold that gets all it asks for, at the locations that it names."""
    return request, Plan(tuple(Allocation(line.sku, line.location, line.quantity) for line in request.lines))


def change(
    hold_id: str, kind: Kind, *lines: tuple[str, str, int], request_id: str = "", ttl_seconds: float = 0
) -> HoldChange:
    parts = tuple(ChangeLine(*line) for line in lines)
    content = repr((kind, parts, ttl_seconds)).encode()
    return HoldChange(hold_id, request_id or uuid4().hex, kind, parts, content, timedelta(seconds=ttl_seconds))


async def assert_sound(database: Database) -> None:
    """Counters equal the ledger, versions have no gap, holds add up, and each movement is in the outbox."""
    async with database.connection() as connection:
        drifts = await connection.fetch(
            """
            SELECT s.sku, s.location FROM stock s
            LEFT JOIN LATERAL (
              SELECT coalesce(sum(on_hand_delta), 0) AS on_hand, coalesce(sum(held_delta), 0) AS held,
                     coalesce(sum(short_delta), 0) AS short, count(*) AS movements,
                     coalesce(max(version), 0) AS version
              FROM movement m WHERE m.sku = s.sku AND m.location = s.location
            ) m ON true
            LEFT JOIN LATERAL (
              SELECT coalesce(sum(h.held), 0) AS held FROM hold h
              WHERE h.sku = s.sku AND h.location = s.location
            ) h ON true
            WHERE (s.on_hand, s.held, s.short) <> (m.on_hand, m.held, m.short) OR s.held <> h.held
               OR s.version <> m.movements OR s.version <> m.version
            """
        )
        assert not drifts
        movements = await connection.fetchval("SELECT count(*) FROM movement")
        events = await connection.fetchval("SELECT coalesce(sum(cardinality(versions)), 0) FROM movement_outbox")
        assert movements == events


async def stock(database: Database, sku: str, location: str = "MAIN") -> tuple[int, int]:
    """(on hand, held)."""
    async with database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT on_hand, held FROM stock WHERE sku = $1 AND location = $2", sku, location
        )
    assert row is not None
    return row["on_hand"], row["held"]
