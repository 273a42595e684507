"""Alert rules, alerts, subscriptions and deliveries, in the schema of what does not follow from the topics.

A rebuild, which makes a second schema and swaps it for `public`, leaves them alone: it migrates the new schema and
finds these here. They are small beside the mart, and on several machines they stay together on one.
"""

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS = (
    # A deleted rule stays, so that its id is not used again and a default does not come back.
    """
    CREATE TABLE desk.alert_rule (
        rule_id text COLLATE "C" PRIMARY KEY,
        kind text NOT NULL,
        severity text NOT NULL,
        open_level double precision NOT NULL,
        close_level double precision NOT NULL,
        sku_prefix text COLLATE "C" NOT NULL,
        category text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        deleted_at timestamptz,
        CONSTRAINT alert_rule_never_opens_and_closes CHECK (
            CASE WHEN kind IN ('AVAILABLE_BELOW', 'COVER_BELOW', 'STOCK_OUT') THEN close_level >= open_level
                 ELSE close_level <= open_level END)
    )
    """,
    """
    CREATE TABLE desk.alert (
        alert_id text COLLATE "C" PRIMARY KEY,
        rule_id text COLLATE "C" NOT NULL,
        kind text NOT NULL,
        severity text NOT NULL,
        key text COLLATE "C" NOT NULL,
        sku text COLLATE "C" NOT NULL,
        location text COLLATE "C" NOT NULL,
        name text NOT NULL,
        category text COLLATE "C" NOT NULL,
        value double precision NOT NULL,
        open_level double precision NOT NULL,
        details jsonb NOT NULL,
        state text NOT NULL,
        version integer NOT NULL,
        opened_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now(),
        closed_at timestamptz,
        CONSTRAINT alert_closed_has_time CHECK ((state = 'CLOSED') = (closed_at IS NOT NULL))
    )
    """,
    # What makes an alert open once, whoever opens it.
    "CREATE UNIQUE INDEX alert_open ON desk.alert (rule_id, key) WHERE state = 'OPEN'",
    "CREATE INDEX alert_open_by_key ON desk.alert (key) WHERE state = 'OPEN'",
    "CREATE INDEX alert_by_time ON desk.alert (opened_at, alert_id)",
    "CREATE INDEX alert_by_sku ON desk.alert (sku, opened_at, alert_id) WHERE sku <> ''",
    "CREATE INDEX alert_by_close ON desk.alert (closed_at) WHERE state = 'CLOSED'",
    # Steps of alerts that nobody has been told of yet; the alert as it was.
    """
    CREATE TABLE desk.alert_event (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        alert_id text COLLATE "C" NOT NULL,
        version integer NOT NULL,
        transition text NOT NULL,
        content jsonb NOT NULL,
        CONSTRAINT alert_event_once UNIQUE (alert_id, version)
    )
    """,
    # `channel` and `config` say where messages go; `config` holds secrets, and nothing once it is deleted.
    """
    CREATE TABLE desk.subscription (
        subscription_id text COLLATE "C" PRIMARY KEY,
        target_id text COLLATE "C" NOT NULL,
        channel text NOT NULL,
        config jsonb NOT NULL,
        target text NOT NULL,
        kinds text[] NOT NULL,
        severity_min text NOT NULL,
        sku_prefixes text[] NOT NULL,
        categories text[] NOT NULL,
        locations text[] NOT NULL,
        digest_period interval,
        quiet_start time,
        quiet_end time,
        quiet_zone text,
        subject text NOT NULL,
        body text NOT NULL,
        paused boolean NOT NULL DEFAULT false,
        created_at timestamptz NOT NULL DEFAULT now(),
        deleted_at timestamptz,
        CONSTRAINT subscription_deleted_has_no_secret CHECK (deleted_at IS NULL OR config = '{}')
    )
    """,
    # Whoever sends to a target holds its lease; failures in a row; not to be tried before `open_until`.
    """
    CREATE TABLE desk.target (
        target_id text COLLATE "C" PRIMARY KEY,
        lease text,
        lease_until timestamptz NOT NULL DEFAULT '-infinity',
        failures integer NOT NULL DEFAULT 0,
        open_until timestamptz NOT NULL DEFAULT '-infinity'
    )
    """,
    """
    CREATE TABLE desk.delivery (
        delivery_id text COLLATE "C" PRIMARY KEY,
        seq bigint GENERATED ALWAYS AS IDENTITY,
        subscription_id text COLLATE "C" NOT NULL,
        target_id text COLLATE "C" NOT NULL,
        alert_id text COLLATE "C",
        alert_version integer NOT NULL DEFAULT 0,
        urgent boolean NOT NULL,
        state text NOT NULL,
        subject text NOT NULL,
        body text NOT NULL,
        content jsonb NOT NULL,
        attempts integer NOT NULL DEFAULT 0,
        attempts_max integer NOT NULL,
        due_at timestamptz NOT NULL,
        digest_id text COLLATE "C",
        created_at timestamptz NOT NULL DEFAULT now(),
        settled_at timestamptz,
        CONSTRAINT delivery_state_known
            CHECK (state IN ('GATHERED', 'PENDING', 'SENDING', 'SENT', 'DEAD', 'DIGESTED')),
        CONSTRAINT delivery_once UNIQUE (subscription_id, alert_id, alert_version)
    )
    """,
    """
    CREATE INDEX delivery_due ON desk.delivery (target_id, urgent DESC, due_at, seq)
      WHERE state IN ('PENDING', 'SENDING')
    """,
    "CREATE INDEX delivery_digests_due ON desk.delivery (due_at, subscription_id) WHERE state = 'GATHERED'",
    "CREATE INDEX delivery_gathered ON desk.delivery (subscription_id, seq) WHERE state = 'GATHERED'",
    "CREATE INDEX delivery_dead ON desk.delivery (settled_at) WHERE state = 'DEAD'",
    "CREATE INDEX delivery_by_time ON desk.delivery (created_at, delivery_id)",
    "CREATE INDEX delivery_by_alert ON desk.delivery (alert_id, created_at)",
    """
    CREATE TABLE desk.attempt (
        delivery_id text COLLATE "C" NOT NULL,
        number integer NOT NULL,
        target_id text COLLATE "C" NOT NULL,
        started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        ended_at timestamptz,
        status integer NOT NULL DEFAULT 0,
        error text NOT NULL DEFAULT '',
        PRIMARY KEY (delivery_id, number)
    )
    """,
    # The last minute of a target: its rate.
    "CREATE INDEX attempt_by_target ON desk.attempt (target_id, started_at)",
    # First outcomes of writes: an answer, or a refusal.
    """
    CREATE TABLE desk.request (
        request_id text COLLATE "C" PRIMARY KEY,
        fingerprint bytea NOT NULL,
        answer bytea,
        refusal jsonb,
        made_at timestamptz NOT NULL DEFAULT now()
    )
    """,
)


def upgrade() -> None:
    if op.get_bind().exec_driver_sql("SELECT to_regclass('desk.alert_rule') IS NOT NULL").scalar():
        return
    for statement in STATEMENTS:
        op.execute(statement)
