"""`python -m bench.generator batch|stream HOST:PORT`: reservations through BatchReserve or ReserveStream.

For what ghz cannot do, which is to send other ids in each message of a batch or a stream. Prints what ghz
prints, as far as `bench.load` reads it.
"""

import argparse
import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop
from holdfast.reservation.v1 import reservation_pb2 as pb
from holdfast.reservation.v1 import reservation_pb2_grpc

BATCH_ITEMS = 100
BATCH_CALLERS = 4
STREAM_WINDOW = 128


def request(skus: int) -> pb.ReserveRequest:
    line = pb.ReservationLine(sku=f"S{random.randrange(skus)}", location="MAIN", quantity=1)
    return pb.ReserveRequest(reservation_id=uuid.uuid4().hex, lines=[line])


async def batches(stub: Any, until: float, skus: int) -> list[dict[str, object]]:
    """Callers that each send a batch after the other."""
    seen: list[dict[str, object]] = []

    async def caller() -> None:
        while time.monotonic() < until:
            asked = pb.BatchReserveRequest(requests=[request(skus) for _ in range(BATCH_ITEMS)])
            began = time.monotonic_ns()
            answer = await stub.BatchReserve(asked)
            good = all(result.HasField("response") for result in answer.results)
            seen.append({"latency": time.monotonic_ns() - began, "status": "OK" if good else "ItemError"})

    await asyncio.gather(*(caller() for _ in range(BATCH_CALLERS)))
    return seen


async def stream(stub: Any, until: float, skus: int) -> list[dict[str, object]]:
    """One stream with a window of unanswered requests."""
    seen: list[dict[str, object]] = []
    sent: dict[str, int] = {}
    room = asyncio.Semaphore(STREAM_WINDOW)

    async def requests() -> AsyncIterator[pb.ReserveStreamRequest]:
        while time.monotonic() < until:
            await room.acquire()
            asked = request(skus)
            sent[asked.reservation_id] = time.monotonic_ns()
            yield pb.ReserveStreamRequest(request=asked)

    async for answer in stub.ReserveStream(requests()):
        room.release()
        latency = time.monotonic_ns() - sent.pop(answer.result.reservation_id)
        seen.append({"latency": latency, "status": "OK" if answer.result.HasField("response") else "ItemError"})
    return seen


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.generator", description=__doc__)
    parser.add_argument("mode", choices=("batch", "stream"))
    parser.add_argument("pod")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--skus", type=int, default=100_000)
    arguments = parser.parse_args()
    async with grpc.aio.insecure_channel(arguments.pod) as channel:
        stub = reservation_pb2_grpc.ReservationServiceStub(channel)
        began = time.monotonic()
        work = batches if arguments.mode == "batch" else stream
        seen = await work(stub, began + arguments.seconds, arguments.skus)
        total = (time.monotonic() - began) * 1e9
    items = BATCH_ITEMS if arguments.mode == "batch" else 1
    print(json.dumps({"details": seen, "total": total, "items": items}))


if __name__ == "__main__":
    uvloop.run(main())
