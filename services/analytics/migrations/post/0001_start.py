"""Nothing is left over yet."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """The chain begins here."""
