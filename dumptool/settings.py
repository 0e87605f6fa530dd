"""What a run of the tool is asked for (``Settings``) and what it reports (``Report``, ``Watcher``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dumptool.freeze import FrozenTree
from dumptool.memory import Counts
from dumptool.saveable import Options
from dumptool.send import PageServer
from dumptool.tracking import Method
from images_spec.messages import DumpStatsEntry, StatsEntry


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line.

    ``pid``: the root of the tree. ``images``: the images directory, created if missing.
    ``parent``: directory of the parent level relative to ``images``, or None. ``method``: of dirty tracking.
    ``lazy_parents``: a lazy restore may fetch unchanged pages later (PE_PARENT | PE_LAZY).
    ``lazy_pages``: leave out the pages that can be lazy, and serve them afterwards. ``leave_running``: the tree
    goes on after a dump; with ``track`` as well, its writes from then on are tracked. ``leave_stopped``: it stays
    stopped, as by SIGSTOP. ``timeout``:
    seconds for the tree to stop. ``page_server``: pages are sent there and not written to ``images``. ``sync``: fsync
    all images before the inventory is written and the tree is killed.
    """

    pid: int
    images: Path
    parent: str | None = None
    method: Method = Method.AUTO
    lazy_parents: bool = True
    lazy_pages: bool = False
    leave_running: bool = False
    leave_stopped: bool = False
    track: bool = False
    allow: Options = field(default_factory=Options)
    timeout: float = 10
    page_server: PageServer | None = None
    sync: bool = True


@dataclass(slots=True)
class Report:
    """Results of a run; times in seconds.

    ``freezing``: from the first seized thread until all threads are stopped. ``frozen``: how long the tree was stopped.
    If its pages were served meanwhile: after ``served`` of that a client could connect, and after ``requested`` one
    requested the first page (None: no client did), which its restore does shortly before the tasks run again.
    ``scanning``: spent in finding pages, ``writing`` in copying them. ``tracked``: the tracking methods in use.
    """

    processes: int = 0
    threads: int = 0
    freezing: float = 0.0
    frozen: float = 0.0
    served: float | None = None
    requested: float | None = None
    scanning: float = 0.0
    writing: float = 0.0
    counts: Counts = field(default_factory=Counts)
    shared: Counts = field(default_factory=Counts)
    tracked: str = ""

    def entry(self) -> StatsEntry:
        """For stats-dump: microseconds and pages."""

        def micro(seconds: float) -> int:
            return min(int(seconds * 1_000_000), 0xFFFFFFFF)

        return StatsEntry(
            dump=DumpStatsEntry(
                freezing_time=micro(self.freezing),
                frozen_time=micro(self.frozen),
                memdump_time=micro(self.scanning),
                memwrite_time=micro(self.writing),
                pages_scanned=self.counts.scanned,
                pages_skipped_parent=self.counts.in_parent,
                pages_written=self.counts.written,
                pages_lazy=self.counts.lazy,
                shpages_scanned=self.shared.scanned,
                shpages_skipped_parent=self.shared.in_parent,
                shpages_written=self.shared.written,
            )
        )


class Watcher:
    """Receives progress; the command line draws a progress bar from it."""

    def stage(self, name: str) -> None:
        """A new stage begins: looking, freezing, copying, syncing, serving."""

    def total(self, pages: int) -> None:
        """Number of pages that will be copied."""

    def copied(self, pages: int) -> None:
        """Number of pages copied since the last call."""


Serve = Callable[[FrozenTree, Settings], float | None]
"""Serves the pages that were left out (``Settings.lazy_pages``) while the tree is frozen.

Returns when the first page was requested, in seconds of time.monotonic(); None if none was.
"""
