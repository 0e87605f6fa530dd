"""Numbers for each task and for a whole restore. They remain valid when the uffd is closed."""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.stats import SourcePages, Stats, histogram_bound
from lazypages.engine.task import ServedTask

if TYPE_CHECKING:
    from lazypages.sources.remote import ServerStats  # imported only if page servers are used


class State(enum.StrEnum):
    """Whether a task is still served, or how its service ended.

    COMPLETE: no page was missing any more. The others ended while pages were missing: GONE, the task exited by itself
    or called execve; DIED, a signal that the daemon had not sent killed it; ENDED, how it ended is unknown; LOST, pages
    were lost; KILLED, the daemon killed it. A task that was forked after the restore is GONE in any case, because its
    process is unknown.
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
        """Whether the task has lost no memory and ended, if it ended, by itself."""
        return self in {State.COMPLETE, State.GONE}


def signal_name(number: int) -> str:
    """The name of a signal: SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class ServiceTimes(NamedTuple):
    """Times from the read of a fault to its answer, in ns, to within 12.5 %. ``counts``: per histogram bucket."""

    counts: Sequence[int]
    max: int

    @classmethod
    def merged(cls, times: Iterable[ServiceTimes]) -> ServiceTimes:
        all_times = list(times)
        counts = [sum(column) for column in zip(*(t.counts for t in all_times), strict=True)]
        return cls(counts, max((t.max for t in all_times), default=0))

    def quantile(self, q: float) -> int | None:
        """The quantile `q` (0 to 1) in ns; None without answers."""
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
    """One task's numbers, now or at its end.

    ``pid``: as in the images; for a forked child the pid of the restored task that it descends from.
    ``total``, ``pending``, ``lost``: lazy pages at the start, missing pages, lost pages. ``seconds``: since the arrival
    of its uffd, until its end or now. ``signal``: the signal that killed a task that has DIED, else 0. ``program``: the
    name of its program when it was dumped.
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
    program: str = ""

    @property
    def title(self) -> str:
        """The name for people: task 7 (java)."""
        return f"{self.name} ({self.program})" if self.program else self.name

    def by_source(self, pages: SourcePages) -> dict[str, int]:
        """Pages by name of the source, without sources that have none."""
        named = dict(zip(self.sources, pages.levels, strict=True))
        named["remote"] = pages.remote
        named["lost"] = pages.lost
        return {name: count for name, count in named.items() if count}

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "program": self.program,
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


class Milestones(NamedTuple):
    """What a restore has reached. ``copied``: a page was copied. ``finished``: the tasks run. ``poisoned``: pages."""

    copied: bool
    finished: bool
    poisoned: int


class Summary(NamedTuple):
    """The numbers of a whole restore. ``finished``: the restorer has reported the end of the restore."""

    tasks: Sequence[TaskReport]
    zombies: int
    finished: bool
    seconds: float
    page_servers: Sequence[ServerStats] = ()

    @property
    def ok(self) -> bool:
        """Whether the restore has finished and every task is complete or has exited by itself."""
        return self.finished and all(task.state.good for task in self.tasks)

    def milestones(self) -> Milestones:
        return Milestones(
            any(task.stats.copies for task in self.tasks),
            self.finished,
            sum(task.stats.poisoned for task in self.tasks),
        )

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
        from dataclasses import asdict  # noqa: PLC0415 - keeps the start short

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
