"""Reservation's transitions."""

from datetime import UTC, datetime

import pytest

from services.reservation.domain import Allocation, Mode, Reservation, State, expiry, require_held, settle
from shared.refusal import Refusal

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.HELD, None),
        (State.CONFIRMED, "RESERVATION_NOT_HELD"),
        (State.CANCELLED, "RESERVATION_NOT_HELD"),
        (State.REJECTED, "RESERVATION_NOT_HELD"),
        (State.EXPIRED, "RESERVATION_EXPIRED"),
    ],
)
def test_only_what_is_held_can_change(state: State, reason: str | None) -> None:
    """Every other state refuses, by name."""
    reservation = Reservation("r", "", state, Mode.ALL, b"", (), (), (), NOW, NOW, NOW)
    if reason is None:
        require_held(reservation)
        return
    with pytest.raises(Refusal) as refused:
        require_held(reservation)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("parts", "state"),
    [
        ([Allocation("A", "X", 1, 5, 5, 5)], State.HELD),
        ([Allocation("A", "X", 0, 1, 5, 5)], State.CONFIRMED),
        ([Allocation("A", "X", 0, 0, 5, 1)], State.EXPIRED),
        ([Allocation("A", "X", 0, 0, 5, 0)], State.CANCELLED),
        ([Allocation("A", "X", 0, 0, 5, 0), Allocation("B", "X", 2)], State.HELD),
    ],
)
def test_the_state_follows_the_quantities(parts: list[Allocation], state: State) -> None:
    """Held while anything is; then confirmed, expired or cancelled, in this order."""
    assert settle(parts) is state


def test_expiry_is_booked_once_and_never_beyond_what_is_held() -> None:
    """Inventory tells all that ever expired; what was booked, or sold but not yet booked, stays out."""
    parts = [Allocation("A", "X", 5, expired=0), Allocation("B", "X", 1, expired=3), Allocation("C", "X", 0, 5)]
    assert expiry(parts, [("A", "X", 2), ("B", "X", 3), ("C", "X", 4)]) == [("A", "X", 2)]
