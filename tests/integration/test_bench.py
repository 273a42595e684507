"""What Holdfast is measured against gives the same answers, or the comparison says nothing."""

import asyncio
from collections.abc import Iterator

import asyncpg
import grpc
import pytest
from holdfast.reservation.v1 import reservation_pb2 as rp
from holdfast.reservation.v1 import reservation_pb2_grpc

from bench import load, stage
from deploy.local.stack import Stack
from tests.e2e.shop import new

HELD, REJECTED = rp.RESERVE_OUTCOME_HELD, rp.RESERVE_OUTCOME_REJECTED


@pytest.fixture(scope="module")
def usual(stack: Stack) -> Iterator[stage.Servers]:
    """The usual way, with ten SKUs."""
    with stage.usual(stack, skus=10) as servers:
        yield servers


def request(units: int) -> rp.ReserveRequest:
    return rp.ReserveRequest(
        reservation_id=new(), lines=[rp.ReservationLine(sku="S1", location="MAIN", quantity=units)]
    )


async def test_the_usual_way_holds_refuses_and_repeats(usual: stage.Servers, stack: Stack) -> None:
    """Concurrent holds add up, what is not there is rejected, and a repeat gets its first outcome."""
    asked = [request(1) for _ in range(20)]
    async with grpc.aio.insecure_channel(usual.pods[0]) as one, grpc.aio.insecure_channel(usual.pods[1]) as other:
        stubs = [reservation_pb2_grpc.ReservationServiceStub(channel) for channel in (one, other)]
        answers = await asyncio.gather(*(stubs[n % 2].Reserve(each) for n, each in enumerate(asked)))
        assert [answer.outcome for answer in answers] == [HELD] * 20
        assert (await stubs[0].Reserve(request(stage.RECEIPT))).outcome == REJECTED
        assert (await stubs[1].Reserve(asked[0])).replayed
    connection = await asyncpg.connect(stack.postgres_dsn("usual"))
    row = await connection.fetchrow("SELECT held, version FROM stock WHERE sku = 'S1'")
    movements = await connection.fetchval("SELECT count(*) FROM movement WHERE sku = 'S1'")
    events = await connection.fetchval("SELECT count(*) FROM outbox")
    await connection.close()
    assert row is not None
    assert (row["held"], row["version"], movements, events) == (20, 21, 21, 41)


async def test_echo_answers_what_it_is_asked() -> None:
    """A bare server with the same messages."""
    with stage.echo() as echo:
        async with grpc.aio.insecure_channel(echo.pods[0]) as channel:
            asked = request(3)
            answer = await reservation_pb2_grpc.ReservationServiceStub(channel).Reserve(asked)
    assert answer.outcome == HELD
    assert answer.reservation.lines == asked.lines


def test_a_run_counts_errors_apart() -> None:
    """Percentiles are of what was answered well."""
    run = load.Run(calls=4, latencies=[4.0, 1.0, 3.0, 2.0])
    run.errors.update(["UNAVAILABLE"])
    assert (run.failed, run.percentile(50), run.percentile(99)) == (1, 3.0, 4.0)
    assert run.figures()["errors"] == {"UNAVAILABLE": 1}
