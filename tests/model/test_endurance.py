"""Whatever is not as it was is named."""

from collections import Counter

import pytest

from tests.model.endurance import OVER, Calm, Outcome, Phase, Weight


def calm(rows: int = 0, **weight: float) -> Calm:
    values = {"memory_mb": 100.0, "files": 50, "threads": 20, "tasks": 30} | weight
    return Calm({"inventory-0": Weight(**values)}, {"inventory: outbox": rows}, 20)  # type: ignore[arg-type]


def test_work_may_pass_on_to_another_pod() -> None:
    """What a pod holds is compared with the most that one of its service held."""
    light, heavy = Weight(100, 40, 9, 33), Weight(280, 53, 9, 66)
    before = Calm({"analytics-0": light, "analytics-1": heavy}, {}, 20)
    after = Calm({"analytics-0": heavy, "analytics-1": light}, {}, 20)
    assert Outcome(phases(), [before, after]).problems() == []


def phases(over: int = 900, again: int = 100, latency: float = 0.1) -> list[Phase]:
    return [
        Phase("capacity", 1, 50, Counter(OK=100), [0.1]),
        Phase("at capacity", 10, 500, Counter(OK=1000), [0.1]),
        Phase("over", 10, 1500, Counter(OK=over, RESOURCE_EXHAUSTED=2000), [1.0]),
        Phase("again", 1, 50, Counter(OK=again), [latency]),
    ]


@pytest.mark.parametrize(
    ("loads", "last", "what"),
    [
        (phases(), calm(), ""),
        (phases(over=400), calm(), f"goodput with {OVER} times the callers"),
        (phases(again=70), calm(), "afterwards"),
        (phases(latency=0.2), calm(), "afterwards"),
        (phases(), calm(rows=1), "inventory: outbox: 1 rows"),
        (phases(), calm(memory_mb=140), "inventory-0: 140 MB"),
        (phases(), calm(files=60), "inventory-0: 60 files"),
        (phases(), calm(threads=30), "inventory-0: 30 threads"),
        (phases(), calm(tasks=40), "inventory-0: 40 tasks"),
    ],
    ids=lambda value: value or "as it was" if isinstance(value, str) else "",
)
def test_what_is_not_as_it_was(loads: list[Phase], last: Calm, what: str) -> None:
    """Goodput, capacity, latency, rows, memory, files, threads and tasks."""
    problems = Outcome(loads, [calm(), last]).problems()
    assert len(problems) == bool(what)
    assert all(problem.startswith(what) for problem in problems), problems
