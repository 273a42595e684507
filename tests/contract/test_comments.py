"""The contracts explain themselves."""

import re
from pathlib import Path

import pytest

PROTOS = sorted(Path("protos").rglob("*.proto"))
DECLARATION = re.compile(r"^\s*(message|enum|service|rpc|oneof|[A-Za-z.<>, ]+ \w+ = \d+;|[A-Z_0-9]+ = \d+;)")


@pytest.mark.parametrize("path", PROTOS, ids=str)
def test_every_declaration_has_a_comment(path: Path) -> None:
    """A message, field, enum value, RPC or oneof without a comment above it is found."""
    lines = path.read_text().splitlines()
    bare = [
        f"{path}:{number + 1}: {line.strip()}"
        for number, line in enumerate(lines)
        if DECLARATION.match(line) and not lines[number - 1].strip().startswith("//")
    ]
    assert not bare
