"""The device and the address of a reservation, the key of its hashes, and what stands behind hashes."""

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = (
    """
    ALTER TABLE reservation
        ADD COLUMN device_id text NOT NULL DEFAULT '',
        ADD COLUMN ip_address text NOT NULL DEFAULT '',
        ADD COLUMN key_id text NOT NULL DEFAULT '' -- of the hashes in its events; empty for the first key there is
    """,
    """
    CREATE TABLE subject (
        subject text COLLATE "C" PRIMARY KEY, -- a keyed hash
        kind text NOT NULL,
        value text NOT NULL,
        CONSTRAINT subject_kind_known CHECK (kind IN ('CUSTOMER', 'DEVICE', 'NETWORK'))
    )
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
