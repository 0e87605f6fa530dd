"""What was done for each task, as numbers that outlive its uffd."""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.stats import SourcePages, Stats, histogram_bound
from lazypages.engine.task import ServedTask

if TYPE_CHECKING:
    from lazypages.sources.remote import ServerStats  # imported when there are any


class State(enum.StrEnum):
    """Where a task stands, or how its service ended.

    COMPLETE: nothing was missing any more. Before that: GONE, it has exited by itself or called execve; DIED, a signal
    that was not the daemon's killed it; ENDED, how it ended is not known; LOST, pages could not be had; KILLED, the
    daemon had to kill it. A task that was forked after the restore is GONE however it ended: its process is not known.
    """

    SERVING = "serving"
    COMPLETE = "complete"
    GONE = "gone"
    DIED = "died"
    ENDED = "ended"
    LOST = "lost"
    KILLED = "killed"

    @property
    def good(self) -> bool:
        """Whether it is an end with every byte right, and nobody else's doing."""
        return self in {State.COMPLETE, State.GONE}


def signal_name(number: int) -> str:
    """SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class ServiceTimes(NamedTuple):
    """From a fault being read to its answer, in ns, to within 12.5 %; ``counts`` per histogram bucket."""

    counts: Sequence[int]
    max: int

    @classmethod
    def merged(cls, times: Iterable[ServiceTimes]) -> ServiceTimes:
        all_times = list(times)
        counts = [sum(column) for column in zip(*(t.counts for t in all_times), strict=True)]
        return cls(counts, max((t.max for t in all_times), default=0))

    def quantile(self, q: float) -> int | None:
        """The time that a share `q` of the answers did not exceed; None when there were none."""
        total = sum(self.counts)
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= q * total:
                return min(histogram_bound(bucket), self.max)
        return None

    def as_dict(self) -> dict[str, float | None]:
        """p50, p99 and max in microseconds."""
        p50, p99 = self.quantile(0.5), self.quantile(0.99)
        return {
            "p50_us": None if p50 is None else p50 / 1000,
            "p99_us": None if p99 is None else p99 / 1000,
            "max_us": self.max / 1000 if p50 is not None else None,
        }


_NOTHING = SourcePages((), 0, 0)


class TaskReport(NamedTuple):
    """One task's numbers at one moment, or at its end. Pages are counted, times are in seconds.

    ``pid``: as in the images; for a forked child the pid of the restored task that it descends from.
    ``total``: lazy pages at the start; ``seconds``: from the arrival of its uffd to its end (or till now).
    ``signal``: what killed a task that has DIED, else 0.
    """

    name: str
    pid: int
    forked: bool
    state: State
    total: int
    pending: int
    lost: int
    seconds: float
    sources: tuple[str, ...]
    copied: SourcePages = _NOTHING
    dropped: SourcePages = _NOTHING
    faults: SourcePages = _NOTHING
    stats: Stats = Stats()
    times: ServiceTimes = ServiceTimes((), 0)
    signal: int = 0

    def by_source(self, pages: SourcePages) -> dict[str, int]:
        """Counts by the names of sources, those without any left out."""
        named = dict(zip(self.sources, pages.levels, strict=True))
        named["remote"] = pages.remote
        named["lost"] = pages.lost
        return {name: count for name, count in named.items() if count}

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pid": self.pid,
            "forked": self.forked,
            "state": str(self.state),
            "signal": signal_name(self.signal) if self.signal else None,
            "pages": {
                "total": self.total,
                "pending": self.pending,
                "lost": self.lost,
                "copied": self.copied.total,
                "copied_by_source": self.by_source(self.copied),
                "dropped": self.dropped.total,
                "dropped_by_source": self.by_source(self.dropped),
                "zero": self.stats.zero_pages,
                "present_already": self.stats.present,
                "poisoned": self.stats.poisoned,
            },
            "faults": {
                "total": self.stats.faults,
                "data_by_source": self.by_source(self.faults),
                "zero": self.stats.faults_zero,
                "put_off": self.stats.retried,
            },
            "events": {
                "fork": self.stats.forks,
                "remap": self.stats.remaps,
                "remove": self.stats.removes,
                "unmap": self.stats.unmaps,
            },
            "calls": {"copy": self.stats.copies, "read": self.stats.reads, "wake": self.stats.wakes},
            "service_time": self.times.as_dict(),
            "seconds": round(self.seconds, 6),
        }


def measure(served: ServedTask) -> dict[str, Any]:
    """The fields of a TaskReport that come from the engine."""
    copied, dropped, faults = served.sources()
    stats = served.stats()
    return {
        "pending": served.pending,
        "lost": served.lost,
        "copied": copied,
        "dropped": dropped,
        "faults": faults,
        "stats": stats,
        "times": ServiceTimes(served.histogram(), stats.service_max),
    }


class Summary(NamedTuple):
    """A whole restore."""

    tasks: Sequence[TaskReport]
    zombies: int
    finished: bool
    seconds: float
    page_servers: Sequence[ServerStats] = ()

    @property
    def ok(self) -> bool:
        """Whether the restore finished and every task is complete, or has exited by itself."""
        return self.finished and all(task.state.good for task in self.tasks)

    @property
    def times(self) -> ServiceTimes:
        return ServiceTimes.merged(task.times for task in self.tasks if task.times.counts)

    def copied_by_source(self) -> dict[str, int]:
        return _add(task.by_source(task.copied) for task in self.tasks)

    def faults_by_source(self) -> dict[str, int]:
        faults = _add(task.by_source(task.faults) for task in self.tasks)
        zero = sum(task.stats.faults_zero for task in self.tasks)
        return faults | ({"zero": zero} if zero else {})

    def as_dict(self) -> dict[str, Any]:
        from dataclasses import asdict  # noqa: PLC0415 - for the end, and a restore waits for our start

        pages = sum(task.copied.total for task in self.tasks)
        return {
            "ok": self.ok,
            "restore_finished": self.finished,
            "seconds": round(self.seconds, 6),
            "pages_copied": pages,
            "bytes_copied": pages * PAGE_SIZE,
            "copied_by_source": self.copied_by_source(),
            "faults": sum(task.stats.faults for task in self.tasks),
            "faults_by_source": self.faults_by_source(),
            "service_time": self.times.as_dict(),
            "zombies": self.zombies,
            "page_servers": [asdict(server) for server in self.page_servers],
            "tasks": [task.as_dict() for task in self.tasks],
        }


def _add(dicts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in dicts:
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total
