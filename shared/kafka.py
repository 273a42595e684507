"""How the Kafka brokers are reached: whatever connects to them does so by `Brokers.options`, and ends by `stop`."""

import asyncio
import functools
import ssl
from dataclasses import dataclass, field
from typing import Any

STOP_SECONDS_MAX = 3.0
_stopping: set[asyncio.Future[None]] = set()


@dataclass(frozen=True)
class Brokers:
    """Addresses, host:port by comma, and how they are spoken to. `ca_file` empty: the system's authorities."""

    bootstrap: str
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What aiokafka's clients take. Holds the password: not to be logged. Raises OSError without the CA file."""
        made: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap,
            "security_protocol": self.security_protocol,
        }
        if self.security_protocol.endswith("SSL"):
            made["ssl_context"] = _context(self.ca_file)
        if self.security_protocol.startswith("SASL"):
            made["sasl_mechanism"] = self.sasl_mechanism
            made["sasl_plain_username"] = self.username
            made["sasl_plain_password"] = self.password
        return made


@functools.cache
def _context(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file or None)


async def stop(*clients: Any) -> None:
    """Stop producers and consumers of aiokafka, at once and each for itself; wait for it at most STOP_SECONDS_MAX.

    While the brokers are away a producer goes on offering what it has without end, and a consumer wants to take its
    leave from them. What takes longer goes on behind the caller's back: nothing is lost by it, since what was not
    acknowledged is sent again by whoever comes next.
    """
    tasks = [asyncio.ensure_future(client.stop()) for client in clients]
    for task in tasks:
        _stopping.add(task)
        task.add_done_callback(_stopped)
    await asyncio.wait(tasks, timeout=STOP_SECONDS_MAX)


def _stopped(task: "asyncio.Future[None]") -> None:
    _stopping.discard(task)
    if not task.cancelled():
        task.exception()  # it is of no interest any more
