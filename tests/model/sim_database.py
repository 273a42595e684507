"""A small PostgreSQL in memory: rows, READ COMMITTED, row locks in the order they are taken, constraints, time.

It has no SQL: `sim_statements` says in Python what each statement of the services' stores does, and
`test_store` holds both against the real server. What is as there:

* A statement sees what was committed when it began, and its own transaction's writes. An update takes the
  lock of each row in turn, waits for its holder, and then judges and changes the row as it has become.
* A transaction that waits for one that waits for it is a deadlock, and the last to come is undone.
* An insert of a key that another transaction has inserted waits for that one's end.
* What a constraint forbids is undone with the whole transaction; after an error nothing but a rollback does.

What differs: which of several waiters is next is the seed's choice, and a deadlock is seen at once.
"""

import asyncio
import contextvars
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol
from uuid import UUID

import asyncpg

Key = tuple[Any, ...]
Row = Mapping[str, Any]
Place = tuple[str, Key]  # a table's name and a key in it
# Transactions of one statement that take several locks.
SERIAL = {"place", "change", "book", "insert_reservations"}


class Record(Sequence[Any]):
    """A row of an answer, read as asyncpg's are: by name or by position, and iterated by value."""

    __slots__ = ("_row", "_values")

    def __init__(self, row: Row) -> None:
        self._row = row
        self._values = tuple(row.values())

    def __getitem__(self, at: Any) -> Any:
        return self._row[at] if isinstance(at, str) else self._values[at]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)


@dataclass(frozen=True)
class Table:
    """A table: its key, what each row must fulfil, and the tables that have to know some of its columns."""

    name: str
    key: tuple[str, ...]
    checks: Mapping[str, Callable[[Row], bool]]
    parents: Mapping[str, tuple[str, ...]]


class Server:
    """The server's side of one database. `committed` is called with each transaction that wrote, as it commits."""

    def __init__(self, tables: Sequence[Table], clock: Callable[[], datetime], new_uuid: Callable[[], UUID]) -> None:
        self.tables = {table.name: table for table in tables}
        self.rows: dict[str, dict[Key, list[tuple[int, Row | None]]]] = {table.name: {} for table in tables}
        self.clock = clock
        self.new_uuid = new_uuid
        self.locks: dict[Place, Transaction] = {}
        self.seq = 0
        self.identities: dict[str, int] = {}
        self.transactions: dict[Transaction, None] = {}
        self.committed: Callable[[Transaction], None] = lambda _transaction: None

    def begin(self) -> "Transaction":
        return Transaction(self)

    def now(self, place: Place) -> Row | None:
        """A row as it was last committed."""
        chain = self.rows[place[0]].get(place[1])
        return chain[-1][1] if chain else None

    def all(self, table: str) -> list[Row]:
        """A table's committed rows, in order of their keys."""
        found = ((key, chain[-1][1]) for key, chain in self.rows[table].items())
        return [row for _, row in sorted((key, row) for key, row in found if row is not None)]

    def write(self, transaction: "Transaction") -> None:
        """Make a transaction's writes everyone's; drop versions of rows that no statement can see any more."""
        self.seq += 1
        oldest = min((one.snapshot for one in self.transactions if one is not transaction), default=self.seq)
        for (table, key), row in transaction.writes.items():
            chain = self.rows[table].setdefault(key, [])
            chain.append((self.seq, row))
            while len(chain) > 1 and chain[1][0] <= oldest:
                del chain[0]
            if chain == [(self.seq, None)]:
                del self.rows[table][key]
        self.committed(transaction)


class Transaction:
    """The server's side of one transaction, with the statement that it is at."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.writes: dict[Place, Row | None] = {}
        self.has_written = False
        self.failed = False
        self.began = self.stated = server.clock()
        self.snapshot = server.seq
        self._locks: dict[Place, None] = {}
        self._waits_for: Transaction | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        server.transactions[self] = None

    def state(self) -> None:
        """Begin a statement: from now on it sees what is committed now."""
        if self.failed:
            raise asyncpg.InFailedSQLTransactionError("current transaction is aborted")
        self.snapshot = self.server.seq
        self.stated = self.server.clock()

    def clock(self) -> datetime:
        return self.server.clock()

    def get(self, table: str, key: Key) -> Row | None:
        """A row as the statement sees it."""
        if (table, key) in self.writes:
            return self.writes[table, key]
        for seq, row in reversed(self.server.rows[table].get(key, ())):
            if seq <= self.snapshot:
                return row
        return None

    def scan(self, table: str) -> list[Row]:
        """A table as the statement sees it, in order of keys."""
        keys = self.server.rows[table].keys() | {key for name, key in self.writes if name == table}
        return [row for key in sorted(keys) if (row := self.get(table, key)) is not None]

    async def update(
        self, table: str, key: Key, change: Callable[[Row], Row], where: Callable[[Row], bool] = lambda _row: True
    ) -> Row | None:
        """Lock a row, change it and return it; None where it is not there or `where` says no.

        `where` has to hold of the row as the statement sees it, and of the row under the lock.
        """
        seen = self.get(table, key)
        if seen is None or not where(seen):
            return None
        self.has_written = True
        had = (table, key) in self._locks
        row = await self._lock((table, key))
        if row is None or not where(row):
            if not had:
                self._unlock((table, key))
            return None
        changed = {**row, **change(row)}
        self._put((table, key), changed)
        return changed

    async def delete(self, table: str, key: Key) -> bool:
        if self.get(table, key) is None:
            return False
        self.has_written = True
        if await self._lock((table, key)) is None:
            return False
        self.writes[table, key] = None
        return True

    async def insert(self, table: str, row: Row, *, or_nothing: bool = False) -> bool:
        """Insert a row; raises UniqueViolationError where its key is known, or returns False with `or_nothing`."""
        key = tuple(row[column] for column in self.server.tables[table].key)
        self.has_written = True
        had = (table, key) in self._locks
        if await self._lock((table, key)) is None:
            self._put((table, key), row)
            return True
        if not or_nothing:
            raise asyncpg.UniqueViolationError(f'duplicate key value violates unique constraint "{table}_pkey"')
        if not had:
            self._unlock((table, key))
        return False

    def identity(self, table: str) -> int:
        """The next number of a column GENERATED ALWAYS AS IDENTITY; a rollback does not give it back."""
        self.server.identities[table] = self.server.identities.get(table, 0) + 1
        return self.server.identities[table]

    def commit(self) -> None:
        if not self._ended.done():
            if self.writes and not self.failed:
                self.server.write(self)
            self._end()

    def roll_back(self) -> None:
        if not self._ended.done():
            self.writes.clear()
            self._end()

    async def _lock(self, place: Place) -> Row | None:
        """Wait for a row and return it as it is then."""
        while (holder := self.server.locks.get(place)) is not None and holder is not self:
            waiting: Transaction | None = holder
            while waiting is not None:
                if waiting is self:
                    raise asyncpg.DeadlockDetectedError("deadlock detected")
                waiting = waiting._waits_for
            self._waits_for = holder
            try:
                await asyncio.shield(holder._ended)
            finally:
                self._waits_for = None
        if self._ended.done():
            raise asyncpg.QueryCanceledError("the transaction was rolled back meanwhile")
        self.server.locks[place] = self
        self._locks[place] = None
        return self.writes[place] if place in self.writes else self.server.now(place)

    def _unlock(self, place: Place) -> None:
        del self.server.locks[place], self._locks[place]

    def _put(self, place: Place, row: Row) -> None:
        table = self.server.tables[place[0]]
        for name, holds in table.checks.items():
            if not holds(row):
                raise asyncpg.CheckViolationError(f'new row for relation "{table.name}" violates "{name}"')
        for parent, columns in table.parents.items():
            known = (parent, tuple(row[column] for column in columns))
            if self.writes.get(known) is None and self.server.now(known) is None:
                raise asyncpg.ForeignKeyViolationError(f'"{table.name}" names no row of "{parent}"')
        self.writes[place] = row

    def _end(self) -> None:
        for place in self._locks:
            del self.server.locks[place]
        self._locks.clear()
        self.server.transactions.pop(self, None)
        self._ended.set_result(None)


Statement = Callable[..., Awaitable[list[Record] | int]]


class Wire(Protocol):
    """What lies between a pod and the server."""

    async def there(self, what: str, *, may_fail: bool) -> str:
        """Carry a request; returns the fault that it meets: "", "error", "lost before" or "lost after".

        An error is a serialization failure; where none may be, because nothing is locked, there is none.
        """

    async def back(self) -> None:
        """Carry an answer."""

    def lingers(self) -> float:
        """Seconds for which the server does not notice that a connection is gone."""


class LocalWire:
    """A wire that takes no time and fails nobody."""

    async def there(self, _what: str, *, may_fail: bool) -> str:  # noqa: ARG002 - nothing fails
        return ""

    async def back(self) -> None:
        pass

    def lingers(self) -> float:
        return 0


class Connection:
    """A pod's connection: the part of asyncpg's that the services use. A lost one is of no more use."""

    def __init__(self, server: Server, statements: Callable[[str], tuple[str, Statement]], wire: Wire) -> None:
        self._server = server
        self._statements = statements
        self._wire = wire
        self._transaction: Transaction | None = None
        self._lost = False

    async def fetch(self, statement: str, *arguments: Any) -> list[Record]:
        rows = await self._run(statement, arguments)
        assert not isinstance(rows, int), statement
        return rows

    async def fetchrow(self, statement: str, *arguments: Any) -> Record | None:
        return next(iter(await self.fetch(statement, *arguments)), None)

    async def fetchval(self, statement: str, *arguments: Any) -> Any:
        row = await self.fetchrow(statement, *arguments)
        return None if row is None else row[0]

    async def execute(self, statement: str, *arguments: Any) -> str:
        count = await self._run(statement, arguments)
        return f"DONE {count if isinstance(count, int) else len(count)}"

    def transaction(self) -> "_InTransaction":
        return _InTransaction(self)

    async def begin(self) -> None:
        assert self._transaction is None, "transactions do not nest here"

        async def work() -> None:
            self._transaction = self._server.begin()

        await self._round_trip("BEGIN", work)

    async def commit(self) -> None:
        async def work() -> None:
            transaction, self._transaction = self._transaction, None
            assert transaction is not None
            transaction.commit()

        await self._round_trip("COMMIT", work)

    async def roll_back(self) -> None:
        if self._lost:
            return

        async def work() -> None:
            transaction, self._transaction = self._transaction, None
            if transaction:
                transaction.roll_back()

        await self._round_trip("ROLLBACK", work)

    def close(self) -> None:
        """Give it back. With a transaction under way it is dropped, and the server rolls back when it notices."""
        if self._transaction is not None:
            self._drop()

    async def _run(self, text: str, arguments: tuple[Any, ...]) -> list[Record] | int:
        name, statement = self._statements(text)

        async def work() -> list[Record] | int:
            transaction = self._transaction or self._server.begin()
            try:
                transaction.state()
                answer = await statement(transaction, *arguments)
            except BaseException:
                transaction.failed = True
                if transaction is not self._transaction:
                    transaction.roll_back()
                raise
            if transaction is not self._transaction:
                transaction.commit()
            return answer

        answer: list[Record] | int = await self._round_trip(name, work)
        return answer

    async def _round_trip(self, what: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Have the server do something. It goes on with it when the pod is gone or has lost the connection."""
        if self._lost:
            raise asyncpg.InterfaceError("connection is closed")
        fault = await self._wire.there(what, may_fail=self._transaction is not None or what in SERIAL)
        if fault == "lost before":
            self._drop()
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        if fault == "error" and what != "ROLLBACK":
            if self._transaction:
                self._transaction.failed = True
                if what == "COMMIT":
                    self._transaction.roll_back()
                    self._transaction = None
            raise asyncpg.SerializationError("could not serialize access")
        working, context = work(), contextvars.Context()
        try:
            waiting = context.run(working.send, None)
        except StopIteration as done:  # as nearly always: it met no lock
            answer = done.value
        else:
            at_server = asyncio.get_running_loop().create_task(_rest(working, waiting), context=context)
            try:
                answer = await asyncio.shield(at_server)
            except asyncio.CancelledError:
                at_server.add_done_callback(lambda _done: self._drop())
                at_server.add_done_callback(lambda done: done.cancelled() or done.exception())
                raise
        if fault == "lost after":
            self._drop()
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        await self._wire.back()
        return answer

    def _drop(self) -> None:
        self._lost = True
        transaction, self._transaction = self._transaction, None
        if transaction:
            seconds = self._wire.lingers()
            if seconds:
                asyncio.get_running_loop().call_later(seconds, transaction.roll_back)
            else:
                transaction.roll_back()


@types.coroutine
def _rest(working: Coroutine[Any, Any, Any], waiting: Any) -> Generator[Any, Any, Any]:
    """A coroutine from where it waits to its end."""
    try:
        while True:
            waiting = working.send((yield waiting))
    except StopIteration as done:
        return done.value
    finally:
        working.close()


class _InTransaction:
    """`async with connection.transaction()`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def __aenter__(self) -> None:
        await self._connection.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self._connection.commit()
        else:
            await self._connection.roll_back()


class Pool:
    """A pod's pool: what `shared.database.Database` takes. At most `connections_max` at once."""

    def __init__(self, connect: Callable[[], Connection], connections_max: int = 10) -> None:
        self._connect = connect
        self._room = asyncio.Semaphore(connections_max)
        self._connections_max = connections_max

    @asynccontextmanager
    async def acquire(self, *, timeout: float) -> Any:  # the wait for a connection, as asyncpg names it
        if self._room.locked():
            await asyncio.wait_for(self._room.acquire(), timeout)
        else:
            await self._room.acquire()
        connection = self._connect()
        try:
            yield connection
        finally:
            connection.close()
            self._room.release()

    def get_max_size(self) -> int:
        return self._connections_max

    def get_size(self) -> int:
        return self._connections_max

    def get_idle_size(self) -> int:
        return self._connections_max

    async def close(self) -> None:
        pass
