"""Redis in memory: the cache's and the locks' commands and scripts."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from services.inventory import cache
from shared import lock

Script = Callable[..., Awaitable[Any]]


class Store:
    """What Redis holds, and until when. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._values: dict[str, tuple[str, float]] = {}
        self._scripts = {
            cache.PUT: self._put,
            lock.TAKE: self._take,
            lock.RENEW: self._renew,
            lock.RELEASE: self._release,
        }

    def wipe(self) -> None:
        self._values.clear()

    def get(self, name: str) -> str | None:
        value, until = self._values.get(name, ("", 0))
        return value if until > self._clock() else None

    def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return self._scripts[script](keys, args)

    def drop_locks(self) -> None:
        """Let every lock pass on, as when their holders did not renew them in time."""
        self._values = {name: value for name, value in self._values.items() if not name.startswith("lock:")}

    def _set(self, name: str, value: str, life_ms: float) -> None:
        self._values[name] = (value, self._clock() + life_ms / 1000)

    def _put(self, keys: Sequence[str], args: Sequence[Any]) -> None:
        for number, name in enumerate(keys):
            known = self.get(name)
            version, value = int(args[2 * number + 1]), str(args[2 * number + 2])
            if known is None or int(known.partition("|")[0]) < version:
                self._set(name, value, args[0])

    def _take(self, keys: Sequence[str], args: Sequence[Any]) -> int:
        if self.get(keys[0]) is not None:
            return 0
        self._set(keys[0], str(args[0]), args[1])
        token = int(self.get(keys[1]) or 0) + 1
        self._set(keys[1], str(token), float("inf"))
        return token

    def _renew(self, keys: Sequence[str], args: Sequence[Any]) -> int:
        if self.get(keys[0]) != args[0]:
            return 0
        self._set(keys[0], str(args[0]), args[1])
        return 1

    def _release(self, keys: Sequence[str], args: Sequence[Any]) -> int:
        if self.get(keys[0]) != args[0]:
            return 0
        del self._values[keys[0]]
        return 1


class Client:
    """A pod's client: the part of redis-py's that the services use. `hop` carries each call, or raises."""

    def __init__(self, store: Store, hop: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._hop = hop

    def register_script(self, text: str) -> Script:
        async def run(*, keys: Sequence[str], args: Sequence[Any]) -> Any:
            await self._hop()
            answer = self._store.run(text, keys, args)
            await self._hop()
            return answer

        return run

    async def mget(self, names: Sequence[str]) -> list[str | None]:
        await self._hop()
        found = [self._store.get(name) for name in names]
        await self._hop()
        return found
