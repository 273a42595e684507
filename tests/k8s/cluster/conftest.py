"""Holdfast deployed to the cluster of KUBECONFIG, from the image HOLDFAST_IMAGE, which its nodes have.

Where a node's address is one of this machine, PostgreSQL, Redis and Kafka run here, outside the cluster, and the pods
reach them through `external-backends`; elsewhere (kind) the component `backends` runs them in the cluster.

All speak TLS by the component `tls`; an authority of the test's own stands for cert-manager, so that none is needed.
"""

import json
import os
import queue
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import pytest
import yaml

from deploy.local.certificates import Authority
from deploy.local.stack import Stack
from shared.tls import FILES
from tests.k8s.manifests import ROOT

KUBECTL = shutil.which("kubectl") or "kubectl"
NAMESPACE = "holdfast"
T = TypeVar("T")
SERVICES = ("inventory", "reservation", "analytics")
# Whose certificates there are, and for which names: a pod of customers has the roles of a shop and of a warehouse.
NAMES = {service: (f"{service}.{NAMESPACE}.svc.cluster.local", service) for service in SERVICES} | {
    "shopper": ("shop", "warehouse")
}
WORKLOADS = [f"deployment/{service}{role}" for service in SERVICES for role in ("", "-worker")]
CONNECTION_AGE_SECONDS = 10
ROLLOUT_SECONDS_MAX = 300
SHOPPER = Path(__file__).with_name("shopper.py").read_text()
TRIAL_KEY = "k1=AAAAAAAAAAAAAAAAAAAAAA=="


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests need a cluster, and are asked for by naming one."""
    missing = [name for name in ("KUBECONFIG", "HOLDFAST_IMAGE") if not os.environ.get(name)]
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(600))
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"{' and '.join(missing)} not set: see `make k8s-test`"))


def kubectl(*words: str, content: str | None = None, check: bool = True) -> str:
    """Run kubectl in the namespace and return what it prints; AssertionError with what it says went wrong."""
    done = subprocess.run(
        [KUBECTL, "-n", NAMESPACE, *words],
        input=content, check=False, capture_output=True, text=True, timeout=ROLLOUT_SECONDS_MAX + 60,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
    return done.stdout if check else done.stdout + done.stderr


def get(*words: str) -> Any:
    """Objects as kubectl gives them."""
    return json.loads(kubectl("get", *words, "-o", "json"))


def pods(service: str, role: str = "api") -> list[Any]:
    """The pods of a service that are not being deleted."""
    selector = f"app.kubernetes.io/name={service},app.kubernetes.io/component={role}"
    return [pod for pod in get("pods", "-l", selector)["items"] if "deletionTimestamp" not in pod["metadata"]]


def ready(pod: Any) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))


def names(found: list[Any]) -> set[str]:
    return {pod["metadata"]["name"] for pod in found}


def rolled_out() -> None:
    """Wait until every Deployment is what its manifest says."""
    for workload in WORKLOADS:
        kubectl("rollout", "status", workload, f"--timeout={ROLLOUT_SECONDS_MAX}s")


def eventually(look: Callable[[], T], seconds_max: float = 60) -> T:
    """What `look` returns, as soon as that is true."""
    deadline = time.monotonic() + seconds_max
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds_max} s"
        time.sleep(0.5)
    return found


class Shopping:
    """Customers in a pod of their own, who reserve and confirm until they are told to stop."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process = process
        self._errors = errors
        self._reports: queue.Queue[Any] = queue.Queue()
        self._lines: list[Any] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """All that comes, as it comes: a full pipe would hold the customers up."""
        assert self._process.stdout
        for line in self._process.stdout:
            self._reports.put(json.loads(line))
        self._reports.put(None)

    def look(self) -> Any:
        """The next report: calls made, errors, and answers by pod, in half a second."""
        report = self._reports.get(timeout=60)
        assert report, f"the shopper ended: {self._said()}"
        self._lines.append(report)
        return report

    def stop(self) -> dict[str, Any]:
        """All of it together."""
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(60) == 0, self._said()
        self._reader.join()
        while report := self._reports.get():
            self._lines.append(report)
        answers: Counter[str] = Counter()
        for line in self._lines:
            answers.update(line["pods"])
        return {
            "made": sum(line["made"] for line in self._lines),
            "failed": [error for line in self._lines for error in line["failed"]],
            "pods": dict(answers),
        }

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


@contextmanager
def shopping() -> Iterator[Shopping]:
    """Calls from the client's pod while the block runs."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [KUBECTL, "-n", NAMESPACE, "exec", "-i", "shopper", "--", "python", "-c", SHOPPER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            shoppers = Shopping(process, errors)
            shoppers.look()
            yield shoppers
        finally:
            process.kill()
            process.wait()


def _is_here(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _overlay(image: str, host: str, ports: dict[str, int]) -> dict[str, Any]:
    """A kustomization: an overlay's parts, few pods, the migrations not yet let go, and connections that age soon."""
    k8s = "../../deploy/k8s"
    name, _, tag = image.rpartition(":")
    inside = "holdfast:local@postgres"
    dsn = f"postgresql://{'holdfast@postgres' if ports else inside}:5432"
    secrets = {service: [f"database-dsn={dsn}/{service}"] for service in SERVICES} | {"postgres": ["password=local"]}
    secrets["reservation"].append(f"subject-keys={TRIAL_KEY}")
    certificates = [
        {
            "name": f"{owner}-tls",
            "files": [f"{owner}/{file}" for file in FILES],
            "options": {"disableNameSuffixHash": True},
        }
        for owner in NAMES
    ]

    def patch(kind: str, *steps: dict[str, Any], **target: str) -> dict[str, Any]:
        return {"target": {"kind": kind, **target}, "patch": json.dumps(steps)}

    def replace(path: str, value: Any) -> dict[str, Any]:
        return {"op": "replace", "path": path, "value": value}

    outside = [
        patch("EndpointSlice", replace("/endpoints/0/addresses/0", host), replace("/ports/0/port", port), name=backend)
        for backend, port in ports.items()
    ]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": [f"{k8s}/base"],
        "components": [
            f"{k8s}/components/{'external-backends' if ports else 'backends'}",
            f"{k8s}/components/tls",
            f"{k8s}/release",
        ],
        "images": [{"name": "holdfast", "newName": name, "newTag": tag}],
        "configMapGenerator": [
            {
                "name": "holdfast",
                "behavior": "merge",
                "literals": [
                    f"HOLDFAST_CONNECTION_AGE_SECONDS_MAX={CONNECTION_AGE_SECONDS}",
                ],
            }
        ],
        "secretGenerator": [
            {"name": secret, "literals": literals, "options": {"disableNameSuffixHash": True}}
            for secret, literals in secrets.items()
        ]
        + certificates,
        "patches": [
            *outside,
            {"target": {"kind": "Certificate"}, "patch": "$patch: delete\nkind: Certificate\nmetadata: {name: any}"},
            patch("Deployment", replace("/spec/template/spec/containers/0/resources/requests/cpu", "100m")),
            patch("Deployment", replace("/spec/replicas", 1), labelSelector="app.kubernetes.io/component=worker"),
            patch("HorizontalPodAutoscaler", replace("/spec/metrics/0/resource/target/averageUtilization", 100_000)),
            patch(
                "Job",
                {"op": "add", "path": "/spec/suspend", "value": True},
                replace("/spec/template/spec/containers/3/args", ["shared.topics"]),
            ),
        ],
    }


def _client(image: str) -> str:
    """A pod for calls from inside the cluster, as locked down as the others."""
    wait = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit()); signal.pause()"
    limits = {"cpu": "1", "memory": "512Mi"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "shopper", "labels": {"holdfast-client": "true"}},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "fsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "tls", "secret": {"secretName": "shopper-tls", "defaultMode": 0o440}}],
            "containers": [
                {
                    "name": "shopper",
                    "image": image,
                    "command": ["python", "-c", wait],
                    "volumeMounts": [{"name": "tls", "mountPath": "/etc/holdfast/tls"}],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": limits},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                        "readOnlyRootFilesystem": True,
                    },
                }
            ],
        },
    }
    return json.dumps(pod)


def _erase() -> None:
    for kind in ("namespace", "priorityclass"):
        kubectl("delete", kind, NAMESPACE, "--ignore-not-found", "--timeout=120s")


@pytest.fixture(scope="session")
def backends() -> Iterator[tuple[str, dict[str, int]]]:
    """The address and ports of backends that run here, or none where the cluster cannot reach this machine."""
    addresses = get("nodes")["items"][0]["status"]["addresses"]
    host = next(one["address"] for one in addresses if one["type"] == "InternalIP")
    if not _is_here(host):
        yield "", {}
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-k8s-") as root:
        stack = Stack(Path(root), host=host)
        with stack.start():
            stack.databases(*SERVICES)
            urls = {"postgres": stack.postgres_dsn(""), "redis": stack.redis_url, "kafka": f"//{stack.kafka_bootstrap}"}
            yield host, {name: urlsplit(url).port or 0 for name, url in urls.items()}
        stack.erase()


@pytest.fixture(scope="session")
def overlay(backends: tuple[str, dict[str, int]]) -> Iterator[Path]:
    """The kustomization of this test, applied; the migrations wait to be let go."""
    assert not get("namespaces", f"--field-selector=metadata.name={NAMESPACE}")["items"], (
        f"the cluster has a namespace {NAMESPACE}, which this test makes and deletes: delete it first"
    )
    image = os.environ["HOLDFAST_IMAGE"]
    (ROOT / ".local").mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=ROOT / ".local", prefix="k8s-") as name:
            path = Path(name)
            authority = Authority()
            for owner, known in NAMES.items():
                authority.issue(path / owner, *known)
            (path / "kustomization.yaml").write_text(yaml.safe_dump(_overlay(image, *backends)))
            kubectl("apply", "-k", str(path))
            kubectl("apply", "-f", "-", content=_client(image))
            yield path
    finally:
        if not os.environ.get("HOLDFAST_KEEP"):
            _erase()


@pytest.fixture(scope="session")
def deployed(overlay: Path) -> Path:
    """Everything rolled out."""
    for job in get("jobs")["items"]:
        kubectl("patch", "job", job["metadata"]["name"], "--type=merge", "-p", '{"spec": {"suspend": false}}')
    rolled_out()
    kubectl("wait", "--for=condition=Ready", "pod/shopper", "--timeout=60s")
    return overlay
