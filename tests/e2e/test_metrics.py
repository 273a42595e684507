"""What pods show to Prometheus, and what Prometheus makes of it."""

import asyncio
import contextlib
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from holdfast.reservation.v1 import reservation_pb2 as rp
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.stack import free_port, tail
from deploy.local.supervisor import Pod, Supervisor
from shared.client import Holdfast
from shared.refusal import Refusal
from shared.workers import MEASURE_SECONDS
from tests import monitoring
from tests.e2e.shop import goods, new

RESERVE = "holdfast.reservation.v1.ReservationService/Reserve"
GET = "holdfast.reservation.v1.ReservationService/GetReservation"
SERVICE_NAMES = ("inventory", "reservation", "analytics")
READY_SECONDS_MAX = 30
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def shown(http: aiohttp.ClientSession, pod: Pod) -> Samples:
    """What a pod shows: (name, labels) and value of each series."""
    async with http.get(f"http://{pod.metrics_address}/metrics") as response:
        assert response.status == 200
        families = text_string_to_metric_families(await response.text())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


async def total(http: aiohttp.ClientSession, pods: Supervisor, name: str, **labels: str) -> float:
    """A series summed over all pods."""
    everything = [await shown(http, pod) for pod in pods.pods]
    wanted = (name, tuple(sorted(labels.items())))
    return sum(samples.get(wanted, 0) for samples in everything)


async def test_calls_are_counted_by_how_they_end(
    holdfast: Holdfast, pods: Supervisor, http: aiohttp.ClientSession
) -> None:
    """A Reserve and a call for what is not there: each once, in its method, with its status; neither is our fault."""

    async def counted() -> list[float]:
        return [
            await total(http, pods, "holdfast_calls_total", method=RESERVE, code="OK"),
            await total(http, pods, "holdfast_calls_total", method=GET, code="NOT_FOUND"),
            await total(http, pods, "holdfast_call_seconds_count", method=RESERVE),
            await total(http, pods, "holdfast_reservations_total", outcome="held"),
            await total(http, pods, "holdfast_calls_failed_total", method=GET),
        ]

    before = await counted()
    sku = await goods(holdfast, 5)
    assert (await holdfast.reserve(new(), [(sku, "", 1)])).outcome == rp.RESERVE_OUTCOME_HELD
    with pytest.raises(Refusal):
        await holdfast.get(new())
    after = await counted()
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 1, 1, 0]


async def test_what_is_open_is_measured_on_every_pod(
    holdfast: Holdfast, pods: Supervisor, http: aiohttp.ClientSession
) -> None:
    """A hold is counted by both pods of inventory within a few seconds, and no measuring fails."""
    sku = await goods(holdfast, 5)
    await holdfast.reserve(new(), [(sku, "", 1)])
    inventory = [pod for pod in pods.pods if pod.service.name == "inventory"]
    async with asyncio.timeout(4 * MEASURE_SECONDS):
        while not all([(await shown(http, pod))["holdfast_holds_open", ()] > 0 for pod in inventory]):
            await asyncio.sleep(0.1)
    for pod in pods.pods:
        assert ("holdfast_worker_restarts_total", (("worker", "measures"),)) not in await shown(http, pod)


async def promtool(root: Path, *arguments: str) -> None:
    """Run it on the rules; what it finds wrong is a failure."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    (root / "rules.yaml").write_text(yaml.safe_dump({"groups": monitoring.rule_groups()}))
    running = await asyncio.create_subprocess_exec(
        "promtool", *arguments, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await running.communicate()
    assert running.returncode == 0, said.decode()


async def test_the_rules_are_rules(tmp_path: Path) -> None:
    """Promtool takes them."""
    await promtool(tmp_path, "check", "rules", "rules.yaml")


# Series by the minute for an hour, and the alerts that fire in its last quarter: none for what is as it should be.
WELL = {f'holdfast_calls_in_flight{{service="{name}",pod="{name}-0"}}': "3x60" for name in SERVICE_NAMES} | {
    'holdfast_calls_total{service="inventory",method="x/PlaceHolds",code="OK"}': "0+600x60",
    'holdfast_calls_failed_total{service="inventory",method="x/PlaceHolds"}': "0x60",
    'holdfast_outbox_age_seconds{service="inventory",outbox="movement_outbox"}': "1x60",
    'holdfast_relayed_total{service="inventory",topic="t"}': "0+600x60",
    'holdfast_drift_units{service="inventory",of="ledger"}': "0x60",
    'holdfast_dead_letters{service="analytics",topic="t.dlq"}': "0x60",
    'holdfast_locks_held{service="inventory",lock="inventory:reconciler",pod="a"}': "1x30 0x30",
    'holdfast_locks_held{service="inventory",lock="inventory:reconciler",pod="b"}': "0x30 1x30",
    'holdfast_mart_lag_seconds{service="analytics"}': "1x60",
}
OLD = {'holdfast_outbox_age_seconds{service="inventory",outbox="movement_outbox"}': "0+60x60"}
SICK: dict[str, tuple[dict[str, str], set[str]]] = {
    "as it should be": ({}, set()),
    "stock drifts": ({'holdfast_drift_units{service="inventory",of="ledger"}': "0x30 2x30"}, {"HoldfastDrift"}),
    "events wait, and some are sent": (OLD, {"HoldfastOutboxOld"}),
    "events wait, and none is sent": (
        OLD | {'holdfast_relayed_total{service="inventory",topic="t"}': "600x60"},
        {"HoldfastOutboxOld", "HoldfastRelayStalled"},
    ),
    "a tenth of the calls fail": (
        {'holdfast_calls_failed_total{service="inventory",method="x/PlaceHolds"}': "0+60x60"},
        {"HoldfastErrorRatio", "HoldfastErrorsBurnFast"},
    ),
    "a call in three thousand fails": (
        {'holdfast_calls_failed_total{service="inventory",method="x/PlaceHolds"}': "0+0.2x60"},
        set(),
    ),
    "a queue refuses": (
        {'holdfast_sheds_total{service="inventory",queue="holds",reason="full"}': "0+600x60"},
        {"HoldfastSheds"},
    ),
    "dead letters": ({'holdfast_dead_letters{service="analytics",topic="t.dlq"}': "1x60"}, {"HoldfastDeadLetters"}),
    "nobody reconciles": (
        {'holdfast_locks_held{service="inventory",lock="inventory:reconciler",pod="b"}': "0x60"},
        {"HoldfastWorkersIdle"},
    ),
    "a service is gone": (
        {'holdfast_calls_in_flight{service="analytics",pod="analytics-0"}': "3x30 stale"},
        {"HoldfastNoPods"},
    ),
    "analytics is behind": ({'holdfast_mart_lag_seconds{service="analytics"}': "0+10x60"}, {"HoldfastMartLag"}),
    "expired holds stay": (
        {'holdfast_expiry_overdue_seconds{service="inventory"}': "0+10x60"},
        {"HoldfastExpiryDelayed"},
    ),
    "the database is gone": (
        {'holdfast_database_unavailable_total{service="inventory",pool="main"}': "0+60x60"},
        {"HoldfastDatabaseUnavailable"},
    ),
    "the pool is full": (
        {
            'holdfast_database_connections{service="inventory",pod="a",pool="main"}': "10x60",
            'holdfast_database_connections_max{service="inventory",pod="a",pool="main"}': "10x60",
            'holdfast_database_wait_seconds_bucket{service="inventory",pod="a",pool="main",le="0.1"}': "0+60x60",
            'holdfast_database_wait_seconds_bucket{service="inventory",pod="a",pool="main",le="0.25"}': "0+90x60",
            'holdfast_database_wait_seconds_bucket{service="inventory",pod="a",pool="main",le="+Inf"}': "0+90x60",
        },
        {"HoldfastPoolExhausted"},
    ),
}


@pytest.mark.parametrize("what", SICK)
async def test_an_alert_fires_when_it_should(what: str, tmp_path: Path) -> None:
    """And no other does."""
    series, firing = SICK[what]
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(firing)]
    fires = {
        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "50m", "exp_samples": expected
    }  # fmt: skip
    given = [{"series": name, "values": values} for name, values in (WELL | series).items()]
    tests = [{"interval": "1m", "input_series": given, "promql_expr_test": [fires]}]
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    await promtool(tmp_path, "test", "rules", "test.yaml")


@contextlib.asynccontextmanager
async def prometheus(root: Path, pods: Supervisor) -> AsyncIterator[str]:
    """The address of a Prometheus that scrapes the pods every second, and works out the rules as often."""
    (root / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{**group, "interval": "1s"} for group in monitoring.rule_groups()]})
    )
    targets = [
        {
            "targets": [pod.metrics_address],
            "labels": {"service": pod.service.name, "role": "api", "pod": pod.name, "namespace": "holdfast"},
        }
        for pod in pods.pods
    ]
    config = {
        "global": {"scrape_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "holdfast", "static_configs": targets}],
    }
    (root / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={root / 'prometheus.yaml'}", f"--storage.tsdb.path={root / 'data'}",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    with (root / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        await process.wait()


async def asked(http: aiohttp.ClientSession, url: str, **parameters: str) -> Any:
    """What Prometheus answers; what it makes of a bad query is a failure."""
    async with http.post(url, data=parameters) if parameters else http.get(url) as response:
        answer = await response.json()
    assert answer["status"] == "success", answer
    return answer["data"]


async def test_prometheus_answers_every_query(
    holdfast: Holdfast, pods: Supervisor, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Every rule and every query of a dashboard is run on what the running pods show, and names what is there."""
    if not shutil.which("prometheus"):
        pytest.skip("Prometheus is not installed (Debian: apt-get install prometheus)")
    sku = await goods(holdfast, 100)
    async with prometheus(tmp_path, pods) as url:

        async def ready() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                name = new()
                await holdfast.reserve(name, [(sku, "", 1)])
                await holdfast.confirm(name, "paid")
                targets = (await asked(http, f"{url}/api/v1/targets"))["activeTargets"]
                rules = [r for g in (await asked(http, f"{url}/api/v1/rules"))["groups"] for r in g["rules"]]
                up = len(targets) == len(pods.pods) and {one["health"] for one in targets} == {"up"}
                traffic = await asked(http, f"{url}/api/v1/query", query="holdfast:calls_failed:ratio_rate5m > -1")
                return up and {one["health"] for one in rules} == {"ok"} and len(traffic["result"]) >= 2
            return False

        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                while not await ready():
                    await asyncio.sleep(0.2)
        except TimeoutError:
            pytest.fail(f"Prometheus did not follow; its last lines:\n{tail(tmp_path / 'log')}")
        known = set(await asked(http, f"{url}/api/v1/metadata"))
        known = {re.sub(r"_total$", "", name) for name in known}
        answers = {}
        for place, query in monitoring.queries():
            answers[place] = await asked(http, f"{url}/api/v1/query", query=query)
            assert monitoring.metrics(query) <= known, place
        firing = [one["labels"]["alertname"] for one in (await asked(http, f"{url}/api/v1/alerts"))["alerts"]]
        assert "HoldfastDrift" not in firing
        assert "HoldfastNoPods" not in firing
    calls = answers["service.json: Calls"]["result"]
    assert RESERVE in {one["metric"]["method"] for one in calls}
