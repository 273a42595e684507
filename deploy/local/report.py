"""What a replay came to: for people a table, for programs a file."""

from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.local.orders import Book
from deploy.local.replay import Tally, Truth

HASH_SHOWN = 6  # of a keyed hash: enough to tell it from others


def figures(book: Book, tally: Tally, truth: Truth, pods: dict[str, list[str]]) -> dict[str, Any]:
    """Every figure of the run; units of latency are milliseconds."""
    latencies = sorted(tally.latencies) or [0.0]
    return {
        "orders": tally.orders,
        "lines": book.lines,
        "held": tally.held,
        "confirmed": tally.confirmed,
        "refused": tally.refused,
        "stopped": tally.stopped,
        "returned_units": tally.returned_units,
        "corrections": tally.corrections,
        "refused_corrections": tally.refused_corrections,
        "skipped": dict(sorted(book.skipped.items())),
        "on_hand_total": truth.on_hand_total,
        "sold_units": truth.sold_units,
        "expired_units": truth.expired_units,
        "oversold_units": truth.oversold_units,
        "drift_units": truth.drift_units,
        "events_waiting": truth.events_waiting,
        "errors": dict(tally.errors),
        "requests_per_second": round(tally.calls / tally.seconds, 1) if tally.seconds else 0,
        "latency_ms": {
            f"p{share}": round(latencies[min(len(latencies) * share // 100, len(latencies) - 1)] * 1000, 1)
            for share in (50, 95, 99)
        },
        "pods_reached": pods,
        "seconds": round(tally.seconds, 2),
    }


def sound(result: dict[str, Any]) -> bool:
    """Nothing oversold, no drift, no error, and analytics agrees."""
    wrong = result["oversold_units"] or result["drift_units"] or result["errors"]
    return not wrong and bool(result.get("mart_equals_ledger", True))


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="What happened", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")

    def row(name: str, value: object, note: str = "", *, good: bool | None = None) -> None:
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        style = {None: "bold", True: "bold green", False: "bold red"}[good]
        table.add_row(name, f"[{style}]{shown}[/]", note)

    latency = result["latency_ms"]
    skipped = sum(result["skipped"].values())
    row("orders", result["orders"], f"{result['lines']:,} lines of goods; {skipped:,} rows skipped and counted")
    row("held", result["held"], "reservations that got all they asked for")
    row("confirmed", result["confirmed"], f"{result['sold_units']:,} units sold")
    row("refused", result["refused"], "sold out: an answer, not an error")
    row("stopped", result["stopped"], "by antifraud: blocked, or above a limit")
    row("expired", result["expired_units"], "units whose time came")
    row("returned", result["returned_units"], "units")
    refused = f"{result['refused_corrections']:,} refused, as they would take what is not there"
    row("corrections", result["corrections"], refused)
    row("on hand", result["on_hand_total"], "units left on the shelf")
    rate = f"p50 {latency['p50']} ms, p95 {latency['p95']} ms, p99 {latency['p99']} ms"
    row("requests a second", result["requests_per_second"], rate)
    for service, pods in result["pods_reached"].items():
        row(f"{service} pods reached", len(pods), ", ".join(pods), good=len(pods) > 1)
    row("errors", sum(result["errors"].values()), ", ".join(result["errors"]), good=not result["errors"])
    waiting = result["events_waiting"]
    row("events waiting", waiting, "everything has reached Kafka" if not waiting else "", good=not waiting)
    lag = result["events_lag_ms"]
    behind = f"p50 {lag['p50']:.0f} ms, p95 {lag['p95']:.0f} ms, p99 {lag['p99']:.0f} ms from commit to visible"
    row("analytics caught up", f"{result['catch_up_seconds']} s", behind)
    equal = result["mart_equals_ledger"]
    row("stock view", "equals the ledger" if equal else "differs", "every key, read from both databases", good=equal)
    row("ledger drift", result["drift_units"], "units, read from the databases", good=not result["drift_units"])
    oversold = result["oversold_units"]
    row("oversold", oversold, "units, read from the databases", good=not oversold)
    console.print()
    console.print(table)


def show_reports(console: Console, reports: dict[str, list[dict[str, Any]]]) -> None:
    """Print three of the reports of analytics."""

    def table(title: str, names: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
        made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
        for number, name in enumerate(names):
            made.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            made.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
        console.print()
        console.print(made)

    def money(row: dict[str, Any]) -> str:
        return f"{row.get('value_micros', 0) / 1_000_000:,.2f} {row['currency_code']}"

    table(
        "Sales by month of the invoice",
        ("month", "orders", "units", "value"),
        [(row["period"][:7], row["orders"], row["units"], money(row)) for row in reports["sales"]],
    )
    table(
        "What sells most",
        ("SKU", "name", "units", "value", "share", "class"),
        [
            (row["sku"], row.get("name", ""), row["units"], money(row), f"{row['share']:.1%}", row["abc_class"])
            for row in reports["top_skus"]
        ],
    )
    table(
        "What became of reservations",
        ("month", "asked", "refused", "confirmed", "of those held", "p95 to confirm"),
        [
            (
                row["period"][:7], row["requested"], row.get("rejected", 0), row.get("confirmed", 0),
                f"{row.get('conversion', 0):.1%}", _milliseconds(row.get("time_to_confirm_p95", "0s")),
            )
            for row in reports["funnel"]
        ],
    )  # fmt: skip


def show_cases(console: Console, result: dict[str, Any]) -> None:
    """Print the cases with the highest scores."""
    table = Table(
        title=f"Cases that antifraud opened: {result['cases']:,}", title_justify="left", box=None,
        padding=(0, 2, 0, 0), header_style="dim",
    )  # fmt: skip
    for name in ("order of", "score", "decision", "subject", "why"):
        table.add_column(name, justify="right" if name == "score" else "left", no_wrap=True)
    for case in result["top_cases"]:
        why = "\n".join(f"{rule} {value:,g}" for rule, value in case["rules"].items())
        table.add_row(case["open_time"][:10], str(case["score"]), case["decision"], _short(case["subject"]), why)
    console.print()
    console.print(table)


def show_notifications(console: Console, result: dict[str, Any], directory: str) -> None:
    """Print what was worth an alert, and where the messages went."""
    kinds = ", ".join(f"{count:,} {kind.lower().replace('_', ' ')}" for kind, count in result["alerts"].items())
    console.print(f"\nAlerts: {kinds or 'none'}; {result['alerts_open']:,} are open.")
    for row in result["messages"]:
        console.print(f"  {row['messages']:>5,} messages {row['state'].lower()}: {row['target']}")
    console.print(
        f"What arrived is in {directory}: alerts.jsonl, and webhook.jsonl of a receiver that checks signatures."
    )


def _short(subject: str) -> str:
    kind, _, rest = subject.partition(":")
    return f"{kind} {rest.rpartition(':')[2][:HASH_SHOWN]}"


def _milliseconds(duration: str) -> str:
    return f"{float(duration.removesuffix('s')) * 1000:,.0f} ms"


HOW = """
[bold]Call it[/]
  [dim]# Python[/]
  .venv/bin/python -c '
  import asyncio
  from shared.client import Holdfast
  async def main():
      async with Holdfast("{inventory}", "{reservation}") as holdfast:
          print(await holdfast.reserve("my-order", [("{sku}", "", 1)]))
          print(await holdfast.confirm("my-order", "my-payment"))
  asyncio.run(main())'

  [dim]# grpcurl[/]
  grpcurl -plaintext -d '{{"keys": [{{"sku": "{sku}", "location": "MAIN"}}]}}' {inventory_pod} \\
    holdfast.inventory.v1.InventoryService/GetAvailability

  grpcurl -plaintext -d '{{"range": {{"start_time": "2000-01-01T00:00:00Z"}}, "period": "PERIOD_MONTH"}}' \\
    {analytics_pod} holdfast.analytics.v1.AnalyticsService/ReportSales

  grpcurl -plaintext -d '{{"state": "CASE_STATE_OPEN"}}' {analytics_pod} \
    holdfast.analytics.v1.FraudService/ListCases

  grpcurl -plaintext -d '{{"state": "ALERT_STATE_OPEN"}}' {analytics_pod} \
    holdfast.analytics.v1.NotificationService/ListAlerts

  [dim]# ghz[/]
  ghz --insecure --call holdfast.reservation.v1.ReservationService/Reserve -c 64 -z 10s \\
    -d '{{"reservation_id": "{{{{newUUID}}}}", "lines": [{{"sku": "{sku}", "quantity": 1}}]}}' {reservation_pod}
"""


def how(console: Console, targets: dict[str, str], sku: str) -> None:
    """Print how to call what runs, with its real addresses."""
    pods = {f"{name}_pod": target.removeprefix("ipv4:").split(",")[0] for name, target in targets.items()}
    console.print(HOW.format(**targets, **pods, sku=sku), highlight=False, soft_wrap=True)
