"""What the services share: edges, batching, database, outbox, consumers, locks and settings.

Nothing here knows a service. What holds for all of it:

* **Everything is bounded**: queues, batches, retries, waits. What is full says so (OVERLOADED).
* **Nobody is let in unasked** (`tls`, `access`, `tokens`, `admission`): with TLS who calls is known, and what is not in
  the table is refused; without TLS only loopback is served.
* **One mapper of errors** (`errors`): whatever leaves a servicer is a status with an ErrorInfo.
* **The database is the only thing whose loss stops writes** (`database`); Redis (`lock`) and Kafka
  (`outbox`, `consumer`) may come and go.
"""
