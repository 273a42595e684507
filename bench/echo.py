"""`python -m bench.echo`: a bare grpc.aio server with Holdfast's messages and nothing behind them.

What it reaches is the ceiling of Python, gRPC and the load generator on this machine: the line that
everything else is drawn against.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import uvloop
from holdfast.inventory.v1 import inventory_pb2, inventory_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2, reservation_pb2_grpc

from shared import reflection

INVENTORY = inventory_pb2.DESCRIPTOR.services_by_name["InventoryService"].full_name
RESERVATIONS = reservation_pb2.DESCRIPTOR.services_by_name["ReservationService"].full_name


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


async def serve(register: Callable[[grpc.aio.Server], None], services: Sequence[str]) -> None:
    """Serve what `register` adds on HOLDFAST_LISTEN, with reflection, until SIGTERM."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    register(server)
    reflection.enable(services, server)
    server.add_insecure_port(os.environ["HOLDFAST_LISTEN"])
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(1)


def _register(server: grpc.aio.Server) -> None:
    reservations = Reservations()  # type: ignore[abstract] # the rest is UNIMPLEMENTED
    inventory = Inventory()  # type: ignore[abstract] # as above
    reservation_pb2_grpc.add_ReservationServiceServicer_to_server(reservations, server)
    inventory_pb2_grpc.add_InventoryServiceServicer_to_server(inventory, server)


if __name__ == "__main__":
    uvloop.run(serve(_register, (INVENTORY, RESERVATIONS)))
