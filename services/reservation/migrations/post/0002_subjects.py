"""Nothing is left over."""

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """What stood before is used on."""
