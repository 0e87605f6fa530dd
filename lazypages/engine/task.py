"""A task that the engine serves; see csrc/serve/engine.h."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.errors import check
from lazypages.engine.stats import SourcePages, Stats


class ServedTask:
    """One memory (mm) under one uffd, which it owns until :meth:`close`."""

    def __init__(self, handle: Any, closed: Callable[[Any], None]) -> None:
        #: The C object; for the package only.
        self.handle = handle
        self._closed = closed
        #: The tag given to Engine.add; forked tasks inherit it.
        self.tag = int(lib.lp_task_tag(handle))
        self.nr_levels = int(lib.lp_task_nr_levels(handle))
        #: Number of pages pending at the start.
        self.total = int(lib.lp_task_total(handle))
        #: After :meth:`end_service`: whether the uffd stays open.
        self.left_open = False
        self._ended = False

    def __repr__(self) -> str:
        return f"<ServedTask {int(ffi.cast('uintptr_t', self.handle)):#x}>"

    @property
    def pending(self) -> int:
        """Number of missing pages, including lost ones."""
        return int(lib.lp_task_pending(self.handle))

    @property
    def complete(self) -> bool:
        """Whether nothing is pending, and no page is left whose content is unclear.

        docs/kernel.md, "What can't be told apart".
        """
        return bool(lib.lp_task_complete(self.handle))

    @property
    def lost(self) -> int:
        """Number of pending pages that no source has."""
        return int(lib.lp_task_lost(self.handle))

    def transfer(self, max_bytes: int) -> int:
        """Places about ``max_bytes`` of pages from local sources in the background; blocks.

        Returns the number of bytes; 0: no more pages are pending from local sources.

        Raises TaskGoneError, BusyError.
        """
        return check(int(lib.lp_task_transfer(self.handle, max_bytes)))

    def bring(self, start: int, end: int) -> None:
        """Places the local pages that are pending in [start, end), current addresses in bytes; reports NEED for remote
        ones.

        Raises TaskGoneError, BusyError.
        """
        check(int(lib.lp_task_bring(self.handle, start, end)))

    def fail_remote(self, dump_addr: int, nr_pages: int, *, lost: bool) -> None:
        """Releases claims: the pages are pending again or, with `lost`, are marked lost."""
        lib.lp_task_fail_remote(self.handle, dump_addr, nr_pages, lost)

    def poison(self, *, everything: bool) -> int:
        """Poisons lost pages, or with `everything` all pending ones: a touch raises SIGBUS. Returns their number.

        Raises BusyError, TaskGoneError, OSError (EINVAL: no UFFDIO_POISON before Linux 6.6).
        """
        return check(int(lib.lp_task_poison(self.handle, everything)))

    def forget(self, dump_addr: int, nr_pages: int) -> None:
        """Removes lost pages, by address at dump time, that the task no longer maps."""
        lib.lp_task_forget(self.handle, dump_addr, nr_pages)

    def probe(self) -> bool:
        """Whether the task's memory still exists; also True if that can't be determined at the moment."""
        return int(lib.lp_task_probe(self.handle)) != -errno.ESRCH

    def stats(self) -> Stats:
        """The task's counters."""
        stats = ffi.new("struct lp_stats *")
        lib.lp_task_stats(self.handle, stats)
        return Stats(**{name: int(getattr(stats, name)) for name in Stats._fields})

    def sources(self) -> tuple[SourcePages, SourcePages, SourcePages]:
        """Numbers by source of: pages copied, pages dropped by layout events, faults answered with data."""
        counts = [ffi.new("uint64_t[]", self.nr_levels + 2) for _ in range(3)]
        lib.lp_task_sources(self.handle, *counts)
        copied, dropped, faults = (SourcePages.of(count, self.nr_levels) for count in counts)
        return copied, dropped, faults

    def remaining(self) -> SourcePages:
        """Numbers of pending pages by source. Walks all extents."""
        counts = ffi.new("uint64_t[]", self.nr_levels + 2)
        lib.lp_task_remaining(self.handle, counts)
        return SourcePages.of(counts, self.nr_levels)

    def histogram(self) -> list[int]:
        """Number of answered faults per bucket of service time; see :func:`histogram_bound`."""
        buckets = ffi.new("uint64_t[]", lib.LP_HISTOGRAM_BUCKETS)
        lib.lp_task_histogram(self.handle, buckets)
        return list(ffi.unpack(buckets, lib.LP_HISTOGRAM_BUCKETS))

    def end_service(self) -> None:
        """Closes the uffd if no page is pending, or if the task no longer exists. The counters are final then.

        Otherwise the uffd stays open until this process exits: if it were closed, the kernel would serve zeros for
        missing pages.
        """
        self._ended = True
        self.left_open = bool(lib.lp_task_end_service(self.handle))

    def close(self) -> bool:
        """Ends the service, unless that has been done. The engine has no such task any more.

        Returns whether the task may have read zeros for a page that no event (LOST with ESTALE) has reported.
        """
        if not self._ended:
            self.end_service()
        self._closed(self.handle)
        return bool(lib.lp_task_close(self.handle))
