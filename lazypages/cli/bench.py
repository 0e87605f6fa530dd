"""The command `lazypages bench`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from lazypages.bench import checks, peers, suite
from lazypages.bench.errors import BenchError
from lazypages.bench.machine import describe_machine, idle_share
from lazypages.bench.plot import plot
from lazypages.bench.programs import Programs
from lazypages.bench.suite import Row, Suite
from lazypages.bench.workloads import Workload
from lazypages.observe.pictures import check_picture
from lazypages.outputs import check_output

#: Width in columns of a table that is written to a file.
_FILE_WIDTH = 200

ROUNDS = {"quick": 1, "default": 3, "full": 9, "targets": 5}


@click.command("bench")
@click.option(
    "--quick",
    "extent",
    flag_value="quick",
    help="About a minute: checks contents and counts, no times.",
)
@click.option(
    "--full", "extent", flag_value="full", help="All workloads, up to 8 GiB: half an hour, 16 GiB of memory."
)
@click.option(
    "--targets",
    "extent",
    flag_value="targets",
    help="The workloads of the project's targets; prints which targets are met.",
)
@click.option("--rounds", type=click.IntRange(1), help="Number of rounds; each peer runs once per round.")
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Only workloads whose name contains TEXT; may be repeated."
)
@click.option(
    "--criu", multiple=True, type=click.Path(path_type=Path), help="CRIU to compare with; may be repeated."
)
@click.option(
    "--no-criu", is_flag=True, help="Skip CRIU, and workloads that need its page server or its restore."
)
@click.option("--trace", "traced", is_flag=True, help="Also run lazypages serve with --trace.")
@click.option(
    "--against",
    multiple=True,
    metavar="LAZYPAGES",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Executable of another installation to compare with; may be repeated.",
)
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path, exists=True), help="Directory for the images."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the results of all rounds to FILE."
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path),
    help="Draw the results into FILE.png or FILE.html.",
)
@click.pass_context
def bench_command(  # noqa: PLR0917 - the options
    ctx: click.Context,
    extent: str | None,
    rounds: int | None,
    only: tuple[str, ...],
    criu: tuple[Path, ...],
    no_criu: bool,
    traced: bool,
    against: tuple[Path, ...],
    folder: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Compare lazypages serve with criu lazy-pages and with a minimal C loop, in alternation, on this machine.

    A task measures the time of each first touch of its own memory, and checks every byte. Needs root and
    a C compiler.
    """
    from rich.console import Console  # noqa: PLC0415 - an extra

    from lazypages.bench import report  # noqa: PLC0415 - needs rich
    from lazypages.bench.targets import print_targets  # noqa: PLC0415 - needs rich

    extent = extent or "default"
    rounds = rounds or ROUNDS[extent]
    rows: list[Row] = []
    found = [] if no_criu else peers.find_criu(criu)
    workloads = _workloads(extent, only, criu=bool(found))
    if json_path:
        check_output("--json", json_path)
    if plot_path:
        check_picture("--plot", plot_path)
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    with tempfile.TemporaryDirectory(prefix="lazypages-bench-", dir=folder) as name:
        work = Path(name).resolve()
        programs = Programs.compile(work)
        compared = peers.all_peers(programs, found, traced=traced, against=against)
        machine = describe_machine(work, [name for name, _path in found])
        report.print_machine(console, machine)
        report.print_busy(console, idle_share(), "before the first round")
        console.print()
        with console.status("") as status:
            for row in Suite(programs, compared, work, rounds, status.update).run(workloads):
                report.print_row(console, row, compared)
                rows.append(row)
    if extent == "quick":
        wrong = [f"{row.workload.name}: {line}" for row in rows for line in checks.failures(row)]
    else:
        wrong = []
        report.print_ratios(console, rows, compared)
    if extent == "targets":
        by_name = {row.workload.name: row for row in rows}
        print_targets(console, by_name, found[0][0] if found else "")
    if json_path:
        _write_json(json_path, report.as_json(machine, rows, rounds, compared))
    if plot_path:
        plot(plot_path, rows, f"lazypages bench, {machine['date']}, {machine['kernel']}")
    for line in wrong:
        console.print(f"[red]unexpected:[/] {line}", highlight=False, soft_wrap=True)
    ctx.exit(1 if wrong or any("WRONG" in why for row in rows for why in row.absent.values()) else 0)


def _workloads(extent: str, only: tuple[str, ...], *, criu: bool) -> list[Workload]:
    every = {"quick": suite.QUICK, "default": suite.DEFAULT, "full": suite.FULL, "targets": suite.TARGETS}[
        extent
    ]
    chosen = [w for w in every if not only or any(text in w.name for text in only)]
    if not criu:
        chosen = [w for w in chosen if not w.real]
    if not chosen:
        raise BenchError("no workload matches --only")
    return chosen


def _write_json(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise BenchError(f"--json {path}: {error.strerror}") from None
