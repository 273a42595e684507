"""Who a reservation is for stays in reservation: elsewhere there are keyed hashes alone."""

import asyncio
from datetime import timedelta
from functools import partial
from pathlib import Path

import aiohttp
import asyncpg
import pytest
import redis.asyncio as redis
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.analysis import caught_up
from deploy.local.stack import Stack
from deploy.local.supervisor import Supervisor
from shared.client import Holdfast
from tests.collector import Collector, calling
from tests.e2e.shop import goods, new

# Of the documentation's ranges, in networks that no other test uses.
V4, V4_NETWORK = "198.51.100.231", "198.51.100.0/24"
V6, V6_NETWORK = "2001:db8:5afe:77::9d", "2001:db8:5afe::/48"
CHANGES = "holdfast.reservation.changes.v1"
TEXTUAL = """
SELECT table_schema, table_name, column_name FROM information_schema.columns
WHERE table_schema NOT IN ('pg_catalog', 'information_schema')
  AND (data_type IN ('text', 'character varying', 'json', 'jsonb', 'bytea', 'ARRAY'))
"""


async def of_kafka(bootstrap: str) -> bytes:
    """Every key, value and header of every topic, from the beginning to what its end is now."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    topics = [topic for topic in await admin.describe_topics() if not topic["topic"].startswith("__")]
    await admin.close()
    partitions = [TopicPartition(topic["topic"], part["partition"]) for topic in topics for part in topic["partitions"]]
    assert TopicPartition("holdfast.reservation.changes.v1", 0) in partitions
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        ends = await consumer.end_offsets(partitions)
        parts: list[bytes] = []
        async with asyncio.timeout(60):
            while any([await consumer.position(partition) < end for partition, end in ends.items()]):
                for messages in (await consumer.getmany(timeout_ms=200)).values():
                    for message in messages:
                        parts += [message.key or b"", message.value or b""]
                        parts += [part for name, value in message.headers for part in (name.encode(), value)]
        return b"\n".join(parts)
    finally:
        await consumer.stop()


async def of_database(dsn: str) -> bytes:
    """Every text, JSON and bytea of every table of every schema."""
    connection = await asyncpg.connect(dsn)
    try:
        parts: list[bytes] = []
        for schema, table, column in await connection.fetch(TEXTUAL):
            values = await connection.fetch(f'SELECT DISTINCT "{column}" FROM "{schema}"."{table}"')
            parts += [one if isinstance(one, bytes) else str(one).encode() for (one,) in values]
        return b"\n".join(parts)
    finally:
        await connection.close()


async def of_redis(url: str) -> bytes:
    """Every key and what a dump of it holds."""
    async with redis.Redis.from_url(url) as client:
        keys = [key async for key in client.scan_iter()]
        return b"\n".join([part for key in keys for part in (key, await client.dump(key) or b"")])


async def of_metrics(pods: Supervisor) -> bytes:
    async with aiohttp.ClientSession() as http:
        answers = [await http.get(f"http://{pod.metrics_address}/metrics") for pod in pods.pods]
        return b"\n".join([await answer.read() for answer in answers])


def of_traces(collector: Collector, trace: str) -> bytes:
    """Every span, once those of the calls of `trace` have come."""
    wanted = {"batch reserves", "batch changes", f"process {CHANGES}"}
    collector.wait(trace, lambda spans: wanted <= {span.name for span in spans})
    return b"\n".join(collector.raw)


def of_logs(pods: Supervisor) -> bytes:
    files: list[Path] = [pod.log for pod in pods.pods]
    return b"\n".join(file.read_bytes() for file in files)


async def orders(holdfast: Holdfast, customer: str, device: str) -> dict[str, rp.ReservationState.ValueType]:
    """One of each fate, and the state that it ends in."""
    sku = await goods(holdfast, 10)
    sold, back, late, refused, bad = (new(fate) for fate in ("sold", "back", "late", "refused", "bad"))
    v4 = partial(holdfast.reserve, customer_id=customer, device_id=device, ip_address=V4)
    v6 = partial(holdfast.reserve, customer_id=customer, device_id=device, ip_address=V6)
    await v4(sold, [(sku, "", 2)])
    await holdfast.confirm(sold, "paid")
    await v6(back, [(sku, "", 2)])
    await holdfast.cancel(back, "part", [(sku, "", 1)])
    await holdfast.cancel(back, "rest")
    await v4(late, [(sku, "", 2)], ttl=timedelta(seconds=1))
    await v6(refused, [(sku, "", 99)])
    with pytest.raises(Exception, match="nowhere"):
        await v4(bad, [("nowhere", "", 1)])
    async with asyncio.timeout(15):
        while (await holdfast.get(late)).state != rp.RESERVATION_STATE_EXPIRED:
            await asyncio.sleep(0.05)
    return {
        sold: rp.RESERVATION_STATE_CONFIRMED,
        back: rp.RESERVATION_STATE_CANCELLED,
        late: rp.RESERVATION_STATE_EXPIRED,
        refused: rp.RESERVATION_STATE_REJECTED,
    }


async def test_personal_data_leaves_reservation_only_as_hashes(
    holdfast: Holdfast, pods: Supervisor, stack: Stack, collector: Collector
) -> None:
    """No topic, no table of analytics, no log, no cache and no trace has a clear value; the API gives them back."""
    customer, device = new("Customer"), new("Device")
    with calling(sampled=True) as (trace, _):
        made = await orders(holdfast, customer, device)
    await caught_up(holdfast)
    places = {
        "Kafka": await of_kafka(stack.kafka_bootstrap),
        "analytics": await of_database(stack.postgres_dsn("analytics")),
        "inventory": await of_database(stack.postgres_dsn("inventory")),
        "Redis": await of_redis(stack.redis_url),
        "logs": of_logs(pods),
        "metrics": await of_metrics(pods),
        "traces": await asyncio.to_thread(of_traces, collector, trace),
    }
    clear = [customer, device, V4, V6, V4_NETWORK.removesuffix("0/24"), V6_NETWORK.removesuffix("::/48")]
    found = [(place, value) for place, content in places.items() for value in clear if value.encode() in content]
    assert not found

    hashes = await holdfast.resolve(customers=[customer], devices=[device], networks=[V4, V6_NETWORK])
    assert [one.value for one in hashes] == [customer, device, V4_NETWORK, V6_NETWORK]
    assert list(await holdfast.resolve([one.subject for one in hashes] + ["customer:k1:unknown"])) == hashes
    for one in hashes:
        assert one.subject.encode() in places["Kafka"]
        assert one.subject.encode() not in places["traces"] + places["metrics"]
    assert hashes[0].subject.encode() in places["analytics"]
    for name, state in made.items():
        known = await holdfast.get(name)
        assert (known.state, known.customer_id, known.device_id) == (state, customer, device)
        assert known.ip_address in {V4, V6}
