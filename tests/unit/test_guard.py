"""What the guard lets in, by tables and against a plain count."""

import time as clock
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.analytics import judge as analytics
from services.reservation import guard as module
from services.reservation.domain import Ask, Held, Line, Mode
from services.reservation.guard import Block, Guard, Heartbeat, Limit, Usage
from services.reservation.subjects import Identity, Kind, Subjects
from shared.refusal import Refusal

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
OLD_ALONE, SUBJECTS = Subjects({"k1": bytes(16)}), Subjects({"k2": bytes(range(16)), "k1": bytes(16)})
MINUTE = timedelta(minutes=1)
HOLDS = Limit("holds", of_units=False, by=Kind.CUSTOMER, window=MINUTE, most=3)
UNITS = Limit("units", of_units=True, by=Kind.DEVICE, window=MINUTE, most=10)
number = count()


def ask(customer: str = "ann", *lines: tuple[str, int], at: float | None = None, **more: str) -> Ask:
    """An order, made at so many seconds after NOW if this is said."""
    time = None if at is None else after(at)
    asked = tuple(Line(sku, "", units) for sku, units in lines or [("A", 1)])
    return Ask(f"r{next(number)}", customer, asked, Mode.ALL, MINUTE, b"", time, **more)


def held(asked: Ask) -> Held:
    return Held(tuple((line.sku, "MAIN", line.quantity) for line in asked.lines), (), NOW, NOW, replayed=False)


def made(*limits: Limit, subjects: Subjects = SUBJECTS, **more: bool) -> Guard:
    guard = Guard(subjects, **more)
    guard.apply(Heartbeat(NOW, limits), NOW)
    return guard


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def admit(guard: Guard, asked: list[Ask], now: datetime = NOW) -> list[Refusal | None]:
    """Judge a batch of which inventory holds all that is let in."""
    refused = guard.judge(asked, now)
    guard.settle({one.reservation_id: held(one) for one in asked if one.reservation_id not in refused})
    return [refused.get(one.reservation_id) for one in asked]


def hashed(kind: Kind, value: str, subjects: Subjects = SUBJECTS) -> str:
    return subjects.hashes(Identity(kind, value))[0]


def usage(parts: tuple[tuple[datetime, int], ...], *reservation_ids: str, subject: str = "") -> Usage:
    return Usage("holds", subject or hashed(Kind.CUSTOMER, "ann"), "", parts, frozenset(reservation_ids))


def blocked(start: float, end: float, subject: str = "") -> Block:
    return Block(subject or hashed(Kind.CUSTOMER, "ann"), after(start), after(end))


@pytest.mark.parametrize(
    ("now", "at", "refused"),
    [(-1, None, False), (0, None, True), (9.999, None, True), (10, None, False), (10, 9.999, True), (10, 0, True),
     (10, -1, False), (5, -1, True)],
    ids=str,
)  # fmt: skip
def test_a_block_holds_from_its_start_up_to_its_end(now: float, at: float | None, refused: bool) -> None:
    """By the order's time, and by when it comes, whatever it says."""
    guard = made()
    guard.apply(blocked(0, 10), NOW)
    (refusal,) = admit(guard, [ask(at=at)], after(now))
    assert (refusal is not None) == refused
    if refusal:
        assert refusal.reason == "SUBJECT_BLOCKED"
        assert refusal.metadata == {"subject_kind": "CUSTOMER", "retry_time": "2026-01-01T12:00:10Z"}
        assert "ann" not in refusal.message


@pytest.mark.parametrize(
    ("kind", "value"), [(Kind.CUSTOMER, "ann"), (Kind.DEVICE, "tab"), (Kind.NETWORK, "203.0.113.0/24")], ids=str
)
@pytest.mark.parametrize("subjects", [OLD_ALONE, SUBJECTS], ids=["old key", "new key"])
def test_any_subject_is_blocked_under_any_key(kind: Kind, value: str, subjects: Subjects) -> None:
    """The block was made of a hash of either key; others are not blocked with it."""
    guard = made()
    guard.apply(blocked(0, 10, hashed(kind, value, subjects)), NOW)
    one = ask("ann", device_id="tab", ip_address="203.0.113.77")
    other = ask("bob", device_id="desk", ip_address="203.0.114.77")
    assert [refusal is not None for refusal in admit(guard, [one, other, ask("")])] == [True, False, False]


def test_a_block_is_replaced_and_lifted() -> None:
    """The last word counts; a block that ends before it starts is none."""
    guard = made()
    for block, refused in (
        (blocked(0, 10), True),
        (blocked(5, 10), False),
        (blocked(0, 9), True),
        (blocked(0, 0), False),
    ):
        guard.apply(block, NOW)
        assert (admit(guard, [ask()])[0] is not None) == refused


def test_a_burst_in_one_batch_stops_at_the_limit() -> None:
    """300 at once: three are let in; when they leave the window is said."""
    outcomes = admit(made(HOLDS), [ask() for _ in range(300)])
    assert [outcome is None for outcome in outcomes] == [True] * 3 + [False] * 297
    refusal = outcomes[-1]
    assert refusal
    assert refusal.reason == "LIMIT_REACHED"
    assert refusal.metadata == {
        "rule_id": "holds", "subject_kind": "CUSTOMER", "limit": "3", "window_seconds": "60",
        "retry_time": "2026-01-01T12:01:00Z",
    }  # fmt: skip


def test_what_was_not_held_is_taken_back() -> None:
    """Refused by inventory, held in part, and known before: only what was newly held counts."""
    guard = made(HOLDS, UNITS)
    asked = [ask("ann", ("A", 5), device_id="tab"), ask("ann", ("A", 5), device_id="tab")]
    assert not guard.judge(asked, NOW)
    assert guard.judge([late := ask("ann", ("A", 1), device_id="tab")], NOW)[late.reservation_id].metadata["sku"] == "A"
    short = Held((("A", "MAIN", 2),), (), NOW, NOW, replayed=False)
    guard.settle({asked[0].reservation_id: short, asked[1].reservation_id: Held((), (), NOW, NOW, replayed=False)})
    assert admit(guard, [ask("ann", ("A", 8), device_id="tab"), ask("bob", ("A", 1), device_id="tab")])[0] is None
    assert admit(guard, [ask(), ask()])[1]
    assert admit(guard, [ask("bob", ("A", 1), device_id="tab")])[0]


def test_units_are_summed_by_sku_and_what_never_fits_is_said() -> None:
    """Lines of one SKU are one demand; a demand above the limit has no time at which it fits."""
    guard = made(UNITS)
    assert admit(guard, [ask("", ("A", 5), ("B", 10), ("A", 5), device_id="tab")]) == [None]
    (above,) = admit(guard, [ask("", ("C", 6), ("C", 5), device_id="desk")])
    assert above
    assert above.metadata == {
        "rule_id": "units", "subject_kind": "DEVICE", "limit": "10", "window_seconds": "60", "sku": "C",
    }  # fmt: skip
    assert admit(guard, [ask("", ("C", 10), device_id="desk"), ask("", ("A", 1), device_id="tab")])[0] is None


@pytest.mark.parametrize("subjects", [OLD_ALONE, SUBJECTS], ids=["old key", "new key"])
def test_usage_counts_until_it_leaves(subjects: Subjects) -> None:
    """What analytics tells, part by part; a part that leaves now is gone."""
    guard = made(HOLDS)
    parts = ((after(20), 1), (after(40), 2))
    guard.apply(usage(parts, subject=hashed(Kind.CUSTOMER, "ann", subjects)), NOW)
    (refusal,) = admit(guard, [ask()], after(19.999))
    assert refusal
    assert refusal.metadata["retry_time"] == "2026-01-01T12:00:20Z"
    assert admit(guard, [ask(), ask()], after(20))[0] is None
    assert admit(guard, [ask()], after(39))[0]
    guard.apply(usage((), subject=hashed(Kind.CUSTOMER, "ann", subjects)), NOW)
    assert admit(guard, [ask()], after(39)) == [None]


def test_admissions_that_analytics_tells_of_are_not_counted_twice() -> None:
    """Whichever of them it tells of, in any order: partitions are judged one after the other."""
    guard = made(HOLDS)
    asked = [ask(at=0), ask(at=1)]
    assert admit(guard, asked, after(2)) == [None, None]
    guard.apply(usage(((NOW + MINUTE, 1),), asked[1].reservation_id), NOW)
    assert [refusal is None for refusal in admit(guard, [ask(), ask()], after(2))] == [True, False]


class Pod:
    """A guard with one limit, and the judge that it is told by, which is so many seconds behind."""

    def __init__(self, limit: Limit, behind: float = 1) -> None:
        self.guard = made(limit)
        self._limit = limit
        self._behind = timedelta(seconds=behind)
        feature = analytics.Feature.UNITS_OF_SKU if limit.of_units else analytics.Feature.HOLDS
        rule = analytics.Rule(
            limit.rule_id, 1, feature, analytics.Kind(limit.by), limit.window.total_seconds(),
            analytics.Comparison.AT_LEAST, limit.most, 0, 0, analytics.Effect.LIMIT, "because",
        )  # fmt: skip
        self._judge = analytics.Judge([rule], analytics.Policy(50, 100, 900))
        self._waiting: list[tuple[datetime, analytics.Signal]] = []

    def admit(self, asked: list[Ask], now: datetime) -> list[bool]:
        """Who is let in, of a batch, after what analytics has come to by now was told."""
        told = [signal for at, signal in self._waiting if at <= now - self._behind]
        del self._waiting[: len(told)]
        for signal in told:
            for usage in self._judge.see(signal)[1]:
                parts = tuple((datetime.fromtimestamp(leaves, UTC), used) for leaves, used in usage.parts)
                heard = Usage(usage.rule_id, usage.subject, usage.sku, parts, frozenset(usage.reservation_ids))
                self.guard.apply(heard, now)
        self.guard.apply(Heartbeat(now - self._behind, (self._limit,)), now)
        let_in = [refusal is None for refusal in admit(self.guard, asked, now)]
        for one, is_in in zip(asked, let_in, strict=True):
            if is_in:
                at, units = min(one.order_time or now, now).timestamp(), one.lines[0].quantity
                who = hashed(Kind.CUSTOMER, one.customer_id)
                signal = analytics.Signal(
                    at, at, one.reservation_id, 1, who, "", "", ("A",), (units,), (units,), units
                )  # fmt: skip
                self._waiting.append((now, signal))
        return let_in


OF_CUSTOMER = {
    "holds": Limit("holds", of_units=False, by=Kind.CUSTOMER, window=MINUTE, most=30),
    "units": Limit("units", of_units=True, by=Kind.CUSTOMER, window=MINUTE, most=30),
}


@pytest.mark.parametrize("limit", OF_CUSTOMER.values(), ids=OF_CUSTOMER)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 20)), max_size=20), st.integers(0, 15))
def test_told_or_not_a_limit_is_kept(limit: Limit, bursts: list[tuple[int, int, int]], behind: int) -> None:
    """Bursts with pauses between them, against a plain count: no window has more, but for the part of it in which
    what is told leaves; and who is refused would have made it more.
    """
    pod, part = Pod(limit, behind), limit.window / analytics.PARTS
    had: list[tuple[datetime, int]] = []
    now = NOW
    for pause, orders, units in bursts:
        now += timedelta(seconds=pause)
        asked = [ask("ann", ("A", units)) for _ in range(orders)]
        amount = units if limit.of_units else 1
        for is_in in pod.admit(asked, now):
            surely, maybe = (
                sum(used for at, used in had if at > now - length) for length in (limit.window - part, limit.window)
            )
            if is_in:
                assert surely + amount <= limit.most
                had.append((now, amount))
            else:
                assert maybe + amount > limit.most


def test_what_analytics_does_not_tell_counts_as_long_as_the_window() -> None:
    """Holds below half of a limit, which it has judged and keeps to itself, and a burst after them."""
    pod = Pod(OF_CUSTOMER["holds"])
    assert all(pod.admit([ask() for _ in range(14)], NOW))
    assert pod.admit([ask() for _ in range(40)], after(15)).count(True) == 16
    assert pod.admit([ask() for _ in range(40)], after(30)).count(True) == 0
    assert pod.admit([ask() for _ in range(40)], after(61)).count(True) == 14


def test_an_order_for_all_that_is_left_is_refused_when_it_is_not_left() -> None:
    """Of a limit on units a day; another pod has heard of the first order as well."""
    limit = Limit("units", of_units=True, by=Kind.CUSTOMER, window=timedelta(days=1), most=10)
    pod = Pod(limit)
    assert pod.admit([ask("ann", ("A", 4))], NOW) == [True]
    assert pod.admit([ask("ann", ("A", 10)), ask("ann", ("A", 6))], after(15)) == [False, True]
    assert pod.admit([ask("ann", ("A", 1))], after(30)) == [False]
    other = made(limit)
    for heard in pod.guard._usages.values():
        other.apply(heard, NOW)
    assert admit(other, [ask("ann", ("A", 10))], after(30))[0]


def test_orders_of_the_future_among_others_keep_to_the_limit() -> None:
    """Every fortieth says that it is of nearly five minutes later."""
    pod = Pod(OF_CUSTOMER["holds"])
    let_in = [pod.admit([ask(at=n / 10 + 290 * (n % 40 == 39))], after(n / 10)) for n in range(580)]
    assert let_in.count([True]) == 30


def test_more_admissions_than_a_usage_names_count_once() -> None:
    """Those of a time that the usage reaches are in it, once analytics has come past them."""
    assert module.PARTS == analytics.PARTS
    pod = Pod(Limit("holds", of_units=False, by=Kind.CUSTOMER, window=timedelta(hours=1), most=1_000))
    assert [pod.admit([ask() for _ in range(100)], after(n)).count(True) for n in range(5)] == [100] * 5
    assert pod.admit([ask() for _ in range(600)], after(20)).count(True) == 500
    assert pod.admit([ask()], after(59)) == [False]


@pytest.mark.parametrize("subjects", [SUBJECTS, OLD_ALONE], ids=["new key", "old key"])
def test_a_usage_under_another_key_has_none_of_what_was_admitted(subjects: Subjects) -> None:
    """What it reaches was admitted under its key: by pods that do not have the new one yet."""
    guard = made(HOLDS)
    admit(guard, [ask(), ask()])
    who = hashed(Kind.CUSTOMER, "ann", subjects)
    guard.apply(usage(((after(55 + 60), 1),), subject=who), after(56))
    guard.apply(Heartbeat(after(56), (HOLDS,)), after(56))
    assert (admit(guard, [ask()], after(57))[0] is None) == (subjects is SUBJECTS)


@given(st.lists(st.integers(0, 7), max_size=20), st.integers(0, 12))
def test_no_pod_passes_a_limit_whatever_analytics_tells_when(told: list[int], late: int) -> None:
    """Of one pod's holds analytics tells any, in any order and late; the pod lets in exactly the limit."""
    guard = made(Limit("holds", of_units=False, by=Kind.CUSTOMER, window=MINUTE, most=8))
    let_in: list[Ask] = []
    known: set[str] = set()
    for step, which in enumerate([*told, *range(8), *range(8)]):
        now = after(step)
        asked = ask()
        if admit(guard, [asked], now) == [None]:
            let_in.append(asked)
        if step >= late and which < len(let_in):
            known.add(let_in[which].reservation_id)
            guard.apply(usage(((NOW + 2 * MINUTE, len(known)),), *known), now)
            guard.apply(Heartbeat(NOW, guard._limits), now)
    assert len(let_in) == 8


def test_a_retry_counts_once() -> None:
    """The same reservation asked for again takes no room of its own."""
    guard = made(HOLDS)
    asked = ask()
    assert admit(guard, [asked]) == [None]
    assert not guard.judge([asked], NOW)
    guard.settle({})
    assert [refusal is None for refusal in admit(guard, [ask(), ask(), ask()])] == [True, True, False]


@pytest.mark.parametrize("ahead", [290, 86_400])
def test_an_order_from_the_future_is_of_now(ahead: float) -> None:
    """It neither escapes a block nor finds an empty window, nor do those after it."""
    guard = made(HOLDS)
    asked = [ask(at=ahead * (n % 3 == 1)) for n in range(12)]
    assert [refusal is None for refusal in admit(guard, asked)] == [True] * 3 + [False] * 9
    assert admit(guard, [ask()])[0]
    guard.apply(blocked(0, 10, hashed(Kind.CUSTOMER, "bob")), NOW)
    assert admit(guard, [ask("bob", at=ahead)])[0]


def test_own_admissions_count_until_analytics_has_told_or_they_are_too_old() -> None:
    """When it has come OWN_SECONDS past them and tells of a later time; while it does not, as long as every window."""
    guard = made(HOLDS)
    admit(guard, [ask() for _ in range(3)])
    later = after(module.OWN_SECONDS)
    guard.apply(usage(((later + MINUTE, 1),)), later)
    guard.apply(Heartbeat(later - timedelta(seconds=1), (HOLDS,)), later)
    assert admit(guard, [ask()], later)[0]
    guard.apply(Heartbeat(later, (HOLDS,)), later)
    assert admit(guard, [ask()], later) == [None]
    guard.apply(usage(()), later)
    assert admit(guard, [ask()], after(59.999))[0]
    assert admit(guard, [ask()], after(60)) == [None]
    assert len(guard._own[hashed(Kind.CUSTOMER, "ann"), ""].admissions) == len(guard._recent) == 2


@pytest.mark.parametrize(
    ("closed", "seconds", "reason"), [(True, 30, None), (True, 30.1, "ENFORCEMENT_STALE"), (False, 30.1, None)]
)
def test_a_closed_guard_refuses_when_it_is_stale(closed: bool, seconds: float, reason: str | None) -> None:
    """30 s after the last heartbeat's time; an open one goes on."""
    (refusal,) = admit(made(closed=closed), [ask()], after(seconds))
    assert (refusal.reason if refusal else None) == reason


def test_a_closed_guard_refuses_before_the_first_heartbeat_and_an_open_one_enforces_what_it_knows() -> None:
    """Nothing was heard yet, or nothing any more."""
    assert Guard(SUBJECTS, closed=True).judge([asked := ask()], NOW)[asked.reservation_id].metadata == {}
    guard = Guard(SUBJECTS)
    assert admit(guard, [ask()]) == [None]
    guard.apply(blocked(0, 1e6), NOW)
    (refusal,) = admit(guard, [ask()], NOW + timedelta(days=1))
    assert refusal
    assert refusal.reason == "SUBJECT_BLOCKED"


def test_every_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended goes first, then the oldest; what is new stays."""
    for name in ("BLOCKS_MAX", "USAGES_MAX", "ADMISSIONS_MAX"):
        monkeypatch.setattr(module, name, 20)
    guard = made(Limit("all", of_units=False, by=Kind.CUSTOMER, window=MINUTE, most=1))
    guard.apply(blocked(0, 100, hashed(Kind.CUSTOMER, "first")), NOW)
    for n in range(19):
        guard.apply(blocked(-2, -1, f"customer:k2:{n}"), NOW)
    guard.apply(blocked(0, 100, hashed(Kind.CUSTOMER, "last")), NOW)
    assert len(guard._blocks) == 2
    assert all(admit(guard, [ask("first"), ask("last")]))
    for n in range(100):
        guard.apply(blocked(0, 100, f"customer:k2:{n}"), NOW)
        guard.apply(Usage("all", f"customer:k2:{n}", "", ((NOW + MINUTE, 1),), frozenset()), NOW)
        admit(guard, [ask(f"c{n}")])
    assert len(guard._blocks) <= 20
    assert len(guard._usages) <= 20
    assert len(guard._own) == len(guard._recent) <= 21
    assert admit(guard, [ask("c99")])[0]


def test_nothing_stays_counted_but_what_is_recent() -> None:
    """After a while without orders no counter is left."""
    guard = made(HOLDS, UNITS)
    admit(guard, [ask("ann", ("A", 2), ("B", 1), device_id="tab") for _ in range(5)])
    assert len(guard._own) == 3
    guard.judge([], NOW + MINUTE)
    assert not guard._own
    assert not guard._recent


WHO = st.sampled_from(["ann", "bob"])
ASKED = st.tuples(WHO, st.integers(1, 4), st.sampled_from("AB"), st.integers(0, 8), st.sampled_from(["held", "short"]))


@given(st.lists(st.lists(ASKED, min_size=1, max_size=6), max_size=12), st.integers(1, 8))
def test_no_window_has_more_than_the_limit_and_what_fits_is_let_in(
    batches: list[list[tuple[str, int, str, int, str]]], most: int
) -> None:
    """Against a plain count of what was held, whatever the order of the orders' times, within OWN_SECONDS."""
    window = timedelta(seconds=4)
    guard = made(
        Limit("holds", of_units=False, by=Kind.CUSTOMER, window=window, most=most),
        Limit("units", of_units=True, by=Kind.CUSTOMER, window=window, most=most + 2),
    )
    kept: list[tuple[str, str, datetime, int]] = []
    for number, batch in enumerate(batches):
        now = after(8 + number / 1000)
        asked = [ask(who, (sku, units), at=at) for who, units, sku, at, _ in batch]
        refused = guard.judge(asked, now)
        counted = list(kept)  # what the batch itself admits counts, until it is settled
        for one in asked:
            time = one.order_time or now
            fits = most > sum(
                who == one.customer_id and at + window > time for who, _, at, _ in counted
            ) and most + 2 >= one.lines[0].quantity + sum(
                units
                for who, sku, at, units in counted
                if (who, sku) == (one.customer_id, one.lines[0].sku) and at + window > time
            )
            assert (one.reservation_id not in refused) == fits
            if fits:
                counted.append((one.customer_id, one.lines[0].sku, time, one.lines[0].quantity))
        answers: dict[str, Held] = {}
        for one, (*_, fate) in zip(asked, batch, strict=True):
            if one.reservation_id not in refused and fate == "held":
                answers[one.reservation_id] = held(one)
                kept.append((one.customer_id, one.lines[0].sku, one.order_time or now, one.lines[0].quantity))
        guard.settle(answers)
    for start in {time for _, _, time, _ in kept}:
        inside = [one for one in kept if start <= one[2] < start + window]
        assert max(Counter(who for who, *_ in inside).values(), default=0) <= most
        units = Counter[tuple[str, str]]()
        for who, sku, _, quantity in inside:
            units[who, sku] += quantity
        assert max(units.values(), default=0) <= most + 2


def test_a_judgement_costs_microseconds() -> None:
    """With blocks, limits of every kind and orders of three lines: of its own CPU, whatever else the machine does."""
    limits = [Limit(kind, of_units=kind is Kind.DEVICE, by=kind, window=MINUTE, most=10**6) for kind in Kind]
    guard = made(*limits)
    for n in range(1000):
        guard.apply(blocked(0, 1e6, f"customer:k2:{n}"), NOW)
    batches = [
        [ask(f"c{n}", ("A", 1), ("B", 1), ("C", 1), device_id=f"d{n}", ip_address=f"203.0.{n}.7") for n in range(50)]
        for _ in range(40)
    ]
    costs = []
    for turn, batch in enumerate(batches):
        answers = {one.reservation_id: held(one) for one in batch}
        began = clock.thread_time()
        guard.judge(batch, after(turn / 1000))
        guard.settle(answers)
        costs.append((clock.thread_time() - began) / len(batch))
    assert sorted(costs)[len(costs) // 2] < 50e-6
