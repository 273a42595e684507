"""A report reads the months that it was asked for, and no other; and counts to the instant."""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest
from holdfast.analytics.v1 import analytics_pb2 as pb

from bench import analytics as history
from services.analytics import reports
from services.analytics.reports import Range, Report, time_range
from services.analytics.store import MONTHLY
from shared import partitions
from shared.database import Database
from shared.refusal import Refusal
from shared.wire import timestamp

MOVEMENTS = 60_000
MAY = Range(datetime(2026, 5, 3, tzinfo=UTC), datetime(2026, 5, 20, tzinfo=UTC), "Europe/London")
SALES = pb.ReportSalesRequest(period=pb.PERIOD_DAY, dimensions=[pb.SALES_DIMENSION_COUNTRY], rollup=True)


@pytest.fixture
async def long(analytics_dsn: str, analytics_db: Database) -> AsyncIterator[Database]:  # noqa: ARG001 - emptied
    """Half a year of history, read as the API reads it."""
    await history.load(analytics_dsn, MOVEMENTS)
    reads = await Database.connect(analytics_dsn, name="test", planner={"jit": "off"})
    yield reads
    await reads.close()


@pytest.mark.parametrize(
    "build",
    [
        lambda: reports.sales(SALES, MAY),
        lambda: reports.top_skus(pb.ReportTopSkusRequest(), MAY),
        lambda: reports.funnel(pb.ReportFunnelRequest(period=pb.PERIOD_DAY), MAY),
        lambda: reports.cover(pb.ReportCoverRequest(), MAY),
        lambda: reports.customers(pb.ReportCustomersRequest(), MAY),
        lambda: reports.returns(pb.ReportReturnsRequest(), MAY),
        lambda: reports.buckets(pb.GetStockHistoryRequest(sku="S1", location="MAIN", bucket=pb.PERIOD_DAY), MAY),
    ],
    ids=["sales", "top_skus", "funnel", "cover", "customers", "returns", "history"],
)
async def test_a_time_range_prunes_the_months_beside_it(long: Database, build: Callable[[], Report]) -> None:
    """Of each table that is cut by time only the month of the range stands in the plan."""
    report = build()
    async with long.connection() as connection:
        rows = await connection.fetch(f"EXPLAIN {report.query}", *report.parameters)
        assert (await report.page(connection, None, 5))[0]
    plan = "\n".join(row[0] for row in rows)
    read = [f"{table}_2026_0{month}" for table in MONTHLY for month in range(1, 7) if f" {table}_2026_0{month}" in plan]
    assert read
    assert all(name.endswith("_05") for name in read), plan


async def test_history_of_a_key_is_read_by_index(long: Database) -> None:
    """However long the ledger, a key's movements are found by its key."""
    report = reports.movements(pb.GetStockHistoryRequest(sku="S1", location="MAIN"), MAY)
    async with long.connection() as connection:
        rows = await connection.fetch(f"EXPLAIN {report.query}", *report.parameters)
    plan = "\n".join(row[0] for row in rows)
    assert "Index" in plan
    assert "Seq Scan" not in plan


@pytest.mark.parametrize("hour", [0, 12])
async def test_averages_end_when_their_range_does(analytics_db: Database, hour: int) -> None:
    """Ten units a day at six in the evening are ten a day, at whatever time of day the range ends."""
    start = datetime(2026, 4, 12, hour, tzinfo=UTC)
    days = [start.replace(hour=18) + timedelta(days=n) for n in range(-1, 29)]
    async with analytics_db.connection() as connection:
        await connection.execute(
            "INSERT INTO stock_view VALUES ('A', 'MAIN', '', '', 70, 0, 0, 0, 0, 70, 0, 0, 0, 0, 0, 0, $1, $1, 1)",
            start,
        )
        for month in (4, 5):
            await partitions.make(connection, "sale", datetime(2026, month, 1, tzinfo=UTC))
        for n, time in enumerate(days):
            await connection.execute(
                "INSERT INTO sale VALUES ('A', $1, $2, 1, 'MAIN', 'GBP', '', '', 10, 0, $1)", time, f"r{n}"
            )
        for zone in ("UTC", "Europe/London"):
            report = reports.cover(pb.ReportCoverRequest(), Range(start, start + timedelta(days=28), zone))
            ((row,), _) = await report.page(connection, None, 5)
            assert (row.sold, row.average_7d, row.average_28d, row.days_of_cover) == (280, 10, 10, 7)


@pytest.mark.parametrize("zone", ["UTC+2", "Nowhere/No", "../UTC", "Europe"])
def test_a_time_zone_has_an_iana_name(zone: str) -> None:
    """PostgreSQL would take some of these, to mean something else; and where nothing is read it would take all."""
    with pytest.raises(Refusal) as refused:
        time_range(pb.TimeRange(start_time=timestamp(MAY.start), time_zone=zone), MAY.end)
    assert (refused.value.reason, refused.value.metadata["field"]) == ("FIELD_INVALID", "range.time_zone")


def test_no_time_zone_is_utc() -> None:
    """And one that is known is itself."""
    for zone, found in (("", "UTC"), ("Europe/London", "Europe/London")):
        assert time_range(pb.TimeRange(start_time=timestamp(MAY.start), time_zone=zone), MAY.end).time_zone == found


async def test_an_order_is_refused_once_for_a_key(analytics_db: Database) -> None:
    """However many of its lines ask for it; their units add up."""
    out = datetime(2026, 5, 4, tzinfo=UTC)
    async with analytics_db.connection() as connection:
        await partitions.make(connection, "refusal", datetime(2026, 5, 1, tzinfo=UTC))
        await connection.execute("INSERT INTO stock_out VALUES ('A', 'MAIN', 3, $1, $2)", out, out + timedelta(days=2))
        for name, location, requested in (("one", "MAIN", 2), ("one", "", 3), ("two", "MAIN", 4)):
            await connection.execute(
                "INSERT INTO refusal (sku, refused_at, reservation_id, location, requested, available)"
                " VALUES ('A', $1::timestamptz + interval '1 hour', $2, $3, $4, 1)",
                out, name, location, requested,
            )  # fmt: skip
        ((row,), _) = await reports.stock_outs(pb.ReportStockOutsRequest(), MAY).page(connection, None, 5)
    assert (row.refusals, row.refused_units) == (2, 6)
