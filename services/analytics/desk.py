"""What callers of the notification API do: rules, subscriptions, and deliveries that are tried again.

A function takes part in its caller's transaction. Writes go through `once`, which keeps the first outcome of each
request id.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import Message

from services.analytics import alerts, delivery
from services.analytics.alerting import QuietHours, Rule, Subscription, key_of
from services.analytics.channels import Channel, Config
from services.analytics.delivery import Draft
from services.analytics.domain import Reason
from services.analytics.listing import Listing
from shared.database import Connection, Database, Record
from shared.refusal import Refusal
from shared.wire import fingerprint

RULES_MAX = 200
SUBSCRIPTIONS_MAX = 500
ATTEMPTS_SHOWN_MAX = 50
Answer = TypeVar("Answer", bound=Message)

# Waits for whoever makes the same request at the same time.
REMEMBER = "INSERT INTO desk.request (request_id, fingerprint) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING true"
REMEMBERED = "SELECT fingerprint, answer, refusal FROM desk.request WHERE request_id = $1"
OUTCOME = "UPDATE desk.request SET answer = $2, refusal = $3 WHERE request_id = $1"
COUNT = "SELECT count(*) FROM desk.{table} WHERE deleted_at IS NULL"
DELETE_RULE = "UPDATE desk.alert_rule SET deleted_at = now() WHERE rule_id = $1 AND deleted_at IS NULL RETURNING true"
INSERT_SUBSCRIPTION = """
INSERT INTO desk.subscription (subscription_id, target_id, channel, config, target, kinds, severity_min, sku_prefixes,
                               categories, locations, digest_period, quiet_start, quiet_end, quiet_zone, subject, body)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) ON CONFLICT DO NOTHING RETURNING *
"""
INSERT_TARGET = "INSERT INTO desk.target (target_id) VALUES ($1) ON CONFLICT DO NOTHING"
PAUSE = "UPDATE desk.subscription SET paused = $2 WHERE subscription_id = $1 AND deleted_at IS NULL RETURNING *"
DELETE_SUBSCRIPTION = """
UPDATE desk.subscription SET deleted_at = now(), config = '{}'
WHERE subscription_id = $1 AND deleted_at IS NULL RETURNING true
"""
GIVE_UP = """
UPDATE desk.delivery SET state = 'DEAD', settled_at = now()
WHERE subscription_id = $1 AND state IN ('GATHERED', 'PENDING') -- what is being sent is settled by its sender
"""
SUBSCRIPTION = "SELECT *, now() AS now FROM desk.subscription WHERE subscription_id = $1 AND deleted_at IS NULL"
LOCK_DELIVERY = """
SELECT state, subscription_id, attempts, (
  SELECT deleted_at IS NOT NULL FROM desk.subscription AS s WHERE s.subscription_id = d.subscription_id) AS deleted
FROM desk.delivery AS d WHERE delivery_id = $1 FOR UPDATE
"""
AGAIN = """
UPDATE desk.delivery SET state = 'PENDING', due_at = now(), settled_at = NULL, attempts_max = attempts + $2
WHERE delivery_id = $1
"""
ATTEMPTS = """
SELECT attempt.* FROM unnest($1::text[]) AS asked (delivery_id) CROSS JOIN LATERAL (
  SELECT * FROM desk.attempt WHERE attempt.delivery_id = asked.delivery_id ORDER BY number DESC LIMIT $2
) AS attempt ORDER BY delivery_id, number
"""


class Wanted(NamedTuple):
    """A subscription to be made, and where its messages go."""

    subscription: Subscription
    channel: str
    config: Config
    target: str
    quiet: QuietHours | None = None


async def once(
    database: Database, request: Any, answer: type[Answer], work: Callable[[Connection], Awaitable[Answer]]
) -> Answer:
    """Do the work of a request in one transaction, unless it was done before: then its first outcome.

    Raises Refusal REQUEST_ID_REUSED, and what `work` refuses; a refusal has changed nothing and is kept as well.
    """
    name, content = request.request_id, fingerprint(request)

    async def run(connection: Connection) -> Answer | Refusal:
        if not await connection.fetchval(REMEMBER, name, content):
            known = await connection.fetchrow(REMEMBERED, name)
            assert known is not None
            if known["fingerprint"] != content:
                return Refusal(Reason.REQUEST_ID_REUSED, f"{name} was used with other content", request_id=name)
            if known["refusal"] is None:
                return answer.FromString(known["answer"])
            reason, message, metadata = json.loads(known["refusal"])
            return Refusal(reason, message, **metadata)
        try:
            async with connection.transaction():
                made = await work(connection)
        except Refusal as refusal:
            kept = json.dumps([refusal.reason, refusal.message, refusal.metadata])
            await connection.execute(OUTCOME, name, None, kept)
            return refusal
        await connection.execute(OUTCOME, name, made.SerializeToString(), None)
        return made

    outcome = await database.run(run)
    if isinstance(outcome, Refusal):
        raise outcome
    return outcome


# -- rules


async def create_rule(connection: Connection, rule: Rule) -> Record:
    await _room(connection, "alert_rule", RULES_MAX)
    row = await alerts.insert_rule(connection, rule)
    if row is None:
        raise Refusal(Reason.ALERT_RULE_ALREADY_EXISTS, f"{rule.rule_id} was used before", alert_rule_id=rule.rule_id)
    return row


async def delete_rule(connection: Connection, rule_id: str) -> None:
    if not await connection.fetchval(DELETE_RULE, rule_id):
        raise Refusal(Reason.ALERT_RULE_NOT_FOUND, f"there is no rule {rule_id}", alert_rule_id=rule_id)


async def _room(connection: Connection, table: str, limit: int) -> None:
    if await connection.fetchval(COUNT.format(table=table)) >= limit:
        raise Refusal(Reason.LIMIT_REACHED, f"there are {limit} already; delete some", what=table, limit=limit)


# -- subscriptions


def described(adapters: Mapping[str, Channel], channel: str, config: Config) -> tuple[str, str]:
    """The id of a target, which is the same for all who send there, and how it is shown. Raises BadConfigError."""
    identity, shown = adapters[channel].describe(config)
    return key_of(channel, identity), shown


async def create_subscription(connection: Connection, wanted: Wanted) -> Record:
    await _room(connection, "subscription", SUBSCRIPTIONS_MAX)
    row = await insert_subscription(connection, wanted)
    if row is None:
        name = wanted.subscription.subscription_id
        raise Refusal(Reason.SUBSCRIPTION_ALREADY_EXISTS, f"{name} was used before", subscription_id=name)
    return row


async def insert_subscription(connection: Connection, wanted: Wanted) -> Record | None:
    """The row of a subscription; None when its id was ever used."""
    one, quiet = wanted.subscription, wanted.quiet
    await connection.execute(INSERT_TARGET, one.target_id)
    return await connection.fetchrow(
        INSERT_SUBSCRIPTION, one.subscription_id, one.target_id, wanted.channel, json.dumps(dict(wanted.config)),
        wanted.target, sorted(one.kinds), one.severity_min.name, one.sku_prefixes, one.categories, one.locations,
        one.digest_period, quiet and quiet.start, quiet and quiet.end, quiet and quiet.zone, one.subject, one.body,
    )  # fmt: skip


async def pause_subscription(connection: Connection, subscription_id: str, *, paused: bool) -> Record:
    return _found(await connection.fetchrow(PAUSE, subscription_id, paused), subscription_id)


async def delete_subscription(connection: Connection, subscription_id: str) -> None:
    _found(await connection.fetchrow(DELETE_SUBSCRIPTION, subscription_id), subscription_id)
    await connection.execute(GIVE_UP, subscription_id)


async def test_subscription(connection: Connection, subscription_id: str, request_id: str, attempts_max: int) -> str:
    """Make a delivery that says it is a test; its id."""
    row = _found(await connection.fetchrow(SUBSCRIPTION, subscription_id), subscription_id)
    key = key_of("test", request_id)
    subject, body = "A test of Holdfast", f"Messages of the subscription {subscription_id} arrive here."
    content = json.dumps({"id": key, "type": "holdfast.test", "subject": subject, "body": body})
    draft = Draft(
        key, subscription_id, row["target_id"], None, 0, True, "PENDING", subject, body, content, row["now"]
    )  # fmt: skip
    await delivery.insert(connection, [draft], attempts_max)
    return key


def _found(row: Record | None, subscription_id: str) -> Record:
    if row is None:
        raise Refusal(
            Reason.SUBSCRIPTION_NOT_FOUND, f"there is no subscription {subscription_id}",
            subscription_id=subscription_id,
        )  # fmt: skip
    return row


# -- deliveries


async def retry_delivery(connection: Connection, delivery_id: str, attempts_max: int) -> None:
    row = await connection.fetchrow(LOCK_DELIVERY, delivery_id)
    if row is None:
        raise Refusal(Reason.DELIVERY_NOT_FOUND, f"there is no delivery {delivery_id}", delivery_id=delivery_id)
    if row["state"] != "DEAD":
        raise Refusal(
            Reason.DELIVERY_NOT_DEAD, f"{delivery_id} is {row['state']}", delivery_id=delivery_id, state=row["state"]
        )
    if row["deleted"]:
        name = row["subscription_id"]
        raise Refusal(Reason.SUBSCRIPTION_DELETED, f"{name} was deleted", subscription_id=name)
    await connection.execute(AGAIN, delivery_id, attempts_max)


async def attempts(connection: Connection, delivery_ids: Sequence[str]) -> dict[str, list[Record]]:
    """The latest attempts of deliveries, in order."""
    found: dict[str, list[Record]] = {}
    for row in await connection.fetch(ATTEMPTS, delivery_ids, ATTEMPTS_SHOWN_MAX):
        found.setdefault(row["delivery_id"], []).append(row)
    return found


# -- lists

RULES = Listing("desk.alert_rule", "rule_id")
ALERTS = Listing("desk.alert", "alert_id", "opened_at")
SUBSCRIPTIONS = Listing("desk.subscription", "subscription_id")
DELIVERIES = Listing(
    "(SELECT delivery_id, subscription_id, s.target, alert_id, alert_version, state, d.subject, attempts_max, due_at,"
    " d.created_at, settled_at, digest_id FROM desk.delivery AS d JOIN desk.subscription AS s USING (subscription_id))"
    " AS d",
    "delivery_id",
    "created_at",
)
