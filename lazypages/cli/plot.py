"""``lazypages plot``: draws what ``lazypages serve --trace`` has recorded."""

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
    help="The picture: one PNG, or a page with a picture for each task.",
)
def plot_command(file: Path, output: Path) -> None:
    """Draw the trace FILE, which lazypages serve --trace has written.

    For each task: what came when, where and from which source; how long its faults took; how much memory it had.
    A trace that is still being written, or whose daemon was killed, is drawn as far as it goes.

    Needs matplotlib: pip install 'lazypages[plot]'
    """
    check_picture("--output", output)
    trace = read_trace(file)
    from lazypages.observe.trace_picture import plot_trace  # noqa: PLC0415 - needs what check_picture looks for

    plot_trace(trace, output)
