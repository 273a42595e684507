"""Clients that shop as customers do, and record it: what the auditor then judges."""

import asyncio
import random
from collections.abc import Sequence
from itertools import count
from typing import Any

from grpc import aio
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.inventory.v1 import inventory_pb2_grpc

from tests.model.history import Call, Client, End, History, Line

LOCATIONS = ("EAST", "WEST")
OPENING_UNITS = 400
GIVE_UP_SECONDS = 20.0
TTL_SECONDS = (2.0, 8.0)
REMEMBERED_MAX = 50


class Shoppers:
    """`count` callers over as many clients as there are `targets`, on the same few SKUs, until `stop` is set."""

    def __init__(self, history: History, skus: Sequence[str], seed: int) -> None:
        self.history = history
        self._skus = skus
        self._seed = seed
        self._numbers = count()
        self._past: list[tuple[str, list[Line], str, float]] = []
        self.stop = asyncio.Event()

    async def shop(self, inventory: str, reservation: str, callers: int) -> None:
        """One client, and as many callers at once."""
        dice = random.Random(f"{self._seed} {next(self._numbers)}")
        async with Client(self.history, inventory, reservation, give_up=GIVE_UP_SECONDS, dice=dice) as client:
            await asyncio.gather(*(self._caller(client, random.Random(dice.random())) for _ in range(callers)))

    async def _caller(self, client: Client, dice: random.Random) -> None:
        while not self.stop.is_set():
            turn = dice.random()
            if turn < 0.05:
                line = (dice.choice(self._skus), dice.choice(LOCATIONS), dice.randint(20, 60))
                await client.receive(f"in-{self._seed}-{next(self._numbers)}", line)
            elif turn < 0.15:
                sku, at = dice.choice(self._skus), dice.choice(LOCATIONS)
                seen = await client.read(sku, at)
                await client.read(sku, at, min_version=seen.version)
            elif turn < 0.2 and self._past:
                name, lines, mode, ttl = dice.choice(self._past)
                await client.reserve(name, lines, mode, ttl, again=True)
            else:
                await self._order(client, dice)

    async def _order(self, client: Client, dice: random.Random) -> None:
        """A basket, and what becomes of it: paid, paid in part, given back, held longer, or forgotten."""
        name = f"r-{self._seed}-{next(self._numbers)}"
        # Some SKUs are wanted more than others.
        skus = {self._skus[int(dice.random() ** 2 * len(self._skus))] for _ in range(dice.choice([1, 1, 2, 3]))}
        lines = [(sku, dice.choice([*LOCATIONS, ""]), dice.randint(1, 4)) for sku in sorted(skus)]
        mode, ttl = dice.choice(["ALL", "ALL", "ALL", "BEST_EFFORT"]), round(dice.uniform(*TTL_SECONDS), 1)
        held = await client.reserve(name, lines, mode, ttl)
        if held.end is End.UNKNOWN:
            return
        self._past.append((name, lines, mode, ttl))
        del self._past[:-REMEMBERED_MAX]
        if held.outcome == "HELD":
            await self._decide(client, dice, name, held)

    async def _decide(self, client: Client, dice: random.Random, name: str, held: Call) -> None:
        fate = dice.random()
        if fate < 0.05:
            await client.extend(name, "longer", 5)
        if fate < 0.5:
            await client.confirm(name, "paid")
            if fate < 0.1:
                await client.confirm(name, "paid", again=True)
        elif fate < 0.6:
            key, _ = dice.choice(sorted(held.units.items()))
            sku, at = key.split("@")
            await client.confirm(name, "part", [(sku, at, 1)])
            await client.cancel(name, "rest")
        elif fate < 0.8:
            await client.cancel(name, "changed-my-mind")


async def stock_up(history: History, targets: tuple[str, str], skus: Sequence[str], units: int = OPENING_UNITS) -> None:
    """Locations, SKUs, and the units that all begins with. `targets`: of inventory, and of reservation."""
    dice = random.Random(0)
    async with (
        Client(history, *targets, give_up=GIVE_UP_SECONDS, dice=dice) as client,
        aio.insecure_channel(targets[0]) as channel,
    ):
        inventory: Any = inventory_pb2_grpc.InventoryServiceStub(channel)
        for priority, at in enumerate(LOCATIONS):
            location = ip.Location(location=at, name=at.title(), priority=priority)
            await inventory.CreateLocation(ip.CreateLocationRequest(request_id=f"make-{at}", location=location))
        for sku in skus:
            await inventory.CreateSku(ip.CreateSkuRequest(request_id=f"make-{sku}", sku=ip.Sku(sku=sku, name=sku)))
            for at in LOCATIONS:
                await client.receive(f"opening-{sku}-{at}", (sku, at, units))
