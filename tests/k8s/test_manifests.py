"""What is deployed to Kubernetes is whole, locked down, and says nothing that the code does not read."""

import importlib
import re
from pathlib import Path

import kubernetes_validate
import pytest
from pydantic_settings import BaseSettings

from deploy.local.certificates import Authority
from shared.settings import DistributionSettings, Settings
from tests.k8s import manifests
from tests.k8s.manifests import K8S, SERVERS, Object, Pod, holdfast, matches, of, pods, variables

pytestmark = pytest.mark.skipif(manifests.command() is None, reason=manifests.MISSING)

OVERLAYS = ("local", "production", "distributed")
SERVICES = ("inventory", "reservation", "analytics")
# The oldest and the newest Kubernetes that are supported.
VERSIONS = ("1.33", "1.36")
# Kinds that are not Kubernetes' own: their shape is checked by tests of their own below.
CUSTOM = {"Certificate", "PodMonitor", "PrometheusRule"}


def environment(settings: type[BaseSettings]) -> set[str]:
    return {f"HOLDFAST_{name.upper()}" for name in settings.model_fields}


def settings_of(service: str) -> type[Settings]:
    settings: type[Settings] = importlib.import_module(f"services.{service}.settings").Settings
    return settings


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def objects(overlay: str) -> list[Object]:
    """What an overlay applies, before and after the pods have rolled out."""
    return [*manifests.build(K8S / "overlays" / overlay), *manifests.build(K8S / "overlays" / overlay / "post")]


@pytest.fixture
def production() -> list[Object]:
    return list(manifests.build(K8S / "overlays" / "production"))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_of_its_schema(objects: list[Object], version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error, as is a kind that nobody has listed."""
    for one in objects:
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


def test_objects_stand_once_and_in_the_namespace(objects: list[Object]) -> None:
    """No two objects have one name, and all but those of the whole cluster are in the namespace."""
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    outside = {one["kind"] for one in objects if one["metadata"].get("namespace") != "holdfast"}
    assert outside == {"Namespace", "PriorityClass"}


def test_every_pod_is_locked_down(objects: list[Object]) -> None:
    """Numeric user, read-only root, no privileges, no capabilities, no token, the runtime's seccomp profile."""
    for pod in pods(objects):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"], pod.name
        assert context["runAsUser"] > 0, pod.name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert pod.spec["automountServiceAccountToken"] is False, pod.name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.name
        for container in pod.containers:
            inner = container["securityContext"]
            assert inner["readOnlyRootFilesystem"], pod.name
            assert inner["allowPrivilegeEscalation"] is False, pod.name
            assert inner["capabilities"] == {"drop": ["ALL"]}, pod.name
        for volume in pod.spec.get("volumes", []):
            assert set(volume) - {"name"} <= {"emptyDir", "configMap", "secret"}, pod.name
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], pod.name


def test_every_container_is_bounded(objects: list[Object]) -> None:
    """Each says what CPU and memory it needs and what is the most."""
    for pod in pods(objects):
        for container in pod.containers:
            for side in ("requests", "limits"):
                assert set(container["resources"][side]) == {"cpu", "memory"}, pod.name


def test_every_image_has_a_version(objects: list[Object]) -> None:
    """A tag that is not `latest`; Holdfast's own is the same everywhere."""
    own = set()
    for pod in pods(objects):
        for container in pod.containers:
            name, _, tag = container["image"].rpartition(":")
            assert name, f"{pod.name}: {container['image']} has no tag"
            assert tag != "latest", pod.name
            if name.rpartition("/")[2] == "holdfast":
                own.add(container["image"])
    assert len(own) == 1


def test_jobs_and_labels_carry_the_release(objects: list[Object]) -> None:
    """A Job's name ends with the version, so that each release has its own; every pod is labelled with it."""
    jobs = [pod for pod in holdfast(objects) if pod.owner["kind"] == "Job"]
    release = jobs[0].spec["containers"][0]["image"].rpartition(":")[2]
    assert {pod.name for pod in jobs} == {f"Job migrate-pre-{release}", f"Job migrate-post-{release}"}
    for pod in holdfast(objects):
        assert pod.labels["app.kubernetes.io/version"] == release, pod.name


def test_a_job_follows_no_hash(objects: list[Object]) -> None:
    """What a Job refers to keeps its name when its content changes: a Job cannot be changed after it."""
    for pod in holdfast(objects):
        if pod.owner["kind"] == "Job":
            for container in pod.spec["containers"]:
                maps = {one["configMapRef"]["name"] for one in container.get("envFrom", [])}
                secrets = {one["valueFrom"]["secretKeyRef"]["name"] for one in container.get("env", [])}
                assert maps | secrets - {"citus"} == (
                    {"holdfast-backends", "kafka"} if container["name"] == "topics" else {container["name"]}
                )


def test_every_service_has_its_workloads(objects: list[Object]) -> None:
    """An API and a worker apart, each with what runs that role of that service."""
    found = {(pod.service, pod.component): pod for pod in holdfast(objects) if pod.component in SERVERS}
    assert set(found) == {(service, role) for service in SERVICES for role in SERVERS}
    for (service, role), pod in found.items():
        assert pod.spec["containers"][0]["args"] == [f"services.{service}", "--role", role]
        assert pod.spec["initContainers"][0]["args"] == ["shared.migrate", service, "--phase", "pre", "--wait"]
        assert pod.spec["serviceAccountName"] == service
        assert pod.spec["priorityClassName"] in of(objects, "PriorityClass")
        account = of(objects, "ServiceAccount")[service]
        assert account["automountServiceAccountToken"] is False


def test_servers_are_probed(objects: list[Object]) -> None:
    """Startup, readiness and liveness, by gRPC, on the port that speaks no TLS; and time enough to drain."""
    for pod in holdfast(objects):
        if pod.component not in SERVERS:
            continue
        (container,) = pod.spec["containers"]
        told = variables(objects, container)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert told["HOLDFAST_LISTEN"] == f"0.0.0.0:{ports['grpc']}"
        assert told["HOLDFAST_METRICS_LISTEN"] == f"0.0.0.0:{ports['metrics']}"
        assert told["HOLDFAST_PROBE_LISTEN"] == f"0.0.0.0:{ports['probes']}"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"] == {"port": ports["probes"]}, pod.name
        assert pod.spec["terminationGracePeriodSeconds"] > float(told["HOLDFAST_DRAIN_SECONDS_MAX"] or 0) + 10


def test_settings_that_are_required_are_set(objects: list[Object]) -> None:
    """Every container of a service has each variable without a default; no variable is one that nobody reads."""
    for pod in holdfast(objects):
        for container in pod.containers:
            told = variables(objects, container)
            if pod.component in SERVERS and container["name"] == "holdfast":
                fields = settings_of(pod.service).model_fields.items()
                required = {f"HOLDFAST_{name.upper()}" for name, field in fields if field.is_required()}
            else:
                args = container["args"]
                required = {"HOLDFAST_KAFKA_BOOTSTRAP" if args[0] == "shared.topics" else "HOLDFAST_DATABASE_DSN"}
            assert required <= set(told), f"{pod.name} {container['name']}: {required - set(told)}"


def test_no_variable_is_unknown(objects: list[Object]) -> None:
    """A name that no Settings class has would be set in vain."""
    known = environment(DistributionSettings).union(*(environment(settings_of(service)) for service in SERVICES))
    for pod in holdfast(objects):
        for container in pod.containers:
            named = {variable["name"] for variable in container.get("env", [])}
            assert (set(variables(objects, container)) | named) <= known, pod.name


def test_values_are_what_settings_take(objects: list[Object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The values of each container make settings, where Secrets and mounts hold what they must."""
    mounted = {
        "HOLDFAST_TLS_DIRECTORY": str(Authority().issue(tmp_path / "tls", "inventory")),
        "HOLDFAST_ACCESS_FILE": str(tmp_path / "access.toml"),
    }
    for name, table in of(objects, "ConfigMap").items():
        if name.startswith("access"):
            (tmp_path / "access.toml").write_text(table["data"]["access.toml"])
    secret = {
        "HOLDFAST_DATABASE_DSN": "postgresql://holdfast@postgres:5432/one",
        "HOLDFAST_SUBJECT_KEYS": "k1=AAAAAAAAAAAAAAAAAAAAAA==",
        "HOLDFAST_POD": "pod",
    }
    for pod in holdfast(objects):
        if pod.component not in SERVERS:
            continue
        told = variables(objects, pod.spec["containers"][0])
        with monkeypatch.context() as patched:
            for name, value in told.items():
                patched.setenv(name, secret[name] if value is None else mounted.get(name, value))
            settings_of(pod.service)()  # type: ignore[call-arg] # from the environment


def test_backends_may_want_certificates_and_passwords(objects: list[Object]) -> None:
    """Whoever speaks to one has the authority's certificate where documented, if there is one; Kafka's password too."""
    for pod in holdfast(objects):
        (authority,) = [one for one in pod.spec["volumes"] if one["name"] == "backends"]
        assert authority["configMap"] == {"name": "backends-ca", "optional": True}
        for container in pod.containers:
            mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
            assert mounts["backends"] == "/etc/holdfast/backends", pod.name
            if container["name"] in {"holdfast", "topics"}:
                secrets = [one.get("valueFrom", {}).get("secretKeyRef") for one in container["env"]]
                assert {"name": "kafka", "key": "password", "optional": True} in secrets, pod.name


def test_services_select_the_pods_they_should(objects: list[Object]) -> None:
    """A headless Service takes the API pods of its service, only these, and its port is one of theirs."""
    services = of(objects, "Service")
    for name in SERVICES:
        spec = services[name]["spec"]
        assert spec["clusterIP"] == "None"
        assert not spec.get("publishNotReadyAddresses")
        taken = [pod for pod in pods(objects) if matches({"matchLabels": spec["selector"]}, pod.labels)]
        assert [(pod.service, pod.component) for pod in taken] == [(name, "api")]
        ports = {port["name"] for port in taken[0].spec["containers"][0]["ports"]}
        assert {port["targetPort"] for port in spec["ports"]} <= ports
    for name, service in services.items():
        selector = service["spec"].get("selector")
        if selector:
            assert [pod for pod in pods(objects) if matches({"matchLabels": selector}, pod.labels)], name


def test_targets_name_services_that_there_are(objects: list[Object]) -> None:
    """Reservation finds inventory by the name and port of its headless Service."""
    for pod in holdfast(objects):
        for container in pod.containers:
            target = variables(objects, container).get("HOLDFAST_INVENTORY_TARGET")
            if target:
                found = re.fullmatch(r"dns:///([a-z]+)\.holdfast\.svc\.cluster\.local:(\d+)", target)
                assert found, target
                assert of(objects, "Service")[found[1]]["spec"]["ports"][0]["port"] == int(found[2])


def test_budgets_and_scalers_have_targets(objects: list[Object]) -> None:
    """Each workload of a service has a budget of one pod; each API a scaler, and no fixed number of pods."""
    budgets = of(objects, "PodDisruptionBudget").values()
    scalers = {one["spec"]["scaleTargetRef"]["name"]: one for one in of(objects, "HorizontalPodAutoscaler").values()}
    assert set(scalers) == set(SERVICES)
    for pod in holdfast(objects):
        if pod.component in SERVERS:
            own = [one for one in budgets if matches(one["spec"]["selector"], pod.labels)]
            assert [one["spec"]["maxUnavailable"] for one in own] == [1], pod.name
            scaled = pod.owner["metadata"]["name"] in scalers
            assert scaled == (pod.component == "api")
            assert scaled == ("replicas" not in pod.owner["spec"]), "a scaler and a manifest would undo each other"
    for budget in budgets:
        assert [pod for pod in pods(objects) if matches(budget["spec"]["selector"], pod.labels)]


def test_pods_are_spread(objects: list[Object]) -> None:
    """Over zones and nodes, each workload by itself."""
    for pod in holdfast(objects):
        if pod.component in SERVERS:
            keys = {one["topologyKey"] for one in pod.spec["topologySpreadConstraints"]}
            assert keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
            for one in pod.spec["topologySpreadConstraints"]:
                assert matches(one["labelSelector"], pod.labels)
                assert set(one["matchLabelKeys"]) - {"pod-template-hash"} <= set(pod.labels)


def test_secrets_and_configuration_that_are_referred_to_exist(objects: list[Object], overlay: str) -> None:
    """Locally every Secret is made; in production none is, and those that must be made are the documented ones."""
    referred = set()
    for pod in pods(objects):
        for container in pod.containers:
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference and not reference.get("optional"):
                    referred.add((reference["name"], reference["key"]))
    made = {(name, key) for name, one in of(objects, "Secret").items() for key in one.get("data", {})}
    if overlay == "local":
        assert made == referred
    else:
        assert made == set()
        documented = (K8S.parents[1] / "docs" / "kubernetes.md").read_text()
        for name, key in referred:
            assert re.search(rf"create secret generic {name}\b[^\n]*(\\\n[^\n]*)*--from-literal={key}=", documented)


def test_a_distributed_database_is_made_before_it_is_used() -> None:
    """Its nodes find each other, migrations spread the tables, and only Holdfast and the nodes reach them."""
    objects = list(manifests.build(K8S / "overlays" / "distributed"))
    both = [*objects, *manifests.build(K8S / "overlays" / "distributed" / "post")]
    nodes = {name: one["spec"]["replicas"] for name, one in of(objects, "StatefulSet").items()}
    members = of(objects, "ConfigMap")["citus-membership"]["data"]["membership.sql"]
    for name, replicas in nodes.items():
        assert of(objects, "Service")[name]["spec"]["clusterIP"] == "None"
        called = set(re.findall(rf"'({name}-\d+)\.{name}\.holdfast\.svc\.cluster\.local', 5432", members))
        assert called == {f"{name}-{number}" for number in range(replicas)}
    for pod in holdfast(both):
        if pod.component == "migration":
            for container in pod.containers:
                assert ("--distributed" in container["args"]) == (container["name"] in SERVICES), pod.name
    reaching = {
        source.service
        for source in pods(objects)
        for target in pods(objects)
        if target.owner["kind"] == "StatefulSet" and reached(objects, source, target, "postgres")
    }
    assert reaching == {*SERVICES, "migrate-pre", "citus-coordinator", "citus-worker", "citus-membership"}


def test_policies_match_pods(production: list[Object]) -> None:
    """Everything is denied first; each policy is of pods that there are, and lets through to ports that they have."""
    policies = of(production, "NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    elsewhere = {"backends-from-holdfast"}  # in the cluster only where they are tried out
    for name, policy in policies.items():
        taken = [pod for pod in pods(production) if matches(policy["spec"]["podSelector"], pod.labels)]
        assert bool(taken) != (name in elsewhere), name
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                for pod in taken:
                    if pod.component != "migration":
                        names = {one["name"] for one in pod.spec["containers"][0]["ports"]}
                        assert port["port"] in names, f"{name}: {pod.name}"


def reached(production: list[Object], source: Pod, target: Pod, port: str) -> bool:
    """Whether policies let one pod of the namespace call another on a named port, going out and coming in."""

    def sides(one: Pod, other: Pod, direction: str, peer: str) -> bool:
        number = {item["name"]: item["containerPort"] for item in target.spec["containers"][0].get("ports", [])}[port]
        for policy in of(production, "NetworkPolicy").values():
            if matches(policy["spec"]["podSelector"], one.labels):
                for rule in policy["spec"].get(direction, []):
                    peers = [item for item in rule[peer] if "podSelector" in item and "namespaceSelector" not in item]
                    if any(matches(item["podSelector"], other.labels) for item in peers) and (
                        any(item["port"] in {port, number} for item in rule.get("ports", [{"port": port}]))
                    ):
                        return True
        return False

    return sides(source, target, "egress", "to") and sides(target, source, "ingress", "from")


def test_policies_let_through_the_edges_that_there_are(production: list[Object]) -> None:
    """Between pods of the namespace: reservation calls inventory, all send traces to the collector; nothing else."""
    allowed = {
        (source.service, target.service)
        for source in pods(production)
        for target in pods(production)
        for port in ("grpc", "metrics", "otlp")
        if port in {item["name"] for item in target.spec["containers"][0].get("ports", [])}
        and reached(production, source, target, port)
    }
    collector = {(service, "collector") for service in (*SERVICES, "migrate-pre")}
    assert allowed == {("reservation", "inventory")} | collector


def test_certificates_carry_the_names_that_are_called(production: list[Object]) -> None:
    """One for each service, with its Service's full name, for both sides of a call, in the Secret that is mounted."""
    certificates = of(production, "Certificate")
    assert set(certificates) == set(SERVICES)
    for service, one in certificates.items():
        assert one["apiVersion"] == "cert-manager.io/v1"
        spec = one["spec"]
        assert f"{service}.holdfast.svc.cluster.local" in spec["dnsNames"]
        assert {"server auth", "client auth"} <= set(spec["usages"])
        assert set(spec["issuerRef"]) == {"name", "kind", "group"}
        for pod in holdfast(production):
            if pod.service == service:
                (mount,) = [one for one in pod.spec["containers"][0]["volumeMounts"] if one["name"] == "tls"]
                (volume,) = [one for one in pod.spec["volumes"] if one["name"] == "tls"]
                told = variables(production, pod.spec["containers"][0])
                assert mount["mountPath"] == told["HOLDFAST_TLS_DIRECTORY"]
                assert volume["secret"]["secretName"] == spec["secretName"]
    assert not [one for one in of(production, "ConfigMap").values() if "HOLDFAST_INSECURE" in one["data"]]


def test_metrics_of_every_server_are_scraped(production: list[Object]) -> None:
    """The PodMonitor takes APIs and workers, by a port that they have, and the scalers ask for calls in flight."""
    (monitor,) = of(production, "PodMonitor").values()
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    taken = [pod for pod in pods(production) if matches(monitor["spec"]["selector"], pod.labels)]
    assert len(taken) == len(SERVICES) * len(SERVERS)
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        for pod in taken:
            assert endpoint["port"] in {port["name"] for port in pod.spec["containers"][0]["ports"]}
    for scaler in of(production, "HorizontalPodAutoscaler").values():
        assert {one["type"] for one in scaler["spec"]["metrics"]} == {"Resource", "Pods"}


@pytest.mark.parametrize("path", sorted(path.parent for path in K8S.rglob("kustomization.yaml")), ids=str)
def test_every_file_is_used(path: Path) -> None:
    """A manifest beside a kustomization that does not name it would be applied by nobody."""
    named = (path / "kustomization.yaml").read_text()
    files = {file.name for file in path.iterdir() if file.is_file()} - {"kustomization.yaml"}
    assert {file for file in files if file not in named} == set()
