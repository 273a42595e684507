"""Every SQL statement of antifraud, and the functions that run them: rules, signals, cases. All of it is in schema
`desk`, which a rebuild leaves alone.

A function takes part in its caller's transaction. Cases are written by whoever judges and by whoever decides, each
under the lock of the case's row.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from services.analytics.domain import Reason
from services.analytics.judge import (
    Case,
    Comparison,
    Decision,
    Effect,
    Feature,
    Fired,
    Kind,
    Rule,
    Signal,
)
from services.analytics.listing import Listing
from services.analytics.store import array
from shared.database import Connection, Record, columns
from shared.refusal import Refusal

CASES = Listing("desk.fraud_case", "case_id", "created_at")
PARTITIONS = "desk.judged_partition"
OUTBOX = "desk.outbox"

# -- rules

INSERT_RULE = """
INSERT INTO desk.rule (rule_id, version, state, feature, by_kind, window_seconds, comparison, threshold, samples_min,
                       score, effect, reason, changed_by, request_id, fingerprint)
SELECT $1, (SELECT coalesce(max(version), 0) + 1 FROM desk.rule WHERE rule_id = $1), $2, $3, $4, $5, $6, $7, $8, $9,
       $10, $11, $12, $13, $14
ON CONFLICT (request_id) DO NOTHING RETURNING *
"""
RULE_OF_REQUEST = "SELECT * FROM desk.rule WHERE request_id = $1"
RULES_IN_USE = "SELECT * FROM desk.rule WHERE state IN ('ACTIVE', 'SHADOW') ORDER BY rule_id, version"
LOCK_RULE = "SELECT * FROM desk.rule WHERE rule_id = $1 ORDER BY version FOR UPDATE"
SET_RULE_STATE = """
UPDATE desk.rule SET state = $3, changed_at = now(), changed_by = $4 WHERE rule_id = $1 AND version = $2 RETURNING *
"""
RULES_CHANGED = "UPDATE desk.judged SET rules_changed = rules_changed + 1"

# -- signals

JUDGED = "SELECT seq, rules_changed FROM desk.judged"
# Whoever has this lock judges; it is the first that a judge takes.
LOCK_JUDGED = "SELECT seq, rules_changed, EXISTS (SELECT FROM desk.returned) AS returned FROM desk.judged FOR UPDATE"
TAKE_SEQ = "UPDATE desk.judged SET seq = $1"
FIRST_ORDERS = """
INSERT INTO desk.customer (customer) SELECT customer FROM unnest($1::text[]) AS customer
ON CONFLICT DO NOTHING RETURNING customer
"""
COMPLETE_UNTIL = "SELECT greatest(min(complete_until), to_timestamp(0)) FROM desk.judged_partition"
INSERT_SIGNALS = """
INSERT INTO desk.signal (seq, at, order_at, reservation_id, version, customer, device, network, skus, asked, held,
                         open_units, sold, cancelled, expired, returned, currency_code, value_micros, first_order)
SELECT seq, at, order_at, reservation_id, version, customer, device, network, skus::text[], asked::bigint[],
       held::bigint[], open_units, sold, cancelled, expired, returned, currency_code, value_micros, first_order
FROM unnest($1::bigint[], $2::timestamptz[], $3::timestamptz[], $4::text[], $5::bigint[], $6::text[], $7::text[],
            $8::text[], $9::text[], $10::text[], $11::text[], $12::bigint[], $13::bigint[], $14::bigint[],
            $15::bigint[], $16::bigint[], $17::text[], $18::bigint[], $19::boolean[])
  AS new (seq, at, order_at, reservation_id, version, customer, device, network, skus, asked, held, open_units, sold,
          cancelled, expired, returned, currency_code, value_micros, first_order)
"""
SIGNALS_SINCE = "SELECT * FROM desk.signal WHERE seq > $1 ORDER BY seq LIMIT $2"
SIGNALS_BETWEEN = """
SELECT * FROM desk.signal WHERE at >= $2 AND at < $3 AND seq > $1 ORDER BY seq LIMIT $4
"""
COUNT_SIGNALS = "SELECT count(*) FROM desk.signal WHERE at >= $1 AND at < $2"
QUEUE_RETURNED = """
INSERT INTO desk.returned (reservation_id, sku, location, version, occurred_at, units)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::timestamptz[], $6::bigint[])
ON CONFLICT DO NOTHING
"""
RETURNED = "SELECT * FROM desk.returned ORDER BY sku, location, version LIMIT $1"
DELETE_RETURNED = """
DELETE FROM desk.returned AS waiting USING unnest($1::text[], $2::text[], $3::bigint[]) AS seen (sku, location, version)
WHERE waiting.sku = seen.sku AND waiting.location = seen.location AND waiting.version = seen.version
"""

# -- cases

OPEN_CASES = """
SELECT * FROM desk.fraud_case WHERE subject = ANY ($1::text[]) AND state IN ('OPEN', 'SHADOW')
ORDER BY case_id FOR UPDATE
"""
EXEMPT = """
SELECT subject, max(exempt_until) AS until FROM desk.fraud_case
WHERE subject = ANY ($1::text[]) AND exempt_until IS NOT NULL GROUP BY subject
"""
# The longest block of each subject, but for one case's.
BLOCKED = """
SELECT DISTINCT ON (subject) subject, opened_at, blocked_until FROM desk.fraud_case
WHERE subject = ANY ($1::text[]) AND blocked_until IS NOT NULL AND state <> 'SHADOW' AND case_id <> $2
ORDER BY subject, blocked_until DESC
"""
UPSERT_CASES = """
INSERT INTO desk.fraud_case AS known (case_id, subject, kind, state, decision, score, rules, rule_ids,
                                      reservation_ids, reservations, units, opened_at, updated_at, blocked_until)
SELECT case_id, subject, kind, state, decision, score, rules::jsonb, rule_ids::text[], reservation_ids::text[],
       reservations, units, opened_at, updated_at, blocked_until
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::int[], $7::text[], $8::text[],
            $9::text[], $10::bigint[], $11::bigint[], $12::timestamptz[], $13::timestamptz[], $14::timestamptz[])
  AS new (case_id, subject, kind, state, decision, score, rules, rule_ids, reservation_ids, reservations, units,
          opened_at, updated_at, blocked_until)
ON CONFLICT (case_id) DO UPDATE SET
  decision = excluded.decision, score = excluded.score, rules = excluded.rules, rule_ids = excluded.rule_ids,
  reservation_ids = excluded.reservation_ids, reservations = excluded.reservations, units = excluded.units,
  updated_at = excluded.updated_at, blocked_until = excluded.blocked_until
"""
LOCK_CASE = "SELECT * FROM desk.fraud_case WHERE case_id = $1 FOR UPDATE"
READ_CASE = "SELECT * FROM desk.fraud_case WHERE case_id = $1"
ENTRIES = "SELECT * FROM desk.case_entry WHERE case_id = $1 ORDER BY entered_at"
ENTER = """
INSERT INTO desk.case_entry (case_id, actor, action, note) SELECT case_id, $2, $3, $4 FROM unnest($1::text[]) AS case_id
"""
# Business time may be long past, as in a replay: what holds from now on holds from the later of the two.
DECIDE = """
UPDATE desk.fraud_case SET state = $2, decision = $3, blocked_until = $4,
  exempt_until = greatest(updated_at, now()) + $5::interval
WHERE case_id = $1 RETURNING *
"""


# -- rules


def rule(row: Record) -> Rule:
    return Rule(
        row["rule_id"], row["version"], Feature(row["feature"]), Kind(row["by_kind"]), row["window_seconds"],
        Comparison(row["comparison"]), row["threshold"], row["samples_min"], row["score"], Effect(row["effect"]),
        row["reason"], shadow=row["state"] == "SHADOW",
    )  # fmt: skip


async def insert_rule(
    connection: Connection, new: Rule, *, state: str, actor: str, request_id: str, fingerprint: bytes
) -> Record:
    """Keep a rule as the next version of its id; a repeat gets what was kept. Raises Refusal REQUEST_ID_REUSED."""
    row = await connection.fetchrow(
        INSERT_RULE, new.rule_id, state, new.feature.value, new.by.value, new.window_seconds, new.comparison.value,
        new.threshold, new.samples_min, new.score, new.effect.value, new.reason, actor, request_id, fingerprint,
    )  # fmt: skip
    if row is None:
        row = await connection.fetchrow(RULE_OF_REQUEST, request_id)
        assert row is not None
        if row["fingerprint"] != fingerprint:
            raise Refusal(Reason.REQUEST_ID_REUSED, f"{request_id} was used with other content", request_id=request_id)
    elif state in {"ACTIVE", "SHADOW"}:
        await connection.execute(RULES_CHANGED)
    return row


async def set_rule_state(connection: Connection, rule_id: str, version: int, state: str, actor: str) -> Record:
    """Change a version's state; another version that is in it is retired. Raises Refusal RULE_NOT_FOUND."""
    known = {row["version"]: row for row in await connection.fetch(LOCK_RULE, rule_id)}
    if version not in known:
        raise Refusal(
            Reason.RULE_NOT_FOUND, f"there is no version {version} of rule {rule_id}", rule_id=rule_id, version=version
        )
    if known[version]["state"] == state:
        return known[version]
    for other, row in known.items():
        if row["state"] == state and state != "RETIRED":
            await connection.execute(SET_RULE_STATE, rule_id, other, "RETIRED", actor)
    changed = await connection.fetchrow(SET_RULE_STATE, rule_id, version, state, actor)
    assert changed is not None
    await connection.execute(RULES_CHANGED)
    return changed


async def rules_in_use(connection: Connection) -> list[Rule]:
    return [rule(row) for row in await connection.fetch(RULES_IN_USE)]


# -- signals


async def judged(connection: Connection) -> tuple[int, int]:
    """The number of the last signal, and how often rules have changed."""
    row = await connection.fetchrow(JUDGED)
    assert row is not None
    return row["seq"], row["rules_changed"]


async def lock_judged(connection: Connection) -> tuple[int, int, bool]:
    """As `judged`, and whether goods that came back wait; nobody else judges until the transaction ends."""
    row = await connection.fetchrow(LOCK_JUDGED)
    assert row is not None
    return row["seq"], row["rules_changed"], row["returned"]


async def first_orders(connection: Connection, customers: Iterable[str]) -> set[str]:
    """Those of customers who never ordered before; from now on they have."""
    rows = await connection.fetch(FIRST_ORDERS, sorted(set(customers)))
    return {row["customer"] for row in rows}


async def write_signals(connection: Connection, seq: int, signals: Sequence[Signal]) -> None:
    """Number signals on from `seq` and keep them."""
    if signals:
        rows = [
            (
                number, moment(s.at), moment(s.order_at), s.reservation_id, s.version, s.customer, s.device, s.network,
                array(s.skus), array(s.asked), array(s.held), s.open, s.sold, s.cancelled, s.expired, s.returned,
                s.currency_code, s.value_micros, s.first,
            )
            for number, s in enumerate(signals, seq + 1)
        ]  # fmt: skip
        await connection.execute(INSERT_SIGNALS, *columns(rows, 19))
        await connection.execute(TAKE_SEQ, seq + len(signals))


def signal(row: Record) -> Signal:
    return Signal(
        row["at"].timestamp(), row["order_at"].timestamp(), row["reservation_id"], row["version"], row["customer"],
        row["device"], row["network"], tuple(row["skus"]), tuple(row["asked"]), tuple(row["held"]), row["open_units"],
        row["sold"], row["cancelled"], row["expired"], row["returned"], row["currency_code"], row["value_micros"],
        row["first_order"],
    )  # fmt: skip


async def queue_returned(connection: Connection, rows: Iterable[tuple[str, str, str, int, datetime, int]]) -> None:
    """Goods that came back, for whoever judges: reservation, SKU, location, version, when, units."""
    await connection.execute(QUEUE_RETURNED, *columns(rows, 6))


async def delete_returned(connection: Connection, rows: Sequence[Record]) -> None:
    if rows:
        seen = ((row["sku"], row["location"], row["version"]) for row in rows)
        await connection.execute(DELETE_RETURNED, *columns(seen, 3))


# -- cases


def case(row: Record) -> Case:
    found = {(r["rule_id"], r["version"]): Fired(**r) for r in json.loads(row["rules"])}
    blocked_until = row["blocked_until"]
    return Case(
        row["case_id"], row["subject"], Kind(row["kind"]), row["state"] == "SHADOW", Decision(row["decision"]),
        row["score"], row["opened_at"].timestamp(), row["updated_at"].timestamp(), found,
        list(row["reservation_ids"]), row["reservations"], row["units"],
        blocked_until.timestamp() if blocked_until else None,
    )  # fmt: skip


async def open_cases(connection: Connection, subjects: Iterable[str]) -> dict[tuple[str, bool], Case]:
    """The open cases of subjects, by subject and whether it is a shadow, locked."""
    found = [case(row) for row in await connection.fetch(OPEN_CASES, sorted(set(subjects)))]
    return {(one.subject, one.shadow): one for one in found}


async def exempt(connection: Connection, subjects: Iterable[str]) -> dict[str, float]:
    """Until when subjects are exempt from new cases."""
    rows = await connection.fetch(EXEMPT, sorted(set(subjects)))
    return {row["subject"]: row["until"].timestamp() for row in rows}


async def blocked(
    connection: Connection, subjects: Iterable[str], *, but_for: str = ""
) -> dict[str, tuple[float, float]]:
    """The longest block of subjects, leaving out one case's: from its case's opening on, until when."""
    rows = await connection.fetch(BLOCKED, sorted(set(subjects)), but_for)
    return {row["subject"]: (row["opened_at"].timestamp(), row["blocked_until"].timestamp()) for row in rows}


async def write_cases(connection: Connection, grown: Sequence[Case], opened: Sequence[Case]) -> None:
    """Write cases as they now are, and enter those that were opened in the audit."""
    rows = [
        (
            one.case_id, one.subject, one.kind.value, "SHADOW" if one.shadow else "OPEN", one.decision.value, one.score,
            json.dumps([fired._asdict() for fired in one.rules.values()]),
            array(sorted({rule_id for rule_id, _ in one.rules})), array(one.reservation_ids), one.reservations,
            one.units, moment(one.opened_at), moment(one.updated_at),
            moment(one.blocked_until) if one.blocked_until else None,
        )
        for one in sorted(grown, key=lambda one: one.case_id)
    ]  # fmt: skip
    await connection.execute(UPSERT_CASES, *columns(rows, 14))
    if opened:
        await connection.execute(ENTER, [one.case_id for one in opened], "rules", "OPENED", "")


async def decide(
    connection: Connection, before: Case, *, state: str, blocked_until: datetime | None, exempt_for: timedelta | None
) -> Record:
    decision = Decision.BLOCK if blocked_until else before.decision
    row = await connection.fetchrow(DECIDE, before.case_id, state, decision.value, blocked_until, exempt_for)
    assert row is not None
    return row


def moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
