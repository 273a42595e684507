"""Rules as data: from messages and from the file of defaults, checked; and as messages."""

import tomllib
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from holdfast.analytics.v1 import fraud_pb2 as pb

from services.analytics.judge import (
    KINDS,
    LIMITS,
    Comparison,
    Effect,
    Feature,
    Fired,
    Kind,
    Rule,
)
from shared import check
from shared.database import Record
from shared.wire import duration, fingerprint, timestamp

DEFAULTS = Path(__file__).with_name("rules.toml")
WINDOW_SECONDS_MAX = 24 * 3600
THRESHOLD_MAX = 10**12
SAMPLES_MAX = 1_000
SCORE_MAX = 100
REASON_CHARACTERS_MAX = 200
SET_BY_SERVICE: tuple[Literal["version", "state", "create_time", "change_time", "changed_by"], ...]
SET_BY_SERVICE = ("version", "state", "create_time", "change_time", "changed_by")
Name = TypeVar("Name")
_FEATURES: Mapping[int, Feature] = {pb.Feature.Value(f"FEATURE_{name}"): name for name in Feature}
_KINDS: Mapping[int, Kind] = {pb.SubjectKind.Value(f"SUBJECT_KIND_{name}"): name for name in Kind}
_COMPARISONS: Mapping[int, Comparison] = {pb.Comparison.Value(f"COMPARISON_{name}"): name for name in Comparison}
_EFFECTS: Mapping[int, Effect] = {pb.Effect.Value(f"EFFECT_{name}"): name for name in Effect}


def rule(message: pb.Rule, field: str = "rule", *, version: int = 0) -> Rule:
    """A rule, checked. Raises Refusal FIELD_INVALID with the name of what is wrong."""
    feature = _known(_FEATURES, message.feature, f"{field}.feature")
    by = _known(_KINDS, message.by, f"{field}.by")
    if by not in KINDS[feature]:
        raise check.invalid(f"{field}.by", f"must be one of {', '.join(sorted(KINDS[feature]))} for {feature}")
    comparison = _known(_COMPARISONS, message.comparison, f"{field}.comparison")
    effect = _known(_EFFECTS, message.effect or pb.EFFECT_SCORE, f"{field}.effect")
    window = message.window.seconds + message.window.nanos / 1e9
    if not 1 <= window <= WINDOW_SECONDS_MAX:
        raise check.invalid(f"{field}.window", f"must be from 1 to {WINDOW_SECONDS_MAX} seconds")
    if not 0 <= message.threshold <= THRESHOLD_MAX:
        raise check.invalid(f"{field}.threshold", f"must be from 0 to {THRESHOLD_MAX}")
    sampled = feature is Feature.LOST_SHARE
    check.quantity(message.samples_min, f"{field}.samples_min", least=0, most=SAMPLES_MAX if sampled else 0)
    if effect is Effect.LIMIT:
        if feature not in LIMITS or by is Kind.SKU or comparison is not Comparison.AT_LEAST:
            raise check.invalid(
                f"{field}.effect", "LIMIT takes HOLDS or UNITS_OF_SKU, AT_LEAST, by a customer, device or network"
            )
        if message.threshold < 1 or message.threshold % 1:
            raise check.invalid(f"{field}.threshold", "of a LIMIT must be a whole number from 1 on")
    scores = effect is Effect.SCORE
    check.quantity(message.score, f"{field}.score", least=int(scores), most=SCORE_MAX if scores else 0)
    return Rule(
        check.code(message.rule_id, f"{field}.rule_id"),
        version,
        feature,
        by,
        window,
        comparison,
        message.threshold,
        message.samples_min,
        message.score,
        effect,
        check.text(message.reason, f"{field}.reason", REASON_CHARACTERS_MAX),
    )


def message(row: Record) -> pb.Rule:
    return pb.Rule(
        rule_id=row["rule_id"],
        version=row["version"],
        state=pb.RuleState.Value(f"RULE_STATE_{row['state']}"),
        feature=pb.Feature.Value(f"FEATURE_{row['feature']}"),
        by=pb.SubjectKind.Value(f"SUBJECT_KIND_{row['by_kind']}"),
        window=duration(timedelta(seconds=row["window_seconds"])),
        comparison=pb.Comparison.Value(f"COMPARISON_{row['comparison']}"),
        threshold=row["threshold"],
        samples_min=row["samples_min"],
        score=row["score"],
        effect=pb.Effect.Value(f"EFFECT_{row['effect']}"),
        reason=row["reason"],
        create_time=timestamp(row["created_at"]),
        change_time=timestamp(row["changed_at"]),
        changed_by=row["changed_by"],
    )


def content(message: pb.Rule) -> bytes:
    """What tells whether two requests ask for the same rule: all but what the service sets."""
    asked = pb.Rule()
    asked.CopyFrom(message)
    for name in SET_BY_SERVICE:
        asked.ClearField(name)
    return fingerprint(asked)


def fired(value: Fired) -> pb.FiredRule:
    return pb.FiredRule(**value._asdict())


@cache
def defaults() -> tuple[tuple[pb.Rule, str], ...]:
    """The rules of the file, each with the state that it begins in."""
    with DEFAULTS.open("rb") as file:
        entries = tomllib.load(file)["rules"]
    return tuple((_default(entry), entry.get("state", "ACTIVE")) for entry in entries)


def _default(entry: Mapping[str, Any]) -> pb.Rule:
    return pb.Rule(
        rule_id=entry["rule_id"],
        feature=pb.Feature.Value(f"FEATURE_{entry['feature']}"),
        by=pb.SubjectKind.Value(f"SUBJECT_KIND_{entry['by']}"),
        window=duration(timedelta(seconds=entry["window"])),
        comparison=pb.COMPARISON_AT_LEAST,
        threshold=entry["threshold"],
        samples_min=entry.get("samples_min", 0),
        score=entry.get("score", 0),
        effect=pb.Effect.Value(f"EFFECT_{entry.get('effect', 'SCORE')}"),
        reason=entry["reason"],
    )


def _known(names: Mapping[int, Name], value: int, field: str) -> Name:
    if value not in names:
        raise check.invalid(field, f"must be one of {', '.join(str(name) for name in names.values())}")
    return names[value]
