"""The port through which messages leave, and its adapters, by the name of their channel.

An adapter is asked twice. `describe`, when a subscription is made: what its `config` is in need of, which target it
is, and how the target may be shown. `send`, for each attempt: one try, without retries of its own, whose time is
bounded by the caller. The key of a message stays the same however often it is sent, and each adapter hands it on.
What an adapter says of a failure holds neither secrets nor what the target answered.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from services.analytics.alerting import Outcome

Config = Mapping[str, str]


class Message(NamedTuple):
    """What is sent: `content` is a JSON object with all there is to know, the same in every attempt."""

    key: str
    subject: str
    body: str
    content: str


class Described(NamedTuple):
    """What a target is, as a text of which nobody sees more than a digest, and what is shown of it."""

    identity: str
    shown: str


class BadConfigError(Exception):
    """A config that will never do. `field` is the channel's; the text holds nothing of what was given."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


class Channel(Protocol):
    """An adapter."""

    def describe(self, config: Config) -> Described:
        """Raises BadConfigError."""

    async def send(self, config: Config, message: Message) -> Outcome:
        """Try once. What it raises counts as a failure that may pass."""

    async def close(self) -> None:
        """Let go of connections."""
