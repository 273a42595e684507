"""Ledgers made up for analytics: movements as inventory's events would tell them."""

import random
from datetime import datetime

from services.analytics.domain import Movement


def movements(dice: random.Random, skus: list[str], times: list[datetime]) -> list[Movement]:
    """A movement at each time, of a random SKU: goods come in, are held, sold, released and returned."""
    state = dict.fromkeys(skus, (0, 0, 0))
    made = []
    for time in sorted(times):
        sku = dice.choice(skus)
        version, on_hand, held = state[sku]
        kinds = ["RECEIVE", "RETURN"]
        kinds += ["HOLD"] * 3 if on_hand > held else []
        kinds += ["COMMIT", "COMMIT", "RELEASE"] if held else []
        kind = dice.choice(kinds)
        units = dice.randint(1, {"HOLD": on_hand - held, "COMMIT": held, "RELEASE": held}.get(kind, 20))
        on_hand_delta = {"RECEIVE": units, "RETURN": units, "COMMIT": -units}.get(kind, 0)
        held_delta = {"HOLD": units, "COMMIT": -units, "RELEASE": -units}.get(kind, 0)
        state[sku] = (version + 1, on_hand + on_hand_delta, held + held_delta)
        made.append(
            Movement(
                sku, "MAIN", *state[sku][:1], time, kind, on_hand_delta, held_delta, *state[sku][1:], 0, 0, 0,
                "h" if held_delta else "", "r", "", time,
            )
        )  # fmt: skip
    return made
