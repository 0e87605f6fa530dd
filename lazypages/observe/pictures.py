"""What the pictures of bench and traces share: output files, and curves of latencies. Needs matplotlib, an extra."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazypages.errors import LazyPagesError
from lazypages.extras import how_to_install
from lazypages.outputs import check_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".html")

#: Points of a curve: the _TAIL slowest values, and up to _POINTS of the others.
_TAIL = 1000
_POINTS = 2000


class PictureError(LazyPagesError):
    """The picture can't be drawn: wrong suffix, no matplotlib, or a file error."""


def check_picture(option: str, path: Path) -> None:
    """Raises LazyPagesError if `path`, the value of `option`, can't be drawn or written. Call it before long work."""
    if path.suffix not in SUFFIXES:
        raise PictureError(f"{option} {path}: the name must end in .png or .html")
    check_output(option, path)
    new_figure(option=option)


def check_plotly(option: str) -> None:
    """Raises PictureError without plotly."""
    try:
        import plotly.graph_objects  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise missing(option, "plotly") from None


def missing(option: str, package: str) -> PictureError:
    """The error that a package of the extra `plot` is missing."""
    return PictureError(f"{option} needs {package}: {how_to_install(package)}")


def new_figure(*, option: str = "a picture", **options: Any) -> Figure:
    """An empty figure. Raises PictureError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise missing(option, "matplotlib") from None
    return Figure(**options)


def write_picture(
    option: str, path: Path, title: str, whole: Callable[[], Figure], parts: Callable[[], Sequence[Figure]]
) -> None:
    """Write `whole` as one PNG, or `parts` as one self-contained HTML page. Raises PictureError."""
    try:
        if path.suffix == ".png":
            whole().savefig(path, dpi=100)
        else:
            path.write_text(_page(title, parts()))
    except OSError as error:
        raise PictureError(f"{option} {path}: {error.strerror}") from None


def _page(title: str, figures: Sequence[Figure]) -> str:
    text = html.escape(title)
    parts = [f"<!doctype html><meta charset=utf-8><title>{text}</title><h1>{text}</h1>"]
    for figure in figures:
        picture = io.StringIO()
        figure.savefig(picture, format="svg")
        svg = picture.getvalue()
        # As wide as there is room, instead of the width of the figure.
        parts.append('<svg style="width: 100%; height: auto"' + svg[svg.index("<svg") + 4 :])
    return "\n".join(parts) + "\n"


def draw_slower(axis: Any, ordered: Sequence[int], label: str, **style: Any) -> None:
    """Draw the share of latencies (ns, sorted) that are longer than a time, over that time."""
    times, shares = slower(ordered)
    axis.plot(times, shares, label=label, linewidth=1, **style)


def slower(ordered: Sequence[int]) -> tuple[list[float], list[float]]:
    """Points of a curve: times in us, and the share of latencies (ns, sorted) that are longer."""
    count = len(ordered)
    step = max(1, count // _POINTS)
    kept = [*range(0, max(0, count - _TAIL), step), *range(max(0, count - _TAIL), count)]
    return [max(ordered[i], 1) / 1000 for i in kept], [1 - i / count for i in kept]


def slower_axis(axis: Any, title: str, what: str) -> None:
    """Set up logarithmic axes after calls of draw_slower. `what`: the label of the time axis, without its unit."""
    from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: PLC0415 - an extra

    low, high = axis.dataLim.intervalx
    axis.set(xscale="log", yscale="log", title=title, xlabel=f"{what}, us", ylabel="share that took longer")
    if 0 < low <= high < math.inf:
        axis.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.floor(math.log10(high) + 1))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(visible=True, which="major", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="x-small", loc="upper right")  # "best" is slow with many points
