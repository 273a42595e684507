"""What a reservation pod reads from its environment, beside what every pod does."""

from typing import Literal

from pydantic import Field, SecretStr, field_validator

from services.reservation import subjects
from shared import settings


class Settings(settings.Settings):
    """Units stand last in the names."""

    inventory_target: str = Field(description="Inventory's pods, as dns:///name:port.")
    subject_keys: SecretStr = Field(
        description="Keys of the hashes of personal data, k2=BASE64,k1=BASE64: the first makes them, all resolve."
    )
    pending_seconds_min: float = Field(
        default=5, ge=0, description="Age at which a change that was not booked is driven on."
    )
    stream_items_max: int = Field(default=256, ge=1, description="Reserves in flight on one stream.")

    enforcement: Literal["off", "open", "closed"] = Field(
        default="open",
        description="What Reserve refuses: nothing (off), what it knows of (open), all while that is stale (closed).",
    )
    enforcement_stale_seconds: float = Field(
        default=30, gt=0, description="Since the last heartbeat of who judges; then what is known is stale."
    )
    enforcement_start_seconds: float = Field(
        default=3, ge=0, description="Wait of a pod that starts for having read all verdicts; then it serves anyway."
    )

    @field_validator("subject_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr) -> SecretStr:
        subjects.parse_keys(value.get_secret_value())
        return value
