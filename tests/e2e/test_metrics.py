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
    before = [
        await total(http, pods, "holdfast_calls_total", method=RESERVE, code="OK"),
        await total(http, pods, "holdfast_calls_total", method=GET, code="NOT_FOUND"),
        await total(http, pods, "holdfast_call_seconds_count", method=RESERVE),
        await total(http, pods, "holdfast_reservations_total", outcome="held"),
        await total(http, pods, "holdfast_calls_failed_total", method=GET),
    ]
    sku = await goods(holdfast, 5)
    assert (await holdfast.reserve(new(), [(sku, "", 1)])).outcome == rp.RESERVE_OUTCOME_HELD
    with pytest.raises(Refusal):
        await holdfast.get(new())
    after = [
        await total(http, pods, "holdfast_calls_total", method=RESERVE, code="OK"),
        await total(http, pods, "holdfast_calls_total", method=GET, code="NOT_FOUND"),
        await total(http, pods, "holdfast_call_seconds_count", method=RESERVE),
        await total(http, pods, "holdfast_reservations_total", outcome="held"),
        await total(http, pods, "holdfast_calls_failed_total", method=GET),
    ]
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


async def test_the_rules_are_rules(tmp_path: Path) -> None:
    """Promtool takes them."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": monitoring.rule_groups()}))
    checking = await asyncio.create_subprocess_exec(
        "promtool", "check", "rules", file, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await checking.communicate()
    assert checking.returncode == 0, said.decode()


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
