"""Channels to a service's pods: balanced by the client, with deadlines, retries and keepalive.

A headless service's name resolves to every ready pod; `round_robin` spreads calls over those whose
health, which it watches, is SERVING: a pod that stops is left before it closes (`shared.server`). Names are
resolved again when a connection ends, which the server makes happen every few minutes
(`connection_age_seconds_max`), so new pods are found while old connections are healthy: within 1.1 times that
age and RESOLVE_SECONDS_MIN, once the name has them. A pod that takes another's place has to be in the name for
longer than RESOLVE_SECONDS_MIN before the next one may go. A pod that does not answer a ping within
KEEPALIVE_ANSWER_MS_MAX, because it or its node stands still, is left too, and its calls go to the others. Only
UNAVAILABLE is retried, with backoff and jitter, and every write carries an id that makes that safe.

With TLS a channel shows its own certificate and looks at the server's, which must be for the target's host. gRPC
cannot change a channel's certificate, so that new files make a new channel, for the calls from then on.
"""

import asyncio
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from shared import tls
from shared.files import Watched

CALL_SECONDS_MAX = 15
REPLACED_SECONDS_MAX = 3_600  # for the streams of a replaced channel, which the server ends before
KEEPALIVE_MS = 1_000
KEEPALIVE_ANSWER_MS_MAX = 2_000
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


def open_channel(target: str, tls_directory: str = "") -> grpc.aio.Channel:
    """A channel to `target`: dns:///name:port, or ipv4:host:port,host:port where there is no DNS.

    `tls_directory` holds tls.crt, tls.key and ca.crt; without it nothing is encrypted. Raises OSError or ValueError.
    """
    if not tls_directory:
        return grpc.aio.insecure_channel(target, options=options(target))
    return _SecureChannel(target, tls.watch(tls_directory))


def options(target: str) -> list[tuple[str, Any]]:
    """What every channel of ours is opened with."""
    made: list[tuple[str, Any]] = [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        ("grpc.per_rpc_retry_buffer_size", MESSAGE_BYTES_MAX),  # a call that is larger is not retried
        ("grpc.dns_min_time_between_resolutions_ms", RESOLVE_SECONDS_MIN * 1000),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_ANSWER_MS_MAX),
        # One ping at a time is under way: where it is one that measures bandwidth, its own bound tells.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_ANSWER_MS_MAX),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ]
    scheme, _, addresses = target.partition(":")
    if scheme in {"ipv4", "ipv6"}:
        # A list of addresses is no name that a certificate could have: the first one's host stands for all.
        made.append(("grpc.default_authority", addresses.split(",")[0].rpartition(":")[0]))
    return made


class _UnaryUnary(grpc.aio.UnaryUnaryMultiCallable):  # type: ignore[type-arg] # not generic at run time
    """A unary call by its kind, which is what `shared.telemetry` knows those by that it traces."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        return self._call(*arguments, **more)


class _SecureChannel(grpc.aio.Channel):
    """The channel with the certificates in force. One that was replaced is closed when its calls have ended."""

    def __init__(self, target: str, certificates: Watched[tls.Certificates]) -> None:
        self._target = target
        self._certificates = certificates
        self._shown = certificates.current()
        self._channel = self._open()
        self._replaced: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    def unary_unary(self, *method: Any, **more: Any) -> Any:
        return _UnaryUnary(self._method(lambda channel: channel.unary_unary(*method, **more)))

    def unary_stream(self, *method: Any, **more: Any) -> Any:
        return self._method(lambda channel: channel.unary_stream(*method, **more))

    def stream_unary(self, *method: Any, **more: Any) -> Any:
        return self._method(lambda channel: channel.stream_unary(*method, **more))

    def stream_stream(self, *method: Any, **more: Any) -> Any:
        return self._method(lambda channel: channel.stream_stream(*method, **more))

    async def close(self, grace: float | None = None) -> None:
        for closing in self._replaced.values():
            closing.cancel()
        await asyncio.gather(*(channel.close(grace) for channel in (self._channel, *self._replaced)))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _method(self, make: Callable[[grpc.aio.Channel], Any]) -> Any:
        """A method of whichever channel is current when it is called."""
        channel = self._channel
        made = make(channel)

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal channel, made
            if (current := self._current()) is not channel:
                channel, made = current, make(current)
            return made(*arguments, **more)

        return call

    def _current(self) -> grpc.aio.Channel:
        found = self._certificates.current()
        if found is not self._shown:
            old, self._shown = self._channel, found
            self._channel = self._open()
            closing = asyncio.get_running_loop().create_task(old.close(REPLACED_SECONDS_MAX))
            self._replaced[old] = closing
            closing.add_done_callback(lambda _: self._replaced.pop(old))
        return self._channel

    def _open(self) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            self._target, tls.channel_credentials(self._shown), options=options(self._target)
        )
