"""A receiver of web hooks, as whoever subscribes would write one: it checks the signature, takes each message once, and
keeps what came in a file.
"""

import asyncio
import base64
import hashlib
import hmac
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

SKEW_SECONDS_MAX = 300


class Receiver:
    """Listens on a free loopback port while it is entered, in a thread of its own; appends messages to `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._key = secrets.token_bytes(32)
        self._seen: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="receiver", daemon=True)
        self._runner = web.AppRunner(self._application())
        self.url = ""

    @property
    def secret(self) -> str:
        """What the subscription gives to the service, as standardwebhooks.com writes it."""
        return f"whsec_{base64.b64encode(self._key).decode()}"

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/hook"

    def _application(self) -> web.Application:
        application = web.Application()
        application.router.add_post("/hook", self._take)
        return application

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        name, told = request.headers.get("webhook-id", ""), request.headers.get("webhook-timestamp", "")
        expected = base64.b64encode(hmac.digest(self._key, f"{name}.{told}.".encode() + body, hashlib.sha256)).decode()
        fresh = told.isdigit() and abs(time.time() - int(told)) < SKEW_SECONDS_MAX
        if not fresh or not hmac.compare_digest(f"v1,{expected}", request.headers.get("webhook-signature", "")):
            return web.Response(status=401)
        if name not in self._seen:
            with self._file.open("ab") as file:
                file.write(body + b"\n")
            self._seen.add(name)
        return web.Response(status=204)
