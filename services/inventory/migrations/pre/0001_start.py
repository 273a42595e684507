"""The tables of inventory.

Every table of stock is keyed by `sku` first, so that it can be distributed by it; codes compare by byte
(COLLATE "C"), so that Python sorts keys as the index does. Counters that change with every hold are in
no index, and pages keep room, so that updates stay on their page (HOT).
"""

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = (
    """
    CREATE TABLE location (
        location text COLLATE "C" PRIMARY KEY,
        name text NOT NULL,
        priority integer NOT NULL,
        active boolean NOT NULL DEFAULT true,
        version bigint NOT NULL DEFAULT 1,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    """
    CREATE TABLE sku (
        sku text COLLATE "C" PRIMARY KEY,
        name text NOT NULL,
        category text COLLATE "C" NOT NULL,
        unit text NOT NULL,
        currency_code text NOT NULL,
        price_micros bigint NOT NULL,
        active boolean NOT NULL DEFAULT true,
        version bigint NOT NULL DEFAULT 1,
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT sku_price_not_negative CHECK (price_micros >= 0)
    )
    """,
    "CREATE INDEX sku_by_category ON sku (category, sku)",
    """
    CREATE TABLE stock (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        on_hand bigint NOT NULL DEFAULT 0,
        held bigint NOT NULL DEFAULT 0,
        safety_stock bigint NOT NULL DEFAULT 0,
        backorder_limit bigint NOT NULL DEFAULT 0,
        short bigint NOT NULL DEFAULT 0,
        version bigint NOT NULL DEFAULT 0,
        active boolean NOT NULL DEFAULT true,
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (sku, location),
        CONSTRAINT stock_sku_known FOREIGN KEY (sku) REFERENCES sku,
        CONSTRAINT stock_location_known FOREIGN KEY (location) REFERENCES location,
        CONSTRAINT stock_held_not_negative CHECK (held >= 0),
        CONSTRAINT stock_not_oversold CHECK (held <= on_hand + backorder_limit + short),
        CONSTRAINT stock_limits_not_negative CHECK (safety_stock >= 0 AND backorder_limit >= 0 AND short >= 0)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX stock_by_location ON stock (location, sku)",
    """
    CREATE TABLE hold (
        sku text COLLATE "C" NOT NULL,
        hold_id text COLLATE "C" NOT NULL,
        slot smallint NOT NULL,
        location text COLLATE "C" NOT NULL,
        quantity bigint NOT NULL,
        held bigint NOT NULL,
        committed bigint NOT NULL DEFAULT 0,
        released bigint NOT NULL DEFAULT 0,
        expired bigint NOT NULL DEFAULT 0,
        short_lines jsonb,
        fingerprint bytea NOT NULL,
        created_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL,
        PRIMARY KEY (sku, hold_id, slot),
        CONSTRAINT hold_parts_not_negative CHECK (least(held, committed, released, expired) >= 0),
        CONSTRAINT hold_parts_sum_up CHECK (quantity = held + committed + released + expired)
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX hold_open_by_key ON hold (sku, location, expires_at) WHERE held > 0",
    "CREATE INDEX hold_open_by_expiry ON hold (expires_at) WHERE held > 0",
    """
    CREATE TABLE hold_change (
        sku text COLLATE "C" NOT NULL,
        hold_id text COLLATE "C" NOT NULL,
        request_id text COLLATE "C" NOT NULL,
        kind text NOT NULL,
        fingerprint bytea NOT NULL,
        allocations jsonb NOT NULL,
        expires_at timestamptz NOT NULL,
        created_at timestamptz NOT NULL,
        PRIMARY KEY (sku, hold_id, request_id)
    )
    """,
    """
    CREATE TABLE request (
        key text COLLATE "C" NOT NULL,
        request_id text COLLATE "C" NOT NULL,
        fingerprint bytea NOT NULL,
        outcome bytea NOT NULL,
        refusal jsonb,
        created_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (key, request_id)
    )
    """,
    """
    CREATE TABLE movement (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        version bigint NOT NULL,
        recorded_at timestamptz NOT NULL,
        kind text NOT NULL,
        on_hand_delta bigint NOT NULL,
        held_delta bigint NOT NULL,
        short_delta bigint NOT NULL,
        on_hand bigint NOT NULL,
        held bigint NOT NULL,
        short bigint NOT NULL,
        safety_stock bigint NOT NULL,
        backorder_limit bigint NOT NULL,
        hold_id text COLLATE "C" NOT NULL,
        request_id text COLLATE "C" NOT NULL,
        reference text NOT NULL,
        occurred_at timestamptz, -- as the caller said; reports are cut by it
        PRIMARY KEY (sku, location, version, recorded_at)
    ) PARTITION BY RANGE (recorded_at)
    """,
    # Up to which version of each key the ledger was added up and found to agree (`store.COMPARE`).
    """
    CREATE TABLE checkpoint (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        version bigint NOT NULL,
        on_hand bigint NOT NULL,
        held bigint NOT NULL,
        short bigint NOT NULL,
        checked_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (sku, location)
    ) WITH (fillfactor = 70)
    """,
    # Where in the ledger the movements stand that are still to be sent (`store.UNSENT`).
    """
    CREATE TABLE movement_outbox (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        event_id uuid NOT NULL DEFAULT gen_random_uuid(),
        skus text[] NOT NULL,
        locations text[] NOT NULL,
        versions bigint[] NOT NULL,
        recorded_at timestamptz NOT NULL,
        traceparent text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
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
    """
    ALTER TABLE movement_outbox ALTER COLUMN skus SET STORAGE EXTERNAL,
        ALTER COLUMN locations SET STORAGE EXTERNAL, ALTER COLUMN versions SET STORAGE EXTERNAL
    """,
    # Months ahead are made by a worker (`store.make_partitions`), which does the same.
    """
    DO $$
    DECLARE month timestamptz := date_trunc('month', now(), 'UTC');
    BEGIN
        FOR ahead IN 0..3 LOOP
            EXECUTE format(
                'CREATE TABLE %I PARTITION OF movement FOR VALUES FROM (%L) TO (%L)',
                'movement_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM'),
                month, month + interval '1 month'
            );
            month := month + interval '1 month';
        END LOOP;
    END $$
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
