"""``lazypages top``: what a resident daemon does at the moment, again and again (docs/daemon.md)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from lazypages.cli.daemon_socket import socket_option
from lazypages.engine.memory import PAGE_SIZE
from lazypages.errors import LazyPagesError
from lazypages.logs import printable
from lazypages.resident.client import Client
from lazypages.wording import count, size

if TYPE_CHECKING:
    from rich.table import Table

#: Restores whose tasks are asked for and shown.
MAX_DETAILS = 20

COLUMNS = (
    "",
    "state",
    "faults/s",
    "bytes/s",
    "to go",
    "faults",
    "wait p50",
    "wait p99",
    "pages by source",
    "",
)


class Row(NamedTuple):
    """A restore, or one of its tasks. ``faults_rate``: per second; ``bytes_rate``: bytes copied per second.

    ``pending``, ``sources``: pages. ``waits``: quantiles 0.5 and 0.99 of the time that faults have waited, in
    microseconds; None without faults.
    """

    name: str
    task: bool
    state: str
    faults: int
    pending: int
    sources: Mapping[str, int]
    waits: tuple[float | None, float | None]
    place: str
    faults_rate: float = 0.0
    bytes_rate: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """The same in each picture."""
        return self.place, self.name

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "task": self.task,
            "state": self.state,
            "faults": self.faults,
            "faults_per_second": round(self.faults_rate, 1),
            "bytes_per_second": round(self.bytes_rate),
            "pages_pending": self.pending,
            "pages_by_source": dict(self.sources),
            "wait_us": {"p50": self.waits[0], "p99": self.waits[1]},
            "images": self.place,
        }


def restore_rows(status: Mapping[str, Any], details: Mapping[str, Any] | None) -> Iterator[Row]:
    """The row of a restore, then those of its tasks. ``details``: its summary, if it was asked for."""
    state = status["state"] if status["exit"] is None else f"ended with {status['exit']}"
    times = (details or {}).get("service_time", {})
    yield Row(
        f"{status['restore']}: {count(status['tasks']['served'], 'task')}",
        False,
        state,
        status["faults"],
        status["pages"]["pending"],
        (details or {}).get("copied_by_source", {}),
        (times.get("p50_us"), times.get("p99_us")),
        status["images"],
    )
    for task in (details or {}).get("tasks", ()):
        times = task["service_time"]
        title = f"{task['name']} ({task['program']})" if task["program"] else task["name"]
        yield Row(
            f"  {status['restore']}: {title}",
            True,
            task["state"],
            task["faults"]["total"],
            task["pages"]["pending"],
            task["pages"]["copied_by_source"],
            (times["p50_us"], times["p99_us"]),
            "",
        )


class Rates:
    """Adds the rates since the picture before."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], Row] = {}
        self._at = 0.0

    def add(self, rows: Sequence[Row], now: float) -> list[Row]:
        """``now``: seconds."""
        passed, found = now - self._at, []
        for row in rows:
            before = self._before.get(row.key)
            if before and passed > 0:
                pages = sum(row.sources.values()) - sum(before.sources.values())
                rates = (max(0, row.faults - before.faults) / passed, max(0, pages) * PAGE_SIZE / passed)
                found.append(row._replace(faults_rate=rates[0], bytes_rate=rates[1]))
            else:
                found.append(row)
        self._before, self._at = {row.key: row for row in found}, now
        return found


def head(answer: Mapping[str, Any]) -> str:
    """One line about the daemon."""
    limits = answer["limits"]
    return (
        f"lazypages {answer['version']}, pid {answer['pid']}: {limits['restores']['used']} of "
        f"{limits['restores']['max']} restores, {limits['descriptors']['used']} of {limits['descriptors']['max']} "
        f"file descriptors, {size(limits['memory']['used'])} of tables{', ending' if answer['closing'] else ''}"
    )


def cells(row: Row) -> tuple[str, ...]:
    """As text, in the order of COLUMNS."""
    waits = ("" if wait is None else f"{wait:,.0f} us" for wait in row.waits)
    return (
        printable(row.name),
        row.state,
        f"{row.faults_rate:,.0f}",
        f"{size(row.bytes_rate)}/s",
        size(row.pending * PAGE_SIZE),
        f"{row.faults:,}",
        *waits,
        ", ".join(f"{name} {pages:,}" for name, pages in row.sources.items()),
        printable(row.place),
    )


def plain(title: str, rows: Sequence[Row]) -> str:
    """A table as text."""
    table = [COLUMNS, *map(cells, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _table(title: str, rows: Sequence[Row]) -> Table:
    from rich.table import Table  # noqa: PLC0415 - slow to import, and only needed on terminals
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, cells(row)), style="" if row.task else "bold")
    return table


def look(client: Client, *, everything: bool) -> tuple[dict[str, Any], list[Row]]:
    """The daemon's status, and the rows. ``everything``: also restores that have ended. Raises LazyPagesError."""
    answer = client.request("status")
    rows: list[Row] = []
    shown = 0
    for status in answer["restores"]:
        ended = status["state"] == "ended"
        if ended and not everything:
            continue
        details = None
        if shown < MAX_DETAILS:
            shown += 1
            try:
                details = client.request("status", restore=status["restore"])["summary"]
            except LazyPagesError:  # it has ended and is forgotten
                continue
        rows += restore_rows(status, details)
    return answer, rows


@click.command()
@socket_option("The daemon's socket.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Time between two pictures.",
)
@click.option("--all", "everything", is_flag=True, help="Also show restores that have ended.")
@click.option("--once", is_flag=True, help="Print one picture, with rates over one interval, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print each picture as JSON on one line.")
def top(path: Path, interval: float, *, everything: bool, once: bool, as_json: bool) -> None:
    """Show what a resident daemon does: its restores and tasks, faults, speed, missing pages, and waits.

    Ends with Ctrl-C, or when the daemon ends. Prints text if the output is not a terminal.
    """
    with suppress(KeyboardInterrupt):
        _watch(path, interval, everything=everything, once=once, as_json=as_json)


def _watch(path: Path, interval: float, *, everything: bool, once: bool, as_json: bool) -> None:
    rates = Rates()
    with ExitStack() as stack:
        client = stack.enter_context(Client(path))
        live = None
        if not once and not as_json and sys.stdout.isatty():
            from rich.live import Live  # noqa: PLC0415 - slow to import, and only needed on terminals

            live = stack.enter_context(Live(auto_refresh=False, transient=True))
        if once:
            rates.add(look(client, everything=everything)[1], time.monotonic())
            time.sleep(interval)
        while True:
            answer, rows = look(client, everything=everything)
            rows = rates.add(rows, time.monotonic())
            if live:
                live.update(_table(head(answer), rows), refresh=True)
            elif as_json:
                daemon = {name: answer[name] for name in ("version", "pid", "closing", "limits")}
                click.echo(json.dumps({"daemon": daemon, "rows": [row.as_dict() for row in rows]}))
            else:
                click.echo(plain(head(answer), rows))
            if once:
                return
            time.sleep(interval)
