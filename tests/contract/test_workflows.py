"""Continuous integration calls what a developer calls."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_targets_that_are_called_exist(workflow: Path) -> None:
    """Every `make` target of a workflow is one of the Makefile."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {found for step in steps(workflow) for found in re.findall(r"\bmake ([a-z0-9-]+)", step.get("run", ""))}
    assert called <= targets


def test_what_runs_everywhere_runs_there() -> None:
    """Each target of `.ci/run` is a job's."""
    asked = set(re.findall(r"^make ([a-z0-9-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    text = (ROOT / ".github" / "workflows" / "ci.yaml").read_text()
    assert asked <= set(re.findall(r"\bmake ([a-z0-9-]+)", text))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_end_and_actions_have_versions(workflow: Path) -> None:
    """Every job has a time limit, and every action a version."""
    assert all(job["timeout-minutes"] for job in yaml.safe_load(workflow.read_text())["jobs"].values())
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|[0-9a-f]{40})", action) for action in used), used
