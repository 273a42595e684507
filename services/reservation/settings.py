"""What a reservation pod reads from its environment, beside what every pod does."""

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

    @field_validator("subject_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr) -> SecretStr:
        subjects.parse_keys(value.get_secret_value())
        return value
