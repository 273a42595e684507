r"""Traces: one from a client's call to the message that a subscriber gets, through every batch, outbox and topic.

    Reserve -> batch -> PlaceHolds -> batch -> transaction, outbox -> send -> process -> alert -> deliver
                 \-> transaction, outbox -> send -> process -> decide -> alert -> deliver

* **Who is traced** is decided where a trace begins: a caller that sends `traceparent` has decided; of the others a
  share of `trace_sample_ratio` is. What is not traced makes no span and costs a look at the call's metadata. A call
  that ends with an error of ours (`KEPT`) is told all the same, in one span made afterwards: at most
  ERRORS_A_SECOND_MAX of them, so that an overload is not made worse.
* **A batch has many callers.** Its span is the first traced caller's child and linked to all of them, and each of
  their spans is linked to it. What the batch makes, its events too, is of the batch's trace. A batch without a traced
  caller has no span.
* **An event** keeps the `traceparent` of the transaction that made it in its group's row of the outbox, and has that
  of its sending in the message's header. Who works a batch of messages makes a span for each trace in it.
* **The collector may be absent, slow or hang.** Spans wait in a queue of QUEUE_SPANS_MAX; what is more, or was not
  taken within EXPORT_SECONDS_MAX, is dropped and counted. Sending is one task on the event loop, for which nobody
  waits but who stops: FLUSH_SECONDS_MAX at the most.
* **No personal data**: attributes are names of methods, queues, topics and rules, SKUs, counts and outcomes. Of an
  exception only the class is told.
"""

import asyncio
import contextlib
import random
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import structlog
from opentelemetry import context as contexts
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
)

from shared import metrics
from shared.settings import Settings

KEY = "traceparent"
KEPT = frozenset({"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNKNOWN", "DATA_LOSS"})
ERRORS_A_SECOND_MAX = 50
QUEUE_SPANS_MAX = 4096
EXPORT_SPANS_MAX = 128
EXPORT_SECONDS = 0.5
EXPORT_SECONDS_MAX = 5.0
FLUSH_SECONDS_MAX = 1.0
LINKS_MAX = 128
TRACES_MAX = 64  # in one batch of messages; the others of it go on in the next service untold
NANOSECOND = 1_000_000_000

Attributes = Mapping[str, str | int | float | bool]
Stub = TypeVar("Stub")
log = structlog.get_logger(__name__)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


@dataclass(slots=True)
class _Process:
    """What this process traces with; without a tracer nothing is traced."""

    tracer: Tracer | None = None
    ratio: float = 0.0
    errors: int = 0
    errors_since: float = 0.0
    ending: set[asyncio.Future[None]] = field(default_factory=set)


_process = _Process()
_by_key: ContextVar[Mapping[bytes | None, Span]] = ContextVar("spans of the messages that are processed", default={})  # noqa: B039 - never changed


# -- on and off


@contextlib.asynccontextmanager
async def exporting(settings: Settings, service: str) -> AsyncIterator[None]:
    """Trace, as the settings say, for as long as it is entered; without a collector's address nothing is traced."""
    if not settings.otlp_endpoint:
        yield
        return
    exporter = _Exporter(settings.otlp_endpoint)
    about = {"service.namespace": "holdfast", "service.name": service, "service.instance.id": settings.pod}
    provider = TracerProvider(
        ALWAYS_ON,  # who is traced is decided here, before a span is made
        Resource.create(about),
        shutdown_on_exit=False,
        span_limits=SpanLimits(max_links=LINKS_MAX),
    )
    provider.add_span_processor(exporter)
    _process.tracer, _process.ratio = provider.get_tracer("holdfast"), settings.trace_sample_ratio
    sending = asyncio.create_task(exporter.run())
    try:
        yield
    finally:
        _process.tracer = None
        await exporter.close(sending)


class _Exporter(SpanProcessor):
    """Sends ended spans to a collector, in order, a batch at a time."""

    def __init__(self, endpoint: str) -> None:
        address = endpoint.rpartition("://")[2].rstrip("/")
        secure = endpoint.startswith("https://")
        self._channel = (
            grpc.aio.secure_channel(address, grpc.ssl_channel_credentials())
            if secure
            else grpc.aio.insecure_channel(address)
        )
        self._stub = TraceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._waiting: deque[ReadableSpan] = deque()
        self._closing = asyncio.Event()
        self._away = False

    def on_end(self, span: ReadableSpan) -> None:
        if len(self._waiting) < QUEUE_SPANS_MAX:
            self._waiting.append(span)
        else:
            metrics.SPANS_DROPPED.labels("full").inc()

    async def run(self) -> None:
        """Send what waits, every EXPORT_SECONDS, until closed."""
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), EXPORT_SECONDS)
            while self._waiting:
                await self._send([self._waiting.popleft() for _ in range(min(EXPORT_SPANS_MAX, len(self._waiting)))])

    async def _send(self, spans: Sequence[ReadableSpan]) -> None:
        taken = False
        try:
            request = encode_spans(spans)
            await self._stub.Export(request, timeout=EXPORT_SECONDS_MAX, wait_for_ready=True)
            taken = True
        except grpc.aio.AioRpcError as error:
            if not self._away:
                log.warning("the collector of traces is away", code=error.code().name)
        finally:
            self._away = not taken
            (metrics.SPANS if taken else metrics.SPANS_DROPPED.labels("export")).inc(len(spans))

    async def close(self, sending: "asyncio.Task[None]") -> None:
        """Send what waits, for FLUSH_SECONDS_MAX at the most; the rest is lost."""
        self._closing.set()
        await asyncio.wait([sending], timeout=FLUSH_SECONDS_MAX)
        sending.cancel()
        await asyncio.wait([sending])
        metrics.SPANS_DROPPED.labels("export").inc(len(self._waiting))
        await self._channel.close(None)


# -- what is under way


def current() -> Span | None:
    """The span under way, if it is recorded."""
    if _process.tracer is None:
        return None
    span = get_current_span()
    return span if span.is_recording() else None


def traceparent() -> str:
    """The W3C context of what is under way, or empty."""
    span = current()
    return written(span) if span else ""


def traceparent_of(key: str) -> str:
    """The W3C context of the messages with this key, of those that are processed; empty where they are not traced."""
    span = _by_key.get().get(key.encode())
    return written(span) if span else ""


@contextlib.contextmanager
def span(name: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes | None = None) -> Iterator[Span | None]:
    """A child of what is under way, if that is traced; what is raised marks it as failed."""
    tracer = _process.tracer
    if tracer is None or current() is None:
        yield None
        return
    with _under_way(tracer.start_span(name, kind=kind, attributes=attributes)) as made:
        yield made


@contextlib.contextmanager
def following(
    name: str, parent: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes | None = None
) -> Iterator[Span | None]:
    """As `span`, a child of what was kept as `parent`."""
    made = follow(name, parent, kind, attributes)
    if made is None:
        yield None
        return
    with _under_way(made):
        yield made


def follow(
    name: str, parent: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes | None = None
) -> Span | None:
    """A child of what was kept as `parent`, to be ended by the caller; None when that is empty or not traced."""
    if not parent or _process.tracer is None:
        return None
    known = _read(parent)
    if known is None or not known.trace_flags.sampled:
        return None
    return _process.tracer.start_span(name, _in(known), kind, attributes)


@contextlib.contextmanager
def _under_way(span: Span) -> Iterator[Span]:
    token = contexts.attach(set_span_in_context(span))
    try:
        yield span
    except BaseException as error:
        _fail(span, error)
        raise
    finally:
        contexts.detach(token)
        span.end()


@contextlib.contextmanager
def ending(spans: Collection[Span]) -> Iterator[None]:
    """End spans together; what is raised marks them as failed."""
    try:
        yield
    except BaseException as error:
        for one in spans:
            _fail(one, error)
        raise
    finally:
        for one in spans:
            one.end()


def _fail(span: Span, error: BaseException) -> None:
    """Mark a span as failed. The error's text may hold what somebody sent: its class is told alone."""
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))


def leave() -> None:
    """Let go of what is under way, in a task that works for others than who started it."""
    if _process.tracer is not None:
        contexts.attach(contexts.Context())


# -- calls


def serve(method: str, context: Any) -> Span | None:
    """The span of a call that has come, under way in its task; None when it is not traced."""
    tracer = _process.tracer
    if tracer is None:
        return None
    caller = _caller(context)
    if not (caller.trace_flags.sampled if caller else random.random() < _process.ratio):  # noqa: S311 - a sample
        return None
    made = tracer.start_span(method, _in(caller), SpanKind.SERVER, {"rpc.system.name": "grpc", "rpc.method": method})
    contexts.attach(set_span_in_context(made))  # a call has a task of its own, and with it a context
    return made


def answered(method: str, context: Any, span: Span | None, code: str, seconds: float) -> None:
    """End a call's span; an error of ours gets one even where the call was not traced."""
    tracer = _process.tracer
    if span is None:
        if tracer is None or code not in KEPT or not _room_for_an_error():
            return
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        began = time.time_ns() - int(seconds * NANOSECOND)
        span = tracer.start_span(method, _in(_caller(context)), SpanKind.SERVER, attributes, start_time=began)
    span.set_attribute("rpc.response.status_code", code)
    if code in KEPT:
        span.set_status(Status(StatusCode.ERROR, code))
    span.end()


def _room_for_an_error() -> bool:
    now = time.monotonic()
    if now - _process.errors_since >= 1:
        _process.errors, _process.errors_since = 0, now
    _process.errors += 1
    if _process.errors > ERRORS_A_SECOND_MAX:
        metrics.SPANS_DROPPED.labels("errors").inc()
        return False
    return True


def _caller(context: Any) -> SpanContext | None:
    for key, value in context.invocation_metadata() or ():
        if key == KEY:
            return _read(value)
    return None


def traced(stub: Stub) -> Stub:
    """A generated stub whose unary calls have spans and carry `traceparent`, while something traced is under way."""
    package, service = type(stub).__module__.rpartition(".")[0], type(stub).__name__.removesuffix("Stub")
    for name, call in list(vars(stub).items()):
        if isinstance(call, grpc.aio.UnaryUnaryMultiCallable):
            setattr(stub, name, _Traced(call, f"{package}.{service}/{name}"))
    return stub


class _Traced:
    """A method of a stub. Where nothing of ours is under way, but something of the caller's, that is handed on."""

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self._call = call
        self._name = name

    def __call__(self, request: Any, *, metadata: Any = None, **more: Any) -> Any:
        under_way = get_current_span()
        if not under_way.get_span_context().is_valid:
            return self._call(request, metadata=metadata, **more)
        made = None
        if _process.tracer is not None and under_way.is_recording():
            attributes = {"rpc.system.name": "grpc", "rpc.method": self._name}
            made = _process.tracer.start_span(self._name, kind=SpanKind.CLIENT, attributes=attributes)
        call = self._call(request, metadata=(*(metadata or ()), (KEY, written(made or under_way))), **more)
        if made is not None:
            ending = asyncio.ensure_future(_ended(made, call))
            _process.ending.add(ending)
            ending.add_done_callback(_process.ending.discard)
        return call


async def _ended(span: Span, call: Any) -> None:
    code = (await call.code()).name
    span.set_attribute("rpc.response.status_code", code)
    if code != "OK":
        span.set_status(Status(StatusCode.ERROR, code))
    span.end()


# -- batches


@contextlib.contextmanager
def batch(name: str, callers: Iterable[Span | None], attributes: Attributes) -> Iterator[Span | None]:
    """The span of a batch, under way: linked to its traced callers, and they to it. None where none is traced."""
    tracer = _process.tracer
    told = list({id(one): one for one in callers if one is not None}.values())
    if tracer is None or not told:
        yield None
        return
    links = [Link(one.get_span_context()) for one in told[:LINKS_MAX]]
    made = tracer.start_span(f"batch {name}", set_span_in_context(told[0]), attributes=attributes, links=links)
    for one in told:
        one.add_link(made.get_span_context())
    with _under_way(made):
        yield made


@contextlib.contextmanager
def processing(name: str, messages: Sequence[Any], attributes: Attributes) -> Iterator[None]:
    """A span for each trace that a batch of Kafka messages has; the first is under way, the others link to it."""
    tracer = _process.tracer
    found: dict[bytes, list[bytes | None]] = {}
    if tracer is not None:
        for message in messages:
            for header, value in message.headers:
                if header == KEY and (value in found or len(found) < TRACES_MAX):
                    found.setdefault(value, []).append(message.key)
    parents = [(known, keys) for value, keys in found.items() if (known := _read(value.decode(errors="replace")))]
    parents = [(known, keys) for known, keys in parents if known.trace_flags.sampled]
    if tracer is None or not parents:
        yield
        return
    spans: list[Span] = []
    for known, keys in parents:
        links = [Link(one.get_span_context()) for one in spans[:1]]
        told = {**attributes, "messaging.batch.message_count": len(keys)}
        spans.append(tracer.start_span(name, _in(known), SpanKind.CONSUMER, told, links))
    token = _by_key.set({key: span for span, (_, keys) in zip(spans, parents, strict=True) for key in keys})
    try:
        with ending(spans[1:]), _under_way(spans[0]):
            yield
    finally:
        _by_key.reset(token)


# -- W3C Trace Context


def _read(value: Any) -> SpanContext | None:
    found = _TRACEPARENT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    known = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & TraceFlags.SAMPLED))
    return known if known.is_valid else None


def written(span: Span) -> str:
    """The W3C context of a span."""
    known = span.get_span_context()
    return f"00-{known.trace_id:032x}-{known.span_id:016x}-{known.trace_flags:02x}"


def _in(parent: SpanContext | None) -> contexts.Context:
    """A context in which `parent` is under way; none is in the empty one, where a trace begins."""
    return set_span_in_context(NonRecordingSpan(parent), contexts.Context()) if parent else contexts.Context()
