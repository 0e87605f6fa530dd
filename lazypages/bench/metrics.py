"""The metrics of a run, and medians over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a run. ``text`` formats it; ``shown``: whether tables have it."""

    key: str
    title: str
    text: Callable[[float], str]
    shown: bool = True


def _microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 100_000 else f"{value / 1000:.0f}k"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _mebibytes(value: float) -> str:
    return f"{value / (1 << 20):.1f}"


#: Latencies are of all first touches, also those of pages that were already there. ``loop``: CPU time of our event
#: loop, from when it has settled until all touches are made (including the arrival of tasks), per fault. ``waits``:
#: number of times that a thread of the daemon slept.
METRICS = (
    Metric("p50", "p50 us", _microseconds),
    Metric("p90", "p90 us", _microseconds),
    Metric("p99", "p99 us", _microseconds),
    Metric("p999", "p99.9 us", _microseconds),
    Metric("max", "max us", _microseconds),
    Metric("stall", "stalled", _seconds),
    Metric("faults", "faults", _count, shown=False),
    Metric("rate", "faults/s", _count),
    Metric("touching", "touches", _seconds, shown=False),
    Metric("passing", "full pass", _seconds, shown=False),
    Metric("both", "with pass", _seconds),
    Metric("present", "all there", _seconds),
    Metric("ready", "ready", _seconds),
    Metric("first", "1st page", _seconds),
    Metric("cpu", "CPU", _seconds),
    Metric("loop", "Python/fault us", _microseconds),
    Metric("switches", "switches", _count, shown=False),
    Metric("waits", "waits", _count, shown=False),
    Metric("rss", "RSS MiB", _mebibytes, shown=False),
    Metric("anon", "anon MiB", _mebibytes),
)


def quantile(ordered: Sequence[int], q: float) -> int:
    """The quantile `q` (0 to 1) of sorted values."""
    return ordered[max(0, -(-round(q * 1_000_000) * len(ordered) // 1_000_000) - 1)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def width(self) -> float:
        """High minus low as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Ours divided by theirs in each round, since a disturbance affects all peers of a round. None without data."""
    found = [a / b for a, b in zip(ours, theirs, strict=False) if b]
    return Spread.of(found) if found else None
