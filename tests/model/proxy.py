"""A TCP proxy that does to connections what networks do: cuts them, loses what is on its way, delays, throttles."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

CHUNK_BYTES = 16_384


def through(dsn: str, port: int) -> str:
    """The same database by way of another port of its host."""
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port}").geturl()


class Proxy:
    """From a port of loopback to another. What it does is set at any time, and holds for all connections."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.delay_seconds = 0.0
        self.bytes_per_second = 0.0
        self._losing: set[str] = set()

    async def start(self, port: int) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def heal(self) -> None:
        """Be a plain wire again."""
        self.delay_seconds = self.bytes_per_second = 0.0
        self._losing.clear()

    def cut(self) -> None:
        """Reset every connection there is."""
        for writer in self._writers:
            writer.transport.abort()

    def lose(self, *, answers: bool) -> None:
        """Every connection is reset at the next thing that is said on it, which is lost: a request that has not been
        carried out, or the answer to one that has, such as a COMMIT.
        """
        self._losing.add("answers" if answers else "requests")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, back}
        self._writers |= pair
        self._begin(self._pipe(reader, back, "requests", pair))
        self._begin(self._pipe(there, writer, "answers", pair))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pipe(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: str, pair: set[asyncio.StreamWriter]
    ) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                if way in self._losing:
                    break
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                if self.bytes_per_second:
                    await asyncio.sleep(len(data) / self.bytes_per_second)
                target.write(data)
                await target.drain()
        for writer in pair:
            writer.transport.abort()
        self._writers -= pair
