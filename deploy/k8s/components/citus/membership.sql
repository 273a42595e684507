-- Who is in the cluster, and the databases of the services. Harmless to run again; a worker more is a line more.
SELECT citus_set_coordinator_host('citus-coordinator-0.citus-coordinator.holdfast.svc.cluster.local', 5432);
SELECT citus_add_node('citus-worker-0.citus-worker.holdfast.svc.cluster.local', 5432);
SELECT citus_add_node('citus-worker-1.citus-worker.holdfast.svc.cluster.local', 5432);
SELECT format('CREATE DATABASE %I', name) FROM unnest(ARRAY['inventory', 'reservation', 'analytics']) AS name
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec
