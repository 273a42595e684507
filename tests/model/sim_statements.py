"""What each statement of the stores of inventory and reservation does, said again in Python.

A function has the statement's parameters in their order. Rows are visited and locked in the order in which the
statement's plan visits them, which is that of its arrays.
"""
# ruff: noqa: PLR0917 - a statement has the parameters that it has

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

import asyncpg

from services.inventory import store as inventory
from services.reservation import store as reservation
from shared import outbox, partitions, watermark
from tests.model.sim_database import Record, Row, Statement, Table, Transaction

Runs = TypeVar("Runs", bound=Callable[..., Any])
Texts = Sequence[str]
Numbers = Sequence[int]
_STATEMENTS: dict[str, tuple[str, Statement]] = {}
COUNTERS = ("on_hand", "held", "safety_stock", "backorder_limit", "short", "version", "active")


def statement(text: str) -> tuple[str, Statement]:
    """A statement's name and what it does."""
    return _STATEMENTS[text]


def _runs(text: str) -> Callable[[Runs], Runs]:
    def register(function: Runs) -> Runs:
        _STATEMENTS[text] = (function.__name__.strip("_"), function)
        return function

    return register


def _not_negative(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(row[column] >= 0 for column in columns)


def _table(name: str, *key: str, checks: dict[str, Callable[[Row], bool]] | None = None, **parents: str) -> Table:
    return Table(name, key, checks or {}, {parent: (column,) for parent, column in parents.items()})


INVENTORY = (
    _table("location", "location"),
    _table("sku", "sku", checks={"sku_price_not_negative": _not_negative("price_micros")}),
    _table(
        "stock", "sku", "location",
        checks={
            "stock_held_not_negative": _not_negative("held"),
            "stock_not_oversold": lambda row: row["held"] <= row["on_hand"] + row["backorder_limit"] + row["short"],
            "stock_limits_not_negative": _not_negative("safety_stock", "backorder_limit", "short"),
        },
        sku="sku", location="location",
    ),
    _table(
        "hold", "sku", "hold_id", "slot",
        checks={
            "hold_parts_not_negative": _not_negative("held", "committed", "released", "expired"),
            "hold_parts_sum_up": lambda row: row["quantity"]
            == row["held"] + row["committed"] + row["released"] + row["expired"],
        },
    ),
    _table("hold_change", "sku", "hold_id", "request_id"),
    _table("request", "key", "request_id"),
    _table("movement", "sku", "location", "version", "recorded_at"),
    _table("checkpoint", "sku", "location"),
    _table("movement_outbox", "id"),
    _table("outbox", "id"),
)  # fmt: skip
RESERVATION = (
    _table("reservation", "reservation_id"),
    _table(
        "reservation_line", "reservation_id", "line_no",
        checks={"line_quantity_positive": lambda row: row["quantity"] > 0}, reservation="reservation_id",
    ),
    _table(
        "allocation", "reservation_id", "sku", "location",
        checks={"allocation_parts_not_negative": _not_negative("held", "confirmed", "cancelled", "expired")},
        reservation="reservation_id",
    ),
    _table("reservation_change", "reservation_id", "request_id", reservation="reservation_id"),
    _table("subject", "subject"),
    _table("outbox", "id"),
)  # fmt: skip


def _row(names: str, *values: Any) -> dict[str, Any]:
    return dict(zip(names.split(), values, strict=True))


def _rows(names: str, *columns: Sequence[Any]) -> list[dict[str, Any]]:
    return [_row(names, *values) for values in zip(*columns, strict=True)]


def _stock(row: Row, **more: Any) -> Record:
    return Record({name: row[name] for name in ("sku", "location", *COUNTERS)} | more)


def _assert_each(found: int, asked: int) -> None:
    """`1 / (found = asked)::int`."""
    if found != asked:
        raise asyncpg.DivisionByZeroError("division by zero")


# -- inventory: holds -----------------------------------------------------------------------------


async def _tell(t: Transaction, moved: Sequence[Row], recorded_at: datetime | None, traceparent: str) -> None:
    await t.insert(
        "movement_outbox",
        {
            "id": t.identity("movement_outbox"),
            "event_id": t.server.new_uuid(),
            "skus": [row["sku"] for row in moved],
            "locations": [row["location"] for row in moved],
            "versions": [row["version"] for row in moved],
            "recorded_at": recorded_at,
            "traceparent": traceparent,
        },
    )


@_runs(inventory.PLACE)
async def _place(t: Transaction, *arguments: Any) -> list[Record]:
    demand = _rows("sku location quantity holds first seen", *arguments[:6])
    ids, units, running = arguments[6:9]
    parts = _rows("hold_id quantity sku location slot fingerprint ttl short_lines", *arguments[6:8], *arguments[9:15])
    until, traceparent = arguments[15:]
    taken: list[tuple[Row, dict[str, Any]]] = []
    for one in demand:
        row = await t.update(
            "stock",
            (one["sku"], one["location"]),
            lambda row, one=one: {  # type: ignore[misc]
                "held": row["held"] + one["quantity"], "version": row["version"] + one["holds"],
                "updated_at": t.began,
            },
            lambda row, one=one: row["active"]  # type: ignore[misc]
            and one["quantity"] in {0, min(one["quantity"], _available(row))}
            and one["seen"] in {None, row["version"]},
        )  # fmt: skip
        if row is not None:
            taken.append((row, one))
    _assert_each(len(taken), len(demand))
    time = t.clock()
    for part in parts:
        row = _hold(
            part["sku"], part["hold_id"], part["slot"], part["location"], part["quantity"], part["fingerprint"], time,
            time + part["ttl"], part["short_lines"],
        )  # fmt: skip
        await t.insert("hold", row)
    moved = []
    for row, one in taken:
        own = slice(one["first"] - 1, one["first"] - 1 + one["holds"])
        for ordinal, (hold_id, more, sum_) in enumerate(zip(ids[own], units[own], running[own], strict=True), start=1):
            moved.append(
                _movement(
                    row, row["version"] - one["holds"] + ordinal, "HOLD", 0, more, 0, row["on_hand"],
                    row["held"] - one["quantity"] + sum_, row["short"], hold_id, hold_id, "", None, time,
                )
            )  # fmt: skip
    for movement in moved:
        await t.insert("movement", movement)
    if moved:
        await _tell(t, moved, time, traceparent)
    _assert_each(int(until is None or time < until), 1)
    return [_stock(row, time=time) for row, _ in taken]


def _available(row: Row) -> int:
    available: int = row["on_hand"] - row["held"] - row["safety_stock"] + row["backorder_limit"]
    return available


def _hold(
    sku: str, hold_id: str, slot: int, location: str, quantity: int, content: bytes, created_at: datetime,
    expires_at: datetime, short_lines: str | None,
) -> Row:  # fmt: skip
    return {
        "sku": sku, "hold_id": hold_id, "slot": slot, "location": location, "quantity": quantity, "held": quantity,
        "committed": 0, "released": 0, "expired": 0, "short_lines": short_lines, "fingerprint": content,
        "created_at": created_at, "expires_at": expires_at,
    }  # fmt: skip


def _movement(
    stock: Row, version: int, kind: str, on_hand_delta: int, held_delta: int, short_delta: int, on_hand: int,
    held: int, short: int, hold_id: str, request_id: str, reference: str, occurred_at: datetime | None,
    recorded_at: datetime,
) -> Row:  # fmt: skip
    return {
        "sku": stock["sku"], "location": stock["location"], "version": version, "recorded_at": recorded_at,
        "kind": kind, "on_hand_delta": on_hand_delta, "held_delta": held_delta, "short_delta": short_delta,
        "on_hand": on_hand, "held": held, "short": short, "safety_stock": stock["safety_stock"],
        "backorder_limit": stock["backorder_limit"], "hold_id": hold_id, "request_id": request_id,
        "reference": reference, "occurred_at": occurred_at,
    }  # fmt: skip


@_runs(inventory.CHANGE)
async def _change(t: Transaction, *arguments: Any) -> list[Record]:
    gone = _rows("sku location sold held movements first", *arguments[:6])
    parts = _rows("hold_id request_id kind sold held running_sold running_held", *arguments[6:13])
    slots = _rows("sku hold_id slot held expires_at committed released expired", *arguments[13:21])
    changes = _rows("sku hold_id request_id kind fingerprint allocations expires_at", *arguments[21:28])
    traceparent = arguments[28]
    taken = []
    for one in gone:
        row = await t.update(
            "stock",
            (one["sku"], one["location"]),
            lambda row, one=one: {  # type: ignore[misc]
                "on_hand": row["on_hand"] - one["sold"], "held": row["held"] - one["held"],
                "version": row["version"] + one["movements"], "updated_at": t.began,
            },
            lambda row, one=one: row["short"] == 0 and row["held"] >= one["held"],  # type: ignore[misc]
        )  # fmt: skip
        if row is not None:
            taken.append((row, one))
    _assert_each(len(taken), len(gone))
    time = t.clock()
    left = 0
    for slot in slots:
        row = await t.update(
            "hold",
            (slot["sku"], slot["hold_id"], slot["slot"]),
            lambda row, slot=slot: {  # type: ignore[misc]
                "held": row["held"] - slot["committed"] - slot["released"] - slot["expired"],
                "committed": row["committed"] + slot["committed"], "released": row["released"] + slot["released"],
                "expired": row["expired"] + slot["expired"],
            },
            lambda row, slot=slot: row["held"] == slot["held"]  # type: ignore[misc]
            and row["expires_at"] == slot["expires_at"] and (row["expires_at"] <= time) == (slot["expired"] > 0),
        )  # fmt: skip
        left += row is not None
    for change in changes:
        await t.insert("hold_change", change | {"created_at": time})
    moved = []
    for row, one in taken:
        for ordinal, part in enumerate(parts[one["first"] - 1 : one["first"] - 1 + one["movements"]], start=1):
            moved.append(
                _movement(
                    row, row["version"] - one["movements"] + ordinal, part["kind"], -part["sold"], -part["held"], 0,
                    row["on_hand"] + one["sold"] - part["running_sold"],
                    row["held"] + one["held"] - part["running_held"], 0, part["hold_id"], part["request_id"], "",
                    None, time,
                )
            )  # fmt: skip
    for entry in moved:
        await t.insert("movement", entry)
    await _tell(t, moved, time, traceparent)
    _assert_each(left, len(slots))
    return [_stock(row, time=time) for row, _ in taken]


@_runs(inventory.LOCK)
async def _lock(t: Transaction, skus: Texts, locations: Texts) -> list[Record]:
    found = []
    for key in zip(skus, locations, strict=True):
        row = await t.update("stock", key, lambda row: {"held": row["held"]})
        if row is not None:
            found.append(_stock(row, time=t.clock()))
    return found


@_runs(partitions.IS_MADE)
async def _partition_is_made(_t: Transaction, _name: str) -> list[Record]:
    return [Record({"made": True})]


@_runs("SELECT clock_timestamp()")
async def _clock_timestamp(t: Transaction) -> list[Record]:
    return [Record({"clock_timestamp": t.clock()})]


@_runs(inventory.SAVE)
async def _save(t: Transaction, *arguments: Any) -> int:
    new = _rows("sku location on_hand held safety_stock backorder_limit short version", *arguments[:8])
    now, old_versions = arguments[8:]
    return await _saved(
        t, "stock", ("sku", "location"), [row | {"updated_at": now} for row in new], "version", old_versions
    )


async def _saved(
    t: Transaction, table: str, key: Sequence[str], new: Sequence[Row], guard: str, old: Sequence[Any]
) -> int:
    """Write rows over those of which `guard` is still what it was; how many."""
    count = 0
    for row, was in zip(new, old, strict=True):
        saved = await t.update(
            table,
            tuple(row[name] for name in key),
            lambda _row, new=row: new,  # type: ignore[misc]
            lambda row, was=was: row[guard] == was,  # type: ignore[misc]
        )
        count += saved is not None
    return count


@_runs(inventory.LOCK_SKUS)
async def _lock_skus(t: Transaction, skus: Texts) -> int:
    return await _locked(t, "sku", skus)


@_runs(inventory.LOCK_LOCATIONS)
async def _lock_locations(t: Transaction, locations: Texts) -> int:
    return await _locked(t, "location", locations)


async def _locked(t: Transaction, table: str, codes: Texts) -> int:
    return sum([await t.update(table, (code,), lambda _row: {}) is not None for code in codes])


@_runs(inventory.MAKE_STOCK)
async def _make_stock(t: Transaction, skus: Texts, locations: Texts) -> int:
    count = 0
    for sku, location in zip(skus, locations, strict=True):
        known, place = t.get("sku", (sku,)), t.get("location", (location,))
        if known and place:
            count += await t.insert(
                "stock",
                {
                    "sku": sku, "location": location, "on_hand": 0, "held": 0, "safety_stock": 0, "backorder_limit": 0,
                    "short": 0, "version": 0, "active": known["active"] and place["active"], "updated_at": t.began,
                },
                or_nothing=True,
            )  # fmt: skip
    return count


@_runs(inventory.SOURCES)
async def _sources(t: Transaction, skus: Texts) -> list[Record]:
    return [Record(_row("sku location", *key)) for key in _open_keys(t, skus)]


def _open_keys(t: Transaction, skus: Texts) -> list[tuple[str, str]]:
    found = []
    for row in t.scan("stock"):
        place = t.get("location", (row["location"],))
        if row["sku"] in skus and row["active"] and place:
            found.append((row["sku"], place["priority"], row["location"]))
    return [(sku, location) for sku, _, location in sorted(found)]


@_runs(inventory.READ_STOCK)
async def _read_stock(t: Transaction, skus: Texts, locations: Texts) -> list[Record]:
    return [_stock(row, time=t.stated) for key in zip(skus, locations, strict=True) if (row := t.get("stock", key))]


@_runs(inventory.SUM_STOCK)
async def _sum_stock(t: Transaction, skus: Texts) -> list[Record]:
    names = ("on_hand", "held", "safety_stock", "backorder_limit", "short")
    found: dict[str, dict[str, Any]] = {}
    for row in t.scan("stock"):
        if row["sku"] in skus and row["active"]:
            sums = found.setdefault(row["sku"], {"sku": row["sku"], **dict.fromkeys((*names, "available"), 0)})
            for name in names:
                sums[name] += row[name]
            sums["available"] += max(0, _available(row))
    return [Record({**sums, "time": t.stated}) for sums in found.values()]


@_runs(inventory.KNOWN_SKUS)
async def _known_skus(t: Transaction, skus: Texts) -> list[Record]:
    return _known_codes(t, "sku", skus)


@_runs(inventory.KNOWN_LOCATIONS)
async def _known_locations(t: Transaction, locations: Texts) -> list[Record]:
    return _known_codes(t, "location", locations)


def _known_codes(t: Transaction, table: str, names: Texts) -> list[Record]:
    found = ((name, t.get(table, (name,))) for name in names)
    return [Record(_row(f"{table} active", name, row["active"])) for name, row in found if row]


@_runs(inventory.INSERT_HOLDS)
async def _insert_holds(t: Transaction, *arguments: Any) -> int:
    now = arguments[8]
    rows = list(zip(*arguments[:8], strict=True))
    for sku, hold_id, slot, location, quantity, content, expires_at, short_lines in rows:
        await t.insert("hold", _hold(sku, hold_id, slot, location, quantity, content, now, expires_at, short_lines))
    return len(rows)


@_runs(inventory.READ_HOLDS)
async def _read_holds(t: Transaction, skus: Texts, ids: Texts) -> list[Record]:
    asked = set(zip(skus, ids, strict=True))
    rows = [row for row in t.scan("hold") if (row["sku"], row["hold_id"]) in asked]
    return [Record(row) for row in _by(rows, "sku", "hold_id", "location", "slot")]


def _by(rows: Iterable[Row], *columns: str) -> list[Row]:
    return sorted(rows, key=lambda row: [row[column] for column in columns])


@_runs(inventory.SAVE_HOLDS)
async def _save_holds(t: Transaction, *arguments: Any) -> int:
    new = _rows("sku hold_id slot held committed released expired expires_at", *arguments[:8])
    return await _saved(t, "hold", ("sku", "hold_id", "slot"), new, "held", arguments[8])


@_runs(inventory.EXPIRED_ON_KEYS)
async def _expired_on_keys(t: Transaction, skus: Texts, locations: Texts, now: datetime, rows_max: int) -> list[Record]:
    keys = set(zip(skus, locations, strict=True))
    rows = [
        row
        for row in t.scan("hold")
        if (row["sku"], row["location"]) in keys and row["held"] > 0 and row["expires_at"] <= now
    ]
    return [Record(row) for row in _by(rows, "sku", "location", "expires_at")[:rows_max]]


@_runs(inventory.EXPIRED)
async def _expired(t: Transaction, limit: int) -> list[Record]:
    due = [row for row in t.scan("hold") if row["held"] > 0 and row["expires_at"] <= t.began]
    return [Record(row) for row in _by(due, "expires_at")[:limit]]


@_runs(inventory.LOOK)
async def _look(t: Transaction, skus: Texts, locations: Texts) -> list[Record]:
    return _looked(t, sorted(set(zip(skus, locations, strict=True))))


@_runs(inventory.LOOK_OPEN)
async def _look_open(t: Transaction, skus: Texts) -> list[Record]:
    return _looked(t, _open_keys(t, skus))


def _looked(t: Transaction, keys: Sequence[tuple[str, str]]) -> list[Record]:
    until: dict[tuple[str, str], datetime] = {}
    for row in t.scan("hold"):
        key = (row["sku"], row["location"])
        if row["held"] > 0 and key in keys:
            until[key] = min(until.get(key, row["expires_at"]), row["expires_at"])
    found = ((key, t.get("stock", key)) for key in keys)
    return [_stock(row, expires_at=until.get(key)) for key, row in found if row]


@_runs(inventory.READ_CHANGES)
async def _read_hold_changes(t: Transaction, *arguments: Texts) -> list[Record]:
    found = (t.get("hold_change", key) for key in zip(*arguments, strict=True))
    return [Record(row) for row in _by((row for row in found if row), "sku")]


@_runs(inventory.INSERT_CHANGES)
async def _insert_hold_changes(t: Transaction, *arguments: Any) -> int:
    rows = _rows("sku hold_id request_id kind fingerprint allocations expires_at", *arguments[:7])
    for row in rows:
        await t.insert("hold_change", row | {"created_at": arguments[7]})
    return len(rows)


# -- inventory: requests, ledger, catalogue -------------------------------------------------------


@_runs(inventory.READ_REQUESTS)
async def _read_requests(t: Transaction, keys: Texts, ids: Texts) -> list[Record]:
    return [Record(row) for key in zip(keys, ids, strict=True) if (row := t.get("request", key))]


@_runs(inventory.INSERT_REQUESTS)
async def _insert_requests(t: Transaction, *arguments: Any) -> int:
    rows = _rows("key request_id fingerprint outcome refusal", *arguments)
    for row in rows:
        await t.insert("request", row | {"created_at": t.began})
    return len(rows)


@_runs(inventory.INSERT_MOVEMENTS)
async def _insert_movements(t: Transaction, *arguments: Any) -> int:
    now, traceparent = arguments[16:]
    rows = [
        _movement(
            _row("sku location safety_stock backorder_limit", sku, location, safety_stock, backorder_limit),
            version, kind, on_hand_delta, held_delta, short_delta, on_hand, held, short, hold_id, request_id,
            reference, occurred_at, now,
        )
        for (
            sku, location, version, kind, on_hand_delta, held_delta, short_delta, on_hand, held, short, safety_stock,
            backorder_limit, hold_id, request_id, reference, occurred_at,
        ) in zip(*arguments[:16], strict=True)
    ]  # fmt: skip
    for row in rows:
        await t.insert("movement", row)
    await _tell(t, rows, now, traceparent)
    return 1


@_runs(inventory.UNSENT)
async def _unsent(t: Transaction, limit: int) -> list[Record]:
    return [Record(group) for group in t.scan("movement_outbox")[:limit]]


@_runs(inventory.MOVEMENTS_AT)
async def _movements_at(t: Transaction, *arguments: Any) -> list[Record]:
    return [Record(row) for place in zip(*arguments, strict=True) if (row := t.get("movement", place))]


@_runs(inventory.DELETE_SENT_MOVEMENTS)
async def _delete_sent_movements(t: Transaction, ids: Numbers) -> int:
    return sum([await t.delete("movement_outbox", (number,)) for number in sorted(ids)])


@_runs(inventory.NEXT_KEYS)
async def _next_keys(t: Transaction, sku: str, location: str, limit: int) -> list[Record]:
    page = [row for row in t.scan("stock") if (row["sku"], row["location"]) > (sku, location)][:limit]
    return [Record(_row("sku location", row["sku"], row["location"])) for row in page]


@_runs(inventory.COMPARE)
async def _compare(t: Transaction, skus: Texts, locations: Texts) -> list[Record]:
    names = ("version", "on_hand", "held", "short")
    found = []
    for key in zip(skus, locations, strict=True):
        stock = t.get("stock", key)
        checked = t.get("checkpoint", key) or dict.fromkeys(names, 0)
        if stock is None or all(stock[name] == checked[name] for name in names):
            continue
        ledger = [
            row for row in t.scan("movement")
            if (row["sku"], row["location"]) == key and row["version"] > checked["version"]
        ]  # fmt: skip
        come_to = {"version": len(ledger)}
        come_to |= {name: sum(row[f"{name}_delta"] for row in ledger) for name in names[1:]}
        open_holds = sum(row["held"] for row in t.scan("hold") if (row["sku"], row["location"]) == key)
        found.append(
            _row("sku location", *key)
            | {name: stock[name] for name in names}
            | {f"{name}_drift": stock[name] - checked[name] - come_to[name] for name in names}
            | {"hold_drift": stock["held"] - open_holds}
        )
    return list(map(Record, found))


@_runs(inventory.SAVE_CHECKPOINTS)
async def _save_checkpoints(t: Transaction, *arguments: Any) -> int:
    rows = _rows("sku location version on_hand held short", *arguments)
    for row in rows:
        saved = row | {"checked_at": t.began}
        if not await t.insert("checkpoint", saved, or_nothing=True):
            await t.update(
                "checkpoint", (row["sku"], row["location"]), lambda _row, saved=saved: saved,  # type: ignore[misc]
                lambda known, saved=saved: known["version"] < saved["version"],  # type: ignore[misc]
            )  # fmt: skip
    return len(rows)


_SKU = "sku name category unit currency_code price_micros"


@_runs(inventory.INSERT_SKUS)
async def _insert_skus(t: Transaction, *arguments: Sequence[Any]) -> list[Record]:
    made = []
    for given in _rows(_SKU, *arguments):
        row = {**given, "active": True, "version": 1, "created_at": t.began, "updated_at": t.began}
        if await t.insert("sku", row, or_nothing=True):
            made.append(Record(row))
    return made


@_runs(inventory.INSERT_LOCATION)
async def _insert_location(t: Transaction, *arguments: Any) -> list[Record]:
    row = _row("location name priority active version created_at updated_at", *arguments, True, 1, t.began, t.began)
    return [Record(row)] if await t.insert("location", row, or_nothing=True) else []


# -- outbox ---------------------------------------------------------------------------------------


@_runs(outbox.INSERT.format(table="outbox"))
async def _insert_outbox(
    t: Transaction, topic: str, kind: str, keys: Texts, payloads: Sequence[bytes], traceparent: str
) -> int:
    group = _row(
        "id event_id topic type keys payloads traceparent",
        t.identity("outbox"), t.server.new_uuid(), topic, kind, keys, payloads, traceparent,
    )  # fmt: skip
    await t.insert("outbox", group)
    return 1


@_runs(outbox.PEEK.format(table="outbox"))
async def _peek_outbox(t: Transaction, limit: int) -> list[Record]:
    return [Record(row) for row in t.scan("outbox")[:limit]]


@_runs(outbox.DELETE.format(table="outbox"))
async def _delete_outbox(t: Transaction, ids: Numbers) -> int:
    return sum([await t.delete("outbox", (number,)) for number in sorted(ids)])


@_runs(watermark.BOUND)
async def _bound(t: Transaction) -> list[Record]:
    writing = [one.began for one in t.server.transactions if one.has_written]
    return [Record({"least": min([t.stated, *writing])})]


# -- reservation ----------------------------------------------------------------------------------


@_runs(reservation.INSERT)
async def _insert_reservations(t: Transaction, *arguments: Any) -> int:
    new = _rows(
        "reservation_id customer_id state mode fingerprint short_lines expires_at created_at order_time country"
        " device_id ip_address",
        *arguments[:12],
    )
    topic, kind, key_id = arguments[24:27]
    payloads, traceparent = arguments[30:]
    for given in new:
        row = {**given, "updated_at": given["created_at"], "version": 1, "key_id": key_id}
        row["order_time"] = given["order_time"] or given["created_at"]
        await t.insert("reservation", row)
    for line in _rows(
        "reservation_id line_no sku location quantity minimum currency_code price_micros", *arguments[12:20]
    ):
        await t.insert("reservation_line", line)
    for part in _rows("reservation_id sku location held", *arguments[20:24]):
        await t.insert("allocation", part | {"confirmed": 0, "cancelled": 0, "expired": 0})
    for subject in _rows("subject kind value", *arguments[27:30]):
        await t.insert("subject", subject, or_nothing=True)
    return await _insert_outbox(t, topic, kind, arguments[0], payloads, traceparent)


@_runs(reservation.KNOWN)
async def _known(t: Transaction, ids: Texts) -> list[Record]:
    return [Record({"reservation_id": name}) for name in ids if t.get("reservation", (name,))]


@_runs(reservation.READ)
async def _read_reservations(t: Transaction, ids: Texts) -> list[Record]:
    found = []
    for name in ids:
        if row := t.get("reservation", (name,)):
            lines = [
                (x["sku"], x["location"], x["quantity"], x["minimum"], x["currency_code"], x["price_micros"])
                for x in t.scan("reservation_line")
                if x["reservation_id"] == name
            ]
            parts = [
                (x["sku"], x["location"], x["held"], x["confirmed"], x["cancelled"], x["expired"])
                for x in t.scan("allocation")
                if x["reservation_id"] == name
            ]
            found.append(Record({**row, "lines": json.dumps(lines), "allocations": json.dumps(parts)}))
    return found


@_runs(reservation.READ_SUBJECTS)
async def _read_subjects(t: Transaction, subjects: Texts) -> list[Record]:
    return [Record(row) for subject in subjects if (row := t.get("subject", (subject,)))]


@_runs(reservation.READ_CHANGES)
async def _read_changes(t: Transaction, ids: Texts, request_ids: Texts) -> list[Record]:
    return [Record(row) for key in zip(ids, request_ids, strict=True) if (row := t.get("reservation_change", key))]


@_runs(reservation.INSERT_CHANGES)
async def _insert_changes(t: Transaction, *arguments: Sequence[Any]) -> list[Record]:
    made = []
    for given in _rows("reservation_id request_id action fingerprint lines ttl", *arguments):
        row = {**given, "state": "PENDING", "refusal": None, "created_at": t.began}
        if await t.insert("reservation_change", row, or_nothing=True):
            made.append(Record(row))
    return made


@_runs(reservation.PENDING_CHANGES)
async def _pending_changes(t: Transaction, age: timedelta, limit: int) -> list[Record]:
    rows = [
        row for row in t.scan("reservation_change")
        if row["state"] == "PENDING" and row["created_at"] < t.began - age
    ]  # fmt: skip
    return [Record(row) for row in _by(rows, "created_at")[:limit]]


@_runs(reservation.LOCK)
async def _lock_reservations(t: Transaction, ids: Texts) -> int:
    count = 0
    for name in ids:
        count += await t.update("reservation", (name,), lambda row: {"version": row["version"]}) is not None
    return count


@_runs(reservation.BOOK)
async def _book(t: Transaction, *arguments: Any) -> list[Record]:
    new = _rows("reservation_id version state expires_at updated_at", *arguments[:5])
    decided = _rows("reservation_id request_id state refusal", *arguments[5:9])
    moved = _rows("reservation_id sku location held confirmed cancelled expired", *arguments[9:16])
    topic, kind, payloads, traceparent = arguments[16:]
    settled = 0
    for one in new:
        row = await t.update(
            "reservation",
            (one["reservation_id"],),
            lambda _row, one=one: {**one, "version": one["version"] + 1},  # type: ignore[misc]
            lambda row, one=one: row["version"] == one["version"],  # type: ignore[misc]
        )
        settled += row is not None
    count = 0
    for one in decided:
        row = await t.update(
            "reservation_change",
            (one["reservation_id"], one["request_id"]),
            lambda _row, one=one: one,  # type: ignore[misc]
            lambda row: row["state"] == "PENDING",
        )
        count += row is not None
    _assert_each(settled, len(new))
    _assert_each(count, len(decided))
    for part in moved:
        key = (part["reservation_id"], part["sku"], part["location"])
        await t.update("allocation", key, lambda _row, part=part: part)  # type: ignore[misc]
    if new:
        await _insert_outbox(t, topic, kind, arguments[0], payloads, traceparent)
    return [Record({"?column?": 1})]


@_runs(reservation.DUE)
async def _due(t: Transaction, limit: int, since: datetime, name: str) -> list[Record]:
    rows = [
        row
        for row in t.scan("reservation")
        if row["state"] == "HELD"
        and row["expires_at"] <= t.began
        and (row["expires_at"], row["reservation_id"]) > (since, name)
    ]
    return [Record(row) for row in _by(rows, "expires_at", "reservation_id")[:limit]]
