"""Pictures of a bench: latency distributions of all peers, and every first touch over time and address.

Needs matplotlib: `pip install 'lazypages[plot]'`.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazypages.bench.errors import BenchError
from lazypages.bench.suite import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".html")

#: Rows with more touches than this are thinned out in the picture over time: each dot is seen, not each touch.
_MOST_DOTS = 20_000


def check_plot(path: Path) -> None:
    """Raises BenchError when there can be no such picture; to be known before measuring."""
    if path.suffix not in SUFFIXES:
        raise BenchError(f"--plot {path}: the name must end in .png or .html")
    _figure_class()


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draws the first round of every row into one PNG, or one page with a picture a row. Raises BenchError.

    Idle tasks make one touch: there is nothing to draw.
    """
    drawn = [row for row in rows if row.rounds and row.workload.touches > 1]
    try:
        if path.suffix == ".png":
            _draw(drawn, title).savefig(path, dpi=100)
        else:
            path.write_text(_page(drawn, title))
    except OSError as error:
        raise BenchError(f"--plot {path}: {error.strerror}") from None


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install 'lazypages[plot]'") from None
    return Figure


def _page(rows: Sequence[Row], title: str) -> str:
    parts = [
        f"<!doctype html><meta charset=utf-8><title>lazypages bench</title><h1>{html.escape(title)}</h1>"
    ]
    for row in rows:
        picture = io.StringIO()
        _draw([row], "").savefig(picture, format="svg")
        svg = picture.getvalue()
        parts.append(svg[svg.index("<svg") :])
    return "\n".join(parts) + "\n"


def _draw(rows: Sequence[Row], title: str) -> Figure:
    """For each row: its distributions, then one picture a peer of what was touched when."""
    width = max((len(row.rounds) for row in rows), default=1) + 1
    figure = _figure_class()(figsize=(4.2 * width, 3.4 * max(1, len(rows))), layout="constrained")
    if title:
        figure.suptitle(title)
    axes = figure.subplots(max(1, len(rows)), width, squeeze=False)
    for row, line in zip(rows, axes, strict=False):
        _distributions(line[0], row)
        slowest = max(max(runs[0].touches.ns) for runs in row.rounds.values())
        for axis, peer in zip(line[1:], row.rounds, strict=False):
            _touches(axis, row, peer, slowest)
        for axis in line[len(row.rounds) + 1 :]:
            axis.set_axis_off()
    return figure


def _distributions(axis: Any, row: Row) -> None:
    """Share of first touches that took longer: both axes logarithmic, so that tails are seen."""
    for peer, runs in row.rounds.items():
        ordered = sorted(runs[0].touches.ns)
        count = len(ordered)
        step = max(1, count // 2000)
        # all of the tail, a part of the rest
        kept = [*range(0, max(0, count - 1000), step), *range(max(0, count - 1000), count)]
        axis.plot(
            [max(ordered[i], 1) / 1000 for i in kept], [1 - i / count for i in kept], label=peer, linewidth=1
        )
    axis.set(
        xscale="log",
        yscale="log",
        title=row.workload.name,
        xlabel="first touch, us",
        ylabel="share that took longer",
    )
    axis.grid(visible=True, which="major", alpha=0.3)
    axis.legend(fontsize="x-small")


def _touches(axis: Any, row: Row, peer: str, slowest: int) -> None:
    from matplotlib.colors import LogNorm  # noqa: PLC0415 - an extra

    touches = row.rounds[peer][0].touches
    step = max(1, len(touches.ns) // _MOST_DOTS)
    norm = LogNorm(vmin=100, vmax=max(slowest, 1000))
    dots = axis.scatter(
        [at / 1e6 for at in touches.at[::step]],
        touches.page[::step],
        c=[max(ns, 100) for ns in touches.ns[::step]],
        norm=norm,
        s=2,
        linewidths=0,
        rasterized=True,
    )
    axis.set(title=peer, xlabel="ms since the first touch", ylabel="page")
    axis.figure.colorbar(dots, ax=axis, label="ns")
