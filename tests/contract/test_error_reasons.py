"""Code and contract name the same errors and the same statuses."""

import re
from collections.abc import Iterator
from enum import EnumMeta
from pathlib import Path

import pytest

from services.analytics import domain as analytics
from services.analytics.servicer import ERRORS as ANALYTICS
from services.inventory import domain as inventory
from services.inventory.servicer import ERRORS as INVENTORY
from services.reservation import domain as reservation
from services.reservation.servicer import ERRORS as RESERVATION
from shared.errors import ErrorMap

REASON = re.compile(r"((?:^  //.*\n)+)^  ERROR_REASON_(\w+) = [1-9]", re.MULTILINE)


def comment(lines: str) -> str:
    return re.sub(r"\s*//\s?", " ", lines).strip()


def documented_errors(api: str) -> Iterator[tuple[str, str, str]]:
    """Each error that a contract names, with its code and what it means."""
    text = (Path(__file__).parents[2] / f"protos/holdfast/{api}/v1/error_reason.proto").read_text()
    for lines, reason in REASON.findall(text):
        code, _, says = comment(lines).partition(": ")
        yield reason, code, says


@pytest.mark.parametrize(
    ("api", "errors", "reasons"),
    [
        ("inventory", INVENTORY, inventory.Reason),
        ("reservation", RESERVATION, reservation.Reason),
        ("analytics", ANALYTICS, analytics.Reason),
    ],
)
def test_each_reason_is_sent_with_its_documented_code(api: str, errors: ErrorMap, reasons: EnumMeta) -> None:
    """The enum's comments, the domain's reasons and the map of codes agree."""
    documented = {reason: code for reason, code, _ in documented_errors(api)}
    assert documented == {str(reason): errors.codes[reason].name for reason in errors.codes}
    assert set(documented) == set(reasons.__members__)
