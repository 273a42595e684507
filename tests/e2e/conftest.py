"""Pods with mutual TLS, tokens and the table of who may call what; started when a test asks for them."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deploy.local.certificates import Authority
from deploy.local.stack import Stack, free_ports
from deploy.local.supervisor import ACCESS_FILE, SERVICES, Supervisor
from shared.client import Holdfast
from tests.e2e.shop import new
from tests.unit.test_access import AUDIENCE, ISSUER, SIGNERS, jwks

FLOODERS = 24
WATCHES = 3
FLOOD_CALLS_PER_SECOND_MAX = 20
# Beside the shipped table.
MORE = f"""
[roles.flooder]
calls_per_second_max = {FLOOD_CALLS_PER_SECOND_MAX}
in_flight_calls_max = {FLOODERS - 4}
calls = ["holdfast.reservation.v1.ReservationService/*"]

[roles.watcher]
in_flight_calls_max = {WATCHES}
calls = ["holdfast.inventory.v1.InventoryService/WatchStock"]

[certificates]
flooder = ["flooder"]
watcher = ["watcher"]
"spiffe://holdfast.test/till" = ["shop"]
"""


class Secured(NamedTuple):
    """Pods that speak TLS, their authority, and a place for other certificates."""

    pods: Supervisor
    authority: Authority
    root: Path
    probes: dict[str, int]

    @property
    def targets(self) -> dict[str, str]:
        return self.pods.targets

    def certificate(self, *names: str, **more: Any) -> str:
        return str(self.authority.issue(self.root / new("certificate"), *names, **more))

    def client(self, directory: str) -> Holdfast:
        """A client that shows the certificate of a directory."""
        targets = (self.targets[name] for name in ("inventory", "reservation", "analytics"))
        return Holdfast(*targets, tls_directory=directory)


@pytest.fixture(scope="session")
def secured(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A pod of each service in role "api", so that nothing of it works on the topics of other tests."""
    root = tmp_path_factory.mktemp("security")
    (root / "jwks.json").write_text(jwks(**SIGNERS))
    table = ACCESS_FILE.read_text()
    (root / "access.toml").write_text(table.replace("[certificates]", MORE, 1))
    settings = {
        "HOLDFAST_ACCESS_FILE": str(root / "access.toml"),
        "HOLDFAST_JWT_ISSUER": ISSUER,
        "HOLDFAST_JWT_AUDIENCE": AUDIENCE,
        "HOLDFAST_JWKS_FILE": str(root / "jwks.json"),
    }
    probes = dict(zip((service.name for service in SERVICES), free_ports(len(SERVICES)), strict=True))
    services = [
        service._replace(
            database=f"secured_{service.name}",
            pods=1,
            settings=settings | {"HOLDFAST_PROBE_LISTEN": f"127.0.0.1:{probes[service.name]}"},
        )
        for service in SERVICES
    ]
    authority = Authority()
    with Supervisor(stack, services=services, role="api", authority=authority, root=root).start() as pods:
        yield Secured(pods, authority, root, probes)


@pytest.fixture
async def everybody(secured: Secured) -> AsyncIterator[Holdfast]:
    """A client whose certificate has all roles of people."""
    async with secured.client(secured.pods.tls_directory) as made:
        yield made
