"""Reports and lists: each a query, the columns that it is paged by, and the message of its rows.

A page is the query's rows after the last row of the page before, in the order of the keys. The query is run
anew for each page: what changes in between is seen, and nothing is held open between calls.

Business time is cut in the time zone that was asked for; sums of money stay within a currency.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from google.protobuf.message import Message
from holdfast.analytics.v1 import analytics_pb2 as pb

from services.analytics.domain import Reason
from shared import check
from shared.database import Connection, Record
from shared.refusal import Refusal
from shared.wire import duration, timestamp

LAST = "U&'\\+10FFFF'"  # sorts after every code: a subtotal stands after what it sums
LAST_CHARACTER = "\U0010ffff"
CODE = 'text COLLATE "C"'  # the type of keys that are codes
PERIODS = {
    pb.PERIOD_HOUR: ("hour", "YYYY-MM-DD HH24:MI"),
    pb.PERIOD_DAY: ("day", "YYYY-MM-DD"),
    pb.PERIOD_WEEK: ("week", "YYYY-MM-DD"),
    pb.PERIOD_MONTH: ("month", "YYYY-MM-DD"),
}
DIMENSIONS = {
    pb.SALES_DIMENSION_SKU: ("sku", "sale.sku"),
    pb.SALES_DIMENSION_CATEGORY: ("category", "coalesce(sku.category, '')"),
    pb.SALES_DIMENSION_COUNTRY: ("country", "sale.country"),
    pb.SALES_DIMENSION_CUSTOMER: ("customer_id", "sale.customer_id"),
}


@dataclass(frozen=True, slots=True)
class Range:
    """From when to before when, and the time zone of its days."""

    start: datetime
    end: datetime
    time_zone: str


def time_range(value: pb.TimeRange, now: datetime) -> Range:
    """The range that is asked for. Raises Refusal FIELD_INVALID."""
    if not value.HasField("start_time"):
        raise check.invalid("range.start_time", "must be set")
    start = check.time(value.start_time, "range.start_time")
    end = check.time(value.end_time, "range.end_time") if value.HasField("end_time") else now
    for name, time in (("start_time", start), ("end_time", end)):
        if time.year not in check.YEARS:
            raise check.invalid(f"range.{name}", f"must be from {check.YEARS.start} to {check.YEARS.stop - 1}")
    if end <= start:
        raise check.invalid("range.end_time", "must be after start_time")
    return Range(start, end, check.time_zone(value.time_zone, "range.time_zone"))


@dataclass(slots=True)
class Report:
    """A query whose columns are the fields of `row`; `keys` are its order, each with its type."""

    row: type[Message]
    keys: Mapping[str, str]
    parameters: list[Any] = field(default_factory=list)
    query: str = ""

    def bind(self, value: Any) -> str:
        """The placeholder of a parameter."""
        self.parameters.append(value)
        return f"${len(self.parameters)}"

    async def page(
        self, connection: Connection, after: Sequence[str] | None, limit: int
    ) -> tuple[list[Any], list[str] | None]:
        """Up to `limit` rows, and the position after them when there are more.

        Raises Refusal FIELD_INVALID for an unknown time zone and PAGE_TOKEN_INVALID for a made-up position.
        """
        where = ""
        parameters = list(self.parameters)
        if after is not None:
            places = [f"${len(parameters) + n}::text::{kind}" for n, kind in enumerate(self.keys.values(), 1)]
            parameters += after
            where = f"WHERE ({', '.join(self.keys)}) > ({', '.join(places)})"
        query = (
            f"SELECT *, ARRAY[{', '.join(f'{key}::text' for key in self.keys)}] AS position"  # noqa: S608 - of constants
            f" FROM ({self.query}) AS report {where} ORDER BY {', '.join(self.keys)} LIMIT {limit + 1}"
        )
        try:
            rows = await connection.fetch(query, *parameters)
        except asyncpg.InvalidParameterValueError:
            raise Refusal(Reason.FIELD_INVALID, "range.time_zone must be known", field="range.time_zone") from None
        except asyncpg.DataError:
            if after is None:
                raise
            raise Refusal(Reason.PAGE_TOKEN_INVALID, "the page token is not of this list") from None
        more = rows[limit - 1]["position"] if len(rows) > limit else None
        return [self._message(row) for row in rows[:limit]], more

    def _message(self, row: Record) -> Any:
        fields = self.row.DESCRIPTOR.fields_by_name
        return self.row(**{name: _value(value) for name, value in row.items() if name in fields and value is not None})


def _total(column: str) -> str:
    """A sum that fits into 64 bits; one that does not is told as the most that does."""
    return f"least(sum({column}), {2**63 - 1})::bigint"


def _value(value: Any) -> Any:
    if isinstance(value, datetime):
        return timestamp(value)
    if isinstance(value, timedelta):
        return duration(value)
    return value


def _beginning(report: Report, column: str, prefix: str) -> list[str]:
    """The condition for codes that begin so."""
    return [f"{column} BETWEEN {report.bind(prefix)} AND {report.bind(prefix + LAST_CHARACTER)}"] if prefix else []


def _below(report: Report, column: str, category: str) -> list[str]:
    """The condition for a category and those below it."""
    if not category:
        return []
    (below,) = _beginning(report, column, category + "/")
    return [f"({column} = {report.bind(category)} OR {below})"]


def _within(report: Report, column: str, asked: Range) -> list[str]:
    return [f"{column} >= {report.bind(asked.start)}", f"{column} < {report.bind(asked.end)}"]


def _sales(report: Report, asked: Range, wanted: pb.SalesFilter) -> str:
    """FROM and WHERE of the sales that count."""
    conditions = _within(report, "sale.order_time", asked)
    for column, value in (
        ("sale.sku", wanted.sku), ("sale.country", wanted.country), ("sale.customer_id", wanted.customer_id),
    ):  # fmt: skip
        if value:
            conditions.append(f"{column} = {report.bind(value)}")
    conditions += _below(report, "sku.category", wanted.category)
    return f"FROM sale LEFT JOIN sku ON sku.sku = sale.sku WHERE {' AND '.join(conditions)}"


def _period(report: Report, column: str, period: pb.Period.ValueType, time_zone: str) -> str:
    if period not in PERIODS:
        return "''"
    unit, form = PERIODS[period]
    return f"to_char(date_trunc('{unit}', {column} AT TIME ZONE {report.bind(time_zone)}), '{form}')"


def stock_view(request: pb.ListStockViewRequest, now: datetime) -> Report:
    """The mart, with demand and cover as they are at `now`."""
    orders = {
        pb.STOCK_ORDER_UNSPECIFIED: {},
        pb.STOCK_ORDER_AVAILABLE: {"available": "bigint"},
        pb.STOCK_ORDER_DAYS_OF_COVER: {"cover_key": "float8"},
        pb.STOCK_ORDER_SOLD: {"sold_key": "bigint"},
        pb.STOCK_ORDER_LAST_MOVEMENT: {"moved_key": "float8"},
    }
    if request.order not in orders:
        raise Refusal(Reason.FIELD_INVALID, "order must be a known order", field="order")
    report = Report(pb.StockRow, {**orders[request.order], "sku": CODE, "location": CODE})
    at = f"{report.bind(now)}::timestamptz"
    conditions = ["true"]
    conditions += _beginning(report, "view.sku", request.sku_prefix)
    if request.location:
        conditions.append(f"view.location = {report.bind(request.location)}")
    if request.HasField("available_below"):
        conditions.append(f"view.available < {report.bind(request.available_below)}")
    if request.HasField("days_of_cover_below"):
        conditions.append(f"view.available < {report.bind(request.days_of_cover_below)}::float8 * daily_demand")
    conditions += _below(report, "view.category", request.category)
    report.query = f"""
        SELECT *, coalesce(days_of_cover, 'Infinity') AS cover_key, -sold_30d AS sold_key,
               -extract(epoch FROM last_movement_time)::float8 AS moved_key
        FROM (
          SELECT view.*, last_movement_at AS last_movement_time, available / nullif(daily_demand, 0) AS days_of_cover
          FROM (
            SELECT sku, location, name, category, on_hand, held, safety_stock, backorder_limit, short, sold_24h,
                   sold_7d, sold_30d, returned_24h, returned_7d, returned_30d, last_movement_at, version,
                   CASE WHEN active THEN available ELSE 0 END AS available,
                   sold_30d / least(30, greatest(1, extract(epoch FROM {at} - first_movement_at)::float8 / 86400))
                   AS daily_demand
            FROM stock_view
          ) AS view WHERE {" AND ".join(conditions)}
        ) AS row
    """  # noqa: S608 - of constants and placeholders
    return report


def sales(request: pb.ReportSalesRequest, asked: Range) -> Report:
    """GROUP BY ROLLUP over the period and the dimensions, within each currency."""
    dimensions = [DIMENSIONS[one] for one in request.dimensions]
    report = Report(pb.SalesRow, {})
    source = _sales(report, asked, request.filter)
    groups = [("period", _period(report, "sale.order_time", request.period, asked.time_zone)), *dimensions]
    grouped = ", ".join(name for name, _ in groups)
    by = f"ROLLUP ({grouped})" if request.rollup else grouped
    report.keys = {"currency_code": CODE} | {f"{name}_key": CODE for name, _ in groups}
    rolled_up = " + ".join(f"grouping({name})" for name, _ in groups)
    keys = ", ".join(f'coalesce({name}, {LAST}) COLLATE "C" AS {name}_key' for name, _ in groups)
    # Orders are counted in what is left when each is summed up, as shards sum up their own rows and cannot roll up.
    report.query = f"""
        WITH sold AS MATERIALIZED (
          SELECT sale.currency_code, {", ".join(f"{expression} AS {name}" for name, expression in groups)},
                 sale.reservation_id, sum(sale.units) AS units, sum(sale.value_micros) AS value_micros {source}
          GROUP BY {", ".join(str(n) for n in range(1, len(groups) + 3))}
        )
        SELECT *, {keys}
        FROM (
          SELECT currency_code, {grouped}, {rolled_up} AS rolled_up, count(DISTINCT reservation_id) AS orders,
                 sum(units)::bigint AS units, {_total("value_micros")} AS value_micros
          FROM sold
          GROUP BY currency_code, {by}
          HAVING sum(value_micros) >= {report.bind(request.value_micros_min)}
        ) AS totals
    """  # noqa: S608 - of constants and placeholders
    return report


def top_skus(request: pb.ReportTopSkusRequest, asked: Range) -> Report:
    """Pareto: running sums over SKUs in order of value."""
    report = Report(pb.TopSkuRow, {"currency_code": CODE, "place": "bigint"})
    source = _sales(report, asked, request.filter)
    report.query = f"""
        WITH totals AS (
          SELECT sale.currency_code, sale.sku, max(sku.name) AS name, sum(sale.units)::bigint AS units,
                 {_total("sale.value_micros")} AS value_micros {source} GROUP BY sale.currency_code, sale.sku
        ), placed AS (
          SELECT *, rank() OVER (PARTITION BY currency_code ORDER BY value_micros DESC) AS rank,
                 row_number() OVER best AS place, sum(value_micros) OVER best AS running,
                 nullif(sum(value_micros) OVER (PARTITION BY currency_code), 0) AS whole
          FROM totals
          WINDOW best AS (PARTITION BY currency_code ORDER BY value_micros DESC, sku ROWS UNBOUNDED PRECEDING)
        )
        SELECT rank, place, sku, name, currency_code, units, value_micros,
               coalesce(value_micros / whole, 0)::float8 AS share,
               coalesce(running / whole, 0)::float8 AS cumulative_share,
               CASE WHEN running - value_micros < 0.80 * whole THEN 'A'
                    WHEN running - value_micros < 0.95 * whole THEN 'B' ELSE 'C' END AS abc_class
        FROM placed
    """  # noqa: S608 - of constants and placeholders
    return report


def stock_outs(request: pb.ReportStockOutsRequest, asked: Range) -> Report:
    """Gaps and islands: stock-outs of a key that lie close together are one."""
    report = Report(pb.StockOutRow, {"sku": CODE, "location": CODE, "start_time": "timestamptz"})
    end = report.bind(asked.end)
    conditions = [
        f"started_at < {end}",
        f"(ended_at IS NULL OR ended_at > {report.bind(asked.start)})",
    ]
    conditions += _beginning(report, "sku", request.sku_prefix)
    if request.location:
        conditions.append(f"location = {report.bind(request.location)}")
    near = report.bind(request.join_within.ToTimedelta())
    report.query = f"""
        WITH periods AS (
          SELECT *, lag(ended_at) OVER by_key AS previous_end FROM stock_out WHERE {" AND ".join(conditions)}
          WINDOW by_key AS (PARTITION BY sku, location ORDER BY start_version)
        ), marked AS (
          SELECT *, count(*) FILTER (WHERE previous_end IS NULL OR started_at - previous_end >= {near}::interval)
                    OVER (PARTITION BY sku, location ORDER BY start_version) AS island
          FROM periods
        ), islands AS (
          SELECT sku, location, min(started_at) AS start_time, count(*) AS joined,
                 CASE WHEN count(*) = count(ended_at) THEN max(ended_at) END AS end_time
          FROM marked GROUP BY sku, location, island
        )
        SELECT islands.*, view.name, coalesce(end_time, now()) - start_time AS length, refused.refusals,
               refused.refused_units
        FROM islands LEFT JOIN stock_view AS view USING (sku, location)
          CROSS JOIN LATERAL (
            SELECT count(DISTINCT reservation_id) AS refusals,
                   coalesce(sum(requested - refusal.available), 0)::bigint AS refused_units
            FROM refusal
            WHERE refusal.sku = islands.sku AND refusal.location IN (islands.location, '')
              AND refused_at >= start_time AND refused_at <= coalesce(end_time, now())
          ) AS refused
    """  # noqa: S608 - of constants and placeholders
    return report


def funnel(request: pb.ReportFunnelRequest, asked: Range) -> Report:
    """What became of the reservations of each period."""
    report = Report(pb.FunnelRow, {"period": CODE})
    conditions = _within(report, "order_time", asked)
    if request.country:
        conditions.append(f"country = {report.bind(request.country)}")
    report.query = f"""
        WITH asked AS (
          SELECT {_period(report, "order_time", request.period, asked.time_zone)} AS period, state,
                 confirmed_at - created_at AS time_to_confirm
          FROM reservation WHERE {" AND ".join(conditions)}
        ), counted AS (
          SELECT period, count(*) AS requested, count(*) FILTER (WHERE state = 'REJECTED') AS rejected,
                 count(*) FILTER (WHERE state <> 'REJECTED') AS held,
                 count(*) FILTER (WHERE state = 'CONFIRMED') AS confirmed,
                 count(*) FILTER (WHERE state = 'CANCELLED') AS cancelled,
                 count(*) FILTER (WHERE state = 'EXPIRED') AS expired,
                 count(*) FILTER (WHERE state = 'HELD') AS open,
                 percentile_cont(0.50) WITHIN GROUP (ORDER BY time_to_confirm) AS time_to_confirm_p50,
                 percentile_cont(0.95) WITHIN GROUP (ORDER BY time_to_confirm) AS time_to_confirm_p95
          FROM asked GROUP BY period
        )
        SELECT *, coalesce(confirmed / nullif(held, 0)::float8, 0) AS conversion FROM counted
    """  # noqa: S608 - of constants and placeholders
    return report


def cover(request: pb.ReportCoverRequest, asked: Range) -> Report:
    """Moving averages over the days with sales; a day without adds nothing to them.

    The range may end at any time of day, and its last 7 and 28 days do as well; the peak is of whole days.
    """
    report = Report(pb.CoverRow, {"slowness": "float8", "sku": CODE})
    zone = report.bind(asked.time_zone)
    days = f"{report.bind(max(1.0, (asked.end - asked.start) / timedelta(days=1)))}::float8"
    first, last = (
        f"({time}::timestamptz AT TIME ZONE {zone})" for time in (report.bind(asked.start), report.bind(asked.end))
    )
    dates = f"(({last} - interval '1 us')::date - {first}::date + 1)"
    within = " AND ".join(_within(report, "order_time", asked))
    conditions = " AND ".join(["active", *_below(report, "category", request.category)])
    report.query = f"""
        WITH stock AS (
          SELECT sku, max(name) AS name, sum(available)::bigint AS available FROM stock_view WHERE {conditions}
          GROUP BY sku HAVING sum(available) > 0
        ), daily AS (
          SELECT sku, date_trunc('day', order_time AT TIME ZONE {zone}) AS day, sum(units) AS units,
                 sum(units) FILTER (WHERE order_time AT TIME ZONE {zone} >= {last} - interval '7 days') AS units_7d,
                 sum(units) FILTER (WHERE order_time AT TIME ZONE {zone} >= {last} - interval '28 days') AS units_28d
          FROM sale WHERE {within} GROUP BY 1, 2
        ), moving AS (
          SELECT *, sum(units) OVER (
            PARTITION BY sku ORDER BY day RANGE BETWEEN interval '6 days' PRECEDING AND CURRENT ROW
          ) / least(7, {days}) AS average_7d
          FROM daily
        ), paced AS (
          SELECT sku, sum(units)::bigint AS sold, count(*) AS days_sold, max(average_7d) AS peak_7d,
                 coalesce(sum(units_7d), 0) / least(7, {days}) AS average_7d,
                 coalesce(sum(units_28d), 0) / least(28, {days}) AS average_28d
          FROM moving GROUP BY sku
        ), covered AS (
          SELECT stock.*, coalesce(sold, 0) AS sold, greatest(0, {dates} - coalesce(days_sold, 0)) AS quiet_days,
                 coalesce(average_7d, 0)::float8 AS average_7d, coalesce(average_28d, 0)::float8 AS average_28d,
                 coalesce(peak_7d, 0)::float8 AS peak_7d, (available / nullif(average_28d, 0))::float8 AS days_of_cover
          FROM stock LEFT JOIN paced USING (sku)
        )
        SELECT *, -coalesce(days_of_cover, 'Infinity') AS slowness FROM covered
    """  # noqa: S608 - of constants and placeholders
    return report


def customers(request: pb.ReportCustomersRequest, asked: Range) -> Report:
    """NTILE over recency, frequency and money; ties go by customer, so that the answer is one."""
    report = Report(pb.CustomerRow, {"currency_code": CODE, "value_key": "bigint", "customer_id": CODE})
    conditions = [*_within(report, "order_time", asked), "customer_id <> ''"]
    if request.country:
        conditions.append(f"country = {report.bind(request.country)}")
    report.query = f"""
        WITH bought AS (
          SELECT currency_code, customer_id, max(order_time) AS last_order_time,
                 count(DISTINCT reservation_id) AS orders, {_total("value_micros")} AS value_micros
          FROM sale WHERE {" AND ".join(conditions)} GROUP BY currency_code, customer_id
        ), scored AS (
          SELECT *, ntile(5) OVER (PARTITION BY currency_code ORDER BY last_order_time, customer_id) AS recency,
                 ntile(5) OVER (PARTITION BY currency_code ORDER BY orders, customer_id) AS frequency,
                 ntile(5) OVER (PARTITION BY currency_code ORDER BY value_micros, customer_id) AS money
          FROM bought
        )
        SELECT *, -value_micros AS value_key,
               CASE WHEN least(recency, frequency, money) >= 4 THEN 'CHAMPION'
                    WHEN frequency >= 4 AND recency >= 3 THEN 'LOYAL'
                    WHEN recency = 5 AND frequency <= 2 THEN 'NEW'
                    WHEN recency <= 2 AND frequency >= 3 THEN 'AT_RISK'
                    WHEN recency <= 2 THEN 'LOST' ELSE 'REGULAR' END AS segment
        FROM scored
    """  # noqa: S608 - of constants and placeholders
    return report


def returns(request: pb.ReportReturnsRequest, asked: Range) -> Report:
    """Units that came back beside units sold, each counted where it happened."""
    report = Report(pb.ReturnsRow, {"returned_key": "bigint", "sku": CODE})
    came_back = " AND ".join(_within(report, "occurred_at", asked))
    within = " AND ".join(_within(report, "order_time", asked))
    conditions = [
        f"coalesce(sold, 0) >= {report.bind(request.sold_min)}",
        *_below(report, "sku.category", request.category),
    ]
    report.query = f"""
        WITH back AS (
          SELECT sku, sum(units)::bigint AS returned FROM goods_return WHERE {came_back} GROUP BY sku
        ), gone AS (
          SELECT sku, sum(units)::bigint AS sold FROM sale WHERE {within} GROUP BY sku
        )
        SELECT back.sku, sku.name, coalesce(sold, 0) AS sold, returned, -returned AS returned_key,
               returned / nullif(sold, 0)::float8 AS rate
        FROM back LEFT JOIN gone USING (sku) LEFT JOIN sku USING (sku) WHERE {" AND ".join(conditions)}
    """  # noqa: S608 - of constants and placeholders
    return report


def movements(request: pb.GetStockHistoryRequest, asked: Range) -> Report:
    """The movements of a key, each with the balance after it."""
    report = Report(pb.HistoryMovement, {"time": "timestamptz", "version": "bigint"})
    report.query = f"""
        SELECT *, recorded_at AS time, hold_id AS reservation_id FROM movement WHERE {_of_key(report, request, asked)}
    """  # noqa: S608 - of constants and placeholders
    return report


def buckets(request: pb.GetStockHistoryRequest, asked: Range) -> Report:
    """Open, high, low and close of what was available, in each stretch of time with a movement."""
    report = Report(pb.HistoryBucket, {"start_time": "timestamptz"})
    if request.bucket not in PERIODS:
        raise Refusal(Reason.FIELD_INVALID, "bucket must be a known period", field="bucket")
    unit, zone = PERIODS[request.bucket][0], report.bind(asked.time_zone)
    report.query = f"""
        SELECT start_time, count(*) AS movements, open, greatest(open, max(available)) AS high,
               least(open, min(available)) AS low, close,
               coalesce(-sum(on_hand_delta) FILTER (WHERE kind = 'COMMIT'), 0)::bigint AS sold,
               coalesce(sum(on_hand_delta) FILTER (WHERE on_hand_delta > 0), 0)::bigint AS received
        FROM (
          SELECT *, first_value(available_before) OVER in_bucket AS open, last_value(available) OVER in_bucket AS close
          FROM (
            SELECT *, date_trunc('{unit}', recorded_at, {zone}) AS start_time
            FROM movement WHERE {_of_key(report, request, asked)}
          ) AS cut
          WINDOW in_bucket AS (
            PARTITION BY start_time ORDER BY version ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
          )
        ) AS moved GROUP BY start_time, open, close
    """  # noqa: S608 - of constants and placeholders
    return report


def _of_key(report: Report, request: pb.GetStockHistoryRequest, asked: Range) -> str:
    key = [f"sku = {report.bind(request.sku)}", f"location = {report.bind(request.location)}"]
    return " AND ".join([*key, *_within(report, "recorded_at", asked)])
