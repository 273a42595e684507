"""So many of a kind of work at once on a pod."""

from collections.abc import Iterator
from contextlib import contextmanager

from shared.refusal import Refusal


class Slots:
    """At most `most` at once of what `queue` names; one more is refused at once, with `message`."""

    def __init__(self, queue: str, most: int, message: str) -> None:
        self._queue = queue
        self._most = most
        self._message = message
        self._taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have a slot. Raises Refusal OVERLOADED when all are taken."""
        if self._taken >= self._most:
            raise Refusal("OVERLOADED", self._message, queue=self._queue, limit=self._most)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
