"""``lazypages plot``: draws a trace of ``lazypages serve --trace``."""

from __future__ import annotations

from pathlib import Path

import click

from lazypages.observe.pictures import check_picture
from lazypages.observe.tracing import read_trace


@click.command("plot")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="OUT.png|OUT.html",
    type=click.Path(path_type=Path),
    required=True,
    help="The picture: one PNG, or an HTML page with a picture for each task.",
)
def plot_command(file: Path, output: Path) -> None:
    """Draw the trace FILE of lazypages serve --trace.

    For each task: when, where and from which source its pages arrived; the latency of its faults; how much of its
    memory had arrived. An incomplete trace (still being written, or the daemon was killed) is drawn up to its end.

    Needs matplotlib in the same Python environment (pip install matplotlib).
    """
    check_picture("--output", output)
    trace = read_trace(file)
    from lazypages.observe.trace_picture import plot_trace  # noqa: PLC0415 - needs what check_picture looks for

    plot_trace(trace, output)
