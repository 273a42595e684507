"""What the monitoring of deploy/k8s asks Prometheus: its rules, and the queries of its dashboards."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "deploy/k8s/components/monitoring"
NAME = re.compile(r"\bholdfast_\w+")


def rule_groups() -> list[dict[str, Any]]:
    """The groups of the PrometheusRule, which is what Prometheus itself reads from a file of rules."""
    groups: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules/holdfast.yaml").read_text())["spec"]["groups"]
    return groups


def alerts() -> list[dict[str, Any]]:
    return [rule for group in rule_groups() for rule in group["rules"] if "alert" in rule]


def dashboards() -> dict[str, dict[str, Any]]:
    return {file.name: json.loads(file.read_text()) for file in sorted((MONITORING / "dashboards").glob("*.json"))}


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and the query; a dashboard's variables stand for all there is."""
    for group in rule_groups():
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"].replace("$service", ".*")


def metrics(query: str) -> set[str]:
    """The metrics that a query names, as they are declared: without what a counter's or a histogram's series add."""
    return {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in NAME.findall(query)}
