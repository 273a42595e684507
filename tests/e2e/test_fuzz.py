"""Whatever comes over the wire gets a status of the contract: nothing is INTERNAL, breaks a pod or stays in memory."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import grpc
import psutil
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from holdfast.analytics.v1 import analytics_pb2 as ap
from holdfast.analytics.v1 import fraud_pb2 as fp
from holdfast.analytics.v1 import notification_pb2 as np
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.supervisor import CLIENT_NAMES
from services.analytics import desk
from shared import pages
from shared.access import APIS
from shared.channel import open_channel
from shared.client import Holdfast
from tests.e2e.conftest import Secured
from tests.e2e.shop import goods, new

SEED = 20_250_501
ROUNDS = 4
MESSAGES = 24  # of each method in a round
CALL_SECONDS_MAX = 20
GROWTH_BYTES_MAX = 24 << 20
DEPTH_MAX = 4
# Said by the client itself, when a stream was refused while it sent.
LOCAL = "Internal error from Core"
BAD = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS,
       grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED}  # fmt: skip
TEXTS = ["", "A", "MAIN", "x" * 300, "a\0b", "\u202e", "😀", "1", "-1", "UTC", "Mars/Olympus", "' OR 1=1",
         "%s%n", "../../etc/passwd", "127.0.0.1", "::1", "fe80::1%x", "GBP", "k1:ab", "{}", "[" * 3000]  # fmt: skip
WHOLE = [0, 1, -1, 2, 7, 59, 10**6, 10**9, 10**12, 10**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**53, 2**62, 2**63 - 1,
         -(2**63), 2**64 - 1, -62135596800, 253402300799, 253402300800]  # fmt: skip
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan")]
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


class Method(NamedTuple):
    """A method of a service, as a caller of raw bytes needs it."""

    service: str
    path: str
    request: Descriptor
    streams_in: bool
    streams_out: bool


def methods() -> Iterator[Method]:
    """Every method of every API, found in the contracts."""
    for api in APIS:
        for service in api.DESCRIPTOR.services_by_name.values():
            name = service.full_name.split(".")[1]
            found: list[MethodDescriptor] = list(service.methods)
            for method in found:
                if name != "reflection":
                    yield Method(
                        name,
                        f"/{service.full_name}/{method.name}",
                        method.input_type,
                        method.client_streaming,
                        method.server_streaming,
                    )


class Fuzz:
    """Makes messages by chance, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def raw(self, kind: Descriptor) -> bytes:
        """A message of that kind, well formed or mangled, or just bytes."""
        match self._chance.randrange(6):
            case 0:
                return self._chance.randbytes(self._chance.randrange(200))
            case 1 | 2:
                return self._mangled(self._message(kind).SerializeToString())
            case _:
                return self._message(kind).SerializeToString()

    def _mangled(self, raw: bytes) -> bytes:
        for _ in range(self._chance.randrange(1, 8)):
            at = self._chance.randrange(len(raw) + 1)
            match self._chance.randrange(4):
                case 0:
                    raw = raw[:at]
                case 1:
                    raw = raw[:at] + self._chance.randbytes(self._chance.randrange(1, 9)) + raw[at:]
                case 2:
                    raw = raw[:at] + bytes([self._chance.randrange(256)]) + raw[at + 1 :]
                case _:
                    raw = raw[:at] + raw[at // 2 :]
        return raw

    def _message(self, kind: Descriptor, depth: int = 0) -> Message:
        made: Message = message_factory.GetMessageClass(kind)()
        for field in kind.fields:
            if self._chance.random() < 0.3 or depth > DEPTH_MAX:
                continue
            if field.is_repeated:
                if field.message_type and field.message_type.GetOptions().map_entry:
                    continue
                values = getattr(made, field.name)
                for _ in range(self._chance.choice((0, 1, 1, 2, 3))):
                    if field.message_type:
                        values.add().CopyFrom(self._message(field.message_type, depth + 1))
                    else:
                        values.append(self._scalar(field))
            elif field.message_type:
                getattr(made, field.name).CopyFrom(self._message(field.message_type, depth + 1))
            else:
                setattr(made, field.name, self._scalar(field))
        return made

    def _scalar(self, field: FieldDescriptor) -> Any:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return self._chance.randbytes(self._chance.randrange(30))
            case FieldDescriptor.CPPTYPE_STRING:
                return self._chance.choice(TEXTS)
            case FieldDescriptor.CPPTYPE_BOOL:
                return self._chance.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return self._chance.choice(FLOATS)
            case FieldDescriptor.CPPTYPE_ENUM if self._chance.random() < 0.8:
                assert field.enum_type
                return self._chance.choice([value.number for value in field.enum_type.values])
            case kind:
                low, high = INTEGERS[kind]
                return self._chance.choice([value for value in WHOLE if low <= value <= high])


def plain(value: bytes) -> bytes:
    return value


async def status(channel: grpc.aio.Channel, method: Method, raw: list[bytes]) -> tuple[grpc.StatusCode, str]:
    """How a call with these bytes ends. A stream that has begun to answer well counts as OK."""
    make: Any = getattr(
        channel, f"{'stream' if method.streams_in else 'unary'}_{'stream' if method.streams_out else 'unary'}"
    )

    async def messages() -> AsyncIterator[bytes]:
        for one in raw:
            yield one

    call = make(method.path, plain, plain)(messages() if method.streams_in else raw[0], timeout=CALL_SECONDS_MAX)
    try:
        if method.streams_out:
            await call.read()
            call.cancel() if not method.streams_in else None
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


def resident_bytes(secured: Secured) -> dict[str, int]:
    return {pod.name: psutil.Process(pod.pid).memory_info().rss for pod in secured.pods.pods}


def faults(secured: Secured) -> list[str]:
    """What the pods' logs say of calls that failed by our own fault."""
    return [
        line
        for pod in secured.pods.pods
        for line in pod.log.read_text().splitlines()
        if '"level": "error"' in line or "Traceback" in line or "exception" in line.lower()
    ]


async def test_no_bytes_are_too_strange(secured: Secured) -> None:
    """Random, mangled and extreme messages at every method of every service."""
    fuzz, seen, bad = Fuzz(SEED), Counter[str](), []
    before: dict[str, int] = {}
    certificate = secured.certificate(*CLIENT_NAMES, "reservation")
    pids = {pod.name: pod.pid for pod in secured.pods.pods}
    channels = {name: open_channel(target, certificate) for name, target in secured.targets.items()}
    found = list(methods())
    assert len(found) > 55
    for number in range(ROUNDS):
        for method in found:
            for _ in range(MESSAGES):
                raw = [fuzz.raw(method.request) for _ in range(3 if method.streams_in else 1)]
                code, details = await status(channels[method.service], method, raw)
                seen[code.name] += 1
                if code in BAD and not (method.streams_in and LOCAL in details):
                    bad.append(f"{method.path} {code.name} {details} {raw!r}"[:600])
        if number == 0:
            before = resident_bytes(secured)
    for channel in channels.values():
        await channel.close(None)
    assert not bad, "\n".join(bad[:20]) + f"\n{len(bad)} in all"
    assert not faults(secured), "\n".join(faults(secured)[:20])
    assert {pod.name: pod.pid for pod in secured.pods.pods} == pids
    grown = {name: now - before[name] for name, now in resident_bytes(secured).items()}
    assert max(grown.values()) < GROWTH_BYTES_MAX, grown
    # It reaches what lies behind the first check of a field.
    assert seen["OK"] > 100, seen
    assert seen["INVALID_ARGUMENT"] > 1000, seen


POSITIONS = ["\ud800", "\0", "", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "-infinity", "NaN",
             "x" * 3000, "1" * 400, "-1", "2025-05-01T00:00:00+00:00"]  # fmt: skip
LIVE_RULES = [desk.RULES.source, ("deleted_at IS NULL AND ?", True)]


@pytest.mark.parametrize(
    ("api", "name", "request_", "fields", "bound"),
    [
        ("inventory", "ListSkus", ip.ListSkusRequest(), 1, ("skus", "", "", False)),
        ("inventory", "ListLocations", ip.ListLocationsRequest(), 1, ("locations", False)),
        ("reservation", "ListReservations", rp.ListReservationsRequest(), 2, ("", "", None, None)),
        ("fraud", "ListRules", fp.ListRulesRequest(), 2, ("", "")),
        ("fraud", "ListCases", fp.ListCasesRequest(), 2, ["desk.fraud_case"]),
        (
            "notifications",
            "ListAlertRules",
            np.ListAlertRulesRequest(),
            1,
            LIVE_RULES,
        ),
        ("analytics", "ListStockView", ap.ListStockViewRequest(), 3, b""),
        ("analytics", "ReportFunnel", None, 0, None),
        ("analytics", "ReportSales", None, 0, None),
        ("analytics", "ReportStockOuts", None, 0, None),
        ("analytics", "ReportCustomers", None, 0, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_forged_page_token_is_refused(
    everybody: Holdfast, api: str, name: str, request_: Any, fields: int, bound: Any
) -> None:
    """A token's digest is no secret: who makes one with an impossible position gets PAGE_TOKEN_INVALID, or a page."""
    if request_ is None:
        request_ = getattr(ap, f"{name}Request")()
        request_.range.start_time.FromJsonString("2025-01-01T00:00:00Z")
        request_.range.end_time.FromJsonString("2025-02-01T00:00:00Z")
        bound = request_.SerializeToString(deterministic=True)
    for size in [fields] if fields else range(1, 8):
        for position in POSITIONS:
            for places in ([position] * size, ["A"] * (size - 1) + [position], [position] + ["1"] * (size - 1)):
                asked = type(request_)()
                asked.CopyFrom(request_)
                asked.page_token = pages.encode(places, bound)
                call = getattr(getattr(everybody, api), name)(asked)
                assert await call.code() in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}, places


async def test_a_token_that_nests_without_end_is_refused(everybody: Holdfast) -> None:
    """And one that is larger than any of ours."""
    for token in ("W1tb" * 4000, "W1tb" * 200_000, "bnVsbA==", "e30=", "\u2028"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await everybody.inventory.ListSkus(ip.ListSkusRequest(page_token=token))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_times_and_durations_out_of_bounds_are_named(everybody: Holdfast) -> None:
    """The year 1, the year 9999, and durations that no calendar has."""
    backtest = fp.BacktestRulesRequest()
    backtest.range.start_time.FromJsonString("0001-01-01T00:00:00Z")
    sales = ap.ReportSalesRequest(range=backtest.range)
    later = fp.BacktestRulesRequest()
    later.range.start_time.FromJsonString("2025-01-01T00:00:00Z")
    later.warm_up.seconds = 10**15
    negative = fp.BacktestRulesRequest(range=later.range)
    negative.warm_up.seconds, negative.warm_up.nanos = 1, -5
    cover = ap.ReportCoverRequest()
    cover.range.start_time.FromJsonString("9999-12-31T00:00:00Z")
    cover.range.end_time.FromJsonString("9999-12-31T23:59:59Z")
    calls: list[Callable[[], Any]] = [
        lambda: everybody.fraud.BacktestRules(backtest).read(),
        lambda: everybody.fraud.BacktestRules(later).read(),
        lambda: everybody.fraud.BacktestRules(negative).read(),
        lambda: everybody.analytics.ReportSales(sales),
        lambda: everybody.analytics.ReportCover(cover),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await asyncio.sleep(0)
    sku = await goods(everybody, 1)
    assert (await everybody.reserve(new(), [(sku, "", 1)])).outcome == rp.RESERVE_OUTCOME_HELD
