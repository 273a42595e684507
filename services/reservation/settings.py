"""What a reservation pod reads from its environment, beside what every pod does."""

from pydantic import Field

from shared import settings


class Settings(settings.Settings):
    """Units stand last in the names."""

    inventory_target: str = Field(description="Inventory's pods, as dns:///name:port.")
    pending_seconds_min: float = Field(
        default=5, ge=0, description="Age at which a change that was not booked is driven on."
    )
    stream_items_max: int = Field(default=256, ge=1, description="Reserves in flight on one stream.")
