"""`python -m bench.echo`: a bare grpc.aio server with Holdfast's messages and nothing behind them.

What it reaches is the ceiling of Python, gRPC and the load generator on this machine: the line that
everything else is drawn against.
"""

import asyncio
import os
import signal
from typing import Any

import grpc
import uvloop
from holdfast.inventory.v1 import inventory_pb2, inventory_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2, reservation_pb2_grpc

from shared import reflection

SERVICES = (
    "holdfast.inventory.v1.InventoryService",
    "holdfast.reservation.v1.ReservationService",
)


class Reservations(reservation_pb2_grpc.ReservationServiceServicer):
    """Says HELD to everyone."""

    async def Reserve(  # noqa: N802 - gRPC gives the name
        self, request: reservation_pb2.ReserveRequest, context: Any
    ) -> reservation_pb2.ReserveResponse:
        del context
        return reservation_pb2.ReserveResponse(
            outcome=reservation_pb2.RESERVE_OUTCOME_HELD,
            reservation=reservation_pb2.Reservation(
                reservation_id=request.reservation_id,
                state=reservation_pb2.RESERVATION_STATE_HELD,
                lines=request.lines,
            ),
        )


class Inventory(inventory_pb2_grpc.InventoryServiceServicer):
    """Says one unit to everyone."""

    async def GetAvailability(  # noqa: N802 - gRPC gives the name
        self, request: inventory_pb2.GetAvailabilityRequest, context: Any
    ) -> inventory_pb2.GetAvailabilityResponse:
        del context
        return inventory_pb2.GetAvailabilityResponse(
            stocks=[
                inventory_pb2.Stock(sku=key.sku, location=key.location, on_hand=1, available=1) for key in request.keys
            ]
        )


async def serve() -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    reservation_pb2_grpc.add_ReservationServiceServicer_to_server(Reservations(), server)  # type: ignore[abstract] # the rest is UNIMPLEMENTED
    inventory_pb2_grpc.add_InventoryServiceServicer_to_server(Inventory(), server)  # type: ignore[abstract] # as above
    reflection.enable(SERVICES, server)
    server.add_insecure_port(os.environ["HOLDFAST_LISTEN"])
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(1)


if __name__ == "__main__":
    uvloop.run(serve())
