"""The image holds what is locked, says what that is, and starts what there is."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from deploy.image import sbom
from services.analytics.settings import Settings as AnalyticsSettings
from services.inventory.settings import Settings as InventorySettings
from services.reservation.settings import Settings as ReservationSettings
from shared.settings import Settings

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([a-z0-9.-]+)==(\S+)(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
SETTINGS: dict[str, type[Settings]] = {
    "inventory": InventorySettings,
    "reservation": ReservationSettings,
    "analytics": AnalyticsSettings,
}


def pins(lock: Path) -> dict[str, tuple[str, set[str]]]:
    """Version and hashes of each package of a lock."""
    return {
        name: (version, set(re.findall(r"sha256:[0-9a-f]{64}", rest)))
        for name, version, rest in PIN.findall(lock.read_text())
    }


@pytest.mark.parametrize("name", ["runtime.lock", "build.lock"])
def test_a_lock_of_the_image_is_part_of_the_lock(name: str) -> None:
    """The same versions with the same hashes as everything is tested with."""
    all_of_them = pins(ROOT / "requirements.lock")
    for package, (version, hashes) in pins(ROOT / "deploy" / "image" / name).items():
        assert (version, hashes) == all_of_them[package]
        assert hashes


def test_what_runs_is_locked_whole() -> None:
    """Every dependency of the project is in the runtime's lock, and nothing of the tests or of the embedded stack."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def packages(lines: list[str]) -> set[str]:
        return {re.split(r"[\[<>=]", line)[0] for line in lines}

    locked = set(pins(ROOT / "deploy" / "image" / "runtime.lock"))
    assert packages(project["dependencies"]) <= locked
    extras = {name for extra in project["optional-dependencies"].values() for name in packages(extra)}
    assert not (extras - {"pyyaml"}) & locked  # Apprise needs it as well


def test_the_bill_of_materials_is_cyclonedx() -> None:
    """By the schema, strictly; it names what is installed with version and package URL, and is the same each time."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    made = sbom.bill(site, "1.2.3")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made)) is None
    assert made == sbom.bill(site, "1.2.3")
    assert made["metadata"]["component"]["version"] == "1.2.3"
    version, _ = pins(ROOT / "deploy" / "image" / "runtime.lock")["asyncpg"]
    assert f"pkg:pypi/asyncpg@{version}" in {one["purl"] for one in made["components"]}


def test_compose_starts_every_role_with_what_it_needs() -> None:
    """Every service in both roles, after its migrations, with each variable that its settings require."""
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service, settings in SETTINGS.items():
        known = {f"HOLDFAST_{name.upper()}": field for name, field in settings.model_fields.items()}
        required = {name for name, field in known.items() if field.is_required()}
        for role in ("api", "worker"):
            pod = compose[service if role == "api" else f"{service}-worker"]
            assert pod["command"] == [f"services.{service}", "--role", role]
            assert required <= set(pod["environment"])
            assert set(pod["environment"]) <= set(known)
            assert pod["read_only"]
            assert pod["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
            assert pod["healthcheck"]["test"] == ["CMD", "python", "-m", "shared.health"]


def test_compose_waits_for_backends_that_answer() -> None:
    """Each backend has a health check and a version, and the migrations wait for all three."""
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name in ("postgres", "redis", "kafka"):
        assert compose[name]["healthcheck"]["test"]
        assert not compose[name]["image"].endswith(":latest")
        assert ":" in compose[name]["image"]
    assert {name: one["condition"] for name, one in compose["topics"]["depends_on"].items()} == {
        "kafka": "service_healthy"
    }
    assert compose["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}
