"""Code and contract name the same errors and the same statuses."""

import re
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
    text = Path(f"protos/holdfast/{api}/v1/error_reason.proto").read_text()
    documented: dict[str, str] = {}
    code = ""
    for line in text.splitlines():
        if found := re.match(r"\s*// ([A-Z_]+): ", line):
            code = found.group(1)
        elif found := re.match(r"\s*ERROR_REASON_(\w+) = [1-9]", line):
            documented[found.group(1)] = code
    assert documented == {str(reason): errors.codes[reason].name for reason in errors.codes}
    assert set(documented) == set(reasons.__members__)
