"""The embedded stack: real PostgreSQL, Redis and Kafka, and the pods, on one machine without containers.

Promises:
1. Nothing listens outside 127.0.0.1 (a test may give another `host`), and nothing is written outside the root
   directory (`.local/`) but two things: Kafka's jars, kept in the repository's `.local/kafka`, and, only when root's
   files cannot be reached by an unprivileged user, PostgreSQL's data, in a directory of its own under /var/tmp named
   in `<root>/postgres.home`.
2. What this package starts never outlives its owner. stop() ends it in order; if the owner dies in any other way,
   SIGKILL included, Linux signals every child (PR_SET_PDEATHSIG) and none is left.
3. Whatever a killed run left behind starts again: PostgreSQL recovers from its log with fsync on, Kafka rebuilds its
   indexes, Redis keeps nothing. Data that cannot be started (damaged, or of another major version) is said so in one
   line and made anew, all of it, because this data is a demonstration's and never the only copy of anything.
4. One stack a root directory at a time, held by a lock that dies with its owner.
5. What is missing on the machine is named before anything starts, with the command that gets it (`Missing`).

Not promised: secrecy towards other users of the machine (loopback, no passwords), or speed of a tuned cluster.

A pod's life under the supervisor:

    start -> STARTING --SERVING--> UP --dies--> STARTING (at most 5 restarts a minute, then DOWN and said)
                 |                  |
                 dies: error with   terminate() / kill() -> DOWN --restart()--> STARTING
                 its last lines
"""
