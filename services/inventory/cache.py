"""Availability close at hand: the pod's memory, then Redis, then PostgreSQL. It never decides a write.

A value carries its version and the time at which it was known to be the newest. After a commit the pod
puts what it wrote into both, into Redis 20 ms later; a script there keeps the newer version. What a crash
or a lost write leaves behind is gone after `redis_seconds`, and what another pod wrote is seen after
`local_seconds`: a caller who cannot wait that long names `min_version`. Redis away means every miss
goes to PostgreSQL; it is tried again after a second. Where nearly all that is asked of Redis is not there,
as when many SKUs are each asked for seldom, only every sixteenth read goes by it: a cache that is always
missed costs a round trip and saves none.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from services.inventory import store
from services.inventory.domain import Key, Reason, Stock
from shared import metrics, redis_client
from shared.database import Database
from shared.redis_client import AWAY, Client
from shared.refusal import Refusal

log = structlog.get_logger(__name__)
RETRY_SECONDS = 1.0
BEHIND_SECONDS = 0.02
HITS_MIN = 0.2
HITS_MEMORY = 0.9
PROBE_READS = 16

# KEYS: stock keys; ARGV: life in ms, then version and value of each. Sets what is newer.
PUT = """
for i, key in ipairs(KEYS) do
  local known = redis.call('GET', key)
  if not known or tonumber(string.match(known, '^%d+')) < tonumber(ARGV[2 * i]) then
    redis.call('SET', key, ARGV[2 * i + 1], 'PX', ARGV[1])
  end
end
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """Stock, and when it was known to be the newest."""

    stock: Stock
    as_of: datetime


@dataclass(frozen=True, slots=True)
class Ask:
    """A key that must not be older than `min_version`."""

    key: Key
    min_version: int = 0


class Cache:
    """Reads through three levels; `client` may be away at any time."""

    def __init__(
        self,
        database: Database,
        client: Client,
        *,
        local_seconds: float,
        redis_seconds: float,
        keys_max: int,
    ) -> None:
        self._database = database
        self._redis = client
        self._put = client.register_script(PUT)
        self._local: OrderedDict[Key, tuple[float, Seen]] = OrderedDict()
        self._local_seconds = local_seconds
        self._redis_ms = int(redis_seconds * 1000)
        self._keys_max = keys_max
        self._redis_away_until = 0.0
        self._hits = 1.0
        self._reads = 0
        self._behind: dict[Key, Seen] = {}
        self._writer: asyncio.Task[None] | None = None

    def wrote(self, stocks: Iterable[Stock], as_of: datetime) -> None:
        """Note what was committed; Redis is told behind the caller's back."""
        for stock in stocks:
            seen = Seen(stock, as_of)
            self._remember(seen)
            waiting = self._behind.get(stock.key)
            if waiting is None or waiting.stock.version <= stock.version:
                self._behind[stock.key] = seen
        if self._writer is None and self._behind:
            self._writer = asyncio.get_running_loop().create_task(self._write_behind())

    def local(self, ask: Ask) -> Seen | None:
        """What the pod's memory knows, if it is fresh enough."""
        known = self._local.get(ask.key)
        if known is None or known[0] < time.monotonic() or known[1].stock.version < ask.min_version:
            return None
        return known[1]

    async def read(self, asks: Sequence[Ask]) -> list[Seen | Refusal]:
        """Read many keys, each from the nearest level that is fresh enough. One call at a time is best.

        A key that is not at its `min_version` comes back as Refusal VERSION_NOT_REACHED.
        """
        found: dict[Key, Seen] = {}
        least: dict[Key, int] = {}
        for ask in asks:
            least[ask.key] = max(ask.min_version, least.get(ask.key, 0))
        for key, version in least.items():
            if seen := self.local(Ask(key, version)):
                found[key] = seen
        in_memory = len(found)
        missing = [key for key in least if key not in found]
        through_redis = bool(missing) and self._worth_asking()
        if through_redis:
            for key, seen in (await self._from_redis(missing)).items():
                if seen.stock.version >= least[key]:
                    found[key] = seen
                    self._remember(seen)
            missing = [key for key in least if key not in found]
        metrics.CACHE_READS.labels("memory").inc(in_memory)
        metrics.CACHE_READS.labels("redis").inc(len(found) - in_memory)
        metrics.CACHE_READS.labels("database").inc(len(missing))
        if missing:
            found |= await self._from_database(missing, tell_redis=through_redis)
        return [self._answer(ask, found[ask.key]) for ask in asks]

    async def close(self) -> None:
        if self._writer:
            await asyncio.wait([self._writer])

    @staticmethod
    def _answer(ask: Ask, seen: Seen) -> Seen | Refusal:
        if seen.stock.version >= ask.min_version:
            return seen
        sku, location = ask.key
        return Refusal(
            Reason.VERSION_NOT_REACHED,
            f"{sku} at {location} is at version {seen.stock.version}",
            sku=sku,
            location=location,
            version=seen.stock.version,
        )

    def _remember(self, seen: Seen) -> None:
        key = seen.stock.key
        known = self._local.get(key)
        if known and known[1].stock.version > seen.stock.version:
            return
        self._local[key] = (time.monotonic() + self._local_seconds, seen)
        self._local.move_to_end(key)
        if len(self._local) > self._keys_max:
            self._local.popitem(last=False)

    def _worth_asking(self) -> bool:
        self._reads += 1
        return self._hits >= HITS_MIN or self._reads % PROBE_READS == 0

    async def _from_redis(self, keys: Sequence[Key]) -> dict[Key, Seen]:
        if time.monotonic() < self._redis_away_until:
            return {}
        try:
            values = await redis_client.get(self._redis, [_name(key) for key in keys])
        except AWAY as error:
            self._away(error)
            return {}
        found = {key: _decode(key, value) for key, value in zip(keys, values, strict=True) if value}
        self._hits = HITS_MEMORY * self._hits + (1 - HITS_MEMORY) * len(found) / len(keys)
        return found

    async def _from_database(self, keys: Sequence[Key], *, tell_redis: bool) -> dict[Key, Seen]:
        async with self._database.connection() as connection:
            rows = await store.read_stock(connection, keys)
        found = {key: Seen(stock, as_of) for key, (stock, as_of) in rows.items()}
        for stock, as_of in rows.values():
            if tell_redis:
                self.wrote([stock], as_of)
            else:
                self._remember(Seen(stock, as_of))
        return found

    async def _write_behind(self) -> None:
        try:
            while self._behind:
                # What is committed meanwhile goes along; who waits for a commit's answer does not wait for this.
                await asyncio.sleep(BEHIND_SECONDS)
                batch, self._behind = self._behind, {}
                if time.monotonic() < self._redis_away_until:
                    continue
                told = {_name(key): (seen.stock.version, _encode(seen)) for key, seen in batch.items()}
                try:
                    await redis_client.run(self._redis, self._put, [self._redis_ms], told)
                except AWAY as error:
                    self._away(error)
        finally:
            self._writer = None  # whatever it failed of, the next commit has one

    def _away(self, error: Exception) -> None:
        self._redis_away_until = time.monotonic() + RETRY_SECONDS
        log.warning("redis is away", error=type(error).__name__)


def _name(key: Key) -> str:
    return f"stock:{key[0]}|{key[1]}"


def _encode(seen: Seen) -> str:
    s = seen.stock
    parts = (s.version, s.on_hand, s.held, s.safety_stock, s.backorder_limit, s.short, int(s.active))
    return "|".join(map(str, (*parts, seen.as_of.timestamp())))


def _decode(key: Key, value: bytes | str) -> Seen:
    *numbers, as_of = (value.decode() if isinstance(value, bytes) else value).split("|")
    version, on_hand, held, safety_stock, backorder_limit, short, active = map(int, numbers)
    stock = Stock(*key, on_hand, held, safety_stock, backorder_limit, short, version, bool(active))
    return Seen(stock, datetime.fromtimestamp(float(as_of), UTC))
