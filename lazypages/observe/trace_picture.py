"""A trace as a PNG. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lazypages.observe.pictures import PictureError, draw_slower, new_figure, slower_axis
from lazypages.observe.trace_data import FAULTS, AddressMap, Floats, Marks, Row, TraceData
from lazypages.observe.tracing import Kind
from lazypages.wording import size

#: Most dots and lines of one kind and source in one part of the picture; of more, every n-th is drawn.
_MOST_MARKS = 100_000
_MOMENTS: dict[str, tuple[str, Literal["-", ":"]]] = {
    "restore finished": ("black", "-"),
    "fork": ("teal", ":"),
}


def draw_trace(data: TraceData, path: Path) -> None:
    """Draw a trace into the PNG `path`. Raises PictureError."""
    rows = data.rows()
    figure = new_figure(figsize=(17, 0.7 + 4.6 * len(rows)), layout="constrained")
    figure.suptitle(data.title())
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        _draw(part, row, data)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise PictureError(f"--output {path}: {error.strerror}") from None


def _draw(figure: Any, row: Row, data: TraceData) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
    _places(left, row, data)
    for latency in row.latencies:
        draw_slower(middle, latency.ordered.tolist(), latency.label, color=latency.colour)
    slower_axis(middle, row.latency_title, "answered in")
    _progress(right, row, data)


def _places(axis: Any, row: Row, data: TraceData) -> None:
    if row.addresses:
        _draw_map(axis, row.addresses)
        axis.set_ylabel("address")
    else:
        axis.set_ylabel("memory, in order of arrival")
        axis.yaxis.get_major_locator().set_params(integer=True)
    handles = [_draw_marks(axis, marks) for marks in row.marks]
    handles += _draw_moments(axis, row)
    axis.set_title(row.title, loc="left")
    axis.set(xlim=data.span, xlabel=f"{data.unit} since the first fault or transfer")
    named = {str(handle.get_label()): handle for handle in handles}
    axis.legend(
        handles=list(named.values()),
        fontsize="x-small",
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=-(-len(named) // 2),
        frameon=False,
        borderaxespad=0,
    )


def _draw_marks(axis: Any, marks: Marks) -> Line2D:
    """Returns its entry in the legend."""
    step = max(1, -(-len(marks.records) // _MOST_MARKS))
    time, since, low, high = (part[::step] for part in (marks.time, marks.since, marks.low, marks.high))
    if marks.kind not in FAULTS:
        order = 2 if marks.placed else 4
        axis.add_collection(_lines(time, low, time, high, colour=marks.colour, width=2, order=order))
        return Line2D([], [], color=marks.colour, linewidth=4, label=marks.label)
    middle, marker = (low + high) / 2, "." if marks.kind == Kind.ANSWERED else "+"
    dot = 3 if len(time) > 500 else 5
    axis.plot(time, middle, marker, color=marks.colour, markersize=dot, rasterized=True, zorder=3)
    if marks.kind == Kind.ANSWERED:
        axis.add_collection(_lines(since, middle, time, middle, colour=marks.colour, width=0.6, order=3))
    return Line2D([], [], color=marks.colour, marker=marker, linestyle="", markersize=8, label=marks.label)


def _draw_moments(axis: Any, row: Row) -> list[Line2D]:
    handles = []
    for moment in row.moments:
        colour, style = _MOMENTS[moment.label]
        axis.axvline(moment.time, color=colour, linestyle=style, linewidth=1, zorder=5)
        handles.append(Line2D([], [], color=colour, linestyle=style, label=moment.label))
    return handles


def _draw_map(axis: Any, addresses: AddressMap) -> None:
    for low, high in addresses.bands():
        axis.axhspan(low, high, color="0.96", zorder=0)
    ticks = addresses.ticks()
    axis.set_yticks(
        [at for at, _ in ticks], [label for _, label in ticks], fontsize="x-small", family="monospace"
    )
    axis.set_ylim(-0.02 * addresses.top, 1.02 * addresses.top)


def _progress(axis: Any, row: Row, data: TraceData) -> None:
    for amount in row.amounts:
        axis.plot(
            amount.time,
            amount.mib,
            label=amount.label,
            color=amount.colour,
            linewidth=1.2,
            drawstyle="steps-post",
        )
    for moment in row.moments:
        colour, style = _MOMENTS[moment.label]
        axis.axvline(moment.time, color=colour, linestyle=style, linewidth=0.8, alpha=0.5)
    if row.wanted:
        axis.axhline(row.wanted / (1 << 20), color="gray", linewidth=0.8, linestyle=":")
    axis.set(title=f"memory brought, of {size(row.wanted)}", xlabel=data.unit, ylabel="MiB", xlim=data.span)
    axis.set_ylim(bottom=0)
    axis.grid(visible=True, alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="x-small", loc="lower right")  # "best" is slow with many points


def _lines(
    x0: Floats, y0: NDArray[Any], x1: Floats, y1: NDArray[Any], *, colour: str, width: float, order: int
) -> LineCollection:
    """Lines between two points each."""
    ends = np.stack([np.stack((x0, y0), -1), np.stack((x1, y1), -1)], 1)
    return LineCollection(
        list(ends), colors=colour, linewidths=width, capstyle="projecting", rasterized=True, zorder=order
    )
