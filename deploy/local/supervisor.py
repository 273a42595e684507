"""Runs the pods of every service on a started stack: databases, topics, migrations, processes, restarts.

with Stack().start() as stack, Supervisor(stack).start() as supervisor:
    grpc.insecure_channel(supervisor.targets["reservation"])
"""

import base64
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.certificates import Authority
from deploy.local.stack import CITUS_SHARDS, REPOSITORY, Leash, Say, Stack, StackError, free_ports, tail
from shared import tls
from shared.topics import TOPICS


class Service(NamedTuple):
    """A service, its own database, the module that runs it, and the services whose addresses its pods are told."""

    name: str
    database: str
    module: str
    calls: tuple[str, ...] = ()
    pods: int = 2
    settings: Mapping[str, str] = MappingProxyType({})  # environment of its own, over what is said elsewhere


SERVICES = (
    Service("inventory", "inventory", "services.inventory"),
    Service("reservation", "reservation", "services.reservation", calls=("inventory",)),
    Service("analytics", "analytics", "services.analytics"),
)
# The table that is deployed, for TLS on this machine as well.
ACCESS_FILE = REPOSITORY / "deploy/k8s/components/tls/access.toml"
# What the client's certificate is for: every role of ACCESS_FILE that is no service's.
CLIENT_NAMES = ("shop", "warehouse", "analyst", "fraud-desk", "operator", "data-protection")
SERVING_SECONDS_MAX = 60
STOP_SECONDS_MAX = 30  # as Kubernetes gives a pod: for callers, workers, and leave of its servers
MIGRATION_SECONDS_MAX = 120
RESTARTS_MAX = 5
RESTARTS_WINDOW_SECONDS = 60


@dataclass
class Pod:
    """One process of a service. Its ports stay the same through restarts; its pid is that of the last process."""

    name: str
    service: Service
    port: int
    metrics_port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = False  # whether the watch restarts it when it dies
    restarts: deque[float] = field(default_factory=deque)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def metrics_address(self) -> str:
        return f"127.0.0.1:{self.metrics_port}"

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """The pods of `services` on a stack that runs, each in `role`. `say` is called from several threads.

    With an `authority` all speak TLS, by certificates that it issues; `tls_directory` has the one for clients.
    `code` is the checkout that a pod runs when it is started next; another one has its own `.venv`. So a release and
    the one before it are run together. What it writes is in the stack's root, or in `root`, where several share one.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        services: Sequence[Service] = SERVICES,
        role: str = "all",
        authority: Authority | None = None,
        code: Path = REPOSITORY,
        root: Path | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.code = code
        self._stack = stack
        self._role = role
        self._services = services
        self._root = root or stack.root
        self._log = self._root / "log"
        self._say = say
        self._certificates: dict[str, Path] = {}
        self.tls_directory = ""
        if authority:
            place = self._root / "tls"
            self._certificates = {one.name: authority.issue(place / one.name, one.name) for one in services}
            self.tls_directory = str(authority.issue(place / "client", *CLIENT_NAMES))
        self._leash: Leash | None = None
        self._guard = threading.RLock()  # one change of a pod's process at a time
        self._stopping = threading.Event()
        self._watch: threading.Thread | None = None
        self.pods: list[Pod] = []
        self.endpoints_file = self._root / "endpoints.json"

    def start(self) -> Self:
        """Prepare the stack, migrate, start all pods side by side, and return when every one is SERVING.

        Raises StackError with the last lines of the log of what failed; then no pod runs.
        """
        self._stopping.clear()
        self._log.mkdir(exist_ok=True)
        self._leash = Leash()
        ports = iter(free_ports(2 * sum(service.pods for service in self._services)))
        self.pods = [
            Pod(name, service, next(ports), next(ports), self._log / f"{name}.log")
            for service in self._services
            for name in (f"{service.name}-{ordinal}" for ordinal in range(service.pods))
        ]
        try:
            self._stack.databases(*(service.database for service in self._services))
            self._stack.create_topics(*TOPICS)
            with ThreadPoolExecutor(len(self.pods)) as pool:
                list(pool.map(self.migrate, self._services))
                for pod in self.pods:
                    pod.log.unlink(missing_ok=True)
                list(pool.map(self._bring_up, self.pods))
        except BaseException:
            self.stop()
            raise
        self._write_endpoints()
        self._watch = threading.Thread(target=self.watch, name="watch", daemon=True)
        self._watch.start()
        return self

    def stop(self) -> None:
        """SIGTERM to every pod at once; who has not drained after STOP_SECONDS_MAX is killed. Harmless twice."""
        self._stopping.set()
        if self._watch:
            self._watch.join()
            self._watch = None
        if self.pods:
            with ThreadPoolExecutor(len(self.pods)) as pool:
                list(pool.map(self._end, self.pods))
        self.endpoints_file.unlink(missing_ok=True)
        if self._leash:
            self._leash.close()
            self._leash = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def targets(self) -> dict[str, str]:
        """The gRPC target of each service: all its pods, as `ipv4:127.0.0.1:p1,127.0.0.1:p2`."""
        return {
            service.name: "ipv4:" + ",".join(pod.address for pod in self.pods if pod.service is service)
            for service in self._services
        }

    def pod(self, name: str) -> Pod:
        """The pod of that name; KeyError if there is none."""
        for pod in self.pods:
            if pod.name == name:
                return pod
        raise KeyError(name)

    # -- one pod ------------------------------------------------------------------------------------------------

    def terminate(self, pod: Pod) -> int:
        """SIGTERM, wait until it has drained (at most STOP_SECONDS_MAX, then SIGKILL), and answer its exit code.

        It stays down until restart().
        """
        with self._guard:
            return self._end(pod)

    def kill(self, pod: Pod) -> None:
        """SIGKILL, as a crash would; it stays down until restart()."""
        with self._guard:
            pod.wanted = False
            if pod.process:
                pod.process.kill()
                pod.process.wait()

    def restart(self, pod: Pod) -> None:
        """Terminate it if it runs, start it on its port, and return when it is SERVING."""
        with self._guard:
            self._end(pod)
            self._bring_up(pod)
            self._write_endpoints()

    def watch(self) -> None:
        """Restart pods that die by themselves, until stop(); start() runs this in a thread.

        A pod that needed RESTARTS_MAX restarts within RESTARTS_WINDOW_SECONDS and dies again stays down.
        """
        while not self._stopping.wait(0.2):
            for pod in self.pods:
                with self._guard:
                    if pod.wanted and not pod.running:
                        self._revive(pod)

    def _revive(self, pod: Pod) -> None:
        now = time.monotonic()
        while pod.restarts and now - pod.restarts[0] > RESTARTS_WINDOW_SECONDS:
            pod.restarts.popleft()
        code = pod.process.returncode if pod.process else None
        if len(pod.restarts) >= RESTARTS_MAX:
            pod.wanted = False
            self._say(f"{pod.name} ended with code {code} once too often and stays down:\n{tail(pod.log)}")
            return
        pod.restarts.append(now)
        self._say(f"{pod.name} ended with code {code}: restarting it")
        self.spawn(pod)
        self._write_endpoints()

    def _bring_up(self, pod: Pod) -> None:
        began = time.monotonic()
        process = self.spawn(pod)
        with self._channel(pod) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            while True:
                if process.poll() is not None:
                    raise StackError(
                        f"{pod.name} ended with code {process.returncode} before it served; "
                        f"its last lines:\n{tail(pod.log)}"
                    )
                with suppress(grpc.RpcError):
                    if stub.Check(health_pb2.HealthCheckRequest(), timeout=1).status == serving:
                        break
                if time.monotonic() - began > SERVING_SECONDS_MAX:
                    raise StackError(
                        f"{pod.name} did not serve within {SERVING_SECONDS_MAX} s; its last lines:\n{tail(pod.log)}"
                    )
                if self._stopping.wait(0.05):
                    raise StackError(f"the start of {pod.name} was abandoned")
        pod.wanted = True
        self._say(f"{pod.name} serving on {pod.address} ({time.monotonic() - began:.1f} s)")

    def _channel(self, pod: Pod) -> grpc.Channel:
        if not self.tls_directory:
            return grpc.insecure_channel(pod.address)
        return grpc.secure_channel(pod.address, tls.channel_credentials(tls.watch(self.tls_directory).current()))

    def spawn(self, pod: Pod) -> subprocess.Popen[bytes]:
        """Start the process of a pod, which may be none of `pods`, and do not wait until it serves."""
        if self._leash is None:
            raise StackError("the supervisor is not started")
        pod.process = self._leash.spawn(
            self.command(pod),
            log=pod.log,
            cwd=self.code,
            env=self.environment(pod.service)
            | {
                "HOLDFAST_LISTEN": pod.address,
                "HOLDFAST_METRICS_LISTEN": pod.metrics_address,
                "HOLDFAST_POD": pod.name,
            }
            | {f"HOLDFAST_{name.upper()}_TARGET": self.targets[name] for name in pod.service.calls},
        )
        return pod.process

    def _end(self, pod: Pod) -> int:
        pod.wanted = False
        if pod.process is None:
            return 0
        pod.process.terminate()
        try:
            return pod.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._say(f"{pod.name} did not stop within {STOP_SECONDS_MAX} s: killed")
            pod.process.kill()
            return pod.process.wait()

    def command(self, pod: Pod) -> list[str]:
        """The program of a pod, and its arguments."""
        return [_python(self.code), "-m", pod.service.module, "--role", self._role]

    # -- around them --------------------------------------------------------------------------------------------

    def environment(self, service: Service) -> dict[str, str]:
        """The environment every program of a service gets: this process's own, and where the stack is."""
        own = {"HOLDFAST_SUBJECT_KEYS": self._subject_keys()} if service.name == "reservation" else {}
        secure = {}
        if self._certificates:
            directory, table = self._certificates[service.name], ACCESS_FILE
            secure = {"HOLDFAST_TLS_DIRECTORY": str(directory), "HOLDFAST_ACCESS_FILE": str(table)}
        if self._stack.citus_dsn:
            own |= {"HOLDFAST_CITUS_DSN": self._stack.citus_dsn, "HOLDFAST_CITUS_SHARD_COUNT": str(CITUS_SHARDS)}
        return (
            own
            | os.environ
            | secure
            | dict(service.settings)
            | {
                "HOLDFAST_DATABASE_DSN": self._stack.postgres_dsn(service.database),
                "HOLDFAST_REDIS_URL": self._stack.redis_url,
                "HOLDFAST_KAFKA_BOOTSTRAP": self._stack.kafka_bootstrap,
                "HOLDFAST_NOTIFICATION_DIRECTORY": str(self._stack.root / "notifications"),
                "HOLDFAST_NOTIFY_MINUTE_MESSAGES_MAX": "6000",
                "HOLDFAST_WEBHOOK_PRIVATE": "true",
                "PYTHONUNBUFFERED": "1",
            }
        )

    def _subject_keys(self) -> str:
        """The key of reservation's hashes, made at the first start on this root and kept with its data."""
        file = self._stack.root / "subject.keys"
        with (
            suppress(FileExistsError),
            os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new,
        ):
            new.write(f"k1={base64.b64encode(secrets.token_bytes(32)).decode()}\n")
        return file.read_text().strip()

    def migrate(self, service: Service, phase: str = "all", code: Path | None = None) -> None:
        """Run the migrations of a phase: those of a checkout, or of the one that pods run. Raises StackError."""
        code = code or self.code
        distributed = ["--distributed"] if self._stack.citus_dsn else []
        if self._leash is None:
            raise StackError("the supervisor is not started")
        log = self._log / f"migrate-{service.name}.log"
        log.unlink(missing_ok=True)
        began = time.monotonic()
        process = self._leash.spawn(
            [_python(code), "-m", "shared.migrate", service.name, "--phase", phase, *distributed],
            log=log,
            cwd=code,
            env=self.environment(service),
        )
        while process.poll() is None:
            late = time.monotonic() - began > MIGRATION_SECONDS_MAX
            if late or self._stopping.wait(0.02):
                process.kill()
                process.wait()
                why = f"took more than {MIGRATION_SECONDS_MAX} s" if late else "was abandoned"
                raise StackError(f"the migration of {service.name} {why}")
        if process.returncode:
            raise StackError(f"the migration of {service.name} failed; its last lines:\n{tail(log)}")
        self._say(f"{service.name} migrated ({time.monotonic() - began:.1f} s)")

    def _write_endpoints(self) -> None:
        """Say where everything is, for other programs; replaced whole, so that a reader never sees half of it."""
        content = {
            "targets": self.targets,
            "metrics": {pod.name: f"http://{pod.metrics_address}/metrics" for pod in self.pods},
            "dsns": {service.name: self._stack.postgres_dsn(service.database) for service in self._services},
            "redis": self._stack.redis_url,
            "kafka": self._stack.kafka_bootstrap,
            "tls_directory": self.tls_directory,
            "pids": {"supervisor": os.getpid()}
            | self._stack.pids
            | {pod.name: pod.pid for pod in self.pods if pod.running},
        }
        unfinished = self.endpoints_file.with_suffix(".new")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(self.endpoints_file)


def _python(code: Path) -> str:
    return sys.executable if code == REPOSITORY else str(code / ".venv" / "bin" / "python")
