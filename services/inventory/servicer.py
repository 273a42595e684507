"""The edge: decode and check, one call, encode. Errors, drains and pod names are the server's."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from holdfast.inventory.v1 import inventory_pb2 as pb
from holdfast.inventory.v1 import inventory_pb2_grpc

from services.inventory import codec, requests, store
from services.inventory.cache import Ask, Cache, Seen
from services.inventory.catalogue import Catalogue
from services.inventory.commands import Commands
from services.inventory.domain import (
    Adjustment,
    Changed,
    HoldChange,
    HoldRequest,
    ImportRow,
    Kind,
    Placed,
    Reason,
    Stock,
)
from services.inventory.settings import Settings
from services.inventory.watch import Watch
from shared import check, metrics, pages
from shared.batching import Batcher
from shared.database import Database
from shared.errors import ErrorMap
from shared.refusal import Refusal
from shared.server import Context
from shared.slots import Slots
from shared.wire import fingerprint, timestamp

_CODES = grpc.StatusCode
ERRORS = ErrorMap(
    "inventory.holdfast",
    {
        Reason.FIELD_INVALID: _CODES.INVALID_ARGUMENT,
        Reason.TOO_MANY_ITEMS: _CODES.INVALID_ARGUMENT,
        Reason.PAGE_TOKEN_INVALID: _CODES.INVALID_ARGUMENT,
        Reason.FIELD_MASK_INVALID: _CODES.INVALID_ARGUMENT,
        Reason.SKU_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.LOCATION_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.SKU_ALREADY_EXISTS: _CODES.ALREADY_EXISTS,
        Reason.LOCATION_ALREADY_EXISTS: _CODES.ALREADY_EXISTS,
        Reason.SKU_ARCHIVED: _CODES.FAILED_PRECONDITION,
        Reason.LOCATION_ARCHIVED: _CODES.FAILED_PRECONDITION,
        Reason.ETAG_MISMATCH: _CODES.ABORTED,
        Reason.VERSION_MISMATCH: _CODES.ABORTED,
        Reason.REQUEST_ID_REUSED: _CODES.FAILED_PRECONDITION,
        Reason.INSUFFICIENT_STOCK: _CODES.FAILED_PRECONDITION,
        Reason.BELOW_HELD: _CODES.FAILED_PRECONDITION,
        Reason.QUANTITY_OUT_OF_RANGE: _CODES.OUT_OF_RANGE,
        Reason.HOLD_NOT_FOUND: _CODES.NOT_FOUND,
        Reason.HOLD_EXPIRED: _CODES.FAILED_PRECONDITION,
        Reason.HOLD_NOT_EXPIRED: _CODES.FAILED_PRECONDITION,
        Reason.HOLD_CLOSED: _CODES.FAILED_PRECONDITION,
        Reason.HOLD_QUANTITY_EXCEEDED: _CODES.FAILED_PRECONDITION,
        Reason.HOLD_LIFE_EXCEEDED: _CODES.FAILED_PRECONDITION,
        Reason.VERSION_NOT_REACHED: _CODES.FAILED_PRECONDITION,
        Reason.WATCH_VERSION_GONE: _CODES.OUT_OF_RANGE,
        Reason.OVERLOADED: _CODES.RESOURCE_EXHAUSTED,
        Reason.DATABASE_UNAVAILABLE: _CODES.UNAVAILABLE,
        Reason.DEADLINE_PASSED: _CODES.DEADLINE_EXCEEDED,
        Reason.STOPPING: _CODES.UNAVAILABLE,
        Reason.CALLER_UNKNOWN: _CODES.UNAUTHENTICATED,
        Reason.CALLER_FORBIDDEN: _CODES.PERMISSION_DENIED,
        Reason.CALLER_OVER_LIMIT: _CODES.RESOURCE_EXHAUSTED,
    },
)

Item = TypeVar("Item")
Result = TypeVar("Result")
Adjusted = pb.AdjustStockResponse


class Servicer(inventory_pb2_grpc.InventoryServiceServicer):
    """The inventory API over `commands`; reads go through `cache`, `watch` and `database`."""

    def __init__(self, settings: Settings, database: Database, commands: Commands, cache: Cache, watch: Watch) -> None:
        self._database = database
        self._catalogue = Catalogue(database, commands)
        self._watch = watch
        self._cache = cache
        self._imports = Slots("imports", settings.imports_max, "too many imports on this pod; come back later")
        self._place: Batcher[Sequence[HoldRequest], list[Placed | Refusal]]
        self._place = _batcher("holds", commands.place, settings)
        self._change: Batcher[Sequence[HoldChange], list[Changed | Refusal]]
        self._change = _batcher("changes", commands.change, settings)
        self._adjust: Batcher[Sequence[Adjustment], list[Adjusted | Refusal]]
        self._adjust = _batcher("adjustments", commands.adjust, settings)
        self._read: Batcher[Sequence[Ask], list[Seen | Refusal]]
        self._read = _batcher("reads", cache.read, settings)

    # -- SKUs and locations -----------------------------------------------------------------------

    async def CreateSku(self, request: pb.CreateSkuRequest, context: Context) -> pb.CreateSkuResponse:
        request_id = check.code(request.request_id, "request_id")
        fields = requests.sku_fields(request.sku)
        return await self._catalogue.create_sku(request_id, fingerprint(request), fields)

    async def GetSku(self, request: pb.GetSkuRequest, context: Context) -> pb.GetSkuResponse:
        sku = check.code(request.sku, "sku")
        async with self._database.connection() as connection:
            row = await store.get_sku(connection, sku)
        if row is None:
            raise Refusal(Reason.SKU_NOT_FOUND, f"there is no SKU {sku}", sku=sku)
        return pb.GetSkuResponse(sku=codec.sku(row))

    async def ListSkus(self, request: pb.ListSkusRequest, context: Context) -> pb.ListSkusResponse:
        prefix = check.code(request.sku_prefix, "sku_prefix", optional=True)
        category = check.text(request.category, "category", 200)
        filters = ("skus", prefix, category, request.show_archived)
        after = pages.decode(request.page_token, filters, 1) or [""]
        size = pages.size(request.page_size)
        async with self._database.connection() as connection:
            rows = await store.list_skus(
                connection,
                after=after[0],
                prefix=prefix,
                category=category,
                show_archived=request.show_archived,
                limit=size + 1,
            )
        token = pages.encode([rows[size - 1]["sku"]], filters) if len(rows) > size else ""
        return pb.ListSkusResponse(skus=[codec.sku(row) for row in rows[:size]], next_page_token=token)

    async def UpdateSku(self, request: pb.UpdateSkuRequest, context: Context) -> pb.UpdateSkuResponse:
        request_id = check.code(request.request_id, "request_id")
        mask = requests.mask(request.update_mask, ("name", "category", "unit", "unit_price"))
        sku, name, category, unit, currency_code, price_micros = requests.sku_fields(request.sku)
        values = {"name": name, "category": category, "unit": unit}
        new: dict[str, object] = {path: values[path] for path in mask if path in values}
        if "unit_price" in mask:
            new |= {"currency_code": currency_code, "price_micros": price_micros}
        etag, content = requests.etag(request.sku.etag), fingerprint(request)
        return await self._catalogue.update_sku(sku, request_id, content, etag, new, pb.UpdateSkuResponse)

    async def ArchiveSku(self, request: pb.ArchiveSkuRequest, context: Context) -> pb.ArchiveSkuResponse:
        request_id, sku = check.code(request.request_id, "request_id"), check.code(request.sku, "sku")
        etag, content = requests.etag(request.etag), fingerprint(request)
        new: dict[str, object] = {"active": False}
        return await self._catalogue.update_sku(sku, request_id, content, etag, new, pb.ArchiveSkuResponse)

    async def CreateLocation(self, request: pb.CreateLocationRequest, context: Context) -> pb.CreateLocationResponse:
        request_id = check.code(request.request_id, "request_id")
        fields = requests.location_fields(request.location)
        return await self._catalogue.create_location(request_id, fingerprint(request), fields)

    async def GetLocation(self, request: pb.GetLocationRequest, context: Context) -> pb.GetLocationResponse:
        location = check.code(request.location, "location")
        async with self._database.connection() as connection:
            row = await store.get_location(connection, location)
        if row is None:
            raise Refusal(Reason.LOCATION_NOT_FOUND, f"there is no location {location}", location=location)
        return pb.GetLocationResponse(location=codec.location(row))

    async def ListLocations(self, request: pb.ListLocationsRequest, context: Context) -> pb.ListLocationsResponse:
        filters = ("locations", request.show_archived)
        after = pages.decode(request.page_token, filters, 1) or [""]
        size = pages.size(request.page_size)
        async with self._database.connection() as connection:
            rows = await store.list_locations(
                connection, after=after[0], show_archived=request.show_archived, limit=size + 1
            )
        token = pages.encode([rows[size - 1]["location"]], filters) if len(rows) > size else ""
        found = [codec.location(row) for row in rows[:size]]
        return pb.ListLocationsResponse(locations=found, next_page_token=token)

    async def UpdateLocation(self, request: pb.UpdateLocationRequest, context: Context) -> pb.UpdateLocationResponse:
        request_id = check.code(request.request_id, "request_id")
        mask = requests.mask(request.update_mask, ("name", "priority"))
        location, name, priority = requests.location_fields(request.location)
        new: dict[str, object] = {
            path: value for path, value in (("name", name), ("priority", priority)) if path in mask
        }
        etag, content = requests.etag(request.location.etag), fingerprint(request)
        return await self._catalogue.update_location(
            location, request_id, content, etag, new, pb.UpdateLocationResponse
        )

    async def ArchiveLocation(self, request: pb.ArchiveLocationRequest, context: Context) -> pb.ArchiveLocationResponse:
        request_id = check.code(request.request_id, "request_id")
        location = check.code(request.location, "location")
        etag, content = requests.etag(request.etag), fingerprint(request)
        return await self._catalogue.update_location(
            location, request_id, content, etag, {"active": False}, pb.ArchiveLocationResponse
        )

    # -- stock ------------------------------------------------------------------------------------

    async def SetStockPolicy(self, request: pb.SetStockPolicyRequest, context: Context) -> pb.SetStockPolicyResponse:
        (answer,) = await self._submit(self._adjust, [requests.policy(request)], request, context)
        return pb.SetStockPolicyResponse(stock=_value(answer).stocks[0])

    async def AdjustStock(self, request: pb.AdjustStockRequest, context: Context) -> pb.AdjustStockResponse:
        ask = requests.adjustment(request.adjustment, "adjustment")
        return _value((await self._submit(self._adjust, [ask], request, context))[0])

    async def BatchAdjustStock(
        self, request: pb.BatchAdjustStockRequest, context: Context
    ) -> pb.BatchAdjustStockResponse:
        check.count(len(request.adjustments), "adjustments", requests.BATCH_ITEMS_MAX)
        asks = _each(request.adjustments, requests.adjustment, "adjustments")
        answers = await self._submit_good(self._adjust, asks, request, context)
        return pb.BatchAdjustStockResponse(
            results=[
                pb.AdjustStockResult(error=codec.item_error(answer, ERRORS))
                if isinstance(answer, Refusal)
                else pb.AdjustStockResult(applied=answer)
                for answer in answers
            ]
        )

    async def ImportStock(
        self, request: AsyncIterator[pb.ImportStockRequest], context: Context
    ) -> pb.ImportStockResponse:
        with self._imports.take():  # all rows of an import are in memory until it is done
            return await self._import(request)

    async def _import(self, request: AsyncIterator[pb.ImportStockRequest]) -> pb.ImportStockResponse:
        request_id, dry_run, rows, errors = await requests.import_stream(request)
        good = [row for row in rows if isinstance(row, ImportRow)]
        errors += await self._catalogue.check_import(request_id, good)
        response = pb.ImportStockResponse(
            rows_read=len(rows), errors=[codec.import_error(*error) for error in sorted(errors, key=_row)]
        )
        if not errors and not dry_run:
            response.rows_applied, response.rows_known = await self._catalogue.import_rows(request_id, good)
        return response

    async def GetAvailability(self, request: pb.GetAvailabilityRequest, context: Context) -> pb.GetAvailabilityResponse:
        keys = requests.availability(request)
        asks = [Ask(key, least) for key, least in keys if key[1]]
        near = [self._cache.local(ask) for ask in asks]
        if None in near:
            near = [_value(read) for read in await self._submit(self._read, asks, request, context)]
        else:
            metrics.CACHE_READS.labels("memory").inc(len(near))
        seen = iter(near)
        open_skus = [sku for (sku, location), _ in keys if not location]
        sums = await self._sums(open_skus) if open_skus else {}
        return pb.GetAvailabilityResponse(
            stocks=[
                codec.stock(s.stock, s.as_of)
                if key[1] and (s := next(seen))
                else sums.get(key[0], pb.Stock(sku=key[0]))
                for key, _ in keys
            ]
        )

    async def WatchStock(self, request: pb.WatchStockRequest, context: Context) -> AsyncIterator[pb.WatchStockResponse]:
        async for value, time in self._watch.follow(requests.watch(request)):
            if isinstance(value, Stock):
                yield pb.WatchStockResponse(snapshot=codec.stock(value, time))
            else:
                yield pb.WatchStockResponse(movement=codec.movement(value, time))

    # -- holds ------------------------------------------------------------------------------------

    async def PlaceHolds(self, request: pb.PlaceHoldsRequest, context: Context) -> pb.PlaceHoldsResponse:
        check.count(len(request.holds), "holds", requests.BATCH_ITEMS_MAX)
        check.count(sum(len(h.lines) for h in request.holds), "lines", requests.BATCH_LINES_MAX, least=0)
        holds = _each(request.holds, requests.hold, "holds")
        answers = await self._submit_good(self._place, holds, request, context)
        return pb.PlaceHoldsResponse(
            results=[
                pb.HoldResult(hold_id=asked.hold_id, error=codec.item_error(answer, ERRORS))
                if isinstance(answer, Refusal)
                else codec.placed(answer)
                for asked, answer in zip(request.holds, answers, strict=True)
            ]
        )

    async def CommitHolds(self, request: pb.CommitHoldsRequest, context: Context) -> pb.CommitHoldsResponse:
        results = await self._changes(request, Kind.COMMIT, context)
        return pb.CommitHoldsResponse(results=results)

    async def ReleaseHolds(self, request: pb.ReleaseHoldsRequest, context: Context) -> pb.ReleaseHoldsResponse:
        kind = Kind.EXPIRE if request.expired_only else Kind.RELEASE
        return pb.ReleaseHoldsResponse(results=await self._changes(request, kind, context))

    async def ExtendHolds(self, request: pb.ExtendHoldsRequest, context: Context) -> pb.ExtendHoldsResponse:
        check.count(len(request.extensions), "extensions", requests.BATCH_ITEMS_MAX)
        changes = _each(request.extensions, requests.hold_extension, "extensions")
        answers = await self._submit_good(self._change, changes, request, context)
        ids = [extension.hold_id for extension in request.extensions]
        return pb.ExtendHoldsResponse(results=_change_results(ids, answers))

    async def _changes(
        self, request: pb.CommitHoldsRequest | pb.ReleaseHoldsRequest, kind: Kind, context: Context
    ) -> list[pb.HoldChangeResult]:
        check.count(len(request.changes), "changes", requests.BATCH_ITEMS_MAX)
        changes = _each(request.changes, lambda item, field: requests.hold_change(item, kind, field), "changes")
        answers = await self._submit_good(self._change, changes, request, context)
        return _change_results([item.hold_id for item in request.changes], answers)

    # -- batches ----------------------------------------------------------------------------------

    async def _submit(
        self,
        batcher: Batcher[Sequence[Item], list[Result]],
        items: Sequence[Item],
        request: Message,
        context: Context,
    ) -> list[Result]:
        """Submit the items of a request."""
        if not items:
            return []
        return await batcher.submit(
            items, lines=_lines(items), size_bytes=request.ByteSize(), seconds_left=context.time_remaining()
        )

    async def _submit_good(
        self,
        batcher: Batcher[Sequence[Item], list[Result | Refusal]],
        items: Sequence[Item | Refusal],
        request: Message,
        context: Context,
    ) -> list[Result | Refusal]:
        """Submit the items that were well formed; the others keep their refusal, in their place."""
        good = [item for item in items if not isinstance(item, Refusal)]
        answers = iter(await self._submit(batcher, good, request, context))
        return [item if isinstance(item, Refusal) else next(answers) for item in items]

    async def _sums(self, skus: Sequence[str]) -> dict[str, pb.Stock]:
        async with self._database.connection() as connection:
            rows = await store.sum_stock(connection, skus)
        return {
            sku: pb.Stock(
                sku=sku,
                on_hand=row["on_hand"],
                held=row["held"],
                safety_stock=row["safety_stock"],
                backorder_limit=row["backorder_limit"],
                short=row["short"],
                available=row["available"],
                as_of=timestamp(row["time"]),
            )
            for sku, row in rows.items()
        }


def _batcher(
    name: str, handle: Callable[[Sequence[Item]], Awaitable[list[Result]]], settings: Settings
) -> Batcher[Sequence[Item], list[Result]]:
    """A batcher of calls that each bring several items: flattened for `handle`, and handed back by call."""

    async def flattened(calls: Sequence[Sequence[Item]]) -> list[list[Result]]:
        results = iter(await handle([item for call in calls for item in call]))
        return [[next(results) for _ in call] for call in calls]

    return Batcher(
        name,
        flattened,
        batch_items_max=settings.batch_items_max,
        batch_lines_max=settings.batch_lines_max,
        queue_items_max=settings.queue_items_max,
        queue_bytes_max=settings.queue_bytes_max,
        queue_seconds_max=settings.queue_seconds_max,
    )


def _lines(items: Sequence[object]) -> int:
    return sum(len(getattr(item, "lines", ())) or 1 for item in items)


Raw = TypeVar("Raw")


def _each(items: Sequence[Raw], parse: Callable[[Raw, str], Item], field: str) -> list[Item | Refusal]:
    """Parse each item of a batch; one that is malformed becomes its refusal and harms no other."""
    parsed: list[Item | Refusal] = []
    for number, item in enumerate(items):
        try:
            parsed.append(parse(item, f"{field}[{number}]"))
        except Refusal as refusal:
            parsed.append(refusal)
    return parsed


def _value(answer: Result | Refusal) -> Result:
    if isinstance(answer, Refusal):
        raise answer
    return answer


def _row(error: tuple[int, Refusal]) -> int:
    return error[0]


def _change_results(ids: Sequence[str], answers: Sequence[Changed | Refusal]) -> list[pb.HoldChangeResult]:
    return [
        pb.HoldChangeResult(hold_id=hold_id, error=codec.item_error(answer, ERRORS))
        if isinstance(answer, Refusal)
        else codec.changed(answer)
        for hold_id, answer in zip(ids, answers, strict=True)
    ]
