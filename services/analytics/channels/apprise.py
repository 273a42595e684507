"""The services that Apprise knows, through one adapter.

Apprise blocks: each call has a thread of its own, of which there are so many at the most, so that one that hangs
keeps neither another one waiting nor the process from ending. It tells that it failed and not why, so every failure
may pass. Services whose URL names a host are held to public addresses when a message is sent; what Apprise resolves
afterwards is out of our hands, so a network that must not be reached should be closed to this service as well.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import apprise

from services.analytics.alerting import Outcome
from services.analytics.channels import BadConfigError, Config, Described, Message
from services.analytics.channels.addresses import PrivateAddressError, check_public

URL_CHARACTERS_MAX = 2_000
# They speak to the desktop or the logs of the machine that they run on.
LOCAL = frozenset({"dbus", "glib", "gnome", "kde", "macosx", "qt", "syslog", "windows"})
# Their own logs would hold URLs, and what targets answer.
for _name in ("apprise", "urllib3"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


class Apprise:
    """The idempotency key is the last line of a message: no service takes it in any other way."""

    def __init__(self, *, private: bool, threads_max: int, seconds_max: float) -> None:
        self._private = private
        self._seconds_max = seconds_max
        self._threads = threading.BoundedSemaphore(threads_max)

    def describe(self, config: Config) -> Described:
        url = config["url"]
        scheme = url.partition("://")[0]
        if len(url) > URL_CHARACTERS_MAX or scheme in LOCAL or self._service(url) is None:
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
        return await self._in_thread(lambda: service.notify(title=title, body=body))

    async def close(self) -> None:
        """Threads that still hang end with the process."""

    async def _in_thread(self, notify: Callable[[], bool]) -> Outcome:
        if not self._threads.acquire(blocking=False):
            return Outcome("TOO_MANY_HANG")
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Outcome] = loop.create_future()

        def tell(value: Outcome) -> None:
            if not outcome.done():
                outcome.set_result(value)

        def run() -> None:
            try:
                value = Outcome("" if notify() else "NOT_TAKEN")
            except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
                value = Outcome(type(error).__name__)
            finally:
                self._threads.release()
            with suppress(RuntimeError):  # nobody waits for it any more
                loop.call_soon_threadsafe(tell, value)

        threading.Thread(target=run, name="apprise", daemon=True).start()
        return await outcome

    def _service(self, url: str) -> Any:
        return apprise.Apprise.instantiate(url, suppress_exceptions=True)
