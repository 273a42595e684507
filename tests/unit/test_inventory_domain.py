"""Inventory's transitions: every state of a hold against every action, and plans that add up."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import example, given
from hypothesis import strategies as st

from services.inventory import domain, requests
from services.inventory.domain import ChangeLine, HoldChange, HoldLine, HoldRequest, HoldRow, Kind, Mode, Shelf, Stock
from shared.refusal import Refusal

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER, EARLIER = NOW + timedelta(hours=1), NOW - timedelta(hours=1)


def row(held: int = 0, committed: int = 0, released: int = 0, expired: int = 0, until: datetime = LATER) -> HoldRow:
    quantity = held + committed + released + expired
    return HoldRow("A", "h", 0, "MAIN", quantity, held, committed, released, expired, b"", EARLIER, until)


STATES: dict[str, list[HoldRow]] = {
    "unknown": [],
    "held": [row(held=5)],
    "due": [row(held=5, until=NOW)],
    "part sold": [row(held=3, committed=2)],
    "sold": [row(committed=5)],
    "released": [row(released=5)],
    "expired": [row(expired=5, until=EARLIER)],
    "refused": [row()],
}
ACTIONS: dict[str, Any] = {
    "take all": lambda rows: sum(units for _, units in domain.take(change(0), rows, NOW)),
    "take 4": lambda rows: sum(units for _, units in domain.take(change(4), rows, NOW)),
    "extend": lambda rows: domain.extend(change(0, ttl_hours=2), rows, NOW) - NOW,
    "expire": lambda rows: sum(units for _, units in domain.expire(change(0), rows, NOW)),
}
TWO_HOURS = timedelta(hours=2)
EXPECTED: dict[str, list[object]] = {
    "unknown": ["HOLD_NOT_FOUND"] * 4,
    "held": [5, 4, TWO_HOURS, "HOLD_NOT_EXPIRED"],
    "due": ["HOLD_EXPIRED", "HOLD_EXPIRED", "HOLD_EXPIRED", 5],
    "part sold": [3, "HOLD_QUANTITY_EXCEEDED", TWO_HOURS, "HOLD_NOT_EXPIRED"],
    "sold": ["HOLD_CLOSED", "HOLD_CLOSED", "HOLD_CLOSED", 0],
    "released": ["HOLD_CLOSED", "HOLD_CLOSED", "HOLD_CLOSED", 0],
    "expired": ["HOLD_EXPIRED", "HOLD_EXPIRED", "HOLD_EXPIRED", 0],
    "refused": ["HOLD_CLOSED", "HOLD_CLOSED", "HOLD_CLOSED", 0],
}


def change(units: int, ttl_hours: int = 0) -> HoldChange:
    line = ChangeLine("A", "", units)
    return HoldChange("h", "r", Kind.COMMIT, (line,), b"", timedelta(hours=ttl_hours))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("state", STATES)
def test_every_state_against_every_action(state: str, action: str) -> None:
    """Each pair either moves a known number of units or is refused by name."""
    expected = EXPECTED[state][list(ACTIONS).index(action)]
    if isinstance(expected, str):
        with pytest.raises(Refusal) as refused:
            ACTIONS[action](STATES[state])
        assert refused.value.reason == expected
    else:
        assert ACTIONS[action](STATES[state]) == expected


def test_a_hold_of_which_anything_expired_is_expired_whole() -> None:
    """The other SKU's units are still held, yet nothing of it can be sold."""
    with pytest.raises(Refusal) as refused:
        domain.take(change(0), [row(expired=1), row(held=5)], NOW)
    assert refused.value.reason == "HOLD_EXPIRED"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([("A", "X", 0)], "HOLD_CLOSED"),
        ([("A", "X", 0), ("B", "", 0)], "HOLD_CLOSED"),
        ([("A", "W", 0)], "HOLD_NOT_FOUND"),
        ([("A", "W", 1)], "HOLD_NOT_FOUND"),
        ([("A", "W", 0), ("A", "Y", 2)], "HOLD_NOT_FOUND"),
        ([("A", "X", 1)], "HOLD_QUANTITY_EXCEEDED"),
        ([("A", "X", 0), ("A", "Y", 2)], [("Y", 2)]),
        ([("A", "", 0), ("B", "", 0)], [("Y", 3)]),
        ([("A", "Y", 0), ("A", "Y", 0)], [("Y", 3)]),
    ],
)
def test_a_change_takes_something_and_where_it_says(
    lines: list[tuple[str, str, int]], expected: str | list[tuple[str, int]]
) -> None:
    """A at X and B are sold, three A are held at Y, and W never had any."""
    rows = [
        replace(row(committed=2), location="X"),
        replace(row(held=3), slot=1, location="Y"),
        replace(row(committed=1), sku="B", location="Y"),
    ]
    asked = HoldChange("h", "r", Kind.COMMIT, tuple(ChangeLine(*line) for line in lines), b"")
    rows = [one for one in rows if one.sku in asked.skus]
    if isinstance(expected, str):
        with pytest.raises(Refusal) as refused:
            domain.take(asked, rows, NOW)
        assert refused.value.reason == expected
    else:
        assert [(taken.location, units) for taken, units in domain.take(asked, rows, NOW)] == expected


def test_a_refusal_names_one_sku_of_many() -> None:
    """It travels in a trailer, which gRPC bounds at 8 KiB."""
    rows = [replace(row(committed=1), sku=f"A-SKU-WITH-A-LONG-CODE-{n:04}") for n in range(1_000)]
    asked = replace(change(0), lines=tuple(ChangeLine(one.sku, "", 0) for one in rows))
    with pytest.raises(Refusal) as refused:
        domain.take(asked, rows, NOW)
    assert refused.value.reason == "HOLD_CLOSED"
    assert refused.value.message == "h no longer holds anything of A-SKU-WITH-A-LONG-CODE-0000 and 999 more"
    with pytest.raises(Refusal) as masked:
        requests.mask(FieldMask(paths=["x" * 100_000]), ("name",))
    assert masked.value.metadata == {"field": "x" * 64}


def test_only_what_is_held_is_extended() -> None:
    """A row of which nothing is left keeps its time."""
    sold, held = row(committed=5), row(held=5)
    until = LATER + TWO_HOURS
    assert [one.expires_at for one in domain.after_extending([sold, held], until)] == [LATER, until]


def test_a_hold_lives_seven_days() -> None:
    """Counted from its placing, however often it is extended."""
    with pytest.raises(Refusal) as refused:
        domain.extend(change(0, ttl_hours=7 * 24), [row(held=1)], NOW)
    assert refused.value.reason == "HOLD_LIFE_EXCEEDED"


places = st.sampled_from(["X", "Y", "Z", ""])
hold_lines = st.lists(
    st.builds(HoldLine, st.sampled_from(["A", "B"]), places, st.integers(1, 20), st.just(0)), min_size=1, max_size=6
)
shelves = st.dictionaries(
    st.tuples(st.sampled_from(["A", "B"]), st.sampled_from(["X", "Y", "Z"])),
    st.tuples(st.integers(0, 25), st.integers(0, 5), st.integers(0, 5)),
)


@given(hold_lines, shelves, st.sampled_from(Mode))
def test_a_plan_never_takes_what_is_not_there(
    asked: list[HoldLine], counters: dict[domain.Key, tuple[int, int, int]], mode: Mode
) -> None:
    """Allocations fit each key and each SKU's demand; ALL is all or nothing; booking them never fails."""
    stocks = {
        key: Stock(*key, on_hand=on_hand, safety_stock=safety, backorder_limit=backorders)
        for key, (on_hand, safety, backorders) in counters.items()
    }
    shelf = Shelf(dict(stocks))
    sources = {sku: sorted(at for s, at in stocks if s == sku) for sku in ("A", "B")}
    request = HoldRequest("h", domain.sum_lines(asked), mode, timedelta(minutes=1), b"")
    plan = domain.plan(request, shelf, sources)
    for part in plan.allocations:
        assert 0 < part.quantity <= stocks[part.sku, part.location].available
        shelf.move((part.sku, part.location), Kind.HOLD, held=part.quantity)
    taken = sum(part.quantity for part in plan.allocations)
    demand = sum(line.quantity for line in asked)
    assert taken == demand if not plan.short_lines else taken < demand
    assert mode is not Mode.ALL or taken in {0, demand}
    if not plan.allocations:
        assert plan.short_lines


@given(
    st.dictionaries(places, st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1),
    st.dictionaries(st.sampled_from("XYZ"), st.integers(0, 12)),
)
@example({"X": (10, 2), "": (5, 3)}, {"X": 10})
def test_least_is_refused_only_when_some_minimum_cannot_be_met(
    asked: dict[str, tuple[int, int]], free: dict[str, int]
) -> None:
    """Lines with a location leave an open line of their SKU its minimum; each line gets at least its own."""
    lines = [HoldLine("A", place, units, min(least, units)) for place, (units, least) in asked.items()]
    shelf = Shelf({("A", at): Stock("A", at, on_hand=units) for at, units in free.items()})
    request = HoldRequest("h", domain.sum_lines(lines), Mode.MINIMUM, timedelta(minutes=1), b"")
    plan = domain.plan(request, shelf, {"A": sorted(free)})
    to_be_had = free | {"": sum(free.values())}
    least_of_all = sum(line.minimum for line in lines)
    may = least_of_all <= to_be_had[""] and all(to_be_had.get(line.location, 0) >= line.minimum for line in lines)
    got = {part.location: part.quantity for part in plan.allocations}
    assert bool(got) == (may and any(to_be_had.get(line.location) for line in lines))
    if got:
        assert all(got.get(line.location, 0) >= line.minimum for line in lines if line.location)
        assert sum(got.values()) >= least_of_all


@given(st.lists(st.tuples(st.sampled_from(domain.Change), st.integers(0, 15), st.booleans()), max_size=30))
def test_no_sequence_of_adjustments_breaks_the_promise(steps: list[tuple[domain.Change, int, bool]]) -> None:
    """After any of them 0 <= held <= on hand + backorder limit + short, and movements add up."""
    shelf = Shelf({("A", "X"): Stock("A", "X", on_hand=10, held=6), ("A", "Y"): Stock("A", "Y")})
    for kind, quantity, allow_short in steps:
        ask = domain.Adjustment(
            "r", "A", "X", kind, quantity, to_location="Y", allow_short=allow_short, backorder_limit=quantity
        )
        before = dict(shelf.stocks)
        try:
            domain.adjust(shelf, ask)
        except Refusal:
            assert shelf.stocks == before
        for stock in shelf.stocks.values():
            assert 0 <= stock.held <= stock.on_hand + stock.backorder_limit + stock.short
            assert stock.short >= 0
    for key, start in ((("A", "X"), 10), (("A", "Y"), 0)):
        moved = [movement for movement in shelf.movements if movement.after.key == key]
        assert shelf.stocks[key].on_hand == start + sum(movement.on_hand_delta for movement in moved)
        assert [movement.after.version for movement in moved] == list(range(1, len(moved) + 1))
