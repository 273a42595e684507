"""`python -m tests.model.mutations [--only NAME]`: plants bugs one at a time, and says which test catches each.

A suite that passes says something only if it would not pass otherwise. Each bug is a change of a few words that someone
could make by mistake. It is made in a copy of the project; then the tests that ought to notice are run there, until one
fails. A bug that none of them notices is a hole in the suite, and makes this program fail.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
BUGS = Path(__file__).with_name("bugs.toml")
COPIED = ("services", "shared", "deploy", "tests", "protos", "bench", "pyproject.toml")
LINKED = (".venv", "gen")
SECONDS_MAX = 420
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class Edit(NamedTuple):
    """Words of a file, and what stands there instead."""

    file: str
    old: str
    new: str


class Bug(NamedTuple):
    """A planted bug, and the files of tests that ought to notice."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def bugs() -> list[Bug]:
    with BUGS.open("rb") as file:
        told = tomllib.load(file)["bugs"]
    return [Bug(one["name"], tuple(Edit(**edit) for edit in one["edits"]), tuple(one["tests"])) for one in told]


def planted(bug: Bug, root: Path) -> None:
    """Make the edits in a copy. Raises ValueError where the words are not there, or more than once."""
    for edit in bug.edits:
        file = root / edit.file
        text = file.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(
                f"{bug.name}: {edit.file} has the words {text.count(edit.old)} times: {edit.old.strip()[:60]}"
            )
        file.write_text(text.replace(edit.old, edit.new))


def copied(to: Path) -> None:
    """The project without what is made of it; the environment and Kafka's jars are shared."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    for name in LINKED:
        (to / name).symlink_to(ROOT / name)
    (to / ".local").mkdir()
    (to / ".local/kafka").symlink_to(ROOT / ".local/kafka")


def caught_by(bug: Bug) -> tuple[str, float]:
    """The first test that fails with the bug, and how many seconds that took; "" when none does."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="holdfast-planted-") as directory:
        copied(Path(directory))
        planted(bug, Path(directory))
        command = [str(ROOT / ".venv/bin/python"), "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        try:
            run = subprocess.run(
                [*command, *bug.tests], cwd=directory, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
            )
        except subprocess.TimeoutExpired:
            return "(it hangs)", time.monotonic() - began
    failed = FAILED.search(run.stdout)
    if run.returncode not in {0, 1}:
        return f"(pytest ended with {run.returncode})", time.monotonic() - began
    return failed[1] if failed else "", time.monotonic() - began


def chosen(only: Sequence[str]) -> Iterator[Bug]:
    known = bugs()
    unknown = set(only) - {bug.name for bug in known}
    if unknown:
        raise SystemExit(f"no such bug: {', '.join(sorted(unknown))}")
    return (bug for bug in known if not only or bug.name in only)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.mutations", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="this bug; may be repeated")
    parser.add_argument("--json", type=Path, help="write what caught each here")
    arguments = parser.parse_args()
    console = Console()
    table = Table("bug", "caught by", "s", box=None, pad_edge=False)
    found: dict[str, str] = {}
    for bug in chosen(arguments.only):
        console.print(f"{bug.name} ...", style="dim", highlight=False)
        test, seconds = caught_by(bug)
        found[bug.name] = test
        table.add_row(bug.name, test or "[red]nobody[/]", f"{seconds:.0f}")
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    console.print(table)
    missed = [name for name, test in found.items() if not test]
    console.print(f"{len(found) - len(missed)} of {len(found)} planted bugs are caught")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
