"""Antifraud through two pods of each service: a bot is stopped, honest customers are not, cases are decided."""

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from holdfast.analytics.v1 import fraud_pb2 as pb
from holdfast.inventory.v1 import inventory_pb2 as ip
from holdfast.reservation.v1 import reservation_pb2 as rp

from deploy.local.analysis import caught_up
from shared.client import Holdfast
from shared.refusal import Refusal
from tests.e2e.shop import goods, new

LIMIT = 100  # holds a minute of a network, as services/analytics/rules.toml has it
SECONDS_MAX = 20


async def case_of(holdfast: Holdfast, subject: str, decision: int = 0) -> pb.Case:
    """The latest case of a subject, once there is one that has come to a decision."""
    deadline = time.monotonic() + SECONDS_MAX
    request = pb.ListCasesRequest(subject=subject)
    while True:
        found = (await holdfast.fraud.ListCases(request)).cases
        if found and found[0].decision >= decision:
            return found[0]
        assert time.monotonic() < deadline, f"no case of {subject}"
        await asyncio.sleep(0.02)


async def test_a_bot_is_stopped_and_honest_customers_are_not(holdfast: Holdfast) -> None:
    """300 holds in a minute from 5 customers of one network, none paid for: it gets no further than its limit at each
    pod; others buy meanwhile. Its network is blocked and its case says why.
    """
    wanted = await goods(holdfast, 10_000)
    run, octet = new("bot"), int(time.time()) % 250
    bots = [f"{run}-{n}" for n in range(5)]
    held: list[str] = []
    refused: Counter[str] = Counter()
    honest: Counter[str] = Counter()
    kinds: set[str] = set()
    done = asyncio.Event()

    async def bot(number: int) -> None:
        who = {"customer_id": bots[number % 5], "ip_address": f"198.18.{octet}.{number % 200}"}
        try:
            await holdfast.reserve(f"{run}-{number}", [(wanted, "", 1)], **who)  # type: ignore[arg-type]
            held.append(f"{run}-{number}")
        except Refusal as refusal:
            refused[refusal.reason] += 1
            kinds.add(refusal.metadata["subject_kind"])

    async def customer(number: int) -> None:
        name = f"{run}-honest-{number}"
        while not done.is_set():
            order = new(name)
            address = f"203.{octet}.{number}.1"
            await holdfast.reserve(order, [(wanted, "", 1)], customer_id=name, ip_address=address)
            await holdfast.confirm(order, "paid")
            honest[name] += 1
            await asyncio.sleep(2.2)  # no more than a person does

    customers = asyncio.gather(*(customer(number) for number in range(8)))
    for start in range(0, 300, 10):
        await asyncio.gather(*(bot(number) for number in range(start, start + 10)))
    done.set()
    await customers

    assert len(held) + refused.total() == 300
    assert set(refused) <= {"LIMIT_REACHED", "SUBJECT_BLOCKED"}
    assert "NETWORK" in kinds
    assert len(held) <= 2 * LIMIT, "each of two pods lets in no more than the limit"
    assert len(honest) == 8

    network = (await holdfast.resolve(networks=[f"198.18.{octet}.1"]))[0].subject
    case = await case_of(holdfast, network, pb.DECISION_BLOCK)
    assert {fired.rule_id for fired in case.rules} == {"network-in-a-hurry", "many-customers-on-one-sku"}
    with pytest.raises(Refusal) as blocked:
        await holdfast.reserve(new(run), [(wanted, "", 1)], ip_address=f"198.18.{octet}.250")
    assert blocked.value.reason in {"SUBJECT_BLOCKED", "LIMIT_REACHED"}
    for name in [f"{run}-honest-{number}" for number in range(8)]:
        subject = (await holdfast.resolve(customers=[name]))[0].subject
        assert not (await holdfast.fraud.ListCases(pb.ListCasesRequest(subject=subject))).cases


async def hasty(holdfast: Holdfast, customer: str, sku: str, count: int = 25) -> list[str]:
    """Many holds of one customer within a minute long ago, or as many as it is let have before it is blocked."""
    at = datetime(2026, 1, 5, 12, tzinfo=UTC)
    names = [new(customer) for _ in range(count)]
    for number, name in enumerate(names):
        time = at + timedelta(seconds=number)
        try:
            await holdfast.reserve(name, [(sku, "", number % 3 + 1)], customer_id=customer, order_time=time)
        except Refusal as refusal:
            if refusal.reason != "SUBJECT_BLOCKED":
                raise
            return names[:number]
    return names


async def test_a_case_is_decided_and_its_holds_are_released(holdfast: Holdfast) -> None:
    """RELEASE cancels what its reservations hold; the audit says who, and a repeat changes nothing."""
    sku, customer = await goods(holdfast, 1_000), new("hasty")
    names = await hasty(holdfast, customer, sku)
    subject = (await holdfast.resolve(customers=[customer]))[0].subject
    await caught_up(holdfast)
    case = await case_of(holdfast, subject)
    assert "customer-in-a-hurry" in {fired.rule_id for fired in case.rules}
    request = pb.DecideCaseRequest(
        case_id=case.case_id, decision=pb.CASE_DECISION_RELEASE, actor="ann", note="a program"
    )
    assert (await holdfast.fraud.DecideCase(request)).case.state == pb.CASE_STATE_RELEASED
    assert (await holdfast.fraud.DecideCase(request)).case.state == pb.CASE_STATE_RELEASED
    deadline = time.monotonic() + SECONDS_MAX
    for name in case.reservation_ids:
        while (await holdfast.get(name)).state != rp.RESERVATION_STATE_CANCELLED:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
    assert (await holdfast.get(names[0])).state == rp.RESERVATION_STATE_HELD, "before it was suspicious"
    audit = (await holdfast.fraud.GetCase(pb.GetCaseRequest(case_id=case.case_id))).entries
    assert [(entry.actor, entry.action) for entry in audit] == [("rules", "OPENED"), ("ann", "RELEASE")]


async def test_goods_that_come_back_soon_after(holdfast: Holdfast) -> None:
    """A return that names its reservation counts against its customer."""
    sku, customer = await goods(holdfast, 1_000), new("undoing")
    for _ in range(3):
        name = new(customer)
        await holdfast.reserve(name, [(sku, "", 1), (await goods(holdfast, 1), "", 1)], customer_id=customer)
        await holdfast.confirm(name, "paid")
        await caught_up(holdfast)
        more: dict[str, Any] = {"reference": name}
        await holdfast.adjust(new(), sku, "MAIN", ip.ADJUSTMENT_REASON_RETURN, 1, **more)
    subject = (await holdfast.resolve(customers=[customer]))[0].subject
    case = await case_of(holdfast, subject)
    assert [(fired.rule_id, fired.value) for fired in case.rules] == [("bought-and-undone", 3)]


async def test_errors_of_antifraud(holdfast: Holdfast) -> None:
    """Named, with what they are about."""
    with pytest.raises(Refusal) as refused:
        await holdfast._call(holdfast.fraud.GetCase(pb.GetCaseRequest(case_id="none")))
    assert (refused.value.reason, refused.value.metadata) == ("CASE_NOT_FOUND", {"case_id": "none"})
    request = pb.RetireRuleRequest(rule_id="probing", version=99, actor="ann")
    with pytest.raises(Refusal) as refused:
        await holdfast._call(holdfast.fraud.RetireRule(request))
    assert refused.value.reason == "RULE_NOT_FOUND"
    with pytest.raises(Refusal) as refused:
        await holdfast._call(holdfast.fraud.ListCases(pb.ListCasesRequest(page_token="nonsense")))
    assert refused.value.reason == "PAGE_TOKEN_INVALID"
