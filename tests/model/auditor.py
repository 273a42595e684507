"""Judges whether Holdfast kept its promises, from outside: by what clients were told (`history`), and by what the
databases, the topics and the mart hold. It shares no code with the services.

Three parts, each of which needs less peace than the next:

* `books`: inventory's database alone, in one snapshot, at any moment and under any load. Versions without gaps, each
  movement the continuation of the one before, counters equal to the ledger, held equal to the open holds, nothing
  oversold in any row that ever was, what came in equal to what is left, held, sold and gone.
* `others`: reservations against holds, the ledger as the topic tells it against the ledger as it is, the mart against
  stock. These follow, so a difference counts when it is still there after everyone had time to follow.
* `story`: a history of calls against the ledger, once all is quiet. The ledger's versions are the order in which things
  happened; the story is true when every call is where it must be in that order:
  - what was acknowledged is there exactly once, what was refused is not there, what is unknown is there once or not;
  - so for each kind of call and key acknowledged <= applied <= acknowledged + unknown;
  - a call that was answered before another was sent comes before it (the history of each key is linearizable);
  - a refusal for want of stock was right at some instant between its sending and its answer;
  - a read shows the ledger as it was at the version that it names, and no version older than the caller asked for.

`Report` has the counts of what was looked at, so that silence is not mistaken for proof.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer
from google.protobuf.message import DecodeError
from holdfast.inventory.v1 import events_pb2 as inventory_events
from holdfast.reservation.v1 import events_pb2 as reservation_events
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import Stack
from tests.model.history import Call, End, History

MOVEMENTS = "holdfast.inventory.movements.v1"
CHANGES = "holdfast.reservation.changes.v1"
SHOWN_MAX = 20  # of violations of a kind
FOLLOW_SECONDS = 5.0
CLOCK_SECONDS = 0.05  # between two clocks of one machine
LATE_SECONDS_MAX = 1.0  # from a hold's time until it is given back
Key = tuple[str, str]

_ORDERED = """
SELECT *, lag(version, 1, 0::bigint) OVER key AS version_before, lag(on_hand, 1, 0::bigint) OVER key AS on_hand_before,
       lag(held, 1, 0::bigint) OVER key AS held_before, lag(short, 1, 0::bigint) OVER key AS short_before,
       lag(recorded_at) OVER key AS recorded_before
FROM movement WINDOW key AS (PARTITION BY sku, location ORDER BY version)
"""
_HOLDS = "SELECT sku, location, sum({part}) AS units FROM hold GROUP BY sku, location"
_MOVED = "SELECT sku, location, sum({sign}{delta}) AS units FROM movement WHERE kind = '{kind}' GROUP BY sku, location"
_WITH_HOLD = (
    "SELECT sku, location, hold_id, recorded_at, expires_at FROM movement JOIN hold USING (sku, location, hold_id)"
    " WHERE movement.kind = '{kind}' AND {wrong}"
)


def _same_sums(holds: str, moved: str) -> str:
    return f"""
    SELECT sku, location, holds.units, moved.units FROM ({holds}) AS holds FULL JOIN ({moved}) AS moved
    USING (sku, location) WHERE coalesce(holds.units, 0) <> coalesce(moved.units, 0)
    """


# What may not be found, and the rows that it would be found by.
BOOKS = {
    "a version is missing or there twice": f"SELECT sku, location, version FROM ({_ORDERED}) AS m"
    " WHERE version <> version_before + 1",
    "a movement does not continue from the one before": f"SELECT sku, location, version FROM ({_ORDERED}) AS m"
    " WHERE (on_hand, held, short)"
    " <> (on_hand_before + on_hand_delta, held_before + held_delta, short_before + short_delta)",
    "time ran backwards on a key": f"SELECT sku, location, version FROM ({_ORDERED}) AS m"
    " WHERE recorded_at < recorded_before",
    "oversold": "SELECT sku, location, version FROM movement"
    " WHERE held < 0 OR held > on_hand + backorder_limit + short",
    "a hold took safety stock": "SELECT sku, location, version FROM movement"
    " WHERE kind = 'HOLD' AND on_hand - held - safety_stock + backorder_limit < 0",
    "expired before its time": _WITH_HOLD.format(kind="EXPIRE", wrong="movement.recorded_at < hold.expires_at"),
    "sold after its time": _WITH_HOLD.format(kind="COMMIT", wrong="movement.recorded_at >= hold.expires_at"),
    "stock is not its last movement": """
    SELECT sku, location, stock.version, last.version FROM stock
    LEFT JOIN (SELECT DISTINCT ON (sku, location) * FROM movement ORDER BY sku, location, version DESC) AS last
    USING (sku, location)
    WHERE (stock.version, stock.on_hand, stock.held, stock.short) IS DISTINCT FROM
          (coalesce(last.version, 0), coalesce(last.on_hand, 0), coalesce(last.held, 0), coalesce(last.short, 0))
    """,
    "held is not the sum of the open holds": f"""
    SELECT sku, location, stock.held, open.units FROM stock
    FULL JOIN ({_HOLDS.format(part="held")}) AS open USING (sku, location)
    WHERE coalesce(stock.held, 0) <> coalesce(open.units, 0)
    """,
    "held is not what the ledger says was held": _same_sums(
        _HOLDS.format(part="quantity"), _MOVED.format(sign="", delta="held_delta", kind="HOLD")
    ),
    "sold is not what the ledger says was sold": _same_sums(
        _HOLDS.format(part="committed"), _MOVED.format(sign="-", delta="on_hand_delta", kind="COMMIT")
    ),
    "given back is not what the ledger says was given back": _same_sums(
        _HOLDS.format(part="released"), _MOVED.format(sign="-", delta="held_delta", kind="RELEASE")
    ),
    "expired is not what the ledger says has expired": _same_sums(
        _HOLDS.format(part="expired"), _MOVED.format(sign="-", delta="held_delta", kind="EXPIRE")
    ),
    "a change of a hold moved stock twice": "SELECT sku, location, hold_id, request_id, kind FROM movement"
    " WHERE hold_id <> '' AND kind IN ('HOLD', 'COMMIT', 'RELEASE')"
    " GROUP BY sku, location, hold_id, request_id, kind HAVING count(*) > 1",
}
COUNTED = """
SELECT count(*) AS movements, count(DISTINCT (sku, location)) AS keys,
       count(*) FILTER (WHERE kind = 'HOLD') AS holds, count(*) FILTER (WHERE kind = 'COMMIT') AS sales,
       count(*) FILTER (WHERE kind = 'EXPIRE') AS expiries
FROM movement
"""
ALLOCATIONS = """
SELECT reservation_id AS name, sku, location, held, confirmed, cancelled, expired FROM allocation
ORDER BY reservation_id, sku, location
"""
HOLDS = """
SELECT hold_id AS name, sku, location, sum(held)::bigint AS held, sum(committed)::bigint AS confirmed,
       sum(released)::bigint AS cancelled, sum(expired)::bigint AS expired
FROM hold WHERE quantity > 0 GROUP BY hold_id, sku, location ORDER BY hold_id, sku, location
"""
STOCK = "SELECT sku, location, version, on_hand, held, short FROM stock WHERE version > 0 ORDER BY sku, location"
MART = STOCK.replace("FROM stock", "FROM stock_view")
RESERVATIONS = "SELECT reservation_id, version, state FROM reservation"
LEDGER = """
SELECT sku, location, version, recorded_at, kind, on_hand_delta, held_delta, on_hand, held, safety_stock,
       backorder_limit, hold_id, request_id
FROM movement ORDER BY sku, location, version
"""
# What has not expired yet counts as well: until now.
EXPIRIES = """
SELECT extract(epoch FROM max(hold.expires_at))::float8 AS due, extract(epoch FROM movement.recorded_at)::float8 AS done
FROM movement JOIN hold USING (sku, location, hold_id) WHERE movement.kind = 'EXPIRE'
GROUP BY sku, location, hold_id, movement.version, movement.recorded_at
UNION ALL
SELECT extract(epoch FROM expires_at)::float8, extract(epoch FROM clock_timestamp())::float8
FROM hold WHERE held > 0 AND expires_at < clock_timestamp()
"""


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where a deployment is; what is empty is not looked at."""

    inventory_dsn: str
    reservation_dsn: str = ""
    analytics_dsn: str = ""
    kafka_bootstrap: str = ""

    @classmethod
    def of(cls, stack: Stack) -> "Deployment":
        """That of pods on a local stack, in the databases that they have unless told otherwise."""
        dsn = stack.postgres_dsn
        return cls(dsn("inventory"), dsn("reservation"), dsn("analytics"), stack.kafka_bootstrap)


@dataclass
class Report:
    """What was looked at, and what was found wrong."""

    looked_at: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def wrong(self, what: str, *details: object) -> None:
        self.violations.append(f"{what}: {', '.join(map(str, details))}" if details else what)

    def add(self, other: "Report") -> None:
        self.looked_at += other.looked_at
        self.violations += other.violations


# -- the books --------------------------------------------------------------------------------------------------------


async def books(inventory_dsn: str) -> Report:
    """Inventory's own database, in one snapshot."""
    report = Report()
    connection = await asyncpg.connect(inventory_dsn)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            for what, query in BOOKS.items():
                for row in await connection.fetch(f"SELECT * FROM ({query}) AS wrong LIMIT {SHOWN_MAX}"):
                    report.wrong(what, *row)
            counted = await connection.fetchrow(COUNTED)
            assert counted
            report.looked_at.update(dict(counted))
    finally:
        await connection.close()
    return report


# -- the others -------------------------------------------------------------------------------------------------------


async def others(at: Deployment, *, patience: float = 60.0) -> Report:
    """Reservations, topics and mart against inventory; what differs gets `patience` seconds to follow."""
    report = Report()
    checks: list[tuple[str, Callable[[], Awaitable[tuple[int, list[str]]]]]] = []
    if at.reservation_dsn:
        checks.append(("reservations against holds", lambda: _reservations(at)))
    if at.analytics_dsn:
        checks.append(("mart against stock", lambda: _mart(at)))
    if at.kafka_bootstrap:
        checks.append(("movements in the topic", lambda: _movements_told(at)))
    if at.kafka_bootstrap and at.reservation_dsn:
        checks.append(("reservations in the topic", lambda: _reservations_told(at)))
    for name, check in checks:
        count, wrong = await _persisting(check, patience)
        report.looked_at[name] += count
        for one in wrong[:SHOWN_MAX]:
            report.wrong(name, one)
    return report


async def _persisting(check: Callable[[], Awaitable[tuple[int, list[str]]]], patience: float) -> tuple[int, list[str]]:
    """What a check finds wrong time after time, until it finds nothing or patience ends."""
    loop = asyncio.get_running_loop()
    until = loop.time() + patience
    count, wrong = await check()
    while wrong and loop.time() < until:
        await asyncio.sleep(min(FOLLOW_SECONDS, patience / 4))
        count, again = await check()
        wrong = [one for one in again if one in set(wrong)] or again
    return count, wrong


async def _reservations(at: Deployment) -> tuple[int, list[str]]:
    """What reservation says of each allocation is what inventory says of the hold."""
    count, wrong = 0, []
    async for name, said, held in _merged(at.reservation_dsn, ALLOCATIONS, at.inventory_dsn, HOLDS, 3):
        count += 1
        if said == held:
            continue
        if said is None and held is not None and not held[0] and not held[1]:
            continue  # a crash between hold and reservation: given back or expired, and never sold
        wrong.append(f"{name}: reservation says {said}, inventory {held} (held, confirmed, cancelled, expired)")
    return count, wrong


async def _mart(at: Deployment) -> tuple[int, list[str]]:
    count, wrong = 0, []
    async for name, stock, mart in _merged(at.inventory_dsn, STOCK, at.analytics_dsn, MART, 2):
        count += 1
        if stock != mart:
            wrong.append(f"{name}: stock is {stock}, the mart says {mart} (version, on hand, held, short)")
    return count, wrong


async def _merged(
    left_dsn: str, left: str, right_dsn: str, right: str, keys: int
) -> AsyncIterator[tuple[tuple[str, ...], tuple[Any, ...] | None, tuple[Any, ...] | None]]:
    """Rows of two databases side by side, by their first columns, in which both are ordered."""
    first, second = await asyncpg.connect(left_dsn), await asyncpg.connect(right_dsn)
    try:
        async with (
            first.transaction(isolation="repeatable_read", readonly=True),
            second.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = [aiter(first.cursor(left, prefetch=1000)), aiter(second.cursor(right, prefetch=1000))]
            heads = [await anext(one, None) for one in rows]
            while any(head is not None for head in heads):
                name = min(tuple(head)[:keys] for head in heads if head is not None)
                values: list[tuple[Any, ...] | None] = []
                for side in (0, 1):
                    head = heads[side]
                    if head is not None and tuple(head)[:keys] == name:
                        values.append(tuple(head)[keys:])
                        heads[side] = await anext(rows[side], None)
                    else:
                        values.append(None)
                yield name, values[0], values[1]
    finally:
        await first.close()
        await second.close()


async def _rows(dsn: str, query: str) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        return list(await connection.fetch(query))
    finally:
        await connection.close()


async def _movements_told(at: Deployment) -> tuple[int, list[str]]:
    """The topic, read from its beginning and applied by version, comes to stock as it is; nothing out of order."""
    wrong: list[str] = []
    rebuilt: dict[Key, tuple[int, int, int, int]] = {}
    count = 0
    async for value in _messages(at.kafka_bootstrap, MOVEMENTS):
        try:
            told = inventory_events.StockMoved.FromString(value).movement
        except DecodeError:
            wrong.append("not a StockMoved")
            continue
        count += 1
        key = (told.sku, told.location)
        before = rebuilt.get(key, (0, 0, 0, 0))
        if told.version <= before[0]:
            continue  # at least once
        if told.version != before[0] + 1:
            wrong.append(f"{key}: after version {before[0]} the topic has {told.version}")
        rebuilt[key] = (
            told.version, before[1] + told.on_hand_delta, before[2] + told.held_delta, before[3] + told.short_delta,
        )  # fmt: skip
    stock = {(row["sku"], row["location"]): tuple(row)[2:] for row in await _rows(at.inventory_dsn, STOCK)}
    wrong += [
        f"{key}: stock is {stock.get(key)}, the topic comes to {rebuilt.get(key)}"
        for key in sorted(stock.keys() | rebuilt.keys())
        if stock.get(key) != rebuilt.get(key)
    ]
    return count, wrong


async def _reservations_told(at: Deployment) -> tuple[int, list[str]]:
    """The last that the topic says of each reservation is what it is; no version is missing on the way."""
    wrong: list[str] = []
    told: dict[str, tuple[int, str]] = {}
    count = 0
    async for value in _messages(at.kafka_bootstrap, CHANGES):
        try:
            said = reservation_events.ReservationChanged.FromString(value).reservation
        except DecodeError:
            wrong.append("not a ReservationChanged")
            continue
        count += 1
        before, _ = told.get(said.reservation_id, (0, ""))
        if said.version <= before:
            continue
        if said.version != before + 1:
            wrong.append(f"{said.reservation_id}: after version {before} the topic has {said.version}")
        state = rp.ReservationState.Name(said.state)
        told[said.reservation_id] = (said.version, state.removeprefix("RESERVATION_STATE_"))
    rows = await _rows(at.reservation_dsn, RESERVATIONS)
    known = {row["reservation_id"]: (row["version"], row["state"]) for row in rows}
    wrong += [
        f"{name}: it is {known.get(name)}, the topic says {told.get(name)}"
        for name in sorted(known.keys() | told.keys())
        if known.get(name) != told.get(name)
    ]
    return count, wrong


async def _messages(bootstrap: str, topic: str) -> AsyncIterator[bytes]:
    """Every message of a topic as it stands now, without the watermarks, each partition in its order."""
    # Without a group it is given every partition when it starts.
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        places = sorted(consumer.assignment())
        ends = await consumer.end_offsets(places)
        while any([await consumer.position(place) < ends[place] for place in places]):
            for place, messages in (await consumer.getmany(timeout_ms=1000, max_records=5000)).items():
                for message in messages:
                    if message.value is not None and message.offset < ends[place]:
                        yield message.value
    finally:
        await consumer.stop()


# -- the story --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Happened:
    """What a call came to in the ledger: the versions that it made, and units by key."""

    versions: dict[Key, int] = field(default_factory=dict)
    units: dict[Key, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Timeline:
    """A key's past: row n is in force from times[n] until times[n + 1]; row 0 before anything was."""

    times: list[float] = field(default_factory=lambda: [float("-inf")])
    free: list[int] = field(default_factory=lambda: [0])
    counters: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])


async def story(history: History, at: Deployment) -> Report:
    """A history against the ledger and the reservations, once nothing moves any more."""
    ledger = await _rows(at.inventory_dsn, LEDGER)
    states = {row["reservation_id"]: row["state"] for row in await _rows(at.reservation_dsn, RESERVATIONS)}
    return judge(history.calls, [dict(row) for row in ledger], states)


def judge(calls: Iterable[Call], ledger: Iterable[Mapping[str, Any]], states: Mapping[str, str]) -> Report:
    """Calls against the rows of the ledger, in order of version for each key, and the states of reservations."""
    report = Report()
    happened, timelines = _read(ledger)
    applied: list[tuple[Call, _Happened]] = []
    for call in calls:
        report.looked_at[f"{call.kind} {call.outcome or call.end}"] += 1
        if call.kind == "read":
            _judge_read(call, timelines, report)
            continue
        found = happened.get((call.kind, call.reservation_id, call.request_id), _Happened())
        _judge_write(call, found, states.get(call.reservation_id), report)
        if call.again:
            continue  # when it was decided, its first call says
        if call.outcome == "REJECTED":
            _judge_refusal(call, timelines, report)
        if found.versions and call.end is End.OK:
            applied.append((call, found))
    _judge_order(applied, report)
    return report


_KINDS = {"HOLD": "reserve", "COMMIT": "confirm", "RELEASE": "cancel", "RECEIVE": "receive"}


def _read(ledger: Iterable[Mapping[str, Any]]) -> tuple[dict[tuple[str, str, str], _Happened], dict[Key, _Timeline]]:
    happened: dict[tuple[str, str, str], _Happened] = defaultdict(_Happened)
    timelines: dict[Key, _Timeline] = defaultdict(_Timeline)
    for row in ledger:
        key = (row["sku"], row["location"])
        line = timelines[key]
        line.times.append(row["recorded_at"].timestamp())
        line.free.append(row["on_hand"] - row["held"] - row["safety_stock"] + row["backorder_limit"])
        line.counters.append((row["on_hand"], row["held"]))
        kind = _KINDS.get(row["kind"])
        if kind:
            one = happened[kind, row["hold_id"], row["request_id"]]
            one.versions[key] = max(one.versions.get(key, 0), row["version"])
            delta = row["on_hand_delta"] if kind == "receive" else abs(row["held_delta"])
            one.units[key] = one.units.get(key, 0) + delta
    return happened, timelines


def _judge_write(call: Call, found: _Happened, state: str | None, report: Report) -> None:
    """Acknowledged: there, with these units. Refused: not there. Unknown: there in full, or not at all."""
    name = f"{call.kind} {call.reservation_id} {call.request_id}"
    if call.end is End.REFUSED and found.units:
        report.wrong("refused, and done all the same", name, call.reason, found.units)
    if call.end is End.OK and call.kind == "reserve":
        told = {tuple(key.split("@")): units for key, units in call.units.items()}
        if told != found.units:
            report.wrong("held is not what was answered", name, told, found.units)
        if state is None or (state == "REJECTED") != (call.outcome == "REJECTED"):
            report.wrong("the reservation is not what was answered", name, call.outcome, state)
    if call.end is End.OK and call.kind in {"confirm", "cancel", "receive"} and not found.units:
        report.wrong("acknowledged, and lost", name)
    asked = Counter[Key]()
    for sku, at, units in call.lines:
        asked[sku, at] += units
    whole = call.kind == "receive" or (call.kind == "reserve" and call.mode == "ALL")
    named = call.kind in {"confirm", "cancel"} and call.lines
    if found.units and (whole or named) and _by_sku(found.units) != _by_sku(asked):
        report.wrong("done in part, or more than once", name, dict(asked), found.units)


def _by_sku(units: Mapping[Key, int]) -> dict[str, int]:
    """Units by SKU: a line may leave its location open."""
    summed = Counter[str]()
    for (sku, _), count in units.items():
        summed[sku] += count
    return {sku: count for sku, count in summed.items() if count}


def _judge_refusal(call: Call, timelines: Mapping[Key, _Timeline], report: Report) -> None:
    """At some instant of the call some SKU of it was not to be had: for ALL in full, for BEST_EFFORT at all."""
    report.looked_at["refusals justified"] += 1
    since, until = call.sent - CLOCK_SECONDS, call.answered + CLOCK_SECONDS
    asked = Counter[Key]()
    for sku, at, units in call.lines:
        asked[sku, at] += units
    short = []
    for (sku, at), units in asked.items():
        lines = [line for key, line in timelines.items() if key[0] == sku and at in {"", key[1]}]
        least = _least_free(lines, since, until)
        short.append(least < units if call.mode == "ALL" else least <= 0)
    if not (any(short) if call.mode == "ALL" else all(short)):
        report.wrong("refused without a reason", call.reservation_id, dict(asked), call.sent, call.answered)


def _least_free(lines: Iterable[_Timeline], since: float, until: float) -> int:
    """The least that was free of all lines together, at any instant from `since` until `until`."""
    lines = list(lines)
    instants = {since}
    for line in lines:
        instants.update(line.times[bisect_right(line.times, since) : bisect_right(line.times, until)])
    return min(sum(max(0, line.free[bisect_right(line.times, at) - 1]) for line in lines) for at in instants)


def _judge_read(call: Call, timelines: Mapping[Key, _Timeline], report: Report) -> None:
    if call.end is not End.OK:
        return
    sku, at, _ = call.lines[0]
    line = timelines.get((sku, at), _Timeline())
    shown = (call.units["on_hand"], call.units["held"])
    if call.version < call.min_version:
        report.wrong("a read older than was asked for", sku, at, call.version, call.min_version)
    elif call.version >= len(line.counters) or line.counters[call.version] != shown:
        report.wrong("a read of what never was", sku, at, call.version, shown)
    elif line.times[call.version] > call.answered + CLOCK_SECONDS:
        report.wrong("a read of what was not yet", sku, at, call.version)


def _judge_order(applied: Iterable[tuple[Call, _Happened]], report: Report) -> None:
    """On each key: what was answered before another call was sent has the lower version."""
    by_key: dict[Key, list[tuple[Call, int]]] = defaultdict(list)
    for call, found in applied:
        for key, version in found.versions.items():
            by_key[key].append((call, version))
    for key, some in by_key.items():
        report.looked_at["keys linearizable"] += 1
        some.sort(key=lambda one: one[0].answered)
        answered = [call.answered for call, _ in some]
        highest: list[int] = []
        for _, version in some:
            highest.append(max(version, highest[-1] if highest else 0))
        for call, version in some:
            before = bisect_left(answered, call.sent)
            if before and highest[before - 1] > version:
                report.wrong("answered before it, and yet after it", key, call.kind, call.reservation_id, version)


# -- all of it --------------------------------------------------------------------------------------------------------


async def lateness(inventory_dsn: str, away: Sequence[tuple[float, float]] = ()) -> list[tuple[float, float]]:
    """By how many seconds holds were reclaimed after their time, in ascending order, each with when that was done.

    `away` says from when until when the database was, in seconds since 1970, in order: see `late`.
    """
    rows = await _rows(inventory_dsn, EXPIRIES)
    return sorted((late(row["due"], row["done"], away), float(row["done"])) for row in rows)


def late(due: float, done: float, away: Sequence[tuple[float, float]]) -> float:
    """Seconds from when it was due, or from when the database had come back, until it was done.

    The database's absence excuses what was not more than LATE_SECONDS_MAX late when it began.
    """
    for began, ended in away:
        if due < ended and began < done and began - due <= LATE_SECONDS_MAX:
            due = min(ended, done)
    return done - due


async def audit(at: Deployment, history: History | None = None, *, patience: float = 60.0) -> Report:
    """Everything that can be judged of a deployment; the story too where there is a history, once it is quiet."""
    report = await books(at.inventory_dsn)
    report.add(await others(at, patience=patience))
    if history:
        report.add(await story(history, at))
    return report
