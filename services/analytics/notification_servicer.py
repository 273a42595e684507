"""The edge of the notification API: decode and check, one call, encode."""

import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import time
from typing import Any

from holdfast.analytics.v1 import notification_pb2 as pb
from holdfast.analytics.v1 import notification_pb2_grpc

from services.analytics import desk
from services.analytics.alerting import (
    ABOVE,
    BELOW,
    Kind,
    QuietHours,
    Rule,
    Severity,
    Subscription,
    bad_placeholder,
)
from services.analytics.channels import BadConfigError, Channel
from services.analytics.desk import Wanted
from services.analytics.listing import Listing
from services.analytics.settings import Settings
from shared import check
from shared.database import Connection, Database, Record
from shared.server import Context
from shared.wire import duration, timestamp

KINDS_MAX = 20
FILTERS_MAX = 100
LEVEL_MAX = 10**12
DIGEST_SECONDS = range(60, 31 * 86_400 + 1)
SUBJECT_CHARACTERS_MAX = 200
LOCAL_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
BODY_CHARACTERS_MAX = 4_000
_KIND, _SEVERITY, _STATE, _DELIVERY = "ALERT_KIND_", "ALERT_SEVERITY_", "ALERT_STATE_", "DELIVERY_STATE_"


class NotificationServicer(notification_pb2_grpc.NotificationServiceServicer):
    """The notification API over a database. The adapters are asked what a channel's config is in need of."""

    def __init__(self, settings: Settings, database: Database, adapters: Mapping[str, Channel]) -> None:
        self._attempts_max = settings.notify_attempts_max
        self._database = database
        self._channels = adapters

    async def CreateAlertRule(self, request: pb.CreateAlertRuleRequest, context: Context) -> pb.CreateAlertRuleResponse:
        rule = _rule(request.rule)

        async def work(connection: Connection) -> pb.CreateAlertRuleResponse:
            return pb.CreateAlertRuleResponse(rule=_shown_rule(await desk.create_rule(connection, rule)))

        return await self._once(request, pb.CreateAlertRuleResponse, work)

    async def ListAlertRules(self, request: pb.ListAlertRulesRequest, context: Context) -> pb.ListAlertRulesResponse:
        rows, token = await self._page(desk.RULES, request, {"deleted_at IS NULL AND ?": True})
        return pb.ListAlertRulesResponse(rules=map(_shown_rule, rows), next_page_token=token)

    async def DeleteAlertRule(self, request: pb.DeleteAlertRuleRequest, context: Context) -> pb.DeleteAlertRuleResponse:
        name = check.code(request.alert_rule_id, "alert_rule_id")

        async def work(connection: Connection) -> pb.DeleteAlertRuleResponse:
            await desk.delete_rule(connection, name)
            return pb.DeleteAlertRuleResponse()

        return await self._once(request, pb.DeleteAlertRuleResponse, work)

    async def ListAlerts(self, request: pb.ListAlertsRequest, context: Context) -> pb.ListAlertsResponse:
        conditions: dict[str, object] = {}
        if request.kind:
            conditions["kind = ?"] = check.name(pb.AlertKind, request.kind, "kind", _KIND)
        if request.state:
            conditions["state = ?"] = check.name(pb.AlertState, request.state, "state", _STATE)
        if request.sku:
            conditions["sku = ?"] = check.code(request.sku, "sku")
        if request.severity_min:
            least = Severity[check.name(pb.AlertSeverity, request.severity_min, "severity_min", _SEVERITY)]
            conditions["severity = ANY (?::text[])"] = [one.name for one in Severity if one >= least]
        rows, token = await self._page(desk.ALERTS, request, conditions)
        return pb.ListAlertsResponse(alerts=map(_shown_alert, rows), next_page_token=token)

    async def CreateSubscription(
        self, request: pb.CreateSubscriptionRequest, context: Context
    ) -> pb.CreateSubscriptionResponse:
        wanted = self._wanted(request.subscription)

        async def work(connection: Connection) -> pb.CreateSubscriptionResponse:
            row = await desk.create_subscription(connection, wanted)
            return pb.CreateSubscriptionResponse(subscription=_shown_subscription(row))

        return await self._once(request, pb.CreateSubscriptionResponse, work)

    async def ListSubscriptions(
        self, request: pb.ListSubscriptionsRequest, context: Context
    ) -> pb.ListSubscriptionsResponse:
        rows, token = await self._page(desk.SUBSCRIPTIONS, request, {"deleted_at IS NULL AND ?": True})
        return pb.ListSubscriptionsResponse(subscriptions=map(_shown_subscription, rows), next_page_token=token)

    async def PauseSubscription(
        self, request: pb.PauseSubscriptionRequest, context: Context
    ) -> pb.PauseSubscriptionResponse:
        name = check.code(request.subscription_id, "subscription_id")

        async def work(connection: Connection) -> pb.PauseSubscriptionResponse:
            row = await desk.pause_subscription(connection, name, paused=request.paused)
            return pb.PauseSubscriptionResponse(subscription=_shown_subscription(row))

        return await self._once(request, pb.PauseSubscriptionResponse, work)

    async def DeleteSubscription(
        self, request: pb.DeleteSubscriptionRequest, context: Context
    ) -> pb.DeleteSubscriptionResponse:
        name = check.code(request.subscription_id, "subscription_id")

        async def work(connection: Connection) -> pb.DeleteSubscriptionResponse:
            await desk.delete_subscription(connection, name)
            return pb.DeleteSubscriptionResponse()

        return await self._once(request, pb.DeleteSubscriptionResponse, work)

    async def TestSubscription(
        self, request: pb.TestSubscriptionRequest, context: Context
    ) -> pb.TestSubscriptionResponse:
        name = check.code(request.subscription_id, "subscription_id")

        async def work(connection: Connection) -> pb.TestSubscriptionResponse:
            key = await desk.test_subscription(connection, name, request.request_id, self._attempts_max)
            return pb.TestSubscriptionResponse(delivery_id=key)

        return await self._once(request, pb.TestSubscriptionResponse, work)

    async def ListDeliveries(self, request: pb.ListDeliveriesRequest, context: Context) -> pb.ListDeliveriesResponse:
        conditions: dict[str, object] = {}
        if request.state:
            conditions["state = ?"] = check.name(pb.DeliveryState, request.state, "state", _DELIVERY)
        if request.subscription_id:
            conditions["subscription_id = ?"] = check.code(request.subscription_id, "subscription_id")
        if request.alert_id:
            conditions["alert_id = ?"] = check.code(request.alert_id, "alert_id")
        async with self._database.connection() as connection:
            rows, token = await desk.DELIVERIES.page(connection, request, conditions)
            tried = await desk.attempts(connection, [row["delivery_id"] for row in rows])
        shown = [_shown_delivery(row, tried.get(row["delivery_id"], [])) for row in rows]
        return pb.ListDeliveriesResponse(deliveries=shown, next_page_token=token)

    async def RetryDelivery(self, request: pb.RetryDeliveryRequest, context: Context) -> pb.RetryDeliveryResponse:
        name = check.code(request.delivery_id, "delivery_id")

        async def work(connection: Connection) -> pb.RetryDeliveryResponse:
            await desk.retry_delivery(connection, name, self._attempts_max)
            return pb.RetryDeliveryResponse()

        return await self._once(request, pb.RetryDeliveryResponse, work)

    # -- all of them ------------------------------------------------------------------------------

    async def _once(
        self, request: Any, answer: type[desk.Answer], work: Callable[[Connection], Awaitable[desk.Answer]]
    ) -> desk.Answer:
        check.code(request.request_id, "request_id")
        return await desk.once(self._database, request, answer, work)

    async def _page(self, listing: Listing, request: Any, conditions: Mapping[str, object]) -> tuple[list[Record], str]:
        async with self._database.connection() as connection:
            return await listing.page(connection, request, conditions)

    def _wanted(self, asked: pb.Subscription) -> Wanted:
        channel = asked.WhichOneof("channel")
        if channel is None:
            raise check.invalid("subscription.channel", "must be set")
        given = getattr(asked, channel)
        config = {field.name: getattr(given, field.name) for field in given.DESCRIPTOR.fields}
        try:
            target_id, shown = desk.described(self._channels, channel, config)
        except BadConfigError as error:
            raise check.invalid(f"subscription.{channel}.{error.field}", str(error)) from None
        subscription = Subscription(
            check.code(asked.subscription_id, "subscription.subscription_id"),
            target_id,
            _kinds(asked),
            _severity(asked.severity_min, "subscription.severity_min", Severity.INFO),
            _filters(asked, "sku_prefixes"),
            _filters(asked, "categories"),
            _filters(asked, "locations"),
            _digest_period(asked),
            _template(asked.template.subject, "subject", SUBJECT_CHARACTERS_MAX),
            _template(asked.template.body, "body", BODY_CHARACTERS_MAX),
        )
        return Wanted(subscription, channel, config, shown, _quiet(asked))


# -- from what callers send


def _severity(value: int, field: str, default: Severity) -> Severity:
    return Severity[check.name(pb.AlertSeverity, value, field, _SEVERITY)] if value else default


def _rule(asked: pb.AlertRule) -> Rule:
    kind = Kind(check.name(pb.AlertKind, asked.kind, "rule.kind", _KIND))
    opens, closes = asked.open_level, asked.close_level
    for field, level in (("rule.open_level", opens), ("rule.close_level", closes)):
        if not math.isfinite(level) or not 0 <= level <= LEVEL_MAX:
            raise check.invalid(field, f"must be from 0 to {LEVEL_MAX}")
    if opens and (kind is Kind.STOCK_OUT or kind not in BELOW | ABOVE):
        raise check.invalid("rule.open_level", "must be 0 for this kind")
    if closes and kind not in BELOW | ABOVE:
        raise check.invalid("rule.close_level", "must be 0 for this kind")
    if kind in BELOW:
        opens = 1 if kind is Kind.STOCK_OUT else opens
        closes = closes or opens
        if not opens:
            raise check.invalid("rule.open_level", "must be above 0")
        if closes < opens:
            raise check.invalid("rule.close_level", "must not be below open_level")
    elif closes > opens:
        raise check.invalid("rule.close_level", "must not be above open_level")
    if kind in ABOVE | {Kind.FRAUD_CASE} and (asked.sku_prefix or asked.category or asked.location):
        raise check.invalid("rule", "must have no sku_prefix, category or location for this kind")
    return Rule(
        check.code(asked.alert_rule_id, "rule.alert_rule_id"),
        kind,
        _severity(asked.severity, "rule.severity", Severity.WARNING),
        opens,
        closes,
        check.code(asked.sku_prefix, "rule.sku_prefix", optional=True),
        check.text(asked.category, "rule.category", 200),
        check.code(asked.location, "rule.location", optional=True),
    )


def _kinds(asked: pb.Subscription) -> frozenset[str]:
    check.count(len(asked.kinds), "subscription.kinds", KINDS_MAX, least=0)
    return frozenset(check.name(pb.AlertKind, kind, "subscription.kinds", _KIND) for kind in asked.kinds)


def _filters(asked: pb.Subscription, field: str) -> tuple[str, ...]:
    values = tuple(getattr(asked, field))
    check.count(len(values), f"subscription.{field}", FILTERS_MAX, least=0)
    for number, value in enumerate(values):
        name = f"subscription.{field}[{number}]"
        if not check.text(value, name, 200):
            raise check.invalid(name, "must not be empty")
    return values


def _digest_period(asked: pb.Subscription) -> Any:
    if not asked.HasField("digest_period"):
        return None
    period = asked.digest_period
    if period.seconds not in DIGEST_SECONDS or period.nanos:
        raise check.invalid("subscription.digest_period", "must be whole seconds, from 1 minute to 31 days")
    return period.ToTimedelta()


def _quiet(asked: pb.Subscription) -> QuietHours | None:
    if not asked.HasField("quiet_hours"):
        return None
    quiet = asked.quiet_hours
    start, end = _local(quiet.start, "start"), _local(quiet.end, "end")
    if start == end:
        raise check.invalid("subscription.quiet_hours.end", "must be other than start")
    return QuietHours(start, end, check.time_zone(quiet.time_zone, "subscription.quiet_hours.time_zone"))


def _local(text: str, field: str) -> time:
    found = LOCAL_TIME.fullmatch(text)
    if not found:
        raise check.invalid(f"subscription.quiet_hours.{field}", 'must be as "22:30"')
    return time(int(found[1]), int(found[2]))


def _template(text: str, field: str, characters_max: int) -> str:
    name = f"subscription.template.{field}"
    for line in text.split("\n"):
        check.text(line, name, characters_max)
    if len(text) > characters_max:
        raise check.invalid(name, f"must have at most {characters_max} characters")
    if bad := bad_placeholder(text):
        raise check.invalid(name, f"has {bad}")
    return text


# -- to what callers see


def _shown_rule(row: Record) -> pb.AlertRule:
    kind = row["kind"]
    return pb.AlertRule(
        alert_rule_id=row["rule_id"], kind=pb.AlertKind.Value(_KIND + kind),
        severity=pb.AlertSeverity.Value(_SEVERITY + row["severity"]),
        open_level=0 if kind == Kind.STOCK_OUT else row["open_level"], close_level=row["close_level"],
        sku_prefix=row["sku_prefix"], category=row["category"], location=row["location"],
        create_time=timestamp(row["created_at"]),
    )  # fmt: skip


def _shown_alert(row: Record) -> pb.Alert:
    return pb.Alert(
        alert_id=row["alert_id"], alert_rule_id=row["rule_id"], kind=pb.AlertKind.Value(_KIND + row["kind"]),
        severity=pb.AlertSeverity.Value(_SEVERITY + row["severity"]),
        state=pb.AlertState.Value(_STATE + row["state"]), version=row["version"], key=row["key"], sku=row["sku"],
        location=row["location"], name=row["name"], category=row["category"], value=row["value"],
        open_level=row["open_level"], details=json.loads(row["details"]), open_time=timestamp(row["opened_at"]),
        update_time=timestamp(row["updated_at"]),
        close_time=timestamp(row["closed_at"]) if row["closed_at"] else None,
    )  # fmt: skip


def _shown_subscription(row: Record) -> pb.Subscription:
    quiet = None
    if row["quiet_zone"]:
        start, end = row["quiet_start"].strftime("%H:%M"), row["quiet_end"].strftime("%H:%M")
        quiet = pb.QuietHours(start=start, end=end, time_zone=row["quiet_zone"])
    return pb.Subscription(
        subscription_id=row["subscription_id"], kinds=[pb.AlertKind.Value(_KIND + kind) for kind in row["kinds"]],
        severity_min=pb.AlertSeverity.Value(_SEVERITY + row["severity_min"]), sku_prefixes=row["sku_prefixes"],
        categories=row["categories"], locations=row["locations"],
        digest_period=duration(row["digest_period"]) if row["digest_period"] else None, quiet_hours=quiet,
        template=pb.MessageTemplate(subject=row["subject"], body=row["body"]), paused=row["paused"],
        target=row["target"], create_time=timestamp(row["created_at"]),
    )  # fmt: skip


def _shown_delivery(row: Record, attempts: list[Record]) -> pb.Delivery:
    tried = [
        pb.DeliveryAttempt(
            number=one["number"], start_time=timestamp(one["started_at"]), status=one["status"], error=one["error"],
            end_time=timestamp(one["ended_at"]) if one["ended_at"] else None,
        )
        for one in attempts
    ]  # fmt: skip
    return pb.Delivery(
        delivery_id=row["delivery_id"], subscription_id=row["subscription_id"], target=row["target"],
        alert_id=row["alert_id"] or "", alert_version=row["alert_version"],
        state=pb.DeliveryState.Value(_DELIVERY + row["state"]), subject=row["subject"], attempts=tried,
        attempts_max=row["attempts_max"], due_time=timestamp(row["due_at"]), create_time=timestamp(row["created_at"]),
        settle_time=timestamp(row["settled_at"]) if row["settled_at"] else None, digest_id=row["digest_id"] or "",
    )  # fmt: skip
