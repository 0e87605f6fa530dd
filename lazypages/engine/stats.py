"""Statistics of one task."""

from __future__ import annotations

from typing import Any, NamedTuple

from lazypages.engine._uffd import ffi, lib


class Stats(NamedTuple):
    """Counters of one task (``struct lp_stats``); ``service_max``, the longest service time of a fault, in ns."""

    faults: int = 0
    faults_zero: int = 0
    faults_served: int = 0
    retried: int = 0
    zero_pages: int = 0
    present: int = 0
    copies: int = 0
    reads: int = 0
    wakes: int = 0
    poisoned: int = 0
    forks: int = 0
    remaps: int = 0
    removes: int = 0
    unmaps: int = 0
    service_max: int = 0


class SourcePages(NamedTuple):
    """Numbers of pages by source: one per level of the image chain, then remote, then lost."""

    levels: tuple[int, ...]
    remote: int
    lost: int

    @property
    def total(self) -> int:
        return sum(self.levels) + self.remote + self.lost

    @classmethod
    def of(cls, counts: Any, nr_levels: int) -> SourcePages:
        """From a C array of nr_levels + 2 ``uint64_t``."""
        values = ffi.unpack(counts, nr_levels + 2)
        return cls(tuple(values[:nr_levels]), values[nr_levels], values[nr_levels + 1])


#: Number of buckets of a histogram of service times.
HISTOGRAM_BUCKETS = int(lib.LP_HISTOGRAM_BUCKETS)


def histogram_bound(bucket: int) -> int:
    """The longest service time that belongs to a bucket of :meth:`ServedTask.histogram`, ns."""
    return int(lib.lp_histogram_bound(bucket))
