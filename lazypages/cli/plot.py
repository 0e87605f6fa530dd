"""``lazypages plot``: draws a trace of ``lazypages serve --trace``."""

from __future__ import annotations

from pathlib import Path

import click

from lazypages.observe.pictures import check_picture, check_plotly
from lazypages.observe.tracing import read_trace


@click.command("plot")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="OUT.png|OUT.html",
    type=click.Path(path_type=Path),
    required=True,
    help="The picture: a PNG, or an HTML page to zoom into, with details under the pointer.",
)
def plot_command(file: Path, output: Path) -> None:
    """Draw the trace FILE of lazypages serve --trace.

    For each task: when, where and from which source its pages arrived; the latency of its faults; how much of its
    memory had arrived. An incomplete trace (still being written, or the daemon was killed) is drawn up to its end.

    Needs matplotlib, and for an HTML page plotly; if one is missing, the command says how to install it.
    """
    check_picture("--output", output)
    page = output.suffix == ".html"
    if page:
        check_plotly("--output")
    trace = read_trace(file)
    # These need what was checked.
    from lazypages.observe.trace_data import TraceData  # noqa: PLC0415

    data = TraceData(trace)
    if page:
        from lazypages.observe.trace_page import write_page  # noqa: PLC0415

        write_page(data, output)
    else:
        from lazypages.observe.trace_picture import draw_trace  # noqa: PLC0415

        draw_trace(data, output)
