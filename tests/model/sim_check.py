"""What must be true of a simulated run: at every commit, when all is quiet, and when every hold has had its time.

It is judged from the committed rows, from what stands in the broker and from what callers were told, and by none of
the services' own code, but for the reconciler, which has to agree.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aiokafka import TopicPartition
from google.protobuf.message import Message
from holdfast.inventory.v1 import events_pb2, inventory_pb2
from holdfast.reservation.v1 import events_pb2 as reservation_events
from holdfast.reservation.v1 import reservation_pb2

from services.inventory.codec import COMMANDS_TOPIC, MOVEMENTS_TOPIC
from services.inventory.store import balance
from services.reservation.codec import CHANGES_TOPIC
from shared import watermark
from shared.refusal import Refusal
from shared.wire import moment
from tests.model.sim_broker import PARTITIONS
from tests.model.sim_database import Connection, LocalWire, Row, Transaction
from tests.model.sim_plan import PLACES, Operation
from tests.model.sim_statements import statement
from tests.model.sim_world import EPOCH, World

Key = tuple[str, str]
FINAL = {"CONFIRMED", "CANCELLED", "EXPIRED", "REJECTED"}
CHANGES = {"confirm": "COMMIT", "cancel": "RELEASE", "extend": "HOLD"}
SETTLE_SECONDS_MAX = 25
HOLD_KINDS = {"HOLD", "COMMIT", "RELEASE", "EXPIRE"}
NOT_KEPT = {"RESERVATION_NOT_FOUND", "VERSION_NOT_REACHED"}


@dataclass
class Call:
    """A client's call, with all its attempts: what was asked, when, and what it heard, if it heard anything."""

    asked: Operation
    began: float
    knew: dict[Key, int]
    ended: float | None = None
    answer: Message | Refusal | None = None


class Books:
    """All that is known of a run, kept by who stands beside it."""

    def __init__(self, world: World) -> None:
        self.calls: list[Call] = []
        self.problems: list[str] = []
        self.ledger: dict[Key, list[Row]] = defaultdict(list)
        self.committed: dict[tuple[Key, int], float] = {}
        self._world = world
        self._stock: dict[Key, Row] = {}
        self._reservations: dict[str, Row] = {}
        world.servers["inventory"].committed = self._see_inventory
        world.servers["reservation"].committed = self._see_reservation

    def require(self, holds: object, *words: object) -> None:
        if not holds:
            self.problems.append(" ".join(map(str, words)))

    def _see_inventory(self, transaction: Transaction) -> None:
        """Counters, ledger, holds and outbox change together, at each commit, and stay within their bounds."""
        movements: dict[Key, list[Row]] = defaultdict(list)
        told: list[tuple[str, str, int]] = []
        stocks: dict[Key, Row] = {}
        for (table, key), row in transaction.writes.items():
            if row is None:
                continue
            if table == "movement":
                movements[row["sku"], row["location"]].append(row)
            elif table == "stock":
                stocks[key] = row
            elif table == "movement_outbox":
                told += zip(row["skus"], row["locations"], row["versions"], strict=True)
        moved = [(*key, row["version"]) for key, rows in movements.items() for row in rows]
        self.require(sorted(moved) == sorted(told), "movements are not what the relay is told:", moved, told)
        self.require(movements.keys() <= stocks.keys(), "movements of stock that did not change:", movements.keys())
        for key, stock in stocks.items():
            was = self._stock.get(key) or dict.fromkeys(("on_hand", "held", "short", "version"), 0)
            for row in sorted(movements[key], key=lambda row: int(row["version"])):
                self._see_movement(key, was, row)
                was = row
            same = all(stock[name] == was[name] for name in ("on_hand", "held", "short", "version"))
            self.require(same, "counters without a movement:", was, stock)
            self._stock[key] = stock
            bound = stock["on_hand"] + stock["backorder_limit"] + stock["short"]
            self.require(0 <= stock["held"] <= bound, "oversold:", stock)

    def _see_movement(self, key: Key, was: Row, row: Row) -> None:
        self.require(row["version"] == was["version"] + 1, "a gap before", row)
        for name in ("on_hand", "held", "short"):
            self.require(row[name] == was[name] + row[f"{name}_delta"], name, "is not the sum of movements:", row)
        if row["kind"] == "HOLD":
            self.require(available(row) >= 0, "a hold of safety stock:", row)
        before = self.ledger[key]
        self.require(not before or before[-1]["recorded_at"] <= row["recorded_at"], "time runs backwards:", row)
        before.append(row)
        self.committed[key, row["version"]] = self._world.loop.time()

    def _see_reservation(self, transaction: Transaction) -> None:
        """Every change of a reservation is one version and one event; what has ended stays as it is."""
        changed: list[str] = []
        told: list[str] = []
        for (table, _), row in transaction.writes.items():
            if row is not None and table == "outbox":
                told += row["keys"]
            if row is None or table != "reservation":
                continue
            name = row["reservation_id"]
            was = self._reservations.get(name)
            if was is None or was["version"] != row["version"]:
                changed.append(name)
                self.require(row["version"] == (was["version"] if was else 0) + 1, "versions of", name, "have a gap")
                ended = (
                    was is not None and was["state"] in FINAL
                )  # an extension may be booked later, and changes nothing
                self.require(not ended or row["state"] == was["state"], name, "had ended and changed:", was, row)  # type: ignore[index]
            self._reservations[name] = row
        self.require(sorted(changed) == sorted(told), "events are not what changed:", changed, told)


def available(row: Row) -> int:
    return int(row["on_hand"] - row["held"] - row["safety_stock"] + row["backorder_limit"])


def seconds(time: datetime) -> float:
    return (time - EPOCH).total_seconds()


# -- when all is quiet ----------------------------------------------------------------------------


async def check_quiet(world: World, books: Books) -> None:
    """Nothing is under way: reservations agree with holds, everything has been told, nothing drifts.

    As holds may expire just then, it may become so within SETTLE_SECONDS_MAX.
    """
    problems = books.problems
    for _ in range(SETTLE_SECONDS_MAX):
        books.problems = []
        await _check_quiet(world, books)
        if not books.problems:
            break
        await asyncio.sleep(1)
    books.problems = problems + books.problems


async def _check_quiet(world: World, books: Books) -> None:
    inventory, reservation = world.servers["inventory"], world.servers["reservation"]
    for server, tables in ((inventory, ("movement_outbox", "outbox")), (reservation, ("outbox",))):
        for table in tables:
            books.require(not server.all(table), table, "is not empty:", server.all(table)[:1])
        books.require(not server.transactions, "a transaction never ended")
    for change in reservation.all("reservation_change"):
        books.require(change["state"] != "PENDING", "a change was never booked:", change)
    _check_agreement(world, books)
    connection: Any = Connection(inventory, statement, LocalWire())
    _, _, drifts = await balance(connection, ("", ""), 1000)
    books.require(not drifts, "drift:", *drifts)
    _check_events(world, books)
    _check_told_reservations(world, books)
    _check_consumed(world, books)


def _check_agreement(world: World, books: Books) -> None:
    """What reservation says of its promises is what inventory holds."""
    holds = _sums(
        (
            (row["hold_id"], row["sku"], row["location"]),
            tuple(row[x] for x in ("held", "committed", "released", "expired")),
        )
        for row in world.servers["inventory"].all("hold")
        if row["location"]
    )
    parts = {
        (row["reservation_id"], row["sku"], row["location"]): tuple(
            row[x] for x in ("held", "confirmed", "cancelled", "expired")
        )
        for row in world.servers["reservation"].all("allocation")
    }
    for place, part in parts.items():
        books.require(holds.get(place) == part, "reservation and hold disagree:", place, part, holds.get(place))
    totals: dict[str, list[int]] = {}
    for (name, *_), part in parts.items():
        totals[name] = [a + b for a, b in zip(totals.get(name, [0] * 4), part, strict=True)]
    for row in world.servers["reservation"].all("reservation"):
        held, confirmed, _, expired = totals.get(row["reservation_id"], [0] * 4)
        state = "HELD" if held else "CONFIRMED" if confirmed else "EXPIRED" if expired else "CANCELLED"
        if row["reservation_id"] not in totals:
            state = "REJECTED"
        books.require(row["state"] == state, "a state that its quantities do not come to:", row, totals)


def _sums(items: Iterable[tuple[Any, tuple[int, ...]]]) -> dict[Any, tuple[int, ...]]:
    sums: dict[Any, tuple[int, ...]] = {}
    for key, part in items:
        sums[key] = tuple(a + b for a, b in zip(sums.get(key, (0,) * len(part)), part, strict=True))
    return sums


def _check_events(world: World, books: Books) -> None:
    """The broker has every movement, as the ledger has it, first told in order; and nothing older than it was told."""
    heard: dict[Key, int] = defaultdict(int)
    for number in range(PARTITIONS):
        complete_until: datetime | None = None
        for message in world.broker.log(TopicPartition(MOVEMENTS_TOPIC, number)):
            time = watermark.of(message)
            if time:
                complete_until = max(time, complete_until or time)
                continue
            moved = events_pb2.StockMoved.FromString(message.value or b"").movement
            key = (moved.sku, moved.location)
            if moved.version <= heard[key]:
                continue
            books.require(moved.version == heard[key] + 1, "events of", key, "have a gap before", moved.version)
            heard[key] = moved.version
            if moved.version > len(books.ledger[key]):
                books.require(False, "an event without a movement:", moved)
                continue
            row = books.ledger[key][moved.version - 1]
            same = (moved.on_hand, moved.held, moved.short, moved.hold_id, moved.request_id) == (
                row["on_hand"], row["held"], row["short"], row["hold_id"], row["request_id"],
            )  # fmt: skip
            books.require(
                same and moment(moved.time) == row["recorded_at"], "an event is not its movement:", moved, row
            )
            late = complete_until is not None and row["recorded_at"] < complete_until
            books.require(not late, "told to be complete until", complete_until, "and then came", row)
    told = {key: version for key, version in heard.items() if version}
    books.require(told == {key: len(rows) for key, rows in books.ledger.items() if rows}, "movements were not told")


def _check_told_reservations(world: World, books: Books) -> None:
    """The broker has every version of every reservation, first told in order, the last as the row has it."""
    heard: dict[str, reservation_pb2.Reservation] = {}
    for number in range(PARTITIONS):
        for message in world.broker.log(TopicPartition(CHANGES_TOPIC, number)):
            if watermark.of(message):
                continue
            told = reservation_events.ReservationChanged.FromString(message.value or b"").reservation
            before = heard[told.reservation_id].version if told.reservation_id in heard else 0
            books.require(told.version <= before + 1, "events of", told.reservation_id, "have a gap")
            books.require(not told.customer_id, "an event names its customer")
            if told.version > before:
                heard[told.reservation_id] = told
    rows = world.servers["reservation"].all("reservation")
    for row in rows:
        last = heard.get(row["reservation_id"])
        state = reservation_pb2.ReservationState.Name(last.state).removeprefix("RESERVATION_STATE_") if last else ""
        same = last is not None and (last.version, state) == (row["version"], row["state"])
        books.require(same, "a reservation was not told:", row, last)
    books.require(len(heard) == len(rows), "events of reservations that are not there")


def _check_consumed(world: World, books: Books) -> None:
    """Commands are obeyed once, or buried; cases are released."""
    letters = {letter.value for letter in world.broker.log(TopicPartition(f"{COMMANDS_TOPIC}.dlq", 0))}
    for number in range(PARTITIONS):
        for message in world.broker.log(TopicPartition(COMMANDS_TOPIC, number)):
            command = events_pb2.StockCommand.FromString(message.value or b"")
            applied = _movements(books, lambda row, command=command: row["request_id"] == f"erp {command.source_id}")  # type: ignore[misc]
            once = len(applied) == 1 and applied[0]["on_hand_delta"] == command.adjustment.quantity
            books.require(once or (not applied and message.value in letters), "not obeyed once:", command, applied)
    released = {call.asked.name: call for call in books.calls if call.asked.kind == "release"}
    for row in world.servers["reservation"].all("reservation"):
        known = min((c.ended for c in books.calls if _is_reserve(c, row) and c.ended is not None), default=None)
        call = released.get(row["reservation_id"])
        if call and known is not None and known < call.began:
            books.require(row["state"] != "HELD", "a released reservation is held:", row)


def _is_reserve(call: Call, row: Row) -> bool:
    return call.asked.kind == "reserve" and call.asked.name == row["reservation_id"]


def _movements(books: Books, wanted: Callable[[Row], bool]) -> list[Row]:
    return [row for rows in books.ledger.values() for row in rows if wanted(row)]


# -- at the end -----------------------------------------------------------------------------------


async def check_all(world: World, books: Books) -> None:
    """Every hold has had its time: nothing is held, and everyone was told the truth, once."""
    await check_quiet(world, books)
    for row in world.servers["inventory"].all("stock"):
        books.require(row["held"] == 0, "held though every time has come:", row)
    holds: dict[str, list[Row]] = defaultdict(list)
    for row in world.servers["inventory"].all("hold"):
        holds[row["hold_id"]].append(row)
        _check_expiry(books, row)
    judge = _Judge(world, books, holds)
    grouped: dict[tuple[str, ...], list[Call]] = defaultdict(list)
    for call in books.calls:
        asked = call.asked
        match asked.kind:
            case "reserve":
                grouped["reserve", asked.name].append(call)
            case "confirm" | "cancel" | "extend":
                grouped["change", asked.name, asked.request_id].append(call)
            case "read":
                judge.read(call)
            case "command" | "release":
                pass
            case _:
                grouped["adjust", asked.name].append(call)
    for (kind, *_), calls in grouped.items():
        getattr(judge, kind)(calls)


def _check_expiry(books: Books, hold: Row) -> None:
    """Nothing expires before its time, nothing is sold or given back after it."""
    for row in books.ledger[hold["sku"], hold["location"]]:
        if row["hold_id"] != hold["hold_id"]:
            continue
        early = row["kind"] == "EXPIRE" and row["recorded_at"] < hold["expires_at"]
        late = row["kind"] in {"COMMIT", "RELEASE"} and row["recorded_at"] >= hold["expires_at"]
        books.require(not early and not late, "against its expiry:", row, hold)


class _Judge:
    """Judges what callers were told, call by call of one id."""

    def __init__(self, world: World, books: Books, holds: dict[str, list[Row]]) -> None:
        self._books = books
        self._holds = holds
        self._reservations = {row["reservation_id"]: row for row in world.servers["reservation"].all("reservation")}
        self._changes = {
            (row["reservation_id"], row["request_id"]): row
            for row in world.servers["reservation"].all("reservation_change")
        }
        self._skus: dict[str, set[str]] = defaultdict(set)
        for row in world.servers["reservation"].all("allocation"):
            self._skus[row["reservation_id"]].add(row["sku"])
        self._hold_changes = {
            (row["hold_id"], row["request_id"]) for row in world.servers["inventory"].all("hold_change")
        }

    def reserve(self, calls: Sequence[Call]) -> None:
        """One outcome for an id, whoever asks and how often; other content is told so; a refusal had its reason."""
        name = calls[0].asked.name
        require = self._books.require
        winners = {call.asked.lines for call in calls if isinstance(call.answer, reservation_pb2.ReserveResponse)}
        require(len(winners) <= 1, "two requests of one id were both served:", name, winners)
        outcomes = set()
        for call in calls:
            answer = call.answer
            if isinstance(answer, reservation_pb2.ReserveResponse):
                outcomes.add((answer.outcome, _allocated(answer.reservation)))
                self._granted(call, answer.reservation)
            elif isinstance(answer, Refusal):
                other = any(one.asked.lines != call.asked.lines for one in calls)
                require(
                    answer.reason == "REQUEST_ID_REUSED" and other, "refused without a reason:", name, answer.reason
                )
        require(len(outcomes) <= 1, "one request, several outcomes:", name, outcomes)
        if outcomes:
            require(name in self._reservations, "an answered reservation is not there:", name)
        for lines in winners or {calls[0].asked.lines}:
            rows = [row for row in self._holds.get(name, ()) if row["sku"] in {sku for sku, *_ in lines}]
            same = [call for call in calls if call.asked.lines == lines]
            if rows and not any(row["quantity"] for row in rows) and (winners or len(same) == len(calls)):
                self._refused(rows[0], same)

    def _granted(self, call: Call, told: reservation_pb2.Reservation) -> None:
        """What was allocated is what was asked for, and is what inventory held."""
        asked: dict[str, int] = defaultdict(int)
        for sku, _, units in call.asked.lines:
            asked[sku] += units
        got: dict[str, int] = defaultdict(int)
        for sku, place, units in _allocated(told):
            got[sku] += units
            held = sum(
                row["quantity"]
                for row in self._holds.get(call.asked.name, ())
                if (row["sku"], row["location"]) == (sku, place)
            )
            self._books.require(held == units, "told of", units, "held are", held, call.asked)
        if got and call.asked.mode == "ALL":
            self._books.require(got == asked, "ALL, and not all of it:", dict(got), call.asked)
        if got and call.asked.mode == "MINIMUM":
            self._books.require(got.keys() == asked.keys(), "less than the minimum:", dict(got), call.asked)
        self._books.require(
            all(got[sku] <= asked[sku] for sku in got), "more than was asked for:", dict(got), call.asked
        )

    def _refused(self, hold: Row, calls: Sequence[Call]) -> None:
        """At the instant of its decision, some line could not be met by all that was free or had expired."""
        at = hold["created_at"]
        began = min(call.began for call in calls)
        ends = [call.ended for call in calls if call.ended is not None]
        self._books.require(seconds(at) >= began - 1e-5, "decided before it was asked:", hold)
        self._books.require(not ends or seconds(at) <= min(ends) + 1e-5, "decided after it was answered:", hold)
        if all(self._could_be_met(call.asked, at) for call in calls):
            self._books.require(False, "refused without a reason:", calls[0].asked, hold)

    def _could_be_met(self, asked: Operation, at: datetime) -> bool:
        """Whether all that ALL, MINIMUM or BEST_EFFORT needs was there in every state of the ledger at this time."""
        demand: dict[Key, int] = defaultdict(int)
        for sku, place, units in asked.lines:
            demand[sku, place] += units if asked.mode == "ALL" else 1
        met = []
        for sku in sorted({sku for sku, _ in demand}):
            free = {place: self._free((sku, place), at) for place in PLACES}
            named = [free[place] - demand[sku, place] for place in PLACES if (sku, place) in demand]
            whole = sum(free.values()) - sum(units for (of, _), units in demand.items() if of == sku)
            met.append(min([whole, *named]) >= 0)
        return any(met) if asked.mode == "BEST_EFFORT" else all(met)

    def _free(self, key: Key, at: datetime) -> int:
        """The least that a hold could have had of a key at a time, what had expired by then included."""
        ledger = self._books.ledger[key]
        least = None
        for number, row in enumerate(ledger):
            until = (
                ledger[number + 1]["recorded_at"]
                if number + 1 < len(ledger)
                else datetime.max.replace(tzinfo=at.tzinfo)
            )
            if row["recorded_at"] <= at <= until:
                free = available(row) + self._expired(key, number, at)
                least = free if least is None else min(least, free)
        return max(0, least or 0)

    def _expired(self, key: Key, number: int, at: datetime) -> int:
        """Units of holds whose time had come, and that the ledger still had as held after its n-th movement."""
        held: dict[str, int] = defaultdict(int)
        for row in self._books.ledger[key][: number + 1]:
            if row["kind"] in HOLD_KINDS:
                held[row["hold_id"]] += row["held_delta"]
        return sum(
            held[row["hold_id"]]
            for hold_id in held
            for row in self._holds[hold_id]
            if (row["sku"], row["location"]) == key and row["expires_at"] <= at
        )

    def change(self, calls: Sequence[Call]) -> None:
        """A change is made once and booked, or refused for a reason and not made; all who ask hear the same."""
        asked = calls[0].asked
        require = self._books.require
        identity = (asked.name, asked.request_id)
        row = self._changes.get(identity)
        state = row["state"] if row else "NONE"
        made = _movements(
            self._books, lambda one: one["hold_id"] == asked.name and one["request_id"] == asked.request_id
        )
        require(all(one["kind"] == CHANGES[asked.kind] for one in made), "another kind of change:", asked, made)
        require(
            (state == "APPLIED") == (identity in self._hold_changes), "booked, or made, and not both:", asked, state
        )
        units = -sum(one["held_delta"] for one in made)
        if asked.kind != "extend" and state == "APPLIED":
            right = units == sum(x for *_, x in asked.lines) if asked.lines else units > 0
            require(right, "changed by", units, asked)
        elif state != "APPLIED":
            require(not made, "moved though it was not made:", asked, made)
        for call in calls:
            if isinstance(call.answer, Refusal):
                require(
                    state != "APPLIED" or call.answer.reason in NOT_KEPT, "refused and made:", asked, call.answer.reason
                )
                self._change_refused(call, call.answer)
            elif call.answer is not None:
                require(state == "APPLIED", "acknowledged and not made:", asked, state)
        reasons = {c.answer.reason for c in calls if isinstance(c.answer, Refusal)} - NOT_KEPT
        require(len(reasons) <= 1 or state == "NONE", "one request, several refusals:", asked, reasons)

    def _change_refused(self, call: Call, refusal: Refusal) -> None:
        """The reason was true at some instant of the call."""
        asked, ended = call.asked, call.ended
        assert ended is not None
        first = min(c.began for c in self._books.calls if c.asked[2:5] == asked[2:5])
        require = self._books.require
        rows = self._holds.get(asked.name, [])
        match refusal.reason:
            case "RESERVATION_EXPIRED":
                true = any(seconds(row["expires_at"]) <= ended + 1e-5 for row in rows)
            case "RESERVATION_NOT_HELD":
                # Not what a request of other content held under the id.
                skus = {sku for sku, *_ in asked.lines} or self._skus[asked.name]
                gone = all(self._least_held(asked.name, sku, 0, ended) == 0 for sku in skus)
                true = gone and "state" in refusal.metadata
            case "QUANTITY_EXCEEDED":
                true = any(self._least_held(asked.name, sku, first, ended) < units for sku, _, units in asked.lines)
            case "RESERVATION_NOT_FOUND":
                answered = [
                    c.ended for c in self._books.calls
                    if c.asked.kind == "reserve" and c.asked.name == asked.name and c.ended is not None
                    and not isinstance(c.answer, Refusal)
                ]  # fmt: skip
                true = not answered or min(answered) > call.began
            case "LINE_NOT_FOUND":
                true = any(all(row["sku"] != sku for row in rows) for sku, *_ in asked.lines)
            case _:
                true = False
        require(true, "refused without a reason:", asked, refusal.reason, refusal.metadata)

    def _least_held(self, hold_id: str, sku: str, began: float, ended: float) -> int:
        """The least units of a hold that were held at an instant from `began` to `ended`."""
        moves = sorted(
            (
                (row["recorded_at"], row["held_delta"], row["kind"])
                for key, ledger in self._books.ledger.items()
                for row in ledger
                if row["hold_id"] == hold_id and key[0] == sku
            ),
            key=lambda move: (move[0], move[2] != "HOLD"),
        )
        units, least = 0, None
        for number, (time, delta, kind) in enumerate(moves):
            if seconds(time) > ended + 1e-5:
                break
            units += delta
            until = seconds(moves[number + 1][0]) if number + 1 < len(moves) else float("inf")
            if until >= began - 1e-5 and (kind != "HOLD" or until > seconds(time)):
                least = units if least is None else min(least, units)
        return least or 0

    def adjust(self, calls: Sequence[Call]) -> None:
        """An adjustment is made once, or refused for a reason and not made; all who ask hear the same."""
        asked = calls[0].asked
        units = asked.lines[0][2]
        require = self._books.require
        made = _movements(self._books, lambda row: row["request_id"] == asked.name and row["kind"] not in HOLD_KINDS)
        require(len(made) <= (2 if asked.kind == "transfer" else 1), "made twice:", asked, made)
        change = {"receive": units, "ship": -units, "damage": -units, "transfer": 0}.get(asked.kind)
        if made and change is not None:
            require(sum(row["on_hand_delta"] for row in made) == change, "adjusted by another number:", asked, made)
        for call in calls:
            if isinstance(call.answer, Refusal):
                require(not made, "refused and made:", asked, call.answer.reason)
                self._adjust_refused(call, calls, call.answer)
            elif call.answer is not None:
                require(made, "acknowledged and not made:", asked)
        require(len({_content(c.answer) for c in calls if c.answer is not None}) <= 1, "several outcomes:", asked)

    def _adjust_refused(self, call: Call, calls: Sequence[Call], refusal: Refusal) -> None:
        sku, place, units = call.asked.lines[0]
        assert call.ended is not None
        states = self._states((sku, place), min(one.began for one in calls), call.ended)
        if refusal.reason == "INSUFFICIENT_STOCK":
            true = any(max(0, row["on_hand"] - row["held"]) < units for row in states)
        elif refusal.reason == "BELOW_HELD":
            now = [(row, units if call.asked.kind == "count" else row["on_hand"] - units) for row in states]
            true = any(
                after < 0 or row["held"] - after - row["backorder_limit"] > row["short"]
                or (call.asked.kind == "policy" and row["held"] > row["on_hand"])
                for row, after in now
            )  # fmt: skip
        else:
            true = False
        self._books.require(true, "refused without a reason:", call.asked, refusal.reason)

    def _states(self, key: Key, began: float, ended: float) -> list[Row]:
        """The states of a key from `began` to `ended`."""
        ledger = self._books.ledger[key]
        return [
            row
            for number, row in enumerate(ledger)
            if seconds(row["recorded_at"]) <= ended + 1e-5
            and (number + 1 == len(ledger) or seconds(ledger[number + 1]["recorded_at"]) >= began - 1e-5)
        ]

    def read(self, call: Call) -> None:
        """What was read is a state of the ledger, not older than the caller knew, and was the newest when it says."""
        require = self._books.require
        if not isinstance(call.answer, inventory_pb2.GetAvailabilityResponse):
            require(call.answer is None, "a read was refused:", call.asked, call.answer)
            return
        for stock in call.answer.stocks:
            key = (stock.sku, stock.location)
            row = self._books.ledger[key][stock.version - 1]
            require(stock.version >= call.knew.get(key, 0), "older than its reader knew:", call.asked, stock)
            require((stock.on_hand, stock.held) == (row["on_hand"], row["held"]), "read what never was:", stock, row)
            later = self._books.committed.get((key, stock.version + 1), float("inf"))
            require(later >= seconds(moment(stock.as_of)) - 1e-5, "was not the newest then:", stock, later)


def _allocated(told: reservation_pb2.Reservation) -> tuple[tuple[str, str, int], ...]:
    return tuple(
        (part.sku, part.location, part.held + part.confirmed + part.cancelled + part.expired)
        for part in told.allocations
    )


def _content(answer: Message | Refusal | None) -> bytes:
    if isinstance(answer, Message):
        return answer.SerializeToString(deterministic=True)
    return repr(answer).encode()
