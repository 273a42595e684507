"""`python -m bench.usual`: the usual way of doing it, written as well as the usual way can be.

One transaction a request through SQLAlchemy: look for the request id, SELECT ... FOR UPDATE the stock
rows in order of their keys, check, update, insert hold, movement, reservation and events, commit. The
tables are Holdfast's, and so are the answers. Durable, correct, no batching.
"""

import os
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import sqlalchemy as sa
import uvloop
from holdfast.inventory.v1 import events_pb2 as stock_events
from holdfast.inventory.v1 import inventory_pb2
from holdfast.reservation.v1 import events_pb2, reservation_pb2, reservation_pb2_grpc
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from bench.echo import RESERVATIONS, serve

TTL = timedelta(minutes=15)
CONNECTIONS_MAX = 32


class Base(DeclarativeBase):
    """The tables that a Reserve touches."""


class Stock(Base):
    __tablename__ = "stock"
    sku: Mapped[str] = mapped_column(primary_key=True)
    location: Mapped[str] = mapped_column(primary_key=True)
    on_hand: Mapped[int] = mapped_column(sa.BigInteger)
    held: Mapped[int] = mapped_column(sa.BigInteger)
    safety_stock: Mapped[int] = mapped_column(sa.BigInteger)
    backorder_limit: Mapped[int] = mapped_column(sa.BigInteger)
    short: Mapped[int] = mapped_column(sa.BigInteger)
    version: Mapped[int] = mapped_column(sa.BigInteger)
    active: Mapped[bool]


class Hold(Base):
    __tablename__ = "hold"
    sku: Mapped[str] = mapped_column(primary_key=True)
    hold_id: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True)
    location: Mapped[str]
    quantity: Mapped[int] = mapped_column(sa.BigInteger)
    held: Mapped[int] = mapped_column(sa.BigInteger)
    fingerprint: Mapped[bytes]
    created_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
    expires_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))


class Movement(Base):
    __tablename__ = "movement"
    sku: Mapped[str] = mapped_column(primary_key=True)
    location: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    recorded_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), primary_key=True)
    kind: Mapped[str]
    on_hand_delta: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    held_delta: Mapped[int] = mapped_column(sa.BigInteger)
    short_delta: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    on_hand: Mapped[int] = mapped_column(sa.BigInteger)
    held: Mapped[int] = mapped_column(sa.BigInteger)
    short: Mapped[int] = mapped_column(sa.BigInteger)
    safety_stock: Mapped[int] = mapped_column(sa.BigInteger)
    backorder_limit: Mapped[int] = mapped_column(sa.BigInteger)
    hold_id: Mapped[str]
    request_id: Mapped[str]
    reference: Mapped[str] = mapped_column(default="")


class Outbox(Base):
    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    event_id: Mapped[uuid.UUID]
    topic: Mapped[str]
    type: Mapped[str]
    keys: Mapped[list[str]] = mapped_column(ARRAY(sa.Text))
    payloads: Mapped[list[bytes]] = mapped_column(ARRAY(sa.LargeBinary))
    traceparent: Mapped[str] = mapped_column(default="")


class Reservation(Base):
    __tablename__ = "reservation"
    reservation_id: Mapped[str] = mapped_column(primary_key=True)
    customer_id: Mapped[str]
    state: Mapped[str]
    mode: Mapped[str] = mapped_column(default="ALL")
    fingerprint: Mapped[bytes]
    short_lines: Mapped[Any] = mapped_column(JSONB, default=None)
    expires_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
    created_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
    updated_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))
    version: Mapped[int] = mapped_column(sa.BigInteger, default=1)


class Line(Base):
    __tablename__ = "reservation_line"
    reservation_id: Mapped[str] = mapped_column(primary_key=True)
    line_no: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True)
    sku: Mapped[str]
    location: Mapped[str]
    quantity: Mapped[int] = mapped_column(sa.BigInteger)
    minimum: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    currency_code: Mapped[str] = mapped_column(default="")
    price_micros: Mapped[int] = mapped_column(sa.BigInteger, default=0)


class Allocation(Base):
    __tablename__ = "allocation"
    reservation_id: Mapped[str] = mapped_column(primary_key=True)
    sku: Mapped[str] = mapped_column(primary_key=True)
    location: Mapped[str] = mapped_column(primary_key=True)
    held: Mapped[int] = mapped_column(sa.BigInteger)


class Reservations(reservation_pb2_grpc.ReservationServiceServicer):
    """Reserve, one transaction a request."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions

    async def Reserve(  # noqa: N802 - gRPC gives the name
        self, request: reservation_pb2.ReserveRequest, context: Any
    ) -> reservation_pb2.ReserveResponse:
        del context
        async with self._sessions.begin() as session:
            known = await session.get(Reservation, request.reservation_id)
            if known is not None:
                return _answer(request, known, replayed=True)
            demand: dict[tuple[str, str], int] = {}
            for line in request.lines:
                key = (line.sku, line.location)
                demand[key] = demand.get(key, 0) + line.quantity
            rows = await session.scalars(
                sa.select(Stock)
                .where(sa.tuple_(Stock.sku, Stock.location).in_(list(demand)))
                .order_by(Stock.sku, Stock.location)
                .with_for_update()
            )
            stocks = {(row.sku, row.location): row for row in rows}
            now = datetime.now(UTC)
            held = all(
                key in stocks and stocks[key].active and _available(stocks[key]) >= quantity
                for key, quantity in demand.items()
            )
            reservation = Reservation(
                reservation_id=request.reservation_id,
                customer_id=request.customer_id,
                state="HELD" if held else "REJECTED",
                fingerprint=b"",
                expires_at=now + TTL,
                created_at=now,
                updated_at=now,
            )
            session.add(reservation)
            await session.flush()
            for number, line in enumerate(request.lines):
                session.add(
                    Line(
                        reservation_id=request.reservation_id,
                        line_no=number,
                        sku=line.sku,
                        location=line.location,
                        quantity=line.quantity,
                    )
                )
            if held:
                for key, quantity in demand.items():
                    _hold(session, stocks[key], quantity, request.reservation_id, now)
            answer = _answer(request, reservation, replayed=False)
            changed = events_pb2.ReservationChanged(reservation=answer.reservation)
            session.add(_event("holdfast.reservation.changes.v1", request.reservation_id, changed))
            return answer


def _available(stock: Stock) -> int:
    return stock.on_hand - stock.held - stock.safety_stock + stock.backorder_limit


def _hold(session: AsyncSession, stock: Stock, quantity: int, hold_id: str, now: datetime) -> None:
    stock.held += quantity
    stock.version += 1
    sku, location = stock.sku, stock.location
    session.add(Allocation(reservation_id=hold_id, sku=sku, location=location, held=quantity))
    session.add(
        Hold(
            sku=sku,
            hold_id=hold_id,
            slot=0,
            location=location,
            quantity=quantity,
            held=quantity,
            fingerprint=b"",
            created_at=now,
            expires_at=now + TTL,
        )
    )
    session.add(
        Movement(
            sku=sku,
            location=location,
            version=stock.version,
            recorded_at=now,
            kind="HOLD",
            held_delta=quantity,
            on_hand=stock.on_hand,
            held=stock.held,
            short=stock.short,
            safety_stock=stock.safety_stock,
            backorder_limit=stock.backorder_limit,
            hold_id=hold_id,
            request_id=hold_id,
        )
    )
    moved = stock_events.StockMoved(
        movement=inventory_pb2.Movement(
            sku=sku, location=location, version=stock.version, held_delta=quantity, held=stock.held, hold_id=hold_id
        )
    )
    session.add(_event("holdfast.inventory.movements.v1", sku, moved))


def _event(topic: str, key: str, message: Any) -> Outbox:
    return Outbox(
        event_id=uuid.uuid4(),
        topic=topic,
        type=message.DESCRIPTOR.full_name,
        keys=[key],
        payloads=[message.SerializeToString()],
    )


def _answer(
    request: reservation_pb2.ReserveRequest, reservation: Reservation, *, replayed: bool
) -> reservation_pb2.ReserveResponse:
    held = reservation.state == "HELD"
    message = reservation_pb2.Reservation(
        reservation_id=reservation.reservation_id,
        customer_id=reservation.customer_id,
        state=reservation_pb2.RESERVATION_STATE_HELD if held else reservation_pb2.RESERVATION_STATE_REJECTED,
        lines=request.lines,
        allocations=[
            reservation_pb2.Allocation(sku=line.sku, location=line.location, held=line.quantity)
            for line in request.lines
        ]
        if held
        else None,
        mode=reservation_pb2.RESERVE_MODE_ALL,
        version=1,
    )
    message.expire_time.FromDatetime(reservation.expires_at)
    message.create_time.FromDatetime(reservation.created_at)
    message.update_time.FromDatetime(reservation.updated_at)
    outcome = reservation_pb2.RESERVE_OUTCOME_HELD if held else reservation_pb2.RESERVE_OUTCOME_REJECTED
    return reservation_pb2.ReserveResponse(outcome=outcome, reservation=message, replayed=replayed)


async def main() -> None:
    dsn = os.environ["HOLDFAST_DATABASE_DSN"].replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = create_async_engine(dsn, pool_size=CONNECTIONS_MAX, max_overflow=0)
    servicer = Reservations(async_sessionmaker(engine, expire_on_commit=False))  # type: ignore[abstract] # one call

    def register(server: grpc.aio.Server) -> None:
        reservation_pb2_grpc.add_ReservationServiceServicer_to_server(servicer, server)

    await serve(register, (RESERVATIONS,))
    await engine.dispose()


if __name__ == "__main__":
    uvloop.run(main())
