"""What is seen of the calls of a pod: how many there are, how they end, how long they take, and spans of the traced."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import Counter

from shared import metrics, telemetry
from shared.errors import ErrorMap
from shared.refusal import Refusal

# An answer that says so is a failure of ours; of RESOURCE_EXHAUSTED only the one for want of room.
OUR_FAULT = frozenset({"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN"})
OVERLOADED = "OVERLOADED"
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext


class Method:
    """A method's metrics, looked up once."""

    def __init__(self, name: str, errors: ErrorMap) -> None:
        self._name = name
        self._errors = errors
        self._seconds = metrics.CALL_SECONDS.labels(name)
        self._failed = metrics.CALLS_FAILED.labels(name)
        self._codes: dict[str, Counter] = {}

    def begin(self, context: Context) -> "Call":
        return Call(self, context, telemetry.serve(self._name, context))

    def outcome(self, error: BaseException, context: Context) -> tuple[str, bool]:
        """The status of a call that ends with a Refusal, a cancellation or a fault; whether it failed by our fault."""
        if isinstance(error, Refusal):
            code = self._errors.code(error).name
            return code, code in OUR_FAULT or error.reason == OVERLOADED
        if isinstance(error, asyncio.CancelledError):
            left = context.time_remaining()
            late = left is not None and left <= 0
            return (grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED).name, late
        return grpc.StatusCode.INTERNAL.name, True

    def ended(self, call: "Call") -> None:
        if call.code not in self._codes:
            self._codes[call.code] = metrics.CALLS.labels(self._name, call.code)
        self._codes[call.code].inc()
        if call.failed:
            self._failed.inc()
        seconds = time.monotonic() - call.began
        self._seconds.observe(seconds)
        telemetry.answered(self._name, call.context, call.span, call.code, seconds)


class Call:
    """A call under way."""

    __slots__ = ("began", "code", "context", "failed", "method", "span")

    def __init__(self, method: Method, context: Context, span: telemetry.Span | None) -> None:
        self.method = method
        self.context = context
        self.span = span
        self.began = time.monotonic()
        self.code, self.failed = grpc.StatusCode.OK.name, False

    def ends_with(self, error: BaseException) -> None:
        self.code, self.failed = self.method.outcome(error, self.context)

    def end(self) -> None:
        self.method.ended(self)
