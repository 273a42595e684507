"""The table of who may call what: what does not stand in it is refused.

    [roles.shop]
    calls = ["holdfast.reservation.v1.ReservationService/Reserve", "holdfast.inventory.v1.InventoryService/*"]
    tokens = true                    # the claims `roles` and `scope` of a token may name this role
    calls_per_second_max = 500       # 0: no limit; left out: HOLDFAST_CALLER_CALLS_PER_SECOND_MAX
    in_flight_calls_max = 100        # 0: no limit; left out: HOLDFAST_CALLER_IN_FLIGHT_CALLS_MAX

    [certificates]                   # by URI, DNS name or, if it has neither, common name of a certificate
    "spiffe://example.org/shop" = ["shop"]

    [subjects]                       # by `sub` of a token
    "checkout" = ["shop"]

A caller has the calls of all its roles, and the most generous of their limits.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection_pb2
from holdfast.analytics.v1 import analytics_pb2, fraud_pb2, notification_pb2
from holdfast.inventory.v1 import inventory_pb2
from holdfast.reservation.v1 import reservation_pb2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

APIS = (inventory_pb2, reservation_pb2, analytics_pb2, fraud_pb2, notification_pb2, reflection_pb2)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds for one caller; 0 means none."""

    calls_per_second_max: float = 0
    in_flight_calls_max: int = 0


@dataclass(frozen=True, slots=True)
class Rights:
    """What a caller may call, as gRPC names methods (/package.Service/Method), and how much at once."""

    calls: frozenset[str]
    limits: Limits


class Role(BaseModel):
    """As the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calls: tuple[str, ...]
    tokens: bool = False
    calls_per_second_max: float | None = Field(default=None, ge=0)
    in_flight_calls_max: int | None = Field(default=None, ge=0)


class Table(BaseModel):
    """As the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: dict[str, Role]
    certificates: dict[str, tuple[str, ...]] = {}
    subjects: dict[str, tuple[str, ...]] = {}


class Access:
    """A table whose calls and roles are known to exist. `limits` hold for roles that name none."""

    def __init__(self, table: Table, limits: Limits) -> None:
        self._table = table
        self._limits = limits
        every = calls()
        self._calls = {name: _expand(name, role.calls, every) for name, role in table.roles.items()}
        for section in ("certificates", "subjects"):
            for identity, roles in getattr(table, section).items():
                for role in roles:
                    if role not in table.roles:
                        raise ValueError(f'{section}."{identity}": there is no role {role}')

    def of_certificate(self, names: Iterable[str]) -> Rights:
        """The rights of all names of a certificate together."""
        return self._rights(role for name in names for role in self._table.certificates.get(name, ()))

    def of_token(self, subject: str, named: Iterable[str]) -> Rights:
        """The rights of a subject, and of those roles that its token names and that a token may name."""
        roles = self._table.roles
        allowed = [name for name in named if name in roles and roles[name].tokens]
        return self._rights((*self._table.subjects.get(subject, ()), *allowed))

    def _rights(self, names: Iterable[str]) -> Rights:
        names = set(names)
        roles = [self._table.roles[name] for name in names]
        return Rights(
            frozenset().union(*(self._calls[name] for name in names)),
            Limits(
                _most([role.calls_per_second_max for role in roles], self._limits.calls_per_second_max),
                int(_most([role.in_flight_calls_max for role in roles], self._limits.in_flight_calls_max)),
            ),
        )


def read(file: str, limits: Limits) -> Access:
    """The table of a file. Raises OSError, or ValueError that names what is wrong."""
    try:
        table = Table.model_validate(tomllib.loads(Path(file).read_text()))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(problems) from None
    return Access(table, limits)


def calls() -> dict[str, list[str]]:
    """Every service there is, and its methods as gRPC names them."""
    services: list[ServiceDescriptor] = [
        service for api in APIS for service in api.DESCRIPTOR.services_by_name.values()
    ]
    return {
        service.full_name: [f"/{service.full_name}/{method.name}" for method in service.methods] for service in services
    }


def _expand(role: str, patterns: Iterable[str], every: dict[str, list[str]]) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns:
        service, _, method = pattern.partition("/")
        matching = [name for name in every.get(service, ()) if method in {"*", name.rpartition("/")[2]}]
        if not matching:
            raise ValueError(f"roles.{role}: there is no call {pattern}")
        found.update(matching)
    return frozenset(found)


def _most(values: Iterable[float | None], default: float) -> float:
    """The most generous of some limits; 0 is no limit."""
    known = [default if value is None else value for value in values] or [default]
    return 0 if 0 in known else max(known)
