"""Orders to replay: read from a file in the Online Retail format, or made up, seeded.

What is read: invoices in the order in which they first appear, whether or not their rows stand
together. Positive quantities of an invoice are one sale, summed for each stock code and price. An invoice that
begins with C gives its goods back. Any other negative quantity is a correction of the stock. A code
that does not begin with five digits is no goods. Nothing disappears: whatever is not used is counted,
and a row that cannot be read is kept with its line number.
"""

import bisect
import csv
import gzip
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path

COLUMNS = 8
GOODS = re.compile(r"[0-9]{5}")
INVOICE = re.compile(r"[A-Za-z0-9._-]{1,24}")
CODE = re.compile(r"[A-Z0-9._:/-]{1,64}")
CUSTOMER = re.compile(r"[A-Za-z0-9._-]{1,32}")
UNITS_MAX = 10**9
COUNTRY_MAX = 64
DATES = ("%Y-%m-%d %H:%M:%S", "%m/%d/%Y %H:%M")


@dataclass(frozen=True, slots=True)
class Goods:
    """A stock code's first name and first price above zero."""

    name: str = ""
    price_micros: int = 0


@dataclass(slots=True)
class Order:
    """An invoice: what it takes, by stock code and price (in micros); gives back and corrects, by stock code.

    `time` is the invoice's own, read as UTC; None where it cannot be read.
    """

    invoice: str
    customer_id: str = ""
    country: str = ""
    time: datetime | None = None
    device_id: str = ""
    ip_address: str = ""
    takes: dict[tuple[str, int], int] = field(default_factory=dict)
    returns: dict[str, int] = field(default_factory=dict)
    corrections: list[tuple[str, int]] = field(default_factory=list)
    lines: int = 0


@dataclass(slots=True)
class Book:
    """Orders in sequence, the catalogue they need, and what was left out: counted, and by line."""

    orders: list[Order] = field(default_factory=list)
    catalogue: dict[str, Goods] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    rejects: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def lines(self) -> int:
        return sum(order.lines for order in self.orders)


@dataclass(frozen=True, slots=True)
class _Row:
    invoice: str
    code: str
    name: str
    quantity: int
    price_micros: int
    customer_id: str
    country: str
    time: datetime | None


class _UnreadableError(Exception):
    """A row that makes no sense, and why."""


def read(path: Path, limit: int | None = None) -> Book:
    """Read a file, plain or gzip; the first `limit` invoices of it, or all. Raises OSError."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        return parse(file, limit)


def parse(lines: Iterable[str], limit: int | None = None) -> Book:
    """As `read`, from lines of text; the first is the header."""
    book = Book()
    by_invoice: dict[str, Order] = {}
    reader = csv.reader(lines)
    next(reader, None)
    for number, cells in _rows(reader):
        try:
            row = _row(cells)
        except _UnreadableError as error:
            book.skipped[f"unreadable: {error}"] += 1
            book.rejects.append((number, str(error), ",".join(cells)))
            continue
        order = by_invoice.get(row.invoice)
        if order is None:
            if limit is not None and len(by_invoice) >= limit:
                continue
            order = by_invoice[row.invoice] = Order(row.invoice, row.customer_id, row.country, row.time)
            book.orders.append(order)
        _enter(book, order, row, number, cells)
    return book


def _rows(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Rows with their line numbers; one that the csv module cannot split comes as one cell."""
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = [str(error)]
        if cells:
            yield reader.line_num, cells  # type: ignore[attr-defined]


def _row(cells: list[str]) -> _Row:
    if len(cells) != COLUMNS:
        raise _UnreadableError(f"not {COLUMNS} columns")
    invoice, code, name, quantity, date, price, customer, country = (cell.strip() for cell in cells)
    if not INVOICE.fullmatch(invoice):
        raise _UnreadableError("invoice number")
    if not code:
        raise _UnreadableError("stock code")
    try:
        units = int(quantity)
    except ValueError:
        raise _UnreadableError("quantity") from None
    if not units or abs(units) > UNITS_MAX:
        raise _UnreadableError("quantity")
    try:
        micros = int(Decimal(price) * 1_000_000)
    except (InvalidOperation, ValueError, OverflowError):
        raise _UnreadableError("unit price") from None
    customer = customer.removesuffix(".0")
    customer = customer if CUSTOMER.fullmatch(customer) else ""
    return _Row(invoice.upper(), code.upper(), name, units, micros, customer, country[:COUNTRY_MAX], _time(date))


def _time(text: str) -> datetime | None:
    for form in DATES:
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
    return None


def _enter(book: Book, order: Order, row: _Row, number: int, cells: list[str]) -> None:
    if not GOODS.match(row.code):
        book.skipped[f"no goods: {row.code}"] += 1
        return
    returning = order.invoice.startswith("C")
    if not CODE.fullmatch(row.code) or (returning and row.quantity > 0):
        reason = "positive quantity on a return" if returning else "stock code"
        book.skipped[f"unreadable: {reason}"] += 1
        book.rejects.append((number, reason, ",".join(cells)))
        return
    order.lines += 1
    known = book.catalogue.get(row.code, Goods())
    book.catalogue[row.code] = Goods(known.name or row.name, known.price_micros or max(row.price_micros, 0))
    if returning:
        order.returns[row.code] = order.returns.get(row.code, 0) - row.quantity
    elif row.quantity > 0:
        item = (row.code, max(row.price_micros, 0))
        order.takes[item] = order.takes.get(item, 0) + row.quantity
    else:
        order.corrections.append((row.code, row.quantity))


def write_rejects(book: Book, path: Path) -> None:
    """Write the rows that could not be read: line number, reason, and the row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("line", "reason", "row"))
        writer.writerows(book.rejects)


ADJECTIVES = ("Small", "Large", "Red", "Blue", "White", "Vintage", "Glass", "Wooden", "Striped", "Enamel")
COUNTRIES = ("United Kingdom", "Germany", "France", "Norway")
GREEDY, GREEDY_UNITS = "12998", 20_000
HASTY, RUSH_ORDERS = "12999", 28
NOUNS = ("Lantern", "Mug", "Teapot", "Basket", "Candle", "Clock", "Cushion", "Frame", "Jug", "Tray")


def invent(orders: int = 3_000, skus: int = 400, seed: int = 1) -> Book:
    """A believable season: demand falls with rank (Zipf), a few goods are everybody's; some come back.

    Two customers are up to no good: one begins with an order out of all proportion, another takes the most wanted
    goods one by one, as fast as a program does.
    """
    dice = random.Random(seed)  # noqa: S311 - made up, not secret
    codes = [str(20_000 + 7 * number) for number in range(skus)]
    cumulative = list(itertools.accumulate(1 / (rank + 1) ** 1.05 for rank in range(skus)))
    book = Book(
        catalogue={
            code: Goods(f"{dice.choice(ADJECTIVES)} {dice.choice(NOUNS)}", dice.randrange(45, 2_500) * 10_000)
            for code in codes
        }
    )

    def pick() -> str:
        return codes[bisect.bisect(cumulative, dice.random() * cumulative[-1])]

    start = datetime(2025, 1, 1, 8, tzinfo=UTC)
    rush = range(orders * 2 // 3, orders * 2 // 3 + min(RUSH_ORDERS, orders // 20))
    for number in range(orders):
        time = start + number * timedelta(days=180) / orders
        country = dice.choices(COUNTRIES, weights=(20, 3, 2, 1))[0]
        order = Order(f"{100_000 + number}", f"{12_000 + dice.randrange(900)}", country, time)
        kind = dice.random()
        if number == orders // 2:
            order.customer_id = GREEDY
            order.takes[codes[0], book.catalogue[codes[0]].price_micros] = GREEDY_UNITS
        elif number in rush:
            order.customer_id = HASTY
            order.time = (
                start + rush.start * timedelta(days=180) / orders + (number - rush.start) * timedelta(seconds=1)
            )
            order.takes[codes[1], book.catalogue[codes[1]].price_micros] = 1
        elif kind < 0.03 and number:
            order.invoice = f"C{order.invoice}"
            order.returns[pick()] = dice.randint(1, 2)
        elif kind < 0.035:
            order.corrections.append((pick(), -dice.randint(1, 20)))
        else:
            for _ in range(min(int(dice.expovariate(1 / 3)) + 1, 20)):
                code = pick()
                order.takes[code, book.catalogue[code].price_micros] = min(int(dice.expovariate(1 / 2)) + 1, 24)
        order.device_id = f"device-{order.customer_id}"
        order.ip_address = f"203.0.{int(order.customer_id) % 256}.{int(order.customer_id) // 256}"
        order.lines = len(order.takes) + len(order.returns) + len(order.corrections)
        book.orders.append(order)
    return book
