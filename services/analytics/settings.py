"""What an analytics pod reads from its environment, beside what every pod does."""

from pydantic import Field, SecretStr

from shared import settings


class Settings(settings.Settings):
    """Units stand last in the names."""

    batch_messages_max: int = Field(default=20_000, ge=1, description="Events taken at once, over all partitions.")
    follow_linger_seconds: float = Field(
        default=0.02, ge=0, description="Between small batches of events: fewer and larger ones cost less."
    )
    dlq_messages_max: int = Field(default=100, ge=1, description="Poison events a minute; more stop the consumer.")
    reports_max: int = Field(default=4, ge=1, description="Reports at once on a pod.")
    reports_waiting_max: int = Field(default=64, ge=0, description="Reports that wait; more are refused.")
    report_seconds_max: float = Field(default=60, gt=0, description="For one page of a report.")
    wait_seconds_max: float = Field(default=10, gt=0, description="For events to arrive, where a call waits for them.")
    retention_months: int = Field(default=25, ge=2, description="Movements older than this are dropped.")
    heal_poll_seconds: float = Field(default=5, gt=0, description="Between looks for what gaps are missing.")
    aging_poll_seconds: float = Field(default=30, gt=0, description="Between agings of the sums of the mart.")

    judge_linger_seconds: float = Field(
        default=0.1, ge=0, description="Between small batches that antifraud judges; a block comes later by as much."
    )
    fraud_review_score: int = Field(default=50, ge=1, description="From it on a subject's score opens a case.")
    fraud_block_score: int = Field(default=100, ge=1, description="From it on a subject is blocked.")
    fraud_block_seconds: float = Field(default=900, gt=0, le=7 * 86_400, description="How long a block by rules is.")
    fraud_history_signals: int = Field(
        default=500_000, ge=1, description="Signals that a judge begins with: its windows and histories."
    )

    alert_sweep_seconds: float = Field(default=30, gt=0, description="Between sweeps for cover and for new rules.")
    alert_poll_seconds: float = Field(default=1, gt=0, description="Between looks at lag, drift and dead deliveries.")
    alert_dlq_poll_seconds: float = Field(default=10, gt=0, description="Between looks at the dead letter topics.")
    notify_poll_seconds: float = Field(default=0.25, gt=0, description="Between looks for what is to be told or sent.")
    notify_send_seconds_max: float = Field(default=10, gt=0, description="For one attempt to send a message.")
    notify_attempts_max: int = Field(default=15, ge=1, description="Attempts, after which a delivery is dead.")
    notify_backoff_seconds: float = Field(default=2, gt=0, description="Most before the second attempt; then doubled.")
    notify_backoff_seconds_max: float = Field(default=900, gt=0, description="Most before any attempt.")
    notify_circuit_failures_max: int = Field(default=5, ge=1, description="Failures in a row that spare a target.")
    notify_circuit_seconds: float = Field(default=30, gt=0, description="For which such a target is spared.")
    notify_minute_messages_max: int = Field(default=60, ge=1, description="Attempts a minute at one target.")
    notify_retention_days: int = Field(default=90, ge=1, description="Closed alerts and deliveries are kept so long.")
    notification_directory: str = Field(default="", description="Where the file channel writes; empty: nowhere.")
    webhook_private: bool = Field(default=False, description="Whether targets may have addresses that are not public.")
    smtp_host: str = Field(default="", description="The SMTP server; empty: no mail.")
    smtp_port: int = Field(default=587, ge=1, le=65535, description="Its port.")
    smtp_user: str = Field(default="", description="Empty: without authentication.")
    smtp_password: SecretStr = Field(default=SecretStr(""), description="Of the user.")
    smtp_from: str = Field(default="holdfast@localhost", description="The sender's address.")
    smtp_starttls: bool = Field(default=True, description="Whether to insist on TLS.")
