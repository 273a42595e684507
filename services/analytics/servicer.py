"""The edge: decode and check, one read, encode. Errors, drains and pod names are the server's."""

import csv
import io
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from holdfast.analytics.v1 import analytics_pb2 as pb
from holdfast.analytics.v1 import analytics_pb2_grpc

from services.analytics import history, reports
from services.analytics.domain import Key, Reason
from services.analytics.history import Freshness
from services.analytics.reports import Report, time_range
from services.analytics.settings import Settings
from services.analytics.turns import Turns
from shared import check, pages
from shared.database import Database
from shared.errors import ErrorMap
from shared.refusal import Refusal
from shared.server import Context
from shared.wire import duration, timestamp

SKUS_MAX = 1_000
VERSIONS_MAX = 100
DIMENSIONS_MAX = 3
COVER_DAYS_MAX = 400
EXPORT_ROWS = 5_000
MARGIN_SECONDS = 0.1
_CODES = grpc.StatusCode
ERRORS = ErrorMap(
    "analytics.holdfast",
    {
        Reason.FIELD_INVALID: _CODES.INVALID_ARGUMENT,
        Reason.TOO_MANY_ITEMS: _CODES.INVALID_ARGUMENT,
        Reason.PAGE_TOKEN_INVALID: _CODES.INVALID_ARGUMENT,
        Reason.RESERVATION_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.NOT_CAUGHT_UP: _CODES.FAILED_PRECONDITION,
        Reason.HISTORY_NOT_KEPT: _CODES.OUT_OF_RANGE,
        Reason.OVERLOADED: _CODES.RESOURCE_EXHAUSTED,
        Reason.DATABASE_UNAVAILABLE: _CODES.UNAVAILABLE,
        Reason.STOPPING: _CODES.UNAVAILABLE,
        Reason.CALLER_UNKNOWN: _CODES.UNAUTHENTICATED,
        Reason.CALLER_FORBIDDEN: _CODES.PERMISSION_DENIED,
        Reason.CALLER_OVER_LIMIT: _CODES.RESOURCE_EXHAUSTED,
        Reason.RULE_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.CASE_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.CASE_CLOSED: _CODES.FAILED_PRECONDITION,
        Reason.REQUEST_ID_REUSED: _CODES.FAILED_PRECONDITION,
        Reason.ALERT_RULE_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.ALERT_RULE_ALREADY_EXISTS: _CODES.ALREADY_EXISTS,
        Reason.SUBSCRIPTION_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.SUBSCRIPTION_ALREADY_EXISTS: _CODES.ALREADY_EXISTS,
        Reason.SUBSCRIPTION_DELETED: _CODES.FAILED_PRECONDITION,
        Reason.DELIVERY_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.DELIVERY_NOT_DEAD: _CODES.FAILED_PRECONDITION,
        Reason.LIMIT_REACHED: _CODES.RESOURCE_EXHAUSTED,
    },
)
Answer = TypeVar("Answer", bound=Message)
Build = Callable[[Any, datetime], Report]  # of a request, and of what "now" means


class Servicer(analytics_pb2_grpc.AnalyticsServiceServicer):
    """The analytics API over a database."""

    def __init__(self, settings: Settings, database: Database, turns: Turns) -> None:
        self._settings = settings
        self._database = database
        self._turns = turns

    # -- views and history ------------------------------------------------------------------------

    async def ListStockView(self, request: pb.ListStockViewRequest, context: Context) -> pb.ListStockViewResponse:
        _stock_view(request, datetime.now(UTC))
        check.count(len(request.min_versions), "min_versions", VERSIONS_MAX, least=0)
        if request.min_versions:
            versions: dict[Key, int] = {}
            for seen in request.min_versions:
                key = (seen.sku, seen.location)
                versions[key] = max(seen.version, versions.get(key, 0))
            await history.await_versions(self._database, versions, self._patience(context))
        return await self._page(pb.ListStockViewResponse, request, _stock_view)

    async def GetStockAt(self, request: pb.GetStockAtRequest, context: Context) -> pb.GetStockAtResponse:
        if not request.HasField("time"):
            raise check.invalid("time", "must be set")
        time = check.time(request.time, "time")
        check.count(len(request.skus), "skus", SKUS_MAX)
        skus = [check.code(sku, f"skus[{number}]") for number, sku in enumerate(request.skus)]
        await history.await_time(self._database, time, self._patience(context))
        async with self._turns.turn(), self._database.connection() as connection:
            fresh = await history.freshness(connection)
            rows = await history.stock_at(connection, skus, time)
        return pb.GetStockAtResponse(stocks=[pb.StockAt(**row) for row in rows], freshness=_freshness(fresh))

    async def GetStockHistory(self, request: pb.GetStockHistoryRequest, context: Context) -> pb.GetStockHistoryResponse:
        check.code(request.sku, "sku")
        check.code(request.location, "location")
        if request.bucket:
            page = await self._rows(request, lambda _, now: reports.buckets(request, time_range(request.range, now)))
            return pb.GetStockHistoryResponse(buckets=page[0], next_page_token=page[1], freshness=page[2])
        page = await self._rows(request, lambda _, now: reports.movements(request, time_range(request.range, now)))
        return pb.GetStockHistoryResponse(movements=page[0], next_page_token=page[1], freshness=page[2])

    async def GetFreshness(self, request: pb.GetFreshnessRequest, context: Context) -> pb.GetFreshnessResponse:
        async with self._database.connection() as connection:
            fresh, lag = await history.freshness(connection), await history.lag(connection)
        return pb.GetFreshnessResponse(
            freshness=_freshness(fresh), lag_ms_p50=lag.p50, lag_ms_p95=lag.p95, lag_ms_p99=lag.p99, events=lag.events,
            drift_units=lag.drift_units, reconcile_time=timestamp(lag.reconciled_at),
            judge_time=timestamp(lag.judged_until),
        )  # fmt: skip

    # -- reports ----------------------------------------------------------------------------------

    async def ReportSales(self, request: pb.ReportSalesRequest, context: Context) -> pb.ReportSalesResponse:
        return await self._page(pb.ReportSalesResponse, request, _sales)

    async def ReportTopSkus(self, request: pb.ReportTopSkusRequest, context: Context) -> pb.ReportTopSkusResponse:
        return await self._page(pb.ReportTopSkusResponse, request, _top_skus)

    async def ReportStockOuts(self, request: pb.ReportStockOutsRequest, context: Context) -> pb.ReportStockOutsResponse:
        return await self._page(pb.ReportStockOutsResponse, request, _stock_outs)

    async def ReportFunnel(self, request: pb.ReportFunnelRequest, context: Context) -> pb.ReportFunnelResponse:
        return await self._page(pb.ReportFunnelResponse, request, _funnel)

    async def ReportCover(self, request: pb.ReportCoverRequest, context: Context) -> pb.ReportCoverResponse:
        return await self._page(pb.ReportCoverResponse, request, _cover)

    async def ReportCustomers(self, request: pb.ReportCustomersRequest, context: Context) -> pb.ReportCustomersResponse:
        return await self._page(pb.ReportCustomersResponse, request, _customers)

    async def ReportReturns(self, request: pb.ReportReturnsRequest, context: Context) -> pb.ReportReturnsResponse:
        return await self._page(pb.ReportReturnsResponse, request, _returns)

    async def AuditReservation(
        self, request: pb.AuditReservationRequest, context: Context
    ) -> pb.AuditReservationResponse:
        entries, fresh = await self._audit(request)
        return pb.AuditReservationResponse(entries=entries, freshness=fresh)

    async def _audit(self, request: pb.AuditReservationRequest) -> tuple[list[pb.AuditEntry], pb.Freshness]:
        """Every state and movement of a reservation, in order of time, and how fresh they are at least."""
        name = check.code(request.reservation_id, "reservation_id")
        async with self._turns.turn(), self._database.connection() as connection:
            fresh = await history.freshness(connection)
            states = await history.states(connection, name)
            movements = await history.movements_of(connection, name)
        if not states and not movements:
            raise Refusal(Reason.RESERVATION_NOT_FOUND, f"nothing is known of {name}", reservation_id=name)
        entries = [
            pb.AuditEntry(
                time=timestamp(row["recorded_at"]), entry="MOVEMENT", what=row["kind"], version=row["version"],
                request_id=row["request_id"], sku=row["sku"], location=row["location"],
                on_hand_delta=row["on_hand_delta"], held_delta=row["held_delta"],
            )
            for row in movements
        ] + [
            pb.AuditEntry(
                time=timestamp(row["changed_at"]), entry="STATE", what=row["state"], version=row["version"],
                request_id=row["request_id"], held=row["held"], confirmed=row["confirmed"],
                cancelled=row["cancelled"], expired=row["expired"],
            )
            for row in states
        ]  # fmt: skip
        entries.sort(key=lambda entry: (entry.time.seconds, entry.time.nanos))
        return entries, _freshness(fresh)

    async def ExportReport(
        self, request: pb.ExportReportRequest, context: Context
    ) -> AsyncIterator[pb.ExportReportResponse]:
        kind = request.WhichOneof("report")
        if kind is None:
            raise check.invalid("report", "must be set")
        if kind == "audit":
            entries, _ = await self._audit(request.audit)
            yield _piece(pb.AuditEntry, entries, header=True)
            return
        report = EXPORTS[kind](getattr(request, kind), datetime.now(UTC))
        rows, after = await self._export(report, None)
        yield _piece(report.row, rows, header=True)
        while after is not None:
            rows, after = await self._export(report, after)
            yield _piece(report.row, rows, header=False)

    async def _export(self, report: Report, after: list[str] | None) -> tuple[list[Any], list[str] | None]:
        async with self._turns.turn(), self._database.connection() as connection:
            return await report.page(connection, after, EXPORT_ROWS)

    # -- all of them ------------------------------------------------------------------------------

    async def _page(self, answer: type[Answer], request: Any, build: Build) -> Answer:
        rows, token, fresh = await self._rows(request, build)
        return answer(rows=rows, next_page_token=token, freshness=fresh)

    async def _rows(self, request: Any, build: Build) -> tuple[list[Any], str, pb.Freshness]:
        """A page of a report, the token of the next, and how fresh it is at least.

        What "now" means is settled by the first page and carried in the tokens: what is sorted by time would
        otherwise move between pages.
        """
        filters = type(request)()
        filters.CopyFrom(request)
        filters.ClearField("page_token")
        filters.ClearField("page_size")
        bound = filters.SerializeToString(deterministic=True)
        now = datetime.now(UTC)
        report = build(request, now)
        after = pages.decode(request.page_token, bound, len(report.keys) + 1)
        if after:
            now = pages.instant(after.pop())
            report = build(request, now)
        size = pages.size(request.page_size)
        async with self._turns.turn(), self._database.connection() as connection:
            fresh = await history.freshness(connection)
            rows, position = await report.page(connection, after, size)
        token = pages.encode([*position, now.isoformat()], bound) if position else ""
        return rows, token, _freshness(fresh)

    def _patience(self, context: Context) -> float:
        """How long a call may wait for events: its caller's time, less what the answer takes."""
        left = context.time_remaining()
        most = self._settings.wait_seconds_max
        return most if left is None else max(0.0, min(most, left - MARGIN_SECONDS))


def _filter(value: pb.SalesFilter) -> None:
    check.code(value.sku, "filter.sku", optional=True)
    check.text(value.category, "filter.category", 200)
    check.text(value.country, "filter.country", 64)
    check.code(value.customer_id, "filter.customer_id", optional=True)


def _stock_view(request: pb.ListStockViewRequest, now: datetime) -> Report:
    check.code(request.sku_prefix, "sku_prefix", optional=True)
    check.text(request.category, "category", 200)
    check.code(request.location, "location", optional=True)
    for number, seen in enumerate(request.min_versions):
        check.code(seen.sku, f"min_versions[{number}].sku")
        check.code(seen.location, f"min_versions[{number}].location")
    return reports.stock_view(request, now)


def _sales(request: pb.ReportSalesRequest, now: datetime) -> Report:
    _filter(request.filter)
    check.count(len(request.dimensions), "dimensions", DIMENSIONS_MAX, least=0)
    unknown = any(one not in reports.DIMENSIONS for one in request.dimensions)
    if unknown or len(set(request.dimensions)) < len(request.dimensions):
        raise check.invalid("dimensions", "must be known, and none twice")
    if request.period not in reports.PERIODS | {pb.PERIOD_UNSPECIFIED: None} or request.period == pb.PERIOD_HOUR:
        raise check.invalid("period", "must be a day, a week, a month or unset")
    return reports.sales(request, time_range(request.range, now))


def _top_skus(request: pb.ReportTopSkusRequest, now: datetime) -> Report:
    _filter(request.filter)
    return reports.top_skus(request, time_range(request.range, now))


def _stock_outs(request: pb.ReportStockOutsRequest, now: datetime) -> Report:
    check.code(request.sku_prefix, "sku_prefix", optional=True)
    check.code(request.location, "location", optional=True)
    if request.join_within.seconds < 0 or not 0 <= request.join_within.nanos < 10**9:
        raise check.invalid("join_within", "must not be negative")
    check.quantity(request.join_within.seconds, "join_within.seconds", least=0, most=10**8)
    return reports.stock_outs(request, time_range(request.range, now))


def _funnel(request: pb.ReportFunnelRequest, now: datetime) -> Report:
    check.text(request.country, "country", 64)
    if request.period not in reports.PERIODS | {pb.PERIOD_UNSPECIFIED: None}:
        raise check.invalid("period", "must be a known period")
    return reports.funnel(request, time_range(request.range, now))


def _cover(request: pb.ReportCoverRequest, now: datetime) -> Report:
    check.text(request.category, "category", 200)
    asked = time_range(request.range, now)
    if (asked.end - asked.start).days > COVER_DAYS_MAX:
        raise check.invalid("range", f"must be at most {COVER_DAYS_MAX} days")
    return reports.cover(request, asked)


def _customers(request: pb.ReportCustomersRequest, now: datetime) -> Report:
    check.text(request.country, "country", 64)
    return reports.customers(request, time_range(request.range, now))


def _returns(request: pb.ReportReturnsRequest, now: datetime) -> Report:
    check.text(request.category, "category", 200)
    check.quantity(request.sold_min, "sold_min", least=0)
    return reports.returns(request, time_range(request.range, now))


EXPORTS: dict[str, Build] = {
    "stock_view": _stock_view,
    "sales": _sales,
    "top_skus": _top_skus,
    "stock_outs": _stock_outs,
    "funnel": _funnel,
    "cover": _cover,
    "customers": _customers,
    "returns": _returns,
}


def _freshness(value: Freshness) -> pb.Freshness:
    return pb.Freshness(as_of=timestamp(value.as_of), lag=duration(value.lag), keys_stopped=value.keys_stopped)


def _cell(row: Any, name: str) -> str:
    """A field as text: times in ISO 8601, durations in seconds, nothing for what is unset."""
    field = row.DESCRIPTOR.fields_by_name[name]
    value = getattr(row, name)
    if field.has_presence and not row.HasField(name):
        return ""
    if field.message_type is None:
        return str(value)
    if field.message_type.full_name == "google.protobuf.Timestamp":
        return str(value.ToJsonString())
    return str(value.ToTimedelta().total_seconds())


def _piece(kind: type[Message], rows: list[Any], *, header: bool) -> pb.ExportReportResponse:
    """Rows as lines of CSV, the first with the names of the fields where it is the header."""
    names = [field.name for field in kind.DESCRIPTOR.fields]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([names] * header)
    writer.writerows([_cell(row, name) for name in names] for row in rows)
    return pb.ExportReportResponse(csv=text.getvalue().encode())
