"""What analytics says of a replay, asked through its API and compared with inventory's own database."""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import asyncpg
from holdfast.analytics.v1 import analytics_pb2 as pb
from holdfast.analytics.v1 import fraud_pb2 as fraud

from shared.client import Holdfast

CATCH_UP_SECONDS_MAX = 120
EVER = pb.TimeRange()
EVER.start_time.FromDatetime(datetime(2000, 1, 1, tzinfo=UTC))
TOP_ROWS = 5
CASES_MAX = 1_000

STOCK = "SELECT sku, location, on_hand, held, version FROM stock ORDER BY sku, location"
MART = STOCK.replace("stock ", "stock_view ")
LEDGER = "SELECT count(*), coalesce(sum(on_hand_delta), 0)::bigint, coalesce(sum(held_delta), 0)::bigint FROM movement"


async def caught_up(holdfast: Holdfast) -> float:
    """Wait until analytics has seen and judged all that was recorded by now; return how many seconds it took."""
    began, now = time.monotonic(), datetime.now(UTC)
    while True:
        answer = await holdfast.freshness()
        if min(answer.freshness.as_of.ToDatetime(tzinfo=UTC), answer.judge_time.ToDatetime(tzinfo=UTC)) > now:
            return time.monotonic() - began
        if time.monotonic() - began > CATCH_UP_SECONDS_MAX:
            raise TimeoutError(f"analytics has not caught up within {CATCH_UP_SECONDS_MAX} s")
        await asyncio.sleep(0.05)


async def mart_equals_ledger(inventory_dsn: str, analytics_dsn: str) -> bool:
    """Whether the stock view has the counters of inventory, key by key, and its copy of the ledger the same sums."""
    inventory, analytics = await asyncpg.connect(inventory_dsn), await asyncpg.connect(analytics_dsn)
    try:
        stock, mart = await inventory.fetch(STOCK), await analytics.fetch(MART)
        ledger, copy = await inventory.fetchrow(LEDGER), await analytics.fetchrow(LEDGER)
    finally:
        await inventory.close()
        await analytics.close()
    # A key that never moved is no event, and not in the mart.
    return [tuple(row) for row in stock if row["version"]] == [tuple(row) for row in mart] and ledger == copy


async def analyse(holdfast: Holdfast, inventory_dsn: str, analytics_dsn: str) -> dict[str, Any]:
    """The figures, and the rows of the reports that are shown."""
    seconds = await caught_up(holdfast)
    fresh = await holdfast.freshness()
    months = await holdfast.report("ReportSales", pb.ReportSalesRequest(range=EVER, period=pb.PERIOD_MONTH))
    top = await holdfast.report("ReportTopSkus", pb.ReportTopSkusRequest(range=EVER, page_size=TOP_ROWS), pages_max=1)
    funnel = await holdfast.report("ReportFunnel", pb.ReportFunnelRequest(range=EVER, period=pb.PERIOD_MONTH))
    cases = await holdfast.fraud.ListCases(fraud.ListCasesRequest(page_size=CASES_MAX, state=fraud.CASE_STATE_OPEN))
    return {
        "events_lag_ms": {"p50": fresh.lag_ms_p50, "p95": fresh.lag_ms_p95, "p99": fresh.lag_ms_p99},
        "catch_up_seconds": round(seconds, 2),
        "mart_equals_ledger": await mart_equals_ledger(inventory_dsn, analytics_dsn),
        "sales_by_month": {row.period[:7]: row.value_micros / 1_000_000 for row in months},
        "cases": len(cases.cases),
        "top_cases": [_case(case) for case in sorted(cases.cases, key=lambda case: -case.score)[:TOP_ROWS]],
        "reports": {"sales": _rows(months), "top_skus": _rows(top), "funnel": _rows(funnel)},
    }


def _case(case: fraud.Case) -> dict[str, Any]:
    return {
        "case_id": case.case_id,
        "subject": case.subject,
        "decision": fraud.Decision.Name(case.decision).removeprefix("DECISION_"),
        "score": case.score,
        "reservation_ids": list(case.reservation_ids),
        "units": case.units,
        "open_time": case.open_time.ToJsonString(),
        "rules": {fired.rule_id: round(fired.value, 1) for fired in case.rules},
    }


def _rows(messages: list[Any]) -> list[dict[str, Any]]:
    """The fields of rows that are set, as JSON has them."""

    def plain(value: Any) -> Any:
        return value.ToJsonString() if hasattr(value, "ToJsonString") else value

    return [{field.name: plain(value) for field, value in message.ListFields()} for message in messages]
