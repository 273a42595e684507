"""The inventory API through two pods: catalogue, import, reads and watching."""

import asyncio
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.inventory.v1.error_reason_pb2 import ERROR_REASON_REQUEST_ID_REUSED

from shared.client import Holdfast
from shared.refusal import Refusal
from tests.e2e.shop import goods, location, new, stock


async def test_a_sku_lives_from_creation_to_archive(holdfast: Holdfast) -> None:
    """Create, read, change by mask and etag, archive; each write may be repeated."""
    api, code = holdfast.inventory, new("SKU")
    body = ip.Sku(sku=code, name="Mug", category="kitchen", unit_price=ip.Money(currency_code="GBP", micros=2550000))
    create = ip.CreateSkuRequest(request_id=new(), sku=body)
    made = (await api.CreateSku(create)).sku
    assert (await api.CreateSku(create)).sku == made
    assert (await api.GetSku(ip.GetSkuRequest(sku=code))).sku == made
    change = ip.UpdateSkuRequest(
        request_id=new(),
        sku=ip.Sku(sku=code, name="Cup", category="ignored", etag=made.etag),
        update_mask=FieldMask(paths=["name"]),
    )
    changed = (await api.UpdateSku(change)).sku
    assert (await api.UpdateSku(change)).sku == changed
    assert (changed.name, changed.category, changed.unit_price) == ("Cup", "kitchen", made.unit_price)
    archive = ip.ArchiveSkuRequest(request_id=new(), sku=code, etag=changed.etag)
    archived = (await api.ArchiveSku(archive)).sku
    assert (await api.ArchiveSku(archive)).sku == archived
    assert archived.state == ip.LIFECYCLE_STATE_ARCHIVED


async def test_skus_are_listed_by_filter_and_page(holdfast: Holdfast) -> None:
    """By prefix and category (and what is below it), in order of code, archived ones on request."""
    api, prefix, category = holdfast.inventory, new("P"), new("cat")
    for n in range(5):
        sku = ip.Sku(sku=f"{prefix}-{n}", category=category if n < 3 else f"{category}/lights")
        await api.CreateSku(ip.CreateSkuRequest(request_id=new(), sku=sku))
    await api.ArchiveSku(ip.ArchiveSkuRequest(request_id=new(), sku=f"{prefix}-4"))
    request = ip.ListSkusRequest(sku_prefix=prefix, page_size=3)
    first = await api.ListSkus(request)
    request.page_token = first.next_page_token
    second = await api.ListSkus(request)
    assert [sku.sku for sku in [*first.skus, *second.skus]] == [f"{prefix}-{n}" for n in range(4)]
    assert not second.next_page_token
    below = await api.ListSkus(ip.ListSkusRequest(category=category, show_archived=True))
    assert len(below.skus) == 5


async def test_locations_are_changed_and_listed(holdfast: Holdfast) -> None:
    """Priority decides the source of an open line, and may be changed."""
    api = holdfast.inventory
    first, second = await location(holdfast, new("L"), 1), await location(holdfast, new("L"), 2)
    sku = await goods(holdfast, 5, first)
    await holdfast.adjust(new(), sku, second, ip.ADJUSTMENT_REASON_RECEIVE, 5)
    update = ip.UpdateLocationRequest(
        request_id=new(), location=ip.Location(location=first, priority=3), update_mask=FieldMask(paths=["priority"])
    )
    await api.UpdateLocation(update)
    answer = await holdfast.reserve(new(), [(sku, "", 1)])
    assert answer.reservation.allocations[0].location == second
    listed = [item.location for item in (await api.ListLocations(ip.ListLocationsRequest(page_size=1000))).locations]
    assert {first, second} <= set(listed)
    assert listed == sorted(listed)


async def test_an_import_reports_every_bad_row_and_changes_nothing(holdfast: Holdfast) -> None:
    """All errors at once, dry or not; a good import is applied, and again only known."""
    await location(holdfast)
    codes = [new("SKU") for _ in range(3)]

    def row(number: int, sku: str, quantity: int = 5, at: str = "MAIN") -> ip.ImportRow:
        return ip.ImportRow(row_number=number, sku=ip.Sku(sku=sku), location=at, quantity=quantity, safety_stock=1)

    bad = [row(1, codes[0]), row(2, "bad code"), row(3, codes[1], -1), row(4, codes[2], 1, "nowhere"), row(4, codes[0])]
    refused = await holdfast.import_stock(new(), bad)
    assert [error.row_number for error in refused.errors] == [2, 3, 4, 4]
    assert (refused.rows_read, refused.rows_applied) == (5, 0)
    good = [row(number, sku) for number, sku in enumerate(codes, 1)]
    assert not (await holdfast.import_stock(new(), good, dry_run=True)).errors
    with pytest.raises(Refusal):
        await holdfast._call(holdfast.inventory.GetSku(ip.GetSkuRequest(sku=codes[0])))
    request_id = new()
    part = await holdfast.import_stock(request_id, good[:2])
    whole = await holdfast.import_stock(request_id, good)
    assert (part.rows_applied, whole.rows_applied, whole.rows_known) == (2, 1, 2)
    other = await holdfast.import_stock(request_id, [row(1, codes[0], 6), row(9, codes[1])])
    assert [(error.row_number, error.reason) for error in other.errors] == [(1, ERROR_REASON_REQUEST_ID_REUSED)]
    seen = await stock(holdfast, codes[0], min_version=2)
    assert (seen.on_hand, seen.safety_stock, seen.available) == (5, 1, 4)


async def test_reads_say_how_fresh_they_are(holdfast: Holdfast) -> None:
    """min_version gives read-your-writes on any pod; a SKU's sum is over its locations; unknown reads zero."""
    sku = await goods(holdfast, 5)
    other = await location(holdfast, new("L"))
    for n in range(10):
        answer = await holdfast.adjust(new(), sku, "MAIN", ip.ADJUSTMENT_REASON_RECEIVE, 1)
        version = answer.stocks[0].version
        seen = await stock(holdfast, sku, min_version=version)
        assert (seen.version, seen.on_hand) == (version, 6 + n)
        assert seen.as_of.ToSeconds()
    await holdfast.adjust(new(), sku, other, ip.ADJUSTMENT_REASON_RECEIVE, 7)
    total, unknown = await holdfast.availability([(sku, ""), ("nowhere", "MAIN")])
    assert (total.on_hand, total.available) == (22, 22)
    assert (unknown.sku, unknown.on_hand, unknown.version) == ("nowhere", 0, 0)


async def test_a_watch_sees_every_movement_in_order_and_resumes(holdfast: Holdfast) -> None:
    """Snapshot, then each version without a gap; after a break the next version comes first."""
    sku = await goods(holdfast, 100)
    keys = [ip.WatchKey(sku=sku, location="MAIN")]
    stream: Any = holdfast.inventory.WatchStock(ip.WatchStockRequest(keys=keys))
    snapshot = (await stream.read()).snapshot
    await asyncio.gather(*(holdfast.reserve(new(), [(sku, "MAIN", 1)]) for _ in range(20)))
    versions = [(await stream.read()).movement.version for _ in range(20)]
    assert versions == [snapshot.version + 1 + n for n in range(20)]
    stream.cancel()
    await holdfast.reserve(new(), [(sku, "MAIN", 1)])
    keys[0].resume_version = versions[-1]
    again: Any = holdfast.inventory.WatchStock(ip.WatchStockRequest(keys=keys))
    movement = (await again.read()).movement
    assert (movement.version, movement.held) == (versions[-1] + 1, 21)
    again.cancel()


async def test_every_write_of_inventory_may_be_repeated_at_once_on_any_pod(holdfast: Holdfast) -> None:
    """Each eight times at once, over both pods: done once, answered alike; with other content it is named."""
    api, sku, place = holdfast.inventory, new("SKU"), new("L")
    key, held = ip.StockKey(sku=sku, location=place), new("hold")
    ttl = Duration(seconds=3600)

    def adjustment(reason: ip.AdjustmentReason.ValueType, quantity: int) -> ip.StockAdjustment:
        return ip.StockAdjustment(request_id=new(), key=key, reason=reason, quantity=quantity)

    def part(units: int) -> ip.HoldChange:
        line = ip.HoldChangeLine(sku=sku, quantity=units)
        return ip.HoldChange(hold_id=held, request_id=new(), lines=[line])

    receive, damage = ip.ADJUSTMENT_REASON_RECEIVE, ip.ADJUSTMENT_REASON_DAMAGE
    hold = ip.HoldRequest(hold_id=held, lines=[ip.HoldLine(sku=sku, location=place, quantity=8)])
    extension = ip.HoldExtension(hold_id=held, request_id=new(), skus=[sku], ttl=ttl)
    named, moved = FieldMask(paths=["name"]), FieldMask(paths=["priority"])
    writes: list[tuple[Any, Any]] = [
        (api.CreateSku, ip.CreateSkuRequest(request_id=new(), sku=ip.Sku(sku=sku, name="Mug"))),
        (api.CreateLocation, ip.CreateLocationRequest(request_id=new(), location=ip.Location(location=place))),
        (api.AdjustStock, ip.AdjustStockRequest(adjustment=adjustment(receive, 20))),
        (api.BatchAdjustStock, ip.BatchAdjustStockRequest(adjustments=[adjustment(receive, 5), adjustment(damage, 1)])),
        (api.SetStockPolicy, ip.SetStockPolicyRequest(request_id=new(), key=key, safety_stock=2)),
        (api.UpdateSku, ip.UpdateSkuRequest(request_id=new(), sku=ip.Sku(sku=sku, name="Cup"), update_mask=named)),
        (
            api.UpdateLocation,
            ip.UpdateLocationRequest(
                request_id=new(), location=ip.Location(location=place, priority=7), update_mask=moved
            ),
        ),
        (api.PlaceHolds, ip.PlaceHoldsRequest(holds=[hold])),
        (api.ExtendHolds, ip.ExtendHoldsRequest(extensions=[extension])),
        (api.CommitHolds, ip.CommitHoldsRequest(changes=[part(3)])),
        (api.ReleaseHolds, ip.ReleaseHoldsRequest(changes=[part(4)])),
        (api.ArchiveSku, ip.ArchiveSkuRequest(request_id=new(), sku=sku)),
        (api.ArchiveLocation, ip.ArchiveLocationRequest(request_id=new(), location=place)),
    ]
    for method, request in writes:
        answers = await asyncio.gather(*(method(request) for _ in range(8)))
        for answer in answers:
            for result in getattr(answer, "results", ()):
                assert not result.HasField("error"), result
                if "replayed" in result.DESCRIPTOR.fields_by_name:
                    result.replayed = False
        assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1, method
    seen = await stock(holdfast, sku, place, min_version=7)
    assert (seen.on_hand, seen.held, seen.safety_stock, seen.version) == (21, 1, 2, 7)
    writes[2][1].adjustment.quantity = 21
    with pytest.raises(Refusal) as refused:
        await holdfast._call(api.AdjustStock(writes[2][1]))
    assert refused.value.reason == "REQUEST_ID_REUSED"
