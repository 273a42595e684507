"""The main job: a replay of orders comes to what plain arithmetic says, SKU by SKU."""

import asyncio
import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest
from holdfast.analytics.v1 import analytics_pb2 as ap

from deploy.local import orders, report
from deploy.local.analysis import EVER, caught_up, mart_equals_ledger
from deploy.local.replay import Replay, look
from deploy.local.stack import Stack
from shared.client import Holdfast
from tests.e2e.reports import asked_of_the_file, assert_reports
from tests.e2e.shop import new

REAL = Path("../shared/data/online_retail_2010-12_to_2011-05.csv.gz")
INVOICES, OPENING = 2_000, 300


async def emptied(holdfast: Holdfast, stack: Stack) -> None:
    """Take what other tests left behind, so that sums are this test's alone."""
    await caught_up(holdfast)
    for name, tables in (
        (
            "inventory",
            "location, sku, stock, hold, hold_change, request, movement, checkpoint, movement_outbox, outbox",
        ),
        ("reservation", "reservation, reservation_line, allocation, reservation_change, outbox"),
        (
            "analytics",
            (
                "sku, stock_view, activity, movement, stock_out, goods_return, reservation, reservation_state, sale,"
                " refusal"
            ),
        ),
    ):
        connection = await asyncpg.connect(stack.postgres_dsn(name))
        await connection.execute(f"TRUNCATE {tables} CASCADE")
        await connection.close()


class ByHand(NamedTuple):
    """What the first invoices come to, computed from the file with nothing of ours."""

    on_hand: Counter[str]
    sold: Counter[str]
    counts: Counter[str]
    confirmed: list[str]
    stock_outs: Counter[str]
    refused_while_out: Counter[str]


def first_invoices() -> dict[str, list[tuple[str, int]]]:
    """The goods and quantities of the first invoices, in the order of the file."""
    invoices: dict[str, list[tuple[str, int]]] = {}
    with gzip.open(REAL, "rt", encoding="utf-8", errors="replace", newline="") as file:
        for cells in csv.DictReader(file):
            invoice = cells["InvoiceNo"].strip().upper()
            if invoice not in invoices and len(invoices) >= INVOICES:
                continue
            rows = invoices.setdefault(invoice, [])
            code = cells["StockCode"].strip().upper()
            if code[:5].isdigit() and len(code) >= 5:
                rows.append((code, int(cells["Quantity"])))
    return invoices


def by_hand() -> ByHand:
    invoices = first_invoices()
    codes = {code for rows in invoices.values() for code, _ in rows}
    hand = ByHand(Counter(dict.fromkeys(codes, OPENING)), Counter(), Counter(), [], Counter(), Counter())
    on_hand, counts = hand.on_hand, hand.counts

    def move(code: str, units: int) -> None:
        hand.stock_outs[code] += on_hand[code] > 0 == on_hand[code] + units
        on_hand[code] += units

    for invoice, rows in invoices.items():
        if invoice.startswith("C"):
            for code, quantity in rows:
                move(code, -quantity)
                counts["returned_units"] -= quantity
            continue
        basket = Counter[str]()
        for code, quantity in rows:
            if quantity > 0:
                basket[code] += quantity
        if basket and all(on_hand[code] >= quantity for code, quantity in basket.items()):
            for code, quantity in basket.items():
                move(code, -quantity)
            hand.sold.update(basket)
            counts["confirmed"] += 1
            hand.confirmed.append(invoice)
        elif basket:
            counts["refused"] += 1
            hand.refused_while_out.update({code: units for code, units in basket.items() if not on_hand[code]})
        for code, quantity in rows:
            if quantity < 0:
                fits = on_hand[code] + quantity >= 0
                move(code, quantity if fits else 0)
                counts["corrections" if fits else "refused_corrections"] += 1
    return hand


@pytest.mark.skipif(not REAL.exists(), reason="the file of real orders is not there")
@pytest.mark.timeout(400)
async def test_real_orders_come_to_what_plain_arithmetic_says(holdfast: Holdfast, stack: Stack) -> None:
    """The first 2,000 invoices, one at a time: every SKU's stock and sales, every count, and every report."""
    await emptied(holdfast, stack)
    book = orders.read(REAL, INVOICES)
    replay = Replay(holdfast, book, run_id=new(), opening_stock=OPENING)
    await replay.load()
    await replay.run(concurrency=1, done=lambda: None)
    hand = by_hand()
    inventory = await asyncpg.connect(stack.postgres_dsn("inventory"))
    rows = await inventory.fetch("SELECT sku, on_hand, held FROM stock")
    await inventory.close()
    reservation = await asyncpg.connect(stack.postgres_dsn("reservation"))
    sales = await reservation.fetch("SELECT sku, sum(confirmed)::bigint AS sold FROM allocation GROUP BY sku")
    await reservation.close()
    assert {row["sku"]: row["on_hand"] for row in rows} == dict(hand.on_hand)
    assert not any(row["held"] for row in rows)
    assert {row["sku"]: row["sold"] for row in sales} == dict(hand.sold)
    tally = replay.tally
    assert not tally.errors
    assert {name: getattr(tally, name) for name in hand.counts} == hand.counts
    assert tally.orders == INVOICES
    assert book.lines + sum(book.skipped.values()) > INVOICES
    await caught_up(holdfast)
    assert await mart_equals_ledger(stack.postgres_dsn("inventory"), stack.postgres_dsn("analytics"))
    with asked_of_the_file(REAL, INVOICES, hand.confirmed) as file:
        await assert_reports(holdfast, file)
    outs = await holdfast.report("ReportStockOuts", ap.ReportStockOutsRequest(range=EVER, page_size=10))
    periods, refused = Counter[str](), Counter[str]()
    for row in outs:
        periods[row.sku] += 1
        refused[row.sku] += row.refused_units
    assert periods == hand.stock_outs
    assert refused == hand.refused_while_out
    assert len(outs) > 20


async def test_a_concurrent_replay_oversells_nothing(holdfast: Holdfast, stack: Stack, tmp_path: Path) -> None:
    """Made-up orders, sixteen at a time, sold-out goods among them: nothing oversold, no drift, both pods."""
    await emptied(holdfast, stack)
    book = orders.invent(400)
    replay = Replay(holdfast, book, run_id=new(), opening_stock=60)
    await replay.load()
    await replay.run(concurrency=16, done=lambda: None)
    truth = await look(replay.tally, stack.postgres_dsn("inventory"), stack.postgres_dsn("reservation"))
    pods = {name: sorted(p for p in holdfast.pods if p.startswith(name)) for name in ("inventory", "reservation")}
    result = report.figures(book, replay.tally, truth, pods)
    assert report.sound(result), result
    assert result["refused"] > 10
    assert all(len(reached) == 2 for reached in pods.values())
    assert result["events_waiting"] == 0
    await asyncio.to_thread((tmp_path / "demo.json").write_text, json.dumps(result))


async def test_the_judge_sees_what_is_oversold_and_what_drifts(holdfast: Holdfast, stack: Stack) -> None:
    """Sums that do not fit are reported: the judge is not blind."""
    await emptied(holdfast, stack)
    replay = Replay(holdfast, orders.invent(30), run_id=new(), opening_stock=1000)
    await replay.load()
    await replay.run(concurrency=4, done=lambda: None)
    code, _ = next(iter(next(order for order in replay._book.orders if order.takes).takes))
    replay.tally.received[code] = 0
    truth = await look(replay.tally, stack.postgres_dsn("inventory"), stack.postgres_dsn("reservation"))
    assert truth.oversold_units > 0
    assert truth.drift_units > 0
