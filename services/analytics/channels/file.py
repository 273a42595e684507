"""Files of JSON lines, for trying things out and for programs that watch a file."""

import errno
import os
import re
from pathlib import Path

from services.analytics.alerting import Outcome
from services.analytics.channels import BadConfigError, Config, Described, Message
from services.analytics.channels.threads import Threads

THREADS_MAX = 100
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class File:
    """Appends a message's content as one line; two that write at once do not mix."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._threads = Threads(THREADS_MAX, "file")

    def describe(self, config: Config) -> Described:
        if not self._directory:
            raise BadConfigError("name", "cannot be used: the service is set to no directory")
        if not NAME.fullmatch(config["name"]):
            raise BadConfigError("name", "must be 1 to 64 characters of A-Z a-z 0-9 _ -")
        return Described(config["name"], f"file:{config['name']}.jsonl")

    async def send(self, config: Config, message: Message) -> Outcome:
        if not self._directory:
            return Outcome("NO_DIRECTORY", permanent=True)
        await self._threads.run(lambda: self._append(config["name"], f"{message.content}\n"))
        return Outcome()

    async def close(self) -> None:
        """Nothing stays open."""

    def _append(self, name: str, line: str) -> None:
        directory = Path(self._directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = line.encode()
        file = os.open(directory / f"{name}.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            length = os.fstat(file).st_size
            if length and os.pread(file, 1, length - 1) != b"\n":  # the disk was full in the midst of a line
                content = b"\n" + content
            if os.write(file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
