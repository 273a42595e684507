-- pgbench -n -f bench/reserve.sql -c 16 -T 10 postgresql://...: what PostgreSQL alone makes of holds that
-- come one a transaction, on the tables of a running inventory whose SKUs are S0 to S99999.
\set n random(0, 99999)
BEGIN;
SELECT on_hand, held, version FROM stock WHERE sku = 'S' || :n AND location = 'MAIN' FOR UPDATE;
UPDATE stock SET held = held + 1, version = version + 1 WHERE sku = 'S' || :n AND location = 'MAIN'
  RETURNING version AS version, on_hand AS on_hand, held AS held \gset
INSERT INTO hold (sku, hold_id, slot, location, quantity, held, fingerprint, created_at, expires_at)
VALUES ('S' || :n, gen_random_uuid()::text, 0, 'MAIN', 1, 1, '', now(), now() + interval '15 min');
INSERT INTO movement (sku, location, version, kind, on_hand_delta, held_delta, short_delta, on_hand, held, short,
                      safety_stock, backorder_limit, hold_id, request_id, reference, recorded_at)
VALUES ('S' || :n, 'MAIN', :version, 'HOLD', 0, 1, 0, :on_hand, :held, 0, 0, 0, '', '', '', now());
INSERT INTO movement_outbox (skus, locations, versions, recorded_at, traceparent)
VALUES (ARRAY['S' || :n], ARRAY['MAIN'], ARRAY[:version], now(), '');
COMMIT;
