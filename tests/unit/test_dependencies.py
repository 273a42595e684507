"""What Holdfast is built on may be used, and what may not is told by name."""

import json
import subprocess
from typing import Any

import pytest

from deploy import dependencies


def test_what_runs_in_a_pod_has_licences_that_are_allowed() -> None:
    """Needs no network; finds what is needed by what is needed."""
    names = dependencies.runtime()
    assert {"grpcio", "cryptography", "cffi", "hiredis"} <= names
    assert not names & {"pytest", "ruff"}
    assert dependencies.licences() == []


@pytest.mark.parametrize(
    ("licence", "answer"),
    [
        ("MIT", True),
        ("Apache-2.0 AND MIT", True),
        ("Apache Software License; MIT License", True),
        ("GPL-3.0-only OR MIT", True),
        ("(GPL-3.0-only OR MIT) AND Apache-2.0", True),
        ("GPL-3.0-only", False),
        ("MIT AND AGPL-3.0-or-later", False),
        ("GNU General Public License v3 (GPLv3); MIT License", False),
        ("UNKNOWN", False),
        ("", False),
    ],
)
def test_a_licence_is_allowed_by_each_of_its_parts(licence: str, answer: bool) -> None:
    """A choice by one of them."""
    assert dependencies.allowed(licence) is answer


def answered(packages: list[dict[str, Any]] | None) -> Any:
    def run(*_command: Any, **_more: Any) -> Any:
        if packages is None:
            raise subprocess.TimeoutExpired("pip-audit", 1)
        return subprocess.CompletedProcess([], 0, json.dumps({"dependencies": packages}), "")

    return run


def test_what_could_not_be_asked_about_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that does not answer, or does not know a package, is no clean bill."""
    monkeypatch.setattr(subprocess, "run", answered(None))
    assert "does not answer" in dependencies.vulnerabilities()[1]
    known = {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}
    monkeypatch.setattr(subprocess, "run", answered([known, {"name": "b", "skip_reason": "not found"}]))
    found, remark = dependencies.vulnerabilities()
    assert found == ["a 1: X-1, mended in 2"]
    assert "in 1 of 2 packages" in remark
