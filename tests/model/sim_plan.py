"""What a seed plans: who asks for what and when, what goes wrong of itself, and how often crossings fail."""

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.sim_world import PODS, Event, Faults

SKUS = ("A", "B", "C")
PLACES = ("X", "Y")
CLIENTS = (1, 2, 4, 8)
CALLS_MAX = (14, 14, 10, 6)
LIVES = (1, 2, 5, 20)
LIFE_SECONDS_MAX = 20
RATES = {
    "lost before": (0, 0.005, 0.03, 0.1),
    "lost after": (0, 0.005, 0.03, 0.1),
    "error": (0, 0, 0.01, 0.05),
    "delay": (0, 0.01, 0.03),
    "twice": (0, 0.05, 0.2),
}
EVENT_KINDS = ("crash", "crash", "pause", "pause", "redis away", "redis wiped", "kafka away", "locks lost",
               "clock jumps", "database away")  # fmt: skip


class Operation(NamedTuple):
    """One call of a client, made again with the same ids until it is answered or `tries` are over.

    `name` is a reservation's or an adjustment's id, `request_id` a change's. `seconds` is a time to live.
    """

    client: int
    pause: float
    kind: str
    name: str
    request_id: str = ""
    lines: tuple[tuple[str, str, int], ...] = ()
    mode: str = "ALL"
    seconds: float = 0
    patience: float = 15
    tries: int = 3


@dataclass(frozen=True)
class Plan:
    """All that decides a run."""

    seed: int
    operations: tuple[Operation, ...]
    events: tuple[Event, ...]
    faults: Faults
    opening_units: int = 8
    poll_seconds: float = 2.0


def plan(seed: int) -> Plan:
    """What the seed plans: swarms differ in what goes wrong, and how often."""
    dice = random.Random(seed)
    operations: list[Operation] = []
    size = dice.randrange(len(CLIENTS))
    tempo = dice.choice((0.002, 0.05, 0.5, 1.5))
    for client in range(CLIENTS[size]):
        operations += _client(dice, client, operations, tempo, CALLS_MAX[size])
    faults = Faults({kind: dice.choice(rates) for kind, rates in RATES.items()})
    events = tuple(
        sorted(
            Event(
                round(dice.uniform(0, max(0.5, 1.5 * tempo * CALLS_MAX[size])), 3),
                *_event(dice),
                round(dice.choice((0.2, 1.5, 6)) * dice.random(), 3),
            )
            for _ in range(dice.choice((0, 1, 3, 8)))
        )
    )
    return Plan(seed, tuple(operations), events, faults, dice.choice((3, 8, 30)))


def idle(hours: float) -> Plan:
    """A shop by night: a call every two minutes, and nothing fails."""
    calls = [Operation(0, 120, "reserve", f"night-{number}", lines=(("A", "", 1),), seconds=10)
             for number in range(int(hours * 30))]  # fmt: skip
    return Plan(0, tuple(calls), (), Faults({}), poll_seconds=10)


def _event(dice: random.Random) -> tuple[str, str]:
    kind = dice.choice(EVENT_KINDS)
    if kind in {"crash", "pause", "clock jumps"}:
        return kind, dice.choice(PODS)
    return kind, dice.choice(("inventory", "reservation")) if kind == "database away" else ""


def _client(dice: random.Random, client: int, others: list[Operation], tempo: float, calls_max: int) -> list[Operation]:
    """A client's calls in their order. It knows what it has reserved, and sometimes repeats anyone's call."""
    made: list[Operation] = []
    mine: list[Operation] = []
    for number in range(dice.randint(1, calls_max)):
        name = f"c{client}-{number}"
        pause = round(dice.expovariate(1 / tempo), 4)
        how: dict[str, Any] = {"patience": dice.choice((0.05, 1.0, 15.0)), "tries": dice.choice((1, 3, 6))}
        what = dice.random()
        if what < 0.35 or not mine:
            asked = _reserve(dice, client, pause, name, how)
            mine.append(asked)
        elif what < 0.65:
            asked = _change(dice, client, pause, dice.choice(mine), f"{name}-r", how)
        elif what < 0.75:
            again = dice.choice([*others, *made])
            asked = again._replace(client=client, pause=pause, **how)
            if again.kind == "reserve" and dice.random() < 0.3:
                asked = asked._replace(lines=_lines(dice))  # another request under the same id
        elif what < 0.88:
            asked = _adjust(dice, client, pause, name, how)
        elif what < 0.92:
            asked = Operation(client, pause, "command", name, lines=(_line(dice),))
        elif what < 0.95:
            asked = Operation(client, pause, "release", dice.choice(mine).name, f"case-{name}")
        else:
            asked = Operation(client, pause, "read", name, lines=(_line(dice), _line(dice)), **how)
        made.append(asked)
        if asked.kind == "receive":
            # Who has written reads what it wrote, at once and from any pod.
            made += [Operation(client, 0.001, "read", f"{name}-{n}", lines=asked.lines * 2, **how) for n in range(2)]
    return made


def _line(dice: random.Random) -> tuple[str, str, int]:
    return dice.choice(SKUS), dice.choice(PLACES), dice.randint(1, 4)


def _lines(dice: random.Random) -> tuple[tuple[str, str, int], ...]:
    """Lines of an order: open or at a place, sometimes with one SKU twice."""
    return tuple(
        (dice.choice(SKUS), dice.choice(("", "", *PLACES)), dice.randint(1, 4))
        for _ in range(dice.choice((1, 1, 2, 3)))
    )


def _reserve(dice: random.Random, client: int, pause: float, name: str, how: dict[str, Any]) -> Operation:
    mode = dice.choice(("ALL", "ALL", "BEST_EFFORT", "MINIMUM"))
    return Operation(client, pause, "reserve", name, "", _lines(dice), mode, dice.choice(LIVES), **how)


def _change(
    dice: random.Random, client: int, pause: float, of: Operation, request_id: str, how: dict[str, Any]
) -> Operation:
    kind = dice.choice(("confirm", "confirm", "cancel", "extend"))
    lines: tuple[tuple[str, str, int], ...] = ()
    if kind != "extend" and dice.random() < 0.6:
        sku, _, units = dice.choice(of.lines)
        lines = ((sku, "", dice.randint(1, units + 1)),)
    return Operation(client, pause, kind, of.name, request_id, lines, "", dice.choice(LIVES), **how)


def _adjust(dice: random.Random, client: int, pause: float, name: str, how: dict[str, Any]) -> Operation:
    kind = dice.choice(("receive", "receive", "receive", "ship", "count", "damage", "transfer", "policy"))
    return Operation(client, pause, kind, name, "", (_line(dice),), dice.choice(("", "short")), **how)
