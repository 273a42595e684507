"""One trace from a client's Reserve to the message that a subscriber gets, through pods, batches and topics."""

import asyncio
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.analytics.v1 import notification_pb2 as np
from holdfast.reservation.v1 import reservation_pb2 as rp
from opentelemetry import context as contexts
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from deploy.local.receiver import Receiver
from shared.client import Holdfast
from tests.collector import Collector, Seen
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


@contextmanager
def calling(*, sampled: bool) -> Iterator[tuple[str, str]]:
    """A span of the caller's under way: its trace and its own id, in hex."""
    known = SpanContext(secrets.randbits(128), secrets.randbits(64), is_remote=False, trace_flags=TraceFlags(sampled))
    token = contexts.attach(set_span_in_context(NonRecordingSpan(known)))
    try:
        yield f"{known.trace_id:032x}", f"{known.span_id:016x}"
    finally:
        contexts.detach(token)


def path(spans: list[Seen], last: Seen) -> list[tuple[str, str]]:
    """The way to a span from the one whose parent is the caller's."""
    by_id = {span.span: span for span in spans}
    way = [last]
    while way[0].parent in by_id:
        way.insert(0, by_id[way[0].parent])
    return [(span.service, span.name) for span in way]


def ways(spans: list[Seen]) -> list[list[tuple[str, str]]]:
    return [path(spans, span) for span in spans]


async def test_one_trace_from_the_call_to_the_messages(
    holdfast: Holdfast, collector: Collector, tmp_path: Path
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
        wanted = [STOCK_OUT, FRAUD_CASE, PROJECTED]
        spans = await asyncio.to_thread(collector.wait, trace, lambda spans: all(one in ways(spans) for one in wanted))
        await holdfast._call(
            holdfast.notifications.DeleteSubscription(
                np.DeleteSubscriptionRequest(request_id=new(), subscription_id=hook.subscription_id)
            )
        )
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
    everything = b"".join(collector.raw)
    assert customer.encode() not in everything
