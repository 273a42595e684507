"""How the Kafka brokers are reached: whatever connects to them does so by `Brokers.options`."""

import functools
import ssl
from dataclasses import dataclass, field
from typing import Any


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
