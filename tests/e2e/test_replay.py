"""The main job: a replay of orders comes to what plain arithmetic says, SKU by SKU."""

import asyncio
import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import asyncpg
import pytest

from deploy.local import orders, report
from deploy.local.replay import Replay, look
from deploy.local.stack import Stack
from shared.client import Holdfast
from tests.e2e.shop import new

REAL = Path("../shared/data/online_retail_2010-12_to_2011-05.csv.gz")
INVOICES, OPENING = 2_000, 300


async def emptied(stack: Stack) -> None:
    """Take what other tests left behind, so that sums are this test's alone."""
    for name, tables in (
        (
            "inventory",
            "location, sku, stock, hold, hold_change, request, movement, checkpoint, movement_outbox, outbox",
        ),
        ("reservation", "reservation, reservation_line, allocation, reservation_change, outbox"),
    ):
        connection = await asyncpg.connect(stack.postgres_dsn(name))
        await connection.execute(f"TRUNCATE {tables} CASCADE")
        await connection.close()


def by_hand() -> tuple[Counter[str], Counter[str], dict[str, int]]:
    """(on hand, sold, counts) of the first invoices, computed from the file with nothing of ours."""
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
    codes = {code for rows in invoices.values() for code, _ in rows}
    on_hand, sold, counts = Counter(dict.fromkeys(codes, OPENING)), Counter[str](), Counter[str]()
    for invoice, rows in invoices.items():
        if invoice.startswith("C"):
            for code, quantity in rows:
                on_hand[code] -= quantity
                counts["returned_units"] -= quantity
            continue
        basket = Counter[str]()
        for code, quantity in rows:
            if quantity > 0:
                basket[code] += quantity
        if basket and all(on_hand[code] >= quantity for code, quantity in basket.items()):
            on_hand.subtract(basket)
            sold.update(basket)
            counts["confirmed"] += 1
        elif basket:
            counts["refused"] += 1
        for code, quantity in rows:
            if quantity < 0:
                fits = on_hand[code] + quantity >= 0
                on_hand[code] += quantity if fits else 0
                counts["corrections" if fits else "refused_corrections"] += 1
    return on_hand, sold, dict(counts)


@pytest.mark.skipif(not REAL.exists(), reason="the file of real orders is not there")
@pytest.mark.timeout(400)
async def test_real_orders_come_to_what_plain_arithmetic_says(holdfast: Holdfast, stack: Stack) -> None:
    """The first 2,000 invoices, one at a time: every SKU's stock and sales, and every count."""
    await emptied(stack)
    book = orders.read(REAL, INVOICES)
    replay = Replay(holdfast, book, run_id=new(), opening_stock=OPENING)
    await replay.load()
    await replay.run(concurrency=1, done=lambda: None)
    on_hand, sold, counts = by_hand()
    inventory = await asyncpg.connect(stack.postgres_dsn("inventory"))
    rows = await inventory.fetch("SELECT sku, on_hand, held FROM stock")
    await inventory.close()
    reservation = await asyncpg.connect(stack.postgres_dsn("reservation"))
    sales = await reservation.fetch("SELECT sku, sum(confirmed)::bigint AS sold FROM allocation GROUP BY sku")
    await reservation.close()
    assert {row["sku"]: row["on_hand"] for row in rows} == dict(on_hand)
    assert not any(row["held"] for row in rows)
    assert {row["sku"]: row["sold"] for row in sales} == dict(sold)
    tally = replay.tally
    assert not tally.errors
    assert {name: getattr(tally, name) for name in counts} == counts
    assert tally.orders == INVOICES
    assert book.lines + sum(book.skipped.values()) > INVOICES


async def test_a_concurrent_replay_oversells_nothing(holdfast: Holdfast, stack: Stack, tmp_path: Path) -> None:
    """Made-up orders, sixteen at a time, sold-out goods among them: nothing oversold, no drift, both pods."""
    await emptied(stack)
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
    await emptied(stack)
    replay = Replay(holdfast, orders.invent(30), run_id=new(), opening_stock=1000)
    await replay.load()
    await replay.run(concurrency=4, done=lambda: None)
    code, _ = next(iter(next(order for order in replay._book.orders if order.takes).takes))
    replay.tally.received[code] = 0
    truth = await look(replay.tally, stack.postgres_dsn("inventory"), stack.postgres_dsn("reservation"))
    assert truth.oversold_units > 0
    assert truth.drift_units > 0
