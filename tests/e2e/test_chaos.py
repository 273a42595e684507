"""A short form of `make chaos`: the faults that cost most, one after the other, and the auditor's judgement.

How late holds expire is judged by `make chaos` alone: of the few here the latest would decide.
"""

from pathlib import Path

import pytest

from tests.model.chaos import run

FAULTS = (
    "pod killed",
    "answers lost",
    "clock jumped",
    "Redis killed",
    "pod frozen",
    "PostgreSQL killed",
    "Kafka killed",
)


@pytest.mark.timeout(300)
async def test_nothing_is_lost_or_sold_twice_whatever_fails(tmp_path: Path) -> None:
    """Shoppers go on; what was answered is so, once; everything comes back without a hand."""
    outcome = await run(tmp_path, seed=20, calm_seconds=3, fault_seconds=600, every=2, only=FAULTS)
    assert outcome.report.violations == []
    assert sorted(outcome.faults) == sorted(FAULTS)
    assert outcome.calls["OK"] > 100
    assert outcome.report.looked_at["reservations against holds"] > 10
    assert outcome.report.looked_at["movements in the topic"] >= outcome.report.looked_at["movements"]
    assert max(outcome.back_seconds) < 30
