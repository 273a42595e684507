"""Every SQL statement of inventory, and the functions that run them.

A function that takes part in a transaction takes `connection` first. Keys are always passed in
ascending (sku, location); `shared.database` keeps the planner on that order.

An INSERT that returns nothing is copied straight into a cluster's shards, which is cheap, but an id that is known is
reported there without its code (`shared.database.CONTESTED`). So the inserts of the hot path return nothing, and the
others what they have inserted.
"""

import asyncio
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from services.inventory.domain import (
    Allocation,
    Drift,
    HoldChange,
    HoldRequest,
    HoldRow,
    Key,
    Kind,
    Movement,
    Plan,
    ShortLine,
    Stock,
    grouped,
)
from shared import partitions, telemetry
from shared.database import Connection, Record, affected, fetch, unavailable

LOOKS_MAX = 20
LOOK_SECONDS = 0.01
LEAVING = (Kind.COMMIT, Kind.RELEASE, Kind.EXPIRE)  # how units leave a hold, in order of its columns
COUNTERS = "on_hand, stock.held, safety_stock, backorder_limit, short, stock.version, stock.active"
STOCK_COLUMNS = f"stock.sku, stock.location, {COUNTERS}"
# The time after what was locked, by the clock of the server that is asked: of a cluster the one that everybody asks.
# Before it is read the transaction has its number there, so that `shared.watermark` knows of it.
CLOCK = "CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END"

# A batch of holds and refusals in one statement and one round trip: the guard, the holds, their movements, and where
# these stand in the ledger for the relay. $1 to $6 are the keys in order, each with its whole demand, the number of its
# holds, where these begin in $7 to $9, and the version that it must still have, if it must. $7 to $15 are the holds in
# order of their keys, with a running sum of units for each key; then those SKUs of which nothing is held. A key that is
# short or has moved does not come back from `taken`: then dividing by zero undoes it all, and so it does where by $16 a
# hold has expired that is first to be reclaimed. The time is read after the last key was locked.
PLACE = f"""
WITH taken AS (
  UPDATE stock SET held = stock.held + demand.quantity, version = stock.version + demand.holds,
                   updated_at = statement_timestamp()
  FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::int[], $6::bigint[])
    AS demand (sku, location, quantity, holds, first, seen)
  WHERE stock.sku = demand.sku AND stock.location = demand.location AND stock.active
    AND (demand.quantity = 0 OR on_hand - stock.held - safety_stock + backorder_limit >= demand.quantity)
    AND (demand.seen IS NULL OR demand.seen = stock.version)
  RETURNING {STOCK_COLUMNS}, demand.quantity, demand.holds, demand.first
), paid AS (
  SELECT {CLOCK} AS time FROM taken HAVING 1 / (count(*) = cardinality($1))::int = 1
), placed AS (
  INSERT INTO hold (sku, hold_id, slot, location, quantity, held, fingerprint, created_at, expires_at, short_lines)
  SELECT part.sku, hold_id, slot, location, quantity, quantity, fingerprint, paid.time, paid.time + ttl,
         short_lines::jsonb
  FROM unnest($7::text[], $8::bigint[], $10::text[], $11::text[], $12::smallint[], $13::bytea[], $14::interval[],
              $15::text[])
    AS part (hold_id, quantity, sku, location, slot, fingerprint, ttl, short_lines) CROSS JOIN paid
), moved AS (
  INSERT INTO movement (sku, location, version, kind, on_hand_delta, held_delta, short_delta, on_hand, held,
                        short, safety_stock, backorder_limit, hold_id, request_id, reference, recorded_at)
  SELECT taken.sku, taken.location, taken.version - taken.holds + part.ordinal, 'HOLD', 0, part.quantity, 0,
         taken.on_hand, taken.held - taken.quantity + part.running, taken.short, taken.safety_stock,
         taken.backorder_limit, part.hold_id, part.hold_id, '', paid.time
  FROM paid CROSS JOIN taken CROSS JOIN LATERAL unnest(
    ($7::text[])[taken.first : taken.first + taken.holds - 1],
    ($8::bigint[])[taken.first : taken.first + taken.holds - 1],
    ($9::bigint[])[taken.first : taken.first + taken.holds - 1]
  ) WITH ORDINALITY AS part (hold_id, quantity, running, ordinal)
), told AS (
  INSERT INTO movement_outbox (skus, locations, versions, recorded_at, traceparent)
  SELECT array_agg(sku), array_agg(location), array_agg(number), min(paid.time), $17
  FROM paid CROSS JOIN taken CROSS JOIN generate_series(taken.version - taken.holds + 1, taken.version) AS number
  HAVING count(*) > 0
)
SELECT {STOCK_COLUMNS.replace("stock.", "taken.")}, paid.time FROM taken CROSS JOIN paid
WHERE 1 / coalesce(paid.time < $16::timestamptz, true)::int = 1
"""
# A batch of commits, releases and expiries in one statement and one round trip, as PLACE is for holds. $1 to $6 are
# the keys in order with what goes off the shelf and out of `held`; $7 to $13 their movements in order of the
# keys, with running sums; $14 to $21 the hold rows as they were read; $22 to $28 what a repeat will find. A hold row
# divides by zero when it is no longer as it was read, or when its time had come by the time that the last key was
# locked; one that expires, when it had not.
CHANGE = f"""
WITH taken AS (
  UPDATE stock SET on_hand = on_hand - gone.sold, held = stock.held - gone.held, version = version + gone.movements,
                   updated_at = statement_timestamp()
  FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::int[])
    AS gone (sku, location, sold, held, movements, first)
  WHERE stock.sku = gone.sku AND stock.location = gone.location AND stock.short = 0
    AND stock.held >= gone.held
  RETURNING {STOCK_COLUMNS}, gone.sold, gone.held AS gone_held, movements, first
), paid AS (
  SELECT {CLOCK} AS time FROM taken HAVING 1 / (count(*) = cardinality($1))::int = 1
), left_ AS (
  UPDATE hold SET held = hold.held - part.committed - part.released - part.expired,
                  committed = hold.committed + part.committed, released = hold.released + part.released,
                  expired = hold.expired + part.expired
  FROM unnest($14::text[], $15::text[], $16::smallint[], $17::bigint[], $18::timestamptz[], $19::bigint[],
              $20::bigint[], $21::bigint[])
    AS part (sku, hold_id, slot, held, expires_at, committed, released, expired) CROSS JOIN paid
  WHERE hold.sku = part.sku AND hold.hold_id = part.hold_id AND hold.slot = part.slot
    AND hold.held = part.held AND hold.expires_at = part.expires_at
    AND (hold.expires_at <= paid.time) = (part.expired > 0)
  RETURNING hold.hold_id
), made AS (
  INSERT INTO hold_change (sku, hold_id, request_id, kind, fingerprint, allocations, expires_at, created_at)
  SELECT sku, hold_id, request_id, kind, fingerprint, allocations::jsonb, expires_at, paid.time
  FROM unnest($22::text[], $23::text[], $24::text[], $25::text[], $26::bytea[], $27::text[], $28::timestamptz[])
    AS change (sku, hold_id, request_id, kind, fingerprint, allocations, expires_at) CROSS JOIN paid
), moved AS (
  INSERT INTO movement (sku, location, version, kind, on_hand_delta, held_delta, short_delta, on_hand, held,
                        short, safety_stock, backorder_limit, hold_id, request_id, reference, recorded_at)
  SELECT taken.sku, taken.location, taken.version - taken.movements + part.ordinal, part.kind, -part.sold, -part.held,
         0, taken.on_hand + taken.sold - part.running_sold, taken.held + taken.gone_held - part.running_held,
         0, taken.safety_stock, taken.backorder_limit, part.hold_id, part.request_id, '', paid.time
  FROM paid CROSS JOIN taken CROSS JOIN LATERAL unnest(
    ($7::text[])[taken.first : taken.first + taken.movements - 1],
    ($8::text[])[taken.first : taken.first + taken.movements - 1],
    ($9::text[])[taken.first : taken.first + taken.movements - 1],
    ($10::bigint[])[taken.first : taken.first + taken.movements - 1],
    ($11::bigint[])[taken.first : taken.first + taken.movements - 1],
    ($12::bigint[])[taken.first : taken.first + taken.movements - 1],
    ($13::bigint[])[taken.first : taken.first + taken.movements - 1]
  ) WITH ORDINALITY AS part (hold_id, request_id, kind, sold, held, running_sold, running_held, ordinal)
), told AS (
  INSERT INTO movement_outbox (skus, locations, versions, recorded_at, traceparent)
  SELECT array_agg(sku), array_agg(location), array_agg(number), min(paid.time), $29
  FROM paid CROSS JOIN taken CROSS JOIN generate_series(taken.version - taken.movements + 1, taken.version) AS number
)
SELECT {STOCK_COLUMNS.replace("stock.", "taken.")}, paid.time FROM taken CROSS JOIN paid
WHERE 1 / ((SELECT count(*) FROM left_) = cardinality($14))::int = 1
"""
# Locks rows and reads them as they are under the lock. An UPDATE, because a sharded database refuses
# SELECT ... FOR UPDATE over several shards.
LOCK = f"""
WITH locked AS (
  UPDATE stock SET held = stock.held
  FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  WHERE stock.sku = key.sku AND stock.location = key.location
  RETURNING {STOCK_COLUMNS}
)
SELECT *, {CLOCK} AS time FROM locked
"""
# Writes what was decided under the lock; the version says that it was.
SAVE = """
UPDATE stock SET on_hand = new.on_hand, held = new.held, safety_stock = new.safety_stock,
                 backorder_limit = new.backorder_limit, short = new.short, version = new.version,
                 updated_at = $9
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
            $8::bigint[], $10::bigint[])
  AS new (sku, location, on_hand, held, safety_stock, backorder_limit, short, version, old_version)
WHERE stock.sku = new.sku AND stock.location = new.location AND stock.version = new.old_version
"""
# Locks what a new stock row depends on, so that whoever archives it meanwhile closes the row too, or was first.
LOCK_SKUS = "UPDATE sku SET version = version FROM unnest($1::text[]) AS key (code) WHERE sku = key.code"
LOCK_LOCATIONS = "UPDATE location SET version = version FROM unnest($1::text[]) AS key (code) WHERE location = key.code"
# Makes the stock rows that are missing, where both SKU and location are known.
MAKE_STOCK = """
INSERT INTO stock (sku, location, active)
SELECT key.sku, key.location, sku.active AND location.active
FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN sku ON sku.sku = key.sku JOIN location ON location.location = key.location
ON CONFLICT DO NOTHING
"""
# The keys that a line without a location may be met from, in order of priority.
OPEN_KEYS = """
FROM unnest($1::text[]) AS asked (sku)
  JOIN stock ON stock.sku = asked.sku JOIN location ON location.location = stock.location
WHERE stock.active ORDER BY stock.sku, location.priority, stock.location
"""
SOURCES = f"SELECT stock.sku, stock.location {OPEN_KEYS}"
# The keys that there are, and the time as of which it is so. Outer joins of arrays would take whole tables to the
# coordinator of a cluster.
READ_STOCK = f"""
SELECT {STOCK_COLUMNS}, statement_timestamp() AS time
FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN stock ON stock.sku = key.sku AND stock.location = key.location
"""
# The joint view of a SKU over its active locations.
SUM_STOCK = """
SELECT stock.sku, sum(on_hand)::bigint AS on_hand, sum(held)::bigint AS held,
       sum(safety_stock)::bigint AS safety_stock, sum(backorder_limit)::bigint AS backorder_limit,
       sum(short)::bigint AS short,
       sum(greatest(0, on_hand - held - safety_stock + backorder_limit))::bigint AS available,
       statement_timestamp() AS time
FROM unnest($1::text[]) AS asked (sku) JOIN stock ON stock.sku = asked.sku
WHERE stock.active GROUP BY stock.sku
"""
KNOWN_SKUS = """
SELECT sku.sku, sku.active FROM unnest($1::text[]) AS asked (sku) JOIN sku ON sku.sku = asked.sku
"""
KNOWN_LOCATIONS = """
SELECT location.location, location.active FROM unnest($1::text[]) AS asked (location)
  JOIN location ON location.location = asked.location
"""
# A hold that is known fails the insert, and with it the attempt: the next one finds its first outcome.
INSERT_HOLDS = """
INSERT INTO hold (sku, hold_id, slot, location, quantity, held, fingerprint, expires_at, short_lines,
                  created_at)
SELECT sku, hold_id, slot, location, quantity, quantity, fingerprint, expires_at, short_lines::jsonb, $9
FROM unnest($1::text[], $2::text[], $3::smallint[], $4::text[], $5::bigint[], $6::bytea[],
            $7::timestamptz[], $8::text[])
  AS new (sku, hold_id, slot, location, quantity, fingerprint, expires_at, short_lines)
RETURNING hold_id
"""
READ_HOLDS = """
SELECT hold.* FROM unnest($1::text[], $2::text[]) AS asked (sku, hold_id)
  JOIN hold ON hold.sku = asked.sku AND hold.hold_id = asked.hold_id
ORDER BY hold.sku, hold.hold_id, hold.location, hold.slot
"""
# Hold rows as they were decided under their stock rows' locks; what was held says that they were.
SAVE_HOLDS = """
UPDATE hold SET held = new.held, committed = new.committed, released = new.released, expired = new.expired,
                expires_at = new.expires_at
FROM unnest($1::text[], $2::text[], $3::smallint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
            $8::timestamptz[], $9::bigint[])
  AS new (sku, hold_id, slot, held, committed, released, expired, expires_at, old_held)
WHERE hold.sku = new.sku AND hold.hold_id = new.hold_id AND hold.slot = new.slot AND hold.held = new.old_held
"""
# Expired holds on locked keys, to be given back before anyone is refused; so many at a time.
EXPIRED_ON_KEYS = """
SELECT hold.* FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN hold ON hold.sku = key.sku AND hold.location = key.location
WHERE hold.held > 0 AND hold.expires_at <= $3
ORDER BY hold.sku, hold.location, hold.expires_at LIMIT $4
"""
# Holds whose time has come, as they are read without a lock.
EXPIRED = "SELECT * FROM hold WHERE held > 0 AND expires_at <= now() ORDER BY expires_at LIMIT $1"
# Keys as they are, and when the next hold on each expires, without a lock.
LOOK_COLUMNS = f"""{STOCK_COLUMNS}, (
  SELECT min(expires_at) FROM hold WHERE hold.sku = stock.sku AND hold.location = stock.location AND hold.held > 0
) AS expires_at"""
LOOK = f"""
SELECT {LOOK_COLUMNS} FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN stock ON stock.sku = key.sku AND stock.location = key.location
"""
LOOK_OPEN = f"SELECT {LOOK_COLUMNS} {OPEN_KEYS}"
READ_CHANGES = """
SELECT hold_change.* FROM unnest($1::text[], $2::text[], $3::text[]) AS asked (sku, hold_id, request_id)
  JOIN hold_change ON hold_change.sku = asked.sku AND hold_change.hold_id = asked.hold_id
    AND hold_change.request_id = asked.request_id
ORDER BY hold_change.sku
"""
INSERT_CHANGES = """
INSERT INTO hold_change (sku, hold_id, request_id, kind, fingerprint, allocations, expires_at, created_at)
SELECT sku, hold_id, request_id, kind, fingerprint, allocations::jsonb, expires_at, $8
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::timestamptz[])
  AS new (sku, hold_id, request_id, kind, fingerprint, allocations, expires_at)
RETURNING hold_id
"""
READ_REQUESTS = """
SELECT request.* FROM unnest($1::text[], $2::text[]) AS asked (key, request_id)
  JOIN request ON request.key = asked.key AND request.request_id = asked.request_id
"""
INSERT_REQUESTS = """
INSERT INTO request (key, request_id, fingerprint, outcome, refusal)
SELECT key, request_id, fingerprint, outcome, refusal::jsonb
FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bytea[], $5::text[])
  AS new (key, request_id, fingerprint, outcome, refusal)
RETURNING key
"""
# Movements, and where they stand for the relay.
INSERT_MOVEMENTS = """
WITH moved AS (
  INSERT INTO movement (sku, location, version, kind, on_hand_delta, held_delta, short_delta, on_hand, held,
                        short, safety_stock, backorder_limit, hold_id, request_id, reference, occurred_at, recorded_at)
  SELECT new.*, $17::timestamptz
  FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[],
              $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::text[], $14::text[],
              $15::text[], $16::timestamptz[]) AS new
  RETURNING sku, location, version
)
INSERT INTO movement_outbox (skus, locations, versions, recorded_at, traceparent)
SELECT array_agg(sku), array_agg(location), array_agg(version), $17::timestamptz, $18 FROM moved
"""
# The oldest groups of movements to be sent.
UNSENT = "SELECT * FROM movement_outbox ORDER BY id LIMIT $1"
# Movements where a group says that they stand: the time leads to their partition.
MOVEMENTS_AT = """
SELECT movement.* FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[])
    AS part (sku, location, version, recorded_at)
  JOIN movement ON movement.sku = part.sku AND movement.location = part.location
    AND movement.version = part.version AND movement.recorded_at = part.recorded_at
"""
DELETE_SENT_MOVEMENTS = """
DELETE FROM movement_outbox USING unnest($1::bigint[]) AS sent (id) WHERE movement_outbox.id = sent.id
"""
# Watched keys that have moved on since the caller's version.
MOVED = """
SELECT stock.sku, stock.location, known.version AS known
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS known (sku, location, version)
  JOIN stock ON stock.sku = known.sku AND stock.location = known.location
WHERE stock.version <> known.version
"""
# The next movements of keys, in version order: versions have no gap.
MOVEMENTS_AFTER = """
SELECT movement.* FROM unnest($1::text[], $2::text[], $3::bigint[]) AS known (sku, location, version)
  JOIN movement ON movement.sku = known.sku AND movement.location = known.location
    AND movement.version > known.version AND movement.version <= known.version + $4
ORDER BY movement.sku, movement.location, movement.version
"""
NEXT_KEYS = "SELECT sku, location FROM stock WHERE (sku, location) > ($1, $2) ORDER BY sku, location LIMIT $3"
# Counters less what the ledger and the open holds come to, for those of some keys that have moved since their
# checkpoint, or whose counters are no longer what they were then; a key's rows are in one snapshot. Only movements
# after the checkpoint are read, so that the cost follows what has happened since and not the length of history.
COMPARE = """
SELECT stock.sku, stock.location, stock.version, stock.on_hand, stock.held, stock.short,
       stock.version - coalesce(checked.version, 0) - ledger.movements AS version_drift,
       stock.on_hand - coalesce(checked.on_hand, 0) - ledger.on_hand AS on_hand_drift,
       stock.held - coalesce(checked.held, 0) - ledger.held AS held_drift,
       stock.short - coalesce(checked.short, 0) - ledger.short AS short_drift,
       stock.held - open_holds.held AS hold_drift
FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN stock ON stock.sku = key.sku AND stock.location = key.location
  LEFT JOIN checkpoint AS checked ON checked.sku = stock.sku AND checked.location = stock.location
  CROSS JOIN LATERAL (
    SELECT count(*) AS movements, coalesce(sum(on_hand_delta), 0)::bigint AS on_hand,
           coalesce(sum(held_delta), 0)::bigint AS held, coalesce(sum(short_delta), 0)::bigint AS short
    FROM movement WHERE movement.sku = stock.sku AND movement.location = stock.location
      AND movement.version > coalesce(checked.version, 0)
  ) AS ledger
  CROSS JOIN LATERAL (
    SELECT coalesce(sum(hold.held), 0)::bigint AS held FROM hold
    WHERE hold.sku = stock.sku AND hold.location = stock.location AND hold.held > 0
  ) AS open_holds
WHERE (stock.version, stock.on_hand, stock.held, stock.short)
   <> (coalesce(checked.version, 0), coalesce(checked.on_hand, 0), coalesce(checked.held, 0),
       coalesce(checked.short, 0))
"""
# Where all is zero, as it must be, the checkpoint moves on.
SAVE_CHECKPOINTS = """
INSERT INTO checkpoint (sku, location, version, on_hand, held, short)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[])
ON CONFLICT (sku, location) DO UPDATE
SET version = excluded.version, on_hand = excluded.on_hand, held = excluded.held, short = excluded.short,
    checked_at = excluded.checked_at
WHERE checkpoint.version < excluded.version
"""
# For whoever watches: how many holds are open, as far as it is worth counting, and how long the oldest expired one
# waits to be given back.
OPEN_HOLDS = "SELECT count(*) FROM (SELECT 1 FROM hold WHERE held > 0 LIMIT 100000) AS counted"
OVERDUE_SECONDS = """
SELECT coalesce(extract(epoch FROM clock_timestamp() - min(expires_at)), 0)::float8
FROM hold WHERE held > 0 AND expires_at <= now()
"""
LOCK_SKU = "UPDATE sku SET version = version WHERE sku = $1 RETURNING *"
LOCK_LOCATION = "UPDATE location SET version = version WHERE location = $1 RETURNING *"
INSERT_SKUS = """
INSERT INTO sku (sku, name, category, unit, currency_code, price_micros)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[])
ON CONFLICT DO NOTHING RETURNING *
"""
INSERT_LOCATION = """
INSERT INTO location (location, name, priority) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING *
"""
UPDATE_SKU = """
UPDATE sku SET name = $2, category = $3, unit = $4, currency_code = $5, price_micros = $6, active = $7,
               version = version + 1, updated_at = statement_timestamp()
WHERE sku = $1 RETURNING *
"""
UPDATE_LOCATION = """
UPDATE location SET name = $2, priority = $3, active = $4, version = version + 1,
                    updated_at = statement_timestamp()
WHERE location = $1 RETURNING *
"""
# Archiving closes the stock rows, in the order in which everyone locks them.
CLOSE_STOCK_OF_SKU = """
UPDATE stock SET active = false FROM (
  SELECT sku, location FROM stock WHERE sku = $1 ORDER BY sku, location
) AS key WHERE stock.sku = key.sku AND stock.location = key.location
"""
CLOSE_STOCK_OF_LOCATION = """
UPDATE stock SET active = false FROM (
  SELECT sku, location FROM stock WHERE location = $1 ORDER BY sku, location
) AS key WHERE stock.sku = key.sku AND stock.location = key.location
"""

SKU = sa.table(
    "sku", *(sa.column(name) for name in ("sku", "name", "category", "unit", "currency_code")),
    sa.column("active", sa.Boolean), sa.column("price_micros"), sa.column("version"),
    sa.column("created_at"), sa.column("updated_at"),
)  # fmt: skip
LOCATION = sa.table(
    "location", *(sa.column(name) for name in ("location", "name", "priority", "version")),
    sa.column("active", sa.Boolean), sa.column("created_at"), sa.column("updated_at"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """A write that was made: its content's fingerprint, and its first outcome or refusal."""

    key: str
    request_id: str
    fingerprint: bytes
    outcome: bytes = b""
    refusal: tuple[str, str, dict[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class KnownChange:
    """A hold's change that was made, as far as it concerns one SKU."""

    fingerprint: bytes
    allocations: tuple[Allocation, ...]
    expires_at: datetime
    changed_at: datetime


def split(rows: Iterable[Sequence[Any]], columns: int = 2) -> list[list[Any]]:
    """Rows to columns, so many empty ones when there are no rows."""
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(columns)]


def _stock(row: Record) -> Stock:
    return Stock(*tuple(row)[:9])


async def place(
    connection: Connection,
    plans: Iterable[tuple[HoldRequest, Plan]],
    seen: Iterable[Stock] = (),
    until: datetime | None = None,
) -> tuple[dict[Key, Stock], datetime]:
    """Place holds as planned, remember who is refused, and commit; the stock afterwards, and the time.

    What is `seen` must still be so, and of the other keys there must be enough; nor may it be `until` yet, the least
    time at which a hold expires that the plans count with. Raises asyncpg.DivisionByZeroError otherwise, one of
    CONTESTED where a hold is known.
    """
    held: dict[Key, list[tuple[str, int, int, str, str, int, bytes, timedelta, str | None]]] = {}
    bare = []
    for hold, plan in plans:
        slots: dict[str, int] = {}
        short = grouped(plan.short_lines, lambda line: line.sku) if plan.short_lines else {}
        for part in plan.allocations:
            slot = slots[part.sku] = slots.get(part.sku, -1) + 1
            parts = held.setdefault(part.key, [])
            running = part.quantity + (parts[-1][2] if parts else 0)
            why = None if slot else _short_json(short.get(part.sku, ()))
            parts.append((hold.hold_id, part.quantity, running, *part.key, slot, hold.fingerprint, hold.ttl, why))
        if short:
            bare += [
                (hold.hold_id, 0, 0, sku, "", 0, hold.fingerprint, hold.ttl, _short_json(short.get(sku, ())))
                for sku in {line.sku for line in hold.lines} - slots.keys()
            ]
    versions = {stock.key: stock.version for stock in seen}
    demand: list[tuple[str, str, int, int, int, int | None]] = []
    first = 1
    for key in sorted(held.keys() | versions):
        parts = held.get(key, [])
        demand.append((*key, parts[-1][2] if parts else 0, len(parts), first, versions.get(key)))
        first += len(parts)
    ordered = [row for key in sorted(held) for row in held[key]]
    ordered += sorted(bare, key=lambda row: (row[3], row[0]))
    rows = await connection.fetch(PLACE, *split(demand), *split(ordered), until, telemetry.traceparent())
    return {(row["sku"], row["location"]): _stock(row) for row in rows}, rows[0]["time"]


async def change(
    connection: Connection,
    changes: Sequence[tuple[HoldChange, Sequence[tuple[HoldRow, int]], Sequence[Allocation], datetime]],
) -> tuple[dict[Key, Stock], datetime]:
    """Commit, release and expire, and commit; answers as `place` does.

    Each change comes with the hold rows, as they were read, that it takes units from; with what that comes
    to; and with the hold's expiry. Raises asyncpg.DivisionByZeroError where a row is not as it was read, has
    expired (or not, where it is to), or belongs to stock that is short; one of CONTESTED where a change is known.
    An expiry of nothing is none; others are not remembered, since the hold itself tells of them.
    """
    moves: dict[Key, list[tuple[str, str, str, int, int, int, int]]] = {}
    slots: dict[tuple[str, str, int], tuple[int, datetime, dict[Kind, int]]] = {}
    for change, parts, _, _ in changes:
        for row, units in parts:
            part = moves.setdefault(row.key, [])
            sold = units if change.kind is Kind.COMMIT else 0
            sold_before, held_before = part[-1][5:] if part else (0, 0)
            part.append(
                (
                    change.hold_id, "" if change.kind is Kind.EXPIRE else change.request_id, change.kind.value, sold,
                    units, sold_before + sold, held_before + units,
                )
            )  # fmt: skip
            _, _, going = slots.setdefault(row.slot_key, (row.held, row.expires_at, dict.fromkeys(LEAVING, 0)))
            going[change.kind] += units
    if not moves:
        return {}, await _clock(connection)
    gone: list[tuple[str, str, int, int, int, int]] = []
    first = 1
    for key in sorted(moves):
        part = moves[key]
        gone.append((*key, *part[-1][5:], len(part), first))
        first += len(part)
    rows = await connection.fetch(
        CHANGE,
        *split(gone),
        *split(row for key in sorted(moves) for row in moves[key]),
        *split((*slot, held, until, *going.values()) for slot, (held, until, going) in sorted(slots.items())),
        *split(
            _change_rows((one, parts, until) for one, _, parts, until in changes if one.kind is not Kind.EXPIRE),
            columns=7,
        ),
        telemetry.traceparent(),
    )
    return {(row["sku"], row["location"]): _stock(row) for row in rows}, rows[0]["time"]


async def lock(connection: Connection, keys: Iterable[Key]) -> tuple[dict[Key, Stock], datetime]:
    """Lock keys and read them; with the database's time after the last lock. Missing keys are left out."""
    rows = await connection.fetch(LOCK, *split(sorted(set(keys))))
    now = _latest(rows) or await _clock(connection)
    return {(row["sku"], row["location"]): _stock(row) for row in rows}, now


async def _clock(connection: Connection) -> datetime:
    time: datetime = await connection.fetchval("SELECT clock_timestamp()")
    return time


def _latest(rows: Sequence[Record]) -> datetime | None:
    return max((row["time"] for row in rows), default=None)


async def save(connection: Connection, before: Mapping[Key, Stock], after: Mapping[Key, Stock], now: datetime) -> None:
    """Write the locked stocks that changed."""
    changed = [after[key] for key in sorted(after) if after[key] != before[key]]
    if not changed:
        return
    columns = split(
        (s.sku, s.location, s.on_hand, s.held, s.safety_stock, s.backorder_limit, s.short, s.version) for s in changed
    )
    status = await connection.execute(SAVE, *columns, now, [before[s.key].version for s in changed])
    if affected(status) != len(changed):
        raise AssertionError("stock changed under its lock")


async def make_stock(connection: Connection, keys: Iterable[Key]) -> None:
    """Make the stock rows that are missing, where both SKU and location are known."""
    ordered = sorted(set(keys))
    await connection.execute(LOCK_LOCATIONS, sorted({location for _, location in ordered}))
    await connection.execute(LOCK_SKUS, sorted({sku for sku, _ in ordered}))
    await connection.execute(MAKE_STOCK, *split(ordered))


async def sources(connection: Connection, skus: Collection[str]) -> dict[str, list[str]]:
    """Each SKU's open locations in order of priority."""
    found: dict[str, list[str]] = {}
    for row in await connection.fetch(SOURCES, sorted(set(skus))) if skus else ():
        found.setdefault(row["sku"], []).append(row["location"])
    return found


async def read_stock(connection: Connection, keys: Iterable[Key]) -> dict[Key, tuple[Stock, datetime]]:
    """Each key's stock, of version 0 where there is none, and the time as of which it is so."""
    asked = sorted(set(keys))
    rows = await connection.fetch(READ_STOCK, *split(asked))
    now = rows[0]["time"] if rows else await _clock(connection)
    found = {(row["sku"], row["location"]): (_stock(row), row["time"]) for row in rows}
    return {key: found.get(key, (Stock(*key), now)) for key in asked}


async def sum_stock(connection: Connection, skus: Iterable[str]) -> dict[str, Record]:
    return {row["sku"]: row for row in await connection.fetch(SUM_STOCK, sorted(set(skus)))}


async def unknown_skus(connection: Connection, skus: Iterable[str]) -> dict[str, bool]:
    """Of `skus`, those that take no new stock or holds: True when archived, False when unknown."""
    return await _unknown(connection, KNOWN_SKUS, skus)


async def unknown_locations(connection: Connection, locations: Iterable[str]) -> dict[str, bool]:
    """As `unknown_skus`, of locations."""
    return await _unknown(connection, KNOWN_LOCATIONS, locations)


async def _unknown(connection: Connection, known: str, codes: Iterable[str]) -> dict[str, bool]:
    asked = sorted(set(codes))
    active: dict[str, bool] = dict(map(tuple, await connection.fetch(known, asked)))
    return {code: code in active for code in asked if not active.get(code)}


async def insert_holds(connection: Connection, rows: Sequence[HoldRow], now: datetime) -> None:
    """Insert hold rows. Raises asyncpg.UniqueViolationError where one is known."""
    if not rows:
        return
    ordered = sorted(rows, key=lambda row: (row.sku, row.hold_id, row.slot))
    columns = split(
        (
            r.sku,
            r.hold_id,
            r.slot,
            r.location,
            r.quantity,
            r.fingerprint,
            r.expires_at,
            _short_json(r.short_lines),
        )
        for r in ordered
    )
    await connection.execute(INSERT_HOLDS, *columns, now)


def _short_json(lines: Sequence[ShortLine]) -> str | None:
    if not lines:
        return None
    return json.dumps(
        [[x.location, x.requested, x.available, x.next_expiry.isoformat() if x.next_expiry else None] for x in lines]
    )


def _hold(row: Record) -> HoldRow:
    short = json.loads(row["short_lines"]) if row["short_lines"] else []
    return HoldRow(
        row["sku"], row["hold_id"], row["slot"], row["location"], row["quantity"], row["held"],
        row["committed"], row["released"], row["expired"], row["fingerprint"], row["created_at"],
        row["expires_at"],
        tuple(
            ShortLine(row["sku"], at, asked, had, datetime.fromisoformat(until) if until else None)
            for at, asked, had, until in short
        ),
    )  # fmt: skip


async def read_holds(connection: Connection, ids: Iterable[tuple[str, str]]) -> dict[str, list[HoldRow]]:
    """The rows of (sku, hold id) pairs, by hold id, in order of (sku, location)."""
    found: dict[str, list[HoldRow]] = {}
    for row in await connection.fetch(READ_HOLDS, *split(sorted(set(ids)))):
        found.setdefault(row["hold_id"], []).append(_hold(row))
    return found


async def save_holds(connection: Connection, before: Iterable[HoldRow], after: Iterable[HoldRow]) -> None:
    """Write the rows of locked holds that changed; `after` has the same rows, in whatever order."""
    held = {row.slot_key: row for row in before}
    changed = sorted((row for row in after if row != held[row.slot_key]), key=lambda row: row.slot_key)
    if not changed:
        return
    columns = split((*r.slot_key, r.held, r.committed, r.released, r.expired, r.expires_at) for r in changed)
    status = await connection.execute(SAVE_HOLDS, *columns, [held[row.slot_key].held for row in changed])
    if affected(status) != len(changed):
        raise AssertionError("holds changed under their lock")


async def expired_on_keys(connection: Connection, keys: Collection[Key], now: datetime, rows_max: int) -> list[HoldRow]:
    rows = await connection.fetch(EXPIRED_ON_KEYS, *split(sorted(set(keys))), now, rows_max) if keys else ()
    return [_hold(row) for row in rows]


async def expired(connection: Connection, holds_max: int) -> list[HoldRow]:
    """The holds whose time came first, not locked."""
    return [_hold(row) for row in await connection.fetch(EXPIRED, holds_max)]


async def look(connection: Connection, keys: Collection[Key]) -> dict[Key, tuple[Stock, datetime | None]]:
    """The stock of the keys that there are, and when the next hold on each expires, not locked."""
    return _looked(await connection.fetch(LOOK, *split(sorted(set(keys))))) if keys else {}


async def look_open(connection: Connection, skus: Collection[str]) -> dict[Key, tuple[Stock, datetime | None]]:
    """The same of each SKU's open locations, in order of priority."""
    return _looked(await connection.fetch(LOOK_OPEN, sorted(set(skus)))) if skus else {}


def _looked(rows: Iterable[Record]) -> dict[Key, tuple[Stock, datetime | None]]:
    return {(row["sku"], row["location"]): (_stock(row), row["expires_at"]) for row in rows}


async def read_changes(
    connection: Connection, changes: Iterable[HoldChange]
) -> dict[tuple[str, str], list[KnownChange]]:
    """Changes made before, by (hold id, request id)."""
    asked = sorted({(sku, c.hold_id, c.request_id) for c in changes for sku in c.skus})
    found: dict[tuple[str, str], list[KnownChange]] = {}
    for row in await connection.fetch(READ_CHANGES, *(split(asked) if asked else ([], [], []))):
        allocations = tuple(Allocation(row["sku"], at, units) for at, units in json.loads(row["allocations"]))
        found.setdefault((row["hold_id"], row["request_id"]), []).append(
            KnownChange(row["fingerprint"], allocations, row["expires_at"], row["created_at"])
        )
    return found


async def insert_changes(
    connection: Connection,
    made: Iterable[tuple[HoldChange, Sequence[Allocation], datetime]],
    now: datetime,
) -> None:
    """Remember changes, a row for each SKU of each."""
    rows = _change_rows(made)
    if rows:
        await connection.execute(INSERT_CHANGES, *split(rows), now)


def _change_rows(
    made: Iterable[tuple[HoldChange, Sequence[Allocation], datetime]],
) -> list[tuple[str, str, str, str, bytes, str, datetime]]:
    rows = []
    for change, allocations, expires_at in made:
        parts = grouped(allocations, lambda part: part.sku)
        rows += [
            (
                sku, change.hold_id, change.request_id, change.kind.value, change.fingerprint,
                json.dumps([[part.location, part.quantity] for part in parts.get(sku, ())]), expires_at,
            )
            for sku in change.skus
        ]  # fmt: skip
    return sorted(rows)


async def read_requests(connection: Connection, ids: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Request]:
    """Writes made before, by (key, request id)."""
    rows = await connection.fetch(READ_REQUESTS, *split(sorted(set(ids))))
    return {
        (row["key"], row["request_id"]): Request(
            row["key"],
            row["request_id"],
            row["fingerprint"],
            row["outcome"],
            tuple(json.loads(row["refusal"])) if row["refusal"] else None,
        )
        for row in rows
    }


async def insert_requests(connection: Connection, requests: Iterable[Request]) -> None:
    rows = sorted(
        (r.key, r.request_id, r.fingerprint, r.outcome, json.dumps(r.refusal) if r.refusal else None) for r in requests
    )
    if rows:
        await connection.execute(INSERT_REQUESTS, *split(rows))


async def insert_movements(connection: Connection, movements: Sequence[Movement], now: datetime) -> None:
    """Write movements into the ledger, and tell the relay where they stand."""
    if not movements:
        return
    columns = split(
        (
            m.after.sku, m.after.location, m.after.version, m.kind.value, m.on_hand_delta, m.held_delta,
            m.short_delta, m.after.on_hand, m.after.held, m.after.short, m.after.safety_stock,
            m.after.backorder_limit, m.hold_id, m.request_id, m.reference, m.occurred_at,
        )
        for m in movements
    )  # fmt: skip
    await connection.execute(INSERT_MOVEMENTS, *columns, now, telemetry.traceparent())


async def unsent_movements(
    connection: Connection, groups_max: int
) -> list[tuple[tuple[int, UUID, str], list[tuple[Movement, datetime]]]]:
    """The oldest groups to be sent: (id, event id, traceparent), and their movements in order of version.

    Raises Refusal(DATABASE_UNAVAILABLE) while a movement of them is not there: a cluster's coordinator shows what was
    committed a moment before the nodes that it is on do, or as long as such a node is away.
    """
    waiting = [
        (row, sorted(zip(row["skus"], row["locations"], row["versions"], strict=True)))
        for row in await connection.fetch(UNSENT, groups_max)
    ]
    places = [(*part, row["recorded_at"]) for row, parts in waiting for part in parts]
    if not places:
        return []
    for _ in range(LOOKS_MAX):
        rows = await connection.fetch(MOVEMENTS_AT, *split(places))
        if len(rows) == len(places):
            break
        await asyncio.sleep(LOOK_SECONDS)
    else:
        raise unavailable()
    found = {(row["sku"], row["location"], row["version"]): _movement(row) for row in rows}
    return [
        ((row["id"], row["event_id"], row["traceparent"]), [found[part] for part in parts]) for row, parts in waiting
    ]


def _movement(row: Record) -> tuple[Movement, datetime]:
    """A row of the ledger, and when it was recorded."""
    after = Stock(
        row["sku"], row["location"], row["on_hand"], row["held"], row["safety_stock"], row["backorder_limit"],
        row["short"], row["version"],
    )  # fmt: skip
    movement = Movement(
        after, Kind(row["kind"]), row["on_hand_delta"], row["held_delta"], row["short_delta"], row["hold_id"],
        row["request_id"], row["reference"], row["occurred_at"],
    )  # fmt: skip
    return movement, row["recorded_at"]


async def movements_after(
    connection: Connection, versions: Mapping[Key, int], movements_max: int
) -> list[tuple[Movement, datetime]]:
    """The next movements of keys after their versions, by key and version: as many of each that has moved.

    At most `movements_max`, and at least one of each.
    """
    keys = sorted(versions)
    asked = [*split(keys), [versions[key] for key in keys]]
    moved = await connection.fetch(MOVED, *asked)
    if not moved:
        return []
    later = [
        [row["sku"] for row in moved],
        [row["location"] for row in moved],
        [row["known"] for row in moved],
    ]
    each = max(1, movements_max // len(moved))
    return [_movement(row) for row in await connection.fetch(MOVEMENTS_AFTER, *later, each)]


def drift(row: Record) -> Drift:
    """What a row of `balance` says."""
    return Drift(
        (row["sku"], row["location"]), row["version_drift"], row["on_hand_drift"], row["held_drift"],
        row["short_drift"], row["hold_drift"],
    )  # fmt: skip


async def balance(connection: Connection, after: Key, keys_max: int) -> tuple[int, Key, list[Drift]]:
    """Compare those of the next keys that have moved since they were last found to agree; remember those that do.

    Returns how many were looked at, the last of them, and a row for each that does not agree.
    """
    rows = await connection.fetch(NEXT_KEYS, *after, keys_max)
    keys = [(row["sku"], row["location"]) for row in rows]
    return len(keys), keys[-1] if keys else after, await balance_of(connection, keys)


async def balance_of(connection: Connection, keys: Iterable[Key]) -> list[Drift]:
    """The same of single keys."""
    rows = await connection.fetch(COMPARE, *split(sorted(keys)))
    drifts = [drift(row) for row in rows]
    agreeing = sorted(tuple(row)[:6] for row, one in zip(rows, drifts, strict=True) if not one.drifts)
    if agreeing:
        await connection.execute(SAVE_CHECKPOINTS, *split(agreeing))
    return [one for one in drifts if one.drifts]


async def measure_holds(connection: Connection) -> tuple[int, float]:
    """How many rows of holds are open, and for how many seconds the oldest expired one has waited."""
    return await connection.fetchval(OPEN_HOLDS), await connection.fetchval(OVERDUE_SECONDS)


async def make_partitions(connection: Connection, today: datetime, months_ahead: int) -> None:
    """Make the ledger's partitions of this month and of those to come. Raises what is `partitions.IN_USE`."""
    for ahead in range(months_ahead + 1):
        await partitions.make(connection, "movement", partitions.following(partitions.month(today), ahead))


async def get_sku(connection: Connection, sku: str) -> Record | None:
    return await connection.fetchrow("SELECT * FROM sku WHERE sku = $1", sku)


async def get_location(connection: Connection, location: str) -> Record | None:
    return await connection.fetchrow("SELECT * FROM location WHERE location = $1", location)


async def list_skus(
    connection: Connection, *, after: str, prefix: str, category: str, show_archived: bool, limit: int
) -> list[Record]:
    """A page of SKUs in order of their code, by keyset."""
    statement = sa.select(SKU).where(SKU.c.sku > after).order_by(SKU.c.sku).limit(limit)
    if prefix:
        statement = statement.where(SKU.c.sku.between(prefix, prefix + "\U0010ffff"))
    if category:
        below = SKU.c.category.between(category + "/", category + "/\U0010ffff")
        statement = statement.where(sa.or_(SKU.c.category == category, below))
    if not show_archived:
        statement = statement.where(SKU.c.active)
    return await fetch(connection, statement)


async def list_locations(connection: Connection, *, after: str, show_archived: bool, limit: int) -> list[Record]:
    """A page of locations in order of their code, by keyset."""
    statement = sa.select(LOCATION).where(LOCATION.c.location > after).order_by(LOCATION.c.location).limit(limit)
    if not show_archived:
        statement = statement.where(LOCATION.c.active)
    return await fetch(connection, statement)
