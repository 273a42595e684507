"""`python -m shared.health [ADDRESS]`: ends with 0 when the pod at ADDRESS serves; for who can only run a command.

ADDRESS is that of the probes (HOLDFAST_PROBE_LISTEN) when none is given.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS_MAX = 3


def main() -> None:
    address = (sys.argv[1:] or [os.environ.get("HOLDFAST_PROBE_LISTEN", "")])[0].replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    if not address:
        sys.exit("give an address, or set HOLDFAST_PROBE_LISTEN")
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS_MAX)
        except grpc.RpcError as error:
            sys.exit(f"{address}: {error.code().name}")
    sys.exit(0 if answer.status == health_pb2.HealthCheckResponse.SERVING else f"{address}: not serving")


if __name__ == "__main__":
    main()
