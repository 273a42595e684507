"""Every SQL statement that follows events, and the functions that run them. Reads are in `history` and `reports`.

A function takes part in its caller's transaction. A key's rows are written by whoever works its partition, and
that is one at a time: the partition's row in `consumed` is locked first.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, NamedTuple

from aiokafka import TopicPartition

from services.analytics.domain import Applied, Key, Known, KnownReservation, Movement, Reservation, Sale
from shared import partitions
from shared.database import Connection, affected, columns

LAG_BASE = 1.1
# Cut by month.
MONTHLY = ("movement", "goods_return", "refusal", "reservation", "reservation_state", "sale", "desk.signal")
WINDOWS = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30)}
LONGEST = max(WINDOWS.values())
# What is forgotten, by which time, and how long it is kept.
KEPT = (("activity", "hour", timedelta(days=31)), ("lag", "minute", timedelta(days=1)))
PORTION = timedelta(hours=1)

# -- where a partition has got to: for the projection in `consumed`, for antifraud in a table like it

ENSURE_PARTITIONS = """
INSERT INTO {table} (topic, partition) SELECT $1, n FROM unnest($2::int[]) AS n ON CONFLICT DO NOTHING
"""
POSITIONS = """
SELECT partition, next_offset FROM {table} WHERE topic = $1 AND partition = ANY ($2::int[])
"""
# Moves on from where the batch began, or from nowhere at all: then someone else has worked it.
ADVANCE = """
UPDATE {table} SET next_offset = $4, complete_until = greatest(complete_until, $5)
WHERE topic = $1 AND partition = $2 AND next_offset = $3
"""
LOCK_PARTITION = "SELECT next_offset FROM consumed WHERE topic = $1 AND partition = $2 FOR UPDATE"
COUNT_LAG = """
INSERT INTO lag (minute, topic, partition, bucket, events)
SELECT date_trunc('minute', now()), $1, $2, * FROM unnest($3::smallint[], $4::bigint[])
ON CONFLICT (minute, topic, partition, bucket) DO UPDATE SET events = lag.events + excluded.events
"""

# -- movements

KNOWN_KEYS = """
SELECT view.sku, view.location, version, available FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN stock_view AS view ON view.sku = key.sku AND view.location = key.location
"""
INSERT_MOVEMENTS = """
INSERT INTO movement (sku, location, version, recorded_at, kind, on_hand_delta, held_delta, on_hand, held, short,
                      available, available_before, hold_id, request_id, reference)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::text[], $6::bigint[], $7::bigint[],
                     $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::text[],
                     $14::text[], $15::text[])
"""
# Locks the SKUs of new keys against a change of the catalogue, so that the mart has the name that stands.
LOCK_SKUS = """
INSERT INTO sku (sku) SELECT * FROM unnest($1::text[])
ON CONFLICT (sku) DO UPDATE SET version = sku.version RETURNING sku, name, category, active
"""
SHARE_AGING = "SELECT aged_to FROM aging FOR SHARE"
# What is sold or returned counts in a window when its hour has not been aged out of it.
UPSERT_VIEW = """
INSERT INTO stock_view AS view (
  sku, location, name, category, on_hand, held, short, safety_stock, backorder_limit, available,
  sold_24h, sold_7d, sold_30d, returned_24h, returned_7d, returned_30d, first_movement_at, last_movement_at, version,
  active)
SELECT * FROM unnest(
  $1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[],
  $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[], $15::bigint[], $16::bigint[],
  $17::timestamptz[], $18::timestamptz[], $19::bigint[], $20::boolean[])
ON CONFLICT (sku, location) DO UPDATE SET
  on_hand = excluded.on_hand, held = excluded.held, short = excluded.short, safety_stock = excluded.safety_stock,
  backorder_limit = excluded.backorder_limit, available = excluded.available,
  sold_24h = view.sold_24h + excluded.sold_24h, sold_7d = view.sold_7d + excluded.sold_7d,
  sold_30d = view.sold_30d + excluded.sold_30d, returned_24h = view.returned_24h + excluded.returned_24h,
  returned_7d = view.returned_7d + excluded.returned_7d, returned_30d = view.returned_30d + excluded.returned_30d,
  last_movement_at = excluded.last_movement_at, version = excluded.version
"""
ADD_ACTIVITY = """
INSERT INTO activity (sku, location, hour, sold, returned)
SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::bigint[], $5::bigint[])
ON CONFLICT (sku, location, hour) DO UPDATE
SET sold = activity.sold + excluded.sold, returned = activity.returned + excluded.returned
"""
END_STOCK_OUTS = """
UPDATE stock_out SET ended_at = ended.at
FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS ended (sku, location, at)
WHERE stock_out.sku = ended.sku AND stock_out.location = ended.location AND stock_out.ended_at IS NULL
"""
INSERT_STOCK_OUTS = """
INSERT INTO stock_out (sku, location, start_version, started_at, ended_at)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::timestamptz[])
"""
INSERT_RETURNS = """
INSERT INTO goods_return (sku, location, version, occurred_at, units)
SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::bigint[])
"""
INSERT_GAPS = """
INSERT INTO gap (sku, location, partition, missing_version)
SELECT sku, location, $1, version FROM unnest($2::text[], $3::text[], $4::bigint[])
  AS missing (sku, location, version)
ON CONFLICT DO NOTHING
"""
DELETE_GAPS = """
DELETE FROM gap USING unnest($1::text[], $2::text[]) AS healed (sku, location)
WHERE gap.sku = healed.sku AND gap.location = healed.location
"""
# The stopped keys of a partition, and a time from which on the topic has all that is missing.
GAPS = """
SELECT gap.sku, gap.location, coalesce(view.last_movement_at, to_timestamp(0)) AS since
FROM gap LEFT JOIN stock_view AS view USING (sku, location) WHERE partition = $1
"""

# -- the catalogue

UPSERT_SKUS = """
INSERT INTO sku (sku, name, category, unit, currency_code, price_micros, active, version)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::boolean[],
                     $8::bigint[])
ON CONFLICT (sku) DO UPDATE SET
  name = excluded.name, category = excluded.category, unit = excluded.unit, currency_code = excluded.currency_code,
  price_micros = excluded.price_micros, active = excluded.active, version = excluded.version
WHERE sku.version < excluded.version
"""
RENAME_VIEW = """
UPDATE stock_view AS view SET name = sku.name, category = sku.category, active = sku.active
FROM unnest($1::text[]) AS changed (sku) JOIN sku ON sku.sku = changed.sku
WHERE view.sku = sku.sku
  AND (view.name, view.category, view.active) IS DISTINCT FROM (sku.name, sku.category, sku.active)
"""

# -- reservations

KNOWN_RESERVATIONS = """
SELECT reservation.reservation_id, version, confirmed_at, skus, locations, sold
FROM unnest($1::text[], $2::timestamptz[]) AS asked (reservation_id, order_time)
  JOIN reservation ON reservation.reservation_id = asked.reservation_id AND reservation.order_time = asked.order_time
"""
# Arrays of a reservation travel as text: unnest() would flatten them.
UPSERT_RESERVATIONS = """
INSERT INTO reservation AS known (reservation_id, order_time, customer_id, country, state, version, created_at,
                                  updated_at, confirmed_at, skus, locations, sold)
SELECT reservation_id, order_time, customer_id, country, state, version, created_at, updated_at, confirmed_at,
       skus::text[], locations::text[], sold::bigint[]
FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::timestamptz[],
            $8::timestamptz[], $9::timestamptz[], $10::text[], $11::text[], $12::text[])
  AS new (reservation_id, order_time, customer_id, country, state, version, created_at, updated_at, confirmed_at,
          skus, locations, sold)
ON CONFLICT (reservation_id, order_time) DO UPDATE SET
  state = excluded.state, version = excluded.version, updated_at = excluded.updated_at,
  confirmed_at = excluded.confirmed_at, sold = excluded.sold
"""
INSERT_STATES = """
INSERT INTO reservation_state (reservation_id, order_time, version, state, request_id, changed_at, held, confirmed,
                               cancelled, expired)
SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::bigint[], $4::text[], $5::text[], $6::timestamptz[],
                     $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[])
"""
INSERT_SALES = """
INSERT INTO sale (sku, order_time, reservation_id, version, location, currency_code, customer_id, country, units,
                  value_micros, sold_at)
SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::text[],
                     $8::text[], $9::bigint[], $10::bigint[], $11::timestamptz[])
"""
INSERT_REFUSALS = """
INSERT INTO refusal (sku, refused_at, reservation_id, location, requested, available)
SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::bigint[], $6::bigint[])
"""

# -- what the workers do

LOCK_AGING = "SELECT aged_to, date_trunc('hour', now()) AS now FROM aging FOR UPDATE"
# Takes from a window's sums the hours that have left it since it was last aged, row by row in the order of the keys.
AGE = """
UPDATE stock_view AS view SET sold_{window} = sold_{window} - gone.sold,
                              returned_{window} = returned_{window} - gone.returned
FROM (
  SELECT sku, location, sum(sold)::bigint AS sold, sum(returned)::bigint AS returned FROM activity
  WHERE hour >= $1::timestamptz - $3::interval AND hour < $2::timestamptz - $3::interval
  GROUP BY sku, location ORDER BY sku, location
) AS gone
WHERE view.sku = gone.sku AND view.location = gone.location
"""
AGED = "UPDATE aging SET aged_to = $1"
AGED_TO = "SELECT aged_to FROM aging"
OLDEST = "SELECT min({time}) FROM {table} WHERE {time} < $1"
FORGET = "DELETE FROM {table} WHERE {time} < $1"

MONTHS_TO_SNAPSHOT = """
SELECT month FROM generate_series(
  (SELECT coalesce(max(taken_at), (SELECT date_trunc('month', min(first_movement_at), 'UTC') FROM stock_view))
   FROM snapshot_taken) + interval '1 month', $1, interval '1 month') AS month
WHERE NOT EXISTS (SELECT 1 FROM gap)
"""
# Of each key its last movement of the month that ends, or what the snapshot before has of it.
TAKE_SNAPSHOT = """
INSERT INTO snapshot (sku, location, taken_at, on_hand, held, available, version)
SELECT view.sku, view.location, $1, at.*
FROM stock_view AS view CROSS JOIN LATERAL (
  (SELECT on_hand, held, available, version FROM movement
   WHERE movement.sku = view.sku AND movement.location = view.location
     AND recorded_at < $1 AND recorded_at >= $1::timestamptz - interval '1 month'
   ORDER BY recorded_at DESC, version DESC LIMIT 1)
  UNION ALL
  (SELECT on_hand, held, available, version FROM snapshot
   WHERE snapshot.sku = view.sku AND snapshot.location = view.location
     AND taken_at = $1::timestamptz - interval '1 month')
  ORDER BY version DESC LIMIT 1
) AS at
"""
SNAPSHOT_TAKEN = "INSERT INTO snapshot_taken (taken_at) VALUES ($1)"
# Partitions of movements that end before a time, and at whose end a snapshot was taken.
DROPPABLE = """
SELECT relname, taken_at AS ends FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
  JOIN snapshot_taken
    ON taken_at = to_timestamp(substring(relname FROM 'movement_(.*)$'), 'YYYY_MM') + interval '1 month'
WHERE inhparent = 'movement'::regclass AND taken_at <= $1 ORDER BY taken_at
"""
FORGET_SNAPSHOTS = "DELETE FROM snapshot WHERE taken_at < $1"
NEXT_KEYS = "SELECT sku, location FROM stock_view WHERE (sku, location) > ($1, $2) ORDER BY sku, location LIMIT $3"
# Keys of the mart beside their last movements, where these are kept: by how many units they differ, and a unit for a
# version that is another. The last is so by version: one before it may have been recorded at a later time.
MART_DRIFT = """
SELECT view.sku, view.location,
       coalesce(abs(view.on_hand - last.on_hand) + abs(view.held - last.held)
                + (view.version <> last.version)::int, 0)::bigint AS units
FROM unnest($1::text[], $2::text[]) AS key (sku, location)
  JOIN stock_view AS view ON view.sku = key.sku AND view.location = key.location
  LEFT JOIN LATERAL (
    SELECT on_hand, held, version FROM movement
    WHERE movement.sku = view.sku AND movement.location = view.location AND recorded_at >= view.last_movement_at
    ORDER BY movement.version DESC LIMIT 1
  ) AS last ON true
ORDER BY view.sku, view.location
"""
RECONCILED = "UPDATE reconciled SET reconciled_at = now(), keys = $1, drift_units = $2"


class Place(NamedTuple):
    """A batch: the offsets from which and to which it goes, and until when its partition is complete."""

    topic: str
    partition: int
    start: int
    end: int
    complete_until: datetime


async def positions(
    connection: Connection, places: Iterable[TopicPartition], table: str = "consumed"
) -> dict[TopicPartition, int]:
    """The next offset of each partition; partitions that were not known are from now on."""
    found: dict[TopicPartition, int] = {}
    for topic, some in groupby(sorted(places), key=lambda partition: partition.topic):
        numbers = [one.partition for one in some]
        await connection.execute(ENSURE_PARTITIONS.format(table=table), topic, numbers)
        rows = await connection.fetch(POSITIONS.format(table=table), topic, numbers)
        found |= {TopicPartition(topic, row["partition"]): row["next_offset"] for row in rows}
    return found


async def advance(connection: Connection, place: Place, table: str = "consumed") -> bool:
    """Move a partition's offset over a batch, and lock it; False when it was not where the batch begins."""
    status = await connection.execute(ADVANCE.format(table=table), *place)
    return status == "UPDATE 1"


async def count_lag(connection: Connection, place: Place, recorded: Iterable[datetime]) -> None:
    """Count how long events that were recorded at these times have taken until now."""
    now = datetime.now(UTC)
    lags_ms = ((now - time).total_seconds() * 1000 for time in recorded)
    buckets = Counter(max(0, math.ceil(math.log(max(lag, 1), LAG_BASE))) for lag in lags_ms)
    if buckets:
        await connection.execute(COUNT_LAG, place.topic, place.partition, *columns(sorted(buckets.items()), 2))


async def known_keys(connection: Connection, keys: Iterable[Key]) -> dict[Key, Known]:
    rows = await connection.fetch(KNOWN_KEYS, *columns(sorted(set(keys)), 2))
    return {(row["sku"], row["location"]): Known(row["version"], row["available"]) for row in rows}


async def write_movements(connection: Connection, partition: int, applied: Applied, known: Mapping[Key, Known]) -> None:
    """Write what a batch of movements adds, into the ledger's copy, the mart and what hangs on it."""
    if applied.gaps:
        missing = [(*key, version) for key, version in sorted(applied.gaps.items())]
        await connection.execute(INSERT_GAPS, partition, *columns(missing, 3))
    if not applied.rows:
        return
    await connection.execute(
        INSERT_MOVEMENTS,
        *columns(
            (
                (
                    m.sku, m.location, m.version, m.recorded_at, m.kind, m.on_hand_delta, m.held_delta, m.on_hand,
                    m.held, m.short, m.available, before, m.hold_id, m.request_id, m.reference,
                )
                for m, before in applied.rows
            ),
            15,
        ),
    )  # fmt: skip
    names = await _names(connection, {sku for sku, location in applied.last if (sku, location) not in known})
    sums = await _add_activity(connection, [m for m, _ in applied.rows])
    rows = []
    for key in sorted(applied.last):
        last = applied.last[key]
        name, category, active = names.get(last.sku, ("", "", True))
        rows.append(
            (
                *key, name, category, last.on_hand, last.held, last.short, last.safety_stock, last.backorder_limit,
                last.available, *sums.get(key, (0, 0, 0, 0, 0, 0)), applied.first[key].recorded_at, last.recorded_at,
                last.version, active,
            )
        )  # fmt: skip
    await connection.execute(UPSERT_VIEW, *columns(rows, 20))
    await _write_stock_outs(connection, applied)
    returns = [(m.sku, m.location, m.version, m.occurred_at, m.on_hand_delta) for m, _ in applied.rows if _returned(m)]
    if returns:
        await connection.execute(INSERT_RETURNS, *columns(returns, 5))


async def _names(connection: Connection, skus: set[str]) -> dict[str, tuple[str, str, bool]]:
    if not skus:
        return {}
    rows = await connection.fetch(LOCK_SKUS, sorted(skus))
    return {row["sku"]: (row["name"], row["category"], row["active"]) for row in rows}


async def _add_activity(connection: Connection, movements: Iterable[Movement]) -> dict[Key, tuple[int, ...]]:
    """Count sales and returns by the hour; what they add to the mart's sums (sold, then returned) of each key.

    Hours that no window counts any more are not written: of a history that is read anew these are most.
    """
    hours: dict[tuple[str, str, datetime], list[int]] = {}
    for movement in movements:
        sold, returned = _sold(movement), _returned(movement)
        if sold or returned:
            hour = movement.recorded_at.replace(minute=0, second=0, microsecond=0)
            counts = hours.setdefault((movement.sku, movement.location, hour), [0, 0])
            counts[0] += sold
            counts[1] += returned
    if not hours:
        return {}
    aged_to = await connection.fetchval(SHARE_AGING)
    hours = {key: counts for key, counts in hours.items() if key[2] >= aged_to - LONGEST}
    if not hours:
        return {}
    await connection.execute(ADD_ACTIVITY, *columns(((*key, *hours[key]) for key in sorted(hours)), 5))
    sums: dict[Key, list[int]] = {}
    for (sku, location, hour), counts in hours.items():
        totals = sums.setdefault((sku, location), [0] * 2 * len(WINDOWS))
        for n, length in enumerate(WINDOWS.values()):
            if hour >= aged_to - length:
                totals[n] += counts[0]
                totals[n + len(WINDOWS)] += counts[1]
    return {key: tuple(totals) for key, totals in sums.items()}


def _sold(movement: Movement) -> int:
    return -movement.on_hand_delta if movement.kind == "COMMIT" else 0


def _returned(movement: Movement) -> int:
    return movement.on_hand_delta if movement.kind == "RETURN" else 0


async def _write_stock_outs(connection: Connection, applied: Applied) -> None:
    ends = [(*key, outs.ends_at) for key, outs in sorted(applied.outs.items()) if outs.ends_at]
    if ends:
        await connection.execute(END_STOCK_OUTS, *columns(ends, 3))
    new: list[tuple[str, str, int, datetime, datetime | None]]
    new = [(*key, *whole) for key, outs in sorted(applied.outs.items()) for whole in outs.whole]
    new += [(*key, *outs.opens, None) for key, outs in sorted(applied.outs.items()) if outs.opens]
    if new:
        await connection.execute(INSERT_STOCK_OUTS, *columns(new, 5))


async def write_skus(connection: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Write SKUs (in the order of `UPSERT_SKUS`) where they are newer, and their names into the mart."""
    newest = {row[0]: row for row in sorted(rows, key=lambda row: row[-1])}
    await connection.execute(UPSERT_SKUS, *columns((newest[sku] for sku in sorted(newest)), 8))
    await connection.execute(RENAME_VIEW, sorted(newest))


async def known_reservations(
    connection: Connection, reservations: Iterable[Reservation]
) -> dict[str, KnownReservation]:
    asked = sorted({(one.reservation_id, one.order_time) for one in reservations})
    return {
        row["reservation_id"]: KnownReservation(
            row["version"],
            row["confirmed_at"],
            dict(zip(zip(row["skus"], row["locations"], strict=True), row["sold"], strict=True)),
        )
        for row in await connection.fetch(KNOWN_RESERVATIONS, *columns(asked, 2))
    }


async def write_reservations(
    connection: Connection,
    new: Sequence[Reservation],
    known: Mapping[str, KnownReservation],
    sales: Sequence[Sale],
) -> None:
    """Write reservations' states, each as `known` says it is after the last of them, with what they sold."""
    states = [
        (
            one.reservation_id, one.order_time, one.version, one.state, one.request_id, one.updated_at,
            sum(part.held for part in one.parts), sum(part.confirmed for part in one.parts),
            sum(part.cancelled for part in one.parts), sum(part.expired for part in one.parts),
        )
        for one in new
    ]  # fmt: skip
    await connection.execute(INSERT_STATES, *columns(states, 10))
    latest = {one.reservation_id: one for one in new}
    rows = [
        (
            name, one.order_time, one.customer_id, one.country, one.state, one.version, one.created_at,
            one.updated_at, known[name].confirmed_at, *map(array, columns(known[name].sold, 2)),
            array(known[name].sold.values()),
        )
        for name, one in sorted(latest.items())
    ]  # fmt: skip
    await connection.execute(UPSERT_RESERVATIONS, *columns(rows, 12))
    if sales:
        await connection.execute(INSERT_SALES, *columns(sales, 11))
    refusals = [
        (line.sku, one.created_at, one.reservation_id, line.location, line.requested, line.available)
        for one in new
        if one.version == 1
        for line in one.short_lines
    ]
    if refusals:
        await connection.execute(INSERT_REFUSALS, *columns(refusals, 6))


def array(values: Iterable[object]) -> str:
    """The text of an array of codes or numbers; quoted, because NULL is a code as well."""
    return "{" + ",".join(f'"{value}"' for value in values) + "}"


async def age(connection: Connection) -> int:
    """Take from the mart's sums what has grown too old; return how many hours they were behind."""
    row = await connection.fetchrow(LOCK_AGING)
    assert row is not None
    hours = int((row["now"] - row["aged_to"]).total_seconds() // 3600)
    if hours > 0:
        for window, length in WINDOWS.items():
            await connection.execute(AGE.format(window=window), row["aged_to"], row["now"], length)
        await connection.execute(AGED, row["now"])
    return hours


async def forget(connection: Connection) -> int:
    """Delete the oldest hour of what is kept no longer; return how many rows. Events need not wait for it."""
    # Cut by time and not by LIMIT, which the statements of a cluster cannot have.
    aged_to = await connection.fetchval(AGED_TO)
    count = 0
    for table, time, kept in KEPT:
        oldest = await connection.fetchval(OLDEST.format(table=table, time=time), aged_to - kept)
        if oldest:
            end = min(oldest + PORTION, aged_to - kept)
            status = await connection.execute(FORGET.format(table=table, time=time), end)
            count += affected(status)
    return count


async def partitions_with_gaps(connection: Connection) -> list[int]:
    return [row["partition"] for row in await connection.fetch("SELECT DISTINCT partition FROM gap ORDER BY 1")]


async def gaps(connection: Connection, partition: int) -> dict[Key, datetime]:
    """The stopped keys of a partition, each with its last movement that was applied."""
    return {(row["sku"], row["location"]): row["since"] for row in await connection.fetch(GAPS, partition)}


async def lock_partition(connection: Connection, topic: str, partition: int) -> int:
    """Keep the partition from being worked until the transaction ends; return its next offset."""
    return int(await connection.fetchval(LOCK_PARTITION, topic, partition))


async def delete_gaps(connection: Connection, keys: Iterable[Key]) -> None:
    await connection.execute(DELETE_GAPS, *columns(sorted(keys), 2))


async def take_snapshots(connection: Connection, complete_until: datetime) -> list[datetime]:
    """Take the snapshots of months that are over and complete, while no key is stopped; return them."""
    months = [row["month"] for row in await connection.fetch(MONTHS_TO_SNAPSHOT, complete_until)]
    for start in months:
        await connection.execute(TAKE_SNAPSHOT, start)
        await connection.execute(SNAPSHOT_TAKEN, start)
    return months


async def drop_old(connection: Connection, oldest: datetime) -> list[str]:
    """Drop months of movements that end before `oldest` and after which a snapshot stands; return their names.

    Not for use within a transaction, as a month has the table for itself until the end of its own. Snapshots that
    nobody needs any more are forgotten after that; if it comes to no end, then with the next month.
    """
    rows = await connection.fetch(DROPPABLE, oldest)
    for row in rows:
        await partitions.drop(connection, row["relname"])
    if rows:
        await connection.execute(FORGET_SNAPSHOTS, rows[-1]["ends"])
    return [row["relname"] for row in rows]


async def mart_drift(connection: Connection, after: Key, keys_max: int) -> list[tuple[Key, int]]:
    """The next keys of the mart, each with the units by which it differs from the ledger's copy."""
    keys = [(row["sku"], row["location"]) for row in await connection.fetch(NEXT_KEYS, *after, keys_max)]
    rows = await connection.fetch(MART_DRIFT, *columns(keys, 2))
    return [((row["sku"], row["location"]), row["units"]) for row in rows]
