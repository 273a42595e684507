"""What callers may send."""

import pytest

from shared import check
from shared.refusal import Refusal

PERSIAN = "می\u200cخواهم"  # noqa: RUF001 - not Latin


@pytest.mark.parametrize(
    "name", ["", "テーブル\u3000白", "Chaise\u00a0haute", "10\u202f000 pièces", PERSIAN, "👩\u200d👧", "ab\ufeffc"]
)
def test_text_is_of_any_script(name: str) -> None:
    """With the spaces and joiners that it is written with."""
    assert check.text(name, "sku.name", 200) == name


@pytest.mark.parametrize("character", "\0\t\n\r\x1f\x7f\x85\u2028\u2029\u202a\u202e\u2066\u2069\ud800")
def test_text_has_nothing_that_breaks_or_turns_what_is_around_it(character: str) -> None:
    """Control characters, line and paragraph separators, directions that are forced upon what follows."""
    with pytest.raises(Refusal) as refused:
        check.text(f"a{character}b", "sku.name", 200)
    assert refused.value.reason == "FIELD_INVALID"
    assert refused.value.message == "sku.name must not have control characters"
