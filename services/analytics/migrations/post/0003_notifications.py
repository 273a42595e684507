"""Nothing is left over yet."""

revision = "0003"
down_revision = "0001"


def upgrade() -> None:
    """Nothing to do."""
