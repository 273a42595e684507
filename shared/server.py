"""The gRPC server of a pod: errors mapped, health and reflection served, stopped without losing a call.

On SIGTERM or SIGINT:

1. Health turns to NOT_SERVING. Clients that watch it (`shared.channel` does) take the pod out of their
   rotation at once; calls that still come are served, until none has come for QUIET_SECONDS or
   LAME_DUCK_SECONDS_MAX are over. Without this step gRPC would cancel the calls that had arrived and not
   been accepted yet, and a client cannot tell that from its own cancelling (grpc/grpc#41785).
2. Streams end with UNAVAILABLE (STOPPING): their callers open them again on another pod. Calls in flight
   get what is left of `drain_seconds_max`, and then the same answer.
3. The connections are told to go away, the workers stop, and the process exits with 0.

A client that watches health and retries UNAVAILABLE sees nothing of it.

With TLS, callers are let in by `shared.admission`: to every method but health's.
"""

import asyncio
import gc
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME

from shared import access, metrics, reflection, telemetry, tls, tokens
from shared.admission import Admission
from shared.channel import KEEPALIVE_MS, MESSAGE_BYTES_MAX
from shared.errors import DETAILS_KEY, ErrorMap
from shared.observed import Method
from shared.refusal import Refusal
from shared.settings import Settings, loopback

POD_KEY = "holdfast-pod"
QUIET_SECONDS = 0.3
LAME_DUCK_SECONDS_MAX = 3.0
CLOSE_SECONDS_MAX = 2.0
WORKERS_SECONDS_MAX = 5.0
GC_ALLOCATIONS = 20_000
METADATA_BYTES_MAX = 16 << 10
STREAMS_MAX = 4096
CALLER_PING_MS = 60_000
PROBES_MAX = 100
UNREADABLE = object()
log = structlog.get_logger(__name__)
Server = grpc.aio.Server
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
else:
    # The stubs are generic; what they describe is not.
    Context = grpc.aio.ServicerContext
    Handler = grpc.RpcMethodHandler


class Edge:
    """Turns refusals into statuses, everything else into INTERNAL, and names the pod in each answer.

    Knows the calls under way, and can end them (`drain`). Methods are wrapped once, when they are first
    called, and not intercepted: an interceptor is run anew for every call.
    """

    def __init__(self, errors: ErrorMap, pod: str, admission: Admission | None = None) -> None:
        self._errors = errors
        self._admission = admission
        self._pod = ((POD_KEY, pod),)
        self._calls: set[asyncio.Task[Any]] = set()
        self._waiting_streams: set[asyncio.Task[Any]] = set()
        self._last_call = 0.0
        self._stopping = False
        metrics.CALLS_IN_FLIGHT.set_function(lambda: len(self._calls) + len(self._waiting_streams))

    async def drain(self, seconds_max: float) -> None:
        """Wait until no call comes any more and none is under way; end streams, and what takes too long."""
        began = time.monotonic()
        lame_duck_until = began + min(LAME_DUCK_SECONDS_MAX, seconds_max)
        while (now := time.monotonic()) < lame_duck_until and now - max(self._last_call, began) < QUIET_SECONDS:
            await asyncio.sleep(QUIET_SECONDS / 10)
        self._stopping = True
        for stream in self._waiting_streams:
            stream.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=max(0, began + seconds_max - time.monotonic()))
        for call in self._calls:
            call.cancel()

    def wrap(self, method: str, handler: Any) -> Handler:
        """A method's handler with this edge around it."""
        observed = Method(method.removeprefix("/"), self._errors)
        codec = {
            "request_deserializer": _lenient(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        made: Handler
        if handler.response_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            stream = handler.stream_stream or handler.unary_stream
            stream = _readable(stream, streamed=handler.request_streaming)
            if self._admission:
                stream = self._admission.stream(method, stream)
            made = make(self._stream(stream, observed), **codec)
            return made
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        unary = handler.stream_unary or handler.unary_unary
        unary = _readable(unary, streamed=handler.request_streaming)
        if self._admission:
            unary = self._admission.unary(method, unary)
        made = make(self._unary(unary, observed), **codec)
        return made

    def _unary(self, behaviour: Callable[[Any, Context], Awaitable[Any]], observed: Method) -> Any:
        async def call(request: Any, context: Context) -> Any:
            task = _task()
            self._calls.add(task)
            self._last_call = time.monotonic()
            seen = observed.begin(context)
            try:
                self._go_on()
                response = await behaviour(request, context)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the one place that maps them all
                seen.ends_with(self._told(error))
                await self._abort(error, context)
            else:
                context.set_trailing_metadata(self._pod)
                return response
            finally:
                self._calls.discard(task)
                seen.end()

        return call

    def _stream(self, behaviour: Callable[[Any, Context], AsyncIterator[Any]], observed: Method) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            task = _task()
            self._waiting_streams.add(task)
            self._last_call = time.monotonic()
            seen = observed.begin(context)
            try:
                self._go_on()
                async for response in behaviour(request, context):
                    self._waiting_streams.discard(task)
                    yield response
                    self._waiting_streams.add(task)
                    self._go_on()
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
                seen.ends_with(self._told(error))
                await self._abort(error, context)
            else:
                context.set_trailing_metadata(self._pod)
            finally:
                self._waiting_streams.discard(task)
                seen.end()

        return call

    def _go_on(self) -> None:
        if self._stopping:
            raise _stopping()

    def _told(self, error: BaseException) -> BaseException:
        """What the caller is told of an error: a call that stopping has cancelled is refused."""
        return _stopping() if self._stopping and isinstance(error, asyncio.CancelledError) else error

    async def _abort(self, error: BaseException, context: Context) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, asyncio.CancelledError):
            if not self._stopping:
                raise error
            _task().uncancel()
            error = _stopping()
        if isinstance(error, Refusal):
            details = ((DETAILS_KEY, self._errors.details(error)), *self._pod)
            await context.abort(self._errors.code(error), error.message, details)
        log.error("call failed", error=type(error).__name__, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; it is in the log of the pod", self._pod)


class _Methods(grpc.GenericRpcHandler):  # type: ignore[type-arg] # not generic at run time
    """The methods of a service, each with the edge around it."""

    def __init__(self, inner: Any, edge: Edge) -> None:
        self._inner = inner
        self._edge = edge
        self._wrapped: dict[str, Handler] = {}

    def service(self, handler_call_details: Any) -> Handler | None:
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = self._inner.service(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = self._edge.wrap(method, handler)
        return self._wrapped[method]


class Guarded:
    """What generated code registers an API on: the server, behind the edge."""

    def __init__(self, server: Server, edge: Edge) -> None:
        self._server = server
        self._edge = edge

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._server.add_generic_rpc_handlers([_Methods(handler, self._edge) for handler in handlers])

    def add_registered_method_handlers(self, _service: str, _handlers: Any) -> None:
        """Asyncio servers look methods up in the generic handlers."""


def _lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`parse`, but bytes that are no message are UNREADABLE: gRPC would answer UNKNOWN, and log what they are."""

    def parsed(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError:
            return UNREADABLE

    return parsed


def _readable(behaviour: Callable[[Any, Context], Any], *, streamed: bool) -> Callable[[Any, Context], Any]:
    """`behaviour` for requests that are messages; the first that is none is refused."""

    def checked(request: Any) -> Any:
        if request is UNREADABLE:
            raise Refusal("FIELD_INVALID", "the request is not a message of this call", field="")
        return request

    if streamed:
        return lambda requests, context: behaviour((checked(request) async for request in requests), context)
    return lambda request, context: behaviour(checked(request), context)


def _stopping() -> Refusal:
    return Refusal("STOPPING", "the pod is stopping; try again with the same request")


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def build(
    settings: Settings,
    errors: ErrorMap,
    register: Callable[[Any], None],
    services: Sequence[str],
) -> tuple[list[Server], Edge, HealthServicer]:
    """A server with the API that `register` adds, health (NOT_SERVING yet) and reflection; and one for probes."""
    edge = Edge(errors, settings.pod, _admission(settings))
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_connection_age_ms", settings.connection_age_seconds_max * 1000),
            ("grpc.max_connection_age_grace_ms", int(settings.drain_seconds_max * 1000)),
            ("grpc.keepalive_time_ms", CALLER_PING_MS),
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.max_concurrent_streams", STREAMS_MAX),
        ],
    )
    guarded = Guarded(server, edge)
    register(guarded)
    reflection.enable((*services, HEALTH_NAME), guarded)
    checks = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if settings.tls_directory:
        server.add_secure_port(settings.listen, tls.server_credentials(tls.watch(settings.tls_directory)))
    else:
        if not loopback(settings.listen):
            log.warning("serving everybody, without TLS", listen=settings.listen)
        server.add_insecure_port(settings.listen)
    servers = [server]
    if settings.probe_listen:
        probes = grpc.aio.server(options=[("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=PROBES_MAX)
        health_pb2_grpc.add_HealthServicer_to_server(checks, probes)
        probes.add_insecure_port(settings.probe_listen)
        servers.append(probes)
    return servers, edge, checks


def _admission(settings: Settings) -> Admission | None:
    """What lets callers in; None where everybody may call everything as often as they like."""
    limits = settings.caller_limits
    if not settings.tls_directory:
        return Admission(None, None, limits) if limits != access.Limits() else None
    shown = None
    if settings.jwks_file:
        shown = tokens.Tokens(settings.jwt_issuer, settings.jwt_audience, tokens.watch(settings.jwks_file))
    return Admission(access.read(settings.access_file, limits), shown, limits)


async def run(
    settings: Settings,
    errors: ErrorMap,
    register: Callable[[Any], None],
    services: Sequence[str],
    workers: Coroutine[Any, Any, None] | None,
) -> None:
    """Serve an API, with `workers` beside it, until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    metrics.TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
    with metrics.serve(settings.metrics_listen):
        async with telemetry.exporting(settings, errors.domain.partition(".")[0]):
            working = asyncio.create_task(workers) if workers else None
            try:
                await serve(*build(settings, errors, register, services), services, settings.drain_seconds_max)
            finally:
                if working:
                    working.cancel()
                    ended, _ = await asyncio.wait([working], timeout=WORKERS_SECONDS_MAX)
                    if not ended:
                        log.warning("workers go on stopping", waited_seconds=WORKERS_SECONDS_MAX)
                    elif not working.cancelled():
                        working.result()


async def serve(
    servers: Sequence[Server], edge: Edge, checks: HealthServicer, services: Sequence[str], drain_seconds: float
) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # What is loaded by now stays; looking through it again and again takes time from calls.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    for server in servers:
        await server.start()
    for service in ("", *services):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    log.info("serving")
    await stop.wait()
    log.info("draining", seconds_max=drain_seconds)
    await checks.enter_graceful_shutdown()
    await edge.drain(drain_seconds)
    await asyncio.gather(*(server.stop(CLOSE_SECONDS_MAX) for server in servers))
    log.info("stopped")
