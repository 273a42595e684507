"""`python -m tests.model.simulate --seeds 1000 [--start N]`: run seeds, and shrink those that fail.

`--seed N` runs one, `--trace` shows all that happens in it. A failing seed is made smaller: fewer calls, events and
faults that still fail in the same way. It is kept as a test in `test_simulation.py`.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tests.model.sim_plan import Plan, plan
from tests.model.sim_run import Result, simulate
from tests.model.sim_world import Faults

T = TypeVar("T")
SHRINK_RUNS_MAX = 200


def shrink(failing: Plan, runs_max: int = SHRINK_RUNS_MAX) -> Plan:
    """A smaller plan that fails with the same first words, by leaving out ever smaller parts of it."""
    first = simulate(failing)
    words = _kind(first)
    runs = 0

    def still(smaller: Plan) -> bool:
        nonlocal runs
        runs += 1
        return runs <= runs_max and _kind(simulate(smaller)) == words

    parts: dict[str, Sequence[Any]] = {
        "operations": failing.operations, "events": failing.events, "faults": sorted(first.fired),
    }  # fmt: skip
    if not still(_plan(failing, parts)):
        return failing
    size = -1
    while size != (size := sum(map(len, parts.values()))):
        for name, some in parts.items():
            others = {**parts}
            parts[name] = _reduce(some, lambda less, of=name, rest=others: still(_plan(failing, {**rest, of: less})))  # type: ignore[misc]
    return _plan(failing, parts)


def _plan(whole: Plan, parts: dict[str, Sequence[Any]]) -> Plan:
    return replace(
        whole,
        operations=tuple(parts["operations"]),
        events=tuple(parts["events"]),
        faults=Faults({}, frozenset(parts["faults"])),
    )


def _kind(result: Result) -> str:
    return result.problems[0].partition(":")[0][:40] if result.problems else ""


def _reduce(parts: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """Delta debugging: leave out halves, quarters and so on, for as long as it goes on failing."""
    left = list(parts)
    size = len(left)
    while size:
        start = 0
        while start < len(left):
            without = left[:start] + left[start + size :]
            if fails(without):
                left = without
            else:
                start += size
        size = min(size // 2, len(left))
    return left


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(prog="python -m tests.model.simulate", description="Simulate seeds.")
    parser.add_argument("--seeds", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--start", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--trace", action="store_true", help="show all that happens in --seed")
    parser.add_argument("--no-shrink", action="store_true", help="leave failing seeds as they are")
    arguments = parser.parse_args()
    seeds = range(arguments.start, arguments.start + arguments.seeds)
    if arguments.seed is not None:
        seeds = range(arguments.seed, arguments.seed + 1)
    sys.exit(_simulate(seeds, trace=arguments.trace and len(seeds) == 1, small=not arguments.no_shrink))


def _simulate(seeds: range, *, trace: bool, small: bool) -> int:
    began = time.perf_counter()
    faults: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    failures: list[int] = []
    for number, seed in enumerate(seeds, start=1):
        planned = plan(seed)
        result = simulate(planned, keep_trace=trace)
        print(*result.lines, sep="\n", end="\n" if result.lines else "")
        faults.update(fault.kind for fault in result.fired)
        faults.update(event.kind for event in result.befell)
        totals.update(calls=result.calls, virtual=round(result.virtual_seconds))
        if result.problems:
            failures.append(seed)
            _show(seed, result, shrink(planned) if small else None)
        if sys.stderr.isatty() or number == len(seeds):
            done = f"{number}/{len(seeds)} seeds, {totals['virtual'] / 3600:.1f} virtual hours, {len(failures)} failed"
            print(f"\r{done}", end="" if number < len(seeds) else "\n", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f"seeds          {len(seeds)} from {seeds.start}")
    print(f"virtual hours  {totals['virtual'] / 3600:.1f} in {seconds:.0f} s, {totals['virtual'] / seconds:.0f} x")
    print(f"calls served   {totals['calls']}")
    print(f"faults         {sum(faults.values())}: {', '.join(f'{n} {kind}' for kind, n in faults.most_common())}")
    print(f"failures       {len(failures)}{': ' if failures else ''}{', '.join(map(str, failures))}")
    return int(bool(failures))


def _show(seed: int, result: Result, smaller: Plan | None) -> None:
    print(f"\nseed {seed}: {len(result.problems)} problems; the first:\n  {result.problems[0][:2000]}")
    if smaller:
        parts: list[tuple[str, Sequence[Any]]] = [
            ("calls", smaller.operations),
            ("events", smaller.events),
            ("faults", sorted(smaller.faults.chosen or ())),
        ]
        for name, some in parts:
            print(f"  {name}:", *some, sep="\n    ")


if __name__ == "__main__":
    main()
