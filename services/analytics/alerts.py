"""Alerts: rules judged on what is measured, and the steps of alerts, each in the transaction of what caused it.

A function takes part in its caller's transaction. A step and its event are one statement, so neither is without the
other. Alerts of a key of stock are judged by whoever holds the lock of its row in the mart: the projection, which has
just written it, or the sweep. Two at once wait for each other, and the unique index `alert_open` stands behind both.
"""

import json
import time
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from services.analytics.alerting import (
    ABOVE,
    COVER_DAYS_MAX,
    Change,
    Kind,
    OpenAlert,
    Reading,
    Rule,
    Severity,
    Transition,
    judge,
    sku_key,
)
from services.analytics.domain import Applied, Key, Known
from shared import metrics, telemetry
from shared.database import Connection, Database, Record, columns

RULES_SECONDS = 5.0
DEFAULTS = Path(__file__).with_name("alert_rules.toml")
ORPHANS_MAX = 500
DRIFT_KEY, LAG_KEY, DELIVERIES_KEY = "mart", "events", "deliveries"

RULES = "SELECT * FROM desk.alert_rule WHERE deleted_at IS NULL ORDER BY rule_id"
INSERT_RULE = """
INSERT INTO desk.alert_rule (rule_id, kind, severity, open_level, close_level, sku_prefix, category, location)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING RETURNING *
"""
# Demand is that of the stock view: what was sold in 30 days, over the days that the key is known.
_MEASURED = f"""
SELECT view.sku, view.location, name, category, active, available::float8 AS available,
       least(coalesce(available / nullif(sold_30d / least(30, greatest(1,
         extract(epoch FROM now() - first_movement_at)::float8 / 86400)), 0), {COVER_DAYS_MAX}), {COVER_DAYS_MAX})
       AS cover
FROM"""  # noqa: S608 - of constants
MEASURED = f"""{_MEASURED} unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN stock_view AS view ON view.sku = key.sku AND view.location = key.location
"""
MEASURED_PAGE = f"{_MEASURED} stock_view AS view WHERE (sku, location) > ($1, $2) ORDER BY sku, location LIMIT $3"
# Changes nothing, and keeps the projection from these keys; in the order of its own locks.
LOCK_VIEW = """
UPDATE stock_view AS view SET version = view.version FROM unnest($1::text[], $2::text[]) AS key (sku, location)
WHERE view.sku = key.sku AND view.location = key.location
"""
OPEN_OF_KEYS = """
SELECT alert_id, rule_id, kind, alert.key, version, value FROM unnest($1::text[]) AS asked (key)
  JOIN desk.alert ON alert.key = asked.key AND state = 'OPEN'
"""
# The traces of steps come as an object, by alert: there are seldom any.
_TOLD = """
INSERT INTO desk.alert_event (alert_id, version, transition, content, traceparent)
SELECT alert_id, version, CASE WHEN version = 1 THEN 'OPENED' WHEN state = 'CLOSED' THEN 'CLOSED' ELSE 'UPDATED' END,
       to_jsonb(changed), coalesce({traces}::jsonb ->> alert_id, '') FROM changed RETURNING alert_id
"""
OPEN = f"""
WITH changed AS (
  INSERT INTO desk.alert (alert_id, rule_id, kind, severity, key, sku, location, name, category, value, open_level,
                          details, state, closed_at, version)
  SELECT *, CASE WHEN state = 'CLOSED' THEN now() END, 1
  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
              $9::text[], $10::float8[], $11::float8[], $12::jsonb[], $13::text[])
    AS new (alert_id, rule_id, kind, severity, key, sku, location, name, category, value, open_level, details, state)
  ON CONFLICT (rule_id, key) WHERE state = 'OPEN' DO NOTHING RETURNING *
) {_TOLD.format(traces="$14")}
"""  # noqa: S608 - of constants
# Where the alert is at the version that was judged: a step that somebody else made is not made twice.
STEP = f"""
WITH changed AS (
  UPDATE desk.alert SET value = step.value, state = step.state, version = alert.version + 1, updated_at = now(),
                        closed_at = CASE WHEN step.state = 'CLOSED' THEN now() END
  FROM unnest($1::text[], $2::integer[], $3::float8[], $4::text[]) AS step (alert_id, version, value, state)
  WHERE alert.alert_id = step.alert_id AND alert.version = step.version AND alert.state = 'OPEN' RETURNING alert.*
) {_TOLD.format(traces="$5")}
"""  # noqa: S608 - of constants
CLOSE_ORPHANS = f"""
WITH changed AS (
  UPDATE desk.alert SET state = 'CLOSED', version = version + 1, updated_at = now(), closed_at = now()
  WHERE state = 'OPEN' AND alert_id = ANY (ARRAY(
    SELECT alert_id FROM desk.alert_rule AS rule JOIN desk.alert ON alert.rule_id = rule.rule_id AND state = 'OPEN'
    WHERE deleted_at IS NOT NULL LIMIT $1)) RETURNING *
) {_TOLD.format(traces="'{}'")}
"""  # noqa: S608 - of constants
DRIFT_UNITS = "SELECT drift_units FROM reconciled WHERE reconciled_at > '-infinity'"
# Those that somebody can still retry.
DEAD_DELIVERIES = """
SELECT count(*) FROM desk.delivery AS d WHERE state = 'DEAD' AND NOT EXISTS (
  SELECT FROM desk.subscription AS s WHERE s.subscription_id = d.subscription_id AND deleted_at IS NOT NULL)
"""


class Crossings:
    """Finds the keys of a batch whose availability crossed a level of some rule, and judges these.

    A batch that crosses nothing costs two binary searches a key, and every few seconds a look at the rules. Rules
    that are newer than the last look are the sweep's. What dips and recovers within one batch has not happened.
    """

    def __init__(self) -> None:
        self._levels: list[float] = []
        self._looked = -RULES_SECONDS

    async def judge(self, connection: Connection, applied: Applied, known: Mapping[Key, Known]) -> None:
        now = time.monotonic()
        if now - self._looked >= RULES_SECONDS:
            await self._look(connection)
            self._looked = now
        if self._levels and (keys := self._crossed(applied, known)):
            await judge_keys(connection, keys)

    async def _look(self, connection: Connection) -> None:
        levels = set()
        for rule in await rules(connection):
            if rule.kind in (Kind.AVAILABLE_BELOW, Kind.STOCK_OUT):
                levels |= {rule.open_level, rule.close_level}
        self._levels = sorted(levels)

    def _crossed(self, applied: Applied, known: Mapping[Key, Known]) -> list[Key]:
        levels, above = self._levels, len(self._levels)
        return [
            key
            for key, last in applied.last.items()
            if (bisect_right(levels, known[key].available) if key in known else above)
            != bisect_right(levels, last.available)
        ]


async def rules(connection: Connection) -> list[Rule]:
    """The rules that are not deleted, of the kinds that this version knows: a later one may have made others."""
    return [
        Rule(
            row["rule_id"], Kind(row["kind"]), Severity[row["severity"]], row["open_level"], row["close_level"],
            row["sku_prefix"], row["category"], row["location"],
        )
        for row in await connection.fetch(RULES)
        if row["kind"] in Kind.__members__
    ]  # fmt: skip


async def insert_rule(connection: Connection, rule: Rule) -> Record | None:
    """The row of a rule; None when its id was ever used."""
    return await connection.fetchrow(
        INSERT_RULE, rule.rule_id, rule.kind, rule.severity.name, rule.open_level, rule.close_level, rule.sku_prefix,
        rule.category, rule.location,
    )  # fmt: skip


async def insert_defaults(connection: Connection) -> None:
    """The rules of alert_rules.toml whose ids were never used."""
    for one in tomllib.loads(DEFAULTS.read_text())["rule"]:
        kind = Kind(one["kind"])
        opens = 1 if kind is Kind.STOCK_OUT else one.get("open_level", 0)
        rule = Rule(one["alert_rule_id"], kind, Severity[one["severity"]], opens, one.get("close_level", 0))
        await insert_rule(connection, rule)


# -- alerts of stock


async def judge_keys(connection: Connection, keys: Iterable[Key]) -> int:
    """Judge keys whose rows in the mart this transaction has locked; return how many steps were made."""
    readings = [_reading(row) for row in await connection.fetch(MEASURED, *columns(sorted(keys), 2))]
    return await _judge(connection, await rules(connection), readings)


async def sweep_page(database: Database, after: Key, keys_max: int) -> tuple[int, Key | None]:
    """Judge the next keys of the mart: how many steps were made, and the last key where there may be more.

    They are looked at without locks first; only those that call for a step are locked and judged again.
    """
    async with database.connection() as connection:
        rows = await connection.fetch(MEASURED_PAGE, *after, keys_max)
        readings = [_reading(row) for row in rows]
        found = judge(await rules(connection), readings, await _open(connection, readings))
        keys = sorted({(change.reading.sku, change.reading.location) for change in found})

    async def work(connection: Connection) -> int:
        await connection.execute(LOCK_VIEW, *columns(keys, 2))
        return await judge_keys(connection, keys)

    steps = await database.run(work) if keys else 0
    return steps, (rows[-1]["sku"], rows[-1]["location"]) if len(rows) == keys_max else None


def _reading(row: Record) -> Reading:
    available, active = row["available"], row["active"]
    values = {Kind.AVAILABLE_BELOW: available, Kind.STOCK_OUT: available, Kind.COVER_BELOW: row["cover"]}
    key = sku_key(row["sku"], row["location"])
    return Reading(key, values, row["sku"], row["location"], row["name"], row["category"], active)


# -- alerts of the system


async def judge_system(connection: Connection, kind: Kind, values: Mapping[str, float]) -> int:
    """Judge a kind of `ABOVE` on what was measured of each of its keys; return how many steps were made."""
    assert kind in ABOVE
    readings = [Reading(key, {kind: value}) for key, value in values.items()]
    return await _judge(connection, [rule for rule in await rules(connection) if rule.kind is kind], readings)


async def close_orphans(connection: Connection) -> int:
    """Close alerts whose rules were deleted, so many at a time; return how many."""
    return len(await connection.fetch(CLOSE_ORPHANS, ORPHANS_MAX))


# -- alerts of fraud cases


async def fraud_case_opened(
    connection: Connection, case_id: str, details: Mapping[str, str], traceparent: str = ""
) -> None:
    """Open an alert of a fraud case for each rule that concerns it; one that is open stays as it is.

    `traceparent` is that of the decision. `details` are shown to people and to receivers: nothing secret or personal.
    `sku`, `location` and `category` among them are what rules and subscriptions may ask for.
    """
    reading = Reading(
        case_id, {Kind.FRAUD_CASE: 1}, details.get("sku", ""), details.get("location", ""),
        category=details.get("category", ""), details=details,
    )  # fmt: skip
    # No level to open at but that there is a case: every rule opens above 0, and nothing but the case closes it.
    found = [rule for rule in await rules(connection) if rule.kind is Kind.FRAUD_CASE]
    await _judge(connection, found, [reading], lambda _: traceparent)


async def fraud_case_closed(connection: Connection, case_id: str) -> None:
    """Close the alerts of a fraud case; where none is open nothing happens."""
    rows = [row for row in await connection.fetch(OPEN_OF_KEYS, [case_id]) if row["kind"] == Kind.FRAUD_CASE]
    await _step(connection, [(row["alert_id"], row["version"], row["value"], "CLOSED") for row in rows], {})


# -- steps


async def _open(connection: Connection, readings: Sequence[Reading]) -> dict[tuple[str, str], OpenAlert]:
    rows = await connection.fetch(OPEN_OF_KEYS, sorted({reading.key for reading in readings}))
    return {(row["rule_id"], row["key"]): OpenAlert(row["alert_id"], row["version"], row["value"]) for row in rows}


async def _judge(
    connection: Connection,
    known: Sequence[Rule],
    readings: Sequence[Reading],
    cause: Callable[[Reading], str] = lambda reading: telemetry.traceparent_of(reading.sku),
) -> int:
    """Judge what was measured; `cause` tells the trace of what has moved it."""
    changes = list(judge(known, readings, await _open(connection, readings)))
    opened = [(change, _row(change)) for change in changes if change.alert is None]
    steps = [(change, change.alert) for change in changes if change.alert]
    traces = {str(row[0]): _trace(change, cause(change.reading)) for change, row in opened}
    traces |= {alert.alert_id: _trace(change, cause(change.reading)) for change, alert in steps}
    made = await _step(
        connection,
        [
            (
                alert.alert_id,
                alert.version,
                change.value,
                "CLOSED" if change.transition is Transition.CLOSED else "OPEN",
            )
            for change, alert in steps
        ],
        traces,
    )
    if opened:
        made += len(await connection.fetch(OPEN, *columns([row for _, row in opened], 13), json.dumps(traces)))
    return made


async def _step(connection: Connection, steps: Sequence[tuple[str, int, float, str]], traces: Mapping[str, str]) -> int:
    return len(await connection.fetch(STEP, *columns(steps, 4), json.dumps(traces))) if steps else 0


def _trace(change: Change, cause: str) -> str:
    """The trace of a step: that of its cause, one span on. Empty where that is."""
    metrics.ALERT_STEPS.labels(change.rule.kind, change.transition).inc()
    told = {"holdfast.alert.transition": change.transition, "holdfast.sku": change.reading.sku}
    span = telemetry.follow(f"alert {change.rule.kind}", cause, attributes=told)
    if span is None:
        return ""
    span.end()
    return telemetry.written(span)


def _row(change: Change) -> tuple[object, ...]:
    rule, reading = change.rule, change.reading
    # What is over as it begins: it has one message, and no open alert to close.
    state = "CLOSED" if rule.kind is Kind.BACK_IN_STOCK else "OPEN"
    return (
        uuid4().hex, rule.rule_id, rule.kind, rule.severity.name, reading.key, reading.sku, reading.location,
        reading.name, reading.category, change.value, rule.open_level, json.dumps(dict(reading.details)), state,
    )  # fmt: skip
