"""Runs a plan in a world, with clients that call as real ones do, and judges what came of it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
from aiokafka import TopicPartition
from google.protobuf.message import Message
from holdfast.analytics.v1 import events_pb2 as analytics_events
from holdfast.inventory.v1 import events_pb2, inventory_pb2, inventory_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2, reservation_pb2_grpc

from services.inventory import store
from services.inventory.codec import COMMANDS_TOPIC
from services.reservation.codec import VERDICTS_TOPIC
from shared.errors import refusal_of
from shared.outbox import partition_of
from shared.refusal import Refusal
from shared.wire import duration
from tests.model.sim_broker import PARTITIONS
from tests.model.sim_check import Books, Call, check_all, check_quiet
from tests.model.sim_database import Connection, LocalWire
from tests.model.sim_loop import StuckError, run
from tests.model.sim_plan import LIFE_SECONDS_MAX, PLACES, SKUS, Operation, Plan
from tests.model.sim_statements import statement
from tests.model.sim_world import Channel, Event, Fault, World

QUIET_SECONDS = 40  # after which, with nothing failing, nothing is under way any more
RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
REASONS = {
    "receive": inventory_pb2.ADJUSTMENT_REASON_RECEIVE,
    "ship": inventory_pb2.ADJUSTMENT_REASON_SHIP,
    "count": inventory_pb2.ADJUSTMENT_REASON_COUNT,
    "damage": inventory_pb2.ADJUSTMENT_REASON_DAMAGE,
    "transfer": inventory_pb2.ADJUSTMENT_REASON_TRANSFER,
}
MODES = {mode: reservation_pb2.ReserveMode.Value(f"RESERVE_MODE_{mode}") for mode in ("ALL", "BEST_EFFORT", "MINIMUM")}


@dataclass
class Result:
    """What came of a run: what was wrong, the hash of all that happened, and how much it was."""

    problems: list[str]
    digest: str
    fired: list[Fault]
    befell: list[Event]
    calls: int
    virtual_seconds: float
    lines: list[str]


def simulate(plan: Plan, *, keep_trace: bool = False) -> Result:
    """Run a plan to its end."""
    world = World(plan.seed, plan.faults, poll_seconds=plan.poll_seconds, keep_trace=keep_trace)
    books = Books(world)
    with world.patched():
        try:
            run(world.loop, _live(world, plan, books))
        except StuckError:
            world.problems.append("something waits for what can never come")
    problems = [*world.problems, *books.problems]
    for problem in problems:
        world.trace.note(problem)
    digest, seconds = world.trace.digest(), world.loop.time()
    return Result(problems, digest, world.fired, world.befell, world.calls, seconds, world.trace.lines)


async def _live(world: World, plan: Plan, books: Books) -> None:
    world.healed = True
    world.start()
    await _open(world, plan.opening_units, books)
    world.healed = False
    troubles = [asyncio.ensure_future(_trouble(world, event)) for event in plan.events]
    clients: dict[int, list[Operation]] = {}
    for operation in plan.operations:
        clients.setdefault(operation.client, []).append(operation)
    await asyncio.gather(*(Client(world, books, number).run(calls) for number, calls in clients.items()))
    for trouble in troubles:
        trouble.cancel()
    world.heal()
    await asyncio.sleep(QUIET_SECONDS)
    await check_quiet(world, books)
    await asyncio.sleep(LIFE_SECONDS_MAX + QUIET_SECONDS)
    await check_all(world, books)


async def _open(world: World, units: int, books: Books) -> None:
    """A catalogue, and units of everything everywhere."""
    connection: Any = Connection(world.servers["inventory"], statement, LocalWire())
    for priority, place in enumerate(PLACES):
        await connection.fetch(store.INSERT_LOCATION, place, place, priority)
    columns = store.split([(sku, sku, "", "piece", "", 0) for sku in SKUS])
    await connection.fetch(store.INSERT_SKUS, *columns)
    client = Client(world, books, -1)
    for sku in SKUS:
        for place in PLACES:
            await client.make(Operation(-1, 0, "receive", f"open-{sku}-{place}", lines=((sku, place, units),)))


async def _trouble(world: World, event: Event) -> None:
    await asyncio.sleep(event.at)
    world.trace.note(*event)
    undo = world.befall(event)
    await asyncio.sleep(event.seconds)
    undo()


class Client:
    """A caller: makes each call again until it is answered, or its patience is over."""

    def __init__(self, world: World, books: Books, number: int) -> None:
        self._world = world
        self._books = books
        self._versions: dict[tuple[str, str], int] = {}
        channel: Any = Channel(world, f"client-{number}", "reservation")
        self._reservation: Any = reservation_pb2_grpc.ReservationServiceStub(channel)
        channel = Channel(world, f"client-{number}", "inventory")
        self._inventory: Any = inventory_pb2_grpc.InventoryServiceStub(channel)

    async def run(self, operations: list[Operation]) -> None:
        for operation in operations:
            await asyncio.sleep(operation.pause)
            await self.make(operation)

    async def make(self, operation: Operation) -> None:
        loop = self._world.loop
        call = Call(operation, loop.time(), dict(self._versions))
        self._books.calls.append(call)
        ask = getattr(self, f"_{operation.kind}", self._adjust)
        for attempt in range(operation.tries):
            if attempt:
                await asyncio.sleep(0.1 * attempt)
            try:
                call.answer = await ask(operation)
            except grpc.aio.AioRpcError as error:
                if error.code() in RETRIED:
                    continue
                call.answer = refusal_of(error) or Refusal(error.code().name, "without a reason")
            call.ended = loop.time()
            break
        self._world.trace.note("call", operation, call.ended, str(call.answer).replace("\n", " "))
        if isinstance(call.answer, inventory_pb2.AdjustStockResponse):
            for stock in call.answer.stocks:
                key = (stock.sku, stock.location)
                self._versions[key] = max(self._versions.get(key, 0), stock.version)

    def _reserve(self, asked: Operation) -> Awaitable[Message]:
        request = reservation_pb2.ReserveRequest(
            reservation_id=asked.name,
            lines=[
                reservation_pb2.ReservationLine(
                    sku=sku, location=place, quantity=units, minimum_quantity=int(asked.mode == "MINIMUM")
                )
                for sku, place, units in asked.lines
            ],
            mode=MODES[asked.mode],
            ttl=duration(timedelta(seconds=asked.seconds)),
            customer_id=f"customer-{asked.name}",
        )
        return self._call(self._reservation.Reserve, request, asked)

    def _confirm(self, asked: Operation) -> Awaitable[Message]:
        request = reservation_pb2.ConfirmRequest(
            reservation_id=asked.name, request_id=asked.request_id, lines=_quantities(asked)
        )
        return self._call(self._reservation.Confirm, request, asked)

    def _cancel(self, asked: Operation) -> Awaitable[Message]:
        request = reservation_pb2.CancelRequest(
            reservation_id=asked.name, request_id=asked.request_id, lines=_quantities(asked)
        )
        return self._call(self._reservation.Cancel, request, asked)

    def _extend(self, asked: Operation) -> Awaitable[Message]:
        request = reservation_pb2.ExtendRequest(
            reservation_id=asked.name, request_id=asked.request_id, ttl=duration(timedelta(seconds=asked.seconds))
        )
        return self._call(self._reservation.Extend, request, asked)

    def _adjust(self, asked: Operation) -> Awaitable[Message]:
        request = inventory_pb2.AdjustStockRequest(adjustment=_adjustment(asked))
        return self._call(self._inventory.AdjustStock, request, asked)

    def _policy(self, asked: Operation) -> Awaitable[Message]:
        ((sku, place, units),) = asked.lines
        request = inventory_pb2.SetStockPolicyRequest(
            request_id=asked.name,
            key=inventory_pb2.StockKey(sku=sku, location=place),
            safety_stock=units // 2,
            backorder_limit=units if asked.mode else 0,
        )
        return self._call(self._inventory.SetStockPolicy, request, asked)

    def _read(self, asked: Operation) -> Awaitable[Message]:
        keys = [
            inventory_pb2.AvailabilityKey(sku=sku, location=at, min_version=self._versions.get((sku, at), 0))
            for sku, at, _ in asked.lines
        ]
        return self._call(self._inventory.GetAvailability, inventory_pb2.GetAvailabilityRequest(keys=keys), asked)

    async def _command(self, asked: Operation) -> None:
        """Another system tells of goods received, over Kafka, and tells it twice."""
        command = events_pb2.StockCommand(
            source="erp", source_id=asked.name, adjustment=_adjustment(asked._replace(kind="receive"))
        )
        for _ in range(2):
            self._tell(COMMANDS_TOPIC, asked.lines[0][0], command)

    async def _release(self, asked: Operation) -> None:
        """Analytics decides a case."""
        release = analytics_events.Release(case_id=asked.request_id, reservation_ids=[asked.name])
        self._tell(VERDICTS_TOPIC, asked.name, analytics_events.Verdict(release=release))

    def _tell(self, topic: str, key: str, message: Message) -> None:
        raw = key.encode()
        at = TopicPartition(topic, partition_of(raw, PARTITIONS))
        self._world.broker.append(at, raw, message.SerializeToString(), ())

    async def _call(self, method: Callable[..., Awaitable[Message]], request: Message, asked: Operation) -> Message:
        return await method(request, timeout=asked.patience)


def _quantities(asked: Operation) -> list[reservation_pb2.LineQuantity]:
    return [reservation_pb2.LineQuantity(sku=sku, location=at, quantity=units) for sku, at, units in asked.lines]


def _adjustment(asked: Operation) -> inventory_pb2.StockAdjustment:
    ((sku, place, units),) = asked.lines
    there = PLACES[1 - PLACES.index(place)]
    return inventory_pb2.StockAdjustment(
        request_id=asked.name,
        key=inventory_pb2.StockKey(sku=sku, location=place),
        reason=REASONS[asked.kind],
        quantity=units,
        to_location=there if asked.kind == "transfer" else "",
        allow_short=asked.mode == "short" and asked.kind in {"count", "damage"},
    )
