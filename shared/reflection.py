"""Server reflection that also finds methods.

The pool of Python's protobuf does not know a method by its full name, which is how ghz asks for what it
calls ("Symbol not found"); grpcurl asks for the service. The pool here answers both.
"""

from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

NAME: str = reflection.SERVICE_NAME


class _Pool:
    """The default pool, and the methods of its services."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:  # noqa: N802 - the pool's name for it
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            if method not in found.methods_by_name:
                raise
            return found.file


def enable(services: Sequence[str], server: Any) -> None:
    """Serve reflection of the services, and of itself, on an asyncio server or what stands before it."""
    pool: Any = _Pool()
    servicer = ReflectionServicer((*services, NAME), pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
