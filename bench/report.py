"""What a run of the benchmark came to: a table for people, a file for programs, a picture for both."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt

GOOD, BAD, PLAIN = "#2a9d5c", "#d1495b", "#9aa5b1"


@dataclass(frozen=True, slots=True)
class Target:
    """A key: what it is, and its bound; `most` where less is better."""

    what: str
    bound: float
    most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound


TARGETS = {
    "reserve_vs_echo": Target("durable Reserve over bare echo, calls/s, 64 callers", 0.65),
    "reserve_p95_vs_echo": Target("p95 at 70 % of capacity, open loop, over echo's at that rate", 3, most=True),
    "availability_vs_echo": Target("GetAvailability over echo, calls/s", 0.85),
    "hot_vs_uniform": Target("all callers on one SKU over uniform", 0.95),
    "usual_way_hot": Target("over the usual way, one hot SKU", 4),
    "usual_way_uniform": Target("over the usual way, uniform", 2),
    "batch_items_vs_echo": Target("reservations/s through BatchReserve over echo calls/s", 3),
    "stream_vs_reserve": Target("reservations/s through ReserveStream over unary Reserve", 2),
    "stage_vs_echo": Target("the stage scenario's highest sustained rate over echo", 0.8),
    "overload_goodput": Target("answered in time at 3 x capacity over peak", 0.9),
    "overload_p95_ms": Target("p95 of what was answered at 3 x capacity, ms", 200, most=True),
    "projection_vs_reserve": Target("movements/s that one consumer of analytics applies over Reserve/s", 10),
    "stock_at_growth": Target("stock at a past instant, a long history over a short one", 1.5, most=True),
    "events_tax": Target("Reserve/s with relay and consumers over without", 0.9),
    "fraud_tax": Target("Reserve/s with antifraud enforced over not", 0.97),
    "trace_tax": Target("Reserve/s with one call in a hundred traced over none", 0.97),
    "trace_tax_full": Target("Reserve/s with every call traced over none", 0.85),
    "tls_tax": Target("Reserve/s with TLS on every side over without", 0.85),
    "skus_1m_vs_1k": Target("CPU a Reserve at many SKUs over few", 1.15, most=True),
    "ledger_growth": Target("CPU a Reserve with a long ledger over a short one", 1.10, most=True),
    "citus_vs_postgres": Target("Reserve/s on a coordinator and two workers over one PostgreSQL", 0.5),
    "shards_growth": Target("CPU a Reserve in 32 shards over 8", 1.3, most=True),
    "two_pods_vs_one": Target("CPU a Reserve with two reservation pods over one", 1.15, most=True),
}


@dataclass(slots=True)
class Results:
    """Every ratio of every round, and the runs behind them."""

    ratios: dict[str, list[float]] = field(default_factory=dict)
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def median(self, key: str) -> float:
        return statistics.median(self.ratios[key])

    def write(self, file: Path) -> None:
        content = {
            **{key: round(self.median(key), 3) for key in self.ratios},
            **self.notes,
            "spread": {key: [round(min(r), 3), round(max(r), 3)] for key, r in self.ratios.items()},
            "rounds": {key: [round(one, 3) for one in r] for key, r in self.ratios.items()},
            "runs": self.runs,
        }
        file.write_text(json.dumps(content, indent=2) + "\n")

    def show(self, console: Console) -> None:
        table = Table(title="Holdfast, measured", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name, justify in (("key", "left"), ("median", "right"), ("spread", "right"), ("target", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column("what", style="dim")
        for key, target in TARGETS.items():
            bound = f"{'<=' if target.most else '>='} {target.bound}"
            if key not in self.ratios:
                table.add_row(key, "-", "-", bound, target.what)
                continue
            value = self.median(key)
            style = "bold green" if target.met(value) else "bold red"
            spread = f"{min(self.ratios[key]):.2f} - {max(self.ratios[key]):.2f}"
            table.add_row(key, f"[{style}]{value:.2f}[/]", spread, bound, target.what)
        console.print(table)
        runs = Table(title="The runs", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in ("run", "calls/s", "p50 ms", "p95 ms", "p99 ms", "errors", "CPU us a call"):
            runs.add_column(name, justify="left" if name in {"run", "CPU us a call"} else "right")
        for name, seen in self.runs.items():
            mid = sorted(seen, key=lambda run: run["rate"])[len(seen) // 2]
            errors = sum(sum(run["errors"].values()) for run in seen)
            cost = ", ".join(f"{side} {cost:.0f}" for side, cost in mid["cpu_us_a_call"].items())
            row = (f"{mid['rate']:,.0f}", f"{mid['p50_ms']:.1f}", f"{mid['p95_ms']:.1f}", f"{mid['p99_ms']:.1f}")
            runs.add_row(name, *row, f"{errors:,}", cost)
        console.print(runs)

    def draw(self, file: Path) -> None:
        """Each key as a share of its target: right of the line is met."""
        keys = [key for key in TARGETS if key in self.ratios]
        shares, colours = [], []
        for key in keys:
            target, value = TARGETS[key], self.median(key)
            shares.append(min(target.bound / value if target.most else value / target.bound, 3))
            colours.append(GOOD if target.met(value) else BAD)
        figure, axes = plt.subplots(figsize=(10, 0.45 * len(keys) + 1.4))
        axes.barh(keys[::-1], shares[::-1], color=colours[::-1], height=0.62)
        axes.axvline(1, color=PLAIN, linewidth=1.2)
        for place, (key, share) in enumerate(zip(keys[::-1], shares[::-1], strict=True)):
            target = TARGETS[key]
            label = f" {self.median(key):.2f} (target {'at most' if target.most else 'at least'} {target.bound})"
            axes.text(share, place, label, va="center", fontsize=8)
        axes.set_xlim(0, max(shares) * 1.35)
        axes.set_title(
            "Holdfast against its targets (the line is the target; right of it is met)", fontsize=10, loc="left"
        )
        axes.set_xticks([])
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        figure.savefig(file, dpi=130)
        plt.close(figure)
