"""The capacity model: its arithmetic, and that what it says was measured is what it says."""

import itertools
import json
import math
import operator
from dataclasses import replace
from functools import partial

import pytest

from bench.capacity import (
    KEPT,
    STAGE,
    Costs,
    Demand,
    Line,
    batch_at,
    check,
    fewest,
    harmonic,
    limits,
    mix_of,
    plan,
)

DEMAND = Demand(rate=2_100, mix=STAGE, skus=100_000, skew=1.0, retention_days=90)


@pytest.fixture(scope="module")
def costs() -> Costs:
    """Those that are kept in the repository."""
    return Costs.read(json.loads(KEPT.read_text()))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
def test_a_long_sum_is_as_if_it_were_added_up(exponent: float) -> None:
    """Terms beyond those added one by one are within a thousandth."""
    assert math.isclose(harmonic(50_000, exponent), sum(k**-exponent for k in range(1, 50_001)), rel_tol=1e-3)


def test_a_line_goes_through_its_points_and_never_falls() -> None:
    """Costs that fell with size would be free somewhere."""
    line = Line.through([(1.0, 3.0), (2.0, 5.0), (4.0, 9.0)])
    assert math.isclose(line.fixed, 1.0)
    assert math.isclose(line.each, 2.0)
    falling = Line.through([(1.0, 3.0), (2.0, 2.0)])
    assert falling.each == 0


def test_the_fewest_that_are_enough() -> None:
    assert [fewest(partial(operator.le, least)) for least in (1, 2, 3, 1_000)] == [1, 2, 3, 1_000]


def test_a_pod_that_gets_more_gathers_more(costs: Costs) -> None:
    """Up to where it cannot keep up at all."""
    sizes = [batch_at(costs, rate) for rate in (1, 100, 500, 1_000)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert batch_at(costs, 1 / costs.batch_seconds.each) == math.inf


def test_more_takes_more(costs: Costs) -> None:
    """Of everything, from one machine to a million requests a second and a billion SKUs."""
    plans = [
        plan(costs, replace(DEMAND, rate=rate, skus=skus))
        for rate, skus in ((2_100, 10**5), (10**5, 10**7), (10**6, 10**9))
    ]
    for less, more in itertools.pairwise(plans):
        assert more.reservation_pods > less.reservation_pods
        assert more.inventory_pods > less.inventory_pods
        assert more.database_nodes >= less.database_nodes
        assert more.partitions >= less.partitions
        assert more.disk_bytes > less.disk_bytes
    assert plans[0].database_nodes == 1


def test_the_first_to_break_is_named_first(costs: Costs) -> None:
    """And where all ask for one SKU, its row breaks earlier than where each asks for another."""
    found = limits(costs, DEMAND)
    assert [limit.rate for limit in found] == sorted(limit.rate for limit in found)
    row = "the row of the SKU most asked for"
    even, skewed = (
        next(limit.rate for limit in limits(costs, replace(DEMAND, skew=skew)) if limit.what == row) for skew in (0, 2)
    )
    assert skewed < even


def test_what_was_measured_is_predicted_within_a_fifth() -> None:
    """Points that no cost was fitted to."""
    seen = check(json.loads(KEPT.read_text()))
    assert len(seen) == 3
    for one in seen:
        assert abs(one.off) <= 0.2, one


@pytest.mark.parametrize(
    ("text", "complaint"), [("availability=0.5", "add up"), ("buy=1", "no kind"), ("reserve=2,cancel=-1", "add up")]
)
def test_a_mix_that_is_none_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        mix_of(text)
