"""Between the domain's data and the wire's: requests checked, answers and events made."""

from collections.abc import Mapping
from datetime import timedelta

from google.protobuf.message import DecodeError
from holdfast.analytics.v1 import events_pb2 as analytics_events
from holdfast.analytics.v1 import fraud_pb2
from holdfast.reservation.v1 import error_reason_pb2, events_pb2
from holdfast.reservation.v1 import reservation_pb2 as pb

from services.reservation.domain import (
    Action,
    Allocation,
    Ask,
    Change,
    ChangeLine,
    Held,
    Line,
    Mode,
    Reason,
    Reservation,
    State,
)
from services.reservation.guard import Block, Heartbeat, Limit, Usage, Verdict
from services.reservation.subjects import Identity, Kind, network
from shared import check
from shared.consumer import Message, Poison
from shared.errors import ErrorMap
from shared.refusal import Refusal
from shared.wire import fingerprint, timestamp

CHANGES_TOPIC = "holdfast.reservation.changes.v1"
VERDICTS_TOPIC = "holdfast.analytics.verdicts.v1"
CHANGED_TYPE = events_pb2.ReservationChanged.DESCRIPTOR.full_name
LINES_MAX = 2_000
VALUE_MICROS_MAX = 10**18
SUBJECTS_MAX = 1_000
WINDOW_NANOS_MAX = 86_400 * 10**9

_MODES = {
    pb.RESERVE_MODE_UNSPECIFIED: Mode.ALL,
    pb.RESERVE_MODE_ALL: Mode.ALL,
    pb.RESERVE_MODE_BEST_EFFORT: Mode.BEST_EFFORT,
    pb.RESERVE_MODE_MINIMUM: Mode.MINIMUM,
}
_MODE_NAMES = {mode: pb.ReserveMode.Value(f"RESERVE_MODE_{mode}") for mode in Mode}
_STATE_NAMES = {state: pb.ReservationState.Value(f"RESERVATION_STATE_{state}") for state in State}
_STATES = {value: state for state, value in _STATE_NAMES.items()}
_KIND_NAMES = {kind: pb.IdentityKind.Value(f"IDENTITY_KIND_{kind}") for kind in Kind}
_KINDS = {value: kind for kind, value in _KIND_NAMES.items()}
_EVENT_FIELDS = {kind: kind.lower() for kind in Kind}
_SUBJECT_KINDS = {fraud_pb2.SubjectKind.Value(f"SUBJECT_KIND_{kind}"): kind for kind in Kind}
_LIMITED = {fraud_pb2.FEATURE_HOLDS: False, fraud_pb2.FEATURE_UNITS_OF_SKU: True}  # whether units are counted
_REASONS = {reason.value: error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}") for reason in Reason}


def ask(request: pb.ReserveRequest, field: str = "") -> Ask:
    """A Reserve, checked; `field` stands before the names of what is wrong."""
    at = f"{field}." if field else ""
    mode = _MODES.get(request.mode)
    if mode is None:
        raise check.invalid(f"{at}mode", "must be a known mode")
    check.count(len(request.lines), f"{at}lines", LINES_MAX)
    lines = tuple(_line(line, mode, f"{at}lines[{number}]") for number, line in enumerate(request.lines))
    if sum(line.quantity * line.price_micros for line in lines) > VALUE_MICROS_MAX:
        raise check.invalid(f"{at}lines", f"must be worth at most {VALUE_MICROS_MAX} micros together")
    totals: dict[tuple[str, str], int] = {}
    for line in lines:
        totals[line.sku, line.location] = totals.get((line.sku, line.location), 0) + line.quantity
    for (sku, _), total in totals.items():
        check.quantity(total, f"{at}lines: the sum for {sku}")
    return Ask(
        check.code(request.reservation_id, f"{at}reservation_id"),
        check.code(request.customer_id, f"{at}customer_id", optional=True),
        lines,
        mode,
        check.ttl(request.ttl, f"{at}ttl"),
        fingerprint(request),
        check.business_time(request, "order_time", f"{at}order_time"),
        check.text(request.country, f"{at}country", 64),
        check.code(request.device_id, f"{at}device_id", optional=True),
        _address(request.ip_address, f"{at}ip_address"),
    )


def _address(value: str, field: str) -> str:
    if value:
        _network(value, field)
        if "/" in value:
            raise check.invalid(field, "must be an address and no network")
    return value


def _network(value: str, field: str) -> str:
    try:
        return network(value)
    except ValueError:
        raise check.invalid(field, "must be an IPv4 or IPv6 address") from None


def _line(line: pb.ReservationLine, mode: Mode, at: str) -> Line:
    check.quantity(line.quantity, f"{at}.quantity")
    most = line.quantity if mode is Mode.MINIMUM else 0
    return Line(
        check.code(line.sku, f"{at}.sku"),
        check.code(line.location, f"{at}.location", optional=True),
        line.quantity,
        check.quantity(line.minimum_quantity, f"{at}.minimum_quantity", least=0, most=most),
        *check.money(line.unit_price.currency_code, line.unit_price.micros, f"{at}.unit_price"),
    )


def change(request: pb.ConfirmRequest | pb.CancelRequest, action: Action) -> Change:
    check.count(len(request.lines), "lines", LINES_MAX, least=0)
    return Change(
        check.code(request.reservation_id, "reservation_id"),
        check.code(request.request_id, "request_id"),
        action,
        tuple(
            ChangeLine(
                check.code(line.sku, f"lines[{number}].sku"),
                check.code(line.location, f"lines[{number}].location", optional=True),
                check.quantity(line.quantity, f"lines[{number}].quantity", least=0),
            )
            for number, line in enumerate(request.lines)
        ),
        timedelta(),
        action.value.encode() + fingerprint(request),
    )


def extension(request: pb.ExtendRequest) -> Change:
    return Change(
        check.code(request.reservation_id, "reservation_id"),
        check.code(request.request_id, "request_id"),
        Action.EXTEND,
        (),
        check.ttl(request.ttl, "ttl"),
        Action.EXTEND.value.encode() + fingerprint(request),
    )


def state(value: pb.ReservationState.ValueType) -> State | None:
    """The state of a filter; None for any."""
    if value == pb.RESERVATION_STATE_UNSPECIFIED:
        return None
    if value not in _STATES:
        raise check.invalid("state", "must be a known state")
    return _STATES[value]


def reservation(value: Reservation) -> pb.Reservation:
    return pb.Reservation(
        reservation_id=value.reservation_id,
        customer_id=value.customer_id,
        state=_STATE_NAMES[value.state],
        lines=[
            pb.ReservationLine(
                sku=line.sku,
                location=line.location,
                quantity=line.quantity,
                minimum_quantity=line.minimum,
                unit_price=pb.Money(currency_code=line.currency_code, micros=line.price_micros)
                if line.currency_code
                else None,
            )
            for line in value.lines
        ],
        allocations=[
            pb.Allocation(
                sku=part.sku,
                location=part.location,
                held=part.held,
                confirmed=part.confirmed,
                cancelled=part.cancelled,
                expired=part.expired,
            )
            for part in value.allocations
        ],
        short_lines=[
            pb.ShortLine(
                sku=line.sku,
                location=line.location,
                requested=line.requested,
                available=line.available,
                next_expiry=timestamp(line.next_expiry) if line.next_expiry else None,
            )
            for line in value.short_lines
        ],
        mode=_MODE_NAMES[value.mode],
        expire_time=timestamp(value.expires_at),
        create_time=timestamp(value.created_at),
        update_time=timestamp(value.updated_at),
        version=value.version,
        order_time=timestamp(value.order_time),
        country=value.country,
        device_id=value.device_id,
        ip_address=value.ip_address,
    )


def made(ask: Ask, held: Held) -> pb.Reservation:
    """A reservation as it was just decided."""
    return reservation(
        Reservation(
            ask.reservation_id,
            ask.customer_id,
            State.HELD if held.allocations else State.REJECTED,
            ask.mode,
            ask.fingerprint,
            ask.lines,
            tuple(Allocation(*part) for part in held.allocations),
            held.short_lines,
            held.expires_at,
            held.placed_at,
            held.placed_at,
            ask.order_time or held.placed_at,
            ask.country,
            device_id=ask.device_id,
            ip_address=ask.ip_address,
        )
    )


def reserved(value: pb.Reservation, *, replayed: bool) -> pb.ReserveResponse:
    rejected = value.state == pb.RESERVATION_STATE_REJECTED
    return pb.ReserveResponse(
        outcome=pb.RESERVE_OUTCOME_REJECTED if rejected else pb.RESERVE_OUTCOME_HELD,
        reservation=value,
        replayed=replayed,
    )


def item_error(refusal: Refusal, errors: ErrorMap) -> pb.ItemError:
    return pb.ItemError(
        code=errors.code(refusal).value[0],
        reason=_REASONS[refusal.reason],
        message=refusal.message,
        metadata=refusal.metadata,
    )


def changed_payload(value: pb.Reservation, subjects: Mapping[Kind, str], request_id: str = "") -> bytes:
    """The event of a reservation as it now is: `subjects` in place of whom it is for."""
    event = events_pb2.ReservationChanged(reservation=value, request_id=request_id)
    told = event.reservation
    told.customer_id = told.device_id = told.ip_address = ""
    for kind, subject in subjects.items():
        setattr(event.subjects, _EVENT_FIELDS[kind], subject)
    return event.SerializeToString()


def verdict(message: Message) -> Verdict | None:
    """What a message of VERDICTS_TOPIC tells the guard; None for a release. Raises Poison."""
    told = _told(message)
    try:
        match told.WhichOneof("verdict"):
            case "heartbeat":
                limits = tuple(_limit(limit) for limit in told.heartbeat.limits)
                return Heartbeat(check.time(told.heartbeat.complete_time, "complete_time"), limits)
            case "block":
                start, end = told.block.start_time, told.block.end_time
                return Block(told.block.subject, check.time(start, "start_time"), check.time(end, "end_time"))
            case "usage":
                usage = told.usage
                parts = sorted((check.time(part.leave_time, "leave_time"), part.used) for part in usage.parts)
                return Usage(usage.rule_id, usage.subject, usage.sku, tuple(parts), frozenset(usage.reservation_ids))
            case "release":
                return None
    except Refusal as refusal:
        raise Poison(f"a Verdict whose {refusal.message}") from None
    raise Poison("a Verdict of an unknown kind")


def releases(message: Message) -> list[Change]:
    """The changes that a message of VERDICTS_TOPIC asks for; none but of a release. Raises Poison."""
    told = _told(message).release
    try:
        return [
            change(pb.CancelRequest(reservation_id=name, request_id=f"case/{told.case_id}"), Action.CANCEL)
            for name in told.reservation_ids
        ]
    except Refusal as refusal:
        raise Poison(f"a Release whose {refusal.message}") from None


def _told(message: Message) -> analytics_events.Verdict:
    try:
        return analytics_events.Verdict.FromString(message.value or b"")
    except DecodeError:
        raise Poison("not a Verdict") from None


def _limit(limit: analytics_events.Limit) -> Limit:
    by, nanos = _SUBJECT_KINDS.get(limit.by), limit.window.ToNanoseconds()
    if limit.feature not in _LIMITED or by is None or not 0 < nanos <= WINDOW_NANOS_MAX:
        raise check.invalid("limits", "must be of holds or units, by customer, device or network, in a window")
    return Limit(limit.rule_id, _LIMITED[limit.feature], by, timedelta(microseconds=nanos // 1000), limit.most)


def resolve(request: pb.ResolveSubjectsRequest) -> tuple[list[str], list[Identity]]:
    """The hashes and the identities that are asked for, checked."""
    check.count(len(request.subjects) + len(request.identities), "subjects", SUBJECTS_MAX)
    return (
        [check.code(subject, f"subjects[{number}]") for number, subject in enumerate(request.subjects)],
        [_identity(one, f"identities[{number}]") for number, one in enumerate(request.identities)],
    )


def _identity(value: pb.Subject, at: str) -> Identity:
    kind = _KINDS.get(value.kind)
    if kind is None:
        raise check.invalid(f"{at}.kind", "must be a known kind")
    if kind is Kind.NETWORK:
        return Identity(kind, _network(value.value, f"{at}.value"))
    return Identity(kind, check.code(value.value, f"{at}.value"))


def subject(value: str, identity: Identity) -> pb.Subject:
    return pb.Subject(subject=value, kind=_KIND_NAMES[identity.kind], value=identity.value)
