"""The simulated world: pods of real services on simulated databases, brokers, Redis and network, and its faults.

Real are the servicers, batchers, commands, domain, cache, consumers, relays, workers and locks of inventory and
reservation, as their pods run them. All that they wait for is simulated. A crossing is what goes over the network to
anything else: it takes time, and may meet a fault, that the seed chooses by the crossing's name and number.
"""

import asyncio
import contextvars
import hashlib
import random
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, NamedTuple
from unittest.mock import patch
from uuid import UUID

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from holdfast.inventory.v1 import inventory_pb2
from holdfast.reservation.v1 import reservation_pb2
from pydantic import SecretStr
from redis.exceptions import ConnectionError as RedisConnectionError

import services.inventory.cache
import services.inventory.commands
import services.inventory.servicer
import services.inventory.settings
import services.inventory.watch
import services.inventory.workers
import services.reservation.commands
import services.reservation.inventory
import services.reservation.servicer
import services.reservation.settings
import services.reservation.subjects
import services.reservation.workers
import shared.consumer
import shared.database
import shared.lock
import shared.outbox
import shared.workers
from shared.channel import CALL_SECONDS_MAX
from shared.errors import DETAILS_KEY, ErrorMap
from shared.refusal import Refusal
from tests.model import sim_broker, sim_redis
from tests.model.sim_database import Connection, Pool, Server
from tests.model.sim_loop import SimLoop
from tests.model.sim_statements import INVENTORY, RESERVATION, statement

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
POD: contextvars.ContextVar["Pod | None"] = contextvars.ContextVar("pod", default=None)
NOWHERE = "postgresql://simulated@localhost/nothing"
PODS = ("inventory-0", "inventory-1", "reservation-0", "reservation-1")
SESSION_SECONDS = 3.0  # after which a broker takes a dead consumer out of its group
ATTEMPTS = 5  # of a call, as the channel's retry policy says
MASK = (1 << 64) - 1
WORKER_FAULTS = {"Refusal", "KafkaConnectionError", "SerializationError", "DeadlockDetectedError"}


class Fault(NamedTuple):
    """What goes wrong at the n-th crossing of a name."""

    site: str
    number: int
    kind: str


class Event(NamedTuple):
    """What goes wrong at a time, of its own: to a pod, to Redis or to the broker, for some seconds."""

    at: float
    kind: str
    target: str
    seconds: float


@dataclass(frozen=True)
class Faults:
    """How often each kind of fault is met at a crossing; or exactly which, where `chosen` says so."""

    rates: dict[str, float]
    chosen: frozenset[Fault] | None = None


class Trace:
    """All that happens, in order, as a hash; kept as lines too when `keep` says so."""

    def __init__(self, loop: SimLoop, *, keep: bool) -> None:
        self._loop = loop
        self._hash = hashlib.blake2b(digest_size=16)
        self._keep = keep
        self.lines: list[str] = []

    def note(self, *words: object) -> None:
        line = f"{self._loop.time():.6f} {' '.join(map(str, words))}"
        self._hash.update(line.encode())
        if self._keep:
            self.lines.append(line)

    def digest(self) -> str:
        return self._hash.hexdigest()


class Pod:
    """One life of a pod: from its start until it crashes, all its tasks."""

    def __init__(self, world: "World", name: str) -> None:
        self.name = name
        self.service = name.partition("-")[0]
        self.alive = True
        self.wall_seconds = 0.0
        self.context = contextvars.copy_context()
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._resumed: asyncio.Future[None] | None = None
        self._world = world
        self.servicer: Any = None
        self.errors: ErrorMap
        self.context.run(self._start)

    def _start(self) -> None:
        POD.set(self)
        start = self._world.inventory_pod if self.service == "inventory" else self._world.reservation_pod
        self.servicer, self.errors, workers = start(self)
        self.run(workers)

    def run(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run something as a task of this pod."""
        return self._world.loop.create_task(work, context=self.context.copy())

    def adopt(self, task: "asyncio.Task[Any]") -> None:
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        if not self.alive:
            task.cancel()

    async def gate(self) -> None:
        """Pass while the pod runs; wait while it is paused. A dead one's tasks end here."""
        while self._resumed is not None:
            await asyncio.shield(self._resumed)
        if not self.alive:
            raise asyncio.CancelledError

    def pause(self) -> None:
        if self._resumed is None:
            self._resumed = self._world.loop.create_future()

    def resume(self) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed:
            resumed.set_result(None)

    def crash(self) -> None:
        """Be gone: no task goes on, nothing in memory is left, nothing is said to anyone."""
        self.alive = False
        self.resume()
        for task in list(self._tasks):
            task.cancel()


class _Wire:
    """Between a pod and a database."""

    def __init__(self, world: "World", pod: Pod, database: str) -> None:
        self._world = world
        self._pod = pod
        self._database = database

    async def there(self, what: str, *, may_fail: bool) -> str:
        site = f"{self._pod.name}>{self._database} {what}"
        kinds = ("lost before", "lost after", "delay", *(["error"] if may_fail else []))
        fault = self._world.draw(site, *kinds)
        await self._world.hop(site, fault)
        await self._pod.gate()
        if self._database in self._world.databases_away:
            return "lost before"
        return "" if fault == "delay" else fault

    async def back(self) -> None:
        await self._world.hop(f"{self._pod.name}<{self._database}")
        await self._pod.gate()

    def lingers(self) -> float:
        return self._world.dice.choice((0, 0, 0.1, 3.0))


class Context:
    """The part of a servicer's context that the services use."""

    def __init__(self, loop: SimLoop, deadline: float) -> None:
        self._loop = loop
        self._deadline = deadline

    def time_remaining(self) -> float:
        return self._deadline - self._loop.time()


class World:
    """All of it, for one run. `problems` are what must never be seen."""

    def __init__(self, seed: int, faults: Faults, *, poll_seconds: float = 1.0, keep_trace: bool = False) -> None:
        self.seed = seed
        self.loop = SimLoop(seed)
        self.dice = random.Random(seed ^ 0x5EED)
        self.faults = faults
        self.healed = False
        self.fired: list[Fault] = []
        self.befell: list[Event] = []
        self.calls = 0
        self.problems: list[str] = []
        self.trace = Trace(self.loop, keep=keep_trace)
        self.skew = {"inventory": 0.0, "reservation": self.dice.choice((0.0, 0.7, -0.7))}
        self.servers = {
            "inventory": Server(INVENTORY, lambda: self.now("inventory"), self.new_uuid),
            "reservation": Server(RESERVATION, lambda: self.now("reservation"), self.new_uuid),
        }
        self.broker = sim_broker.Broker()
        self.redis = sim_redis.Store(self.loop.time)
        self.redis_away = False
        self.databases_away: set[str] = set()
        self.pods: dict[str, Pod] = {}
        self._poll_seconds = poll_seconds
        self._counts: Counter[str] = Counter()
        self._mixed: dict[str, int] = {}  # what a site adds to its chances
        self.loop.on_task = self._adopt
        self.loop.set_exception_handler(lambda _loop, _context: None)

    # -- time and chance --------------------------------------------------------------------------

    def now(self, database: str) -> datetime:
        return EPOCH + timedelta(microseconds=round((self.loop.time() + self.skew[database]) * 1e6))

    def new_uuid(self) -> UUID:
        return UUID(int=self.dice.getrandbits(128), version=4)

    def chance(self, site: str, number: int, salt: int) -> float:
        """A number from 0 to 1 that depends on the seed and on where it is asked, and not on what came before."""
        mixed = self._mixed.get(site)
        if mixed is None:
            mixed = (self.seed * 0x9E3779B97F4A7C15) ^ (zlib.crc32(site.encode()) * 0xBF58476D1CE4E5B9)
            self._mixed[site] = mixed
        mixed = (mixed ^ (number * 0x94D049BB133111EB) ^ (salt * 0xD6E8FEB86659FD93)) & MASK
        for _ in range(2):
            mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & MASK
        return (mixed >> 11) / (1 << 53)

    def draw(self, site: str, *kinds: str) -> str:
        """The fault that the next crossing of this name meets, or none."""
        self._counts[site] += 1
        number = self._counts[site]
        self.trace.note(site)
        if self.healed:
            return ""
        if self.faults.chosen is not None:
            fault = next((kind for kind in kinds if Fault(site, number, kind) in self.faults.chosen), "")
        else:
            fault = ""
            drawn = self.chance(site, number, 1)
            for kind in kinds:
                drawn -= self.faults.rates.get(kind, 0)
                if drawn < 0:
                    fault = kind
                    break
        if fault:
            self.fired.append(Fault(site, number, fault))
            self.trace.note(fault)
        return fault

    async def hop(self, site: str, fault: str = "") -> None:
        """The time that a message is under way."""
        drawn = self.chance(site, self._counts[site], 2)
        seconds = 0.0002 + 0.002 * drawn * drawn
        if fault == "delay":
            seconds = 0.05 + 4 * drawn * drawn
        await self.loop.after(seconds)

    def _adopt(self, task: "asyncio.Task[Any]", context: contextvars.Context) -> None:
        pod = context.get(POD)
        if pod is not None:
            pod.adopt(task)

    # -- pods -------------------------------------------------------------------------------------

    def start(self) -> None:
        for name in PODS:
            self.start_pod(name)

    def start_pod(self, name: str) -> None:
        if name not in self.pods or not self.pods[name].alive:
            self.trace.note("start", name)
            self.pods[name] = Pod(self, name)

    def crash_pod(self, name: str) -> None:
        pod = self.pods[name]
        if pod.alive:
            self.trace.note("crash", name)
            pod.crash()
            self.loop.call_later(SESSION_SECONDS, self.broker.leave, lambda member: member.pod is pod)

    def befall(self, event: Event) -> Callable[[], None]:
        """Let something go wrong; returns what ends it."""
        self.befell.append(event)
        pod = self.pods.get(event.target)
        match event.kind:
            case "crash":
                self.crash_pod(event.target)
                return lambda: self.start_pod(event.target)
            case "pause" if pod:
                pod.pause()
                return pod.resume
            case "clock jumps" if pod:
                pod.wall_seconds += 3600 * (event.seconds - 1)
            case "redis away":
                self.redis_away = True
                return lambda: setattr(self, "redis_away", False)
            case "kafka away":
                self.broker.away = True
                return lambda: setattr(self.broker, "away", False)
            case "database away":
                self.databases_away.add(event.target)
                return lambda: self.databases_away.discard(event.target)
            case "redis wiped":
                self.redis.wipe()
            case "locks lost":
                self.redis.drop_locks()
        return lambda: None

    def heal(self) -> None:
        """From now on nothing goes wrong: all pods run, all that they need is there."""
        self.healed = True
        self.redis_away = self.broker.away = False
        self.databases_away.clear()
        for name in PODS:
            self.pods[name].resume()
            self.start_pod(name)

    def _database(self, pod: Pod) -> shared.database.Database:
        wire, server = _Wire(self, pod, pod.service), self.servers[pod.service]
        pool: Any = Pool(lambda: Connection(server, statement, wire))
        return shared.database.Database(pool)

    def _redis(self, pod: Pod) -> Any:
        async def hop() -> None:
            site = f"{pod.name}>redis"
            fault = self.draw(site, "lost before", "delay")
            await self.hop(site, fault)
            await pod.gate()
            if self.redis_away or fault == "lost before":
                raise RedisConnectionError("away")

        return sim_redis.Client(self.redis, hop)

    def inventory_pod(self, pod: Pod) -> tuple[Any, ErrorMap, Coroutine[Any, Any, None]]:
        settings = services.inventory.settings.Settings(
            database_dsn="postgresql://simulated@localhost/inventory", pod=pod.name, **self._settings()
        )
        database, client = self._database(pod), self._redis(pod)
        cache = services.inventory.cache.Cache(database, client, local_seconds=0.5, redis_seconds=2, keys_max=100)
        commands = services.inventory.commands.Commands(database, cache)
        watch = services.inventory.watch.Watch(database, poll_seconds=1, streams_max=1)
        servicer = services.inventory.servicer.Servicer(settings, database, commands, cache, watch)
        workers = services.inventory.workers.Workers(settings, database, commands, client)
        return servicer, services.inventory.servicer.ERRORS, workers.run()

    def reservation_pod(self, pod: Pod) -> tuple[Any, ErrorMap, Coroutine[Any, Any, None]]:
        settings = services.reservation.settings.Settings(
            database_dsn=NOWHERE,
            pod=pod.name,
            inventory_target="",
            subject_keys=SecretStr("k1=" + "A" * 24),
            **self._settings(),
        )
        database, client = self._database(pod), self._redis(pod)
        channel: Any = Channel(self, pod.name, "inventory")
        subjects = services.reservation.subjects.Subjects({"k1": bytes(16)})
        inventory = services.reservation.inventory.Inventory(channel)
        commands = services.reservation.commands.Commands(database, inventory, subjects)
        servicer = services.reservation.servicer.Servicer(settings, database, commands, subjects)
        workers = services.reservation.workers.Workers(settings, database, commands, client)
        return servicer, services.reservation.servicer.ERRORS, workers.run()

    def _settings(self) -> dict[str, Any]:
        poll = self._poll_seconds
        return {
            "relay_poll_seconds": poll, "sweep_poll_seconds": poll, "reconcile_poll_seconds": 60 * poll,
            "lock_ttl_seconds": 5 * poll,
        }  # fmt: skip

    # -- what pods are given in place of what is real ---------------------------------------------

    def _kafka_hop(self, what: str) -> Callable[[str], Awaitable[str]]:
        pod = POD.get()
        assert pod is not None

        async def hop(step: str) -> str:
            site = f"{pod.name}>kafka {what} {step}"
            fault = self.draw(site, "lost before", "lost after", "delay") if step in {"send", "commit"} else ""
            await self.hop(site, fault)
            await pod.gate()
            return fault

        return hop

    def _producer(self, _bootstrap: str, _client: str) -> sim_broker.Producer:
        return sim_broker.Producer(self.broker, self._kafka_hop("produce"))

    def _consumer(self, *, group_id: str, **_: object) -> sim_broker.KafkaConsumer:
        return sim_broker.KafkaConsumer(self.broker, self._kafka_hop(group_id), group_id, POD.get())

    @contextmanager
    def patched(self) -> Iterator[None]:
        """While this lasts, the services' modules have the world's time, chance, producers and consumers."""
        world = self

        class SimDatetime(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> "SimDatetime":
                pod = POD.get()
                at = EPOCH + timedelta(seconds=world.loop.time() + (pod.wall_seconds if pod else 0))
                return cls.fromtimestamp(at.timestamp(), tz)

        class SimClock:
            monotonic = staticmethod(world.loop.time)

        class SimUuid:
            uuid4 = staticmethod(world.new_uuid)

        log = _Log(self)
        with ExitStack() as stack:
            for target, name, value in (
                (services.inventory.cache, "time", SimClock),
                (shared.outbox, "time", SimClock),
                (shared.consumer, "time", SimClock),
                (shared.lock, "uuid", SimUuid),
                (shared.database, "random", random.Random(self.seed)),
                (services.inventory.workers, "datetime", SimDatetime),
                (services.reservation.commands, "datetime", SimDatetime),
                (shared.workers, "producer", self._producer),
                (shared.workers, "measuring", _measuring_nothing),
                (shared.consumer, "producer", self._producer),
                (shared.consumer, "AIOKafkaConsumer", self._consumer),
                *(
                    (module, "log", log)
                    for module in (
                        services.inventory.cache, services.inventory.workers, services.reservation.commands,
                        shared.consumer, shared.lock, shared.outbox, shared.workers,
                    )
                ),
            ):  # fmt: skip
                stack.enter_context(patch.object(target, name, value))
            yield


async def _measuring_nothing(*_: object) -> None:
    """Gauges are nobody's promise."""
    await asyncio.Event().wait()


class _Log:
    """The services' log: silent, but for what a worker must never die of and a reconciler never find."""

    def __init__(self, world: World) -> None:
        self._world = world

    def info(self, _event: str, **_: object) -> None:
        pass

    def warning(self, event: str, **said: object) -> None:
        if event == "worker starts again" and said["error"] not in WORKER_FAULTS:
            self._world.problems.append(f"a worker died: {said}")

    def error(self, event: str, **said: object) -> None:
        self._world.problems.append(f"an error was logged: {event} {said}")


class Channel:
    """A channel to a service's pods, as generated stubs use it: balanced, with deadlines and retries."""

    def __init__(self, world: World, caller: str, service: str) -> None:
        self._world = world
        self._caller = caller
        self._service = service
        descriptor = {"inventory": inventory_pb2, "reservation": reservation_pb2}[service].DESCRIPTOR
        self._methods = descriptor.services_by_name[f"{service.capitalize()}Service"].methods_by_name

    def unary_unary(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_: object,
    ) -> Callable[..., Awaitable[Any]]:
        method = path.rpartition("/")[2]
        request_type = GetMessageClass(self._methods[method].input_type)

        async def call(request: Any, timeout: float = CALL_SECONDS_MAX) -> Any:
            deadline = self._world.loop.time() + timeout
            content = request_serializer(request)
            try:
                async with asyncio.timeout_at(deadline):
                    for attempt in range(1, ATTEMPTS + 1):
                        try:
                            answer = await self._attempt(method, request_type, content, deadline)
                        except grpc.aio.AioRpcError as error:
                            if error.code() is not grpc.StatusCode.UNAVAILABLE or attempt == ATTEMPTS:
                                raise
                            await asyncio.sleep(min(0.05 * 3**attempt, 1) * self._world.dice.random())
                        else:
                            return response_deserializer(answer)
            except TimeoutError:
                raise failed(grpc.StatusCode.DEADLINE_EXCEEDED) from None

        return call

    def unary_stream(self, *_: object, **__: object) -> None:
        """Streams are not simulated."""

    stream_unary = stream_stream = unary_stream

    async def _attempt(self, method: str, request_type: type[Message], content: bytes, deadline: float) -> bytes:
        world, caller = self._world, POD.get()
        site = f"{self._caller}>{method}"
        fault = world.draw(site, "lost before", "lost after", "twice", "delay")
        await world.hop(site, fault)
        if caller:
            await caller.gate()
        serving = [pod for pod in world.pods.values() if pod.alive and pod.service == self._service]
        if fault == "lost before" or not serving:
            raise failed(grpc.StatusCode.UNAVAILABLE)
        pod = world.dice.choice(serving)
        task = self._serve(pod, method, request_type, content, deadline)
        if fault == "twice":
            world.loop.call_later(
                world.dice.random(), self._serve, world.dice.choice(serving), method, request_type, content, deadline
            )
        try:
            if fault == "lost after":
                await asyncio.wait([task], timeout=0.01 * world.dice.random())
                raise failed(grpc.StatusCode.UNAVAILABLE)
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()  # as gRPC tells the server that its caller is gone
            raise
        await world.hop(f"{self._caller}<{method}")
        if caller:
            await caller.gate()
        if task.cancelled():
            raise failed(grpc.StatusCode.UNAVAILABLE)
        return task.result()

    def _serve(
        self, pod: Pod, method: str, request_type: type[Message], content: bytes, deadline: float
    ) -> "asyncio.Task[bytes]":
        world = self._world

        async def serve() -> bytes:
            await pod.gate()
            world.calls += 1
            try:
                answer = await getattr(pod.servicer, method)(
                    request_type.FromString(content), Context(world.loop, deadline)
                )
            except Refusal as refusal:
                raise failed(pod.errors.code(refusal), pod.errors.details(refusal), refusal.reason) from refusal
            except Exception as error:
                world.problems.append(f"{method} failed with {type(error).__name__}: {error}")
                raise failed(grpc.StatusCode.INTERNAL) from error
            return bytes(answer.SerializeToString())

        task = pod.run(serve())
        timer = world.loop.call_later(max(0, deadline - world.loop.time()), task.cancel)

        def served(done: "asyncio.Task[bytes]") -> None:
            timer.cancel()
            if not done.cancelled():
                done.exception()  # nobody may be left to hear of it

        task.add_done_callback(served)
        return task


def failed(code: grpc.StatusCode, details: bytes = b"", words: str = "") -> grpc.aio.AioRpcError:
    """A call's error, with the refusal that the server sent, if any."""
    trailing = grpc.aio.Metadata((DETAILS_KEY, details)) if details else grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, words, None)
