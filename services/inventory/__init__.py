"""Inventory: what is on the shelf, what is promised of it, and the ledger of every change.

What it promises, and what keeps the promise:

* `0 <= held <= on_hand + backorder_limit + short` for every (sku, location), and a new hold leaves
  `safety_stock` alone. Twice guarded: by the WHERE of the write itself (`store.PLACE`) or by a decision
  made from rows that the same transaction has locked (`store.LOCK`), and by a CHECK constraint.
* Every change is a movement; versions have no gap; counters equal the sum of movements at each commit.
* Every write has a request id, and a repeat finds its own first outcome: a hold in `hold`, a commit,
  release or extension in `hold_change`, everything else in `request`. Refusals are kept as well.
* State and event commit together (`shared.outbox`).

How a hold is decided, when many pods decide at once:

1. *At once.* The whole batch's demand, summed for each key, in one guarded UPDATE over the sorted keys
   (`store.PLACE`); a line that leaves its location open asks its first source. If each key comes back, each is
   locked and paid for, and holds, movements and what the relay needs are written by the same statement.
2. *As seen.* Where that failed, or a SKU was scarce lately, or less than all may do: the batch is decided, in
   order of arrival, from stock that is read without a lock, and holds and refusals are written by the same
   statement. The keys that decide a plan must be of the version that was read, and no hold on one of them may
   have expired; of all others there must be enough.
3. *Exact*, where stock moved meanwhile or a hold has expired on what decides, a hold id was known or named twice,
   something named has no stock row, or someone comes out short of what the batch itself takes; and for very large
   batches. All keys that could be touched are locked in sorted order, expired holds on them are reclaimed, and
   requests are decided one after the other, in order of arrival, from the locked rows. No second round is
   needed: nothing can change under the locks. Where more has expired than one transaction gives back, that much is
   committed first and it begins anew.

A line that leaves its location open is decided from the locations that were open when it was looked at: stock that
comes to a new one meanwhile is for the next.

Stock rows are always locked before hold rows are touched, and always in ascending (sku, location): two
transactions cannot wait for each other. A hold's rows change only under its stock rows' locks, so commit,
release, extension, reclaim and sweep of one hold are serial, and each is whole or not at all. Commits, releases and
sweeps are tried as holds are: in one statement over rows as they were read (`store.CHANGE`), which is undone where
one is no longer so; then exactly.

Time is the database's, read after the locks were granted: a hold whose time has come by then has
expired, and recorded times never run backwards within a key.

Crashes: a transaction that falls silent, because its pod stands still, is ended by PostgreSQL after half a
second, and its locks with it. Before COMMIT nothing has happened; after it a retry with the same id finds
what happened. A hold that nobody comes back for expires. Redis is told after the commit and may miss it: a
cached value lives two seconds. Kafka is told by the relay.

    hold:  HELD --commit--> sold      (each by quantity; what is left goes on being held)
                --release--> free
                --expire---> free
           REFUSED (kept, so that a repeat sees it)
"""
