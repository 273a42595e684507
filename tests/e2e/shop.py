"""Short ways to set a scene through the API."""

from uuid import uuid4

from holdfast.analytics.v1 import analytics_pb2 as ap
from holdfast.inventory.v1 import inventory_pb2 as ip

from shared.client import Holdfast
from shared.refusal import Refusal


def new(prefix: str = "x") -> str:
    """An id or code that no other test uses."""
    return f"{prefix}-{uuid4().hex[:12]}"


async def location(holdfast: Holdfast, name: str = "MAIN", priority: int = 0) -> str:
    """Make a location where it is new."""
    request = ip.CreateLocationRequest(
        request_id=new(), location=ip.Location(location=name, name=name, priority=priority)
    )
    try:
        await holdfast._call(holdfast.inventory.CreateLocation(request))
    except Refusal as refusal:
        assert refusal.reason == "LOCATION_ALREADY_EXISTS"  # noqa: PT017 - any other is a failure
    return name


async def goods(holdfast: Holdfast, units: int, at: str = "MAIN", priority: int = 0) -> str:
    """A new SKU with units at a location."""
    sku = new("SKU")
    await location(holdfast, at, priority)
    row = ip.ImportRow(row_number=1, sku=ip.Sku(sku=sku, name="Lantern"), location=at, quantity=units)
    answer = await holdfast.import_stock(new(), [row])
    assert not answer.errors
    return sku


async def stock(holdfast: Holdfast, sku: str, at: str = "MAIN", min_version: int = 0) -> ip.Stock:
    key = ip.AvailabilityKey(sku=sku, location=at, min_version=min_version)
    request = ip.GetAvailabilityRequest(keys=[key])
    answer = await holdfast._call(holdfast.inventory.GetAvailability(request))
    found: ip.Stock = answer.stocks[0]
    return found


async def view(holdfast: Holdfast, sku: str, version: int = 0) -> ap.StockRow:
    """A SKU's row of the stock view at MAIN, at `version` or later."""
    seen = [ap.SeenVersion(sku=sku, location="MAIN", version=version)] if version else []
    (row,) = await holdfast.report("ListStockView", ap.ListStockViewRequest(sku_prefix=sku, min_versions=seen))
    found: ap.StockRow = row
    return found
