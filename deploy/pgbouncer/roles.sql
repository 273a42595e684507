-- What pods ask for when they connect themselves (shared/database.py), for those that come through PgBouncer. Run in the
-- databases of inventory and reservation, as whoever may change the role that the pods log in as.
DO $$
DECLARE
  setting text[];
BEGIN
  FOREACH setting SLICE 1 IN ARRAY ARRAY[
    ['enable_hashjoin', 'off'], ['enable_mergejoin', 'off'], ['enable_seqscan', 'off'], ['enable_bitmapscan', 'off'],
    ['jit', 'off'], ['plan_cache_mode', 'force_generic_plan'], ['timezone', 'UTC'],
    ['idle_in_transaction_session_timeout', '500ms']
  ] LOOP
    EXECUTE format(
      'ALTER ROLE %I IN DATABASE %I SET %I TO %L', current_user, current_database(), setting[1], setting[2]
    );
  END LOOP;
END $$;
