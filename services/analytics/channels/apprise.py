"""The services that Apprise knows, through one adapter.

Apprise blocks: each call has a thread of its own. It tells that it failed and not why, so every failure
may pass. Services whose URL names a host are held to public addresses when a message is sent; what Apprise resolves
afterwards is out of our hands, so a network that must not be reached should be closed to this service as well.
"""

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import apprise
from apprise.utils.parse import parse_url

from services.analytics.alerting import Outcome
from services.analytics.channels import BadConfigError, Config, Described, Message
from services.analytics.channels.addresses import PrivateAddressError, check_public
from services.analytics.channels.threads import Threads, TooManyHangError

URL_CHARACTERS_MAX = 2_000
# They speak to the desktop or the logs of the machine that they run on.
LOCAL = frozenset({"blink1", "dbus", "glib", "gnome", "kde", "macosx", "qt", "syslog", "windows"})
# Arguments that name files of this machine, or what it is to fetch or connect to.
READING = frozenset(
    {"attach", "blossom", "cert", "image", "keyfile", "pgpkey", "pgpkeys", "proxy", "relay", "subfile", "template"}
)
# Their own logs would hold URLs, and what targets answer.
for _name in ("apprise", "urllib3"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


class Apprise:
    """The idempotency key is the last line of a message: no service takes it in any other way."""

    def __init__(self, *, private: bool, threads_max: int, seconds_max: float) -> None:
        self._private = private
        self._seconds_max = seconds_max
        self._threads = Threads(threads_max, "apprise")
        self._under_way: set[str] = set()

    def describe(self, config: Config) -> Described:
        url = config["url"]
        scheme = url.partition("://")[0]
        service = self._service(url)
        if not re.fullmatch(r"[a-z0-9]+", scheme) or scheme in LOCAL or service is None:
            raise BadConfigError("url", "must be a URL of a remote service, as Apprise writes it")
        return Described(url, f"{scheme}://")

    async def send(self, config: Config, message: Message) -> Outcome:
        service = self._service(config["url"])
        if service is None:
            return Outcome("URL_NOT_KNOWN", permanent=True)
        if not self._private:
            try:
                for host in filter(None, (getattr(service, "host", None), getattr(service, "smtp_host", None))):
                    with suppress(OSError, UnicodeError):  # a token in the place of a host
                        await check_public(str(host))
            except PrivateAddressError:
                return Outcome("PRIVATE_ADDRESS", permanent=True)
        # Its own attempts would come on top of ours, and a redirect may lead anywhere.
        service.retry, service.redirects = 0, False
        service.socket_connect_timeout = service.socket_read_timeout = self._seconds_max
        title, body = message.subject, f"{message.body}\n{message.key}"
        return await self._notify(config["url"], lambda: bool(service.notify(title=title, body=body)))

    async def _notify(self, url: str, notify: Callable[[], bool]) -> Outcome:
        """One thread at a time for a URL: a service that answers byte by byte would take them all."""
        if url in self._under_way:
            return Outcome("STILL_HANGS")
        self._under_way.add(url)

        def call() -> bool:
            try:
                return notify()
            finally:
                self._under_way.discard(url)

        try:
            return Outcome("" if await self._threads.run(call) else "NOT_TAKEN")
        except TooManyHangError:
            self._under_way.discard(url)
            return Outcome("TOO_MANY_HANG")

    async def close(self) -> None:
        """Threads that still hang end with the process."""

    def _service(self, url: str) -> Any:
        """The service of a URL; None of one that is none, or that would read files or fetch what the URL says."""
        if len(url) > URL_CHARACTERS_MAX or not url.isascii() or not url.isprintable():
            return None
        # By Apprise's own parser: it finds arguments where others see none, after a semicolon or a fragment.
        parsed = parse_url(url, verify_host=False)  # type: ignore[no-untyped-call]
        if not parsed or parsed["qsd"].keys() & READING:
            return None
        service = apprise.Apprise.instantiate(url, suppress_exceptions=True)
        if service is None:
            return None
        reads = any(isinstance(value, apprise.AppriseAttachment) and len(value) for value in vars(service).values())
        return None if reads else service
