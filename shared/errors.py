"""The one mapper between refusals and what gRPC sends: status, ErrorInfo, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from shared.refusal import Refusal
from shared.wire import duration

DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class ErrorMap:
    """An API's reasons and the code that each is sent with.

    `domain` is ErrorInfo's; `codes` maps each reason (without prefix) to its code. A reason that is
    not in it is a mistake of ours and is sent as INTERNAL.
    """

    domain: str
    codes: Mapping[str, grpc.StatusCode]

    def code(self, refusal: Refusal) -> grpc.StatusCode:
        return self.codes.get(refusal.reason, grpc.StatusCode.INTERNAL)

    def details(self, refusal: Refusal) -> bytes:
        """The google.rpc.Status with the refusal's ErrorInfo, as bytes; `retry_seconds` are told as RetryInfo, too."""
        info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=self.domain, metadata=refusal.metadata)
        details: list[Message] = [info]
        if "retry_seconds" in refusal.metadata:
            wait = timedelta(seconds=float(refusal.metadata["retry_seconds"]))
            details.append(error_details_pb2.RetryInfo(retry_delay=duration(wait)))
        status = status_pb2.Status(code=self.code(refusal).value[0], message=refusal.message)
        for detail in details:
            status.details.add().Pack(detail)
        return bytes(status.SerializeToString())


def refusal_of(error: grpc.RpcError) -> Refusal | None:
    """The refusal that a server of ours sent, or None when the error carries no ErrorInfo."""
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == DETAILS_KEY:
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return Refusal(info.reason, status.message, **info.metadata)
    return None
