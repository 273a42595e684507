"""The desk: what does not follow from the topics alone, because people decided it. A rebuild leaves it as it is.

Rules, cases and what the rules have seen, in the order in which they saw it.
"""

from alembic import op

revision = "0002"
down_revision = "0001"

STATEMENTS = (
    "CREATE SCHEMA IF NOT EXISTS desk",
    """
    CREATE TABLE IF NOT EXISTS desk.rule (
        rule_id text COLLATE "C" NOT NULL,
        version integer NOT NULL,
        state text NOT NULL,
        feature text NOT NULL,
        by_kind text NOT NULL,
        window_seconds double precision NOT NULL,
        comparison text NOT NULL,
        threshold double precision NOT NULL,
        samples_min integer NOT NULL,
        score integer NOT NULL,
        effect text NOT NULL,
        reason text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        changed_at timestamptz NOT NULL DEFAULT now(),
        changed_by text NOT NULL,
        request_id text COLLATE "C" NOT NULL,
        fingerprint bytea NOT NULL,
        PRIMARY KEY (rule_id, version),
        CONSTRAINT rule_request_once UNIQUE (request_id),
        CONSTRAINT rule_state_known CHECK (state IN ('DRAFT', 'SHADOW', 'ACTIVE', 'RETIRED'))
    )
    """,
    "CREATE UNIQUE INDEX IF NOT EXISTS rule_decides ON desk.rule (rule_id) WHERE state = 'ACTIVE'",
    "CREATE UNIQUE INDEX IF NOT EXISTS rule_shadows ON desk.rule (rule_id) WHERE state = 'SHADOW'",
    # A row: the last signal's number, and how often rules have changed. Whoever judges has it locked.
    """
    CREATE TABLE IF NOT EXISTS desk.judged (
        seq bigint NOT NULL,
        rules_changed bigint NOT NULL,
        told_at timestamptz NOT NULL
    ) WITH (fillfactor = 50)
    """,
    "INSERT INTO desk.judged SELECT 0, 0, '-infinity' WHERE NOT EXISTS (SELECT FROM desk.judged)",
    # How far each partition has been judged, as `consumed` has it for the projection.
    """
    CREATE TABLE IF NOT EXISTS desk.judged_partition (
        topic text NOT NULL,
        partition integer NOT NULL,
        next_offset bigint NOT NULL DEFAULT 0,
        complete_until timestamptz NOT NULL DEFAULT '-infinity',
        PRIMARY KEY (topic, partition)
    ) WITH (fillfactor = 50)
    """,
    # What rules have seen, in order: what a judge is made of when it starts, and what backtests replay.
    """
    CREATE TABLE IF NOT EXISTS desk.signal (
        seq bigint NOT NULL,
        at timestamptz NOT NULL,
        order_at timestamptz NOT NULL,
        reservation_id text COLLATE "C" NOT NULL,
        version bigint NOT NULL,
        customer text COLLATE "C" NOT NULL,
        device text COLLATE "C" NOT NULL,
        network text COLLATE "C" NOT NULL,
        skus text[] NOT NULL,
        asked bigint[] NOT NULL,
        held bigint[] NOT NULL,
        open_units bigint NOT NULL,
        sold bigint NOT NULL,
        cancelled bigint NOT NULL,
        expired bigint NOT NULL,
        returned bigint NOT NULL,
        currency_code text NOT NULL,
        value_micros bigint NOT NULL,
        first_order boolean NOT NULL,
        PRIMARY KEY (seq, at)
    ) PARTITION BY RANGE (at)
    """,
    "CREATE INDEX IF NOT EXISTS signal_by_time ON desk.signal (at)",
    # Customers who ever ordered, as their keyed hashes.
    'CREATE TABLE IF NOT EXISTS desk.customer (customer text COLLATE "C" PRIMARY KEY)',
    # Goods that came back and name their reservation: waits here for whoever judges.
    """
    CREATE TABLE IF NOT EXISTS desk.returned (
        reservation_id text COLLATE "C" NOT NULL,
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        version bigint NOT NULL,
        occurred_at timestamptz NOT NULL,
        units bigint NOT NULL,
        PRIMARY KEY (sku, location, version)
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS desk.fraud_case (
        case_id text COLLATE "C" PRIMARY KEY,
        subject text COLLATE "C" NOT NULL,
        kind text NOT NULL,
        state text NOT NULL,
        decision text NOT NULL,
        score integer NOT NULL,
        rules jsonb NOT NULL,
        rule_ids text[] NOT NULL,
        reservation_ids text[] NOT NULL,
        reservations bigint NOT NULL,
        units bigint NOT NULL,
        opened_at timestamptz NOT NULL,
        updated_at timestamptz NOT NULL,
        blocked_until timestamptz,
        exempt_until timestamptz,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT case_state_known CHECK (state IN ('OPEN', 'KEPT', 'RELEASED', 'SHADOW'))
    )
    """,
    """
    CREATE UNIQUE INDEX IF NOT EXISTS case_growing ON desk.fraud_case (subject, state)
    WHERE state IN ('OPEN', 'SHADOW')
    """,
    "CREATE INDEX IF NOT EXISTS case_by_subject ON desk.fraud_case (subject, created_at, case_id)",
    "CREATE INDEX IF NOT EXISTS case_exempt ON desk.fraud_case (subject) WHERE exempt_until IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS case_by_time ON desk.fraud_case (created_at, case_id)",
    "CREATE INDEX IF NOT EXISTS case_by_state ON desk.fraud_case (state, created_at, case_id)",
    # Who did what to a case: never changed, never deleted.
    """
    CREATE TABLE IF NOT EXISTS desk.case_entry (
        case_id text COLLATE "C" NOT NULL REFERENCES desk.fraud_case,
        entered_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        actor text NOT NULL,
        action text NOT NULL,
        note text NOT NULL,
        PRIMARY KEY (case_id, entered_at)
    )
    """,
    # What is to be enforced, on its way to Kafka.
    """
    CREATE TABLE IF NOT EXISTS desk.outbox (
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
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
