"""The W3C trace context of what caused a step of an alert, and of the message that tells it; empty if not traced."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    for table in ("alert_event", "delivery"):
        op.execute(f"ALTER TABLE desk.{table} ADD COLUMN IF NOT EXISTS traceparent text NOT NULL DEFAULT ''")
