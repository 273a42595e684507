"""Alerts open once; quiet hours end; nobody is tried without rest. For all values, rules and times."""

from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.analytics import alerting
from services.analytics.alerting import (
    ABOVE,
    BELOW,
    Kind,
    OpenAlert,
    Outcome,
    Patience,
    QuietHours,
    Reading,
    Rule,
    Severity,
    Subscription,
    Transition,
    judge,
    settle,
)

LEVELS = st.floats(0, 100, allow_nan=False)
VALUES = st.lists(st.floats(0, 200, allow_nan=False), max_size=60)
ZONES = st.sampled_from(["UTC", "Europe/London", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
TIMES = st.times().map(lambda one: one.replace(second=0, microsecond=0))
PATIENCE = Patience(2, 900, 5, 30)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    kind = draw(st.sampled_from(sorted(BELOW | ABOVE)))
    low, high = sorted((draw(LEVELS), draw(LEVELS)))
    opens, closes = (low, high) if kind in BELOW else (high, low)
    return Rule("rule", kind, Severity.WARNING, opens, closes)


def steps(rule: Rule, values: list[float]) -> list[tuple[Transition, float]]:
    """What `judge` makes of values one after another, when each step is carried out."""
    alert: OpenAlert | None = None
    made = []
    for value in values:
        known = {("rule", "key"): alert} if alert else {}
        for change in judge([rule], [Reading("key", {rule.kind: value})], known):
            made.append((change.transition, value))
            version = alert.version + 1 if alert else 1
            alert = None if change.transition is Transition.CLOSED else OpenAlert("alert", version, value)
    return made


@given(rules(), VALUES)
def test_an_alert_never_opens_twice(rule: Rule, values: list[float]) -> None:
    """Between two openings there is a closing, and each is on its own side of its own level."""
    is_open = False
    for transition, value in steps(rule, values):
        assert is_open == (transition is not Transition.OPENED)
        is_open = transition is not Transition.CLOSED
        assert rule.opens(value) if transition is Transition.OPENED else True
        assert rule.closes(value) == (transition is Transition.CLOSED)
    if values:
        assert not (rule.opens(values[-1]) and not is_open)
        assert not (rule.closes(values[-1]) and is_open)


@given(rules(), LEVELS, LEVELS)
def test_no_value_opens_and_closes(rule: Rule, value: float, other: float) -> None:
    """What lies between the levels changes nothing, however it moves there."""
    assert not (rule.opens(value) and rule.closes(value))
    low, high = sorted((rule.open_level, rule.close_level))
    between = [min(max(low, one), high) for one in (value, other)]
    assert steps(rule, between) == []


@given(rules(), VALUES)
def test_updates_are_few(rule: Rule, values: list[float]) -> None:
    """An open alert is told of again only when its value has halved, or doubled, since it was last told."""
    told = 0.0
    for transition, value in steps(rule, values):
        if transition is Transition.UPDATED:
            assert value <= told / 2 if rule.kind in BELOW else value >= told * 2
        told = value


def stock(available: float, category: str = "a/b", *, active: bool = True) -> Reading:
    values = {Kind.STOCK_OUT: available, Kind.AVAILABLE_BELOW: available}
    return Reading("S@M", values, "S", "M", "Lantern", category, active)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (stock(1), {("out", "CLOSED"), ("back", "OPENED")}),
        (stock(0), set()),
        (stock(5, active=False), {("out", "CLOSED")}),
        (stock(5, "elsewhere"), {("out", "CLOSED")}),
    ],
)
def test_goods_are_back_when_a_stock_out_ends(reading: Reading, expected: set[tuple[str, str]]) -> None:
    """And not when the SKU is archived, or when the rule does not concern it any more."""
    known = [
        Rule("out", Kind.STOCK_OUT, Severity.CRITICAL, 1, 1, category="a"),
        Rule("back", Kind.BACK_IN_STOCK, Severity.INFO),
        Rule("back-in-c", Kind.BACK_IN_STOCK, Severity.INFO, category="c"),
    ]
    made = judge(known, [reading], {("out", "S@M"): OpenAlert("alert", 1, 0)})
    assert {(change.rule.rule_id, str(change.transition)) for change in made} == expected


@given(TIMES, TIMES, ZONES, st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1)))  # noqa: DTZ001 - of hypothesis
def test_quiet_hours_end_and_end_later(start: time, end: time, zone: str, naive: datetime) -> None:
    """Whatever the clock does that day: their end is after now, less than 26 hours away, and none when outside."""
    now = naive.replace(tzinfo=UTC)
    until = QuietHours(start, end, zone).until(now)
    if until is None:
        return
    assert now < until <= now + timedelta(hours=26)


@pytest.mark.parametrize(
    ("now", "until"),
    [
        ("2026-03-28T23:00", "2026-03-29T05:00"),  # the night in which an hour is skipped: 06:00 is summer time
        ("2026-10-24T22:30", "2026-10-25T06:00"),  # the night with an hour twice
        ("2026-01-10T21:59", None),
        ("2026-01-10T22:00", "2026-01-11T06:00"),
        ("2026-01-10T06:00", None),
    ],
)
def test_quiet_hours_in_london(now: str, until: str | None) -> None:
    """From ten in the evening to six in the morning of the people who live there."""
    quiet = QuietHours(time(22), time(6), "Europe/London")
    expected = datetime.fromisoformat(f"{until}+00:00") if until else None
    assert quiet.until(datetime.fromisoformat(f"{now}+00:00")) == expected


def test_an_end_that_comes_twice_is_not_in_the_past() -> None:
    """At ten past one for the second time, until half past one for the second time."""
    quiet = QuietHours(time(22), time(1, 30), "Europe/London")
    assert quiet.until(datetime(2026, 10, 25, 1, 10, tzinfo=UTC)) == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_backoff_is_bounded(attempts: int, chance: float) -> None:
    """Never more than the most, never more than doubling from the first allows."""
    seconds = alerting.backoff(attempts, chance, PATIENCE)
    assert 0 <= seconds <= min(900, 2 * 2.0 ** min(attempts - 1, 100))


@pytest.mark.parametrize(
    ("outcome", "attempts", "failures", "state", "left", "spared"),
    [
        (Outcome(), 1, 4, "SENT", 0, 0),
        (Outcome("TIMEOUT"), 1, 0, "PENDING", 1, 0),
        (Outcome("TIMEOUT"), 1, 4, "PENDING", 5, 30),
        (Outcome("TIMEOUT"), 8, 0, "DEAD", 1, 0),
        (Outcome("HTTP_404", 404, permanent=True), 1, 4, "DEAD", 0, 0),
        (Outcome("HTTP_429", 429, retry_after_seconds=77), 1, 0, "PENDING", 1, 77),
        (Outcome("HTTP_503", 503, retry_after_seconds=10**9), 1, 0, "PENDING", 1, 900),
    ],
)
def test_what_an_outcome_comes_to(
    outcome: Outcome, attempts: int, failures: int, state: str, left: int, spared: float
) -> None:
    """Sent, again or dead; failures in a row; and how long the target is left alone."""
    settled = settle(outcome, attempts, 8, failures, 1.0, PATIENCE)
    assert (settled.state, settled.failures, settled.spare_seconds) == (state, left, spared)
    if state == "PENDING":
        assert settled.again_seconds >= max(2, min(outcome.retry_after_seconds or 0, 900))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, True),
        ({"kinds": frozenset({"LAG"})}, False),
        ({"severity_min": Severity.CRITICAL}, False),
        ({"sku_prefixes": ("X", "LA")}, True),
        ({"categories": ("garden",)}, True),
        ({"categories": ("gar", "garden/lights/x")}, False),
        ({"locations": ("MAIN", "NORTH"), "categories": ("garden/lights",)}, True),
        ({"locations": ("NORTH",)}, False),
    ],
)
def test_who_is_told(wanted: dict[str, Any], expected: bool) -> None:
    """Filters are joined by "and", what is in one of them by "or"."""
    alert = {
        "kind": "STOCK_OUT", "severity": "WARNING", "sku": "LAMP", "category": "garden/lights", "location": "MAIN",
    }  # fmt: skip
    assert replace(Subscription("s", "t"), **wanted).wants(alert) is expected
    system = {"kind": "LAG", "severity": "CRITICAL", "sku": "", "category": "", "location": ""}
    assert Subscription("s", "t", categories=("garden",)).wants(system) is False


@given(st.datetimes(datetime(1980, 1, 1), datetime(2100, 1, 1)), st.integers(60, 31 * 86_400))  # noqa: DTZ001 - as above
def test_a_period_ends_within_its_length(naive: datetime, seconds: int) -> None:
    """After now, and at a whole multiple of the period."""
    now, period = naive.replace(tzinfo=UTC), timedelta(seconds=seconds)
    end = alerting.period_end(now, period)
    assert now < end <= now + period
    assert end.timestamp() % seconds == 0


def test_messages_are_one_line_and_a_few() -> None:
    """A name with a line break does not make a second header, and templates take what they are given."""
    alert = {
        "alert_id": "a1", "version": 2, "kind": "AVAILABLE_BELOW", "severity": "WARNING", "key": "S@M", "sku": "S",
        "location": "M", "name": "Lan\r\ntern", "category": "c", "value": 4.0, "open_level": 10.0,
        "details": {"why": "$sku"}, "updated_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    subject, body = alerting.render(alert, "OPENED")
    assert subject == "[WARNING] S@M: 4 available, below 10 (OPENED)"
    assert "why: $sku" in body
    assert alerting.render(alert, "OPENED", "$name is low", "$$5 ${value}/$level") == ("Lan tern is low", "$5 4/10")


@pytest.mark.parametrize(("template", "bad"), [("$sku", False), ("$$ ${key}", False), ("$", True), ("$price", True)])
def test_templates_are_checked(template: str, bad: bool) -> None:
    """Only the placeholders that there are."""
    assert bool(alerting.bad_placeholder(template)) is bad


def test_a_digest_is_bounded() -> None:
    """So many lines, and how many there are beyond them."""
    subject, body = alerting.digest([f"line {n}" for n in range(201)])
    assert subject == "201 alerts"
    assert body.splitlines()[-1] == "and 1 more"
    assert len(body.splitlines()) == 201
