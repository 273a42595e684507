"""Files that are replaced while the process runs: certificates, keys.

A mounted Kubernetes secret changes by one symbolic link; other tools write file by file. So files count as changed
when the inode, the time or the size of one of them is another, and what was read is used only if nothing changed
while it was read and it makes sense as a whole. Otherwise what was in force stays in force, and the log says so once.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)
LOOK_SECONDS = 1.0
T = TypeVar("T")
Signature = tuple[tuple[int, int, int], ...]


class Watched(Generic[T]):
    """What `parse` makes of some files. To be used from any thread.

    `parse` gets their contents in the order of `paths` and raises ValueError for what will not do; its message
    goes to the log and must hold nothing secret. Raises that, or OSError, when the files are not usable at first.
    """

    def __init__(self, name: str, paths: Sequence[Path], parse: Callable[[Sequence[bytes]], T]) -> None:
        self._name = name
        self._paths = paths
        self._parse = parse
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._value = self._read()
        self._looked = time.monotonic()

    def current(self) -> T:
        """What is in force. Looks at the files at most once in LOOK_SECONDS; the same object until they change."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return self._value
        with self._lock:
            self._looked = time.monotonic()
            try:
                found = self._signature()
                if found == self._seen:
                    return self._value
                value = self._read()
                if found != self._signature():  # still being written: look again soon
                    return self._value
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                log.warning("files not usable, what was read before stays in force", files=self._name, why=why)
            else:
                self._value = value
                log.info("files read again", files=self._name)
            self._seen = found
            return self._value

    def _signature(self) -> Signature:
        return tuple(_identity(path) for path in self._paths)

    def _read(self) -> T:
        return self._parse([path.read_bytes() for path in self._paths])


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0, 0
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
