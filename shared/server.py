"""The gRPC server of a pod: errors mapped, health and reflection served, stopped without losing a call.

On SIGTERM or SIGINT health turns to NOT_SERVING, connections are told to go away, calls in flight get
`drain_seconds_max` to finish, then the workers stop and the process exits with 0. A client that retries
UNAVAILABLE sees nothing of it.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_reflection.v1alpha import reflection

from shared.channel import KEEPALIVE_MS, MESSAGE_BYTES_MAX
from shared.errors import DETAILS_KEY, ErrorMap
from shared.refusal import Refusal
from shared.settings import Settings

POD_KEY = "holdfast-pod"
log = structlog.get_logger(__name__)
Server = grpc.aio.Server
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
else:
    # The stubs are generic; what they describe is not.
    Context = grpc.aio.ServicerContext
    Handler = grpc.RpcMethodHandler


class Edge(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # not generic at run time
    """Turns refusals into statuses, everything else into INTERNAL, and names the pod in each answer."""

    def __init__(self, errors: ErrorMap, pod: str) -> None:
        self._errors = errors
        self._pod = ((POD_KEY, pod),)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/holdfast."):
            return handler  # type: ignore[no-any-return]
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(self._stream(handler.stream_stream or handler.unary_stream), **codec)
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(self._unary(handler.stream_unary or handler.unary_unary), **codec)

    def _unary(self, behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def call(request: Any, context: Context) -> Any:
            try:
                response = await behaviour(request, context)
            except Exception as error:  # noqa: BLE001 - the one place that maps them all
                await self._abort(error, context)
            else:
                context.set_trailing_metadata(self._pod)
                return response

        return call

    def _stream(self, behaviour: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                async for response in behaviour(request, context):
                    yield response
            except Exception as error:  # noqa: BLE001 - as above
                await self._abort(error, context)
            else:
                context.set_trailing_metadata(self._pod)

        return call

    async def _abort(self, error: Exception, context: Context) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, Refusal):
            details = ((DETAILS_KEY, self._errors.details(error)), *self._pod)
            await context.abort(self._errors.code(error), error.message, details)
        log.error("call failed", error=type(error).__name__, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; it is in the log of the pod", self._pod)


def build(
    settings: Settings,
    errors: ErrorMap,
    register: Callable[[grpc.aio.Server], None],
    services: Sequence[str],
) -> tuple[Server, HealthServicer]:
    """A server with the API that `register` adds, health (NOT_SERVING yet) and reflection."""
    server = grpc.aio.server(
        interceptors=[Edge(errors, settings.pod)],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_connection_age_ms", settings.connection_age_seconds_max * 1000),
            ("grpc.max_connection_age_grace_ms", int(settings.drain_seconds_max * 1000)),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS * 2),
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ],
    )
    register(server)
    checks = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*services, HEALTH_NAME, reflection.SERVICE_NAME), server)
    server.add_insecure_port(settings.listen)
    return server, checks


async def serve(server: grpc.aio.Server, checks: HealthServicer, services: Sequence[str], drain_seconds: float) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    for service in ("", *services):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    log.info("serving")
    await stop.wait()
    log.info("draining", seconds_max=drain_seconds)
    await checks.enter_graceful_shutdown()
    await server.stop(drain_seconds)
    log.info("stopped")
