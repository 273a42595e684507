"""What is read out of a file of orders, and what is counted of the rest."""

import gzip
from datetime import UTC, datetime
from pathlib import Path

from deploy.local.orders import Goods, invent, parse, read, write_rejects

HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"


def row(invoice: str, code: str, quantity: object, price: object = "2.55", name: str = "LAMP") -> str:
    return f"{invoice},{code},{name},{quantity},2010-12-01 08:26:00,{price},17850.0,United Kingdom"


def test_an_invoice_is_one_order_wherever_its_rows_stand() -> None:
    """First appearance gives the order; quantities are summed for each code, whatever its case."""
    book = parse([HEADER, row("1", "85123a", 2), row("2", "22222", 1), row("1", " 85123A ", 3), row("1", "33333", 1)])
    assert [(order.invoice, order.takes) for order in book.orders] == [
        ("1", {("85123A", 2_550_000): 5, ("33333", 2_550_000): 1}),
        ("2", {("22222", 2_550_000): 1}),
    ]
    first = book.orders[0]
    assert (first.customer_id, first.country) == ("17850", "United Kingdom")
    assert first.time == datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
    assert book.lines == 4
    assert book.catalogue["85123A"] == Goods("LAMP", 2_550_000)


def test_one_code_at_two_prices_is_two_items() -> None:
    """Units are summed for each price, so that the value is exact."""
    (order,) = parse([HEADER, row("1", "22222", 2), row("1", "22222", 3, "1.25"), row("1", "22222", 1)]).orders
    assert order.takes == {("22222", 2_550_000): 3, ("22222", 1_250_000): 3}


def test_returns_and_corrections_are_told_apart() -> None:
    """C gives back; any other negative quantity corrects."""
    book = parse([HEADER, row("c9", "22222", -3), row("c9", "22222", -1), row("8", "22222", -5), row("8", "22222", 1)])
    returned, corrected = book.orders
    assert (returned.takes, returned.returns) == ({}, {"22222": 4})
    assert (corrected.takes, corrected.corrections) == ({("22222", 2_550_000): 1}, [("22222", -5)])


def test_nothing_disappears_uncounted(tmp_path: Path) -> None:
    """No goods are counted by code; unreadable rows by reason, and kept with their line numbers."""
    book = parse(
        [
            HEADER,
            row("1", "POST", 1),
            row("1", "post", 1),
            row("1", "22222", "many"),
            row("1", "22222", 0),
            row("1", "22222", "1.5"),
            row("1", "22222", 1, "free"),
            row("", "22222", 1),
            row("1", "", 1),
            "1,22222,half a row",
            row("C2", "22222", 1),
            "",
            row("1", "22222", 1),
        ]
    )
    assert book.skipped == {
        "no goods: POST": 2,
        "unreadable: quantity": 3,
        "unreadable: unit price": 1,
        "unreadable: invoice number": 1,
        "unreadable: stock code": 1,
        "unreadable: not 8 columns": 1,
        "unreadable: positive quantity on a return": 1,
    }
    assert [number for number, _, _ in book.rejects] == [4, 5, 6, 7, 8, 9, 10, 11]
    assert book.lines == 1
    write_rejects(book, tmp_path / "rejects.csv")
    assert (tmp_path / "rejects.csv").read_text().splitlines()[1].startswith("4,quantity,")


def test_a_limit_counts_invoices_and_keeps_their_late_rows(tmp_path: Path) -> None:
    """The first invoices, whole; from a gzip file as from a plain one."""
    text = "\n".join([HEADER, row("1", "22222", 1), row("2", "22222", 1), row("3", "22222", 1), row("1", "22222", 1)])
    plain, packed = tmp_path / "orders.csv", tmp_path / "orders.csv.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert read(plain, 2) == read(packed, 2)
    assert [(order.invoice, sum(order.takes.values())) for order in read(packed, 2).orders] == [("1", 2), ("2", 1)]


def test_made_up_orders_are_the_same_every_time() -> None:
    """Seeded; a few goods are asked for more than all the rest can be."""
    book = invent(500)
    assert book == invent(500)
    asked: dict[str, int] = {}
    for order in book.orders:
        for (code, _), units in order.takes.items():
            asked[code] = asked.get(code, 0) + units
    assert max(asked.values()) > 300 > sorted(asked.values())[len(asked) // 2]
