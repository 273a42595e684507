"""One trace from a client's Reserve to the message that a subscriber gets, through pods, batches and topics."""

import asyncio
import json
import time
from pathlib import Path

from holdfast.analytics.v1 import notification_pb2 as np
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.receiver import Receiver
from deploy.local.supervisor import STOP_SECONDS_MAX, Supervisor
from shared.client import Holdfast
from tests.collector import Collector, Seen, calling
from tests.e2e.shop import goods, new

RESERVE = ("reservation", "holdfast.reservation.v1.ReservationService/Reserve")
PLACED = "holdfast.inventory.v1.InventoryService/PlaceHolds"
MOVEMENTS, CHANGES = "holdfast.inventory.movements.v1", "holdfast.reservation.changes.v1"
# What a call comes to, from the call on.
STOCK_OUT = [
    RESERVE,
    ("reservation", "batch reserves"),
    ("reservation", PLACED),
    ("inventory", PLACED),
    ("inventory", "batch holds"),
    ("inventory", "transaction"),
    ("inventory", f"send {MOVEMENTS}"),
    ("analytics", f"process {MOVEMENTS}"),
    ("analytics", "alert STOCK_OUT"),
    ("analytics", "deliver webhook"),
]
FRAUD_CASE = [
    RESERVE,
    ("reservation", "batch reserves"),
    ("reservation", "transaction"),
    ("reservation", f"send {CHANGES}"),
    ("analytics", f"process {CHANGES}"),
    ("analytics", "decide case"),
    ("analytics", "alert FRAUD_CASE"),
    ("analytics", "deliver webhook"),
]
PROJECTED = [*FRAUD_CASE[:5], ("analytics", "transaction")]
BASKETS = 5  # as services/analytics/rules.toml has it: the same basket so often is worth a look


def path(spans: list[Seen], last: Seen) -> list[tuple[str, str]]:
    """The way to a span from the one whose parent is the caller's."""
    by_id = {span.span: span for span in spans}
    way = [last]
    while way[0].parent in by_id:
        way.insert(0, by_id[way[0].parent])
    return [(span.service, span.name) for span in way]


def ways(spans: list[Seen]) -> list[list[tuple[str, str]]]:
    return [path(spans, span) for span in spans]


def whole(spans: list[Seen]) -> bool:
    """Whether all that is looked at has come: pods send at times of their own."""
    calls = [span for span in spans if (span.service, span.name) == RESERVE]
    batches = {span.span for span in spans if span.name == "batch reserves"}
    return (
        all(way in ways(spans) for way in (STOCK_OUT, FRAUD_CASE, PROJECTED))
        and len(calls) == BASKETS
        and all(link in batches for span in calls for _, link in span.links)
    )


async def test_one_trace_from_the_call_to_the_messages(
    holdfast: Holdfast, pods: Supervisor, collector: Collector, tmp_path: Path
) -> None:
    """A customer asks for the same basket again and again, until nothing is left: the goods are out of stock, and the
    customer is a case to review. Both messages, and all between them and the call, are in the call's trace.
    """
    sku = await goods(holdfast, BASKETS)
    with Receiver(file := tmp_path / "messages.jsonl") as receiver:
        hook = np.Subscription(
            subscription_id=new("traces"),
            kinds=[np.ALERT_KIND_STOCK_OUT, np.ALERT_KIND_FRAUD_CASE],
            webhook=np.WebhookChannel(url=receiver.url, secret=receiver.secret),
        )
        request = np.CreateSubscriptionRequest(request_id=new(), subscription=hook)
        await holdfast._call(holdfast.notifications.CreateSubscription(request))
        with calling(sampled=True) as (trace, caller):
            customer = new("again")
            for _ in range(BASKETS):
                answer = await holdfast.reserve(new(), [(sku, "", 1)], customer_id=customer)
                assert answer.outcome == rp.RESERVE_OUTCOME_HELD
        spans = await asyncio.to_thread(collector.wait, trace, whole)
        await holdfast._call(
            holdfast.notifications.DeleteSubscription(
                np.DeleteSubscriptionRequest(request_id=new(), subscription_id=hook.subscription_id)
            )
        )
    analytics = [pod for pod in pods.pods if pod.service.name == "analytics"]
    told = [json.loads(line)["alert"] for line in file.read_text().splitlines()]
    assert {one["kind"] for one in told} == {"STOCK_OUT", "FRAUD_CASE"}

    calls = [span for span in spans if (span.service, span.name) == RESERVE]
    assert [(span.parent, span.kind, span.attributes["rpc.response.status_code"]) for span in calls] == [
        (caller, "SERVER", "OK")
    ] * BASKETS
    batches = [span for span in spans if span.name == "batch reserves"]
    assert {link for span in batches for link in span.links} >= {(trace, span.span) for span in calls}
    assert {link for span in calls for link in span.links} == {(trace, span.span) for span in batches}
    decided = next(span for span in spans if span.name == "decide case")
    assert decided.attributes["holdfast.fraud.decision"] == "REVIEW"
    assert not [span for span in spans if span.status == "ERROR"]
    by_id = {span.span: span for span in spans}
    assert all(span.start_nanos >= by_id[span.parent].start_nanos for span in spans if span.parent in by_id)
    lines = [
        json.loads(line) for pod in analytics for line in pod.log.read_text().splitlines() if '"case opened"' in line
    ]
    assert (trace, decided.span) in {(line.get("trace_id"), line.get("span_id")) for line in lines}


async def test_a_pod_whose_collector_hangs_serves_and_stops_as_ever(holdfast: Holdfast, pods: Supervisor) -> None:
    """Every call of a pod is traced to a collector that takes connections and says nothing: nobody notices."""
    sku, pod = await goods(holdfast, 1_000), pods.pod("reservation-0")
    settings = pod.service.settings
    assert isinstance(settings, dict)
    before = dict(settings)
    held: list[asyncio.StreamWriter] = []
    deaf = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    try:
        endpoint = f"http://127.0.0.1:{deaf.sockets[0].getsockname()[1]}"
        settings |= {"HOLDFAST_OTLP_ENDPOINT": endpoint, "HOLDFAST_TRACE_SAMPLE_RATIO": "1"}
        await asyncio.to_thread(pods.restart, pod)
        target = f"ipv4:{pod.address}"
        async with Holdfast(pods.targets["inventory"], target) as alone, asyncio.timeout(20):
            while not held:
                answers = await asyncio.gather(*(alone.reserve(new(), [(sku, "", 1)]) for _ in range(5)))
                assert {answer.outcome for answer in answers} == {rp.RESERVE_OUTCOME_HELD}
        began = time.monotonic()
        assert await asyncio.to_thread(pods.terminate, pod) == 0
        assert time.monotonic() - began < STOP_SECONDS_MAX / 4
    finally:
        settings.clear()
        settings |= before
        await asyncio.to_thread(pods.restart, pod)
        deaf.close()
        for writer in held:
            writer.close()
