"""Settings that every service reads from the environment (prefix HOLDFAST_)."""

import ipaddress
import re
from typing import Literal, Self, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared import access, tls, tokens
from shared.kafka import Brokers

CONFIG = SettingsConfigDict(env_prefix="HOLDFAST_", extra="ignore", frozen=True, hide_input_in_errors=True)
HOSTS = r"(\[[0-9a-fA-F:.]+\]|[^@/?#:,\[\]]*)(:\d+)?"
POSTGRES = re.compile(rf"postgres(ql)?://([^/?#]*@)?{HOSTS}(,{HOSTS})*(/[^?#]*)?(\?[^#]*)?")
REDIS = re.compile(rf"(rediss?://([^/?#]*@)?{HOSTS}|unix://([^/?#]*@)?)(/[^?#]*)?(\?[^#]*)?")


class DatabaseSettings(BaseSettings):
    """How PostgreSQL is reached."""

    model_config = CONFIG

    database_dsn: str = Field(
        repr=False,
        description="PostgreSQL: postgresql://user:password@host:port/database?sslmode=verify-full&sslrootcert=FILE.",
    )

    @field_validator("database_dsn")
    @classmethod
    def _check_database_dsn(cls, value: str) -> str:
        return _address(value, POSTGRES, "postgresql://user:password@host:port/database")


class DistributionSettings(DatabaseSettings):
    """How a database is spread over a Citus cluster."""

    citus_shard_count: int = Field(default=8, ge=1, le=64_000, description="Shards of each table, once and for all.")
    citus_dsn: str = Field(
        default="",
        repr=False,
        description="A database of the same coordinator that knows its workers, for one that knows none yet.",
    )

    @field_validator("citus_dsn")
    @classmethod
    def _check_citus_dsn(cls, value: str) -> str:
        return _address(value, POSTGRES, "postgresql://user:password@host:port/database") if value else value


class KafkaSettings(BaseSettings):
    """How the Kafka brokers are reached."""

    model_config = CONFIG

    kafka_bootstrap: str = Field(default="127.0.0.1:9092", description="Kafka brokers, host:port, by comma.")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="PLAINTEXT, SSL, or SASL_SSL."
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="SCRAM-SHA-512", description="With SASL_SSL: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512."
    )
    kafka_username: str = Field(default="", description="With SASL_SSL.")
    kafka_password: SecretStr = Field(default=SecretStr(""), description="With SASL_SSL.")
    kafka_ca_file: str = Field(default="", description="Whose certificates the brokers' are; empty: the system's.")

    @property
    def brokers(self) -> Brokers:
        """For whatever connects to them."""
        return Brokers(
            self.kafka_bootstrap,
            self.kafka_security_protocol,
            self.kafka_sasl_mechanism,
            self.kafka_username,
            self.kafka_password.get_secret_value(),
            self.kafka_ca_file,
        )

    @model_validator(mode="after")
    def _check_kafka(self) -> Self:
        if self.kafka_security_protocol.startswith("SASL"):
            if not (self.kafka_username and self.kafka_password.get_secret_value()):
                raise ValueError("HOLDFAST_KAFKA_USERNAME and HOLDFAST_KAFKA_PASSWORD are needed with SASL")
        elif self.kafka_username:
            raise ValueError("HOLDFAST_KAFKA_USERNAME needs HOLDFAST_KAFKA_SECURITY_PROTOCOL=SASL_SSL")
        try:
            self.brokers.options  # noqa: B018 - reads the file
        except OSError as error:
            raise ValueError(f"HOLDFAST_KAFKA_CA_FILE: {error.strerror or 'has no certificate'}") from None
        return self


class Settings(KafkaSettings, DatabaseSettings):
    """What a pod needs to know; a service adds its own fields. Units stand last in the names."""

    pod: str = Field(default="local", description="The pod's name, in logs and in every answer's metadata.")
    listen: str = Field(default="127.0.0.1:50051", description="Address that the gRPC server binds.")
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        repr=False,
        description="Redis: rediss://user:password@host:port/0?ssl_ca_certs=FILE.",
    )
    redis_cluster: bool = Field(default=False, description="Whether that is a node of a Redis Cluster.")
    tls_directory: str = Field(
        default="", description="Holds tls.crt, tls.key and ca.crt. With it everybody has to show a certificate."
    )
    insecure: bool = Field(
        default=False, description="Whether to serve addresses that are not loopback without TLS, to everybody."
    )
    access_file: str = Field(default="", description="The table of who may call what; needed with TLS.")
    jwt_issuer: str = Field(default="", description="Whose bearer tokens count; empty: nobody's.")
    jwt_audience: str = Field(default="", description="For whom they must be.")
    jwks_file: str = Field(default="", description="The issuer's public keys, a JSON Web Key Set.")
    probe_listen: str = Field(
        default="", description="A second address, without TLS, that answers health alone, for Kubernetes' probes."
    )
    caller_calls_per_second_max: float = Field(default=0, ge=0, description="For one caller on a pod; 0: no limit.")
    caller_in_flight_calls_max: int = Field(default=0, ge=0, description="For one caller on a pod; 0: no limit.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="What is logged, and all above it: debug, info, warning or error."
    )
    log_format: Literal["json", "console"] = Field(default="json", description="json, or console for people.")
    metrics_listen: str = Field(default="", description="Address of /metrics, as host:port; empty: nowhere.")
    otlp_endpoint: str = Field(
        default="", description="Collector of traces, OTLP over gRPC, as http(s)://host:port; empty: nothing is traced."
    )
    trace_sample_ratio: float = Field(
        default=0.01, ge=0, le=1, description="Of the calls whose callers have not decided, those that are traced."
    )

    database_connections_max: int = Field(
        default=10, ge=2, le=200, description="Of a pool; inventory and reservation have one, analytics two."
    )
    database_timeout_seconds: float = Field(default=10, gt=0, description="For one statement.")
    database_idle_seconds_max: float = Field(
        default=0.5, ge=0, description="Silence of a transaction that has locked stock or reservations; 0: no limit."
    )
    # No more than inventory takes in one PlaceHolds: a batch of reservation is one.
    batch_items_max: int = Field(default=512, ge=1, le=1000, description="Calls in one batch.")
    batch_lines_max: int = Field(default=4096, ge=1, le=10_000, description="Lines in one batch.")
    queue_items_max: int = Field(default=4096, ge=1, description="Calls that wait; more are refused.")
    queue_bytes_max: int = Field(default=32 << 20, ge=1, description="Bytes that wait; more are refused.")
    queue_seconds_max: float = Field(
        default=0.25, gt=0, description="Wait of the oldest call while batches are full; more are refused."
    )
    drain_seconds_max: float = Field(default=10, gt=0, description="For calls in flight when stopping.")
    connection_age_seconds_max: int = Field(
        default=300, ge=1, description="After it clients reconnect and so find new pods."
    )
    relay_poll_seconds: float = Field(default=0.05, gt=0, description="Between looks at an empty outbox.")
    sweep_poll_seconds: float = Field(default=0.25, gt=0, description="Between looks for expired holds.")
    reconcile_poll_seconds: float = Field(default=60, gt=0, description="Between reconciliations.")
    lock_ttl_seconds: float = Field(default=5, gt=0, description="Life of a worker's lock without renewal.")

    @property
    def caller_limits(self) -> access.Limits:
        """For callers whose roles name none."""
        return access.Limits(self.caller_calls_per_second_max, self.caller_in_flight_calls_max)

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str) -> str:
        return _address(value, REDIS, "rediss://user:password@host:port/0")

    @model_validator(mode="after")
    def _check_security(self) -> Self:
        """Nothing is open by mistake: what has no TLS stays on loopback, and files are looked at before they count."""
        if not self.tls_directory:
            if self.access_file or self.jwt_issuer or self.jwt_audience or self.jwks_file:
                raise ValueError("HOLDFAST_ACCESS_FILE and HOLDFAST_JWT_* need HOLDFAST_TLS_DIRECTORY")
            if not (loopback(self.listen) or self.insecure):
                raise ValueError(
                    f"HOLDFAST_LISTEN: {self.listen} is not loopback: set HOLDFAST_TLS_DIRECTORY,"
                    " or HOLDFAST_INSECURE=true to serve everybody without TLS"
                )
            return self
        if len({bool(value) for value in (self.jwt_issuer, self.jwt_audience, self.jwks_file)}) > 1:
            raise ValueError("HOLDFAST_JWT_ISSUER, HOLDFAST_JWT_AUDIENCE and HOLDFAST_JWKS_FILE go together")
        if not self.access_file:
            raise ValueError("HOLDFAST_ACCESS_FILE: is needed with HOLDFAST_TLS_DIRECTORY")
        name = ""
        try:
            name = "HOLDFAST_TLS_DIRECTORY"
            tls.watch(self.tls_directory)
            name = "HOLDFAST_ACCESS_FILE"
            access.read(self.access_file, self.caller_limits)
            if self.jwks_file:
                name = "HOLDFAST_JWKS_FILE"
                tokens.watch(self.jwks_file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        return self


def _address(value: str, form: re.Pattern[str], example: str) -> str:
    """Who parses an address later would show what it cannot parse, and that may be a part of a password."""
    if not form.fullmatch(value):
        raise ValueError(f"must be like {example}, with %XX for special characters of a password")
    return value


def loopback(address: str) -> bool:
    """Whether an address that a server binds can be reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """Read the environment; a missing or bad variable ends the process with one line that names it."""
    try:
        return settings()
    except ValidationError as error:
        problems = "; ".join(
            "".join(f"HOLDFAST_{str(name).upper()}: " for name in problem["loc"][:1])
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        )
        raise SystemExit(f"bad settings: {problems}") from None
