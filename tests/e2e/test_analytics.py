"""Analytics through two pods of each service, as an analyst sees it."""

import asyncio
import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from holdfast.analytics.v1 import analytics_pb2 as ap
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.analysis import caught_up
from shared.client import Holdfast
from shared.refusal import Refusal
from tests.e2e.shop import goods, new, stock, view

LINE = rp.ReservationLine
YEAR = datetime(2020, 1, 1, tzinfo=UTC)
ATTEMPTS_MAX = 5


def at(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def span(start: datetime, end: datetime | None = None, zone: str = "") -> ap.TimeRange:
    return ap.TimeRange(start_time=at(start), end_time=at(end) if end else None, time_zone=zone)


def money(pounds: float) -> rp.Money:
    return rp.Money(currency_code="GBP", micros=round(pounds * 1_000_000))


async def reserve(holdfast: Holdfast, lines: list[rp.ReservationLine], **more: Any) -> str:
    """Reserve and confirm; the reservation's id."""
    name = new("order")
    request = rp.ReserveRequest(reservation_id=name, lines=lines, **more)
    answer = await holdfast._call(holdfast.reservation.Reserve(request))
    if answer.outcome == rp.RESERVE_OUTCOME_HELD:
        await holdfast.confirm(name, f"{name}-paid")
    return name


async def test_the_stock_view_follows_with_read_your_writes(holdfast: Holdfast) -> None:
    """A row has name, counters, sums of sales and returns, and the version that was waited for."""
    sku = await goods(holdfast, 20)
    await reserve(holdfast, [LINE(sku=sku, location="MAIN", quantity=4)])
    await holdfast.reserve(new(), [(sku, "MAIN", 3)])
    done = await holdfast.adjust(new(), sku, "MAIN", ip.ADJUSTMENT_REASON_RETURN, 1)
    row = await view(holdfast, sku, done.stocks[0].version)
    assert (row.name, row.on_hand, row.held, row.available) == ("Lantern", 17, 3, 14)
    assert (row.sold_24h, row.sold_7d, row.sold_30d) == (4, 4, 4)
    assert (row.returned_24h, row.returned_30d) == (1, 1)
    assert (row.daily_demand, row.days_of_cover) == (4, 3.5)
    assert row.version == done.stocks[0].version


async def test_a_view_that_does_not_come_is_told(holdfast: Holdfast) -> None:
    """A version from the future is NOT_CAUGHT_UP, within the caller's time."""
    sku = await goods(holdfast, 1)
    request = ap.ListStockViewRequest(min_versions=[ap.SeenVersion(sku=sku, location="MAIN", version=99)])
    for _ in range(ATTEMPTS_MAX):
        with pytest.raises((Refusal, grpc.aio.AioRpcError)) as ended:
            await holdfast._call(holdfast.analytics.ListStockView(request, timeout=0.5))
        refused = ended.value
        if isinstance(refused, Refusal):
            break
        assert isinstance(refused, grpc.aio.AioRpcError)
        # The machine stood still for longer than the servicer's margin.
        assert refused.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(refused, Refusal)
    assert refused.reason == "NOT_CAUGHT_UP"
    assert refused.metadata == {"sku": sku, "location": "MAIN", "version": "99"}


async def test_the_view_is_filtered_sorted_and_paged(holdfast: Holdfast) -> None:
    """Below a level, by what is available, a row a page; a token of other filters is refused."""
    prefix = new("P")
    rows = [
        ip.ImportRow(row_number=n, sku=ip.Sku(sku=f"{prefix}-{n}"), location="MAIN", quantity=9 - n) for n in (1, 2, 3)
    ]
    await goods(holdfast, 1)
    await holdfast.import_stock(new(), rows)
    await caught_up(holdfast)
    request = ap.ListStockViewRequest(sku_prefix=prefix, available_below=8, order=ap.STOCK_ORDER_AVAILABLE, page_size=1)
    seen = []
    while True:
        answer = await holdfast._call(holdfast.analytics.ListStockView(request))
        seen += [row.available for row in answer.rows]
        if not answer.next_page_token:
            break
        request.page_token = answer.next_page_token
    assert seen == [6, 7]
    request.available_below = 9
    with pytest.raises(Refusal) as refused:
        await holdfast._call(holdfast.analytics.ListStockView(request))
    assert refused.value.reason == "PAGE_TOKEN_INVALID"


async def test_every_order_of_the_view_comes_to_an_end(holdfast: Holdfast) -> None:
    """Page by page, ties among the rows: each row once, in each order."""
    skus = [await goods(holdfast, units) for units in (4, 4, 9)]
    for sku in skus[:2]:
        await reserve(holdfast, [LINE(sku=sku, location="MAIN", quantity=2)])
    await caught_up(holdfast)
    for order in ap.StockOrder.values():
        rows = await holdfast.report("ListStockView", ap.ListStockViewRequest(order=order, page_size=7), pages_max=500)
        keys = [(row.sku, row.location) for row in rows]
        assert len(keys) == len(set(keys))
        assert set(skus) <= {sku for sku, _ in keys}


async def test_an_archived_sku_has_nothing_available(holdfast: Holdfast) -> None:
    """The view says what inventory says: it cannot be held."""
    sku = await goods(holdfast, 4)
    await holdfast._call(holdfast.inventory.ArchiveSku(ip.ArchiveSkuRequest(request_id=new(), sku=sku)))
    assert (await view(holdfast, sku, 1)).on_hand == 4
    async with asyncio.timeout(15):
        while (await view(holdfast, sku)).available:
            await asyncio.sleep(0.05)


async def test_stock_at_an_instant(holdfast: Holdfast) -> None:
    """What was on hand and held between two movements, whatever came after."""
    sku = await goods(holdfast, 10)
    name = new()
    held = await holdfast.reserve(name, [(sku, "MAIN", 4)])
    between = held.reservation.create_time.ToDatetime(tzinfo=UTC)
    await holdfast.confirm(name, "paid")
    request = ap.GetStockAtRequest(time=at(between), skus=[sku])
    (then,) = (await holdfast._call(holdfast.analytics.GetStockAt(request))).stocks
    assert (then.on_hand, then.held, then.available) == (10, 4, 6)
    request = ap.GetStockAtRequest(time=at(datetime.now(UTC)), skus=[sku])
    (now,) = (await holdfast._call(holdfast.analytics.GetStockAt(request))).stocks
    assert (now.on_hand, now.held, now.available) == (6, 0, 6)
    request = ap.GetStockAtRequest(time=at(between - timedelta(days=1)), skus=[sku])
    assert not (await holdfast._call(holdfast.analytics.GetStockAt(request))).stocks


async def test_history_by_movement_and_by_bucket(holdfast: Holdfast) -> None:
    """Every movement with its balance; in an hour's bucket open, high, low and close of what is available."""
    sku = await goods(holdfast, 10)
    await reserve(holdfast, [LINE(sku=sku, location="MAIN", quantity=4)])
    await holdfast.adjust(new(), sku, "MAIN", ip.ADJUSTMENT_REASON_RECEIVE, 5)
    await caught_up(holdfast)
    day = span(datetime.now(UTC) - timedelta(hours=1))
    request = ap.GetStockHistoryRequest(sku=sku, location="MAIN", range=day)
    answer = await holdfast._call(holdfast.analytics.GetStockHistory(request))
    assert [(m.kind, m.available) for m in answer.movements] == [
        ("RECEIVE", 10), ("HOLD", 6), ("COMMIT", 6), ("RECEIVE", 11),
    ]  # fmt: skip
    request.bucket = ap.PERIOD_DAY
    buckets = (await holdfast._call(holdfast.analytics.GetStockHistory(request))).buckets
    assert sum(bucket.movements for bucket in buckets) == 4
    assert (buckets[0].open, buckets[-1].close) == (0, 11)
    assert min(bucket.low for bucket in buckets) == 0
    assert sum(bucket.sold for bucket in buckets) == 4


async def test_sales_are_exact_and_cut_by_business_time(holdfast: Holdfast) -> None:
    """Days of the zone asked for, subtotals, prices by line, and nothing summed over currencies."""
    sku, other, country = await goods(holdfast, 50), await goods(holdfast, 50), new("C")
    evening = datetime(2011, 5, 31, 23, 30, tzinfo=UTC)
    lines = [
        LINE(sku=sku, location="MAIN", quantity=3, unit_price=money(0.1)),
        LINE(sku=sku, location="MAIN", quantity=2, unit_price=money(2.55)),
        LINE(sku=other, location="MAIN", quantity=1, unit_price=money(7)),
    ]
    await reserve(holdfast, lines, order_time=at(evening), country=country, customer_id="c1")
    euros = [LINE(sku=sku, location="MAIN", quantity=1, unit_price=rp.Money(currency_code="EUR", micros=1))]
    await reserve(holdfast, euros, order_time=at(evening - timedelta(days=1)), country=country, customer_id="c2")
    await caught_up(holdfast)
    request = ap.ReportSalesRequest(
        range=span(datetime(2011, 5, 1, tzinfo=UTC), datetime(2011, 7, 1, tzinfo=UTC), "Europe/London"),
        period=ap.PERIOD_MONTH, dimensions=[ap.SALES_DIMENSION_SKU], rollup=True,
        filter=ap.SalesFilter(country=country),
    )  # fmt: skip
    rows = (await holdfast._call(holdfast.analytics.ReportSales(request))).rows
    first, second = sorted([(sku, 5_400_000), (other, 7_000_000)])
    assert [(r.currency_code, r.period, r.sku, r.rolled_up, r.value_micros) for r in rows] == [
        ("EUR", "2011-05-01", sku, 0, 1),
        ("EUR", "2011-05-01", "", 1, 1),
        ("EUR", "", "", 2, 1),
        ("GBP", "2011-06-01", first[0], 0, first[1]),
        ("GBP", "2011-06-01", second[0], 0, second[1]),
        ("GBP", "2011-06-01", "", 1, 12_400_000),
        ("GBP", "", "", 2, 12_400_000),
    ]
    export = ap.ExportReportRequest(sales=request)
    text = b"".join([piece.csv async for piece in holdfast.analytics.ExportReport(export)]).decode()
    exported = list(csv.DictReader(io.StringIO(text)))
    assert [row["value_micros"] for row in exported] == [str(row.value_micros) for row in rows]
    top = ap.ReportTopSkusRequest(range=request.range, filter=request.filter)
    best = [
        row for row in (await holdfast._call(holdfast.analytics.ReportTopSkus(top))).rows if row.currency_code == "GBP"
    ]
    assert [(row.rank, row.sku, row.abc_class) for row in best] == [(1, other, "A"), (2, sku, "A")]
    assert best[-1].cumulative_share == 1
    people = ap.ReportCustomersRequest(range=request.range, country=country)
    customers = (await holdfast._call(holdfast.analytics.ReportCustomers(people))).rows
    first_hash, second_hash = [one.subject for one in await holdfast.resolve(customers=["c1", "c2"])]
    assert [(row.currency_code, row.customer_id, row.orders) for row in customers] == [
        ("EUR", second_hash, 1),
        ("GBP", first_hash, 1),
    ]


async def test_a_partial_confirm_sells_what_it_confirms(holdfast: Holdfast) -> None:
    """Lines of one SKU at two prices, confirmed in two steps, come to the sum of the lines."""
    sku, country, name = await goods(holdfast, 10), new("C"), new()
    lines = [
        LINE(sku=sku, location="MAIN", quantity=2, unit_price=money(1)),
        LINE(sku=sku, location="MAIN", quantity=2, unit_price=money(3)),
    ]
    request = rp.ReserveRequest(reservation_id=name, lines=lines, country=country)
    await holdfast._call(holdfast.reservation.Reserve(request))
    await holdfast.confirm(name, "first", [(sku, "", 3)])
    await holdfast.confirm(name, "rest")
    await caught_up(holdfast)
    asked = ap.ReportSalesRequest(
        range=span(datetime.now(UTC) - timedelta(days=1)), filter=ap.SalesFilter(country=country)
    )
    (row,) = (await holdfast._call(holdfast.analytics.ReportSales(asked))).rows
    assert (row.orders, row.units, row.value_micros) == (1, 4, 8_000_000)
    audit = await holdfast._call(holdfast.analytics.AuditReservation(ap.AuditReservationRequest(reservation_id=name)))
    assert [entry.what for entry in audit.entries if entry.entry == "STATE"] == ["HELD", "HELD", "CONFIRMED"]
    assert [entry.what for entry in audit.entries if entry.entry == "MOVEMENT"] == ["HOLD", "COMMIT", "COMMIT"]
    export = ap.ExportReportRequest(audit=ap.AuditReservationRequest(reservation_id=name))
    text = b"".join([piece.csv async for piece in holdfast.analytics.ExportReport(export)]).decode()
    exported = list(csv.DictReader(io.StringIO(text)))
    assert [row["what"] for row in exported] == [entry.what for entry in audit.entries]


async def test_stock_outs_funnel_returns_and_cover(holdfast: Holdfast) -> None:
    """A stock-out with the demand refused in it, what became of reservations, what came back, what will last."""
    sku, country = await goods(holdfast, 5), new("C")
    start = datetime.now(UTC) - timedelta(minutes=1)
    await reserve(holdfast, [LINE(sku=sku, location="MAIN", quantity=5)], country=country)
    await reserve(holdfast, [LINE(sku=sku, location="MAIN", quantity=2)], country=country)
    gone = new()
    await holdfast.adjust(new(), sku, "MAIN", ip.ADJUSTMENT_REASON_RETURN, 2)
    await holdfast._call(
        holdfast.reservation.Reserve(
            rp.ReserveRequest(reservation_id=gone, lines=[LINE(sku=sku, location="MAIN", quantity=1)], country=country)
        )
    )
    await holdfast.cancel(gone, "gone")
    await caught_up(holdfast)
    outs = ap.ReportStockOutsRequest(range=span(start), sku_prefix=sku)
    (out,) = (await holdfast._call(holdfast.analytics.ReportStockOuts(outs))).rows
    assert (out.sku, out.refusals, out.refused_units, out.HasField("end_time")) == (sku, 1, 2, True)
    asked = ap.ReportFunnelRequest(range=span(start), country=country)
    (row,) = (await holdfast._call(holdfast.analytics.ReportFunnel(asked))).rows
    assert (row.requested, row.rejected, row.held, row.confirmed, row.cancelled) == (3, 1, 2, 1, 1)
    assert row.conversion == 0.5
    assert row.time_to_confirm_p95.ToTimedelta() > timedelta()
    back = ap.ReportReturnsRequest(range=span(start), page_size=1000)
    rows = {row.sku: row for row in (await holdfast._call(holdfast.analytics.ReportReturns(back))).rows}
    assert (rows[sku].sold, rows[sku].returned, rows[sku].rate) == (5, 2, 0.4)
    cover = ap.ReportCoverRequest(range=span(datetime.now(UTC) - timedelta(days=28)), page_size=1000)
    covered = {row.sku: row for row in (await holdfast._call(holdfast.analytics.ReportCover(cover))).rows}
    assert (covered[sku].available, covered[sku].sold) == (2, 5)
    assert covered[sku].days_of_cover == pytest.approx(2 / (5 / 28), rel=0.01)


@pytest.mark.parametrize(
    ("call", "request_", "field"),
    [
        ("ReportSales", ap.ReportSalesRequest(), "range.start_time"),
        ("ReportSales", ap.ReportSalesRequest(range=span(YEAR, YEAR)), "range.end_time"),
        ("ReportSales", ap.ReportSalesRequest(range=span(YEAR, zone="Mars"), period=ap.PERIOD_DAY), "range.time_zone"),
        ("ReportTopSkus", ap.ReportTopSkusRequest(range=span(YEAR, zone="UTC+2")), "range.time_zone"),
        ("ReportSales", ap.ReportSalesRequest(range=span(YEAR), period=ap.PERIOD_HOUR), "period"),
        ("ReportSales", ap.ReportSalesRequest(range=span(YEAR), dimensions=[ap.SALES_DIMENSION_SKU] * 2), "dimensions"),
        ("ReportCover", ap.ReportCoverRequest(range=span(YEAR)), "range"),
        ("GetStockAt", ap.GetStockAtRequest(skus=["A"]), "time"),
        ("GetStockHistory", ap.GetStockHistoryRequest(sku="A", location="MAIN"), "range.start_time"),
        ("AuditReservation", ap.AuditReservationRequest(reservation_id="a b"), "reservation_id"),
    ],
)  # fmt: skip
async def test_bad_requests_name_their_field(holdfast: Holdfast, call: str, request_: Any, field: str) -> None:
    """INVALID_ARGUMENT, with the field."""
    with pytest.raises(Refusal) as refused:
        await holdfast._call(getattr(holdfast.analytics, call)(request_))
    assert (refused.value.reason, refused.value.metadata["field"]) == ("FIELD_INVALID", field)


async def test_an_unknown_reservation_has_no_audit(holdfast: Holdfast) -> None:
    """NOT_FOUND, by name."""
    request = ap.AuditReservationRequest(reservation_id="nobody")
    with pytest.raises(Refusal) as refused:
        await holdfast._call(holdfast.analytics.AuditReservation(request))
    assert refused.value.reason == "RESERVATION_NOT_FOUND"


async def test_the_mart_is_what_inventory_has(holdfast: Holdfast) -> None:
    """After a busy minute of concurrent work the view equals the counters."""
    skus = [await goods(holdfast, 30) for _ in range(3)]
    await asyncio.gather(
        *(reserve(holdfast, [LINE(sku=skus[n % 3], location="MAIN", quantity=1 + n % 2)]) for n in range(90))
    )
    await caught_up(holdfast)
    for sku in skus:
        now, row = await stock(holdfast, sku), await view(holdfast, sku)
        assert (row.on_hand, row.held, row.available) == (now.on_hand, now.held, now.available)
        assert row.version == now.version
