"""Every report, beside the same question asked of the file of orders by DuckDB."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
from google.protobuf.timestamp_pb2 import Timestamp
from holdfast.analytics.v1 import analytics_pb2 as ap

from shared.client import Holdfast

START, END = datetime(2010, 12, 1, tzinfo=UTC), datetime(2011, 1, 1, tzinfo=UTC)

# Rows of goods of the first invoices. An invoice has the time, customer and country of its first row.
ROWS = r"""
CREATE TABLE rows AS
WITH cells AS (
  SELECT row_number() OVER () AS number, upper(trim(InvoiceNo)) AS invoice, upper(trim(StockCode)) AS sku,
         CAST(Quantity AS BIGINT) AS quantity, CAST(UnitPrice AS DECIMAL(18, 6)) AS price, InvoiceDate AS date,
         regexp_replace(trim(CustomerID), '\.0$', '') AS customer, trim(Country) AS country
  FROM read_csv('{file}', all_varchar = true, header = true)
), firsts AS (
  SELECT invoice, min(number) AS number FROM cells GROUP BY invoice ORDER BY number LIMIT {invoices}
)
SELECT cells.invoice, cells.sku, cells.quantity, cells.price, CAST(head.date AS TIMESTAMP) AS time,
       coalesce(head.customer, '') AS customer, head.country
FROM firsts JOIN cells USING (invoice) JOIN cells AS head ON head.number = firsts.number
WHERE regexp_matches(cells.sku, '^[0-9]{{5}}')
"""
SOLD = """
CREATE TABLE sold AS
SELECT *, CAST(quantity * price * 1000000 AS BIGINT) AS micros FROM rows JOIN confirmed USING (invoice)
WHERE quantity > 0
"""
SALES = """
SELECT strftime(month, '%Y-%m-%d'), country, grouping(month) + grouping(country), count(DISTINCT invoice),
       sum(quantity)::BIGINT, sum(micros)::BIGINT
FROM (SELECT *, date_trunc('month', time) AS month FROM sold) GROUP BY ROLLUP (month, country)
HAVING sum(micros) >= 1000000000
"""
BY_WEEK = """
SELECT strftime(date_trunc('week', time), '%Y-%m-%d'), count(DISTINCT invoice), sum(quantity)::BIGINT,
       sum(micros)::BIGINT
FROM sold GROUP BY 1 ORDER BY 1
"""
TOP = """
SELECT rank() OVER (ORDER BY sum(micros) DESC), sku, sum(quantity)::BIGINT, sum(micros)::BIGINT,
       sum(micros) / sum(sum(micros)) OVER (),
       sum(sum(micros)) OVER (ORDER BY sum(micros) DESC, sku ROWS UNBOUNDED PRECEDING) / sum(sum(micros)) OVER ()
FROM sold GROUP BY sku ORDER BY sum(micros) DESC, sku
"""
CUSTOMERS = """
SELECT customer, max(time), count(DISTINCT invoice), sum(micros)::BIGINT,
       ntile(5) OVER (ORDER BY max(time), customer), ntile(5) OVER (ORDER BY count(DISTINCT invoice), customer),
       ntile(5) OVER (ORDER BY sum(micros), customer)
FROM sold WHERE customer <> '' GROUP BY customer ORDER BY 4 DESC, 1
"""
RETURNS = """
WITH back AS (SELECT sku, -sum(quantity) AS units FROM rows WHERE invoice LIKE 'C%' GROUP BY sku),
     gone AS (SELECT sku, sum(quantity) AS units FROM sold GROUP BY sku)
SELECT sku, coalesce(gone.units, 0)::BIGINT, back.units::BIGINT, back.units / gone.units
FROM back LEFT JOIN gone USING (sku) ORDER BY back.units DESC, sku
"""
FUNNEL = """
SELECT strftime(date_trunc('day', time), '%Y-%m-%d'), count(DISTINCT invoice), count(DISTINCT confirmed.invoice)
FROM (SELECT DISTINCT invoice, time FROM rows WHERE quantity > 0 AND invoice NOT LIKE 'C%')
  LEFT JOIN confirmed USING (invoice) GROUP BY 1 ORDER BY 1
"""
SKU_SALES = "SELECT sku, sum(quantity)::BIGINT, count(DISTINCT date_trunc('day', time)) FROM sold GROUP BY sku"


@contextmanager
def asked_of_the_file(path: Path, invoices: int, confirmed: Sequence[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """The rows of the first invoices, those that were sold, and the names of the invoices that were."""
    with duckdb.connect() as file:
        file.execute(ROWS.format(file=path, invoices=invoices))
        file.execute("CREATE TABLE confirmed AS SELECT unnest(?) AS invoice", [list(confirmed)])
        file.execute(SOLD)
        yield file


def december() -> ap.TimeRange:
    start, end = Timestamp(), Timestamp()
    start.FromDatetime(START)
    end.FromDatetime(END)
    return ap.TimeRange(start_time=start, end_time=end)


async def assert_reports(holdfast: Holdfast, file: duckdb.DuckDBPyConnection) -> None:
    """Each report says what the file says, to the cent and the unit."""

    def ask(question: str) -> list[tuple[Any, ...]]:
        return file.execute(question).fetchall()

    clear = [customer for (customer,) in ask("SELECT DISTINCT customer FROM sold WHERE customer <> ''")]
    hashes = [(one.subject, one.value) for one in await holdfast.resolve(customers=clear)]
    file.executemany("UPDATE sold SET customer = ? WHERE customer = ?", hashes)
    span = december()
    sales = await holdfast.report(
        "ReportSales",
        ap.ReportSalesRequest(
            range=span, period=ap.PERIOD_MONTH, dimensions=[ap.SALES_DIMENSION_COUNTRY], rollup=True,
            value_micros_min=1_000_000_000, page_size=3,
        ),
    )  # fmt: skip
    found = {(r.period or None, r.country or None, r.rolled_up, r.orders, r.units, r.value_micros) for r in sales}
    assert found == set(ask(SALES))
    assert len(sales) > 5
    weeks = await holdfast.report("ReportSales", ap.ReportSalesRequest(range=span, period=ap.PERIOD_WEEK))
    assert [(row.period, row.orders, row.units, row.value_micros) for row in weeks] == ask(BY_WEEK)

    top = await holdfast.report("ReportTopSkus", ap.ReportTopSkusRequest(range=span, page_size=500))
    for row, (rank, sku, units, micros, share, running) in zip(top, ask(TOP), strict=True):
        assert (row.rank, row.sku, row.units, row.value_micros) == (rank, sku, units, micros)
        assert abs(row.share - share) + abs(row.cumulative_share - running) < 1e-9
        assert row.abc_class == ("A" if running - share < 0.8 else "B" if running - share < 0.95 else "C")

    customers = await holdfast.report("ReportCustomers", ap.ReportCustomersRequest(range=span, page_size=100))
    assert [
        (
            row.customer_id, row.last_order_time.ToDatetime(), row.orders, row.value_micros, row.recency, row.frequency,
            row.money,
        )
        for row in customers
    ] == ask(CUSTOMERS)  # fmt: skip

    returns = await holdfast.report("ReportReturns", ap.ReportReturnsRequest(range=span, page_size=1000))
    for line, (sku, sold, back, rate) in zip(returns, ask(RETURNS), strict=True):
        assert (line.sku, line.sold, line.returned) == (sku, sold, back)
        assert line.HasField("rate") == (rate is not None)
        assert not rate or abs(line.rate - rate) < 1e-9

    days = await holdfast.report("ReportFunnel", ap.ReportFunnelRequest(range=span, period=ap.PERIOD_DAY))
    assert [(row.period, row.requested, row.confirmed) for row in days] == ask(FUNNEL)
    assert all(row.rejected == row.requested - row.held for row in days)

    cover = await holdfast.report("ReportCover", ap.ReportCoverRequest(range=span, page_size=1000))
    sold_on = {sku: (units, on_days) for sku, units, on_days in ask(SKU_SALES)}
    for item in cover:
        units, on_days = sold_on.get(item.sku, (0, 0))
        assert (item.sold, item.quiet_days) == (units, 31 - on_days)
    assert [item.days_of_cover if item.HasField("days_of_cover") else float("inf") for item in cover] == sorted(
        (item.days_of_cover if item.HasField("days_of_cover") else float("inf") for item in cover), reverse=True
    )
