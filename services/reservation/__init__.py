r"""Reservation: the promise made to a customer, kept on top of inventory's holds.

    Reserve --> HELD --> CONFIRMED | CANCELLED | EXPIRED      by quantity; the state follows when nothing
            \-> REJECTED                                      is left held

What it promises, and what keeps the promise:

* HELD stays held until it is confirmed, cancelled or expired. Inventory decides, by its own database's
  clock; this service books what inventory answered, never the other way round.
* A repeat gets the first outcome. The client's reservation id is the hold's id and the row's key; later
  calls carry a request id that is kept in `reservation_change`. The same id with other content is
  REQUEST_ID_REUSED.
* State and event commit together (`shared.outbox`).
* Who a reservation is for (customer, device, address) stays in this service's own database: events carry keyed
  hashes (`subjects`), refusals and logs neither. Which hash stands for whom is inserted with the first reservation.
* What analytics has decided is enforced before inventory is asked, from memory (`guard`, `verdicts`): a blocked
  subject is refused, and no pod lets a burst past a limit. With Kafka or analytics away it goes on with what it
  knows, or refuses (`enforcement`). A retry still gets its first outcome. Neither is part of a promise about stock.

Reserve: hold at inventory, then insert the row. Crash in between: a retry finds the hold by its id and
goes on; without a retry the hold expires. Two pods with one id: the hold is one, the row is inserted
once, and the second reads it. Where a row of other content stands under the id, what was newly held is
given back.

Confirm, Cancel, Extend: the intent first (a PENDING row of `reservation_change`), then inventory, then
the booking, which turns PENDING into APPLIED and moves quantities in one transaction. Inventory knows
the change by its id, so any step may be repeated: by the client's retry, on any pod, or by the worker
that drives what has been PENDING for a while. A refusal is kept as well (REFUSED).

Expiry: inventory tells how much of a hold has ever expired, and that is booked; asking twice books
nothing twice. Quantities that inventory has committed but this service has not yet booked are left for
their PENDING change.
"""
