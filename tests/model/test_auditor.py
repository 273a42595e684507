"""The auditor is content with what is right, and names what is wrong: each kind of wrong is planted once."""

from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from services.inventory.commands import Commands
from shared.database import Database
from tests.integration.goods import hold, put
from tests.model import auditor
from tests.model.history import Call, End

KEY = ("A", "MAIN")


def row(version: int, at: float, kind: str, on_hand: int, held: int, **more: Any) -> dict[str, Any]:
    """A movement of A at MAIN."""
    return {
        "sku": "A", "location": "MAIN", "version": version, "kind": kind,
        "recorded_at": datetime.fromtimestamp(at, UTC), "on_hand": on_hand, "held": held,
        "safety_stock": 0, "backorder_limit": 0, "hold_id": "", "request_id": "",
    } | more  # fmt: skip


def moved(version: int, at: float, name: str, units: int, held: int) -> dict[str, Any]:
    of = {"hold_id": name, "request_id": name, "on_hand_delta": 0, "held_delta": units}
    return row(version, at, "HOLD", 5, held, **of)


def received(version: int, at: float, request: str, units: int) -> dict[str, Any]:
    return row(version, at, "RECEIVE", units, 0, request_id=request, on_hand_delta=units, held_delta=0)


def reserve(name: str, sent: float, answered: float, asked: int = 1, outcome: str = "HELD") -> Call:
    """A call for units of A; without an outcome nobody was told."""
    call = Call("reserve", name, name, [("A", "MAIN", asked)], "ALL", sent=sent, answered=answered, outcome=outcome)
    call.end = End.OK if outcome else End.UNKNOWN
    call.units = {"A@MAIN": asked} if outcome == "HELD" else {}
    return call


LEDGER = [received(1, 1, "in", 5), moved(2, 2.1, "r1", 1, 1), moved(3, 3.1, "r2", 4, 5)]
STATES = {"r1": "HELD", "r2": "HELD", "no": "REJECTED"}
TRUE = [
    Call("receive", "", "in", [("A", "MAIN", 5)], sent=0.9, answered=1.1, end=End.OK),
    reserve("r1", 2, 2.2),
    reserve("r2", 3, 3.2, 4),
    reserve("no", 4, 4.2, outcome="REJECTED"),
    reserve("lost", 4, 0, outcome=""),
    Call(
        "read",
        "",
        "",
        [("A", "MAIN", 0)],
        sent=2.3,
        answered=2.4,
        end=End.OK,
        units={"on_hand": 5, "held": 1},
        version=2,
    ),
]


def test_a_true_story() -> None:
    """Nothing is wrong with it, and everything was looked at."""
    report = auditor.judge(TRUE, LEDGER, STATES)
    assert report.violations == []
    assert report.looked_at["refusals justified"] == report.looked_at["keys linearizable"] == 1


def changed(number: int, **fields: Any) -> list[Call]:
    """The true story with one call told otherwise."""
    return [call if n != number else _with(call, fields) for n, call in enumerate(TRUE)]


def _with(call: Call, fields: dict[str, Any]) -> Call:
    values = {name: getattr(call, name) for name in Call.__slots__} | fields
    return Call(**values)


@pytest.mark.parametrize(
    ("calls", "ledger", "what"),
    [
        (TRUE, LEDGER[:2], "held is not what was answered"),
        (TRUE, LEDGER[1:], "acknowledged, and lost"),
        (TRUE, [*LEDGER[:2], moved(3, 3.1, "r2", 8, 9)], "held is not what was answered"),
        (TRUE, [*LEDGER, moved(4, 3.5, "no", 1, 6)], "held is not what was answered"),
        (TRUE, [*LEDGER, moved(4, 5, "lost", 2, 7)], "done in part, or more than once"),
        (changed(1, end=End.REFUSED, outcome="", units={}), LEDGER, "refused, and done all the same"),
        (changed(3, sent=2.3, answered=2.4, lines=[("A", "MAIN", 4)]), LEDGER, "refused without a reason"),
        (changed(2, sent=1.2, answered=1.3), LEDGER, "answered before it, and yet after it"),
        (changed(5, version=1), LEDGER, "a read of what never was"),
        (changed(5, min_version=3), LEDGER, "a read older than was asked for"),
        (changed(5, sent=1.5, answered=1.6), LEDGER, "a read of what was not yet"),
    ],
    ids=[
        "a hold is lost", "a receipt is lost", "a hold is there twice", "a rejected one was held",
        "an unknown one is there twice", "a refused one was done", "there was enough", "out of order",
        "numbers that never were", "older than asked", "from the future",
    ],
)  # fmt: skip
def test_a_false_story(calls: list[Call], ledger: list[dict[str, Any]], what: str) -> None:
    """It is named."""
    report = auditor.judge(calls, ledger, STATES)
    assert any(one.startswith(what) for one in report.violations), report.violations


def test_what_is_refused_may_have_been_short_for_a_moment() -> None:
    """One instant of the call is enough, and the whole call counts."""
    brief = [*LEDGER, row(4, 3.3, "RELEASE", 5, 1, hold_id="r2", request_id="c", on_hand_delta=0, held_delta=-4)]
    assert not auditor.judge(changed(3, sent=3.2, answered=4.2), brief, STATES).violations
    late = auditor.judge(changed(3, sent=3.5, answered=4.2), brief, STATES)
    assert [one.split(":")[0] for one in late.violations] == ["refused without a reason"]


def test_how_late_a_hold_expired() -> None:
    """From its time, or from the database's return; being away excuses nothing that was late before."""
    away = [(10.0, 12.0), (12.5, 14.0)]
    assert auditor.late(8, 8.25, away) == 0.25
    assert auditor.late(9.5, 12.25, away) == 0.25
    assert auditor.late(11, 11.5, away) == 0
    assert auditor.late(11, 14.5, away) == 0.5
    assert auditor.late(8.5, 12.25, away) == 3.75


# By the same zone there and back: a cluster takes no arithmetic here that the session's zone might have a say in.
EARLIER = "(recorded_at AT TIME ZONE 'UTC' - interval '1 s') AT TIME ZONE 'UTC'"
LATER = "(recorded_at AT TIME ZONE 'UTC' + interval '1 h') AT TIME ZONE 'UTC'"
BREAK: dict[str, tuple[str, ...]] = {
    "a version is missing or there twice": ("DELETE FROM movement WHERE version = 2",),
    "a movement does not continue": ("UPDATE movement SET held = held + 1 WHERE version = 2",),
    "time ran backwards": (f"UPDATE movement SET recorded_at = {EARLIER} WHERE version = 3",),
    "oversold": ("UPDATE movement SET held = on_hand + 1 WHERE version = 2",),
    "a hold took safety stock": ("UPDATE movement SET safety_stock = on_hand WHERE version = 2",),
    "expired before its time": ("UPDATE movement SET kind = 'EXPIRE' WHERE version = 2",),
    "sold after its time": (f"UPDATE movement SET kind = 'COMMIT', recorded_at = {LATER} WHERE version = 3",),
    "stock is not its last movement": ("UPDATE stock SET on_hand = on_hand + 1",),
    "held is not the sum of the open holds": ("DELETE FROM hold",),
    "held is not what the ledger says was held": ("DELETE FROM hold",),
    "sold is not what the ledger says": ("UPDATE hold SET committed = committed + 1, held = held - 1",),
    "given back is not what": ("UPDATE hold SET released = released + 1, held = held - 1",),
    "expired is not what": ("UPDATE hold SET expired = expired + 1, held = held - 1",),
    "a change of a hold moved stock twice": ("UPDATE movement SET hold_id = 'h1', request_id = 'h1', kind = 'HOLD'",),
}


@pytest.mark.parametrize("what", ["", *BREAK], ids=lambda what: what or "nothing")
async def test_false_books(what: str, inventory_dsn: str, commands: Commands, inventory_db: Database) -> None:
    """Each way in which they may be false, done to true ones by hand."""
    await put(commands, "A", 10)
    for name in ("h1", "h2"):
        await commands.place([hold(name, ("A", "MAIN", 2))])
    async with inventory_db.connection() as connection:
        assert await connection.fetchval("SELECT version FROM stock") == 3
    connection = await asyncpg.connect(inventory_dsn)
    try:
        for statement in BREAK.get(what, ()):
            await connection.execute(statement)
    finally:
        await connection.close()
    violations = (await auditor.books(inventory_dsn)).violations
    assert bool(violations) == bool(what), violations
    assert not what or any(one.startswith(what) for one in violations), violations
