"""`python -m bench.sink`: a collector of traces that throws them away unread, so that what is measured is the pods'."""

from typing import Any

import grpc
import uvloop

from bench.echo import serve

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


async def _taken(_request: bytes, _context: Any) -> bytes:
    return b""


def _register(server: grpc.aio.Server) -> None:
    handlers: dict[str, Any] = {"Export": grpc.unary_unary_rpc_method_handler(_taken)}  # bytes in, bytes out
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


if __name__ == "__main__":
    uvloop.run(serve(_register, ()))
