"""`python -P tests/model/skewed.py CLOCK_FILE MODULE ARGUMENTS`: run a service on a clock that can be set.

Whatever `services` and `shared` read of the time of day is then off by what the file says, and from the moment that it
says it. Their dependencies read the machine's clock, and the monotonic clock is everybody's own. This file is run by
path, against whichever release stands on the path: it needs nothing but the standard library.
"""

import datetime as dt
import importlib
import mmap
import struct
import sys
import time
import types
from pathlib import Path
from typing import Any

SECONDS = struct.Struct("d")


class Clock:
    """By how many seconds a clock is ahead, in a file that several processes map."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.exists():
            self.set(0)

    def set(self, seconds: float) -> None:
        """Make it jump: so many seconds ahead of the machine's, or behind it."""
        with self.file.open("r+b" if self.file.exists() else "wb") as written:
            written.write(SECONDS.pack(seconds))

    def install(self) -> None:
        """Give the modules of services and shared that are loaded this clock."""
        with self.file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

        def ahead() -> float:
            return float(SECONDS.unpack_from(mapped)[0])

        class AnyDatetime(type(dt.datetime)):  # type: ignore[misc]
            """What is a datetime elsewhere is one here."""

            def __instancecheck__(cls, instance: object) -> bool:
                return isinstance(instance, dt.datetime)

        class Datetime(dt.datetime, metaclass=AnyDatetime):
            @classmethod
            def now(cls, tz: dt.tzinfo | None = None) -> Any:
                return dt.datetime.now(tz) + dt.timedelta(seconds=ahead())

        skewed = types.ModuleType("time")
        vars(skewed).update(vars(time))
        vars(skewed).update(time=lambda: time.time() + ahead(), time_ns=lambda: time.time_ns() + int(ahead() * 1e9))
        instead = {id(time): skewed, id(dt.datetime): Datetime}
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in {"services", "shared"}:
                for word, value in list(vars(module).items()):
                    if id(value) in instead:
                        setattr(module, word, instead[id(value)])


def main() -> None:
    file, name, *arguments = sys.argv[1:]
    program = importlib.import_module(f"{name}.__main__")
    Clock(Path(file)).install()
    sys.argv = [name, *arguments]
    program.main()


if __name__ == "__main__":
    main()
