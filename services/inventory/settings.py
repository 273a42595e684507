"""What an inventory pod reads from its environment, beside what every pod does."""

from pydantic import Field

from shared import settings


class Settings(settings.Settings):
    """Units stand last in the names."""

    cache_local_seconds: float = Field(default=0.05, ge=0, description="Life of a value in the pod's memory.")
    cache_redis_seconds: float = Field(default=2, gt=0, description="Life of a value in Redis.")
    cache_keys_max: int = Field(default=200_000, ge=1, description="Values kept in the pod's memory.")
    watch_poll_seconds: float = Field(default=0.1, gt=0, description="Between looks at watched keys.")
    watch_streams_max: int = Field(default=200, ge=1, description="WatchStock calls at once on a pod.")
    imports_max: int = Field(default=2, ge=1, description="ImportStock calls at once on a pod.")
    dlq_messages_max: int = Field(default=100, ge=1, description="Poison commands a minute; more stop the consumer.")
