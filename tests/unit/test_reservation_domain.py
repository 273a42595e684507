"""Reservation's transitions."""

from datetime import UTC, datetime, timedelta

import pytest

from services.reservation.domain import (
    Action,
    Allocation,
    Changed,
    Mode,
    Reservation,
    State,
    barred,
    book,
    book_expiry,
    settle,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def reservation(state: State, *parts: Allocation) -> Reservation:
    return Reservation("r", "", state, Mode.ALL, b"", (), parts, (), NOW, NOW, NOW, NOW, "")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.CONFIRMED, "RESERVATION_NOT_HELD"),
        (State.CANCELLED, "RESERVATION_NOT_HELD"),
        (State.REJECTED, "RESERVATION_NOT_HELD"),
        (State.EXPIRED, "RESERVATION_EXPIRED"),
    ],
)
def test_what_is_not_held_says_why_it_cannot_change(state: State, reason: str) -> None:
    """Each state refuses, by name."""
    assert barred(reservation(state)).reason == reason


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


def test_what_inventory_answered_is_booked() -> None:
    """Quantities move out of held, the state follows when nothing is left, and no time runs backwards."""
    first = reservation(State.HELD, Allocation("A", "X", 5), Allocation("B", "X", 1))
    later, earlier = NOW + timedelta(seconds=9), NOW - timedelta(seconds=9)
    second = book(first, Action.CONFIRM, Changed((("A", "X", 5),), later, earlier))
    assert second.allocations == (Allocation("A", "X", 0, 5), Allocation("B", "X", 1))
    assert (second.state, second.expires_at, second.updated_at) == (State.HELD, later, NOW)
    third = book(second, Action.CANCEL, Changed((("B", "X", 1),), NOW, later))
    assert third.allocations == (Allocation("A", "X", 0, 5), Allocation("B", "X", 0, 0, 1))
    assert (third.state, third.expires_at, third.updated_at) == (State.CONFIRMED, later, later)


def test_expiry_is_booked_once_and_never_beyond_what_is_held() -> None:
    """Inventory tells all that ever expired; what was booked, or sold but not yet booked, stays out."""
    parts = [Allocation("A", "X", 5, expired=0), Allocation("B", "X", 1, expired=3), Allocation("C", "X", 0, 5)]
    expired = Changed((("A", "X", 2), ("B", "X", 3), ("C", "X", 4)), NOW, NOW)
    booked = book_expiry(reservation(State.HELD, *parts), expired)
    assert booked.allocations == (Allocation("A", "X", 3, expired=2), *parts[1:])
    assert book_expiry(booked, expired) is booked
