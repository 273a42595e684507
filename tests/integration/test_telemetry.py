"""Who is traced, what a batch links to, which errors are kept, and a collector that is no use."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from holdfast.inventory.v1 import inventory_pb2 as pb
from holdfast.inventory.v1 import inventory_pb2_grpc

from deploy.local.certificates import Authority
from deploy.local.stack import free_port
from services.inventory.servicer import ERRORS
from shared import logs, metrics, server, telemetry, tls
from shared.batching import Batcher
from shared.channel import open_channel
from shared.refusal import Refusal
from shared.settings import Settings
from tests.collector import Collector, collecting

GET = "holdfast.inventory.v1.InventoryService/GetSku"
WAITED_SECONDS = 0.7 * telemetry.EXPORT_SECONDS_MAX  # who takes so long has waited for the collector


class Shop(inventory_pb2_grpc.InventoryServiceServicer):
    """Answers GetSku by its name: some are errors; the others wait for a batch of their own."""

    def __init__(self) -> None:
        self.batcher: Batcher[str, str] = Batcher("shop", self._handle)
        self.reached, self.released = asyncio.Event(), asyncio.Event()  # by "first", and for it

    async def _handle(self, skus: Sequence[str]) -> list[str | Exception]:
        if "first" in skus:
            self.reached.set()
            await self.released.wait()
        await asyncio.sleep(1 if "slow" in skus else 0.02)  # the others gather
        return [Refusal("SKU_NOT_FOUND", "not here", sku=sku) if sku == "missing" else sku for sku in skus]

    async def GetSku(self, request: pb.GetSkuRequest, context: Any) -> pb.GetSkuResponse:  # noqa: ARG002, N802
        if request.sku == "overloaded":
            raise Refusal("OVERLOADED", "come back later", queue="shop", limit=1)
        if request.sku == "broken":
            raise ValueError("customer-4711 is broken")
        return pb.GetSkuResponse(sku=pb.Sku(sku=await self.batcher.submit(request.sku)))


@asynccontextmanager
async def shop(
    endpoint: str, ratio: float = 0.0, served: Shop | None = None, certificates: str = ""
) -> AsyncIterator[Any]:
    """A stub of a server that exports to `endpoint`; both show the certificates of a directory, if there is one."""
    servicer = served or Shop()  # type: ignore[abstract] # one call
    settings = Settings(
        database_dsn="postgresql://nobody@localhost/nothing",
        listen="127.0.0.1:0",
        pod="shop-0",
        otlp_endpoint=endpoint,
        trace_sample_ratio=ratio,
    )

    def register(target: Any) -> None:
        inventory_pb2_grpc.add_InventoryServiceServicer_to_server(servicer, target)

    (running, *_), _, _ = server.build(settings, ERRORS, register, [])
    credentials = tls.server_credentials(tls.watch(certificates)) if certificates else None
    listen = "127.0.0.1:0"
    port = running.add_secure_port(listen, credentials) if credentials else running.add_insecure_port(listen)
    async with telemetry.exporting(settings, "shop"):
        await running.start()
        try:
            async with open_channel(f"ipv4:127.0.0.1:{port}", certificates) as channel:
                yield inventory_pb2_grpc.InventoryServiceStub(channel)
        finally:
            await running.stop(0)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


def caller(*, sampled: bool) -> tuple[str, list[tuple[str, str]]]:
    """A trace, and the metadata of a call in it."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, [("traceparent", f"00-{trace}-{span}-{int(sampled):02x}")]


async def code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_only_who_is_sampled_is_traced(collector: Collector) -> None:
    """At a ratio of 0 a caller that has decided for a trace gets one; the others, and who decided against, do not."""
    trace, metadata = caller(sampled=True)
    against, unwanted = caller(sampled=False)
    async with shop(collector.endpoint) as stub:
        for more in ({}, {"metadata": unwanted}, {"metadata": metadata}, {"metadata": [("traceparent", "nonsense")]}):
            await stub.GetSku(pb.GetSkuRequest(sku="s"), **more)
        assert await code(stub.GetSku(pb.GetSkuRequest(sku="missing"))) is grpc.StatusCode.NOT_FOUND
    assert {span.trace for span in collector.spans} == {trace} != {against}
    assert {span.name for span in collector.spans} == {GET, "batch shop"}
    assert {span.pod for span in collector.spans} == {"shop-0"}


async def test_the_ratio_is_of_those_who_have_not_decided(collector: Collector) -> None:
    """At 1 every call is the root of a trace of its own."""
    async with shop(collector.endpoint, ratio=1) as stub:
        for _ in range(3):
            await stub.GetSku(pb.GetSkuRequest(sku="s"))
        _, unwanted = caller(sampled=False)
        await stub.GetSku(pb.GetSkuRequest(sku="s"), metadata=unwanted)
    calls = [span for span in collector.spans if span.name == GET]
    assert len({span.trace for span in calls}) == len(calls) == 3
    assert {span.parent for span in calls} == {""}


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_trace_leads_on_to_who_is_called(collector: Collector, tmp_path: Path, *, encrypted: bool) -> None:
    """A call made within a span has one of its own, and the called pod's is its child: with TLS as without."""
    certificates = str(Authority().issue(tmp_path, "inventory")) if encrypted else ""
    async with shop(collector.endpoint, certificates=certificates) as stub:
        with telemetry.batch("reserves", [telemetry.Span("Reserve", None)], {}):
            await telemetry.traced(stub).GetSku(pb.GetSkuRequest(sku="s"))
    spans = {span.kind: span for span in collector.spans if span.name == GET}
    (batch,) = [span for span in collector.spans if span.name == "batch reserves"]
    assert {span.trace for span in spans.values()} == {batch.trace}
    assert (spans["CLIENT"].parent, spans["SERVER"].parent) == (batch.span, spans["CLIENT"].span)


async def test_errors_of_ours_are_kept(collector: Collector) -> None:
    """At a ratio of 0 an error has a span of its real length in its caller's trace, without what it was about."""
    against, unwanted = caller(sampled=False)
    async with shop(collector.endpoint) as stub:
        assert await code(stub.GetSku(pb.GetSkuRequest(sku="broken"), metadata=unwanted)) is grpc.StatusCode.INTERNAL
        assert await code(stub.GetSku(pb.GetSkuRequest(sku="overloaded"))) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await code(stub.GetSku(pb.GetSkuRequest(sku="missing"))) is grpc.StatusCode.NOT_FOUND
        late = stub.GetSku(pb.GetSkuRequest(sku="slow"), timeout=0.2)
        assert await code(late) is grpc.StatusCode.DEADLINE_EXCEEDED
    kept = {span.attributes["rpc.response.status_code"]: span for span in collector.spans}
    assert set(kept) == {"INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert (kept["INTERNAL"].trace, kept["INTERNAL"].status) == (against, "ERROR")
    assert all(0 < span.end_nanos - span.start_nanos < 10**9 for span in kept.values())
    assert b"4711" not in b"".join(collector.raw)


async def test_a_flood_of_errors_is_not_traced_whole(collector: Collector) -> None:
    """No more spans a second than ERRORS_A_SECOND_MAX, and the rest is counted."""
    dropped = metrics.SPANS_DROPPED.labels("errors")
    before, began = dropped._value.get(), time.monotonic()
    async with shop(collector.endpoint) as stub:
        for _ in range(10):
            await asyncio.gather(*(code(stub.GetSku(pb.GetSkuRequest(sku="overloaded"))) for _ in range(20)))
    seconds = time.monotonic() - began
    assert len(collector.spans) <= telemetry.ERRORS_A_SECOND_MAX * (int(seconds) + 2)
    assert len(collector.spans) + dropped._value.get() - before == 200


async def test_a_batch_and_its_callers_link_to_each_other(collector: Collector) -> None:
    """Three traced callers and one that is not, in one batch: one span, in the first one's trace, linked both ways."""
    callers = [caller(sampled=True) for _ in range(3)]
    served = Shop()  # type: ignore[abstract] # one call
    async with shop(collector.endpoint, served=served) as stub:
        first = asyncio.ensure_future(stub.GetSku(pb.GetSkuRequest(sku="first")))
        await served.reached.wait()
        others = [stub.GetSku(pb.GetSkuRequest(sku="s"), metadata=metadata) for _, metadata in callers]
        others.append(stub.GetSku(pb.GetSkuRequest(sku="s")))
        while len(served.batcher._queue) < len(others):
            await asyncio.sleep(0.001)
        served.released.set()
        await asyncio.gather(first, *others)
    (batch,) = [span for span in collector.spans if span.name == "batch shop"]
    calls = [span for span in collector.spans if span.name == GET]
    assert {span.trace for span in calls} == {trace for trace, _ in callers}
    assert batch.links == {(span.trace, span.span) for span in calls}
    assert all(span.links == {(batch.trace, batch.span)} for span in calls)
    assert (batch.trace, batch.parent) in batch.links
    assert batch.attributes["holdfast.batch.calls"] == 4


@asynccontextmanager
async def nobody() -> AsyncIterator[str]:
    """Where no collector is."""
    yield f"http://127.0.0.1:{free_port()}"


@asynccontextmanager
async def deaf() -> AsyncIterator[str]:
    """A collector that takes connections and says nothing."""
    held: list[asyncio.StreamWriter] = []
    listening = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for writer in held:
            writer.close()


@asynccontextmanager
async def hanging() -> AsyncIterator[str]:
    """A collector that takes spans and does not answer."""
    with collecting() as running:
        running.answering.clear()
        yield running.endpoint
        running.answering.set()


@pytest.mark.parametrize("collector_that", [nobody, deaf, hanging])
async def test_a_collector_that_is_no_use(collector_that: Callable[[], AbstractAsyncContextManager[str]]) -> None:
    """Calls go on as fast as they do, spans that cannot go are counted, and stopping does not wait for it."""
    lost = [metrics.SPANS_DROPPED.labels(reason) for reason in ("full", "export")]
    before, made = sum(counter._value.get() for counter in lost), 0
    async with collector_that() as endpoint:
        async with shop(endpoint, ratio=1) as stub:
            until, slowest = time.monotonic() + 2 * telemetry.EXPORT_SECONDS, 0.0
            while time.monotonic() < until:
                began = time.monotonic()
                await asyncio.gather(*(stub.GetSku(pb.GetSkuRequest(sku="s")) for _ in range(10)))
                slowest, made = max(slowest, time.monotonic() - began), made + 10
            stopping = time.monotonic()
        assert time.monotonic() - stopping < WAITED_SECONDS
    assert slowest < WAITED_SECONDS
    assert sum(counter._value.get() for counter in lost) - before > made  # a span for each call, and for batches


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that find the queue full are dropped and counted."""
    monkeypatch.setattr(telemetry, "QUEUE_SPANS_MAX", 10)
    monkeypatch.setattr(telemetry, "EXPORT_SECONDS", 3600)  # nothing leaves the queue meanwhile
    full = metrics.SPANS_DROPPED.labels("full")
    before = full._value.get()
    async with nobody() as endpoint, shop(endpoint, ratio=1) as stub:
        await asyncio.gather(*(stub.GetSku(pb.GetSkuRequest(sku="s")) for _ in range(50)))
    assert full._value.get() - before >= 40


async def test_lines_of_the_log_name_their_trace(collector: Collector) -> None:
    """Within something traced a line has its ids; elsewhere it has none."""
    trace, metadata = caller(sampled=True)
    async with shop(collector.endpoint) as stub:
        with structlog.testing.capture_logs(processors=[logs.trace]) as lines:
            await code(stub.GetSku(pb.GetSkuRequest(sku="broken"), metadata=metadata))
            await code(stub.GetSku(pb.GetSkuRequest(sku="broken")))
    (span,) = [span for span in collector.spans if span.trace == trace]
    assert [(line.get("trace_id"), line.get("span_id")) for line in lines] == [(trace, span.span), (None, None)]
