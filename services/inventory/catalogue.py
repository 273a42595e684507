"""What is sold and where it is kept: SKUs, locations, and files of both with their first stock.

A repeat of a request id finds the first answer beside the SKU or location that it was about (`store.Request`). Of an
import it finds what was sent under each row's number, and what became of it beside its SKU.
"""

from collections.abc import Sequence

from google.protobuf.message import Message
from holdfast.inventory.v1 import inventory_pb2

from services.inventory import codec, store
from services.inventory.commands import Answer, Commands, first_outcome, reused, unknown
from services.inventory.domain import Adjustment, Change, ImportRow, Reason
from shared import outbox
from shared.database import Connection, Database, Record
from shared.refusal import Refusal

IMPORT_CHUNK_ROWS = 500


class Catalogue:
    """The writes of SKUs and locations, on one database; the stock of imported rows goes through `commands`."""

    def __init__(self, database: Database, commands: Commands) -> None:
        self._database = database
        self._commands = commands

    async def create_sku(
        self, request_id: str, fingerprint: bytes, fields: tuple[str, str, str, str, str, int]
    ) -> inventory_pb2.CreateSkuResponse:
        async def work(connection: Connection) -> inventory_pb2.CreateSkuResponse:
            rows = await connection.fetch(store.INSERT_SKUS, *([value] for value in fields))
            if not rows:
                first = await _known(connection, fields[0], request_id)
                if first is None:
                    raise Refusal(Reason.SKU_ALREADY_EXISTS, f"SKU {fields[0]} exists", sku=fields[0])
                return _answer(first, fingerprint, inventory_pb2.CreateSkuResponse)
            answer = inventory_pb2.CreateSkuResponse(sku=codec.sku(rows[0]))
            await _remember(connection, fields[0], request_id, fingerprint, answer)
            await outbox.write(connection, [codec.sku_changed(rows[0])])
            return answer

        return await self._database.run(work)

    async def update_sku(
        self,
        sku: str,
        request_id: str,
        fingerprint: bytes,
        etag: int | None,
        new: dict[str, object],
        answer_type: type[Answer],
    ) -> Answer:
        """Change the named columns of a SKU; `active` False archives it and closes its stock."""

        async def work(connection: Connection) -> Answer:
            row = await connection.fetchrow(store.LOCK_SKU, sku)
            if row is None:
                raise Refusal(Reason.SKU_NOT_FOUND, f"there is no SKU {sku}", sku=sku)
            if first := await _known(connection, sku, request_id):
                return _answer(first, fingerprint, answer_type)
            _check_etag(row, etag)
            names = ("name", "category", "unit", "currency_code", "price_micros", "active")
            changed = await connection.fetchrow(store.UPDATE_SKU, sku, *(new.get(name, row[name]) for name in names))
            assert changed is not None
            if not changed["active"]:
                await connection.execute(store.CLOSE_STOCK_OF_SKU, sku)
            answer = answer_type(sku=codec.sku(changed))
            await _remember(connection, sku, request_id, fingerprint, answer)
            await outbox.write(connection, [codec.sku_changed(changed)])
            return answer

        return await self._database.run(work)

    async def create_location(
        self, request_id: str, fingerprint: bytes, fields: tuple[str, str, int]
    ) -> inventory_pb2.CreateLocationResponse:
        async def work(connection: Connection) -> inventory_pb2.CreateLocationResponse:
            row = await connection.fetchrow(store.INSERT_LOCATION, *fields)
            if row is None:
                first = await _known(connection, _location_key(fields[0]), request_id)
                if first is None:
                    raise Refusal(Reason.LOCATION_ALREADY_EXISTS, f"location {fields[0]} exists", location=fields[0])
                return _answer(first, fingerprint, inventory_pb2.CreateLocationResponse)
            answer = inventory_pb2.CreateLocationResponse(location=codec.location(row))
            await _remember(connection, _location_key(fields[0]), request_id, fingerprint, answer)
            return answer

        return await self._database.run(work)

    async def update_location(
        self,
        location: str,
        request_id: str,
        fingerprint: bytes,
        etag: int | None,
        new: dict[str, object],
        answer_type: type[Answer],
    ) -> Answer:
        """Change the named columns of a location; `active` False archives it and closes its stock."""

        async def work(connection: Connection) -> Answer:
            row = await connection.fetchrow(store.LOCK_LOCATION, location)
            if row is None:
                raise Refusal(Reason.LOCATION_NOT_FOUND, f"there is no location {location}", location=location)
            if first := await _known(connection, _location_key(location), request_id):
                return _answer(first, fingerprint, answer_type)
            _check_etag(row, etag)
            names = ("name", "priority", "active")
            changed = await connection.fetchrow(
                store.UPDATE_LOCATION, location, *(new.get(name, row[name]) for name in names)
            )
            assert changed is not None
            if not changed["active"]:
                await connection.execute(store.CLOSE_STOCK_OF_LOCATION, location)
            answer = answer_type(location=codec.location(changed))
            await _remember(connection, _location_key(location), request_id, fingerprint, answer)
            return answer

        return await self._database.run(work)

    async def check_import(self, request_id: str, rows: Sequence[ImportRow]) -> list[tuple[int, Refusal]]:
        """What is wrong with rows that are well formed: where they go, what is archived, what was sent before."""
        if not rows:
            return []
        altered: set[int] = set()
        async with self._database.connection() as connection:
            for start in range(0, len(rows), IMPORT_CHUNK_ROWS):
                chunk = rows[start : start + IMPORT_CHUNK_ROWS]
                altered |= _altered(request_id, chunk, await _begun(connection, request_id, chunk))
            skus = await store.unknown_skus(connection, {row.sku[0] for row in rows})
            locations = await store.unknown_locations(connection, {row.location for row in rows})
        archived = {sku: True for sku, known in skus.items() if known}
        errors: list[tuple[int, Refusal]] = []
        for row in rows:
            refusal = next(unknown(row.sku[0], row.location, archived, locations), None)
            if row.row_number in altered:
                refusal = reused(request_id)
            if refusal:
                errors.append((row.row_number, refusal))
        return errors

    async def import_rows(self, request_id: str, rows: Sequence[ImportRow]) -> tuple[int, int]:
        """Apply checked rows in chunks, each row once; return (applied, known from before).

        What a row's number stands for is kept before the row is applied: a file whose rows have moved on is found out
        however far it came.
        """
        known = 0
        for start in range(0, len(rows), IMPORT_CHUNK_ROWS):
            chunk = rows[start : start + IMPORT_CHUNK_ROWS]

            async def work(connection: Connection, chunk: Sequence[ImportRow] = chunk) -> int:
                skus = sorted({row.sku[0]: row.sku for row in reversed(chunk)}.values())
                made = await connection.fetch(store.INSERT_SKUS, *store.split(skus))
                await outbox.write(connection, [codec.sku_changed(row) for row in made])
                await store.make_stock(connection, [(row.sku[0], row.location) for row in chunk])
                begun = await _begun(connection, request_id, chunk)
                if _altered(request_id, chunk, begun):  # meanwhile
                    raise reused(request_id)
                numbers = {_number_id(request_id, row): row.fingerprint for row in chunk}
                fresh = [store.Request(*one, content) for one, content in numbers.items() if one not in begun]
                await store.insert_requests(connection, fresh)
                return sum(_import_id(request_id, row) in begun for row in chunk)

            known += await self._database.run(work)
            asks = [ask for row in chunk for ask in _imported(request_id, row)]
            for answer in await self._commands.adjust(asks):
                if isinstance(answer, Refusal) and answer.reason != Reason.VERSION_MISMATCH:
                    raise answer
        return len(rows) - known, known


async def _known(connection: Connection, key: str, request_id: str) -> store.Request | None:
    found = await store.read_requests(connection, [(key, request_id)])
    return found.get((key, request_id))


async def _remember(connection: Connection, key: str, request_id: str, fingerprint: bytes, answer: Message) -> None:
    request = store.Request(key, request_id, fingerprint, answer.SerializeToString())
    await store.insert_requests(connection, [request])


def _answer(request: store.Request, fingerprint: bytes, answer_type: type[Answer]) -> Answer:
    first = first_outcome(request, fingerprint, answer_type)
    if isinstance(first, Refusal):
        raise first
    return first


def _check_etag(row: Record, etag: int | None) -> None:
    if etag is not None and etag != row["version"]:
        raise Refusal(Reason.ETAG_MISMATCH, "it was changed since it was read; read it again", etag=row["version"])


def _location_key(location: str) -> str:
    """Locations and imports share `request` with SKUs; no code has a space."""
    return f"location {location}"


def _import_id(request_id: str, row: ImportRow) -> tuple[str, str]:
    """A row that was applied, as its adjustment has it."""
    return row.sku[0], f"{request_id}#{row.row_number}"


def _number_id(request_id: str, row: ImportRow) -> tuple[str, str]:
    """A row's number in its import, whatever its SKU."""
    return f"import {request_id}", f"#{row.row_number}"


async def _begun(
    connection: Connection, request_id: str, rows: Sequence[ImportRow]
) -> dict[tuple[str, str], store.Request]:
    """What is known of rows of an import. Earlier releases have kept no numbers."""
    ids = [name(request_id, row) for row in rows for name in (_number_id, _import_id)]
    return await store.read_requests(connection, ids)


def _altered(request_id: str, rows: Sequence[ImportRow], begun: dict[tuple[str, str], store.Request]) -> set[int]:
    """The numbers of those rows that had other content before."""
    return {
        row.row_number
        for row in rows
        for name in (_number_id, _import_id)
        if (first := begun.get(name(request_id, row))) and first.fingerprint != row.fingerprint
    }


def _imported(request_id: str, row: ImportRow) -> list[Adjustment]:
    """The adjustments of one row: its policy when the stock is new, then its units. Both once."""
    asks: list[Adjustment] = []
    _, identity = _import_id(request_id, row)
    if row.safety_stock or row.backorder_limit:
        asks.append(
            Adjustment(
                f"{identity}#policy", row.sku[0], row.location, Change.POLICY, expected_version=0,
                safety_stock=row.safety_stock, backorder_limit=row.backorder_limit,
                fingerprint=row.fingerprint,
            )
        )  # fmt: skip
    change = Adjustment(identity, row.sku[0], row.location, Change.RECEIVE, row.quantity, fingerprint=row.fingerprint)
    return [*asks, change]
