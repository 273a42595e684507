"""Metrics, rules, dashboards and runbook speak of the same things."""

import re
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

from shared import metrics
from tests import monitoring

DECLARED = {one._name: one for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)}
RUNBOOK = (monitoring.ROOT / "docs/operations.md").read_text()
UNITS = ("seconds", "items", "messages", "units")
UNBOUNDED = {"sku", "location", "customer", "reservation_id", "hold_id", "pod"}


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_a_metric_is_named_and_explained(name: str) -> None:
    """It begins with the project's name, says what it means, and stands in the list of docs/operations.md."""
    metric = DECLARED[name]
    assert re.fullmatch(r"holdfast_[a-z_]+", name)
    assert len(metric._documentation) > 10
    assert metric._documentation.endswith(".")
    assert not UNBOUNDED & set(metric._labelnames)
    if metric._type == "histogram":
        assert name.endswith(UNITS)
    suffix = "_total" if metric._type == "counter" else ""
    assert f"| `{name}{suffix}` |" in RUNBOOK


@pytest.mark.parametrize(
    ("place", "query"), list(monitoring.queries()), ids=[place for place, _ in monitoring.queries()]
)
def test_a_query_asks_for_what_there_is(place: str, query: str) -> None:
    """Every metric in a rule or a dashboard is declared, and every recorded series is recorded."""
    assert monitoring.metrics(query) <= set(DECLARED), place
    recorded = {rule["record"] for group in monitoring.rule_groups() for rule in group["rules"] if "record" in rule}
    assert set(re.findall(r"holdfast:\w+:\w+", query)) <= recorded


def test_every_metric_is_looked_at() -> None:
    """What nobody asks for in a rule or a dashboard need not be measured."""
    asked = {name for _, query in monitoring.queries() for name in monitoring.metrics(query)}
    assert asked == set(DECLARED)


@pytest.mark.parametrize("alert", monitoring.alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    """It is a page or a ticket, and its runbook is a section of that name."""
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"
    assert re.search(rf"^#+ {alert['alert']}$", RUNBOOK, re.MULTILINE)


def test_a_dashboard_stands_alone() -> None:
    """Each has an id of its own, and asks the source that is chosen."""
    found = monitoring.dashboards()
    assert len({one["uid"] for one in found.values()}) == len(found) == 4
    for one in found.values():
        assert {panel["datasource"]["uid"] for panel in one["panels"]} == {"${datasource}"}
