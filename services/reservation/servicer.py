"""The edge: decode and check, one call, encode. Errors, drains and pod names are the server's."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message
from holdfast.reservation.v1 import reservation_pb2 as pb
from holdfast.reservation.v1 import reservation_pb2_grpc

from services.reservation import codec, store
from services.reservation.commands import Commands, Outcome, Told
from services.reservation.domain import Action, Ask, Change, Reason
from services.reservation.settings import Settings
from services.reservation.subjects import Subjects
from shared import check, pages
from shared.batching import Batcher
from shared.database import Database
from shared.errors import ErrorMap
from shared.refusal import Refusal
from shared.server import Context

BATCH_REQUESTS_MAX = 500
_CODES = grpc.StatusCode
ERRORS = ErrorMap(
    "reservation.holdfast",
    {
        Reason.FIELD_INVALID: _CODES.INVALID_ARGUMENT,
        Reason.TOO_MANY_ITEMS: _CODES.INVALID_ARGUMENT,
        Reason.PAGE_TOKEN_INVALID: _CODES.INVALID_ARGUMENT,
        Reason.SKU_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.LOCATION_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.SKU_ARCHIVED: _CODES.FAILED_PRECONDITION,
        Reason.LOCATION_ARCHIVED: _CODES.FAILED_PRECONDITION,
        Reason.REQUEST_ID_REUSED: _CODES.FAILED_PRECONDITION,
        Reason.RESERVATION_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.RESERVATION_NOT_HELD: _CODES.FAILED_PRECONDITION,
        Reason.RESERVATION_EXPIRED: _CODES.FAILED_PRECONDITION,
        Reason.QUANTITY_EXCEEDED: _CODES.FAILED_PRECONDITION,
        Reason.LIFE_EXCEEDED: _CODES.FAILED_PRECONDITION,
        Reason.OVERLOADED: _CODES.RESOURCE_EXHAUSTED,
        Reason.DATABASE_UNAVAILABLE: _CODES.UNAVAILABLE,
        Reason.INVENTORY_UNAVAILABLE: _CODES.UNAVAILABLE,
        Reason.DEADLINE_PASSED: _CODES.DEADLINE_EXCEEDED,
        Reason.STOPPING: _CODES.UNAVAILABLE,
        Reason.CALLER_UNKNOWN: _CODES.UNAUTHENTICATED,
        Reason.CALLER_FORBIDDEN: _CODES.PERMISSION_DENIED,
        Reason.CALLER_OVER_LIMIT: _CODES.RESOURCE_EXHAUSTED,
        Reason.LINE_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.SUBJECT_BLOCKED: _CODES.PERMISSION_DENIED,
        Reason.LIMIT_REACHED: _CODES.RESOURCE_EXHAUSTED,
        Reason.ENFORCEMENT_STALE: _CODES.UNAVAILABLE,
    },
)


Asked = asyncio.Future[Told] | Refusal


class Servicer(reservation_pb2_grpc.ReservationServiceServicer):
    """The reservation API over `commands`; reads go to `database`."""

    def __init__(self, settings: Settings, database: Database, commands: Commands, subjects: Subjects) -> None:
        self._settings = settings
        self._database = database
        self._subjects = subjects
        bounds: dict[str, Any] = {
            "batch_items_max": settings.batch_items_max,
            "batch_lines_max": settings.batch_lines_max,
            "queue_items_max": settings.queue_items_max,
            "queue_bytes_max": settings.queue_bytes_max,
            "queue_seconds_max": settings.queue_seconds_max,
        }
        self._reserve: Batcher[Ask, Told] = Batcher("reserves", commands.reserve, **bounds)
        self._change: Batcher[Change, Outcome] = Batcher("changes", commands.change, **bounds)

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        reservation, replayed = await self._ask(request, "", context)
        return codec.reserved(reservation, replayed=replayed)

    async def BatchReserve(self, request: pb.BatchReserveRequest, context: Context) -> pb.BatchReserveResponse:
        check.count(len(request.requests), "requests", BATCH_REQUESTS_MAX)
        asked = [self._try(item, f"requests[{n}]", context) for n, item in enumerate(request.requests)]
        waiting = [outcome for outcome in asked if isinstance(outcome, asyncio.Future)]
        try:
            if waiting:
                await asyncio.wait(waiting)
        except asyncio.CancelledError:
            _leave(waiting)
            raise
        return pb.BatchReserveResponse(
            results=[_result(item, outcome) for item, outcome in zip(request.requests, asked, strict=True)]
        )

    async def ReserveStream(
        self, request: AsyncIterator[pb.ReserveStreamRequest], context: Context
    ) -> AsyncIterator[pb.ReserveStreamResponse]:
        answers: asyncio.Queue[tuple[pb.ReserveRequest, Asked] | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._settings.stream_items_max)
        waiting: set[asyncio.Future[Told]] = set()

        async def read() -> None:
            drained = asyncio.Event()

            def answered(item: pb.ReserveRequest, outcome: asyncio.Future[Told]) -> None:
                waiting.discard(outcome)
                if not outcome.cancelled():
                    answers.put_nowait((item, outcome))
                if not waiting:
                    drained.set()

            try:
                async for message in request:
                    await room.acquire()
                    outcome = self._try(message.request, "request", context)
                    if isinstance(outcome, asyncio.Future):
                        waiting.add(outcome)
                        drained.clear()
                        outcome.add_done_callback(partial(answered, message.request))
                    else:
                        answers.put_nowait((message.request, outcome))
                if waiting:
                    await drained.wait()
            finally:
                answers.put_nowait(None)

        reader = asyncio.ensure_future(read())
        try:
            while (answer := await answers.get()) is not None:
                room.release()
                yield pb.ReserveStreamResponse(result=_result(*answer))
            await reader
        finally:
            reader.cancel()
            _leave(waiting)

    async def Confirm(self, request: pb.ConfirmRequest, context: Context) -> pb.ConfirmResponse:
        reservation, replayed = await self._changed(codec.change(request, Action.CONFIRM), request, context)
        return pb.ConfirmResponse(reservation=codec.reservation(reservation), replayed=replayed)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        reservation, replayed = await self._changed(codec.change(request, Action.CANCEL), request, context)
        return pb.CancelResponse(reservation=codec.reservation(reservation), replayed=replayed)

    async def Extend(self, request: pb.ExtendRequest, context: Context) -> pb.ExtendResponse:
        reservation, replayed = await self._changed(codec.extension(request), request, context)
        return pb.ExtendResponse(reservation=codec.reservation(reservation), replayed=replayed)

    async def GetReservation(self, request: pb.GetReservationRequest, context: Context) -> pb.GetReservationResponse:
        name = check.code(request.reservation_id, "reservation_id")
        async with self._database.connection() as connection:
            found = await store.read(connection, [name])
        if name not in found:
            raise Refusal(Reason.RESERVATION_NOT_FOUND, f"there is no reservation {name}", reservation_id=name)
        return pb.GetReservationResponse(reservation=codec.reservation(found[name]))

    async def ListReservations(
        self, request: pb.ListReservationsRequest, context: Context
    ) -> pb.ListReservationsResponse:
        customer_id = check.code(request.customer_id, "customer_id", optional=True)
        state = codec.state(request.state)
        start = check.time(request.start_time, "start_time") if request.HasField("start_time") else None
        end = check.time(request.end_time, "end_time") if request.HasField("end_time") else None
        filters = (customer_id, state, start, end)
        after, size = _position(request.page_token, filters), pages.size(request.page_size)
        async with self._database.connection() as connection:
            ids = await store.list_ids(
                connection, after=after, customer_id=customer_id, state=state, start=start, end=end, limit=size + 1
            )
            found, taken = await store.read_first(connection, [name for name, _ in ids[:size]])
        token = ""
        if len(ids) > taken:
            name, created_at = ids[taken - 1]
            token = pages.encode([created_at.astimezone(UTC).isoformat(), name], filters)
        return pb.ListReservationsResponse(
            reservations=[codec.reservation(value) for value in found], next_page_token=token
        )

    async def ResolveSubjects(self, request: pb.ResolveSubjectsRequest, context: Context) -> pb.ResolveSubjectsResponse:
        asked, identities = codec.resolve(request)
        async with self._database.connection() as connection:
            known = await store.read_subjects(connection, asked) if asked else {}
        found = [(subject, known[subject]) for subject in asked if subject in known]
        found += [(subject, one) for one in identities for subject in self._subjects.hashes(one)]
        return pb.ResolveSubjectsResponse(subjects=[codec.subject(*one) for one in found])

    def _ask(self, request: pb.ReserveRequest, field: str, context: Context) -> asyncio.Future[Told]:
        ask = codec.ask(request, field)
        seconds_left = context.time_remaining()
        return self._reserve.enqueue(
            ask, lines=len(ask.lines), size_bytes=request.ByteSize(), seconds_left=seconds_left
        )

    def _try(self, request: pb.ReserveRequest, field: str, context: Context) -> Asked:
        """One of many: its refusal is an answer, and harms no other."""
        try:
            return self._ask(request, field, context)
        except Refusal as refusal:
            return refusal

    async def _changed(self, change: Change, request: Message, context: Context) -> Outcome:
        seconds_left = context.time_remaining()
        return await self._change.submit(
            change, lines=len(change.lines) or 1, size_bytes=request.ByteSize(), seconds_left=seconds_left
        )


def _leave(waiting: Iterable[asyncio.Future[Told]]) -> None:
    """What waits for its turn has no caller any more, and is dropped from the queue."""
    for outcome in waiting:
        outcome.cancel()


def _result(request: pb.ReserveRequest, outcome: Asked) -> pb.ReserveResult:
    """The answer to one of many that was decided, or refused; raises what is neither."""
    name = request.reservation_id
    try:
        if isinstance(outcome, Refusal):
            raise outcome
        reservation, replayed = outcome.result()
    except Refusal as refusal:
        return pb.ReserveResult(reservation_id=name, error=codec.item_error(refusal, ERRORS))
    return pb.ReserveResult(reservation_id=name, response=codec.reserved(reservation, replayed=replayed))


def _position(token: str, filters: object) -> tuple[datetime, str] | None:
    position = pages.decode(token, filters, 2)
    if position is None:
        return None
    return pages.instant(position[0]), position[1]
