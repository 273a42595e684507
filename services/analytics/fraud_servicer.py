"""The edge of antifraud: decode and check, one call, encode. Errors, drains and pod names are the server's."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from holdfast.analytics.v1 import fraud_pb2 as pb
from holdfast.analytics.v1 import fraud_pb2_grpc

from services.analytics import alerts, cases, fraud, rules
from services.analytics.backtest import Outcome, Trial, backtest
from services.analytics.domain import Reason
from services.analytics.judge import Case, can_be_blocked
from services.analytics.reports import time_range
from services.analytics.settings import Settings
from services.analytics.turns import Turns
from shared import check, outbox, pages
from shared.database import Connection, Database, Record, fetch
from shared.refusal import Refusal
from shared.server import Context
from shared.wire import timestamp

RULES_MAX = 100
CASES_MAX = 1_000
CASES_DEFAULT = 100
RESERVATIONS_SHOWN = 100
NOTE_CHARACTERS_MAX = 500
WARM_UP = timedelta(days=30)
WARM_UP_SECONDS_MAX = 366 * 86_400
EXEMPT = timedelta(days=1)
BLOCK = timedelta(days=1)
STATES = {
    pb.CASE_DECISION_KEEP: "KEPT",
    pb.CASE_DECISION_RELEASE: "RELEASED",
    pb.CASE_DECISION_BLOCK: "RELEASED",
}
RULE = sa.table(
    "rule", sa.column("rule_id"), sa.column("version"), sa.column("state"), schema="desk",
)  # fmt: skip


class FraudServicer(fraud_pb2_grpc.FraudServiceServicer):
    """Rules, cases and backtests over a database."""

    def __init__(self, settings: Settings, database: Database, turns: Turns) -> None:
        self._policy = fraud.policy(settings)
        self._database = database
        self._turns = turns

    # -- rules --------------------------------------------------------------------------------------------------------

    async def CreateRule(self, request: pb.CreateRuleRequest, context: Context) -> pb.CreateRuleResponse:
        new, actor = rules.rule(request.rule), check.code(request.actor, "actor")
        request_id = check.code(request.request_id, "request_id")
        row = await self._database.run(
            lambda connection: cases.insert_rule(
                connection, new, state="DRAFT", actor=actor, request_id=request_id,
                fingerprint=rules.content(request.rule),
            )
        )  # fmt: skip
        return pb.CreateRuleResponse(rule=rules.message(row))

    async def ValidateRule(self, request: pb.ValidateRuleRequest, context: Context) -> pb.ValidateRuleResponse:
        rules.rule(request.rule)
        return pb.ValidateRuleResponse()

    async def ListRules(self, request: pb.ListRulesRequest, context: Context) -> pb.ListRulesResponse:
        state = check.name(pb.RuleState, request.state, "state", "RULE_STATE_", optional=True)
        rule_id = check.code(request.rule_id, "rule_id", optional=True)
        filters, size = (state, rule_id), pages.size(request.page_size)
        after = pages.decode(request.page_token, filters, 2)
        c = RULE.c
        statement: sa.Select[Any] = (
            sa.select(sa.literal_column("*")).select_from(RULE).order_by(c.rule_id, c.version.desc())
        )
        if after:
            at, number = after[0], pages.number(after[1])
            statement = statement.where((c.rule_id > at) | ((c.rule_id == at) & (c.version < number)))
        for column, value in ((c.state, state), (c.rule_id, rule_id)):
            if value:
                statement = statement.where(column == value)
        async with self._database.connection() as connection:
            rows = await fetch(connection, statement.limit(size + 1))
        token = ""
        if len(rows) > size:
            token = pages.encode([rows[size - 1]["rule_id"], str(rows[size - 1]["version"])], filters)
        return pb.ListRulesResponse(rules=[rules.message(row) for row in rows[:size]], next_page_token=token)

    async def ActivateRule(self, request: pb.ActivateRuleRequest, context: Context) -> pb.ActivateRuleResponse:
        return pb.ActivateRuleResponse(rule=await self._set_state(request, "ACTIVE"))

    async def ShadowRule(self, request: pb.ShadowRuleRequest, context: Context) -> pb.ShadowRuleResponse:
        return pb.ShadowRuleResponse(rule=await self._set_state(request, "SHADOW"))

    async def RetireRule(self, request: pb.RetireRuleRequest, context: Context) -> pb.RetireRuleResponse:
        return pb.RetireRuleResponse(rule=await self._set_state(request, "RETIRED"))

    async def _set_state(
        self, request: pb.ActivateRuleRequest | pb.ShadowRuleRequest | pb.RetireRuleRequest, state: str
    ) -> pb.Rule:
        rule_id, actor = check.code(request.rule_id, "rule_id"), check.code(request.actor, "actor")
        check.quantity(request.version, "version", most=2**31 - 1)
        row = await self._database.run(
            lambda connection: cases.set_rule_state(connection, rule_id, request.version, state, actor)
        )
        return rules.message(row)

    # -- cases --------------------------------------------------------------------------------------------------------

    async def ListCases(self, request: pb.ListCasesRequest, context: Context) -> pb.ListCasesResponse:
        conditions: dict[str, object] = {
            "state = ?": check.name(pb.CaseState, request.state, "state", "CASE_STATE_", optional=True),
            "decision = ?": check.name(pb.Decision, request.decision, "decision", "DECISION_", optional=True),
            "subject = ?": check.text(request.subject, "subject", 200),
            "rule_ids @> ARRAY[?]": check.code(request.rule_id, "rule_id", optional=True),
            "score >= ?": check.quantity(request.score_min, "score_min", least=0, most=2**31 - 1),
        }
        asked = {condition: value for condition, value in conditions.items() if value}
        async with self._database.connection() as connection:
            rows, token = await cases.CASES.page(connection, request, asked)
        return pb.ListCasesResponse(cases=[_case(row) for row in rows], next_page_token=token)

    async def GetCase(self, request: pb.GetCaseRequest, context: Context) -> pb.GetCaseResponse:
        case_id = check.code(request.case_id, "case_id")
        async with self._database.connection() as connection:
            row = await connection.fetchrow(cases.READ_CASE, case_id)
            entries = await connection.fetch(cases.ENTRIES, case_id)
        if row is None:
            raise _unknown(case_id)
        return pb.GetCaseResponse(
            case=_case(row),
            entries=[
                pb.CaseEntry(
                    time=timestamp(entry["entered_at"]), actor=entry["actor"], action=entry["action"],
                    note=entry["note"],
                )
                for entry in entries
            ],
        )  # fmt: skip

    async def DecideCase(self, request: pb.DecideCaseRequest, context: Context) -> pb.DecideCaseResponse:
        check.code(request.case_id, "case_id")
        check.code(request.actor, "actor")
        check.text(request.note, "note", NOTE_CHARACTERS_MAX)
        if request.decision not in STATES:
            raise check.invalid("decision", "must be KEEP, RELEASE or BLOCK")
        row = await self._database.run(lambda connection: _decide(connection, request))
        return pb.DecideCaseResponse(case=_case(row))

    # -- backtests ----------------------------------------------------------------------------------------------------

    async def BacktestRules(
        self, request: pb.BacktestRulesRequest, context: Context
    ) -> AsyncIterator[pb.BacktestRulesResponse]:
        check.count(len(request.rules), "rules", RULES_MAX)
        most = check.quantity(request.cases_max, "cases_max", least=0, most=CASES_MAX) or CASES_DEFAULT
        candidate = [rules.rule(rule, f"rules[{number}]") for number, rule in enumerate(request.rules)]
        asked = time_range(request.range, datetime.now(UTC))
        warm_up = WARM_UP
        if request.HasField("warm_up"):
            warm_up = check.duration(request.warm_up, "warm_up", least_seconds=0, most_seconds=WARM_UP_SECONDS_MAX)
        async with self._turns.turn():
            async with self._database.connection() as connection:
                active = [rule for rule in await cases.rules_in_use(connection) if not rule.shadow]
            trials = [Trial(some, self._policy, asked.start.timestamp()) for some in (candidate, active)]
            answer = pb.BacktestRulesResponse()
            async for done, total in backtest(self._database, trials, asked.start - warm_up, asked.end):
                answer = pb.BacktestRulesResponse(events_done=done, events_total=total)
                yield answer
        yield pb.BacktestRulesResponse(
            events_done=answer.events_done, events_total=answer.events_total,
            candidate=_outcome(trials[0].outcome(), most), active=_outcome(trials[1].outcome(), most),
        )  # fmt: skip


async def _decide(connection: Connection, request: pb.DecideCaseRequest) -> Record:
    """Decide a case once: its state, its audit, and what reservation is to do, in one transaction."""
    row = await connection.fetchrow(cases.LOCK_CASE, request.case_id)
    if row is None:
        raise _unknown(request.case_id)
    action = pb.CaseDecision.Name(request.decision).removeprefix("CASE_DECISION_")
    if row["state"] != "OPEN":
        before = await connection.fetch(cases.ENTRIES, request.case_id)
        if before and before[-1]["action"] == action:
            return row
        raise Refusal(
            Reason.CASE_CLOSED, f"{request.case_id} is {row['state']}", case_id=request.case_id, state=row["state"]
        )
    case = cases.case(row)
    now = max(datetime.now(UTC), cases.moment(case.updated_at))
    blocked_until = row["blocked_until"]
    verdicts = []
    if request.decision == pb.CASE_DECISION_KEEP:
        if blocked_until:
            verdicts.append(fraud.block(case.subject, case.opened_at, case.opened_at, case.case_id))
        blocked_until = None
    else:
        verdicts.append(fraud.release(case.case_id, case.reservation_ids))
    if request.decision == pb.CASE_DECISION_BLOCK:
        if not can_be_blocked(case.kind, case.subject):
            raise check.invalid("decision", "cannot be BLOCK: the case is not of a customer, device or network")
        blocked_until = now + BLOCK
        verdicts.append(fraud.block(case.subject, case.updated_at, blocked_until.timestamp(), case.case_id))
    await connection.execute(cases.ENTER, [case.case_id], request.actor, action, request.note)
    await outbox.write(connection, verdicts, table=cases.OUTBOX)
    await alerts.fraud_case_closed(connection, case.case_id)
    exempt_for = EXEMPT if request.decision == pb.CASE_DECISION_KEEP else None
    return await cases.decide(
        connection, case, state=STATES[request.decision], blocked_until=blocked_until, exempt_for=exempt_for
    )


def _case(row: Record) -> pb.Case:
    message = _message(cases.case(row), row["state"])
    message.create_time.CopyFrom(timestamp(row["created_at"]))
    return message


def _message(case: Case, state: str) -> pb.Case:
    return pb.Case(
        case_id=case.case_id,
        subject=case.subject,
        kind=pb.SubjectKind.Value(f"SUBJECT_KIND_{case.kind}"),
        state=pb.CaseState.Value(f"CASE_STATE_{state}"),
        decision=pb.Decision.Value(f"DECISION_{case.decision}"),
        score=case.score,
        rules=[rules.fired(one) for one in sorted(case.rules.values())],
        reservation_ids=case.reservation_ids[:RESERVATIONS_SHOWN],
        reservations=case.reservations,
        units=case.units,
        open_time=timestamp(cases.moment(case.opened_at)),
        update_time=timestamp(cases.moment(case.updated_at)),
        block_time=timestamp(cases.moment(case.blocked_until)) if case.blocked_until else None,
    )


def _outcome(outcome: Outcome, most: int) -> pb.BacktestOutcome:
    top = sorted(outcome.cases.values(), key=lambda case: (-case.score, case.opened_at, case.subject))
    return pb.BacktestOutcome(
        cases=len(outcome.cases),
        blocks=outcome.blocks,
        refused=outcome.refused,
        units_protected=outcome.units_protected,
        sales_blocked=outcome.sales_blocked,
        units_blocked=outcome.units_blocked,
        value_blocked_micros=outcome.value_blocked,
        top_cases=[_message(case, "OPEN") for case in top[:most]],
    )


def _unknown(case_id: str) -> Refusal:
    return Refusal(Reason.CASE_NOT_FOUND, f"there is no case {case_id}", case_id=case_id)
