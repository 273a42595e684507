"""Nothing is left over."""

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """What stood before is used on."""
