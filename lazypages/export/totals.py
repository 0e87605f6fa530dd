"""Sums of the numbers of many tasks, as metrics need them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.stats import HISTOGRAM_BUCKETS, SourcePages, histogram_bound
from lazypages.observe.metrics import State, Summary, TaskReport

#: Upper bounds of the buckets of fault latencies, in ns: the engine has a bound at each power of two.
BOUNDS = tuple(1 << power for power in range(10, 31))

#: Of each bucket, and of one without a bound: the first of the engine's buckets, and the one behind the last.
_ENDS = [sum(histogram_bound(b) < bound for b in range(HISTOGRAM_BUCKETS)) for bound in BOUNDS]
_SLICES = [slice(low, high) for low, high in pairwise((0, *_ENDS, HISTOGRAM_BUCKETS))]

#: The middle of each of the engine's buckets, in ns.
_MIDDLES = [
    (histogram_bound(b) + (histogram_bound(b - 1) + 1 if b else 0)) / 2 for b in range(HISTOGRAM_BUCKETS)
]

#: Names of sources. All levels of parents are one, so that the number of time series does not depend on the chain.
SOURCES = ("local", "parent", "remote", "zero")


@dataclass(slots=True)
class Totals:
    """``copied``: pages, ``answered``: faults; both by source. ``lost``, ``poisoned``, ``pending``: pages.

    ``latency``: faults by bucket (BOUNDS, then one without a bound); ``latency_sum``: their seconds, to within 7 %.
    ``serving``: tasks; ``ended``: tasks by State.
    """

    faults: int = 0
    deferred: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    pending: int = 0
    lost: int = 0
    poisoned: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * len(_SLICES))
    latency_sum: float = 0.0
    serving: int = 0
    ended: Counter[State] = field(default_factory=Counter)
    page_servers: int = 0
    page_servers_connected: int = 0

    def copied_bytes(self, source: str) -> int:
        return self.copied[source] * PAGE_SIZE

    def add(self, summary: Summary, *, ended: bool = False) -> None:
        """Add a restore. ``ended``: nothing of it is served any more."""
        for task in summary.tasks:
            self._add_task(task, ended=ended)
        if not ended:
            self.page_servers += len(summary.page_servers)
            self.page_servers_connected += sum(server.connected for server in summary.page_servers)

    def _add_task(self, task: TaskReport, *, ended: bool) -> None:
        stats = task.stats
        self.faults += stats.faults
        self.deferred += stats.retried
        self.poisoned += stats.poisoned
        self._by_source(self.answered, task.faults, task.sources)
        self._by_source(self.copied, task.copied, task.sources)
        self.answered["zero"] += stats.faults_zero
        self.copied["zero"] += stats.zero_pages
        if task.state is not State.SERVING:
            self.ended[task.state] += 1
        elif not ended:
            self.serving += 1
            self.pending += task.pending
            self.lost += task.lost
        if any(task.times.counts):
            self._add_times(task.times.counts)

    def _add_times(self, counts: Iterable[int]) -> None:
        counts = list(counts)
        for bucket, part in enumerate(_SLICES):
            self.latency[bucket] += sum(counts[part])
        self.latency_sum += (
            sum(count * ns for count, ns in zip(counts, _MIDDLES, strict=False) if count) / 1e9
        )

    @staticmethod
    def _by_source(counter: Counter[str], pages: SourcePages, names: Iterable[str]) -> None:
        for name, count in zip(names, pages.levels, strict=True):
            counter["parent" if name.startswith("parent-") else "local"] += count
        counter["remote"] += pages.remote

    def copy(self) -> Totals:
        """One that can be added to."""
        return Totals(
            self.faults,
            self.deferred,
            self.answered.copy(),
            self.copied.copy(),
            self.pending,
            self.lost,
            self.poisoned,
            self.latency.copy(),
            self.latency_sum,
            self.serving,
            self.ended.copy(),
            self.page_servers,
            self.page_servers_connected,
        )
