"""A trace as a picture: a row for each task, and one for all tasks together.

Each row has three parts: pages over time and address, coloured by source; the latency of faults; the amount of memory
over time. Needs matplotlib (and NumPy, which comes with it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lazypages.engine.memory import PAGE_SIZE
from lazypages.observe.pictures import draw_slower, new_figure, slower_axis, write_picture
from lazypages.observe.tracing import NO_SOURCE, NOWHERE, RECORD, REMOTE, ZERO, Kind, Trace, TraceError
from lazypages.wording import count, size

Records = NDArray[Any]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]

#: Number of tasks that get a row: those with the most records.
MOST_ROWS = 8
#: Most dots and lines of one kind and source in one part of the picture; of more, every n-th is drawn.
_MOST_MARKS = 100_000
#: Most address ranges that are drawn separately.
_MOST_RANGES = 12
_MIB = 1 << 20

_FIELDS = np.dtype(
    [
        *((name, "<u8") for name in ("time", "addr", "pages", "detail")),
        ("task", "<u4"),
        ("memory", "<u4"),
        ("kind", "<u2"),
        ("source", "<u2"),
        ("unused", "<u4"),
    ]
)
_LEVELS = ("tab:blue", "tab:green", "tab:purple", "tab:cyan", "tab:olive", "tab:brown", "tab:pink")
_COLOURS = {REMOTE: "tab:orange", ZERO: "dimgray", NOWHERE: "tab:red", NO_SOURCE: "black"}
_CHANGES = (Kind.REMOVED, Kind.UNMAPPED, Kind.REMAPPED)
_PLACED = (Kind.ANSWERED, Kind.BROUGHT, Kind.ARRIVED)
_DRAWN = (*_PLACED, Kind.LEFT, Kind.LOST, Kind.POISONED, *_CHANGES)


def plot_trace(trace: Trace, path: Path) -> None:
    """Draw a trace into `path`, a PNG or an HTML page. Raises PictureError; TraceError if the trace is empty."""
    assert _FIELDS.itemsize == RECORD.size
    records = np.frombuffer(trace.data, dtype=_FIELDS)
    records = records[np.argsort(records["time"], kind="stable")]
    drawn = records[np.isin(records["kind"], _DRAWN)]
    if not len(drawn):
        raise TraceError(f"{trace.path} has no faults and no transfers: nothing to draw")
    first = int(min(drawn["time"][0], _of(records, Kind.FAULT)["time"].min(initial=drawn["time"][0])))
    scale, unit = (1e6, "ms") if int(drawn["time"][-1]) - first < 10e9 else (1e9, "s")
    picture = _Picture(trace, records, drawn, first, scale, unit)
    rows = picture.rows()
    title = picture.title(len(rows))

    def whole() -> Figure:
        figure = new_figure(figsize=(17, 0.7 + 4.6 * len(rows)), layout="constrained")
        figure.suptitle(title)
        for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            picture.draw(part, row)
        return figure

    def parts() -> Iterator[Figure]:
        for row in rows:
            figure = new_figure(figsize=(17, 4.6), layout="constrained")
            picture.draw(figure, row)
            yield figure

    write_picture("--output", path, title, whole, lambda: list(parts()))


def _of(records: Records, *kinds: Kind) -> Records:
    return records[np.isin(records["kind"], kinds)]


def _thinned(records: Records) -> Records:
    return records[:: max(1, -(-len(records) // _MOST_MARKS))]


@dataclass(frozen=True, slots=True)
class _Row:
    """One address space, by its number in the trace; 0: all of them."""

    memory: int
    title: str


@dataclass(frozen=True, slots=True)
class _Picture:
    """``drawn``: the records that are drawn as marks. Times are relative to `first`, in units of `scale` ns."""

    trace: Trace
    records: Records
    drawn: Records
    first: int
    scale: float
    unit: str

    def rows(self) -> list[_Row]:
        """The tasks with the most records, in the order of their arrival. With several, a row for all comes first."""
        memories, counts = np.unique(self.drawn["memory"], return_counts=True)
        chosen = sorted(memories[np.argsort(-counts, kind="stable")][:MOST_ROWS].tolist())
        rows = [_Row(memory, self._name(memory)) for memory in chosen]
        return [_Row(0, "all tasks"), *rows] if len(memories) > 1 else rows

    def _name(self, memory: int) -> str:
        starts = _of(self.records, Kind.MEMORY)
        own = starts[starts["memory"] == memory]
        if not len(own):
            return f"memory {memory}"
        forked = f", forked from memory {own['detail'][0]}" if own["detail"][0] else ""
        number = f" (memory {memory}{forked})" if len(starts) > 1 else ""
        return f"task {own['task'][0]}{number}"

    def title(self, rows: int) -> str:
        memories = len(np.unique(self.drawn["memory"]))
        faults = len(_of(self.records, Kind.FAULT))
        parts = [
            str(self.trace.header.get("images", self.trace.path)),
            count(memories, "task"),
            count(faults, "fault"),
        ]
        if memories > MOST_ROWS:
            parts.append(f"the {rows - 1} with most records")
        if self.trace.dropped:
            parts.append(f"{count(self.trace.dropped, 'record')} missing")
        if not self.trace.complete:
            parts.append("the daemon had not ended")
        return ", ".join(parts)

    def draw(self, figure: Any, row: _Row) -> None:
        """One row, into a figure or a part of one."""
        left, middle, right = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
        drawn, records = self.drawn, self.records
        if row.memory:
            drawn, records = drawn[drawn["memory"] == row.memory], records[records["memory"] == row.memory]
        self._places(left, row, drawn)
        self._latencies(middle, drawn)
        self._progress(right, drawn, records)

    def _span(self) -> tuple[float, float]:
        """Of time, the same for all rows."""
        last = max(float(self._time(self.drawn[-1:])[0]), 0.001)
        return -0.01 * last, 1.01 * last

    def _time(self, records: Records) -> NDArray[np.float64]:
        return (records["time"].astype(np.int64) - self.first) / self.scale

    # What came when and where.

    def _places(self, axis: Any, row: _Row, drawn: Records) -> None:
        if row.memory:
            map_ = _AddressMap.of(drawn)
            low, high = map_.place(drawn["addr"]), map_.place(drawn["addr"] + drawn["pages"] * PAGE_SIZE)
            map_.draw(axis)
            axis.set_ylabel("address")
        else:
            low, high = drawn["memory"] - 0.4, drawn["memory"] + 0.4
            axis.set_ylabel("memory, in order of arrival")
            axis.yaxis.get_major_locator().set_params(integer=True)
        handles = []
        for kind, source in _kinds_and_sources(drawn):
            chosen = (drawn["kind"] == kind) & (drawn["source"] == source)
            marks = _thinned(np.flatnonzero(chosen))
            time, bottom, top = self._time(drawn[marks]), low[marks], high[marks]
            name = self._source(drawn, kind, source)
            colour = _colour(source)
            if kind in {Kind.ANSWERED, Kind.LEFT}:
                middle, marker = (bottom + top) / 2, "." if kind == Kind.ANSWERED else "+"
                dot = 3 if len(marks) > 500 else 5
                axis.plot(time, middle, marker, color=colour, markersize=dot, rasterized=True, zorder=3)
                if kind == Kind.ANSWERED:
                    since = time - drawn["detail"][marks] / self.scale
                    axis.add_collection(
                        _lines((since, middle), (time, middle), colour=colour, width=0.6, order=3)
                    )
                label = f"fault: {name}" if kind == Kind.ANSWERED else "fault, page on its way already"
                mark = Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=label)
                handles.append(mark)
            else:
                colour, label = _stroke(kind, colour, name)
                order = 2 if kind in _PLACED else 4
                axis.add_collection(_lines((time, bottom), (time, top), colour=colour, width=2, order=order))
                handles.append(Line2D([], [], color=colour, linewidth=4, label=label))
        axis.set_title(row.title, loc="left")
        axis.set(xlim=self._span(), xlabel=f"{self.unit} since the first fault or transfer")
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

    def _source(self, records: Records, kind: int, source: int) -> str:
        of_it = records["task"][(records["kind"] == kind) & (records["source"] == source)]
        return self.trace.source_name(int(of_it[0]), source)

    # Latency of faults.

    def _latencies(self, axis: Any, drawn: Records) -> None:
        answers = _of(drawn, Kind.ANSWERED)
        for source in np.unique(answers["source"]).tolist():
            ns = np.sort(answers["detail"][answers["source"] == source])
            name = self._source(answers, Kind.ANSWERED, source)
            label = f"{name}: {len(ns):,}, p50 {_us(ns, 0.5)}, p99 {_us(ns, 0.99)}"
            draw_slower(axis, ns.tolist(), label, color=_colour(source))
        slower_axis(axis, "faults", "answered in")

    # Amount of memory over time.

    def _progress(self, axis: Any, drawn: Records, records: Records) -> None:
        placed = _of(drawn, *_PLACED)
        # Pages of page servers are counted as ARRIVED.
        placed = placed[(placed["kind"] != Kind.ANSWERED) | (placed["source"] != REMOTE)]
        parts = _kinds_and_sources(placed)
        if len(parts) > 1:
            self._amount(axis, placed, "all", "black", "-")
        for kind, source in parts:
            name = self._source(placed, kind, source)
            way = {Kind.ANSWERED: ", faults", Kind.BROUGHT: ", background"}.get(Kind(kind), "")
            chosen = placed[(placed["kind"] == kind) & (placed["source"] == source)]
            line = "--" if kind == Kind.BROUGHT else "-"
            self._amount(axis, chosen, f"{name}{way}", _colour(source), line)
        wanted = int(_of(records, Kind.MEMORY)["pages"].sum()) * PAGE_SIZE
        if wanted:
            axis.axhline(wanted / _MIB, color="gray", linewidth=0.8, linestyle=":")
        axis.set(
            title=f"memory brought, of {size(wanted)}", xlabel=self.unit, ylabel="MiB", xlim=self._span()
        )
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="x-small")

    def _amount(self, axis: Any, placed: Records, name: str, colour: str, line: str) -> None:
        time, total = self._time(placed), np.cumsum(placed["pages"]) * PAGE_SIZE / _MIB
        step = max(1, len(placed) // 5000)
        axis.plot(
            [0, *time[::step], time[-1], self._span()[1]],
            [0, *total[::step], total[-1], total[-1]],
            label=f"{name}: {size(int(placed['pages'].sum()) * PAGE_SIZE)}",
            color=colour,
            linestyle=line,
            linewidth=1.2,
            drawstyle="steps-post",
        )


def _lines(begin: Points, end: Points, *, colour: Any, width: float, order: int) -> LineCollection:
    """Lines between two points each."""
    ends = np.stack([np.stack(begin, -1), np.stack(end, -1)], 1)
    return LineCollection(
        list(ends), colors=colour, linewidths=width, capstyle="projecting", rasterized=True, zorder=order
    )


def _kinds_and_sources(records: Records) -> list[tuple[int, int]]:
    """The pairs that occur; background first, so that faults are drawn over it."""
    pairs = np.unique(np.stack([records["kind"], records["source"]], -1), axis=0).tolist()
    return sorted(
        ((kind, source) for kind, source in pairs), key=lambda pair: (pair[0] == Kind.ANSWERED, pair)
    )


def _colour(source: int) -> str:
    return _COLOURS.get(source) or _LEVELS[source % len(_LEVELS)]


def _stroke(kind: int, colour: str, name: str) -> tuple[Any, str]:
    """Colour and label of a range of pages."""
    if kind in _CHANGES:
        return "silver", "unmapped, discarded or moved by the task"
    if kind == Kind.LOST:
        return "tab:red", "lost"
    if kind == Kind.POISONED:
        return "darkred", "poisoned"
    pale = tuple(1 - 0.55 * (1 - part) for part in to_rgb(colour))
    return pale, f"background: {name}" if kind == Kind.BROUGHT else f"arrived: {name}"


def _us(ordered: NDArray[Any], q: float) -> str:
    ns = float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])
    return f"{ns / 1000:.3g} us" if ns < 1e6 else f"{ns / 1e6:.3g} ms"


@dataclass(frozen=True, slots=True)
class _AddressMap:
    """Address ranges stacked without the gaps between them. Heights are in bytes."""

    starts: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    at: NDArray[np.float64]

    @classmethod
    def of(cls, records: Records) -> _AddressMap:
        order = np.argsort(records["addr"])
        start = records["addr"][order]
        end = np.maximum.accumulate(start + records["pages"][order] * PAGE_SIZE)
        gap = 1 << 22
        while True:
            first = np.flatnonzero(np.append(True, start[1:] > end[:-1] + np.uint64(gap)))
            if len(first) <= _MOST_RANGES:
                break
            gap *= 4
        starts, ends = start[first], end[np.append(first[1:] - 1, len(end) - 1)]
        sizes = (ends - starts).astype(np.float64)
        room = 0.03 * sizes.sum()
        return cls(starts, ends, np.cumsum(np.append(0, sizes[:-1] + room)))

    def place(self, addresses: NDArray[np.uint64]) -> NDArray[np.float64]:
        """The height of each address."""
        index = np.clip(np.searchsorted(self.starts, addresses, side="right") - 1, 0, None)
        into = np.minimum(addresses, self.ends[index]) - self.starts[index]
        return np.asarray(self.at[index] + into.astype(np.float64))

    def draw(self, axis: Any) -> None:
        """Ticks at the start of each range, and within large ones."""
        top = float(self.at[-1]) + float(self.ends[-1] - self.starts[-1])
        ticks: list[tuple[float, str]] = []
        for start, end, at in zip(self.starts.tolist(), self.ends.tolist(), self.at.tolist(), strict=True):
            axis.axhspan(at, at + end - start, color="0.96", zorder=0)
            if not ticks or at - ticks[-1][0] > 0.045 * top:
                ticks.append((at, f"{start:#x}"))
            if end - start > 0.3 * top:
                ticks += [(at + (end - start) * n / 4, f"+{size((end - start) * n // 4)}") for n in (1, 2, 3)]
        axis.set_yticks(
            [at for at, _ in ticks], [label for _, label in ticks], fontsize="x-small", family="monospace"
        )
        axis.set_ylim(-0.02 * top, 1.02 * top)
