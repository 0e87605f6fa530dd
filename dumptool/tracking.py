"""Dirty tracking: which pages a process has written since a level was made.

A level and a tracker know each other by the run id in the level's inventory: only if the tracker was
armed when exactly that level was taken does "not written" mean "as in that level". Everything doubtful (a
run that was killed, a level that was skipped, descriptors that the process has closed) ends in "all pages
may have changed".
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from dumptool import proc, trackers
from dumptool._ptrace import lib
from dumptool.errors import DumpError
from dumptool.mappings import Mapping
from dumptool.survey import Task
from dumptool.tracee import Gadgets, Session, session, take_fd
from dumptool.trackers import FEATURES, NO_UFFD, Record, Tracker

NR_CLOSE = 3
NR_FCNTL = 72
NR_MEMFD_CREATE = 319
NR_USERFAULTFD = 323

MFD_CLOEXEC = 1
F_DUPFD_CLOEXEC = 1030
EPERM = 1
UFFD_USER_MODE_ONLY = 1
UFFD_API: Final = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_WP = 2
"""linux/userfaultfd.h, ioctl_userfaultfd(2)."""

HIGHEST_FD = 1000
"""Trackers lie just below this, or the process's limit. Higher numbers make the kernel's table large."""
FDS_OF_OURS = 8

CATEGORIES = {
    "uffd-wp": (lib.LP_PAGE_WPALLOWED, lib.LP_PAGE_WRITTEN),
    "soft-dirty": (0, lib.LP_PAGE_SOFT_DIRTY),
}
"""What a page that has not been written must and must not have (Documentation/admin-guide/mm/pagemap.rst)."""


class Method(Enum):
    """``--dirty-tracking``."""

    AUTO = "auto"
    UFFD_WP = "uffd-wp"
    SOFT_DIRTY = "soft-dirty"
    COMPARE = "compare"


def soft_dirty_works() -> bool:
    """Whether the kernel (CONFIG_MEM_SOFT_DIRTY) notes written pages: bit 55 of a pagemap entry."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
        address = int(_address_of(page))
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(address // mmap.PAGESIZE * 8)
            (entry,) = struct.unpack("<Q", file.read(8))
    return bool(entry >> 55 & 1)


def _address_of(page: mmap.mmap) -> int:
    import ctypes  # noqa: PLC0415 (only here)

    return ctypes.addressof(ctypes.c_char.from_buffer(page))


def own_tracker(task: Task) -> Tracker | None:
    """The tracker that notes this process's writes."""
    for tracker in task.trackers:
        if tracker.owned_by(task.pid, task.stat.start_time):
            return tracker
    return None


def vouched(task: Task, run_id: str) -> tuple[int, int] | None:
    """The categories of pages that are as they were in the level ``run_id``; None when nothing is known."""
    tracker = own_tracker(task)
    if tracker is None or tracker.record is None or not run_id or tracker.record.level != run_id:
        return None
    return CATEGORIES["soft-dirty" if tracker.record.uffd == NO_UFFD else "uffd-wp"]


@dataclass(slots=True)
class Armed:
    """A tracker under our hands, from before a level is taken until it is complete; ``close`` it.

    ``can_protect``: PAGEMAP_SCAN can write-protect pages; else soft-dirty bits have to be cleared.
    """

    task: Task
    record: Record
    memfd: int
    uffd: int | None

    @property
    def can_protect(self) -> bool:
        return self.uffd is not None

    def watch(self, mappings: Iterable[Mapping]) -> None:
        """Have writes to all private mappings noted, those that are new too."""
        if self.uffd is None:
            return
        for mapping in mappings:
            if mapping.private:
                entry = mapping.entry
                request = struct.pack(
                    "<QQQQ", entry.start, entry.end - entry.start, UFFDIO_REGISTER_MODE_WP, 0
                )
                # Refused for special mappings such as the vdso: untracked, they are written each time.
                with suppress(OSError):
                    fcntl.ioctl(self.uffd, UFFDIO_REGISTER, request)

    def clear(self) -> None:
        """With soft-dirty bits: forget what was written so far."""
        if self.uffd is None:
            with open(f"/proc/{self.task.pid}/clear_refs", "wb", buffering=0) as file:
                file.write(b"4")

    def complete(self, run_id: str) -> None:
        """The level ``run_id`` has all that was written before we armed; unless another has come since."""
        now = Record.decode(os.pread(self.memfd, trackers.RECORD_SIZE, 0))
        if now is not None and now.arming == self.record.arming:
            trackers.store(self.memfd, replace(self.record, level=run_id))

    def close(self) -> None:
        """Give our descriptors back; the process keeps its own."""
        for fd in (self.memfd, self.uffd):
            if fd is not None:
                os.close(fd)


def arm(task: Task, gadgets: Gadgets, method: Method) -> Armed | None:
    """A tracker for a frozen process, its own or a new one; None where there is no means of tracking.

    From now on no level is vouched for, until ``Armed.complete``.
    """
    if method is Method.COMPARE:
        return None
    tracker = own_tracker(task)
    if tracker is not None and tracker.record is not None and _fits(tracker.record, method):
        memfd = take_fd(task.pid, tracker.memfd)
        uffd = None if tracker.uffd is None else take_fd(task.pid, tracker.uffd)
        record = tracker.record
    else:
        with session(task.pid, gadgets) as inside:
            remove_from(inside, task.trackers)
            made = _make(task, inside, method)
        if made is None:
            return None
        memfd, uffd, record = made
    record = replace(record, arming=uuid.uuid4().hex, level="")
    trackers.store(memfd, record)
    return Armed(task, record, memfd, uffd)


def _fits(record: Record, method: Method) -> bool:
    return method is Method.AUTO or (method is Method.SOFT_DIRTY) == (record.uffd == NO_UFFD)


def _make(task: Task, inside: Session, method: Method) -> tuple[int, int | None, Record] | None:
    """Our descriptors of a new memfd and userfaultfd in the process, and the record."""
    use_uffd = method is not Method.SOFT_DIRTY
    if not use_uffd and not soft_dirty_works():
        raise DumpError("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")
    soft_limit = proc.parse_limits(proc.read_text(task.pid, "limits"))[7][0]
    low = max(0, min(HIGHEST_FD, soft_limit) - FDS_OF_OURS)
    memfd = inside.checked(NR_MEMFD_CREATE, inside.put(trackers.MEMFD_NAME.encode() + b"\0"), MFD_CLOEXEC)
    memfd = _move_up(inside, memfd, low)
    uffd = -1
    if use_uffd:
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        uffd = inside.call(NR_USERFAULTFD, flags)
        if uffd == -EPERM:  # vm.unprivileged_userfaultfd is 0: it need not see faults in the kernel
            uffd = inside.call(NR_USERFAULTFD, flags | UFFD_USER_MODE_ONLY)
        if uffd >= 0:
            uffd = _move_up(inside, uffd, low)
            our_uffd = take_fd(task.pid, uffd)
            if _handshake(our_uffd):
                record = Record(task.pid, task.stat.start_time, uffd)
                return take_fd(task.pid, memfd), our_uffd, record
            os.close(our_uffd)
            inside.call(NR_CLOSE, uffd)
        if method is Method.UFFD_WP:
            inside.call(NR_CLOSE, memfd)
            raise DumpError(f"pid {task.pid}: no userfaultfd with WP_ASYNC (Linux 6.7) can be had in it")
    if not soft_dirty_works():
        inside.call(NR_CLOSE, memfd)
        return None
    return take_fd(task.pid, memfd), None, Record(task.pid, task.stat.start_time, NO_UFFD)


def _move_up(inside: Session, fd: int, low: int) -> int:
    moved = inside.call(NR_FCNTL, fd, F_DUPFD_CLOEXEC, low)
    if moved < 0:
        return fd
    inside.call(NR_CLOSE, fd)
    return moved


def _handshake(uffd: int) -> bool:
    try:
        fcntl.ioctl(uffd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, FEATURES, 0))
    except OSError:
        return False
    return True


def remove_from(inside: Session, found: Iterable[Tracker]) -> None:
    """Close the descriptors of trackers in the process."""
    for tracker in found:
        for fd in tracker.fds:
            inside.call(NR_CLOSE, fd)


def remove(task: Task, gadgets: Gadgets) -> list[int]:
    """End tracking of a frozen process, as if it had never been.

    Returns descriptors of ours that keep the userfaultfds alive: with the last one the kernel walks all
    tracked memory, so close them when the process runs again.
    """
    if not task.trackers:
        return []
    kept = [take_fd(task.pid, uffd) for tracker in task.trackers for uffd in tracker.uffds]
    with session(task.pid, gadgets) as inside:
        remove_from(inside, task.trackers)
    return kept


def lock(task: Task) -> int | None:
    """Keep other runs of dumptool away from a tracked process until the returned descriptor is closed.

    Raises ``DumpError`` when another one is at it.
    """
    tracker = own_tracker(task)
    if tracker is None:
        return None
    try:
        fd = os.open(f"/proc/{task.pid}/fd/{tracker.memfd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # closed meanwhile, or the process has ended
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise DumpError(f"pid {task.pid}: another dumptool is at work on it") from None
    return fd
