"""Channels to a service's pods: balanced by the client, with deadlines, retries and keepalive.

A headless service's name resolves to every ready pod; `round_robin` spreads calls over those whose
health, which it watches, is SERVING: a pod that stops is left before it closes (`shared.server`). Names are
resolved again when a connection ends, which the server makes happen every few minutes
(`connection_age_seconds_max`), so new pods are found while old connections are healthy: within 1.1 times that
age and RESOLVE_SECONDS_MIN, once the name has them. A pod that takes another's place has to be in the name for
longer than RESOLVE_SECONDS_MIN before the next one may go. Only
UNAVAILABLE is retried, with backoff and jitter, and every write carries an id that makes that safe.
"""

import json

import grpc

CALL_SECONDS_MAX = 15
KEEPALIVE_MS = 30_000
RESOLVE_SECONDS_MIN = 5
MESSAGE_BYTES_MAX = 16 << 20

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
    "methodConfig": [
        {
            "name": [{}],
            "timeout": f"{CALL_SECONDS_MAX}s",
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
        {
            # Streams last as long as their callers want.
            "name": [
                {"service": "holdfast.inventory.v1.InventoryService", "method": "WatchStock"},
                {"service": "holdfast.inventory.v1.InventoryService", "method": "ImportStock"},
                {"service": "holdfast.reservation.v1.ReservationService", "method": "ReserveStream"},
            ],
        },
    ],
}


def open_channel(target: str) -> grpc.aio.Channel:
    """A channel to `target`: dns:///name:port, or ipv4:host:port,host:port where there is no DNS."""
    return grpc.aio.insecure_channel(
        target,
        options=[
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.enable_retries", 1),
            ("grpc.dns_min_time_between_resolutions_ms", RESOLVE_SECONDS_MIN * 1000),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ],
    )
