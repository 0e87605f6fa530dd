"""The project's performance targets, each computed from the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lazypages.bench import suite
from lazypages.bench.metrics import Spread, ratios
from lazypages.bench.peers import BOTH, LIMIT, OURS, bulk_name
from lazypages.bench.report import ratio_text
from lazypages.bench.suite import Row
from lazypages.bench.workloads import Workload
from lazypages.loop.server import TRANSFER_THREADS

Rows = Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class Target:
    """``reached`` computes the value, or None if a peer or row is missing. ``least``: the bound is a lower bound."""

    what: str
    bound: float
    reached: Callable[[Rows, str], Spread | None]
    least: bool = False
    unit: str = ""

    def met(self, value: Spread) -> bool:
        return value.median >= self.bound if self.least else value.median <= self.bound


def _between(
    workload: Workload, key: str, other: str | None = None, *, ours: str = OURS
) -> Callable[[Rows, str], Spread | None]:
    """Ours divided by `other`'s (default: CRIU's) in one row."""

    def compute(rows: Rows, criu: str) -> Spread | None:
        row = rows.get(workload.name)
        return ratios(row.values(ours, key), row.values(other or criu, key)) if row else None

    return compute


def _share_of_bulk(rows: Rows, _criu: str) -> Spread | None:
    row = rows.get(suite.IDLE.name)
    if not row:
        return None
    bulk = bulk_name(min(TRANSFER_THREADS, 2))
    return ratios(row.values(bulk, "present"), row.values(OURS, "present"))


def _rows_of_ours(above: Workload, below: Workload, key: str) -> Callable[[Rows, str], Spread | None]:
    def compute(rows: Rows, _criu: str) -> Spread | None:
        if above.name not in rows or below.name not in rows:
            return None
        return ratios(rows[above.name].values(OURS, key), rows[below.name].values(OURS, key))

    return compute


def _of_ours(workload: Workload, key: str, scale: float = 1.0) -> Callable[[Rows, str], Spread | None]:
    def compute(rows: Rows, _criu: str) -> Spread | None:
        row = rows.get(workload.name)
        values = [value / scale for value in row.values(OURS, key)] if row else []
        return Spread.of(values) if values else None

    return compute


TARGETS = (
    Target(
        "first-touch p50, random, no background: by the bare same-CPU loop's",
        1.3,
        _between(suite.RANDOM, "p50", LIMIT),
    ),
    Target("the same: by CRIU's", 0.25, _between(suite.RANDOM, "p50")),
    Target("first-touch p99 with background: by CRIU's", 0.4, _between(suite.BACKGROUND, "p99")),
    Target("time until 1 GiB is present, idle: by CRIU's", 0.4, _between(suite.IDLE, "present")),
    Target("the same: speed by the bare bulk copy's with as many threads", 0.8, _share_of_bulk, least=True),
    Target("criu restore, 512 MiB, touches and pass: by CRIU's", 0.4, _between(suite.REAL, "both")),
    Target("the same, remote: by CRIU's", 0.33, _between(suite.REAL_REMOTE, "both")),
    Target("the same, with our page server", 0.33, _between(suite.REAL_REMOTE, "both", ours=BOTH)),
    Target("remote on loopback, first-touch p50: by CRIU's", 0.4, _between(suite.REMOTE, "p50")),
    Target("the same, with our page server", 0.4, _between(suite.REMOTE, "p50", ours=BOTH)),
    Target(
        "p50 of a fault, 1000 tasks: by that of 1 task",
        1.5,
        _rows_of_ours(suite.THOUSAND_TASKS, suite.ONE_TASK, "p50"),
    ),
    Target(
        "1,000,000 pagemap entries: start to ready", 1.0, _of_ours(suite.MILLION_ENTRIES, "ready"), unit=" s"
    ),
    Target(
        "the same: p50 by that with 4 entries",
        1.2,
        _rows_of_ours(suite.MILLION_ENTRIES, suite.FEW_ENTRIES, "p50"),
    ),
    Target(
        "peak RSS without mapped files, 8 GiB of images",
        64,
        _of_ours(suite.IDLE_8G, "anon", 1 << 20),
        unit=" MiB",
    ),
    Target("CPU time of the daemon for 1 GiB drained: by CRIU's", 1.0, _between(suite.IDLE, "cpu")),
)


def print_targets(console: Console, rows: Rows, criu: str) -> bool:
    """Print the table of targets; return whether all are met. ``criu``: the name of CRIU's peer."""
    table = Table(title="targets", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for title in ("what", "target", "reached (range over rounds)", ""):
        table.add_column(title, justify="left" if title in {"what", ""} else "right", no_wrap=True)
    all_met = True
    for target in TARGETS:
        value = target.reached(rows, criu)
        bound = f"{'>=' if target.least else '<='} {target.bound:g}{target.unit}"
        met = value is not None and target.met(value)
        all_met &= met
        verdict = "[green]ok[/]" if met else "[red]missed[/]" if value else "[yellow]not measured[/]"
        table.add_row(target.what, bound, ratio_text(value) + target.unit if value else "", verdict)
    console.print(table)
    return all_met
