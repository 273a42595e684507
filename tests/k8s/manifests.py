"""Builds kustomizations, and asks what is in them."""

import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
MISSING = (
    "neither kubectl nor kustomize is on the PATH: install kubectl 1.27 or newer (kubernetes.io/docs/tasks/tools), or"
    " `go install sigs.k8s.io/kustomize/kustomize/v5@v5.6.0`"
)
SERVERS = ("api", "worker")
Object = dict[str, Any]


class Pod(NamedTuple):
    """A pod as a workload makes it."""

    owner: Object
    labels: Mapping[str, str]
    spec: Object

    @property
    def name(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def service(self) -> str:
        return self.labels["app.kubernetes.io/name"]

    @property
    def containers(self) -> Sequence[Object]:
        """All of its containers, those that run first included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def command() -> list[str] | None:
    """The program that builds a kustomization, or None where there is none."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return None


@functools.cache
def build(path: Path) -> tuple[Object, ...]:
    """The objects of a kustomization. Raises AssertionError with what kustomize says is wrong."""
    program = command()
    assert program, MISSING
    done = subprocess.run([*program, str(path)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(one for one in yaml.safe_load_all(done.stdout) if one)


def of(objects: Sequence[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind by their names."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """What pods there will be."""
    for one in objects:
        if one["kind"] in {"Deployment", "StatefulSet", "Job"}:
            template = one["spec"]["template"]
            yield Pod(one, template["metadata"]["labels"], template["spec"])


def holdfast(objects: Sequence[Object]) -> list[Pod]:
    """The pods that run Holdfast's own image."""
    return [pod for pod in pods(objects) if pod.labels.get("app.kubernetes.io/part-of") == "holdfast"]


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes a pod."""
    operators = {
        "In": lambda expression: labels.get(expression["key"]) in expression["values"],
        "NotIn": lambda expression: labels.get(expression["key"]) not in expression["values"],
        "Exists": lambda expression: expression["key"] in labels,
    }
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        operators[expression["operator"]](expression) for expression in selector.get("matchExpressions", [])
    )


def variables(objects: Sequence[Object], container: Object) -> dict[str, str | None]:
    """The environment of a container: values, or None where a Secret or the pod gives it."""
    maps = of(objects, "ConfigMap")
    found: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]["data"]
    for variable in container.get("env", []):
        optional = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("optional")
        if not optional:
            found[variable["name"]] = variable.get("value")
    return found
