"""From steps of alerts to messages that have arrived.

    alert_event --dispatch--> GATHERED --digest--> DIGESTED, and a delivery of the digest
                         `--> PENDING --claim--> SENDING --record--> SENT | PENDING (later) | DEAD
                                                DEAD --RetryDelivery--> PENDING

* *Nothing lost.* An event becomes deliveries in the transaction that deletes it. A delivery is claimed, sent and
  recorded in three steps, with no transaction across the network. A crash after the claim leaves a lease that
  expires, and the message is sent again under the same key: at least once, and once for who looks at the key.
* *In order.* A message of an alert waits until the earlier ones of the same subscription are settled.
* *Apart.* Each target with something to send has a task of its own, and one message at a time, by the lease on its
  row. Two senders at once do no harm.
* *Spared.* A target that failed several times in a row is left alone for a while, then tried with one message. So is
  one that asked for it (Retry-After). No target gets more attempts a minute than the settings say.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

import structlog
from opentelemetry.trace import SpanKind

from services.analytics import alerting
from services.analytics.alerting import Outcome, Patience, QuietHours, Severity, Subscription, key_of
from services.analytics.channels import Channel, Config, Message
from services.analytics.channels.apprise import Apprise
from services.analytics.channels.file import File
from services.analytics.channels.mail import Mail
from services.analytics.channels.webhook import Webhook
from services.analytics.settings import Settings
from shared import metrics, telemetry, workers
from shared.database import Connection, Database, Record, affected, columns

log = structlog.get_logger(__name__)
EVENTS_MAX = 100
THREADS_MAX = 500
CONNECTIONS_MAX = 3
LEASE_MARGIN_SECONDS = 20.0  # for what stands between claim and record beside the sending
STOP_SECONDS_MAX = 2.0
FORGET_ROWS = 5_000

# Locked, not skipped: two dispatchers would otherwise tell versions of an alert out of order.
EVENTS = "SELECT * FROM desk.alert_event ORDER BY seq LIMIT $1 FOR UPDATE"
FORGET_EVENTS = "DELETE FROM desk.alert_event WHERE seq = ANY ($1::bigint[])"
SUBSCRIPTIONS = "SELECT * FROM desk.subscription WHERE deleted_at IS NULL AND NOT paused ORDER BY subscription_id"
INSERT_DELIVERIES = """
INSERT INTO desk.delivery (delivery_id, subscription_id, target_id, alert_id, alert_version, urgent, state, subject,
                           body, content, due_at, traceparent, attempts_max)
SELECT *, $13 FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::boolean[], $7::text[],
                          $8::text[], $9::text[], $10::jsonb[], $11::timestamptz[], $12::text[])
ON CONFLICT DO NOTHING
"""
DIGESTS_DUE = """
SELECT DISTINCT subscription_id FROM desk.delivery WHERE state = 'GATHERED' AND due_at <= now()
"""
GATHERED = """
SELECT delivery_id, target_id, subject, content FROM desk.delivery
WHERE subscription_id = $1 AND state = 'GATHERED' AND due_at <= now() ORDER BY seq LIMIT $2 FOR UPDATE
"""
DIGESTED = """
UPDATE desk.delivery SET state = 'DIGESTED', digest_id = $2, settled_at = now() WHERE delivery_id = ANY ($1::text[])
"""
# A message that may be sent now: due, or left behind by a crash (whoever has the lease has looked after that), of a
# subscription that goes on, and with no earlier one of its alert, nor an earlier digest, before it.
_DUE = """
FROM desk.delivery AS d JOIN desk.subscription AS s ON s.subscription_id = d.subscription_id AND NOT s.paused
WHERE d.target_id = target.target_id AND d.state IN ('PENDING', 'SENDING') AND d.due_at <= now()
  AND NOT EXISTS (
    SELECT FROM desk.delivery AS e WHERE e.subscription_id = d.subscription_id AND e.alert_id = d.alert_id
      AND e.alert_version < d.alert_version AND e.state IN ('PENDING', 'SENDING'))
  AND (d.alert_id IS NOT NULL OR d.urgent OR NOT EXISTS (
    SELECT FROM desk.delivery AS e WHERE e.target_id = d.target_id AND e.subscription_id = d.subscription_id
      AND e.alert_id IS NULL AND NOT e.urgent AND e.seq < d.seq AND e.state IN ('PENDING', 'SENDING')))
"""
_FREE = """
lease_until < now() AND open_until <= now() AND $1 > (
  SELECT count(*) FROM desk.attempt
  WHERE attempt.target_id = target.target_id AND started_at > now() - interval '1 minute')
"""
FREE_TARGETS = f"""
SELECT target_id FROM desk.target WHERE {_FREE} AND target_id <> ALL ($2::text[]) AND EXISTS (SELECT {_DUE})
"""  # noqa: S608 - of constants
LOCK_TARGET = f"SELECT failures FROM desk.target WHERE {_FREE} AND target_id = $2 FOR UPDATE SKIP LOCKED"  # noqa: S608
NEXT = f"""
SELECT d.*, s.channel, s.config, s.quiet_start, s.quiet_end, s.quiet_zone, now() AS now
{_DUE.replace("target.target_id", "$1")} ORDER BY d.urgent DESC, d.due_at, d.seq LIMIT 1 FOR UPDATE OF d
"""
POSTPONE = """
UPDATE desk.delivery SET due_at = $2
WHERE target_id = $3 AND subscription_id = $1 AND state IN ('PENDING', 'SENDING') AND NOT urgent AND due_at < $2
"""
SENDING = "UPDATE desk.delivery SET state = 'SENDING', attempts = attempts + 1 WHERE delivery_id = $1"
BEGIN_ATTEMPT = "INSERT INTO desk.attempt (delivery_id, number, target_id) VALUES ($1, $2, $3)"
TAKE_LEASE = "UPDATE desk.target SET lease = $2, lease_until = now() + $3 * interval '1 second' WHERE target_id = $1"
END_ATTEMPT = """
UPDATE desk.attempt SET ended_at = clock_timestamp(), status = $3, error = $4 WHERE delivery_id = $1 AND number = $2
"""
# Only for the attempt that it was: who wakes after its lease has passed on changes nothing.
SETTLE = """
UPDATE desk.delivery SET state = $3, due_at = now() + $4 * interval '1 second',
                         settled_at = CASE WHEN $3 = 'PENDING' THEN NULL ELSE now() END
WHERE delivery_id = $1 AND attempts = $2 AND state = 'SENDING'
"""
END_LEASE = """
UPDATE desk.target SET lease = NULL, lease_until = '-infinity', failures = $3,
                       open_until = now() + $4 * interval '1 second'
WHERE target_id = $1 AND lease = $2
"""
# Requests are kept as long: a retry that is later than that is no retry.
FORGET = (
    """
    WITH over AS (
      SELECT delivery_id FROM desk.delivery WHERE created_at < $1 AND state IN ('SENT', 'DEAD', 'DIGESTED')
      ORDER BY created_at, delivery_id LIMIT $2
    ), tried AS (DELETE FROM desk.attempt USING over WHERE attempt.delivery_id = over.delivery_id)
    DELETE FROM desk.delivery USING over WHERE delivery.delivery_id = over.delivery_id
    """,
    """
    DELETE FROM desk.alert WHERE alert_id = ANY (ARRAY(
      SELECT alert_id FROM desk.alert WHERE state = 'CLOSED' AND closed_at < $1 ORDER BY closed_at LIMIT $2))
    """,
    """
    DELETE FROM desk.request WHERE request_id = ANY (ARRAY(
      SELECT request_id FROM desk.request WHERE made_at < $1 ORDER BY made_at LIMIT $2))
    """,
)


def channels(settings: Settings) -> dict[str, Channel]:
    """The adapters, by the name of their channel in the contract."""
    return {
        "webhook": Webhook(private=settings.webhook_private),
        "mail": Mail(
            host=settings.smtp_host, port=settings.smtp_port, user=settings.smtp_user,
            password=settings.smtp_password.get_secret_value(), sender=settings.smtp_from,
            starttls=settings.smtp_starttls, seconds_max=settings.notify_send_seconds_max,
        ),
        "apprise": Apprise(
            private=settings.webhook_private, threads_max=THREADS_MAX, seconds_max=settings.notify_send_seconds_max
        ),
        "file": File(settings.notification_directory),
    }  # fmt: skip


# -- from events to deliveries


class Draft(NamedTuple):
    """A delivery to be made, in the order of INSERT_DELIVERIES."""

    delivery_id: str
    subscription_id: str
    target_id: str
    alert_id: str | None
    alert_version: int
    urgent: bool
    state: str
    subject: str
    body: str
    content: str
    due_at: datetime
    traceparent: str = ""


async def dispatch(connection: Connection, attempts_max: int) -> int:
    """Turn the oldest events into deliveries, one for each subscription that wants it; return how many events."""
    events = await connection.fetch(EVENTS, EVENTS_MAX)
    if not events:
        return 0
    now = await connection.fetchval("SELECT now()")
    subscriptions = [_subscription(row) for row in await connection.fetch(SUBSCRIPTIONS)]
    drafts = []
    for event in events:
        alert = json.loads(event["content"])
        drafts += [
            draft(one, alert, event["transition"], now)._replace(traceparent=event["traceparent"])
            for one in subscriptions
            if one.wants(alert)
        ]
    await insert(connection, drafts, attempts_max)
    await connection.execute(FORGET_EVENTS, [event["seq"] for event in events])
    return len(events)


def draft(subscription: Subscription, alert: Mapping[str, Any], transition: str, now: datetime) -> Draft:
    """The message of a step of an alert to a subscription: at once, or with its next digest."""
    key = key_of(subscription.subscription_id, alert["alert_id"], alert["version"])
    subject, body = alerting.render(alert, transition, subscription.subject, subscription.body)
    urgent = alert["severity"] == Severity.CRITICAL.name
    period = None if urgent else subscription.digest_period
    content = {"id": key, "type": f"holdfast.alert.{transition.lower()}", "subject": subject, "body": body}
    return Draft(
        key, subscription.subscription_id, subscription.target_id, alert["alert_id"], alert["version"], urgent,
        "GATHERED" if period else "PENDING", subject, body, json.dumps(content | {"alert": alert}),
        alerting.period_end(now, period) if period else now,
    )  # fmt: skip


async def insert(connection: Connection, drafts: list[Draft], attempts_max: int) -> None:
    if drafts:
        await connection.execute(INSERT_DELIVERIES, *columns(drafts, 12), attempts_max)


async def digest(connection: Connection, subscription_id: str, attempts_max: int) -> int:
    """Make one message of what a subscription has gathered until now, or of the first of it; return of how many."""
    rows = await connection.fetch(GATHERED, subscription_id, alerting.DIGEST_LINES_MAX)
    if not rows:
        return 0
    key = key_of("digest", rows[0]["delivery_id"])
    subject, body = alerting.digest([row["subject"] for row in rows])
    told = [json.loads(row["content"]) for row in rows]
    content = {"id": key, "type": "holdfast.digest", "subject": subject, "body": body, "messages": told}
    now = await connection.fetchval("SELECT now()")
    made = Draft(
        key, subscription_id, rows[0]["target_id"], None, 0, False, "PENDING", subject, body, json.dumps(content), now,
    )  # fmt: skip
    await insert(connection, [made], attempts_max)
    await connection.execute(DIGESTED, [row["delivery_id"] for row in rows], key)
    return len(rows)


async def digests(database: Database, attempts_max: int) -> None:
    """Make the digests whose time has come."""
    async with database.connection() as connection:
        due = [row["subscription_id"] for row in await connection.fetch(DIGESTS_DUE)]
    for name in due:
        await database.run(lambda connection, name=name: digest(connection, name, attempts_max))  # type: ignore[misc]


async def forget(database: Database, before: datetime) -> None:
    """Delete what was over before a time, some of it at a time."""
    for statement in FORGET:
        async for _ in workers.turns(rest=1):
            async with database.connection() as connection:
                done = await connection.execute(statement, before, FORGET_ROWS)
            if affected(done) < FORGET_ROWS:
                break


def _subscription(row: Record) -> Subscription:
    return Subscription(
        row["subscription_id"], row["target_id"], frozenset(row["kinds"]), Severity[row["severity_min"]],
        tuple(row["sku_prefixes"]), tuple(row["categories"]), tuple(row["locations"]), row["digest_period"],
        row["subject"], row["body"],
    )  # fmt: skip


# -- from deliveries to targets


class Claim(NamedTuple):
    """A message that is ours to send until the lease on its target expires."""

    delivery_id: str
    target_id: str
    channel: str
    config: Config
    message: Message
    attempt: int
    attempts_max: int
    failures: int
    traceparent: str = ""

    @property
    def lease(self) -> str:
        return f"{self.delivery_id}/{self.attempt}"


class Sender:
    """Sends what is due, each target in a task of its own.

    There are as many tasks as targets with something to send, and these are bounded by the subscriptions that there
    may be; of the database's connections they take CONNECTIONS_MAX.
    """

    def __init__(self, settings: Settings, database: Database, adapters: Mapping[str, Channel]) -> None:
        self._settings = settings
        self._database = database
        self._channels = adapters
        self._turns = asyncio.Semaphore(CONNECTIONS_MAX)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = False
        self._patience = Patience(
            settings.notify_backoff_seconds, settings.notify_backoff_seconds_max,
            settings.notify_circuit_failures_max, settings.notify_circuit_seconds,
        )  # fmt: skip

    async def run(self) -> None:
        """Send until cancelled. What goes wrong with one target ends its task, and the next look starts it again.

        When cancelled it waits a little for what is being sent, so that it need not be sent again.
        """
        self._stopping = False
        try:
            while True:
                for target in await self._free():
                    task = self._tasks[target] = asyncio.create_task(self._serve(target))
                    task.add_done_callback(lambda _, target=target: self._tasks.pop(target))  # type: ignore[misc]
                await asyncio.sleep(self._settings.notify_poll_seconds)
        finally:
            self._stopping = True
            if tasks := list(self._tasks.values()):
                await asyncio.wait(tasks, timeout=STOP_SECONDS_MAX)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _free(self) -> list[str]:
        async with self._turns, self._database.connection() as connection:
            rows = await connection.fetch(FREE_TARGETS, self._settings.notify_minute_messages_max, sorted(self._tasks))
        return [row["target_id"] for row in rows]

    async def _serve(self, target: str) -> None:
        try:
            while not self._stopping and (claim := await self.claim(target)):
                told = {"holdfast.delivery.attempt": claim.attempt}
                name = f"deliver {claim.channel}"
                with telemetry.following(name, claim.traceparent, SpanKind.CLIENT, told) as span:
                    outcome = await self.attempt(claim)
                    if span and outcome.error:
                        telemetry.fail(span, outcome.error)
                    await self.record(claim, outcome)
        except Exception as error:  # noqa: BLE001 - it must not take other targets with it
            log.warning("target left for later", target=target, error=type(error).__name__)

    async def claim(self, target: str) -> Claim | None:
        """The next message of a target, with its lease; None when there is none, or the target is not free."""
        async with self._turns:
            return await self._database.run(lambda connection: self._claim(connection, target))

    async def _claim(self, connection: Connection, target: str) -> Claim | None:
        locked = await connection.fetchrow(LOCK_TARGET, self._settings.notify_minute_messages_max, target)
        if not locked:
            return None
        while row := await connection.fetchrow(NEXT, target):
            # Looked at when it is to be sent, and not only when it is made: a retry must not wake anybody either.
            quiet = QuietHours(row["quiet_start"], row["quiet_end"], row["quiet_zone"]) if row["quiet_zone"] else None
            until = quiet.until(row["now"]) if quiet and not row["urgent"] else None
            if not until:
                break
            await connection.execute(POSTPONE, row["subscription_id"], until, target)
        if not row:
            return None
        message = Message(row["delivery_id"], row["subject"], row["body"], row["content"])
        claim = Claim(
            row["delivery_id"], target, row["channel"], json.loads(row["config"]), message, row["attempts"] + 1,
            row["attempts_max"], locked["failures"], row["traceparent"],
        )  # fmt: skip
        await connection.execute(SENDING, claim.delivery_id)
        await connection.execute(BEGIN_ATTEMPT, claim.delivery_id, claim.attempt, target)
        seconds = self._settings.notify_send_seconds_max + LEASE_MARGIN_SECONDS
        await connection.execute(TAKE_LEASE, target, claim.lease, seconds)
        return claim

    async def attempt(self, claim: Claim) -> Outcome:
        """Send once, in bounded time. Nothing of the error but its class is kept: its text may hold secrets."""
        if not claim.config:
            return Outcome("SUBSCRIPTION_DELETED", permanent=True)
        try:
            async with asyncio.timeout(self._settings.notify_send_seconds_max):
                return await self._channels[claim.channel].send(claim.config, claim.message)
        except TimeoutError:
            return Outcome("TIMEOUT")
        except Exception as error:  # noqa: BLE001 - whatever an adapter meets, the next attempt may do better
            return Outcome(type(error).__name__)

    async def record(self, claim: Claim, outcome: Outcome) -> None:
        """Write down what came of an attempt, and let go of the target."""
        chance = random.random()  # noqa: S311 - jitter
        settled = alerting.settle(outcome, claim.attempt, claim.attempts_max, claim.failures, chance, self._patience)
        outcomes = {"SENT": "sent", "DEAD": "dead"}
        metrics.DELIVERIES.labels(claim.channel, outcomes.get(settled.state, "retried")).inc()
        if settled.state == "DEAD":
            log.warning("delivery dead", delivery=claim.delivery_id, error=outcome.error, attempts=claim.attempt)

        async def work(connection: Connection) -> None:
            await connection.execute(END_LEASE, claim.target_id, claim.lease, settled.failures, settled.spare_seconds)
            await connection.execute(SETTLE, claim.delivery_id, claim.attempt, settled.state, settled.again_seconds)
            await connection.execute(END_ATTEMPT, claim.delivery_id, claim.attempt, outcome.status, outcome.error)

        async with self._turns:
            await self._database.run(work)
