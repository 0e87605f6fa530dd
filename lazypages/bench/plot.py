"""Pictures of a bench: latency distributions of all peers, and first touches over time and address.

Needs matplotlib, the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazypages.bench.suite import Row
from lazypages.observe.pictures import draw_slower, new_figure, slower_axis, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Most dots in the picture over time; of more touches, every n-th is drawn.
_MOST_DOTS = 20_000


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the first round of every row into one PNG, or an HTML page with a picture for each row.

    Rows of idle tasks, which make one touch, are left out. Raises PictureError.
    """
    drawn = [row for row in rows if row.rounds and row.workload.touches > 1]
    write_picture(
        "--plot", path, title, lambda: _draw(drawn, title), lambda: [_draw([row], "") for row in drawn]
    )


def _draw(rows: Sequence[Row], title: str) -> Figure:
    """For each row: its distributions, then a picture of the touches for each peer."""
    width = max((len(row.rounds) for row in rows), default=1) + 1
    figure = new_figure(figsize=(4.2 * width, 3.4 * max(1, len(rows))), layout="constrained")
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
    for peer, runs in row.rounds.items():
        draw_slower(axis, sorted(runs[0].touches.ns), peer)
    slower_axis(axis, row.workload.name, "first touch")


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
