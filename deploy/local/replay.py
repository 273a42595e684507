"""Sends orders to the services as customers would, and then reads the databases to see what is true."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import asyncpg
import grpc
from holdfast.inventory.v1 import inventory_pb2
from holdfast.reservation.v1 import reservation_pb2

from deploy.local.orders import Book, Order
from shared.client import Holdfast
from shared.refusal import Refusal

LOCATION = "MAIN"
CURRENCY = "GBP"
EVENTS_SECONDS_MAX = 60
STOPPED = ("SUBJECT_BLOCKED", "LIMIT_REACHED")

SOLD = "SELECT sku, sum(confirmed)::bigint AS sold, sum(held)::bigint AS held FROM allocation GROUP BY sku"
EXPIRED = "SELECT coalesce(sum(expired), 0)::bigint FROM allocation"
ON_HAND = "SELECT sku, sum(on_hand)::bigint AS on_hand FROM stock GROUP BY sku"
COMMITTED = "SELECT sku, sum(committed)::bigint AS committed FROM hold GROUP BY sku"
UNSENT = "SELECT coalesce(sum(cardinality(keys)), 0)::bigint FROM outbox"
UNSENT_MOVEMENTS = "SELECT coalesce(sum(cardinality(versions)), 0)::bigint FROM movement_outbox"
# Counters against the ledger and the open holds, each key for itself.
DRIFT = """
SELECT coalesce(sum(abs(stock.on_hand - coalesce(ledger.on_hand, 0)) + abs(stock.held - coalesce(ledger.held, 0))
                    + abs(stock.held - coalesce(open.held, 0))), 0)::bigint
FROM stock
LEFT JOIN (SELECT sku, location, sum(on_hand_delta) AS on_hand, sum(held_delta) AS held
           FROM movement GROUP BY sku, location) AS ledger USING (sku, location)
LEFT JOIN (SELECT sku, location, sum(held) AS held FROM hold GROUP BY sku, location) AS open
  USING (sku, location)
"""


@dataclass(slots=True)
class Tally:
    """What the replay asked for and was answered."""

    orders: int = 0
    held: int = 0
    confirmed: int = 0
    refused: int = 0
    stopped: int = 0
    returned_units: int = 0
    corrections: int = 0
    refused_corrections: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    latencies: list[float] = field(default_factory=list)
    received: Counter[str] = field(default_factory=Counter)
    seconds: float = 0


@dataclass(frozen=True, slots=True)
class Truth:
    """What the databases say, read past the services."""

    on_hand_total: int
    sold_units: int
    oversold_units: int
    drift_units: int
    expired_units: int
    events_waiting: int


class Replay:
    """One run of a book; `run_id` keeps its ids apart from those of other runs."""

    def __init__(self, holdfast: Holdfast, book: Book, *, run_id: str, opening_stock: int) -> None:
        self._holdfast = holdfast
        self._book = book
        self._run_id = run_id
        self._opening_stock = opening_stock
        self._bought: dict[tuple[str, str], str] = {}
        self.tally = Tally()

    async def load(self) -> None:
        """Make the catalogue, with its opening stock."""
        location = inventory_pb2.Location(location=LOCATION, name="Main warehouse")
        request = inventory_pb2.CreateLocationRequest(request_id=f"{self._run_id}-location", location=location)
        await self._holdfast.inventory.CreateLocation(request)
        rows = [
            inventory_pb2.ImportRow(
                row_number=number,
                sku=inventory_pb2.Sku(
                    sku=code,
                    name=goods.name[:200],
                    unit_price=inventory_pb2.Money(currency_code=CURRENCY, micros=goods.price_micros),
                ),
                location=LOCATION,
                quantity=self._opening_stock,
            )
            for number, (code, goods) in enumerate(sorted(self._book.catalogue.items()), 1)
        ]
        answer = await self._holdfast.import_stock(f"{self._run_id}-opening", rows)
        if answer.errors:
            raise RuntimeError(f"the catalogue was refused: {answer.errors[0].message}")
        self.tally.received.update(dict.fromkeys(self._book.catalogue, self._opening_stock))

    async def run(self, *, concurrency: int, done: Callable[[], None]) -> None:
        """Send every order, `concurrency` at a time, in their sequence; `done` is called after each."""
        began = time.monotonic()
        orders = iter(self._book.orders)
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._work(orders, done))
        self.tally.seconds = time.monotonic() - began

    async def _work(self, orders: Iterator[Order], done: Callable[[], None]) -> None:
        for order in orders:
            try:
                await self._send(order)
            except Refusal as refusal:
                if refusal.reason in STOPPED:
                    self.tally.stopped += 1
                else:
                    self.tally.errors[refusal.reason] += 1
            except grpc.aio.AioRpcError as error:
                self.tally.errors[error.code().name] += 1
            self.tally.orders += 1
            done()

    async def _send(self, order: Order) -> None:
        tally, name = self.tally, f"{self._run_id}-{order.invoice}"
        if order.takes:
            lines = [
                reservation_pb2.ReservationLine(
                    sku=code,
                    location=LOCATION,
                    quantity=units,
                    unit_price=reservation_pb2.Money(currency_code=CURRENCY, micros=price_micros),
                )
                for (code, price_micros), units in order.takes.items()
            ]
            began = time.perf_counter()
            answer = await self._holdfast.reserve(
                name, lines, customer_id=order.customer_id, order_time=order.time, country=order.country,
                device_id=order.device_id, ip_address=order.ip_address,
            )  # fmt: skip
            self._called(began)
            if answer.outcome == reservation_pb2.RESERVE_OUTCOME_HELD:
                tally.held += 1
                began = time.perf_counter()
                await self._holdfast.confirm(name, f"{name}-confirm")
                self._called(began)
                tally.confirmed += 1
                self._bought.update({(order.customer_id, code): name for code, _ in order.takes})
            else:
                tally.refused += 1
        for code, units in order.returns.items():
            # What comes back names the customer's last order of it, where there was one.
            bought = self._bought.get((order.customer_id, code), "")
            await self._adjust(
                order, f"{name}-r-{code}", code, inventory_pb2.ADJUSTMENT_REASON_RETURN, units, reference=bought
            )
            tally.returned_units += units
            tally.received[code] += units
        for number, (code, units) in enumerate(order.corrections):
            try:
                await self._adjust(
                    order, f"{name}-c-{number}", code, inventory_pb2.ADJUSTMENT_REASON_COUNT, units, relative=True
                )
            except Refusal as refusal:
                if refusal.reason != "BELOW_HELD":
                    raise
                tally.refused_corrections += 1
            else:
                tally.corrections += 1
                tally.received[code] += units

    async def _adjust(
        self,
        order: Order,
        request_id: str,
        code: str,
        reason: inventory_pb2.AdjustmentReason.ValueType,
        units: int,
        *,
        relative: bool = False,
        reference: str = "",
    ) -> None:
        self.tally.calls += 1
        await self._holdfast.adjust(
            request_id, code, LOCATION, reason, units, relative=relative, occur_time=order.time, reference=reference
        )

    def _called(self, began: float) -> None:
        self.tally.calls += 1
        self.tally.latencies.append(time.perf_counter() - began)


async def look(tally: Tally, inventory_dsn: str, reservation_dsn: str) -> Truth:
    """Read both databases, after their events have gone out (or EVENTS_SECONDS_MAX have passed).

    Oversold is what was sold or is held beyond what this replay put on the shelf. Drift is every unit
    by which counters, ledger, holds, reservations and the replay's own sums disagree.
    """
    inventory = await asyncpg.connect(inventory_dsn)
    reservation = await asyncpg.connect(reservation_dsn)
    try:
        waiting = await _events_waiting({inventory: (UNSENT, UNSENT_MOVEMENTS), reservation: (UNSENT,)})
        sold = {row["sku"]: (row["sold"], row["held"]) for row in await reservation.fetch(SOLD)}
        on_hand = {row["sku"]: row["on_hand"] for row in await inventory.fetch(ON_HAND)}
        committed = {row["sku"]: row["committed"] for row in await inventory.fetch(COMMITTED)}
        drift = await inventory.fetchval(DRIFT)
        expired = await reservation.fetchval(EXPIRED)
    finally:
        await inventory.close()
        await reservation.close()
    oversold = 0
    for sku in tally.received.keys() | on_hand.keys() | sold.keys():
        sold_units, held_units = sold.get(sku, (0, 0))
        oversold += max(0, sold_units + held_units - tally.received[sku])
        drift += abs(tally.received[sku] - sold_units - on_hand.get(sku, 0))
        drift += abs(committed.get(sku, 0) - sold_units)
    return Truth(
        on_hand_total=sum(on_hand.values()),
        sold_units=sum(units for units, _ in sold.values()),
        oversold_units=oversold,
        drift_units=drift,
        expired_units=expired,
        events_waiting=waiting,
    )


async def _events_waiting(asked: dict["asyncpg.Connection[asyncpg.Record]", tuple[str, ...]]) -> int:
    deadline = time.monotonic() + EVENTS_SECONDS_MAX
    while True:
        counts = [await database.fetchval(count) for database, counts in asked.items() for count in counts]
        if not sum(counts) or time.monotonic() > deadline:
            return sum(counts)
        await asyncio.sleep(0.1)
