"""The tables of analytics, keyed by `sku` or `reservation_id` first, so that they can be distributed by it.

What grows with time is partitioned by it; partitions are made as events need them (`shared.partitions.make`).
"""

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = (
    # How far each partition of a topic has been followed: the next offset, and a time before which
    # everything that was recorded is in. Written in the transaction that writes what it produced.
    """
    CREATE TABLE consumed (
        topic text NOT NULL,
        partition integer NOT NULL,
        next_offset bigint NOT NULL DEFAULT 0,
        complete_until timestamptz NOT NULL DEFAULT '-infinity',
        PRIMARY KEY (topic, partition)
    ) WITH (fillfactor = 50)
    """,
    # Keys whose next movement has not come: they stand still until it is found.
    """
    CREATE TABLE gap (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        partition integer NOT NULL,
        missing_version bigint NOT NULL,
        since timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (sku, location)
    )
    """,
    # How long events took from being recorded to being visible, counted by the minute; `store.LAG_BASE` to
    # the power of `bucket` is the lag in ms.
    """
    CREATE TABLE lag (
        minute timestamptz NOT NULL,
        topic text NOT NULL,
        partition integer NOT NULL,
        bucket smallint NOT NULL,
        events bigint NOT NULL,
        PRIMARY KEY (minute, topic, partition, bucket)
    )
    """,
    """
    CREATE TABLE sku (
        sku text COLLATE "C" PRIMARY KEY,
        name text NOT NULL DEFAULT '',
        category text COLLATE "C" NOT NULL DEFAULT '',
        unit text NOT NULL DEFAULT '',
        currency_code text NOT NULL DEFAULT '',
        price_micros bigint NOT NULL DEFAULT 0,
        active boolean NOT NULL DEFAULT true,
        version bigint NOT NULL DEFAULT 0
    )
    """,
    # The mart: a flat row for each key. No index on what movements change, so that updates stay HOT.
    """
    CREATE TABLE stock_view (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        name text NOT NULL,
        category text COLLATE "C" NOT NULL,
        on_hand bigint NOT NULL,
        held bigint NOT NULL,
        short bigint NOT NULL,
        safety_stock bigint NOT NULL,
        backorder_limit bigint NOT NULL,
        available bigint NOT NULL,
        sold_24h bigint NOT NULL,
        sold_7d bigint NOT NULL,
        sold_30d bigint NOT NULL,
        returned_24h bigint NOT NULL,
        returned_7d bigint NOT NULL,
        returned_30d bigint NOT NULL,
        first_movement_at timestamptz NOT NULL,
        last_movement_at timestamptz NOT NULL,
        version bigint NOT NULL,
        active boolean NOT NULL DEFAULT true,
        PRIMARY KEY (sku, location)
    ) WITH (fillfactor = 70)
    """,
    "CREATE INDEX stock_view_by_category ON stock_view (category, sku, location)",
    # Sales and returns by the hour of recording: what the sums of the mart are made of.
    """
    CREATE TABLE activity (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        hour timestamptz NOT NULL,
        sold bigint NOT NULL,
        returned bigint NOT NULL,
        PRIMARY KEY (sku, location, hour)
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX activity_by_hour ON activity (hour)",
    # The hour up to which the sums have been aged: whoever adds to them shares this row, whoever ages locks it.
    "CREATE TABLE aging (aged_to timestamptz NOT NULL)",
    "INSERT INTO aging VALUES (date_trunc('hour', now()))",
    # Its key carries what a past instant is asked for, so that the answer is in the index.
    """
    CREATE TABLE movement (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        version bigint NOT NULL,
        recorded_at timestamptz NOT NULL,
        kind text NOT NULL,
        on_hand_delta bigint NOT NULL,
        held_delta bigint NOT NULL,
        on_hand bigint NOT NULL,
        held bigint NOT NULL,
        short bigint NOT NULL,
        available bigint NOT NULL,
        available_before bigint NOT NULL,
        hold_id text COLLATE "C" NOT NULL,
        request_id text COLLATE "C" NOT NULL,
        reference text NOT NULL,
        PRIMARY KEY (sku, location, recorded_at, version) INCLUDE (on_hand, held, available)
    ) PARTITION BY RANGE (recorded_at)
    """,
    "CREATE INDEX movement_by_hold ON movement (hold_id) WHERE hold_id <> ''",
    # Stock at the turn of a month, so that a past instant is never more than a month's index away.
    """
    CREATE TABLE snapshot (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        taken_at timestamptz NOT NULL,
        on_hand bigint NOT NULL,
        held bigint NOT NULL,
        available bigint NOT NULL,
        version bigint NOT NULL,
        PRIMARY KEY (sku, location, taken_at)
    )
    """,
    "CREATE TABLE snapshot_taken (taken_at timestamptz PRIMARY KEY)",
    # What the last comparison of the mart with the ledger's copy came to; a row.
    """
    CREATE TABLE reconciled (
        reconciled_at timestamptz NOT NULL,
        keys bigint NOT NULL,
        drift_units bigint NOT NULL
    )
    """,
    "INSERT INTO reconciled VALUES ('-infinity', 0, 0)",
    """
    CREATE TABLE stock_out (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        start_version bigint NOT NULL,
        started_at timestamptz NOT NULL,
        ended_at timestamptz,
        PRIMARY KEY (sku, location, start_version)
    )
    """,
    "CREATE UNIQUE INDEX stock_out_open ON stock_out (sku, location) WHERE ended_at IS NULL",
    "CREATE INDEX stock_out_by_end ON stock_out (ended_at)",
    # Goods that came back, by business time.
    """
    CREATE TABLE goods_return (
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        version bigint NOT NULL,
        occurred_at timestamptz NOT NULL,
        units bigint NOT NULL,
        PRIMARY KEY (sku, occurred_at, location, version)
    ) PARTITION BY RANGE (occurred_at)
    """,
    # Reservations as they now are. `skus`, `locations` and `sold` go together: what was sold at each source.
    """
    CREATE TABLE reservation (
        reservation_id text COLLATE "C" NOT NULL,
        order_time timestamptz NOT NULL,
        customer_id text COLLATE "C" NOT NULL,
        country text COLLATE "C" NOT NULL,
        state text NOT NULL,
        version bigint NOT NULL,
        created_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        confirmed_at timestamptz,
        skus text[] NOT NULL,
        locations text[] NOT NULL,
        sold bigint[] NOT NULL,
        PRIMARY KEY (reservation_id, order_time)
    ) PARTITION BY RANGE (order_time)
    """,
    """
    CREATE TABLE reservation_state (
        reservation_id text COLLATE "C" NOT NULL,
        order_time timestamptz NOT NULL,
        version bigint NOT NULL,
        state text NOT NULL,
        request_id text COLLATE "C" NOT NULL,
        changed_at timestamptz NOT NULL,
        held bigint NOT NULL,
        confirmed bigint NOT NULL,
        cancelled bigint NOT NULL,
        expired bigint NOT NULL,
        PRIMARY KEY (reservation_id, order_time, version)
    ) PARTITION BY RANGE (order_time)
    """,
    # Units sold at a price, flat: what every report on sales reads.
    """
    CREATE TABLE sale (
        sku text COLLATE "C" NOT NULL,
        order_time timestamptz NOT NULL,
        reservation_id text COLLATE "C" NOT NULL,
        version bigint NOT NULL,
        location text COLLATE "C" NOT NULL,
        currency_code text NOT NULL,
        customer_id text COLLATE "C" NOT NULL,
        country text COLLATE "C" NOT NULL,
        units bigint NOT NULL,
        value_micros bigint NOT NULL,
        sold_at timestamptz NOT NULL,
        PRIMARY KEY (sku, order_time, reservation_id, version, location, currency_code)
    ) PARTITION BY RANGE (order_time)
    """,
    # What was asked for and not there; an empty location was left open.
    """
    CREATE TABLE refusal (
        sku text COLLATE "C" NOT NULL,
        refused_at timestamptz NOT NULL,
        reservation_id text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        requested bigint NOT NULL,
        available bigint NOT NULL,
        PRIMARY KEY (sku, refused_at, reservation_id, location)
    ) PARTITION BY RANGE (refused_at)
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
