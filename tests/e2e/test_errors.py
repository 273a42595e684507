"""Bad requests of every kind get a status of the contract with its ErrorInfo, and never INTERNAL."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from holdfast.inventory.v1 import error_reason_pb2 as inventory_reasons
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import error_reason_pb2 as reservation_reasons
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.stack import Stack
from services.inventory.servicer import ERRORS as INVENTORY
from services.reservation.servicer import ERRORS as RESERVATION
from shared.client import Holdfast
from shared.errors import ErrorMap, refusal_of
from shared.refusal import Refusal
from tests.e2e.shop import goods, location, new

BIG = 10**12 + 1
RECEIVE, SHIP, COUNT = ip.ADJUSTMENT_REASON_RECEIVE, ip.ADJUSTMENT_REASON_SHIP, ip.ADJUSTMENT_REASON_COUNT
# What no request alone can bring about; test_failures.py, test_batching.py and test_stopping.py do.
BY_FAILURE = {"OVERLOADED", "DATABASE_UNAVAILABLE", "DEADLINE_PASSED", "INVENTORY_UNAVAILABLE", "STOPPING"}
# What depends on who calls; test_security.py does.
BY_CALLER = {"CALLER_UNKNOWN", "CALLER_FORBIDDEN", "CALLER_OVER_LIMIT"}
# What verdicts bring about; test_enforcement.py does.
BY_VERDICT = {"SUBJECT_BLOCKED", "LIMIT_REACHED", "ENFORCEMENT_STALE"}


async def refused(call: Awaitable[Any], errors: ErrorMap) -> str:
    """The reason of a call that must be refused, sent with the code that the contract gives it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    refusal = refusal_of(caught.value)
    assert refusal is not None, caught.value
    assert caught.value.code() is errors.codes[refusal.reason]
    return refusal.reason


def adjustment(sku: str, reason: ip.AdjustmentReason.ValueType, quantity: int, **more: Any) -> ip.AdjustStockRequest:
    more.setdefault("request_id", new())
    key = ip.StockKey(sku=sku, location=more.pop("at", "MAIN"))
    return ip.AdjustStockRequest(adjustment=ip.StockAdjustment(key=key, reason=reason, quantity=quantity, **more))


async def grow_old(stack: Stack, hold_id: str) -> None:
    """Let a hold have been placed nearly as long ago as a hold may live."""
    connection = await asyncpg.connect(stack.postgres_dsn("inventory"))
    await connection.execute("UPDATE hold SET created_at = now() - interval '7 days' WHERE hold_id = $1", hold_id)
    await connection.close()


async def test_inventory_raises_each_of_its_reasons(holdfast: Holdfast, stack: Stack) -> None:
    """Each ErrorReason of inventory that a request can bring about is brought about."""
    api = holdfast.inventory
    sku, archived = await goods(holdfast, 10), await goods(holdfast, 10)
    await location(holdfast, "CLOSED")
    await api.ArchiveSku(ip.ArchiveSkuRequest(request_id=new(), sku=archived))
    await api.ArchiveLocation(ip.ArchiveLocationRequest(request_id=new(), location="CLOSED"))
    await api.AdjustStock(adjustment(sku, RECEIVE, 1, request_id="once"))
    held = ip.HoldRequest(hold_id=new("hold"), lines=[ip.HoldLine(sku=sku, location="MAIN", quantity=4)])
    await api.PlaceHolds(ip.PlaceHoldsRequest(holds=[held]))

    def update(*paths: str, etag: str = "") -> ip.UpdateSkuRequest:
        body = ip.Sku(sku=sku, name="new", etag=etag)
        return ip.UpdateSkuRequest(request_id=new(), sku=body, update_mask=FieldMask(paths=paths))

    new_sku = ip.CreateSkuRequest(request_id=new(), sku=ip.Sku(sku=sku))
    new_main = ip.CreateLocationRequest(request_id=new(), location=ip.Location(location="MAIN"))
    ahead = ip.AvailabilityKey(sku=sku, location="MAIN", min_version=99)
    calls: list[tuple[str, Awaitable[Any]]] = [
        ("FIELD_INVALID", api.AdjustStock(adjustment(sku, RECEIVE, -1))),
        ("TOO_MANY_ITEMS", api.PlaceHolds(ip.PlaceHoldsRequest(holds=[held] * 1001))),
        ("PAGE_TOKEN_INVALID", api.ListSkus(ip.ListSkusRequest(page_token="nonsense"))),
        ("FIELD_MASK_INVALID", api.UpdateSku(update("state"))),
        ("SKU_NOT_FOUND", api.GetSku(ip.GetSkuRequest(sku="nowhere"))),
        ("LOCATION_NOT_FOUND", api.AdjustStock(adjustment(sku, RECEIVE, 1, at="nowhere"))),
        ("SKU_ALREADY_EXISTS", api.CreateSku(new_sku)),
        ("LOCATION_ALREADY_EXISTS", api.CreateLocation(new_main)),
        ("SKU_ARCHIVED", api.AdjustStock(adjustment(archived, RECEIVE, 1))),
        ("LOCATION_ARCHIVED", api.AdjustStock(adjustment(sku, RECEIVE, 1, at="CLOSED"))),
        ("ETAG_MISMATCH", api.UpdateSku(update("name", etag="99"))),
        ("VERSION_MISMATCH", api.AdjustStock(adjustment(sku, RECEIVE, 1, expected_version=99))),
        ("REQUEST_ID_REUSED", api.AdjustStock(adjustment(sku, RECEIVE, 2, request_id="once"))),
        ("INSUFFICIENT_STOCK", api.AdjustStock(adjustment(sku, SHIP, 8))),
        ("BELOW_HELD", api.AdjustStock(adjustment(sku, COUNT, 3))),
        ("QUANTITY_OUT_OF_RANGE", api.AdjustStock(adjustment(sku, RECEIVE, 10**12))),
        ("VERSION_NOT_REACHED", api.GetAvailability(ip.GetAvailabilityRequest(keys=[ahead]))),
    ]
    raised = {await refused(call, INVENTORY) for _, call in calls}
    assert raised == {reason for reason, _ in calls}

    watch = ip.WatchStockRequest(keys=[ip.WatchKey(sku=sku, location="MAIN", resume_version=99)])
    raised.add(await refused(api.WatchStock(watch).read(), INVENTORY))

    async def changed(method: Callable[..., Awaitable[Any]], units: int = 0, **more: Any) -> str:
        hold_id = more.pop("hold_id", held.hold_id)
        line = ip.HoldChangeLine(sku=sku, quantity=units)
        change = ip.HoldChange(hold_id=hold_id, request_id=new(), lines=[line])
        request = ip.CommitHoldsRequest if method == api.CommitHolds else ip.ReleaseHoldsRequest
        answer = await method(request(changes=[change], **more))
        name: str = inventory_reasons.ErrorReason.Name(answer.results[0].error.reason)
        return name.removeprefix("ERROR_REASON_")

    short = ip.HoldRequest(hold_id=new("hold"), lines=[ip.HoldLine(sku=sku, quantity=1)])
    short.ttl.FromSeconds(1)
    await api.PlaceHolds(ip.PlaceHoldsRequest(holds=[short]))
    long = ip.HoldExtension(hold_id=held.hold_id, request_id=new(), skus=[sku])
    long.ttl.FromSeconds(86400)
    raised |= {
        await changed(api.CommitHolds, hold_id="nowhere"),
        await changed(api.ReleaseHolds, expired_only=True),
        await changed(api.CommitHolds, 5),
    }
    await changed(api.CommitHolds)
    raised.add(await changed(api.ReleaseHolds))
    async with asyncio.timeout(10):
        while (late := await changed(api.ReleaseHolds, hold_id=short.hold_id, expired_only=True)) == "HOLD_NOT_EXPIRED":
            await asyncio.sleep(0.05)
    assert late == "UNSPECIFIED"
    raised.add(await changed(api.CommitHolds, hold_id=short.hold_id))
    old = ip.HoldRequest(hold_id=new("hold"), lines=[ip.HoldLine(sku=sku, quantity=1)])
    await api.PlaceHolds(ip.PlaceHoldsRequest(holds=[old]))
    await grow_old(stack, old.hold_id)
    long.hold_id = old.hold_id
    extended = await api.ExtendHolds(ip.ExtendHoldsRequest(extensions=[long]))
    raised.add(inventory_reasons.ErrorReason.Name(extended.results[0].error.reason).removeprefix("ERROR_REASON_"))
    expected = {name.removeprefix("ERROR_REASON_") for name in inventory_reasons.ErrorReason.keys()[1:]}
    assert raised == expected - BY_FAILURE - BY_CALLER


async def test_reservation_raises_each_of_its_reasons(holdfast: Holdfast, stack: Stack) -> None:
    """Each ErrorReason of reservation that a request can bring about is brought about."""
    api = holdfast.reservation
    sku, archived = await goods(holdfast, 10), await goods(holdfast, 10)
    await location(holdfast, "CLOSED")
    await holdfast.inventory.ArchiveSku(ip.ArchiveSkuRequest(request_id=new(), sku=archived))
    await holdfast.inventory.ArchiveLocation(ip.ArchiveLocationRequest(request_id=new(), location="CLOSED"))
    name, done, brief = new(), new(), new()
    await holdfast.reserve(name, [(sku, "", 2)])
    await holdfast.reserve(done, [(sku, "", 1)])
    await holdfast.reserve(brief, [(sku, "", 1)], ttl=timedelta(seconds=1))
    await holdfast.cancel(done, "x")

    def reserve(*lines: tuple[str, str, int], name: str = "") -> Awaitable[Any]:
        asked = [rp.ReservationLine(sku=line[0], location=line[1], quantity=line[2]) for line in lines]
        call: Awaitable[Any] = api.Reserve(rp.ReserveRequest(reservation_id=name or new(), lines=asked))
        return call

    def confirm(name: str, *lines: tuple[str, int]) -> Awaitable[Any]:
        asked = [rp.LineQuantity(sku=line[0], quantity=line[1]) for line in lines]
        request = rp.ConfirmRequest(reservation_id=name, request_id=new(), lines=asked)
        call: Awaitable[Any] = api.Confirm(request)
        return call

    raised = {
        await refused(reserve(), RESERVATION),
        await refused(reserve(*[(sku, "", 1)] * 2001), RESERVATION),
        await refused(api.ListReservations(rp.ListReservationsRequest(page_token="?")), RESERVATION),
        await refused(reserve(("nowhere", "", 1)), RESERVATION),
        await refused(reserve((sku, "nowhere", 1)), RESERVATION),
        await refused(reserve((archived, "", 1)), RESERVATION),
        await refused(reserve((sku, "CLOSED", 1)), RESERVATION),
        await refused(reserve((sku, "", 3), name=name), RESERVATION),
        await refused(confirm("nowhere"), RESERVATION),
        await refused(confirm(done), RESERVATION),
        await refused(confirm(name, (sku, 3)), RESERVATION),
        await refused(confirm(name, ("nowhere", 1)), RESERVATION),
    }
    async with asyncio.timeout(10):
        while (await holdfast.get(brief)).state != rp.RESERVATION_STATE_EXPIRED:
            await asyncio.sleep(0.05)
    raised.add(await refused(confirm(brief), RESERVATION))
    await grow_old(stack, name)
    extend = rp.ExtendRequest(reservation_id=name, request_id=new())
    raised.add(await refused(api.Extend(extend), RESERVATION))
    expected = {reason.removeprefix("ERROR_REASON_") for reason in reservation_reasons.ErrorReason.keys()[1:]}
    assert raised == expected - BY_FAILURE - BY_VERDICT - BY_CALLER


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("reservation_id", rp.ReserveRequest(lines=[rp.ReservationLine(sku="A", quantity=1)])),
        ("reservation_id", rp.ReserveRequest(reservation_id="a b", lines=[rp.ReservationLine(sku="A", quantity=1)])),
        ("lines", rp.ReserveRequest(reservation_id="r")),
        ("lines[0].sku", rp.ReserveRequest(reservation_id="r", lines=[rp.ReservationLine(quantity=1)])),
        ("lines[0].quantity", rp.ReserveRequest(reservation_id="r", lines=[rp.ReservationLine(sku="A")])),
        ("lines[0].quantity", rp.ReserveRequest(reservation_id="r", lines=[rp.ReservationLine(sku="A", quantity=BIG)])),
        (
            "lines: the sum for A",
            rp.ReserveRequest(reservation_id="r", lines=[rp.ReservationLine(sku="A", quantity=BIG - 1)] * 2),
        ),
        (
            "lines[0].minimum_quantity",
            rp.ReserveRequest(reservation_id="r", lines=[rp.ReservationLine(sku="A", quantity=1, minimum_quantity=1)]),
        ),
        ("mode", rp.ReserveRequest(reservation_id="r", mode=9, lines=[rp.ReservationLine(sku="A", quantity=1)])),  # type: ignore[arg-type]
        (
            "lines[0].unit_price.currency_code",
            rp.ReserveRequest(
                reservation_id="r",
                lines=[rp.ReservationLine(sku="A", quantity=1, unit_price=rp.Money(currency_code="pounds"))],
            ),
        ),
        (
            "ttl",
            rp.ReserveRequest(
                reservation_id="r", lines=[rp.ReservationLine(sku="A", quantity=1)], ttl=Duration(seconds=10**11)
            ),
        ),
    ],
)
async def test_a_bad_reserve_names_its_field(holdfast: Holdfast, field: str, request_: rp.ReserveRequest) -> None:
    """Empty, malformed, negative, too large: INVALID_ARGUMENT with the field's path."""
    with pytest.raises(Refusal) as caught:
        await holdfast._call(holdfast.reservation.Reserve(request_))
    assert (caught.value.reason, caught.value.metadata["field"]) == ("FIELD_INVALID", field)


@pytest.mark.parametrize("address", ["nonsense", "203.0.113.0/24", "fe80::1%eth0", "1" * 46])
async def test_a_bad_address_is_named(holdfast: Holdfast, address: str) -> None:
    """And a network is no address."""
    with pytest.raises(Refusal) as caught:
        await holdfast.reserve("r", [("A", "", 1)], ip_address=address)
    assert (caught.value.reason, caught.value.metadata["field"]) == ("FIELD_INVALID", "ip_address")


async def test_a_bad_identity_is_named(holdfast: Holdfast) -> None:
    """Its kind, its value, and how many may be asked for at once."""
    for request, field in (
        (rp.ResolveSubjectsRequest(identities=[rp.Subject(value="x")]), "identities[0].kind"),
        (rp.ResolveSubjectsRequest(subjects=["a b"]), "subjects[0]"),
        (rp.ResolveSubjectsRequest(), "subjects"),
        (rp.ResolveSubjectsRequest(subjects=["a"] * 1001), "subjects"),
        (
            rp.ResolveSubjectsRequest(identities=[rp.Subject(kind=rp.IDENTITY_KIND_NETWORK, value="x")]),
            "identities[0].value",
        ),
    ):
        with pytest.raises(Refusal) as caught:
            await holdfast._call(holdfast.reservation.ResolveSubjects(request))
        assert caught.value.metadata["field"] == field


async def test_times_out_of_range_are_invalid(holdfast: Holdfast) -> None:
    """A timestamp that is no time is the caller's mistake, not ours."""
    request = rp.ListReservationsRequest(start_time=Timestamp(seconds=10**17))
    with pytest.raises(Refusal) as caught:
        await holdfast._call(holdfast.reservation.ListReservations(request))
    assert caught.value.metadata == {"field": "start_time"}
