"""What rules see and say: windows against a brute-force count, features by tables, cases that open once."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.analytics import judge as module
from services.analytics.backtest import Trial
from services.analytics.judge import (
    DISTINCT_MAX,
    PARTS,
    Case,
    Comparison,
    Counts,
    Decision,
    Distinct,
    Effect,
    Feature,
    Finding,
    Fired,
    History,
    Judge,
    Kind,
    Policy,
    Rule,
    Signal,
    grow,
)

POLICY = Policy(review_score=50, block_score=100, block_seconds=900)
TIMES = st.floats(min_value=0, max_value=100, allow_nan=False)


def rule(feature: Feature, by: Kind, threshold: float, **more: Any) -> Rule:
    made = Rule(
        f"{feature}-{by}".lower(), 1, feature, by, 60, Comparison.AT_LEAST, threshold, 0, 50, Effect.SCORE, "because"
    )
    return replace(made, **more)


def ask(name: str, at: float = 0, *, units: int = 1, sku: str = "A", held: bool = True, **more: Any) -> Signal:
    """A reservation as it is first seen: customer "c" from device "d" in network "n"."""
    got = units if held else 0
    first = Signal(at, at, name, 1, "c", "d", "n", skus=(sku,), asked=(units,), held=(got,), open=got)
    return first._replace(**more)


def end(name: str, at: float, version: int = 2, **totals: Any) -> Signal:
    return Signal(at, 0, name, version, "c", "d", "n")._replace(**totals)


def last(judge: Judge, signals: list[Signal]) -> list[Finding]:
    """What is found at the last of some signals."""
    found: list[Finding] = []
    for signal in signals:
        found, _ = judge.see(signal)
    return found


@given(st.lists(st.tuples(TIMES, st.integers(-5, 5))), TIMES, st.sampled_from([60.0, 100.0, 600.0]))
def test_a_window_is_a_brute_force_count(events: list[tuple[float, int]], now: float, length: float) -> None:
    """In any order, within the length of a window: what the last PARTS parts hold, to the part."""
    counts = Counts(length)
    for at, amount in events:
        counts.add(at, amount)
    width = length / PARTS
    parts = range(int(now // width) - PARTS + 1, int(now // width) + 1)
    inside = [(at, amount) for at, amount in events if int(at // width) in parts]
    assert counts.total(now) == sum(amount for _, amount in inside)
    if events:
        latest = max(at for at, _ in events)
        assert sum(amount for _, amount in counts.last()) == counts.total(latest)
        for leaves, _ in counts.last():
            assert latest - 1e-6 < leaves <= latest + length + width + 1e-6


@given(st.lists(st.tuples(TIMES, st.sampled_from("abcd"))), TIMES)
def test_different_names_are_a_brute_force_count(events: list[tuple[float, str]], now: float) -> None:
    """A name counts by the last time that it was seen."""
    events = [(at, name) for at, name in events if at <= now]
    distinct = Distinct(60)
    for at, name in events:
        distinct.add(at, name)
    assert distinct.total(now) == len({name for at, name in events if int(at) > int(now) - PARTS})


def test_a_window_forgets_what_is_old_and_stays_small() -> None:
    """A stream that never ends takes no more room than its window; so do names."""
    counts, distinct = Counts(60), Distinct(60)
    for second in range(10_000):
        counts.add(second, 1)
        distinct.add(second, f"n{second}")
    assert counts.total(9_999) == PARTS
    assert len(counts._parts) <= 4 * PARTS
    assert len(distinct._last) <= DISTINCT_MAX


@given(st.lists(st.floats(0, 10), min_size=1, max_size=300), st.floats(0, 100))
def test_a_history_keeps_the_last_values(values: list[float], asked: float) -> None:
    """Its median is that of the last values, and what is at the median is not unusual."""
    history = History(100)
    for value in values:
        history.add(value)
    kept = sorted(values[-100:])
    assert len(history) == len(kept)
    median = kept[len(kept) // 2]
    assert history.z(median) == 0
    assert (history.z(asked) > 0) == (asked > median)


FEATURES: list[tuple[str, Rule, list[Signal], float | None]] = [
    ("holds of the last minute", rule(Feature.HOLDS, Kind.CUSTOMER, 2), [ask("1"), ask("2", 59)], 2),
    ("not those before", rule(Feature.HOLDS, Kind.CUSTOMER, 2), [ask("1"), ask("2", 61)], None),
    ("not what was refused", rule(Feature.HOLDS, Kind.DEVICE, 2), [ask("1", held=False), ask("2")], None),
    ("holds of a SKU by anyone", rule(Feature.HOLDS, Kind.SKU, 2), [ask("1"), ask("2", customer="other")], 2),
    (
        "refusals in a row",
        rule(Feature.REFUSALS_IN_ROW, Kind.NETWORK, 2),
        [ask("1", held=False), ask("2", held=False)],
        2,
    ),
    (
        "a hold ends the row",
        rule(Feature.REFUSALS_IN_ROW, Kind.NETWORK, 2),
        [ask("1", held=False), ask("2"), ask("3", held=False)],
        None,
    ),
    ("units that are open", rule(Feature.UNITS_OPEN, Kind.CUSTOMER, 9), [ask("1", units=4), ask("2", units=5)], 9),
    (
        "not those that were sold",
        rule(Feature.UNITS_OPEN, Kind.CUSTOMER, 9),
        [ask("1", units=4), end("1", 1, sold=4), ask("2", units=5)],
        None,
    ),
    (
        "the share that came to nothing",
        rule(Feature.LOST_SHARE, Kind.CUSTOMER, 0.5, samples_min=2),
        [ask("1"), ask("2"), end("1", 1, sold=1), end("2", 2, expired=1)],
        0.5,
    ),
    (
        "says nothing of too few",
        rule(Feature.LOST_SHARE, Kind.CUSTOMER, 0.5, samples_min=2),
        [ask("1"), end("1", 1, cancelled=1)],
        None,
    ),
    ("the same basket", rule(Feature.SAME_BASKET, Kind.CUSTOMER, 2), [ask("1"), ask("2", held=False)], 2),
    ("another basket", rule(Feature.SAME_BASKET, Kind.CUSTOMER, 2), [ask("1"), ask("2", units=2)], None),
    (
        "sold and come back",
        rule(Feature.UNDONE, Kind.CUSTOMER, 1),
        [ask("1"), end("1", 1, sold=1), Signal(50, 50, "1", 0, "", "", "", returned=1)],
        1,
    ),
    (
        "come back much later",
        rule(Feature.UNDONE, Kind.CUSTOMER, 1),
        [ask("1"), end("1", 1, sold=1), Signal(90, 90, "1", 0, "", "", "", returned=1)],
        None,
    ),
    (
        "sold in part and the rest cancelled",
        rule(Feature.UNDONE, Kind.CUSTOMER, 1),
        [ask("1", units=2), end("1", 1, sold=1, open=1), end("1", 2, 3, sold=1, cancelled=1)],
        1,
    ),
    (
        "customers of a network on a SKU",
        rule(Feature.CUSTOMERS_ON_SKU, Kind.NETWORK, 2),
        [ask("1"), ask("2", customer="other")],
        2,
    ),
    (
        "one customer twice",
        rule(Feature.CUSTOMERS_ON_SKU, Kind.NETWORK, 2),
        [ask("1"), ask("2")],
        None,
    ),
    ("units of a SKU", rule(Feature.UNITS_OF_SKU, Kind.CUSTOMER, 5), [ask("1", units=2), ask("2", units=3)], 5),
    (
        "units of another SKU",
        rule(Feature.UNITS_OF_SKU, Kind.CUSTOMER, 5),
        [ask("1", units=2, sku="B"), ask("2", units=3)],
        None,
    ),
    (
        "far more than usual",
        rule(Feature.QUANTITY_Z, Kind.CUSTOMER, 5),
        [*(ask(str(n), units=n % 3 + 1, customer=f"c{n}") for n in range(40)), ask("big", units=1_000)],
        8.9658,
    ),
    (
        "a first order far above others",
        rule(Feature.FIRST_ORDER_Z, Kind.CUSTOMER, 5),
        [*(ask(str(n), units=n % 3 + 1) for n in range(40)), ask("big", units=1_000)._replace(first=True)],
        8.9658,
    ),
    (
        "a second order",
        rule(Feature.FIRST_ORDER_Z, Kind.CUSTOMER, 5),
        [*(ask(str(n), units=n % 3 + 1) for n in range(40)), ask("big", units=1_000)],
        None,
    ),
    (
        "below a threshold",
        rule(Feature.HOLDS, Kind.CUSTOMER, 1, comparison=Comparison.AT_MOST),
        [ask("1")],
        1,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "signals", "value"), [case[1:] for case in FEATURES], ids=[case[0] for case in FEATURES]
)
def test_a_feature(rule: Rule, signals: list[Signal], value: float | None) -> None:
    """What is found at the last signal, and with which number; None for nothing."""
    found = last(Judge([rule], POLICY), signals)
    assert [one.fired[0].value for one in found] == ([] if value is None else [pytest.approx(value, abs=1e-3)])
    assert all(one.fired[0].reservation_id == signals[-1].reservation_id for one in found)


def test_scores_add_up_by_subject() -> None:
    """Two rules on one network block it; its customer, of whom one says something, is reviewed."""
    rules = [
        rule(Feature.HOLDS, Kind.NETWORK, 1),
        rule(Feature.CUSTOMERS_ON_SKU, Kind.NETWORK, 1),
        rule(Feature.HOLDS, Kind.CUSTOMER, 1),
        rule(Feature.HOLDS, Kind.DEVICE, 1, score=49),
    ]
    found = {one.subject: (one.decision, one.score) for one in last(Judge(rules, POLICY), [ask("1")])}
    assert found == {"n": (Decision.BLOCK, 100), "c": (Decision.REVIEW, 50)}


def test_a_reservation_without_customer_stands_for_itself_and_is_never_blocked() -> None:
    """An unusual order is seen whoever made it; it has no past."""
    usual = [ask(str(n), units=n % 3 + 1, customer=f"c{n}") for n in range(40)]
    rules = [rule(Feature.QUANTITY_Z, Kind.CUSTOMER, 5, score=100), rule(Feature.HOLDS, Kind.CUSTOMER, 2)]
    (found,) = last(Judge(rules, POLICY), [*usual, ask("1", customer=""), ask("big", units=1_000, customer="")])
    assert (found.subject, found.decision) == ("order:big", Decision.REVIEW)


def test_a_repeat_changes_nothing() -> None:
    """Events come at least once."""
    judge = Judge([rule(Feature.HOLDS, Kind.CUSTOMER, 2)], POLICY)
    assert not last(judge, [ask("1"), ask("1")])
    assert last(judge, [ask("2")])


def test_a_shadow_stands_in_for_the_deciding_version() -> None:
    """It finds what it alone would have opened, and nothing where the deciding one finds the same."""
    active = rule(Feature.HOLDS, Kind.CUSTOMER, 3)
    judge = Judge([active, replace(active, version=2, threshold=2, shadow=True)], POLICY)
    assert not last(judge, [ask("1")])
    (found,) = last(judge, [ask("2")])
    assert found.shadow
    assert found.fired[0].version == 2
    (found,) = last(judge, [ask("3")])
    assert not found.shadow


def test_limits_on_holds_are_told_from_half_of_them_on() -> None:
    """With the parts that leave the window one after the other."""
    judge = Judge([rule(Feature.HOLDS, Kind.CUSTOMER, 4, effect=Effect.LIMIT, score=0)], POLICY)
    assert judge.see(ask("1", 0.5)) == ([], [])
    _, (usage,) = judge.see(ask("2", 10.5))
    assert (usage.subject, usage.parts, usage.reservation_ids) == ("c", ((60, 1), (70, 1)), ("1", "2"))


def test_units_of_a_limit_are_told_from_the_first() -> None:
    """The next order may be for all of it."""
    judge = Judge([rule(Feature.UNITS_OF_SKU, Kind.CUSTOMER, 10, effect=Effect.LIMIT, score=0)], POLICY)
    _, (usage,) = judge.see(ask("1", 0.5))
    assert (usage.sku, usage.parts) == ("A", ((60, 1),))


def test_a_late_order_makes_no_usage_smaller() -> None:
    """What is told is of the latest order, whichever came last; which are in it is said."""
    judge = Judge([rule(Feature.HOLDS, Kind.CUSTOMER, 4, effect=Effect.LIMIT, score=0)], POLICY)
    for name in "123":
        judge.see(ask(name, 50))
    _, (usage,) = judge.see(ask("late", 5))
    assert usage.parts == ((65, 1), (110, 3))
    assert usage.reservation_ids == ("1", "2", "3", "late")


def test_what_is_forgotten_holds_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of a reservation that is let go of are taken back, or they would count for ever."""
    monkeypatch.setattr(module, "OPEN_MAX", 2)
    judge = Judge([rule(Feature.UNITS_OPEN, Kind.CUSTOMER, 4)], POLICY)
    assert not last(judge, [ask(str(n), n, units=2) for n in range(1)])
    (found,) = last(judge, [ask(str(n), n, units=2) for n in range(1, 50)])
    assert found.fired[0].value == 4


def test_a_forgotten_subject_has_nothing_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holds were forgotten with it; less than nothing open would make room for as much."""
    monkeypatch.setattr(module, "SUBJECTS_MAX", 2)
    judge = Judge([rule(Feature.UNITS_OPEN, Kind.CUSTOMER, 4)], POLICY)
    last(judge, [ask("1", units=3), *(ask(name, customer=name) for name in "xy"), end("1", 1, expired=3)])
    (found,) = last(judge, [ask("2", 2, units=4)])
    assert found.fired[0].value == 4


@pytest.mark.parametrize(
    ("feature", "ended"),
    [
        (Feature.LOST_SHARE, [end("1", 1, expired=2)]),
        (Feature.UNDONE, [end("1", 1, sold=2), end("1", 2, 3, sold=2, cancelled=1)]),
        (Feature.UNDONE, [end("1", 1, sold=2), Signal(2, 2, "1", 0, "", "", "", returned=1)]),
    ],
    ids=["lost", "cancelled", "returned"],
)
def test_the_units_of_a_case_are_those_asked_for(feature: Feature, ended: list[Signal]) -> None:
    """Whenever it is opened: with the order, or with what has become of it."""
    asked = ask("1", units=5, held=False)._replace(held=(2,), open=2)
    (found,) = last(Judge([rule(feature, Kind.CUSTOMER, 1)], POLICY), [asked, *ended])
    assert found.units == 5


def test_one_window_does_not_crowd_out_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order of many SKUs floods the windows by SKU, and those alone."""
    monkeypatch.setattr(module, "SUBJECTS_MAX", 10)
    rules = [rule(Feature.HOLDS, Kind.CUSTOMER, 2), rule(Feature.UNITS_OF_SKU, Kind.CUSTOMER, 9)]
    judge = Judge(rules, POLICY)
    judge.see(ask("1"))
    many = ask("2", 1, customer="other")._replace(skus=tuple(map(str, range(50))), asked=(1,) * 50, held=(1,) * 50)
    judge.see(many)
    (found,) = last(judge, [ask("3", 2)])
    assert found.fired[0].value == 2


def finding(at: float, decision: Decision = Decision.REVIEW, value: float = 1) -> Finding:
    fired = Fired("r", 1, value, 1, 50, "", "", f"at {at}")
    return Finding("c", Kind.CUSTOMER, decision, 50, (fired,), at, f"at {at}", 2, shadow=False)


@given(st.lists(st.tuples(TIMES, st.booleans(), st.integers(1, 9)), min_size=1))
def test_a_case_opens_once_and_grows(found: list[tuple[float, bool, int]]) -> None:
    """Whatever is found: one case, its highest numbers, and a block only when no block is running."""
    case: Case | None = None
    blocked_until = -1.0
    for at, is_block, value in found:
        before = case
        case, blocks = grow(case, finding(at, Decision.BLOCK if is_block else Decision.REVIEW, value), POLICY)
        assert before is None or before is case
        assert blocks == (is_block and at >= blocked_until)
        if blocks:
            blocked_until = at + POLICY.block_seconds
    assert case is not None
    assert case.rules["r", 1].value == max(value for _, _, value in found)
    assert case.decision is (Decision.BLOCK if any(is_block for _, is_block, _ in found) else Decision.REVIEW)
    assert case.updated_at == max(at for at, _, _ in found)


def test_sales_that_a_block_would_have_cost_are_worth_what_was_sold() -> None:
    """Of an order that was held in part: its value is that of all that was asked for."""
    trial = Trial([rule(Feature.HOLDS, Kind.NETWORK, 1, score=100)], POLICY, 0)
    part = ask("2", 1, units=4)._replace(held=(2,), open=2, currency_code="GBP", value_micros=400)
    for signal in (ask("1"), part, end("2", 2, sold=2)):
        trial.see(signal)
    outcome = trial.outcome()
    assert (outcome.sales_blocked, outcome.units_blocked, outcome.value_blocked) == (1, 2, {"GBP": 200})
