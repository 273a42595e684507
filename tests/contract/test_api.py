"""docs/api.md lists the calls, errors and topics that the contracts have."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.topics import TOPICS
from tests.contract.test_error_reasons import comment, documented_errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/api.md").read_text()
RPC = re.compile(r"((?:^  //.*\n)+)^  rpc (\w+)\((stream )?\w+\) returns \((stream )?\w+\)", re.MULTILINE)
STREAMS = {(True, False): " (stream in)", (False, True): " (stream out)", (True, True): " (stream both ways)"}


def calls(proto: Path) -> Iterator[str]:
    """A row for each call of a contract: the first sentence of its comment."""
    for lines, name, goes_in, comes_out in RPC.findall(proto.read_text()):
        sentence = re.split(r"(?<=\.) (?=[A-Z])|;", comment(lines))[0].rstrip(".")
        yield f"| `{name}`{STREAMS.get((bool(goes_in), bool(comes_out)), '')} | {sentence} |"


def reasons(api: str) -> Iterator[str]:
    """A row for each error of an API: its code, and the first sentence of its comment."""
    for name, code, says in documented_errors(api):
        yield f"| `{name}` | {code} | {re.split(r'(?<=[.]) (?=[A-Z])', says)[0].rstrip('.')} |"


CONTRACTS = [path for path in sorted((ROOT / "protos").rglob("*.proto")) if "\nservice " in path.read_text()]


@pytest.mark.parametrize("proto", CONTRACTS, ids=lambda path: path.stem)
def test_the_page_lists_each_call(proto: Path) -> None:
    """As the contract explains it."""
    assert [row for row in calls(proto) if row not in PAGE] == []


@pytest.mark.parametrize("api", ["inventory", "reservation", "analytics"])
def test_the_page_lists_each_error(api: str) -> None:
    """In the section of its API, with its code."""
    section = PAGE.split(f"\n### {api.capitalize()}'s errors\n", 1)[1].split("\n##", 1)[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == list(reasons(api))


def test_the_page_lists_each_topic() -> None:
    """All that are made."""
    assert set(re.findall(r"^\| `(holdfast\.[\w.]+)` \|", PAGE, re.MULTILINE)) == {topic.name for topic in TOPICS}
