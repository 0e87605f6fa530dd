"""A task that the engine serves; see csrc/serve/engine.h."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.errors import check
from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.stats import SourcePages, Stats


class ServedTask:
    """One memory (mm) under one uffd, which it owns until :meth:`close`."""

    def __init__(self, handle: Any, closed: Callable[[Any], None]) -> None:
        #: The C object; for the package only.
        self.handle = handle
        self._closed = closed
        #: What Engine.add was given, for this task and all that it forks.
        self.tag = int(lib.lp_task_tag(handle))
        self.nr_levels = int(lib.lp_task_nr_levels(handle))
        #: Pages pending at the start.
        self.total = int(lib.lp_task_total(handle))

    def __repr__(self) -> str:
        return f"<ServedTask {int(ffi.cast('uintptr_t', self.handle)):#x}>"

    @property
    def pending(self) -> int:
        """Pages that the task waits for or may come to wait for, the lost ones among them."""
        return int(lib.lp_task_pending(self.handle))

    @property
    def lost(self) -> int:
        """Pages pending that no source could give."""
        return int(lib.lp_task_lost(self.handle))

    def transfer(self, max_bytes: int) -> int:
        """Brings pages in the background, about max_bytes; blocks. Returns bytes; 0: nothing is left to bring.

        Raises TaskGoneError, BusyError.
        """
        return check(int(lib.lp_task_transfer(self.handle, max_bytes)))

    def bring(self, start: int, end: int) -> None:
        """Brings what waits in this range of the task at once; of what page servers must give NEED tells.

        Raises TaskGoneError, BusyError.
        """
        check(int(lib.lp_task_bring(self.handle, start, end)))

    def claim_remote(self, cursor: int, max_pages: int) -> tuple[int, int, int]:
        """Claims the next run that a remote source must give, from task address `cursor` on.

        Returns (address at dump time, pages, next cursor); 0 pages when there is none.
        """
        dump_addr, following = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        nr_pages = lib.lp_task_claim_remote(self.handle, cursor, max_pages, dump_addr, following)
        return int(dump_addr[0]), int(nr_pages), int(following[0])

    def deliver(self, dump_addr: int, data: Any) -> int:
        """Places pages that have come from a remote source: `data` (a buffer) was at `dump_addr` when dumped.

        Returns pages placed: those that the task waits for. Raises BusyError (call again with the same),
        TaskGoneError.
        """
        buffer = ffi.from_buffer(data)
        return check(int(lib.lp_task_deliver(self.handle, dump_addr, len(buffer) // PAGE_SIZE, buffer)))

    def fail_remote(self, dump_addr: int, nr_pages: int, *, lost: bool) -> None:
        """Gives claims back: the pages are wanted again or, if `lost`, can't be had."""
        lib.lp_task_fail_remote(self.handle, dump_addr, nr_pages, lost)

    def retry_lost(self) -> None:
        """A source has come back: lost pages are wanted again."""
        lib.lp_task_retry_lost(self.handle)

    def poison(self, *, everything: bool) -> int:
        """Makes touches of lost pages (or of all that are pending) raise SIGBUS. Returns pages poisoned.

        Raises BusyError, TaskGoneError, OSError (EINVAL: the kernel has no UFFDIO_POISON; it came with Linux 6.6).
        """
        return check(int(lib.lp_task_poison(self.handle, everything)))

    def forget(self, dump_addr: int, nr_pages: int) -> None:
        """Those of the pages, by address at dump time, that are lost are known not to be in the task any more."""
        lib.lp_task_forget(self.handle, dump_addr, nr_pages)

    def probe(self) -> bool:
        """Whether the task still has its memory; True too when that can't be told at the moment."""
        return int(lib.lp_task_probe(self.handle)) != -errno.ESRCH

    def stats(self) -> Stats:
        stats = ffi.new("struct lp_stats *")
        lib.lp_task_stats(self.handle, stats)
        return Stats(**{name: int(getattr(stats, name)) for name in Stats._fields})

    def sources(self) -> tuple[SourcePages, SourcePages, SourcePages]:
        """Pages copied, pages dropped by layout events, faults answered with data: each by source."""
        counts = [ffi.new("uint64_t[]", self.nr_levels + 2) for _ in range(3)]
        lib.lp_task_sources(self.handle, *counts)
        copied, dropped, faults = (SourcePages.of(count, self.nr_levels) for count in counts)
        return copied, dropped, faults

    def remaining(self) -> SourcePages:
        """Pages pending by source. Walks all extents."""
        counts = ffi.new("uint64_t[]", self.nr_levels + 2)
        lib.lp_task_remaining(self.handle, counts)
        return SourcePages.of(counts, self.nr_levels)

    def histogram(self) -> list[int]:
        """Answers per bucket of service time; :func:`histogram_bound` says what a bucket holds."""
        buckets = ffi.new("uint64_t[]", lib.LP_HISTOGRAM_BUCKETS)
        lib.lp_task_histogram(self.handle, buckets)
        return list(ffi.unpack(buckets, lib.LP_HISTOGRAM_BUCKETS))

    def close(self) -> bool:
        """Ends service. Closes the uffd if nothing is pending, or if the task is gone.

        Else it stays open to the end of this process: closed, it would let the task read zeros where pages are missing.
        True if a page may have come with zeros, which no event has told yet (LOST with ESTALE).
        """
        self._closed(self.handle)
        return bool(lib.lp_task_close(self.handle))
