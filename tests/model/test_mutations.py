"""The bugs that are planted fit the code as it is."""

import shutil
from pathlib import Path

import pytest

from tests.model.mutations import ROOT, Bug, bugs, planted


@pytest.mark.parametrize("bug", bugs(), ids=lambda bug: bug.name)
def test_a_bug_can_be_planted(bug: Bug, tmp_path: Path) -> None:
    """Its words stand in the code once, and what takes their place is Python; its tests are there."""
    files = {edit.file for edit in bug.edits}
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    planted(bug, tmp_path)
    for file in files:
        compile((tmp_path / file).read_text(), file, "exec")
    assert all((ROOT / test).exists() for test in bug.tests)
