"""Settings that every service reads from the environment (prefix HOLDFAST_)."""

from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What a pod needs to know; a service adds its own fields. Units stand last in the names."""

    model_config = SettingsConfigDict(env_prefix="HOLDFAST_", extra="ignore", frozen=True)

    pod: str = Field(default="local", description="The pod's name, in logs and in every answer's metadata.")
    listen: str = Field(default="127.0.0.1:50051", description="Address that the gRPC server binds.")
    database_dsn: str = Field(repr=False, description="PostgreSQL, as postgresql://user@host:port/database.")
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", repr=False, description="Redis.")
    kafka_bootstrap: str = Field(default="127.0.0.1:9092", description="Kafka brokers, host:port, by comma.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    metrics_listen: str = Field(default="", description="Address of /metrics, as host:port; empty: nowhere.")
    otlp_endpoint: str = Field(
        default="", description="Collector of traces, OTLP over gRPC, as http(s)://host:port; empty: nothing is traced."
    )
    trace_sample_ratio: float = Field(
        default=0.01, ge=0, le=1, description="Of the calls whose callers have not decided, those that are traced."
    )

    database_connections_max: int = Field(default=10, ge=2, le=200)
    database_timeout_seconds: float = Field(default=10, gt=0, description="For one statement.")
    batch_items_max: int = Field(default=512, ge=1, le=1000, description="Calls in one batch.")
    batch_lines_max: int = Field(default=4096, ge=1, description="Lines in one batch.")
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


S = TypeVar("S", bound=Settings)


def load(settings: type[S]) -> S:
    """Read the environment; a missing or bad variable ends the process with one line that names it."""
    try:
        return settings()  # type: ignore[call-arg] # the environment has the rest
    except ValidationError as error:
        problems = "; ".join(
            f"HOLDFAST_{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors()
        )
        raise SystemExit(f"bad settings: {problems}") from None
