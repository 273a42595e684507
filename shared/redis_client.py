"""How Redis is reached: one server, or a cluster (Redis Cluster), whose keys lie in slots on several.

A command of a cluster touches keys of one slot. What goes together all the same is named together (`lock:{name}`);
what does not is sent by slot, in one round trip for each node.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain

import redis.asyncio as redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisClusterException, RedisError

Client = redis.Redis | redis.RedisCluster
AWAY = (RedisError, RedisClusterException, OSError, TimeoutError)  # what is raised while it is
SECONDS_MAX = 0.25  # for connecting and for an answer: who has waited longer is better off with PostgreSQL


def connect(url: str, *, cluster: bool) -> Client:
    """A client that connects when it is first used; of a cluster the URL names any node."""
    kind = redis.RedisCluster if cluster else redis.Redis
    return kind.from_url(url, socket_timeout=SECONDS_MAX, socket_connect_timeout=SECONDS_MAX)


async def get(client: Client, names: Sequence[str]) -> list[bytes | str | None]:
    """The values of keys, None for those that there are not."""
    if isinstance(client, redis.RedisCluster):
        return await client.mget_nonatomic(names)
    return await client.mget(names)


async def run(
    client: Client, script: AsyncScript, common: Sequence[int | str], of: Mapping[str, Sequence[int | str]]
) -> None:
    """Run a script on keys: its ARGV are what is common to all, and then what each key has, in the order of KEYS.

    Once for all of them, in a cluster once for those of each slot.
    """
    if not isinstance(client, redis.RedisCluster):
        await script(keys=list(of), args=[*common, *chain.from_iterable(of.values())])
        return
    by_slot: defaultdict[int, list[str]] = defaultdict(list)
    for name in of:
        by_slot[client.keyslot(name)].append(name)
    pipeline = client.pipeline()
    for names in by_slot.values():
        arguments = chain.from_iterable(of[name] for name in names)
        pipeline.execute_command("EVAL", script.script, len(names), *names, *common, *arguments)
    await pipeline.execute()
