"""A collector of traces within the test's process: what is exported to it is there to be looked at."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry import context as contexts
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

SECONDS_MAX = 30
EXPORTED_SECONDS_MAX = 5


@dataclass(frozen=True)
class Seen:
    """A span: ids in hex, its parent's empty at the root; `links` are (trace, span)."""

    trace: str
    span: str
    parent: str
    name: str
    kind: str
    service: str
    pod: str
    status: str
    start_nanos: int
    end_nanos: int
    attributes: dict[str, Any]
    links: set[tuple[str, str]]


def _seen(span: trace_pb2.Span, resource: dict[str, Any]) -> Seen:
    return Seen(
        span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name,
        trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        resource["service.name"], resource["service.instance.id"],
        trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        span.start_time_unix_nano, span.end_time_unix_nano, _values(span.attributes),
        {(link.trace_id.hex(), link.span_id.hex()) for link in span.links},
    )  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span; `raw` are the requests as they came. Takes its time while `answering` is not set."""

    port: int = 0
    spans: list[Seen] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    answering: threading.Event = field(default_factory=threading.Event)
    _came: threading.Condition = field(default_factory=threading.Condition)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(  # noqa: N802 - gRPC gives the name
        self, request: trace_service_pb2.ExportTraceServiceRequest, _context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.answering.wait(SECONDS_MAX)
        seen = [
            _seen(span, _values(group.resource.attributes))
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._came:
            self.spans += seen
            self.raw.append(request.SerializeToString())
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace: str) -> list[Seen]:
        with self._came:
            return [span for span in self.spans if span.trace == trace]

    def wait(self, trace: str, enough: Callable[[list[Seen]], bool], seconds_max: float = SECONDS_MAX) -> list[Seen]:
        """The spans of a trace once there are enough of them; a failure says which there were."""
        until = time.monotonic() + seconds_max
        with self._came:
            while not enough(found := [span for span in self.spans if span.trace == trace]):
                left = until - time.monotonic()
                assert left > 0, f"only {sorted((span.service, span.name) for span in found)}"
                self._came.wait(left)
            return found


@contextmanager
def calling(*, sampled: bool) -> Iterator[tuple[str, str]]:
    """A span of the caller's under way: its trace and its own id, in hex."""
    known = SpanContext(secrets.randbits(128), secrets.randbits(64), is_remote=False, trace_flags=TraceFlags(sampled))
    token = contexts.attach(set_span_in_context(NonRecordingSpan(known)))
    try:
        yield f"{known.trace_id:032x}", f"{known.span_id:016x}"
    finally:
        contexts.detach(token)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of loopback, in threads of its own."""
    server = grpc.server(ThreadPoolExecutor(4, "collector"))
    collector = Collector(server.add_insecure_port("127.0.0.1:0"))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    server.start()
    collector.answering.set()
    try:
        yield collector
    finally:
        server.stop(0).wait()
