"""Analytics: what can be learned from every change of stock and of reservations.

It follows three topics into a database of its own and answers from there; it never calls the other services
or reads their databases. What it promises, and what keeps the promise:

* *Nothing lost, nothing doubled.* A batch of events of one partition is one transaction, which also moves the
  partition's offset (`consumed`) from where the batch began to where it ended. A crash before COMMIT has
  changed nothing and the events come again; after it they are not read again. Whoever works a partition that
  has moved to another pod finds the offset elsewhere, and its transaction changes nothing.
* *In order, by version.* A movement is applied when it is its key's next. A repeat changes nothing. A gap stops
  the key, and is told (`gap`, Freshness.keys_stopped); a worker reads the partition again for what is missing.
* *A poison message* goes to the dead letters with its reason, before the offset passes it.
* *Every answer says how fresh it is.* The relays of the other services tell, in each partition, a time before
  which everything recorded has been sent; `as_of` is the least of these over all partitions.

Beside it stand antifraud (`judge`, `fraud`) and notifications (`alerting`, `alerts`, `delivery`), each with its own
promises in its module. Their tables are in schema `desk`, which does not follow from the topics alone.

    topic --> projection: consumed, stock_view, movement, activity, stock_out, goods_return   (movements)
                          reservation, reservation_state, sale, refusal                       (changes)
                          sku, and the names in stock_view                                    (catalogue)
          --> reports, history                                                                (reads)
          --> fraud: signals, cases --> verdicts, which reservation enforces
          --> alerts --> deliveries --> channels

Sums over the last 24 hours, 7 and 30 days stand in the mart. Events add to them; a worker takes away, by the
hour, what has grown too old. The row `aging` is what the two share, so that no hour is missed between them.

Rebuild: all but the desk follows from the topics alone. `python -m services.analytics rebuild` reads them from the
beginning into a second schema beside the live one, and swaps the two in one transaction.
"""
