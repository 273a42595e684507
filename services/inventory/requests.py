"""What callers send, checked and turned into the domain's data. Raises Refusal; changes nothing."""

from collections.abc import AsyncIterator, Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from holdfast.inventory.v1 import inventory_pb2

from services.inventory.domain import (
    Adjustment,
    Change,
    ChangeLine,
    HoldChange,
    HoldLine,
    HoldRequest,
    ImportRow,
    Key,
    Kind,
    Mode,
    sum_lines,
)
from shared import check
from shared.refusal import Refusal
from shared.wire import fingerprint

BATCH_ITEMS_MAX = 1_000
BATCH_LINES_MAX = 10_000
HOLD_LINES_MAX = 2_000
IMPORT_ROWS_MAX = 200_000
PATH_CHARACTERS_MAX = 64

_CHANGES = {
    inventory_pb2.ADJUSTMENT_REASON_RECEIVE: Change.RECEIVE,
    inventory_pb2.ADJUSTMENT_REASON_SHIP: Change.SHIP,
    inventory_pb2.ADJUSTMENT_REASON_RETURN: Change.RETURN,
    inventory_pb2.ADJUSTMENT_REASON_COUNT: Change.COUNT,
    inventory_pb2.ADJUSTMENT_REASON_DAMAGE: Change.DAMAGE,
    inventory_pb2.ADJUSTMENT_REASON_TRANSFER: Change.TRANSFER,
}
_MODES = {
    inventory_pb2.HOLD_MODE_UNSPECIFIED: Mode.ALL,
    inventory_pb2.HOLD_MODE_ALL: Mode.ALL,
    inventory_pb2.HOLD_MODE_BEST_EFFORT: Mode.BEST_EFFORT,
    inventory_pb2.HOLD_MODE_MINIMUM: Mode.MINIMUM,
}


def sku_fields(sku: inventory_pb2.Sku, field: str = "sku") -> tuple[str, str, str, str, str, int]:
    """(sku, name, category, unit, currency, micros), checked."""
    return (
        check.code(sku.sku, f"{field}.sku"),
        check.text(sku.name, f"{field}.name", 200),
        check.text(sku.category, f"{field}.category", 200),
        check.text(sku.unit, f"{field}.unit", 32) or "piece",
        *check.money(sku.unit_price.currency_code, sku.unit_price.micros, f"{field}.unit_price"),
    )


def location_fields(location: inventory_pb2.Location) -> tuple[str, str, int]:
    """(location, name, priority), checked."""
    return (
        check.code(location.location, "location.location"),
        check.text(location.name, "location.name", 200),
        check.quantity(location.priority, "location.priority", least=0, most=10**6),
    )


def mask(value: FieldMask, allowed: Sequence[str]) -> list[str]:
    """The fields that a mask names."""
    for path in value.paths or [""]:
        if path not in allowed:
            # A path may be as long as a message; what is told of it fits into a trailer.
            told = path[:PATH_CHARACTERS_MAX]
            raise Refusal("FIELD_MASK_INVALID", f"update_mask must name some of {', '.join(allowed)}", field=told)
    return list(value.paths)


def etag(value: str) -> int | None:
    """The version that an etag stands for; None when there is none."""
    if not value:
        return None
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else 0


def adjustment(value: inventory_pb2.StockAdjustment, field: str, request_id: str = "") -> Adjustment:
    """An adjustment; `request_id` replaces its own where another system's ids make it."""
    change = _CHANGES.get(value.reason)
    if change is None:
        raise check.invalid(f"{field}.reason", "must be a known reason")
    least = 1
    if change is Change.COUNT:
        least = -check.QUANTITY_MAX if value.relative else 0
    elif value.relative:
        raise check.invalid(f"{field}.relative", "is only for COUNT")
    if value.allow_short and change not in {Change.COUNT, Change.DAMAGE}:
        raise check.invalid(f"{field}.allow_short", "is only for COUNT and DAMAGE")
    location = check.code(value.key.location, f"{field}.key.location")
    if change is Change.TRANSFER:
        check.code(value.to_location, f"{field}.to_location")
    if (value.to_location != "") != (change is Change.TRANSFER) or value.to_location == location:
        raise check.invalid(f"{field}.to_location", "must be another location, and only for TRANSFER")
    return Adjustment(
        request_id=request_id or check.code(value.request_id, f"{field}.request_id"),
        sku=check.code(value.key.sku, f"{field}.key.sku"),
        location=location,
        change=change,
        quantity=check.quantity(value.quantity, f"{field}.quantity", least=least),
        relative=value.relative,
        to_location=value.to_location,
        allow_short=value.allow_short,
        reference=check.text(value.reference, f"{field}.reference", 200),
        expected_version=_version(value.expected_version, f"{field}.expected_version"),
        occurred_at=check.business_time(value, "occur_time", f"{field}.occur_time"),
        fingerprint=fingerprint(value),
    )


def policy(value: inventory_pb2.SetStockPolicyRequest) -> Adjustment:
    return Adjustment(
        request_id=check.code(value.request_id, "request_id"),
        sku=check.code(value.key.sku, "key.sku"),
        location=check.code(value.key.location, "key.location"),
        change=Change.POLICY,
        safety_stock=check.quantity(value.safety_stock, "safety_stock", least=0),
        backorder_limit=check.quantity(value.backorder_limit, "backorder_limit", least=0),
        expected_version=_version(value.expected_version, "expected_version"),
        fingerprint=fingerprint(value),
    )


def hold(value: inventory_pb2.HoldRequest, field: str) -> HoldRequest:
    check.count(len(value.lines), f"{field}.lines", HOLD_LINES_MAX)
    mode = _MODES.get(value.mode)
    if mode is None:
        raise check.invalid(f"{field}.mode", "must be a known mode")
    lines = []
    for number, line in enumerate(value.lines):
        at = f"{field}.lines[{number}]"
        check.quantity(line.quantity, f"{at}.quantity")
        most = line.quantity if mode is Mode.MINIMUM else 0
        lines.append(
            HoldLine(
                check.code(line.sku, f"{at}.sku"),
                check.code(line.location, f"{at}.location", optional=True),
                line.quantity,
                check.quantity(line.minimum_quantity, f"{at}.minimum_quantity", least=0, most=most),
            )
        )
    summed = sum_lines(lines)
    for total in summed:
        check.quantity(total.quantity, f"{field}.lines: the sum for {total.sku}")
    return HoldRequest(
        check.code(value.hold_id, f"{field}.hold_id"),
        summed,
        mode,
        check.ttl(value.ttl, f"{field}.ttl"),
        fingerprint(value),
    )


def hold_change(value: inventory_pb2.HoldChange, kind: Kind, field: str) -> HoldChange:
    check.count(len(value.lines), f"{field}.lines", HOLD_LINES_MAX)
    return HoldChange(
        check.code(value.hold_id, f"{field}.hold_id"),
        check.code(value.request_id, f"{field}.request_id"),
        kind,
        tuple(
            ChangeLine(
                check.code(line.sku, f"{field}.lines[{number}].sku"),
                check.code(line.location, f"{field}.lines[{number}].location", optional=True),
                check.quantity(line.quantity, f"{field}.lines[{number}].quantity", least=0),
            )
            for number, line in enumerate(value.lines)
        ),
        _kind_fingerprint(value, kind),
    )


def hold_extension(value: inventory_pb2.HoldExtension, field: str) -> HoldChange:
    check.count(len(value.skus), f"{field}.skus", HOLD_LINES_MAX)
    return HoldChange(
        check.code(value.hold_id, f"{field}.hold_id"),
        check.code(value.request_id, f"{field}.request_id"),
        Kind.HOLD,
        tuple(ChangeLine(check.code(sku, f"{field}.skus[{number}]"), "", 0) for number, sku in enumerate(value.skus)),
        _kind_fingerprint(value, Kind.HOLD),
        check.ttl(value.ttl, f"{field}.ttl"),
    )


def _kind_fingerprint(value: Message, kind: Kind) -> bytes:
    return kind.value.encode() + fingerprint(value)


def _version(value: int, field: str) -> int | None:
    """The version that a key must have; None when the caller does not mind."""
    return check.quantity(value, field, least=0, most=2**62) or None


def availability(request: inventory_pb2.GetAvailabilityRequest) -> list[tuple[Key, int]]:
    """Keys (an empty location asks for the SKU's sum) and the versions they must have reached."""
    check.count(len(request.keys), "keys", BATCH_ITEMS_MAX)
    keys = []
    for number, key in enumerate(request.keys):
        at = f"keys[{number}]"
        sku = check.code(key.sku, f"{at}.sku")
        location = check.code(key.location, f"{at}.location", optional=True)
        most = 2**62 if location else 0
        keys.append(((sku, location), check.quantity(key.min_version, f"{at}.min_version", least=0, most=most)))
    return keys


def watch(request: inventory_pb2.WatchStockRequest) -> list[tuple[Key, int]]:
    """Keys, each once, and the versions to resume after."""
    check.count(len(request.keys), "keys", BATCH_ITEMS_MAX)
    keys: dict[Key, int] = {}
    for number, key in enumerate(request.keys):
        at = f"keys[{number}]"
        identity = (check.code(key.sku, f"{at}.sku"), check.code(key.location, f"{at}.location"))
        if identity in keys:
            raise check.invalid(at, "is watched already")
        keys[identity] = check.quantity(key.resume_version, f"{at}.resume_version", least=0, most=2**62)
    return list(keys.items())


async def import_stream(
    stream: AsyncIterator[inventory_pb2.ImportStockRequest],
) -> tuple[str, bool, list[ImportRow | None], list[tuple[int, Refusal]]]:
    """(request id, dry run, rows with None for a bad one, the bad rows' numbers and refusals)."""
    request_id, dry_run = "", False
    rows: list[ImportRow | None] = []
    errors: list[tuple[int, Refusal]] = []
    seen: set[int] = set()
    async for message in stream:
        match message.WhichOneof("part"):
            case "header" if not request_id:
                request_id = check.code(message.header.request_id, "header.request_id")
                dry_run = message.header.dry_run
            case "rows" if request_id:
                check.count(len(message.rows.rows), "rows", BATCH_ITEMS_MAX)
                check.count(len(rows) + len(message.rows.rows), "rows", IMPORT_ROWS_MAX)
                for value in message.rows.rows:
                    try:
                        rows.append(_import_row(value, seen))
                    except Refusal as refusal:
                        rows.append(None)
                        errors.append((value.row_number, refusal))
            case _:
                raise check.invalid("part", "must be one header first, and then rows")
    if not request_id:
        raise check.invalid("header", "must be sent first")
    return request_id, dry_run, rows, errors


def _import_row(value: inventory_pb2.ImportRow, seen: set[int]) -> ImportRow:
    if value.row_number in seen:
        raise check.invalid("row_number", "must be unique in the import")
    seen.add(check.quantity(value.row_number, "row_number"))
    return ImportRow(
        value.row_number,
        sku_fields(value.sku),
        check.code(value.location, "location"),
        check.quantity(value.quantity, "quantity", least=0),
        check.quantity(value.safety_stock, "safety_stock", least=0),
        check.quantity(value.backorder_limit, "backorder_limit", least=0),
        fingerprint(value),
    )
