"""A trace as one HTML page, with zoom and the details of each mark under the pointer. Needs plotly."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from plotly.graph_objects import Figure, Scatter, Scattergl
from plotly.offline import get_plotlyjs

from lazypages.observe.pictures import PictureError, slower
from lazypages.observe.trace_data import FAULTS, Marks, Row, TraceData
from lazypages.observe.tracing import Kind
from lazypages.wording import size

#: Most marks of one kind and source in one part; of more, every n-th is drawn. Each is 100 to 300 bytes of the page.
_MOST_MARKS = 5_000

#: What the detail of a record is (docs/trace.md), where it is a time.
_DETAILS = {Kind.ANSWERED: "answered in", Kind.BROUGHT: "copied in", Kind.ARRIVED: "placed in"}
_MOMENTS = {"restore finished": ("black", "solid"), "fork": ("teal", "dot")}

#: us that have a number at the axis; all latencies may be within one decade.
_TIMES = [factor * 10**power for power in range(-1, 7) for factor in (1, 2, 5)]

#: Three parts in a row on a wide screen, below each other on a narrow one; all are as wide as there is room.
_STYLE = """
body { font-family: sans-serif; margin: 1em; }
h1 { font-size: 1.1em; overflow-wrap: anywhere; }
h2 { font-size: 1em; margin: 1em 0 0; }
h3 { font-size: 0.9em; font-weight: normal; margin: 0.5em 0 0; }
.row { display: grid; grid-template-columns: minmax(0, 2.4fr) minmax(0, 1fr) minmax(0, 1fr); gap: 0.5em; }
.part { height: 27em; min-width: 0; }
@media (max-width: 1100px) { .row { grid-template-columns: minmax(0, 1fr); } }
"""
_CONFIG = {
    "responsive": True,
    "scrollZoom": True,
    "displaylogo": False,
    # Nothing here is meant for plotly's servers.
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d"],
}


def write_page(data: TraceData, path: Path) -> None:
    """Write a self-contained page. Raises PictureError."""
    title = html.escape(data.title())
    parts = [
        "<!doctype html><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script>",
        f"<h1>{title}</h1>",
        "<p>Drag to zoom, scroll to zoom around the pointer, double-click to go back; click in a legend to hide.</p>",
    ]
    for row in data.rows():
        parts.append(f"<h2>{html.escape(row.title)}</h2><div class=row>")
        for name, figure in (
            ("pages over time", _places(row, data)),
            (row.latency_title, _latencies(row)),
            (f"memory brought, of {size(row.wanted)}", _progress(row, data)),
        ):
            part = figure.to_html(
                full_html=False, include_plotlyjs=False, config=_CONFIG, default_height="100%"
            )
            parts.append(f"<div><h3>{html.escape(name)}</h3><div class=part>{part}</div></div>")
        parts.append("</div>")
    try:
        path.write_text("\n".join(parts) + "\n")
    except OSError as error:
        raise PictureError(f"--output {path}: {error.strerror}") from None


def _places(row: Row, data: TraceData) -> Figure:
    figure = Figure()
    shown: set[str] = set()
    for marks in row.marks:
        # One entry in the legend for all kinds of changes.
        _add_marks(figure, marks, data.unit, legend=marks.label not in shown)
        shown.add(marks.label)
    _add_moments(figure, row)
    if row.addresses:
        ticks = row.addresses.ticks()
        figure.update_yaxes(
            tickvals=[at for at, _ in ticks],
            ticktext=[text for _, text in ticks],
            tickfont_family="monospace",
        )
        for low, high in row.addresses.bands():
            figure.add_hrect(low, high, fillcolor="#f4f4f4", line_width=0, layer="below")
    else:
        figure.update_yaxes(title="memory, in order of arrival", tick0=1, dtick=1)
    figure.update_xaxes(range=data.span, title=f"{data.unit} since the first fault or transfer")
    return _laid_out(figure)


def _add_marks(figure: Figure, marks: Marks, unit: str, *, legend: bool) -> None:
    step = max(1, -(-len(marks.records) // _MOST_MARKS))
    time, low, high = (part[::step] for part in (marks.time, marks.low, marks.high))
    records = marks.records[::step]
    detail = f"<br>{_DETAILS[marks.kind]} %{{customdata[2]:.3~f}} us" if marks.kind in _DETAILS else ""
    # As numbers: texts for all marks would be most of the page.
    numbers = np.stack((records["addr"], records["pages"], records["detail"] / 1000), -1).astype(np.float64)
    name = marks.label if step == 1 else f"{marks.label} (every {_ordinal(step)})"
    common = {
        "name": name,
        "legendgroup": marks.label,
        "showlegend": legend,
        "hovertemplate": (
            f"{marks.label}<br>0x%{{customdata[0]:x}}, pages: %{{customdata[1]:,}}{detail}<br>"
            f"at %{{x:.3f}} {unit}<extra></extra>"
        ),
    }
    if marks.kind in FAULTS:
        symbol = "circle" if marks.kind == Kind.ANSWERED else "cross-thin-open"
        marker = {"color": marks.colour, "size": 5, "symbol": symbol}
        middle = (low + high) / 2
        figure.add_trace(
            Scattergl(x=time, y=middle, customdata=numbers, mode="markers", marker=marker, **common)
        )
        return
    # A line from the first to the last page, then a gap.
    gaps = np.full(len(time), np.nan)
    figure.add_trace(
        Scattergl(
            x=np.stack((time, time, gaps), -1).ravel(),
            y=np.stack((low, high, gaps), -1).ravel(),
            customdata=np.repeat(numbers, 3, axis=0),
            mode="lines",
            line={"color": marks.colour, "width": 2},
            **common,
        )
    )


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in {11, 12, 13} else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _add_moments(figure: Figure, row: Row) -> None:
    """Vertical lines as high as the part, whatever its heights are; and one entry for each kind in the legend."""
    for moment in row.moments:
        colour, dash = _MOMENTS[moment.label]
        line = {"color": colour, "dash": dash, "width": 1.5}
        figure.add_shape(
            type="line", x0=moment.time, x1=moment.time, y0=0, y1=1, yref="paper", line=line, layer="above"
        )
    for label in dict.fromkeys(moment.label for moment in row.moments):
        colour, dash = _MOMENTS[label]
        line = {"color": colour, "dash": dash, "width": 1.5}
        figure.add_trace(Scatter(x=[None], y=[None], mode="lines", line=line, name=label))


def _latencies(row: Row) -> Figure:
    figure = Figure()
    for latency in row.latencies:
        times, shares = slower(latency.ordered.tolist())
        figure.add_trace(
            Scatter(
                x=times,
                y=shares,
                name=latency.label,
                mode="lines",
                line={"color": latency.colour, "width": 1.5},
                hovertemplate="%{y:.3%} took longer than %{x:.4g} us<extra></extra>",
            )
        )
    figure.update_xaxes(
        type="log", title="answered in, us", tickvals=_TIMES, ticktext=[f"{time:,g}" for time in _TIMES]
    )
    figure.update_yaxes(type="log", title="share that took longer", exponentformat="none", dtick=1)
    return _laid_out(figure)


def _progress(row: Row, data: TraceData) -> Figure:
    figure = Figure()
    for amount in row.amounts:
        figure.add_trace(
            Scatter(
                x=amount.time,
                y=amount.mib,
                name=amount.label,
                mode="lines",
                line={"color": amount.colour, "width": 1.5, "shape": "hv"},
                hovertemplate=f"%{{y:.1f}} MiB at %{{x:.3f}} {data.unit}<extra></extra>",
            )
        )
    _add_moments(figure, row)
    if row.wanted:
        figure.add_hline(row.wanted / (1 << 20), line={"color": "gray", "dash": "dot", "width": 1})
    figure.update_xaxes(range=data.span, title=data.unit)
    figure.update_yaxes(title="MiB", rangemode="tozero")
    return _laid_out(figure)


def _laid_out(figure: Figure) -> Figure:
    figure.update_layout(
        template="plotly_white",
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        legend={"orientation": "h", "y": -0.15, "yanchor": "top", "font": {"size": 11}},
        font={"size": 11},
        dragmode="zoom",
        hovermode="closest",
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure
