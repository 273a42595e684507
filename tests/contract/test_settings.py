"""docs/settings.md lists what is read from the environment, as the code has it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from services.analytics.settings import Settings as Analytics
from services.inventory.settings import Settings as Inventory
from services.reservation.settings import Settings as Reservation
from shared.settings import DistributionSettings, Settings

PAGE = (Path(__file__).parents[2] / "docs/settings.md").read_text()
SECTIONS: dict[str, tuple[type[BaseSettings], type[BaseSettings] | None]] = {
    "Every pod": (Settings, None),
    "Inventory": (Inventory, Settings),
    "Reservation": (Reservation, Settings),
    "Analytics": (Analytics, Settings),
    "Migrations": (DistributionSettings, Settings),
}


def rows(kind: type[BaseSettings], base: type[BaseSettings] | None) -> list[str]:
    """A row of the table for each setting that the base has not."""
    known = base.model_fields if base else {}
    return [
        f"| `HOLDFAST_{name.upper()}` | {_default(field)} | {field.description} |"
        for name, field in kind.model_fields.items()
        if name not in known
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    written = str(default).lower() if isinstance(default, bool) else f"{default}"
    return f"`{written}`" if written else ""


def listed(section: str) -> Sequence[str]:
    text = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [line for line in text.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_lists_what_there_is(section: str) -> None:
    """Name, default and meaning of each, in the order of the code."""
    assert listed(section) == rows(*SECTIONS[section])


@pytest.mark.parametrize("section", SECTIONS)
def test_a_setting_says_what_it_means(section: str) -> None:
    """In a sentence."""
    for name, field in SECTIONS[section][0].model_fields.items():
        assert (field.description or "").endswith("."), name
