"""What analytics says of a replay, asked through its API and compared with inventory's own database."""

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import asyncpg
from holdfast.analytics.v1 import analytics_pb2 as pb
from holdfast.analytics.v1 import fraud_pb2 as fraud
from holdfast.analytics.v1 import notification_pb2 as notification

from deploy.local.receiver import Receiver
from shared.client import Holdfast

CATCH_UP_SECONDS_MAX = 120
EVER = pb.TimeRange()
EVER.start_time.FromDatetime(datetime(2000, 1, 1, tzinfo=UTC))
TOP_ROWS = 5
NOTIFY_SECONDS_MAX = 30
NOTIFY_LOOK_SECONDS = 0.2
NOTIFY_QUIET_LOOKS = 6  # in a row: an alert is a message a moment later

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
    top = await holdfast.analytics.ReportTopSkus(pb.ReportTopSkusRequest(range=EVER, page_size=TOP_ROWS))
    funnel = await holdfast.report("ReportFunnel", pb.ReportFunnelRequest(range=EVER, period=pb.PERIOD_MONTH))
    cases = await holdfast.every(
        holdfast.fraud.ListCases, fraud.ListCasesRequest(page_size=1_000, state=fraud.CASE_STATE_OPEN), "cases"
    )
    return {
        "events_lag_ms": {"p50": fresh.lag_ms_p50, "p95": fresh.lag_ms_p95, "p99": fresh.lag_ms_p99},
        "catch_up_seconds": round(seconds, 2),
        "mart_equals_ledger": await mart_equals_ledger(inventory_dsn, analytics_dsn),
        "sales_by_month": {row.period[:7]: row.value_micros / 1_000_000 for row in months},
        "cases": len(cases),
        "top_cases": [_case(case) for case in sorted(cases, key=lambda case: -case.score)[:TOP_ROWS]],
        "reports": {"sales": _rows(months), "top_skus": _rows(list(top.rows)), "funnel": _rows(funnel)},
    }


async def subscribe(holdfast: Holdfast, receiver: Receiver) -> None:
    """Send what calls for a person to a local receiver of web hooks; a file has everything by default."""
    hook = notification.Subscription(
        subscription_id="webhook", webhook=notification.WebhookChannel(url=receiver.url, secret=receiver.secret),
        kinds=[
            notification.ALERT_KIND_FRAUD_CASE, notification.ALERT_KIND_DRIFT, notification.ALERT_KIND_LAG,
            notification.ALERT_KIND_DEAD_LETTERS,
        ],
    )  # fmt: skip
    request = notification.CreateSubscriptionRequest(request_id="make-webhook", subscription=hook)
    await holdfast.notifications.CreateSubscription(request)


async def notified(holdfast: Holdfast) -> dict[str, Any]:
    """The alerts and where their messages went, once nothing is on its way any more or NOTIFY_SECONDS_MAX are over."""
    until = time.monotonic() + NOTIFY_SECONDS_MAX
    quiet = 0
    while quiet < NOTIFY_QUIET_LOOKS and time.monotonic() < until:
        await asyncio.sleep(NOTIFY_LOOK_SECONDS)
        quiet = 0 if await _on_the_way(holdfast) else quiet + 1
    alerts = await holdfast.every(
        holdfast.notifications.ListAlerts, notification.ListAlertsRequest(page_size=1_000), "alerts"
    )
    deliveries = await holdfast.every(
        holdfast.notifications.ListDeliveries, notification.ListDeliveriesRequest(page_size=1_000), "deliveries"
    )
    kinds = Counter(notification.AlertKind.Name(one.kind).removeprefix("ALERT_KIND_") for one in alerts)
    states = Counter(
        (one.target, notification.DeliveryState.Name(one.state).removeprefix("DELIVERY_STATE_")) for one in deliveries
    )
    return {
        "alerts": dict(sorted(kinds.items())),
        "alerts_open": sum(one.state == notification.ALERT_STATE_OPEN for one in alerts),
        "messages": [
            {"target": target, "state": state, "messages": count} for (target, state), count in sorted(states.items())
        ],
    }


async def _on_the_way(holdfast: Holdfast) -> bool:
    for state in (notification.DELIVERY_STATE_PENDING, notification.DELIVERY_STATE_SENDING):
        request = notification.ListDeliveriesRequest(page_size=1, state=state)
        if (await holdfast.notifications.ListDeliveries(request)).deliveries:
            return True
    return False


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
