"""Holdfast on real pods: migrated before it serves, found by name, and changed under way without a failed call.

`make k8s-test` runs it. The tests follow each other on one deployment.
"""

import functools
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.cluster.conftest import (
    CONNECTION_AGE_SECONDS,
    NAMESPACE,
    ROLLOUT_SECONDS_MAX,
    SERVICES,
    WORKLOADS,
    eventually,
    get,
    kubectl,
    names,
    pods,
    ready,
    rolled_out,
    shopping,
)

# How late a new pod may be found (docs/kubernetes.md, How pods are found): the age of a connection with its jitter of a
# tenth, the least time between two looks at DNS, and what a name server may keep an answer.
FOUND_SECONDS_MAX = CONNECTION_AGE_SECONDS * 1.1 + 5 + 30
ROLES = [(service, role) for service in SERVICES for role in ("api", "worker")]


def run(pod: str, code: str) -> Any:
    """What Python code prints in a pod of Holdfast, as JSON."""
    return json.loads(kubectl("exec", pod, "-c", "holdfast", "--", "python", "-c", code))


def evict(pod: str) -> str:
    """Ask for an eviction; what the cluster answers."""
    asked = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    return kubectl("create", "--raw", path, "-f", "-", content=json.dumps(asked), check=False)


def scale(service: str, least: int) -> None:
    """Say how many pods there are at least, to whom scales."""
    kubectl("patch", "hpa", service, "--type=merge", "-p", json.dumps({"spec": {"minReplicas": least}}))


def served(service: str, count: int) -> set[str]:
    """The names of a service's pods, once so many are ready and no other is there."""
    return eventually(
        lambda: names(found) if len(found := pods(service)) == count and all(map(ready, found)) else set(),
        ROLLOUT_SECONDS_MAX,
    )


@pytest.mark.usefixtures("overlay")
def test_no_pod_serves_before_its_migrations() -> None:
    """While the Job is held back every pod waits in `schema`, and no Service has an address."""

    def waits(service: str, role: str) -> bool:
        said = [
            kubectl("logs", pod, "-c", "schema", check=False) == f"waiting for the pre migrations of {service}\n"
            for pod in names(pods(service, role))
        ]
        return bool(said) and all(said)

    for service, role in ROLES:
        eventually(functools.partial(waits, service, role), ROLLOUT_SECONDS_MAX)
    for service, role in ROLES:
        assert not [pod for pod in pods(service, role) if ready(pod)]
    for service in SERVICES:
        slices = get("endpointslices", "-l", f"kubernetes.io/service-name={service}")["items"]
        assert not [one for part in slices for one in part["endpoints"] or [] if one["conditions"]["ready"]]


@pytest.mark.usefixtures("deployed")
def test_everything_rolls_out_once_migrated() -> None:
    """The Job completes, every probe is green, nothing started twice, and no pod was ready before its database was."""
    (job,) = get("jobs")["items"]
    assert [one["type"] for one in job["status"]["conditions"] if one["status"] == "True"][-1] == "Complete"
    (migration,) = get("pods", "-l", "app.kubernetes.io/component=migration")["items"]
    done = {status["name"]: status["state"]["terminated"] for status in migration["status"]["containerStatuses"]}
    assert {one["exitCode"] for one in done.values()} == {0}
    for service, role in ROLES:
        for pod in pods(service, role):
            assert ready(pod)
            (status,) = pod["status"]["containerStatuses"]
            assert status["started"]
            assert status["restartCount"] == 0, status
            served_at = next(one for one in pod["status"]["conditions"] if one["type"] == "Ready")["lastTransitionTime"]
            assert datetime.fromisoformat(served_at) >= datetime.fromisoformat(done[service]["finishedAt"])


@pytest.mark.usefixtures("deployed")
def test_calls_are_spread_over_the_pods_of_a_headless_name() -> None:
    """Each pod of both services answers its part of the calls from a pod that knows only the names."""
    expected = served("inventory", 2) | served("reservation", 2)
    with shopping() as shoppers:
        for _ in range(20):
            shoppers.look()
        seen = shoppers.stop()
    print(seen)
    assert seen["failed"] == []
    assert set(seen["pods"]) == expected
    for service in ("inventory", "reservation"):
        answers = [count for pod, count in seen["pods"].items() if pod.startswith(f"{service}-")]
        assert min(answers) > 0.3 * sum(answers), answers


@pytest.mark.usefixtures("deployed")
def test_a_new_pod_is_found_in_time() -> None:
    """After scaling up, a client that is connected calls the new pods too, within the documented time."""
    before = {service: served(service, 2) for service in ("inventory", "reservation")}
    with shopping() as shoppers:
        for service in before:
            scale(service, 3)
        new = {(served(service, 3) - before[service]).pop(): time.monotonic() for service in before}
        found: dict[str, float] = {}
        while len(found) < len(new):
            for pod in set(shoppers.look()["pods"]) & set(new) - set(found):
                found[pod] = max(0, time.monotonic() - new[pod])
            assert all(time.monotonic() - since < FOUND_SECONDS_MAX for pod, since in new.items() if pod not in found)
        print({pod: f"found {seconds:.1f} s after it was ready" for pod, seconds in found.items()})
        seen = shoppers.stop()
    assert seen["failed"] == []


@pytest.mark.usefixtures("deployed")
def test_a_rolling_restart_fails_no_call() -> None:
    """Every pod of both services is replaced while calls go on."""
    before = names(pods("inventory") + pods("reservation"))
    with shopping() as shoppers:
        kubectl("rollout", "restart", *WORKLOADS[:4])
        rolled_out()
        for _ in range(5):
            shoppers.look()
        seen = shoppers.stop()
    print({"calls": seen["made"], "answers by pod": seen["pods"]})
    assert seen["failed"] == []
    after = names(pods("inventory") + pods("reservation"))
    assert not before & after
    assert set(seen["pods"]) & before
    assert set(seen["pods"]) & after


@pytest.mark.usefixtures("deployed")
def test_deleting_pods_fails_no_call() -> None:
    """One pod of each service is deleted while calls go on."""
    victims = [min(names(pods(service))) for service in ("inventory", "reservation")]
    with shopping() as shoppers:
        for pod in victims:
            kubectl("delete", "pod", pod, "--wait=true")
        rolled_out()
        for _ in range(5):
            shoppers.look()
        seen = shoppers.stop()
    print({"calls": seen["made"], "answers by pod": seen["pods"]})
    assert seen["failed"] == []
    assert not set(victims) & names(pods("inventory") + pods("reservation"))


@pytest.mark.usefixtures("deployed")
def test_the_budget_refuses_an_eviction_too_many() -> None:
    """One pod may go; the next only when another has taken its place."""
    first, second, _third = sorted(served("reservation", 3))
    assert "Success" in evict(first)
    assert "disruption budget" in evict(second)
    served("reservation", 3)


@pytest.mark.usefixtures("deployed")
def test_pods_are_locked_down_where_they_run() -> None:
    """No root, no writing but to /tmp, no capability, no new privileges, system calls filtered, no token."""
    code = """
import errno, json, os, pathlib
def write(place):
    try:
        pathlib.Path(place, "x").write_text("x")
    except OSError as error:
        return errno.errorcode[error.errno]
    return "written"
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "root": write("/"), "code": write("/opt/holdfast"), "tmp": write("/tmp"),
    "capabilities": int(status["CapEff"], 16), "no_new_privs": status["NoNewPrivs"].strip(),
    "seccomp": status["Seccomp"].strip(), "token": os.path.exists("/var/run/secrets/kubernetes.io"),
}))
"""
    for service, role in ROLES:
        assert run(pods(service, role)[0]["metadata"]["name"], code) == {
            "uid": 10001, "gid": 10001, "root": "EROFS", "code": "EROFS", "tmp": "written",
            "capabilities": 0, "no_new_privs": "1", "seccomp": "2", "token": False,
        }  # fmt: skip


@pytest.mark.usefixtures("deployed")
def test_logs_are_one_object_a_line() -> None:
    """Each names its pod, and says that it serves."""
    for service, role in ROLES:
        name = pods(service, role)[0]["metadata"]["name"]
        lines = [json.loads(line) for line in kubectl("logs", name, "-c", "holdfast").splitlines()]
        assert "serving" in {line["event"] for line in lines}
        assert {line["pod"] for line in lines if "pod" in line} == {name}


@pytest.mark.usefixtures("deployed")
def test_metrics_are_read_from_another_pod() -> None:
    """Prometheus finds the calls in flight on every pod's port 9464."""
    code = """
import sys, urllib.request
print(urllib.request.urlopen(f"http://{sys.argv[1]}:9464/metrics", timeout=5).read().decode())
"""
    for service, role in ROLES:
        for pod in pods(service, role):
            address = pod["status"]["podIP"]
            assert "\nholdfast_calls_in_flight " in kubectl("exec", "shopper", "--", "python", "-c", code, address)


@pytest.mark.usefixtures("deployed")
def test_nobody_comes_in_without_a_certificate() -> None:
    """A pod that knows the name and shows none is let in nowhere."""
    code = """
import grpc, sys
from grpc_health.v1 import health_pb2, health_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        print("let in")
    except grpc.RpcError as error:
        print(error.code().name)
"""
    for service in SERVICES:
        target = f"dns:///{service}.{NAMESPACE}.svc.cluster.local:50051"
        assert kubectl("exec", "shopper", "--", "python", "-c", code, target) == "UNAVAILABLE\n"


@pytest.mark.usefixtures("deployed")
def test_the_scaler_reacts() -> None:
    """With a target that any pod is over, the scaler adds pods up to its most."""
    if "error" in kubectl("get", "--raw", "/apis/metrics.k8s.io/v1beta1/nodes", check=False).lower():
        pytest.skip("the cluster has no metrics server")
    most = 4
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 1}},
    }
    patch = {"spec": {"maxReplicas": most, "metrics": [metric]}}
    with shopping() as shoppers:
        kubectl("patch", "hpa", "inventory", "--type=merge", "-p", json.dumps(patch))
        served("inventory", most)
        seen = shoppers.stop()
    scaler = get("hpa", "inventory")
    print(scaler["status"]["currentMetrics"], scaler["status"]["desiredReplicas"])
    assert scaler["status"]["currentMetrics"][0]["resource"]["current"]["averageUtilization"] > 1
    assert seen["failed"] == []


def test_a_setting_changed_rolls_the_pods_and_leaves_the_job(deployed: Path) -> None:
    """Applied again with another value: the pods are new, the Job is the same, and no call fails."""
    file = deployed / "kustomization.yaml"
    overlay = yaml.safe_load(file.read_text())
    overlay["configMapGenerator"][0]["literals"].append("HOLDFAST_LOG_LEVEL=warning")
    for patch in overlay["patches"]:
        patch["patch"] = patch["patch"].replace('"/spec/suspend", "value": true', '"/spec/suspend", "value": false')
    file.write_text(yaml.safe_dump(overlay))
    job, before = get("jobs")["items"][0], names(pods("reservation"))
    with shopping() as shoppers:
        kubectl("apply", "-k", str(deployed))
        rolled_out()
        seen = shoppers.stop()
    assert seen["failed"] == []
    assert get("jobs")["items"][0]["metadata"]["uid"] == job["metadata"]["uid"]
    assert not before & names(pods("reservation"))
