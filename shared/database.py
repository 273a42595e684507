"""PostgreSQL: a pool of asyncpg connections, bounded transactions, and Core statements on them.

Hot statements are written by hand and run by asyncpg with prepared statements and array parameters;
statements whose shape varies (filters, pages) are built with SQLAlchemy Core and compiled for the same
connection, so that there is one pool and one way to hold a transaction.

The planner is told to join in the order of the key: hash and merge joins, sequential and bitmap scans
are off on these connections. An `UPDATE ... FROM unnest(sorted keys)` then visits rows in ascending key
order whichever side the planner puts first, which is what keeps two batches from deadlocking.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
from opentelemetry.trace import SpanKind
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect
from sqlalchemy.sql.expression import Executable

from shared import metrics, telemetry
from shared.cancellation import cancelled
from shared.refusal import Refusal

if TYPE_CHECKING:
    Record = asyncpg.Record
    Connection = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Record = asyncpg.Record
    Connection = asyncpg.Connection
    Pool = asyncpg.Pool

T = TypeVar("T")

ATTEMPTS_MAX = 6
ACQUIRE_SECONDS_MAX = 5.0
CLOSE_SECONDS_MAX = 2.0
PLANNER = {
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}
# A unique violation means that the same id was inserted at the same time elsewhere: the next attempt finds it. A
# statement is out of date when a migration has changed its table since it was prepared: the next attempt prepares it.
RETRIED = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.UniqueViolationError,
    asyncpg.InvalidCachedStatementError,
)
RETRY_REASONS = ("deadlock", "serialization", "unique", "migration")
# Of a statement that copies rows to a cluster's nodes it is not told which of these it failed of: who runs one in a
# transaction of its own looks what is there.
CONTESTED = (*RETRIED, asyncpg.exceptions.InternalServerError)
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.CannotConnectNowError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
    asyncpg.exceptions.IdleInTransactionSessionTimeoutError,
    # A coordinator of Citus has lost a worker while it wrote, prepared or committed there.
    asyncpg.exceptions.PostgresIOError,
    asyncpg.exceptions.InternalServerError,
    # Logging in again failed: a password that was changed before the pod's, or a database that is being replaced.
    asyncpg.exceptions.InvalidAuthorizationSpecificationError,
    asyncpg.exceptions.InvalidCatalogNameError,
)
DIALECT = asyncpg_dialect.dialect()  # type: ignore[no-untyped-call]


def unavailable() -> Refusal:
    return Refusal("DATABASE_UNAVAILABLE", "the database cannot be reached; try again with the same request")


class Database:
    """A pool on one database. Losing the server raises Refusal(DATABASE_UNAVAILABLE), and soon.

    `name` tells its metrics from those of another pool of the process.
    """

    def __init__(self, pool: Pool, name: str = "main") -> None:
        self._pool = pool
        self._waited = metrics.DATABASE_WAIT_SECONDS.labels(name)
        self._held = metrics.DATABASE_SECONDS.labels(name)
        self._lost = metrics.DATABASE_UNAVAILABLE.labels(name)
        metrics.DATABASE_CONNECTIONS.labels(name).set_function(lambda: pool.get_size() - pool.get_idle_size())
        metrics.DATABASE_CONNECTIONS_MAX.labels(name).set_function(pool.get_max_size)

    @classmethod
    async def connect(
        cls,
        dsn: str,
        *,
        name: str,
        connections_max: int = 10,
        timeout_seconds: float = 10,
        idle_seconds_max: float = 0,
        planner: Mapping[str, str] = PLANNER,
        pool_name: str = "main",
    ) -> "Database":
        """Open the pool; `name` is shown in pg_stat_activity, `pool_name` in metrics.

        PostgreSQL ends a transaction that is silent for `idle_seconds_max` (0: never): a pod that stands still would
        keep everybody else from the rows that it has locked.
        """
        idle = {"idle_in_transaction_session_timeout": f"{idle_seconds_max * 1000:.0f}"} if idle_seconds_max else {}
        pool = await asyncpg.create_pool(
            dsn,
            min_size=1,
            max_size=connections_max,
            command_timeout=timeout_seconds,
            timeout=ACQUIRE_SECONDS_MAX,
            server_settings={"application_name": name, "timezone": "UTC", **idle, **planner},
            init=_plan,
            reset=_nothing,
        )
        return cls(pool, pool_name)

    async def close(self) -> None:
        """Take leave of the server; without it, where that takes longer than CLOSE_SECONDS_MAX."""
        with suppress(*UNAVAILABLE):
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await self._pool.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection on which each statement is its own transaction."""
        began = time.perf_counter()
        try:
            async with self._pool.acquire(timeout=ACQUIRE_SECONDS_MAX) as connection:
                acquired = time.perf_counter()
                self._waited.observe(acquired - began)
                try:
                    with telemetry.span("transaction", SpanKind.CLIENT, {"db.system.name": "postgresql"}):
                        yield connection
                finally:
                    self._held.observe(time.perf_counter() - acquired)
        except UNAVAILABLE as error:
            self._lost.inc()
            if cancelled():
                raise asyncio.CancelledError from error  # in place of which asyncpg says that it could not end in time
            raise unavailable() from error

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` in one transaction and commit it; what it raises rolls it back.

        Deadlocks, serialization failures, unique violations and statements that a migration has outdated
        start it again, at most ATTEMPTS_MAX times with a little jitter; then it is refused as
        DATABASE_UNAVAILABLE, which clients retry.
        """
        for attempt in range(ATTEMPTS_MAX):
            try:
                async with self.connection() as connection, connection.transaction():
                    return await work(connection)
            except RETRIED as error:
                metrics.DATABASE_RETRIES.labels(_reason(error)).inc()
                await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 - jitter
        raise unavailable()


def _reason(error: asyncpg.PostgresError) -> str:
    return next(reason for kind, reason in zip(RETRIED, RETRY_REASONS, strict=True) if isinstance(error, kind))


def columns(rows: Iterable[Sequence[Any]], count: int) -> list[list[Any]]:
    """Rows to columns, as array parameters take them; `count` empty ones when there are no rows."""
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(count)]


def affected(status: str) -> int:
    """The row count in a command tag such as "INSERT 0 5"."""
    return int(status.rsplit(" ", 1)[1])


async def fetch(connection: Connection, statement: Executable) -> list[Record]:
    """Run a SQLAlchemy Core statement on an asyncpg connection and return its rows."""
    compiled = statement.compile(dialect=DIALECT, compile_kwargs={"render_postcompile": True})  # type: ignore[attr-defined]
    parameters = [compiled.params[name] for name in compiled.positiontup or ()]
    return list(await connection.fetch(compiled.string, *parameters))


# Citus finds the shard of a statement by its parameters, and so plans it with them.
PLAN = "SELECT set_config('plan_cache_mode', 'auto', false) FROM pg_extension WHERE extname = 'citus'"


async def _plan(connection: Connection) -> None:
    await connection.execute(PLAN)


async def _nothing(_connection: Connection) -> None:
    """Sessions carry no state between uses, so nothing needs a round trip to be reset."""
