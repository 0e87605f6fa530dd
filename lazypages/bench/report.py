"""The results as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lazypages.bench.machine import BUSY_SHARE
from lazypages.bench.metrics import METRICS, Spread, ratios
from lazypages.bench.peers import ONLY_REMOTE, OURS, Peer
from lazypages.bench.suite import Row

#: The columns of tables; metrics that no peer has are left out.
_COLUMNS = {metric.key: metric for metric in METRICS}
#: The metrics of the tables of ratios.
_RATIOS = ("p50", "p99", "stall", "both", "present", "cpu", "first")


def as_json(
    machine: dict[str, Any], rows: Sequence[Row], rounds: int, peers: Sequence[Peer]
) -> dict[str, Any]:
    """All results except single touches. Latencies are in us, durations in s, memory in bytes."""
    return {
        "format": 1,
        "machine": machine,
        "rounds": rounds,
        "rows": [
            {
                "workload": asdict(row.workload),
                "others_cpu_share": row.others,
                "peers": [_peer_json(row, peer.name) for peer in peers],
            }
            for row in rows
        ],
    }


def _peer_json(row: Row, name: str) -> dict[str, Any]:
    if name in row.absent:
        return {"name": name, "absent": row.absent[name]}
    spreads = {key: row.spread(name, key) for key in _COLUMNS}
    return {
        "name": name,
        "rounds": [run.metrics for run in row.rounds[name]],
        "medians": {key: spread.median for key, spread in spreads.items() if spread},
        "ours_by_it": {
            key: asdict(ratio)
            for key in _COLUMNS
            if (ratio := ratios(row.values(OURS, key), row.values(name, key)))
        }
        if name != OURS
        else {},
    }


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    """Print the header: machine, versions and time."""
    load = ", ".join(f"{value:.2f}" for value in machine["load"])
    console.print(
        f"{machine['date']}, lazypages {machine['lazypages']} ({machine['commit']}), "
        f"{', '.join(machine['criu']) or 'no criu'}, Python {machine['python']}\n"
        f"{machine['kernel']}, {machine['cpus']} x {machine['cpu']}"
        f"{' (virtual)' if machine['hypervisor'] else ''}, {machine['memory_gib']} GiB, "
        f"governor {machine['governor']}, THP {machine['thp']}, images on {machine['images_on']}, load {load}",
        highlight=False,
        soft_wrap=True,
    )


def print_busy(console: Console, share: float, when: str) -> None:
    """Print a warning if other processes used more than BUSY_SHARE of the CPUs."""
    if share > BUSY_SHARE:
        console.print(
            f"[bold red]This machine is busy:[/] other processes used {share:.0%} of its CPUs {when}. "
            "Absolute numbers are wrong, ratios may be.",
            highlight=False,
            soft_wrap=True,
        )


def print_row(console: Console, row: Row, peers: Sequence[Peer]) -> None:
    """Print the table of a workload: medians, a line for each peer."""
    present = [
        metric
        for metric in METRICS
        if metric.shown and any(row.spread(peer.name, metric.key) for peer in peers)
    ]
    table = Table(title=row.workload.name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for metric in present:
        table.add_column(metric.title, justify="right", no_wrap=True)
    for peer in peers:
        if peer.name in row.rounds:
            spreads = [row.spread(peer.name, metric.key) for metric in present]
            cells = [
                m.text(spread.median) if spread else "" for m, spread in zip(present, spreads, strict=True)
            ]
            table.add_row(peer.name, *cells)
    console.print(table)
    for name, why in row.absent.items():
        if why == ONLY_REMOTE:
            continue
        console.print(f"  {escape(name)}: {escape(why)}", style="dim", highlight=False, soft_wrap=True)
    print_busy(console, row.others, "during this row")
    console.print()


def ratio_text(spread: Spread) -> str:
    """Median and range."""
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def print_ratios(console: Console, rows: Sequence[Row], peers: Sequence[Peer]) -> None:
    """Print ours divided by each other peer: medians and ranges of the rounds' ratios. Below 1 ours is better."""
    for peer in peers:
        if peer.name == OURS:
            continue
        table = Table(
            title=f"ours / {peer.name}", title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        compared = [row for row in rows if peer.name in row.rounds and OURS in row.rounds]
        found = {
            key: [ratios(row.values(OURS, key), row.values(peer.name, key)) for row in compared]
            for key in _RATIOS
        }
        shown = [key for key in _RATIOS if any(found[key])]
        table.add_column("", no_wrap=True)
        for key in shown:
            table.add_column(_COLUMNS[key].title.removesuffix(" us"), justify="right", no_wrap=True)
        for number, row in enumerate(compared):
            cells = [found[key][number] for key in shown]
            table.add_row(row.workload.name, *(ratio_text(ratio) if ratio else "" for ratio in cells))
        if table.row_count:
            console.print(table)
            console.print()
