"""Pods with mutual TLS, tokens and the table of who may call what: nobody comes in who should not."""

import asyncio
import socket
import ssl
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from holdfast.analytics.v1 import analytics_pb2 as ap
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.inventory.v1 import inventory_pb2_grpc
from holdfast.reservation.v1 import reservation_pb2 as rp
from holdfast.reservation.v1 import reservation_pb2_grpc

from deploy.local.certificates import Authority
from deploy.local.supervisor import SERVICES
from shared.channel import open_channel
from shared.client import Holdfast
from shared.errors import DETAILS_KEY, refusal_of
from shared.refusal import Refusal
from tests.e2e.conftest import FLOOD_CALLS_PER_SECOND_MAX, FLOODERS, Secured
from tests.e2e.shop import goods, new
from tests.unit.test_access import by_public_key, signed


async def code(call: Awaitable[Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def reason(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    refusal = refusal_of(caught.value)
    assert refusal is not None, caught.value
    return f"{caught.value.code().name} {refusal.reason}"


def silent(stub: Any) -> Any:
    """A stub whose streams may be called without a message: one that is sent while the stream is refused is lost."""
    return stub


FORBIDDEN, UNKNOWN = "PERMISSION_DENIED CALLER_FORBIDDEN", "UNAUTHENTICATED CALLER_UNKNOWN"
GET = rp.GetReservationRequest(reservation_id="nobody")


# -- certificates -----------------------------------------------------------------------------------------------------


async def test_an_order_goes_through_with_certificates_on_every_side(everybody: Holdfast) -> None:
    """Client to reservation, and reservation to inventory as itself."""
    sku = await goods(everybody, 5)
    name = new()
    assert (await everybody.reserve(name, [(sku, "", 2)])).outcome == rp.RESERVE_OUTCOME_HELD
    assert (await everybody.confirm(name, new())).reservation.state == rp.RESERVATION_STATE_CONFIRMED


@pytest.mark.parametrize("kind", ["wrong authority", "expired", "none", "plaintext", "server of another name"])
async def test_without_a_good_certificate_there_is_no_connection(secured: Secured, kind: str, tmp_path: Path) -> None:
    """The call never reaches a method: UNAVAILABLE."""
    address = secured.targets["reservation"].removeprefix("ipv4:")
    good = Path(secured.certificate("shop"))
    options = []
    credentials: grpc.ChannelCredentials | None
    certificate, key, trusted = ((good / name).read_bytes() for name in ("tls.crt", "tls.key", "ca.crt"))
    match kind:
        case "wrong authority":
            other = Authority().issue(tmp_path / "other", "shop")
            certificate, key = (other / "tls.crt").read_bytes(), (other / "tls.key").read_bytes()
            credentials = grpc.ssl_channel_credentials(trusted, key, certificate)
        case "expired":
            old = Path(secured.certificate("shop", life=timedelta(hours=-1)))
            certificate, key = (old / "tls.crt").read_bytes(), (old / "tls.key").read_bytes()
            credentials = grpc.ssl_channel_credentials(trusted, key, certificate)
        case "none":
            credentials = grpc.ssl_channel_credentials(trusted)
        case "plaintext":
            credentials = None
        case _:
            credentials = grpc.ssl_channel_credentials(trusted, key, certificate)
            options = [("grpc.ssl_target_name_override", "inventory")]
    channel = (
        grpc.aio.secure_channel(address, credentials, options) if credentials else grpc.aio.insecure_channel(address)
    )
    async with channel:
        stub = reservation_pb2_grpc.ReservationServiceStub(channel)
        assert await code(stub.GetReservation(GET, timeout=10)) is grpc.StatusCode.UNAVAILABLE


async def test_health_is_open_to_every_certificate_and_to_probes(secured: Secured) -> None:
    """Kubernetes' probes have no certificate: they get health on a port of its own, and nothing but health."""
    target = secured.targets["inventory"]
    async with open_channel(target, secured.certificate("stranger")) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with grpc.aio.insecure_channel(f"127.0.0.1:{secured.probes['inventory']}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = inventory_pb2_grpc.InventoryServiceStub(channel)
        assert await code(stub.ListSkus(ip.ListSkusRequest())) is grpc.StatusCode.UNIMPLEMENTED


def serial(secured: Secured, pod: str) -> int:
    """The serial number of the certificate that a pod shows to a new connection."""
    context = ssl.create_default_context(cafile=str(Path(secured.pods.tls_directory) / "ca.crt"))
    directory = Path(secured.pods.tls_directory)
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    port = secured.pods.pod(pod).port
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as wrapped,
    ):
        shown = wrapped.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown).serial_number


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.1)


async def test_certificates_are_rotated_under_load_without_a_failed_call(secured: Secured, everybody: Holdfast) -> None:
    """Every side's: new connections show the new one, old ones stay, and callers see nothing of it."""
    sku = await goods(everybody, 100_000)
    own = secured.certificate("shop")
    going, done = True, 0

    async def caller(holdfast: Holdfast) -> None:
        nonlocal done
        while going:
            answer = await holdfast.reserve(new(), [(sku, "", 1)])
            assert answer.outcome == rp.RESERVE_OUTCOME_HELD
            done += 1

    async with secured.client(own) as shop:
        callers = [asyncio.create_task(caller(shop)) for _ in range(8)]
        for _ in range(3):
            before = [serial(secured, f"{name}-0") for name in ("inventory", "reservation")]
            for service in ("inventory", "reservation"):
                secured.authority.issue(Path(secured.pods.environment(_service(service))["HOLDFAST_TLS_DIRECTORY"]),
                                        service)  # fmt: skip
            secured.authority.issue(Path(own), "shop")

            async def rotated(before: list[int] = before) -> bool:
                now = [serial(secured, f"{name}-0") for name in ("inventory", "reservation")]
                return not set(now) & set(before)

            await until(rotated)
            at = done

            async def went_on(at: int = at) -> bool:
                return done > at + 20 or any(task.done() for task in callers)

            await until(went_on)
        going = False
        await asyncio.gather(*callers)
        # The client's own is in use as well: one for another role loses the rights of the first.
        secured.authority.issue(Path(own), "warehouse")

        async def forbidden() -> bool:
            try:
                await shop.get("nobody")
            except Refusal as refusal:
                return refusal.reason == "CALLER_FORBIDDEN"
            return False

        await until(forbidden)


def _service(name: str) -> Any:
    return next(service for service in SERVICES if service.name == name)


# -- rights -----------------------------------------------------------------------------------------------------------


async def test_each_role_may_call_what_the_table_says_and_nothing_else(secured: Secured) -> None:
    """Over all three services: UNARY, streams of either side, and holds, which only reservation may place."""
    async with secured.client(secured.certificate("shop")) as shop:
        assert await reason(shop.reservation.GetReservation(GET)) == "NOT_FOUND RESERVATION_NOT_FOUND"
        assert await reason(shop.inventory.PlaceHolds(ip.PlaceHoldsRequest())) == FORBIDDEN
        assert await reason(shop.inventory.AdjustStock(ip.AdjustStockRequest())) == FORBIDDEN
        assert await reason(silent(shop.inventory).ImportStock()) == FORBIDDEN
        assert await reason(shop.reservation.ResolveSubjects(rp.ResolveSubjectsRequest())) == FORBIDDEN
        assert await reason(shop.analytics.GetFreshness(ap.GetFreshnessRequest())) == FORBIDDEN
        assert await reason(shop.analytics.ExportReport(ap.ExportReportRequest()).read()) == FORBIDDEN
    async with secured.client(secured.certificate("warehouse")) as warehouse:
        adjusted = warehouse.inventory.AdjustStock(ip.AdjustStockRequest())
        assert await reason(adjusted) == "INVALID_ARGUMENT FIELD_INVALID"
        assert await reason(warehouse.reservation.Reserve(rp.ReserveRequest())) == FORBIDDEN
        assert await reason(silent(warehouse.reservation).ReserveStream().read()) == FORBIDDEN
    async with secured.client(secured.certificate("stranger")) as stranger:
        assert await reason(stranger.reservation.GetReservation(GET)) == FORBIDDEN
    async with secured.client(secured.certificate(uri="spiffe://holdfast.test/till")) as till:
        assert await reason(till.reservation.GetReservation(GET)) == "NOT_FOUND RESERVATION_NOT_FOUND"


async def test_reflection_is_closed_but_to_whom_the_table_opens_it(secured: Secured) -> None:
    """What the contracts are is nobody's business without a right."""
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub
    async with open_channel(secured.targets["inventory"], secured.certificate("shop")) as channel:
        assert await reason(stub(channel).ServerReflectionInfo().read()) == FORBIDDEN
    async with open_channel(secured.targets["inventory"], secured.certificate("operator")) as channel:
        call = stub(channel).ServerReflectionInfo()
        await call.write(asked)
        assert "holdfast.inventory.v1.InventoryService" in str(await call.read())


async def test_a_token_says_who_calls(secured: Secured) -> None:
    """Its roles count, not the certificate's; a bad one is refused, on every service, with the API's own reason."""
    async with secured.client(secured.certificate("gateway")) as gateway:

        def got(token: str) -> Awaitable[Any]:
            call: Awaitable[Any] = gateway.reservation.GetReservation(GET, metadata=_bearer(token))
            return call

        assert await reason(got(signed(scope="shop"))) == "NOT_FOUND RESERVATION_NOT_FOUND"
        assert await reason(got(signed("RS256", roles=["shop"]))) == "NOT_FOUND RESERVATION_NOT_FOUND"
        assert await reason(got(signed(scope="warehouse"))) == FORBIDDEN
        assert await reason(got(signed(scope="data-protection reservation"))) == FORBIDDEN
        bad = {
            "audience": signed(scope="shop", aud="another"),
            "issuer": signed(scope="shop", iss="https://another.example"),
            "expired": signed(scope="shop", exp=time.time() - 60),
            "HS256 by the public key": by_public_key(),
            "unsigned": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.",
        }
        for name, token in bad.items():
            assert await reason(got(token)) == UNKNOWN, name
        metadata = _bearer(signed(aud="another"))
        assert await reason(gateway.inventory.ListSkus(ip.ListSkusRequest(), metadata=metadata)) == UNKNOWN
        assert await reason(gateway.analytics.GetFreshness(ap.GetFreshnessRequest(), metadata=metadata)) == UNKNOWN
        twice = _bearer(signed(scope="shop")) * 2
        assert await reason(gateway.reservation.GetReservation(GET, metadata=twice)) == UNKNOWN
    async with secured.client(secured.certificate("shop")) as shop:
        assert await reason(shop.reservation.GetReservation(GET, metadata=_bearer(bad["audience"]))) == UNKNOWN


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_a_flood_from_one_caller_does_not_slow_another(secured: Secured, everybody: Holdfast) -> None:
    """The flood is told to come back later; all calls of another caller are served, about as fast as without it."""
    sku = await goods(everybody, 100_000)
    going = True
    told: list[status_pb2.Status] = []
    seen: Counter[grpc.StatusCode] = Counter()

    async def flood(holdfast: Holdfast) -> None:
        while going:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await holdfast.reservation.GetReservation(GET)
            seen[caught.value.code()] += 1
            if caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                metadata: Any = caught.value.trailing_metadata()
                told.append(status_pb2.Status.FromString(dict(metadata)[DETAILS_KEY]))

    async def timed(holdfast: Holdfast, calls: int) -> float:
        taken = []
        for _ in range(calls):
            began = time.monotonic()
            answer = await holdfast.reserve(new(), [(sku, "", 1)])
            taken.append(time.monotonic() - began)
            assert answer.outcome == rp.RESERVE_OUTCOME_HELD
        return statistics.median(taken)

    async with (
        secured.client(secured.certificate("shop")) as shop,
        secured.client(secured.certificate("flooder")) as flooder,
    ):
        await timed(shop, 20)
        quiet = await timed(shop, 50)
        began = time.monotonic()
        floods = [asyncio.create_task(flood(flooder)) for _ in range(FLOODERS)]
        await until(_truth(lambda: len(told) > 50))
        loud = await timed(shop, 50)
        going = False
        await asyncio.gather(*floods)
        seconds = time.monotonic() - began
    # Both share an event loop and two cores with the flood itself: that takes its share of any call.
    assert loud < quiet * 10 + 0.1, f"{loud:.4f} s beside the flood, {quiet:.4f} s without"
    assert set(seen) == {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert seen[grpc.StatusCode.NOT_FOUND] <= FLOOD_CALLS_PER_SECOND_MAX * (seconds + 1) + 1
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert told[0].details[0].Unpack(info)
    assert told[0].details[1].Unpack(retry)
    assert info.reason == "CALLER_OVER_LIMIT"
    assert 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 1


def _truth(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def asked() -> bool:
        return condition()

    return asked


async def test_metadata_is_bounded(secured: Secured) -> None:
    """A megabyte of headers is refused before it is looked at."""
    async with secured.client(secured.certificate("shop")) as shop:
        large = (("x-large", "x" * (1 << 20)),)
        found = await code(shop.reservation.GetReservation(GET, metadata=large, timeout=10))
        assert found in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}
        assert await reason(shop.reservation.GetReservation(GET)) == "NOT_FOUND RESERVATION_NOT_FOUND"
