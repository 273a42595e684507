"""A small typed client of Holdfast, balanced over all pods.

    async with Holdfast("dns:///inventory:50051", "dns:///reservation:50051") as holdfast:
        answer = await holdfast.reserve("order-1", [("85123A", "", 6)])
        if answer.outcome == reservation_pb2.RESERVE_OUTCOME_HELD:
            await holdfast.confirm("order-1", "order-1-paid")

Ids are the caller's: a call that failed or was lost is made again with the same ids, and gets its first
outcome. What a server refuses is raised as `shared.refusal.Refusal`; anything else as grpc.aio.AioRpcError. A call
carries the W3C context (`traceparent`) of the OpenTelemetry span under way, if there is one.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from holdfast.analytics.v1 import analytics_pb2, analytics_pb2_grpc, fraud_pb2_grpc, notification_pb2_grpc
from holdfast.inventory.v1 import inventory_pb2, inventory_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2, reservation_pb2_grpc

from shared.channel import open_channel
from shared.errors import refusal_of
from shared.server import POD_KEY
from shared.telemetry import traced
from shared.wire import timestamp

T = TypeVar("T")
Line = tuple[str, str, int]  # sku, location ("" for any), units
IMPORT_CHUNK_ROWS = 500


class Holdfast:
    """All services' calls. `pods` counts the answers that each pod gave. Analytics may be left out.

    `tls_directory` holds the caller's tls.crt and tls.key, and the ca.crt that it trusts.
    """

    def __init__(
        self,
        inventory_target: str,
        reservation_target: str,
        analytics_target: str = "",
        *,
        tls_directory: str = "",
    ) -> None:
        targets = [inventory_target, reservation_target, analytics_target]
        self._channels = [open_channel(target, tls_directory) for target in targets if target]
        self.inventory = traced(inventory_pb2_grpc.InventoryServiceStub(self._channels[0]))
        self.reservation = traced(reservation_pb2_grpc.ReservationServiceStub(self._channels[1]))
        self.analytics = traced(analytics_pb2_grpc.AnalyticsServiceStub(self._channels[-1]))
        self.fraud = traced(fraud_pb2_grpc.FraudServiceStub(self._channels[-1]))
        self.notifications = traced(notification_pb2_grpc.NotificationServiceStub(self._channels[-1]))
        self.pods: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)

    async def reserve(
        self,
        reservation_id: str,
        lines: Iterable[Line | reservation_pb2.ReservationLine],
        *,
        mode: reservation_pb2.ReserveMode.ValueType = reservation_pb2.RESERVE_MODE_ALL,
        ttl: timedelta | None = None,
        customer_id: str = "",
        order_time: datetime | None = None,
        country: str = "",
        device_id: str = "",
        ip_address: str = "",
    ) -> reservation_pb2.ReserveResponse:
        """Hold stock. Being sold out is the outcome REJECTED, not an error."""
        asked = [
            reservation_pb2.ReservationLine(sku=line[0], location=line[1], quantity=line[2])
            if isinstance(line, tuple)
            else line
            for line in lines
        ]
        request = reservation_pb2.ReserveRequest(
            reservation_id=reservation_id, customer_id=customer_id, lines=asked, mode=mode, ttl=_duration(ttl),
            order_time=timestamp(order_time) if order_time else None, country=country, device_id=device_id,
            ip_address=ip_address,
        )  # fmt: skip
        return await self._call(self.reservation.Reserve(request))

    async def confirm(
        self, reservation_id: str, request_id: str, lines: Sequence[Line] = ()
    ) -> reservation_pb2.ConfirmResponse:
        """Sell what is held, or some of it."""
        return await self._call(
            self.reservation.Confirm(
                reservation_pb2.ConfirmRequest(
                    reservation_id=reservation_id, request_id=request_id, lines=_lines(lines)
                )
            )
        )

    async def cancel(
        self, reservation_id: str, request_id: str, lines: Sequence[Line] = ()
    ) -> reservation_pb2.CancelResponse:
        """Give back what is held, or some of it."""
        return await self._call(
            self.reservation.Cancel(
                reservation_pb2.CancelRequest(reservation_id=reservation_id, request_id=request_id, lines=_lines(lines))
            )
        )

    async def extend(self, reservation_id: str, request_id: str, ttl: timedelta) -> reservation_pb2.ExtendResponse:
        """Hold it longer."""
        return await self._call(
            self.reservation.Extend(
                reservation_pb2.ExtendRequest(reservation_id=reservation_id, request_id=request_id, ttl=_duration(ttl))
            )
        )

    async def get(self, reservation_id: str) -> reservation_pb2.Reservation:
        """Read a reservation."""
        request = reservation_pb2.GetReservationRequest(reservation_id=reservation_id)
        return (await self._call(self.reservation.GetReservation(request))).reservation

    async def resolve(
        self,
        subjects: Iterable[str] = (),
        *,
        customers: Iterable[str] = (),
        devices: Iterable[str] = (),
        networks: Iterable[str] = (),
    ) -> list[reservation_pb2.Subject]:
        """Who stands behind keyed hashes, or which hashes stand for customers, devices and networks (or addresses)."""
        kinds = (
            (reservation_pb2.IDENTITY_KIND_CUSTOMER, customers),
            (reservation_pb2.IDENTITY_KIND_DEVICE, devices),
            (reservation_pb2.IDENTITY_KIND_NETWORK, networks),
        )
        request = reservation_pb2.ResolveSubjectsRequest(
            subjects=subjects,
            identities=[reservation_pb2.Subject(kind=kind, value=value) for kind, values in kinds for value in values],
        )
        return list((await self._call(self.reservation.ResolveSubjects(request))).subjects)

    async def adjust(
        self,
        request_id: str,
        sku: str,
        location: str,
        reason: inventory_pb2.AdjustmentReason.ValueType,
        quantity: int,
        **more: Any,
    ) -> inventory_pb2.AdjustStockResponse:
        """Change stock; `more` are other fields of StockAdjustment."""
        adjustment = inventory_pb2.StockAdjustment(
            request_id=request_id,
            key=inventory_pb2.StockKey(sku=sku, location=location),
            reason=reason,
            quantity=quantity,
            **more,
        )
        return await self._call(self.inventory.AdjustStock(inventory_pb2.AdjustStockRequest(adjustment=adjustment)))

    async def availability(self, keys: Iterable[tuple[str, str]]) -> list[inventory_pb2.Stock]:
        """Stock of (sku, location) keys, in their order; location "" for the sum over all."""
        asked = [inventory_pb2.AvailabilityKey(sku=sku, location=location) for sku, location in keys]
        request = inventory_pb2.GetAvailabilityRequest(keys=asked)
        return list((await self._call(self.inventory.GetAvailability(request))).stocks)

    async def import_stock(
        self, request_id: str, rows: Sequence[inventory_pb2.ImportRow], *, dry_run: bool = False
    ) -> inventory_pb2.ImportStockResponse:
        """Load a catalogue or opening stock."""

        async def messages() -> AsyncIterator[inventory_pb2.ImportStockRequest]:
            header = inventory_pb2.ImportHeader(request_id=request_id, dry_run=dry_run)
            yield inventory_pb2.ImportStockRequest(header=header)
            for start in range(0, len(rows), IMPORT_CHUNK_ROWS):
                chunk = inventory_pb2.ImportRows(rows=rows[start : start + IMPORT_CHUNK_ROWS])
                yield inventory_pb2.ImportStockRequest(rows=chunk)

        return await self._call(self.inventory.ImportStock(messages()))

    async def freshness(self) -> analytics_pb2.GetFreshnessResponse:
        """How far analytics has followed the other services."""
        return await self._call(self.analytics.GetFreshness(analytics_pb2.GetFreshnessRequest()))

    async def report(self, name: str, request: Any, *, pages_max: int = 1_000) -> list[Any]:
        """The rows of a report or of the stock view, such as `report("ReportSales", request)`, as `every`."""
        return await self.every(getattr(self.analytics, name), request, "rows", pages_max=pages_max)

    async def every(
        self, call: Callable[[Any], Awaitable[Any]], request: Any, field: str, *, pages_max: int = 1_000
    ) -> list[Any]:
        """What the answers of a list have in `field`, page after page. Raises ValueError beyond `pages_max` of them."""
        asked = type(request)()
        asked.CopyFrom(request)
        found: list[Any] = []
        for _ in range(pages_max):
            answer = await self._call(call(asked))
            found += getattr(answer, field)
            asked.page_token = answer.next_page_token
            if not asked.page_token:
                return found
        raise ValueError(f"the list has more pages than pages_max={pages_max}")

    async def _call(self, call: Awaitable[T]) -> T:
        """Wait for a call, count its pod, and raise what was refused."""
        assert isinstance(call, grpc.aio.Call)
        try:
            answer: T = await call
        except grpc.aio.AioRpcError as error:
            self._count(error.trailing_metadata())
            refusal = refusal_of(error)
            if refusal:
                raise refusal from error
            raise
        self._count(await call.trailing_metadata())
        return answer

    def _count(self, metadata: Any) -> None:
        for key, value in metadata or ():
            if key == POD_KEY:
                self.pods[value] += 1


def _lines(lines: Sequence[Line]) -> list[reservation_pb2.LineQuantity]:
    return [reservation_pb2.LineQuantity(sku=sku, location=location, quantity=units) for sku, location, units in lines]


def _duration(value: timedelta | None) -> Duration | None:
    if value is None:
        return None
    duration = Duration()
    duration.FromTimedelta(value)
    return duration
