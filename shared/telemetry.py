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

Contexts, what is under way, what a span is read by and what is sent are OpenTelemetry's, so that its other tools see
them. Who is traced is decided here, before a span is made, and they are sent from the event loop: its SDK would do both
for every call, and the latter in a thread that is not waited for in time. A span itself (`Span`) is made here too: as
its attributes are our own, it needs neither the SDK's locks nor its looks at every value, which are four fifths of what
a span of the SDK costs.
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
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)

from shared import metrics
from shared.settings import Settings

KEY = "traceparent"
KEPT = frozenset({"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNKNOWN"})
ERRORS_A_SECOND_MAX = 50
QUEUE_SPANS_MAX = 4096
EXPORT_SPANS_MAX = 128
EXPORT_SECONDS = 0.5
EXPORT_SECONDS_MAX = 5.0
FLUSH_SECONDS_MAX = 1.0
LINKS_MAX = 128
TRACES_MAX = 64  # that one batch of messages goes on with
NANOSECOND = 1_000_000_000

Value = str | int | float | bool
Attributes = Mapping[str, Value]
Stub = TypeVar("Stub")
log = structlog.get_logger(__name__)
_SCOPE = InstrumentationScope("holdfast")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_ids = RandomIdGenerator()
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class Span(ReadableSpan, trace.Span):
    """A span that is recorded, of one thread; it goes to the collector when it ends. See OpenTelemetry's API."""

    _context: SpanContext
    _attributes: dict[str, Any]
    _events: list[Event]
    _links: list[Link]

    def __init__(
        self,
        name: str,
        parent: SpanContext | None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        links: Iterable[SpanContext] = (),
        start_nanos: int | None = None,
    ) -> None:
        trace_id = parent.trace_id if parent else _ids.generate_trace_id()
        super().__init__(
            name,
            SpanContext(trace_id, _ids.generate_span_id(), is_remote=False, trace_flags=_SAMPLED),
            parent,
            _process.resource,
            dict(attributes or {}),
            [],
            [Link(one) for one in links][:LINKS_MAX],
            kind,
            start_time=start_nanos or time.time_ns(),
            instrumentation_scope=_SCOPE,
        )

    def get_span_context(self) -> SpanContext:
        return self._context

    def is_recording(self) -> bool:
        return self._end_time is None

    def set_attribute(self, key: str, value: Any) -> None:
        self._attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        self._attributes.update(attributes)

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        if len(self._links) < LINKS_MAX:
            self._links.append(Link(context, attributes))

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        self._events.append(Event(name, attributes, timestamp))

    def record_exception(self, exception: BaseException, *_: Any, **__: Any) -> None:
        self.add_event("exception", {"exception.type": type(exception).__name__})

    def update_name(self, name: str) -> None:
        self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        self._status = status if isinstance(status, Status) else Status(status, description)

    def end(self, end_time: int | None = None) -> None:
        if self._end_time is None:
            self._end_time = end_time or time.time_ns()
            if _process.exporter:
                _process.exporter.take(self)


def fail(span: Span, why: str) -> None:
    """Mark it as failed; `why` is a status or a class of exceptions, as their texts may hold what somebody sent."""
    span.set_status(Status(StatusCode.ERROR, why))


# -- on and off


@dataclass(slots=True)
class _Process:
    """What this process traces with; without an exporter nothing is traced."""

    exporter: "_Exporter | None" = None
    resource: Resource | None = None
    ratio: float = 0.0
    errors: int = 0
    errors_since: float = 0.0
    ending: set[asyncio.Future[None]] = field(default_factory=set)


_process = _Process()
_by_key: ContextVar[Mapping[bytes | None, Span]] = ContextVar("spans of the messages that are processed", default={})  # noqa: B039 - never changed


@contextlib.asynccontextmanager
async def exporting(settings: Settings, service: str) -> AsyncIterator[None]:
    """Trace, as the settings say, for as long as it is entered; without a collector's address nothing is traced."""
    if not settings.otlp_endpoint:
        yield
        return
    about = {"service.namespace": "holdfast", "service.name": service, "service.instance.id": settings.pod}
    exporter = _Exporter(settings.otlp_endpoint)
    _process.exporter, _process.ratio = exporter, settings.trace_sample_ratio
    _process.resource = _Resource(Resource.create(about).attributes)
    sending = asyncio.create_task(exporter.run())
    try:
        yield
    finally:
        _process.exporter = None
        await exporter.close(sending)


class _Resource(Resource):
    """The one of this process, by which spans are gathered: known by identity; OpenTelemetry's is by its JSON."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class _Exporter:
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

    def take(self, span: ReadableSpan) -> None:
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
            await self._stub.Export(encode_spans(spans), timeout=EXPORT_SECONDS_MAX, wait_for_ready=True)
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
    """The span under way, if it is recorded here."""
    if _process.exporter is None:
        return None
    span = get_current_span()
    return span if isinstance(span, Span) and span.is_recording() else None


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
    parent = current()
    if parent is None:
        yield None
        return
    with _under_way(Span(name, parent.get_span_context(), kind, attributes)) as made:
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
    known = _read(parent) if parent and _process.exporter else None
    if known is None or not known.trace_flags.sampled:
        return None
    return Span(name, known, kind, attributes)


@contextlib.contextmanager
def _under_way(span: Span) -> Iterator[Span]:
    token = contexts.attach(set_span_in_context(span))
    try:
        with ending([span]):
            yield span
    finally:
        contexts.detach(token)


@contextlib.contextmanager
def ending(spans: Collection[Span]) -> Iterator[None]:
    """End spans together; what is raised marks them as failed."""
    try:
        yield
    except BaseException as error:
        for one in spans:
            fail(one, type(error).__name__)
        raise
    finally:
        for one in spans:
            one.end()


def leave() -> None:
    """Let go of what is under way, in a task that works for others than who started it."""
    if _process.exporter is not None:
        contexts.attach(contexts.Context())


# -- calls


def serve(method: str, context: Any) -> Span | None:
    """The span of a call that has come, under way in its task; None when it is not traced."""
    if _process.exporter is None:
        return None
    caller = _caller(context)
    if not (caller.trace_flags.sampled if caller else random.random() < _process.ratio):  # noqa: S311 - a sample
        return None
    made = Span(method, caller, SpanKind.SERVER, _of_call(method))
    contexts.attach(set_span_in_context(made))  # a call has a task of its own, and with it a context
    return made


def answered(method: str, context: Any, span: Span | None, code: str, seconds: float) -> None:
    """End a call's span; an error of ours gets one even where the call was not traced."""
    if span is None:
        if _process.exporter is None or code not in KEPT or not _room_for_an_error():
            return
        began = time.time_ns() - int(seconds * NANOSECOND)
        span = Span(method, _caller(context), SpanKind.SERVER, _of_call(method), start_nanos=began)
    _ends(span, code, failed=code in KEPT)


def _of_call(method: str) -> Attributes:
    return {"rpc.system.name": "grpc", "rpc.method": method}


def _ends(span: Span, code: str, *, failed: bool) -> None:
    span.set_attribute("rpc.response.status_code", code)
    if failed:
        fail(span, code)
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
        known = under_way.get_span_context()
        if not known.is_valid:
            return self._call(request, metadata=metadata, **more)
        made = Span(self._name, known, SpanKind.CLIENT, _of_call(self._name)) if current() else None
        call = self._call(request, metadata=(*(metadata or ()), (KEY, written(made or under_way))), **more)
        if made is not None:
            answer = asyncio.ensure_future(_answer(made, call))
            _process.ending.add(answer)
            answer.add_done_callback(_process.ending.discard)
        return call


async def _answer(span: Span, call: Any) -> None:
    code = (await call.code()).name
    _ends(span, code, failed=code != "OK")


# -- batches


@contextlib.contextmanager
def batch(name: str, callers: Iterable[Span | None], attributes: Attributes) -> Iterator[Span | None]:
    """The span of a batch, under way: linked to its traced callers, and they to it. None where none is traced."""
    told = list({id(one): one for one in callers if one is not None}.values())
    if not told:
        yield None
        return
    known = [one.get_span_context() for one in told]
    made = Span(f"batch {name}", known[0], attributes=attributes, links=known)
    for one in told:
        one.add_link(made.get_span_context())
    with _under_way(made):
        yield made


@contextlib.contextmanager
def processing(name: str, messages: Sequence[Any], attributes: Attributes) -> Iterator[None]:
    """A span for each trace that a batch of Kafka messages has; the first is under way, the others link to it."""
    spans: list[Span] = []
    by_key: dict[bytes | None, Span] = {}
    for value, keys in (_by_trace(messages) if _process.exporter else {}).items():
        known = _read(value.decode(errors="replace"))
        if known and known.trace_flags.sampled and len(spans) < TRACES_MAX:
            told = {**attributes, "messaging.batch.message_count": len(keys)}
            made = Span(name, known, SpanKind.CONSUMER, told, [one.get_span_context() for one in spans[:1]])
            spans.append(made)
            by_key |= dict.fromkeys(keys, made)
    if not spans:
        yield
        return
    token = _by_key.set(by_key)
    try:
        with ending(spans[1:]), _under_way(spans[0]):
            yield
    finally:
        _by_key.reset(token)


def _by_trace(messages: Sequence[Any]) -> dict[bytes, list[bytes | None]]:
    """The keys of messages by their trace context; those without one are left out."""
    found: dict[bytes, list[bytes | None]] = {}
    for message in messages:
        for header, value in message.headers:
            if header == KEY:
                found.setdefault(value, []).append(message.key)
    return found


# -- W3C Trace Context


def _read(value: Any) -> SpanContext | None:
    found = _TRACEPARENT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    known = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & TraceFlags.SAMPLED))
    return known if known.is_valid else None


def written(span: trace.Span) -> str:
    """The W3C context of a span."""
    known = span.get_span_context()
    return f"00-{known.trace_id:032x}-{known.span_id:016x}-{known.trace_flags:02x}"
