"""Every SQL statement of reservation, and the functions that run them.

Rows of several reservations are always written in ascending reservation id.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from services.reservation.domain import (
    Action,
    Allocation,
    Ask,
    Change,
    ChangeLine,
    Held,
    Line,
    Mode,
    Reservation,
    ShortLine,
    State,
)
from services.reservation.subjects import Identity, Kind
from shared import telemetry
from shared.database import Connection, Record, columns, fetch
from shared.refusal import Refusal

READ_MAX = 50
READ_ROWS_MAX = 20_000  # together well below what a message may have

# New reservations with all that belongs to them and their events, in one statement and one round trip. Hashes come
# in ascending order, as another pod may insert the same ones: it waits, and cannot be waited for.
# One that is known undoes it all: then `KNOWN` tells which, and the others are inserted again. Nothing is returned, so
# that a cluster copies rows straight into its shards.
INSERT = """
WITH made AS (
  INSERT INTO reservation (reservation_id, customer_id, state, mode, fingerprint, short_lines, expires_at,
                           created_at, updated_at, order_time, country, device_id, ip_address, key_id)
  SELECT reservation_id, customer_id, state, mode, fingerprint, short_lines::jsonb, expires_at, created_at, created_at,
         coalesce(order_time, created_at), country, device_id, ip_address, $27
  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::timestamptz[],
              $8::timestamptz[], $9::timestamptz[], $10::text[], $11::text[], $12::text[])
    AS new (reservation_id, customer_id, state, mode, fingerprint, short_lines, expires_at, created_at, order_time,
            country, device_id, ip_address)
), lines AS (
  INSERT INTO reservation_line (reservation_id, line_no, sku, location, quantity, minimum, currency_code, price_micros)
  SELECT * FROM unnest($13::text[], $14::smallint[], $15::text[], $16::text[], $17::bigint[], $18::bigint[],
                       $19::text[], $20::bigint[])
), allocations AS (
  INSERT INTO allocation (reservation_id, sku, location, held)
  SELECT * FROM unnest($21::text[], $22::text[], $23::text[], $24::bigint[])
), subjects AS (
  INSERT INTO subject (subject, kind, value)
  SELECT * FROM unnest($28::text[], $29::text[], $30::text[])
  ON CONFLICT DO NOTHING
)
INSERT INTO outbox (topic, type, keys, payloads, traceparent) SELECT $25, $26, $1, $31, $32
"""
KNOWN = """
SELECT reservation.reservation_id FROM unnest($1::text[]) AS asked (reservation_id)
  JOIN reservation ON reservation.reservation_id = asked.reservation_id
"""
# Reservations whole: a row each, with their lines and allocations, each an array in one of JSON.
READ = """
SELECT reservation.*,
  (SELECT json_agg(json_build_array(sku, location, quantity, minimum, currency_code, price_micros) ORDER BY line_no)
   FROM reservation_line AS line WHERE line.reservation_id = reservation.reservation_id) AS lines,
  (SELECT json_agg(json_build_array(sku, location, held, confirmed, cancelled, expired) ORDER BY sku, location)
   FROM allocation WHERE allocation.reservation_id = reservation.reservation_id) AS allocations
FROM unnest($1::text[]) AS asked (reservation_id)
  JOIN reservation ON reservation.reservation_id = asked.reservation_id
"""
READ_SUBJECTS = """
SELECT subject.* FROM unnest($1::text[]) AS asked (subject) JOIN subject ON subject.subject = asked.subject
"""
READ_CHANGES = """
SELECT change.* FROM unnest($1::text[], $2::text[]) AS asked (reservation_id, request_id)
  JOIN reservation_change AS change
    ON change.reservation_id = asked.reservation_id AND change.request_id = asked.request_id
"""
# The intent, before inventory is asked. What does not come back was known.
INSERT_CHANGES = """
INSERT INTO reservation_change (reservation_id, request_id, action, fingerprint, lines, ttl)
SELECT reservation_id, request_id, action, fingerprint, lines::jsonb, ttl
FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::text[], $6::interval[])
  AS new (reservation_id, request_id, action, fingerprint, lines, ttl)
ON CONFLICT DO NOTHING RETURNING reservation_id, request_id
"""
# What nobody came back for.
PENDING_CHANGES = """
SELECT * FROM reservation_change WHERE state = 'PENDING' AND created_at < now() - $1::interval
ORDER BY created_at LIMIT $2
"""
# Locks reservations in order; all bookings of one are serial.
LOCK = """
UPDATE reservation SET version = version FROM unnest($1::text[]) AS asked (reservation_id)
WHERE reservation.reservation_id = asked.reservation_id
"""
# Reservations as they now are, what became of the changes that made them so, and their events, in one
# statement. A reservation that is not at the version it was read at, or a change that is not PENDING any
# more, divides by zero and undoes it all: another pod was there.
BOOK = """
WITH settled AS (
  UPDATE reservation SET state = new.state, version = new.version + 1, expires_at = new.expires_at,
                         updated_at = new.updated_at
  FROM unnest($1::text[], $2::bigint[], $3::text[], $4::timestamptz[], $5::timestamptz[])
    AS new (reservation_id, version, state, expires_at, updated_at)
  WHERE reservation.reservation_id = new.reservation_id AND reservation.version = new.version
  RETURNING reservation.reservation_id
), decided AS (
  UPDATE reservation_change AS change SET state = new.state, refusal = new.refusal::jsonb
  FROM unnest($6::text[], $7::text[], $8::text[], $9::text[]) AS new (reservation_id, request_id, state, refusal)
  WHERE change.reservation_id = new.reservation_id AND change.request_id = new.request_id
    AND change.state = 'PENDING'
  RETURNING change.reservation_id
), moved AS (
  UPDATE allocation SET held = new.held, confirmed = new.confirmed, cancelled = new.cancelled, expired = new.expired
  FROM unnest($10::text[], $11::text[], $12::text[], $13::bigint[], $14::bigint[], $15::bigint[], $16::bigint[])
    AS new (reservation_id, sku, location, held, confirmed, cancelled, expired)
  WHERE allocation.reservation_id = new.reservation_id AND allocation.sku = new.sku
    AND allocation.location = new.location
), told AS (
  INSERT INTO outbox (topic, type, keys, payloads, traceparent)
  SELECT $17, $18, $1, $19, $20 WHERE cardinality($1) > 0
)
SELECT 1 / ((SELECT count(*) FROM settled) = cardinality($1)
            AND (SELECT count(*) FROM decided) = cardinality($6))::int
"""
# By keyset, so that what is due and cannot be ended is not all that is ever found.
DUE = """
SELECT reservation_id, expires_at FROM reservation
WHERE state = 'HELD' AND expires_at <= now() AND (expires_at, reservation_id) > ($2, $3)
ORDER BY expires_at, reservation_id LIMIT $1
"""
Due = tuple[datetime, str]  # when a reservation's time has come, and its id
FIRST: Due = (datetime.fromtimestamp(0, UTC), "")  # before all of them
RESERVATION = sa.table(
    "reservation", sa.column("reservation_id"), sa.column("customer_id"), sa.column("state"),
    sa.column("created_at", sa.DateTime(timezone=True)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KnownChange:
    """A change that was asked for before, and how far it has come: PENDING, APPLIED or REFUSED."""

    change: Change
    state: str
    refusal: Refusal | None


async def insert(
    connection: Connection,
    decided: Sequence[tuple[Ask, Held, bytes]],
    subjects: Mapping[str, Identity],
    key_id: str,
    topic: str,
    kind: str,
) -> None:
    """Insert reservations, each with the payload of its event, and the hashes in these, and commit.

    Raises one of `shared.database.CONTESTED` where one is known; then none is inserted.
    """
    ordered = sorted(decided, key=lambda one: one[0].reservation_id)
    rows = [
        (
            ask.reservation_id, ask.customer_id, (State.HELD if held.allocations else State.REJECTED).value,
            ask.mode.value, ask.fingerprint, _short_json(held.short_lines), held.expires_at, held.placed_at,
            ask.order_time, ask.country, ask.device_id, ask.ip_address,
        )
        for ask, held, _ in ordered
    ]  # fmt: skip
    lines = [
        (ask.reservation_id, no, x.sku, x.location, x.quantity, x.minimum, x.currency_code, x.price_micros)
        for ask, _, _ in ordered
        for no, x in enumerate(ask.lines)
    ]
    allocations = [(ask.reservation_id, *part) for ask, held, _ in ordered for part in held.allocations]
    hashes = sorted((subject, one.kind.value, one.value) for subject, one in subjects.items())
    payloads = [payload for _, _, payload in ordered]
    await connection.execute(
        INSERT, *columns(rows, 12), *columns(lines, 8), *columns(allocations, 4), topic, kind, key_id,
        *columns(hashes, 3), payloads, telemetry.traceparent(),
    )  # fmt: skip


async def known(connection: Connection, ids: Iterable[str]) -> set[str]:
    """Which of these are there."""
    return {row["reservation_id"] for row in await connection.fetch(KNOWN, sorted(set(ids)))}


def _short_json(lines: Sequence[ShortLine]) -> str | None:
    if not lines:
        return None
    return json.dumps(
        [
            [x.sku, x.location, x.requested, x.available, x.next_expiry.isoformat() if x.next_expiry else None]
            for x in lines
        ]
    )


def _short_lines(value: str | None) -> tuple[ShortLine, ...]:
    return tuple(
        ShortLine(sku, at, asked, had, datetime.fromisoformat(until) if until else None)
        for sku, at, asked, had, until in json.loads(value or "[]")
    )


async def read(connection: Connection, ids: Iterable[str]) -> dict[str, Reservation]:
    """Reservations whole, by id; unknown ones are left out."""
    return {
        row["reservation_id"]: Reservation(
            row["reservation_id"], row["customer_id"], State(row["state"]), Mode(row["mode"]), row["fingerprint"],
            tuple(Line(*line) for line in json.loads(row["lines"] or "[]")),
            tuple(Allocation(*part) for part in json.loads(row["allocations"] or "[]")),
            _short_lines(row["short_lines"]), row["expires_at"], row["created_at"], row["updated_at"],
            row["order_time"], row["country"], row["version"], row["device_id"], row["ip_address"], row["key_id"],
        )
        for row in await connection.fetch(READ, sorted(set(ids)))
    }  # fmt: skip


async def read_first(connection: Connection, ids: Sequence[str]) -> tuple[list[Reservation], int]:
    """As many of these in their order as have READ_ROWS_MAX rows together, and one at least; and how many ids that is.

    Unknown ones are left out. Never more than READ_MAX reservations are read ahead of what is returned.
    """
    found: list[Reservation] = []
    rows = 0
    for start in range(0, len(ids), READ_MAX):
        part = ids[start : start + READ_MAX]
        known = await read(connection, part)
        for taken, name in enumerate(part, start):
            if (reservation := known.get(name)) is None:
                continue
            rows += reservation.rows
            if found and rows > READ_ROWS_MAX:
                return found, taken
            found.append(reservation)
    return found, len(ids)


async def read_subjects(connection: Connection, subjects: Iterable[str]) -> dict[str, Identity]:
    """What stands behind hashes, by hash; unknown ones are left out."""
    rows = await connection.fetch(READ_SUBJECTS, sorted(set(subjects)))
    return {row["subject"]: Identity(Kind(row["kind"]), row["value"]) for row in rows}


async def read_changes(connection: Connection, changes: Iterable[Change]) -> dict[tuple[str, str], KnownChange]:
    asked = sorted({(change.reservation_id, change.request_id) for change in changes})
    return {
        (row["reservation_id"], row["request_id"]): _known(row)
        for row in await connection.fetch(READ_CHANGES, *columns(asked, 2))
    }


def _known(row: Record) -> KnownChange:
    refusal = None
    if row["refusal"]:
        reason, message, metadata = json.loads(row["refusal"])
        refusal = Refusal(reason, message, **metadata)
    return KnownChange(_change(row), row["state"], refusal)


def _change(row: Record) -> Change:
    return Change(
        row["reservation_id"],
        row["request_id"],
        Action(row["action"]),
        tuple(ChangeLine(*line) for line in json.loads(row["lines"])),
        row["ttl"],
        row["fingerprint"],
    )


async def insert_changes(connection: Connection, changes: Iterable[Change]) -> set[tuple[str, str]]:
    """Keep changes as PENDING; return (reservation id, request id) of those that were not known."""
    rows = sorted(
        (
            (
                c.reservation_id, c.request_id, c.action.value, c.fingerprint,
                json.dumps([[line.sku, line.location, line.quantity] for line in c.lines]), c.ttl,
            )
            for c in changes
        ),
        key=lambda row: row[:2],
    )  # fmt: skip
    if not rows:
        return set()
    inserted = await connection.fetch(INSERT_CHANGES, *columns(rows, 6))
    return {(row["reservation_id"], row["request_id"]) for row in inserted}


async def pending_changes(connection: Connection, age: timedelta, limit: int) -> list[Change]:
    return [_change(row) for row in await connection.fetch(PENDING_CHANGES, age, limit)]


async def lock(connection: Connection, ids: Iterable[str]) -> None:
    await connection.execute(LOCK, sorted(set(ids)))


async def book(
    connection: Connection,
    settled: Sequence[tuple[Reservation, Reservation, bytes]],
    decided: Iterable[tuple[Change, Refusal | None]],
    topic: str,
    kind: str,
) -> None:
    """Write reservations (as read, as they now are, the payload of the event) and what became of changes.

    Raises asyncpg.DivisionByZeroError, and nothing is written, where another pod has written meanwhile.
    """
    ordered = sorted(settled, key=lambda one: one[0].reservation_id)
    rows = [
        (now.reservation_id, before.version, now.state.value, now.expires_at, now.updated_at)
        for before, now, _ in ordered
    ]
    changes = sorted(
        (
            c.reservation_id, c.request_id, "REFUSED" if refusal else "APPLIED",
            json.dumps([refusal.reason, refusal.message, refusal.metadata]) if refusal else None,
        )
        for c, refusal in decided
    )  # fmt: skip
    allocations = [
        (now.reservation_id, part.sku, part.location, part.held, part.confirmed, part.cancelled, part.expired)
        for before, now, _ in ordered
        for part, was in zip(now.allocations, before.allocations, strict=True)
        if part != was
    ]
    await connection.execute(
        BOOK, *columns(rows, 5), *columns(changes, 4), *columns(allocations, 7), topic, kind,
        [payload for _, _, payload in ordered], telemetry.traceparent(),
    )  # fmt: skip


async def due(connection: Connection, limit: int, after: Due = FIRST) -> list[Due]:
    """Reservations whose time has come, the longest due first, from beyond `after`."""
    return [(row["expires_at"], row["reservation_id"]) for row in await connection.fetch(DUE, limit, *after)]


async def list_ids(
    connection: Connection,
    *,
    after: tuple[datetime, str] | None,
    customer_id: str,
    state: State | None,
    start: datetime | None,
    end: datetime | None,
    limit: int,
) -> list[tuple[str, datetime]]:
    """A page of ids, the newest first, by keyset."""
    c = RESERVATION.c
    statement = (
        sa.select(c.reservation_id, c.created_at).order_by(c.created_at.desc(), c.reservation_id.desc()).limit(limit)
    )
    if after:
        statement = statement.where(sa.tuple_(c.created_at, c.reservation_id) < sa.tuple_(*after))
    if customer_id:
        statement = statement.where(c.customer_id == customer_id)
    if state:
        statement = statement.where(c.state == state.value)
    if start:
        statement = statement.where(c.created_at >= start)
    if end:
        statement = statement.where(c.created_at < end)
    return [(row["reservation_id"], row["created_at"]) for row in await fetch(connection, statement)]
