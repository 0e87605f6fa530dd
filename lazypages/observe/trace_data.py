"""What a picture of a trace shows, as arrays, for any plotting library: a row for each task, and one for all together.

Each row has three parts: pages over time and address; the latency of faults; the amount of memory over time. Needs
NumPy, which comes with the extra `plot`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.stats import HISTOGRAM_BUCKETS, histogram_bound
from lazypages.observe.metrics import ServiceTimes
from lazypages.observe.tracing import NO_SOURCE, NOWHERE, RECORD, REMOTE, ZERO, Kind, Trace, TraceError
from lazypages.wording import count, duration, size

Records = NDArray[Any]
Floats = NDArray[np.float64]

#: Number of tasks that get a row: those with the most records.
MOST_ROWS = 8
#: Most forks of one row that are drawn.
_MOST_FORKS = 200
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
        ("times", "<u4"),
    ]
)

#: Warm colours are faults, cool ones what came without one, by level of the images; no source has one colour twice.
_FAULTS = ("#d55e00", "#aa3377", "#ee6677", "#ddaa33", "#994f00")
_BACKGROUND = ("#56b4e9", "#009e73", "#7570b3", "#66a61e", "#0072b2")
_FAULTS_OF = {REMOTE: "#ccbb44", ZERO: "#696969", NOWHERE: "#000000", NO_SOURCE: "#696969"}
_BACKGROUND_OF = {REMOTE: "#332288", NOWHERE: "#000000", NO_SOURCE: "#696969"}

_CHANGES = (Kind.REMOVED, Kind.UNMAPPED, Kind.REMAPPED)
_PLACED = (Kind.ANSWERED, Kind.BROUGHT, Kind.ARRIVED)
_DRAWN = (*_PLACED, Kind.LEFT, Kind.LOST, Kind.POISONED, *_CHANGES)
FAULTS = (Kind.ANSWERED, Kind.LEFT)

#: Ascending: a latency is in the first bucket whose bound is not below it.
_BOUNDS = np.array([histogram_bound(bucket) for bucket in range(HISTOGRAM_BUCKETS)], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Marks:
    """Faults, or ranges of pages, of one kind from one source. Heights are those of the row's axis.

    ``since``: times when the faults were read. ``placed``: whether pages arrived by these.
    """

    kind: Kind
    label: str
    colour: str
    records: Records
    time: Floats
    since: Floats
    low: Floats
    high: Floats

    @property
    def placed(self) -> bool:
        return self.kind in _PLACED


@dataclass(frozen=True, slots=True)
class Moment:
    """A vertical line in time."""

    time: float
    label: str


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies of the faults of one source: ns, sorted."""

    label: str
    colour: str
    ordered: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Amount:
    """MiB brought over time."""

    label: str
    colour: str
    time: Floats
    mib: Floats


@dataclass(frozen=True, slots=True)
class Row:
    """``addresses``: None for the row of all tasks, whose heights are numbers of address spaces."""

    title: str
    addresses: AddressMap | None
    marks: list[Marks]
    moments: list[Moment]
    latencies: list[Latency]
    latency_title: str
    amounts: list[Amount]
    wanted: int


#: Share of the drawn time that the end of the restore may be before or after it.
_FAR = 1.0


class TraceData:
    """Raises TraceError if nothing can be drawn. Times are in `unit`, since the first fault or transfer."""

    def __init__(self, trace: Trace) -> None:
        assert _FIELDS.itemsize == RECORD.size
        self._trace = trace
        records = np.frombuffer(trace.data, dtype=_FIELDS)
        self._records = records[np.argsort(records["time"], kind="stable")]
        self._drawn = drawn = _of(self._records, *_DRAWN)
        if not len(drawn):
            raise TraceError(f"{trace.path} has no faults and no transfers: nothing to draw")
        self._first = int(
            min(drawn["time"][0], _of(records, Kind.FAULT)["time"].min(initial=drawn["time"][0]))
        )
        self._scale, self.unit = (1e6, "ms") if int(drawn["time"][-1]) - self._first < 10e9 else (1e9, "s")

    @property
    def span(self) -> tuple[float, float]:
        """Of time, the same for all rows, with the end of the restore unless that is far away."""
        last = max(float(self._time(self._drawn[-1:])[0]), 0.001)
        restored = self._time(_of(self._records, Kind.RESTORED)).tolist()
        moments = [0.0, last, *(time for time in restored if -_FAR * last < time < (1 + _FAR) * last)]
        return min(moments) - 0.01 * last, max(moments) + 0.01 * last

    def rows(self) -> list[Row]:
        """The tasks with the most records, in the order of their arrival. With several, a row for all comes first."""
        memories, counts = np.unique(self._drawn["memory"], return_counts=True)
        chosen = sorted(memories[np.argsort(-counts, kind="stable")][:MOST_ROWS].tolist())
        rows = [self._row(memory, self._name(memory)) for memory in chosen]
        return [self._row(0, "all tasks"), *rows] if len(memories) > 1 else rows

    def title(self) -> str:
        memories = len(np.unique(self._drawn["memory"]))
        parts = [
            str(self._trace.header.get("images", self._trace.path)),
            count(memories, "task"),
            count(len(_of(self._records, Kind.FAULT)), "fault"),
        ]
        if memories > MOST_ROWS:
            parts.append(f"the {MOST_ROWS} with most records")
        if self._trace.dropped:
            parts.append(f"{count(self._trace.dropped, 'record')} missing")
        if not self._trace.complete:
            parts.append("the daemon had not ended")
        return ", ".join(parts)

    def _name(self, memory: int) -> str:
        starts = _of(self._records, Kind.MEMORY)
        own = starts[starts["memory"] == memory]
        if not len(own):
            return f"memory {memory}"
        pid = int(own["task"][0])
        program = self._trace.program(pid)
        forked = f", fork of {own['detail'][0]}" if own["detail"][0] else ""
        number = f", memory {memory}{forked}" if len(starts) > 1 else ""
        return f"task {pid}{f' ({program})' if program else ''}{number}"

    def _row(self, memory: int, title: str) -> Row:
        drawn, records = self._drawn, self._records
        addresses = None
        if memory:
            drawn, records = drawn[drawn["memory"] == memory], records[records["memory"] == memory]
            addresses = AddressMap.of(drawn)
        answers = _of(drawn, Kind.ANSWERED)
        return Row(
            title,
            addresses,
            self._marks(addresses, drawn),
            self._moments(records),
            self._latencies(answers),
            f"faults: {_quantiles(answers)}" if len(answers) else "no faults",
            self._amounts(drawn),
            int(_of(records, Kind.MEMORY)["pages"].sum()) * PAGE_SIZE,
        )

    def _time(self, records: Records) -> Floats:
        return np.asarray((records["time"].astype(np.int64) - self._first) / self._scale)

    # What came when and where.

    def _marks(self, addresses: AddressMap | None, drawn: Records) -> list[Marks]:
        if addresses:
            low = addresses.place(drawn["addr"])
            high = addresses.place(drawn["addr"] + drawn["pages"] * PAGE_SIZE)
        else:
            low, high = drawn["memory"] - 0.4, drawn["memory"] + 0.4
        found = []
        for kind, source in _kinds_and_sources(drawn):
            chosen = np.flatnonzero((drawn["kind"] == kind) & (drawn["source"] == source))
            of_it = drawn[chosen]
            label, colour = self._look(Kind(kind), source, of_it)
            time = self._time(of_it)
            since = time - of_it["detail"] / self._scale
            found.append(Marks(Kind(kind), label, colour, of_it, time, since, low[chosen], high[chosen]))
        return found

    def _look(self, kind: Kind, source: int, records: Records) -> tuple[str, str]:
        """Label and colour."""
        if kind in _CHANGES:
            return "unmapped, discarded or moved by the task", "#c0c0c0"
        if kind == Kind.LOST:
            return "lost", "#000000"
        if kind == Kind.POISONED:
            return "poisoned", "#8b4513"
        if kind == Kind.LEFT:
            return "fault, page on its way already", fault_colour(source)
        name = self._source(records)
        if kind == Kind.ANSWERED:
            return f"fault: {name}", fault_colour(source)
        way = "background" if kind == Kind.BROUGHT else "arrived"
        return f"{way}: {name}", background_colour(source)

    def _source(self, records: Records) -> str:
        return self._trace.source_name(int(records["task"][0]), int(records["source"][0]))

    def _moments(self, records: Records) -> list[Moment]:
        restored = _of(self._records, Kind.RESTORED)
        forked = _of(records, Kind.FORKED)[:_MOST_FORKS]
        return [
            *(Moment(time, "restore finished") for time in self._time(restored).tolist()),
            *(Moment(time, "fork") for time in self._time(forked).tolist()),
        ]

    # Latency of faults.

    def _latencies(self, answers: Records) -> list[Latency]:
        found = []
        for source in np.unique(answers["source"]).tolist():
            chosen = answers[answers["source"] == source]
            label = f"{self._source(chosen)}: {_quantiles(chosen).rpartition(', max')[0]}"
            found.append(Latency(label, fault_colour(source), np.sort(chosen["detail"])))
        return found

    # Amount of memory over time.

    def _amounts(self, drawn: Records) -> list[Amount]:
        placed = _of(drawn, *_PLACED)
        # Pages of page servers are counted as ARRIVED.
        placed = placed[(placed["kind"] != Kind.ANSWERED) | (placed["source"] != REMOTE)]
        parts = _kinds_and_sources(placed)
        found = [self._amount(placed, "all", "#000000")] if len(parts) > 1 else []
        for kind, source in parts:
            chosen = placed[(placed["kind"] == kind) & (placed["source"] == source)]
            way = {Kind.ANSWERED: ", faults", Kind.BROUGHT: ", background"}.get(Kind(kind), "")
            colour = fault_colour(source) if kind == Kind.ANSWERED else background_colour(source)
            found.append(self._amount(chosen, f"{self._source(chosen)}{way}", colour))
        return found

    def _amount(self, placed: Records, name: str, colour: str) -> Amount:
        time, total = self._time(placed), np.cumsum(placed["pages"]) * PAGE_SIZE / _MIB
        step = max(1, len(placed) // 5000)
        return Amount(
            f"{name}: {size(int(placed['pages'].sum()) * PAGE_SIZE)}",
            colour,
            np.concatenate(([0.0], time[::step], time[-1:], [self.span[1]])),
            np.concatenate(([0.0], total[::step], total[-1:], total[-1:])),
        )


def _of(records: Records, *kinds: Kind) -> Records:
    return records[np.isin(records["kind"], kinds)]


def _kinds_and_sources(records: Records) -> list[tuple[int, int]]:
    """The pairs that occur; background first, so that faults are drawn over it."""
    pairs = np.unique(np.stack([records["kind"], records["source"]], -1), axis=0).tolist()
    return sorted(
        ((kind, source) for kind, source in pairs), key=lambda pair: (pair[0] == Kind.ANSWERED, pair)
    )


def fault_colour(source: int) -> str:
    return _FAULTS_OF.get(source) or _FAULTS[source % len(_FAULTS)]


def background_colour(source: int) -> str:
    return _BACKGROUND_OF.get(source) or _BACKGROUND[source % len(_BACKGROUND)]


def service_times(answers: Records) -> ServiceTimes:
    """As the daemon counts them for its summary: in the same buckets, an answer to several faults several times."""
    times = np.maximum(answers["times"], 1)  # 0 in traces of older versions
    buckets = np.minimum(np.searchsorted(_BOUNDS, answers["detail"]), len(_BOUNDS) - 1)
    counts = np.bincount(buckets, weights=times, minlength=len(_BOUNDS)).astype(int).tolist()
    return ServiceTimes(counts, int(answers["detail"].max(initial=0)))


def _quantiles(answers: Records) -> str:
    """p50, p99 and max as in the summary, where they are of all sources together."""
    times = service_times(answers)
    p50, p99 = times.quantile(0.5), times.quantile(0.99)
    assert p50 is not None
    assert p99 is not None
    return f"{sum(times.counts):,}, p50 {duration(p50)}, p99 {duration(p99)}, max {duration(times.max)}"


@dataclass(frozen=True, slots=True)
class AddressMap:
    """Address ranges stacked without the gaps between them. Heights are in bytes."""

    starts: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    at: Floats

    @classmethod
    def of(cls, records: Records) -> AddressMap:
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

    def place(self, addresses: NDArray[np.uint64]) -> Floats:
        """The height of each address."""
        index = np.clip(np.searchsorted(self.starts, addresses, side="right") - 1, 0, None)
        into = np.minimum(addresses, self.ends[index]) - self.starts[index]
        return np.asarray(self.at[index] + into.astype(np.float64))

    @property
    def top(self) -> float:
        return float(self.at[-1]) + float(self.ends[-1] - self.starts[-1])

    def bands(self) -> list[tuple[float, float]]:
        """The heights of each range."""
        return [
            (at, at + end - start)
            for start, end, at in zip(self.starts.tolist(), self.ends.tolist(), self.at.tolist(), strict=True)
        ]

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and labels: at the start of each range, and within large ones."""
        ticks: list[tuple[float, str]] = []
        for start, (low, high) in zip(self.starts.tolist(), self.bands(), strict=True):
            if not ticks or low - ticks[-1][0] > 0.045 * self.top:
                ticks.append((low, f"{start:#x}"))
            if high - low > 0.3 * self.top:
                ticks += [
                    (low + (high - low) * n / 4, f"+{size(int(high - low) * n // 4)}") for n in (1, 2, 3)
                ]
        return ticks
