"""The results that a task writes (struct results, actor and touch of task.c)."""

from __future__ import annotations

import array
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lazypages.bench.errors import BenchError
from lazypages.bench.metrics import quantile

_HEADER_SIZE = 4096
_NS = 1e9


class _Header(NamedTuple):
    clock_cost: int
    connected: int
    handed: int
    finished: int
    start: int
    touched: int
    passing: int
    passed: int
    present: int
    wrong: int
    wrong_page: int
    wrong_word: int
    wrong_value: int


_HEADER = struct.Struct(f"={len(_Header._fields)}Q")
_ACTOR = struct.Struct("=QQQII")
_TOUCH = struct.Struct("=QII")


@dataclass(frozen=True, slots=True)
class Touches:
    """All first touches, thread by thread, in order: time (ns since the first touch), page, latency (ns)."""

    at: array.array[int]
    page: array.array[int]
    ns: array.array[int]


@dataclass(frozen=True, slots=True)
class Results:
    """Times are in ns of CLOCK_MONOTONIC, 0 if not measured. ``faults``: number of touches that found no page."""

    header: _Header
    faults: int
    touches: Touches

    @classmethod
    def read(cls, path: Path, actors: int) -> Results:
        """Read the results. Raises BenchError if a byte was wrong, or if the task did not finish."""
        data = path.read_bytes()
        if len(data) < _HEADER_SIZE:
            raise BenchError("the task did not start to measure")
        header = _Header._make(_HEADER.unpack_from(data))
        if header.wrong:
            raise BenchError(
                f"WRONG MEMORY: {header.wrong} times, first in word {header.wrong_word} of page {header.wrong_page}: "
                f"{header.wrong_value:#x}"
            )
        if not header.touched:
            raise BenchError("the task did not make all touches")
        end = _HEADER_SIZE + actors * _ACTOR.size
        faults = sum(actor[2] for actor in _ACTOR.iter_unpack(data[_HEADER_SIZE:end]))
        raw = array.array("I", data[end:])
        first = min(at for at, _page, _ns in _TOUCH.iter_unpack(data[end:]))
        at = array.array("Q", data[end:])[0::2]
        return cls(header, faults, Touches(array.array("Q", (t - first for t in at)), raw[2::4], raw[3::4]))

    def metrics(self) -> dict[str, float]:
        """The metrics of METRICS that the task measures: latencies in us, durations in s.

        An idle task makes only one touch, so it has no quantiles.
        """
        header, ordered = self.header, sorted(self.touches.ns)
        touching = (header.touched - header.start) / _NS
        found: dict[str, float] = {"faults": self.faults, "touching": touching}
        if len(ordered) > 1:
            for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)):
                found[name] = quantile(ordered, q) / 1000
            found["stall"] = sum(ordered) / _NS
            found["rate"] = self.faults / touching
        if header.passing:
            found["passing"] = (header.passed - header.passing) / _NS
            found["both"] = touching + found["passing"]
        if header.present:
            found["present"] = (header.present - header.finished) / _NS
        return found

    def first_touch_after_connect(self) -> float:
        """Seconds from the restorer's connection to the daemon until the first page was there."""
        header = self.header
        return (header.start - header.connected + self.touches.ns[0]) / _NS
