"""The tables of reservation, keyed by `reservation_id` first, so that they can be distributed by it."""

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = (
    """
    CREATE TABLE reservation (
        reservation_id text COLLATE "C" PRIMARY KEY,
        customer_id text COLLATE "C" NOT NULL,
        state text NOT NULL,
        mode text NOT NULL,
        fingerprint bytea NOT NULL,
        short_lines jsonb,
        expires_at timestamptz NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        order_time timestamptz NOT NULL DEFAULT now(), -- as the caller said; reports are cut by it
        country text NOT NULL DEFAULT '',
        version bigint NOT NULL DEFAULT 1,
        CONSTRAINT reservation_state_known
            CHECK (state IN ('HELD', 'CONFIRMED', 'CANCELLED', 'EXPIRED', 'REJECTED'))
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX reservation_by_customer ON reservation (customer_id, created_at, reservation_id)",
    "CREATE INDEX reservation_by_time ON reservation (created_at, reservation_id)",
    "CREATE INDEX reservation_due ON reservation (expires_at) WHERE state = 'HELD'",
    """
    CREATE TABLE reservation_line (
        reservation_id text COLLATE "C" NOT NULL REFERENCES reservation,
        line_no smallint NOT NULL,
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        quantity bigint NOT NULL,
        minimum bigint NOT NULL,
        currency_code text NOT NULL,
        price_micros bigint NOT NULL,
        PRIMARY KEY (reservation_id, line_no),
        CONSTRAINT line_quantity_positive CHECK (quantity > 0)
    )
    """,
    """
    CREATE TABLE allocation (
        reservation_id text COLLATE "C" NOT NULL REFERENCES reservation,
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        held bigint NOT NULL,
        confirmed bigint NOT NULL DEFAULT 0,
        cancelled bigint NOT NULL DEFAULT 0,
        expired bigint NOT NULL DEFAULT 0,
        PRIMARY KEY (reservation_id, sku, location),
        CONSTRAINT allocation_parts_not_negative CHECK (least(held, confirmed, cancelled, expired) >= 0)
    ) WITH (fillfactor = 70)
    """,
    """
    CREATE TABLE reservation_change (
        reservation_id text COLLATE "C" NOT NULL REFERENCES reservation,
        request_id text COLLATE "C" NOT NULL,
        action text NOT NULL,
        fingerprint bytea NOT NULL,
        lines jsonb NOT NULL,
        ttl interval NOT NULL,
        state text NOT NULL DEFAULT 'PENDING',
        refusal jsonb,
        created_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (reservation_id, request_id),
        CONSTRAINT change_state_known CHECK (state IN ('PENDING', 'APPLIED', 'REFUSED'))
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX change_pending ON reservation_change (created_at) WHERE state = 'PENDING'",
    """
    CREATE TABLE outbox (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        event_id uuid NOT NULL DEFAULT gen_random_uuid(),
        topic text NOT NULL,
        type text NOT NULL,
        keys text[] NOT NULL,
        payloads bytea[] NOT NULL,
        traceparent text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Groups live for milliseconds: compressing them would cost more than it saves.
    "ALTER TABLE outbox ALTER COLUMN payloads SET STORAGE EXTERNAL, ALTER COLUMN keys SET STORAGE EXTERNAL",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
