"""The embedded stack keeps its promises: it starts from any remains, says what is wrong, and leaves nothing running."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis
from aiokafka.admin import AIOKafkaAdminClient

from deploy.local.stack import REPOSITORY, AlreadyRunning, Missing, Stack, StackError
from deploy.local.supervisor import SERVICES, Supervisor
from shared.topics import Topic

pytestmark = pytest.mark.timeout(180)

OWNER = """
import signal, sys
from pathlib import Path
from deploy.local.stack import Stack, until_interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests run in a shell's background ignore it
stack = Stack(Path(sys.argv[1])).start()
print(*stack.pids.values(), flush=True)
until_interrupted()
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An empty root directory, whose data is gone after the test wherever the stack put it."""
    yield tmp_path / "root"
    Stack(tmp_path / "root").erase()


def until(condition: Callable[[], bool], seconds_max: float = 30) -> None:
    """Wait until the condition holds; the test fails when it does not within the bound."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def killed_owner(root: Path) -> list[psutil.Process]:
    """Start a stack in another process, SIGKILL that process once all is up, and answer the stack's processes."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(root)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        servers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        servers += [child for server in servers for child in server.children(recursive=True)]
        owner.kill()
    return servers


def query(dsn: str, statement: str) -> object:
    async def ask() -> object:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(ask())


def topics(bootstrap: str) -> dict[str, int]:
    """The partitions of each topic by its name."""

    async def ask() -> dict[str, int]:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        await admin.start()
        try:
            return {topic["topic"]: len(topic["partitions"]) for topic in await admin.describe_topics()}
        finally:
            await admin.close()

    return asyncio.run(ask())


def test_databases_topics_and_redis_answer_and_making_them_twice_changes_nothing(root: Path) -> None:
    """A fresh stack gives durable databases, the topics asked for, and a Redis that keeps nothing on disk."""
    with Stack(root).start() as stack:
        for _ in range(2):
            stack.databases("inventory", "reservation")
            stack.create_topics(Topic("plain", 3), Topic("kept", 2, compacted=True))
        assert query(stack.postgres_dsn("inventory"), "SHOW fsync") == "on"
        assert query(stack.postgres_dsn("inventory"), "SHOW synchronous_commit") == "on"
        stack.drop_database("reservation")
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            query(stack.postgres_dsn("reservation"), "SELECT 1")
        assert topics(stack.kafka_bootstrap).items() >= {"plain": 3, "kept": 2}.items()
        with redis.Redis.from_url(stack.redis_url) as client:
            assert client.config_get("save") == {"save": ""}


def test_every_server_listens_on_loopback_only(root: Path) -> None:
    """No port of the stack can be reached from another machine."""
    with Stack(root).start() as stack:
        listening = [
            connection.laddr.ip.removeprefix("::ffff:")
            for pid in stack.pids.values()
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) == 4
        assert set(listening) == {"127.0.0.1"}


def test_killing_the_owner_stops_every_child_and_its_remains_start_again_with_their_data(root: Path) -> None:
    """After SIGKILL of the owner nothing runs, and the next start finds what was committed."""
    with Stack(root).start() as stack:
        stack.databases("inventory")
        query(stack.postgres_dsn("inventory"), "CREATE TABLE kept AS SELECT 7 AS units")
    servers = killed_owner(root)
    assert len(servers) > 3
    _, alive = psutil.wait_procs(servers, timeout=30)
    assert alive == []
    with Stack(root).start() as stack:
        assert query(stack.postgres_dsn("inventory"), "SELECT units FROM kept") == 7


def test_a_start_right_after_the_owners_death_waits_for_what_is_still_ending(root: Path) -> None:
    """The remains may still be dying when the next start comes."""
    killed_owner(root)
    with Stack(root).start() as stack:
        assert query(stack.postgres_dsn("postgres"), "SELECT 1") == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: (data / "PG_VERSION").write_text("9\n"), "PostgreSQL 9"),
        (lambda data: (data / "PG_VERSION").unlink(), "PG_VERSION is missing"),
        (lambda data: (data / "global" / "pg_control").write_bytes(b"x"), "PostgreSQL ended with code"),
    ],
    ids=["other version", "incomplete", "damaged"],
)
def test_data_that_cannot_be_started_is_said_so_and_made_anew(
    root: Path, damage: Callable[[Path], object], reason: str
) -> None:
    """One line names the reason, and the stack comes up empty."""
    said: list[str] = []
    with Stack(root).start() as stack:
        stack.databases("inventory")
        data = Path(str(query(stack.postgres_dsn("postgres"), "SHOW data_directory")))
    damage(data)
    with Stack(root, say=said.append).start() as stack:
        stack.databases("inventory")
    removals = [line for line in said if "removing the data" in line]
    assert len(removals) == 1
    assert reason in removals[0]
    assert "\n" not in removals[0]


def test_a_pid_file_naming_a_living_stranger_does_not_stop_the_start(root: Path) -> None:
    """The number in a stale postmaster.pid may belong to any program by now."""
    with Stack(root).start() as stack:
        data = Path(str(query(stack.postgres_dsn("postgres"), "SHOW data_directory")))
    (data / "postmaster.pid").write_text(f"{os.getpid()}\n{data}\n")
    with Stack(root).start() as stack:
        assert query(stack.postgres_dsn("postgres"), "SELECT 1") == 1


def test_a_second_start_on_one_root_names_the_first(root: Path) -> None:
    """The message says who runs there, and the first stack is untouched."""
    with Stack(root).start() as stack:
        with pytest.raises(AlreadyRunning, match=rf"already running on .*process {os.getpid()}\): stop it first"):
            Stack(root).start()
        assert query(stack.postgres_dsn("postgres"), "SELECT 1") == 1


@pytest.mark.parametrize("java", [None, "11.0.2", "1.8.0_392"], ids=["none", "java 11", "java 8"])
def test_a_machine_without_a_fit_java_is_told_in_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, java: str | None
) -> None:
    """The line names what is missing and the command that gets it."""
    commands = tmp_path / "bin"
    commands.mkdir()
    if java:
        program = commands / "java"
        program.write_text(f"#!/bin/sh\necho 'openjdk version \"{java}\"' >&2\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(Missing) as missing:
        Stack(tmp_path / "root").start()
    assert "java is" in str(missing.value)
    assert "apt install openjdk-17-jre-headless" in str(missing.value)
    assert "\n" not in str(missing.value)
    assert not (tmp_path / "root").exists()


def test_a_start_that_fails_leaves_nothing_running(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server that cannot start ends the others, and the message shows its last lines."""
    monkeypatch.setattr("deploy.local.stack._kafka_properties", lambda *_: "this.is=not a broker\n")
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(StackError, match="Kafka"):
        Stack(root).start()
    until(lambda: set(psutil.Process().children(recursive=True)) <= before)
    monkeypatch.undo()
    with Stack(root).start() as stack:
        assert set(stack.pids) == {"PostgreSQL", "Redis", "Kafka"}


def test_a_stack_ends_with_its_owner_when_interrupted(root: Path) -> None:
    """Ctrl-C's signal to the owner ends everything in order, as the servers are in sessions of their own."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(root)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        servers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        owner.send_signal(signal.SIGINT)
        owner.wait(30)
    _, alive = psutil.wait_procs(servers, timeout=30)
    assert alive == []


STAND_IN = """
import os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2_grpc
if os.environ["HOLDFAST_POD"] in os.environ.get("STAND_IN_BROKEN", ""):
    sys.exit("no such table: stock")
server = grpc.server(ThreadPoolExecutor(2))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
assert server.add_insecure_port(os.environ["HOLDFAST_LISTEN"])
server.start()
done = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: done.set())
done.wait()
server.stop(1).wait()
"""


@pytest.fixture(scope="module")
def shared_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One stack for the tests of the supervisor."""
    stack = Stack(tmp_path_factory.mktemp("supervised") / "root")
    with stack.start():
        yield stack
    stack.erase()


@pytest.fixture
def pods(shared_stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """A supervisor, not started, whose pods are stand-ins that serve nothing but health."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(Supervisor, "migrate", lambda _self, _service: None)
    return Supervisor(shared_stack, services=[service._replace(module="stand_in") for service in SERVICES])


def test_two_pods_of_each_service_serve_and_the_endpoints_file_names_them(pods: Supervisor) -> None:
    """Targets list every pod's address; the file is there while the pods are."""
    with pods.start():
        assert [pod.name for pod in pods.pods] == [f"{s.name}-{n}" for s in SERVICES for n in (0, 1)]
        assert all(target.count("127.0.0.1:") == 2 for target in pods.targets.values())
        assert pods.pods[0].address in pods.targets["inventory"]
        assert pods.endpoints_file.exists()
    assert not pods.endpoints_file.exists()
    assert not any(pod.running for pod in pods.pods)


def test_a_pod_that_crashes_is_restarted_on_its_port(pods: Supervisor) -> None:
    """The supervisor's watch brings back what died by itself."""
    with pods.start():
        pod = pods.pod("inventory-1")
        first = pod.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until(lambda: pod.pid != first and pod.running)


def test_a_pod_taken_down_stays_down_until_restarted(pods: Supervisor) -> None:
    """Terminate drains with code 0, kill is a crash, and neither is undone by the watch."""
    with pods.start():
        drained, crashed = pods.pod("inventory-0"), pods.pod("reservation-0")
        assert pods.terminate(drained) == 0
        pods.kill(crashed)
        assert not drained.wanted
        assert not crashed.wanted
        pods.restart(drained)
        assert drained.running
        assert not crashed.running


def test_a_pod_that_dies_while_starting_fails_the_start_with_its_last_lines(
    pods: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the pod and shows what it said; no pod is left."""
    monkeypatch.setenv("STAND_IN_BROKEN", "reservation-1")
    with pytest.raises(StackError, match=r"reservation-1 ended with code 1(.|\n)*no such table: stock"):
        pods.start()
    assert not any(pod.running for pod in pods.pods)
