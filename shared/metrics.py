"""Every metric of every pod, declared once, with its meaning; `serve` shows them to Prometheus.

Names begin with `holdfast_` and end in their base unit. Labels have few values: methods, codes, queues, topics, kinds;
never a SKU, an id or a person. A gauge that one pod at a time measures is taken back when another pod goes on
(`measured`); what any pod can measure, each does, and they are to be joined with max.
"""

import contextlib
from collections.abc import Iterator
from http.server import HTTPServer
from threading import Thread

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics, start_http_server

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, of which nobody asks

CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2.5, 5, 15)
WORK_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DELAY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# -- calls
CALLS = Counter("holdfast_calls", "Calls answered, by method and status code.", ["method", "code"])
CALLS_FAILED = Counter(
    "holdfast_calls_failed",
    "Calls that failed by our fault: INTERNAL, UNAVAILABLE, DEADLINE_EXCEEDED, or refused as too many came.",
    ["method"],
)
CALL_SECONDS = Histogram(
    "holdfast_call_seconds", "From the arrival of a call to its answer; of a stream, to its end.", ["method"],
    buckets=CALL_BUCKETS,
)  # fmt: skip
CALLS_IN_FLIGHT = Gauge("holdfast_calls_in_flight", "Calls and streams under way on this pod.")
TASKS = Gauge("holdfast_tasks", "Tasks of the pod's event loop; with nothing under way always as many.")

# -- queues and batches
QUEUE_ITEMS = Gauge("holdfast_queue_items", "Calls that wait for a batch.", ["queue"])
QUEUE_SECONDS = Histogram(
    "holdfast_queue_seconds", "Wait of the oldest call of each batch.", ["queue"], buckets=WORK_BUCKETS
)
BATCH_ITEMS = Histogram("holdfast_batch_items", "Calls in each batch.", ["queue"], buckets=SIZE_BUCKETS)
BATCH_SECONDS = Histogram("holdfast_batch_seconds", "Work on each batch.", ["queue"], buckets=WORK_BUCKETS)
SHEDS = Counter(
    "holdfast_sheds",
    "Calls refused by a queue: `full` of calls or bytes, `slow` where the oldest waits too long, `late` where the"
    " caller's time is too short for the work.",
    ["queue", "reason"],
)  # fmt: skip

# -- the database
DATABASE_SECONDS = Histogram(
    "holdfast_database_seconds", "For which a piece of work holds a connection: its statements and commit.", ["pool"],
    buckets=WORK_BUCKETS,
)  # fmt: skip
DATABASE_WAIT_SECONDS = Histogram(
    "holdfast_database_wait_seconds", "Wait for a connection of the pool.", ["pool"], buckets=WORK_BUCKETS
)
DATABASE_CONNECTIONS = Gauge("holdfast_database_connections", "Connections in use.", ["pool"])
DATABASE_CONNECTIONS_MAX = Gauge("holdfast_database_connections_max", "Connections that may be in use.", ["pool"])
DATABASE_RETRIES = Counter(
    "holdfast_database_retries",
    "Transactions begun again, by what ended them: deadlock, serialization, unique (the same id at the same time),"
    " or migration (of a table that they use).",
    ["reason"],
)
DATABASE_UNAVAILABLE = Counter("holdfast_database_unavailable", "Pieces of work that lost the database.", ["pool"])

# -- workers and their locks
LOCKS_HELD = Gauge("holdfast_locks_held", "1 where this pod works under the lock.", ["lock"])
LOCKS_LOST = Counter("holdfast_locks_lost", "Locks that passed on while this pod worked under them.", ["lock"])
WORKER_RESTARTS = Counter("holdfast_worker_restarts", "Workers that a fault ended and that began again.", ["worker"])

# -- events
OUTBOX_AGE_SECONDS = Gauge("holdfast_outbox_age_seconds", "Age of the oldest events that wait for Kafka.", ["outbox"])
RELAYED = Counter("holdfast_relayed", "Events acknowledged by Kafka.", ["topic"])
RELAY_WAITS = Counter("holdfast_relay_waits", "Times a relay could not go on: Kafka or the database was away.")
CONSUMED = Counter("holdfast_consumed", "Messages worked, by consumer group and topic.", ["group", "topic"])
CONSUMER_LAG = Gauge(
    "holdfast_consumer_lag_messages", "Messages behind the end of this pod's partitions.", ["group", "topic"]
)
CONSUMER_WAITS = Counter(
    "holdfast_consumer_waits", "Batches that had to be tried again: the database was away.", ["group"]
)
DEAD_LETTERED = Counter("holdfast_dead_lettered", "Messages moved to the dead letter topic.", ["group"])
DEAD_LETTERS = Gauge("holdfast_dead_letters", "Dead letters that were not replayed.", ["topic"])
MART_LAG_SECONDS = Gauge("holdfast_mart_lag_seconds", "For which the mart does not know yet what happened.")
MART_KEYS_STOPPED = Gauge("holdfast_mart_keys_stopped", "Keys of stock that wait in the mart for a missing movement.")

# -- stock
CACHE_READS = Counter(
    "holdfast_cache_reads", "Keys of stock read, by where they were found: memory, redis or database.", ["layer"]
)
HOLDS_OPEN = Gauge("holdfast_holds_open", "Rows of holds with units held; counted to 100,000.")
EXPIRY_DELAY_SECONDS = Histogram(
    "holdfast_expiry_delay_seconds",
    "From a hold's expiry to its units' return. Who asks for them meanwhile gets them at once.",
    buckets=DELAY_BUCKETS,
)
EXPIRY_OVERDUE_SECONDS = Gauge(
    "holdfast_expiry_overdue_seconds", "For which the oldest expired hold waits to be given back; 0 where none does."
)
DRIFT_UNITS = Gauge(
    "holdfast_drift_units",
    "Units by which counters and ledger differ (`ledger`), or the mart and its ledger (`mart`), when last compared.",
    ["of"],
)

# -- business
RESERVATIONS = Counter("holdfast_reservations", "Reservations decided: held, rejected or refused.", ["outcome"])
RESERVATION_CHANGES = Counter(
    "holdfast_reservation_changes", "Changes booked: confirm, cancel, extend, expire; or refused.", ["action"]
)
UNITS_MOVED = Counter("holdfast_units_moved", "Units in the ledger's movements, by their kind.", ["kind"])
FRAUD_REFUSALS = Counter("holdfast_fraud_refusals", "Reserves that antifraud refused, by reason.", ["reason"])
FRAUD_SIGNALS = Counter("holdfast_fraud_signals", "Changes that antifraud has judged.")
FRAUD_CASES = Counter(
    "holdfast_fraud_cases", "Cases opened, by what was decided: REVIEW or BLOCK, or SHADOW.", ["decision"]
)
ALERT_STEPS = Counter("holdfast_alert_steps", "Steps of alerts, by kind and what they were.", ["kind", "transition"])
DELIVERIES = Counter(
    "holdfast_deliveries", "Attempts to deliver a message, by channel and outcome: sent, retried or dead.",
    ["channel", "outcome"],
)  # fmt: skip
DELIVERIES_DEAD = Gauge("holdfast_deliveries_dead", "Deliveries given up, which somebody can still retry.")

# -- telemetry itself
SPANS = Counter("holdfast_spans", "Spans that the collector has taken.")
SPANS_DROPPED = Counter(
    "holdfast_spans_dropped",
    "Spans lost: the queue was `full`, the collector did not take them (`export`), or a second had too many `errors`.",
    ["reason"],
)


@contextlib.contextmanager
def measured(*gauges: Gauge) -> Iterator[None]:
    """For a worker that runs on one pod at a time: what it has measured is gone when it ends here."""
    try:
        yield
    finally:
        for gauge in gauges:
            gauge.clear()


@contextlib.contextmanager
def serve(listen: str) -> Iterator[None]:
    """Show the metrics on `listen` (host:port) at /metrics, from a thread of its own; nowhere when it is empty.

    Raises OSError where the address is taken.
    """
    if not listen:
        yield
        return
    host, _, port = listen.rpartition(":")
    server: HTTPServer
    thread: Thread
    server, thread = start_http_server(int(port), host.strip("[]"))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
