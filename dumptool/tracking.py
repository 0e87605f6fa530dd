"""Dirty tracking: which pages a process has written since a level was made.

A level and a tracker match by the run id in the level's inventory. Only if the tracker was armed for exactly that level
does "not written" mean "as in that level". In all doubtful cases (a run that was killed, a level that was skipped,
descriptors that the process has closed) all pages count as changed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from dumptool import proc, trackers
from dumptool._ptrace import lib
from dumptool.errors import DumpError
from dumptool.mappings import Mapping
from dumptool.survey import Task
from dumptool.tracee import Gadgets, Session, session, take_fd
from dumptool.trackers import FEATURES, NO_UFFD, OLD_FEATURES, SOFT_DIRTY, UFFD_WP, Record, Tracker

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
"""Trackers get the highest numbers below this and the soft limit: higher ones make the kernel's table large."""
FDS_OF_OURS = 8

CATEGORIES = {
    UFFD_WP: (lib.LP_PAGE_WPALLOWED, lib.LP_PAGE_WRITTEN),
    SOFT_DIRTY: (0, lib.LP_PAGE_SOFT_DIRTY | lib.LP_PAGE_PFNZERO),
}
"""Categories that an unwritten page must have, and must not have (Documentation/admin-guide/mm/pagemap.rst).

A read that maps the zero page, for instance after madvise(MADV_DONTNEED), sets no soft-dirty bit.
"""

TABLE_SHIFT = 21
"""A page table maps 2 MiB. mremap of a whole one sets no soft-dirty bits (move_normal_pmd() in mm/mremap.c)."""
ENTRY_SOFT_DIRTY = 1 << 55
ENTRY_THERE = 3 << 62
"""Bits of an entry of /proc/<pid>/pagemap: soft-dirty; present or swapped."""


class Method(Enum):
    """``--dirty-tracking``."""

    AUTO = "auto"
    UFFD_WP = "uffd-wp"
    SOFT_DIRTY = "soft-dirty"
    COMPARE = "compare"


def soft_dirty_works() -> bool:
    """Whether the kernel sets the soft-dirty bit of written pages (CONFIG_MEM_SOFT_DIRTY)."""
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
    """The tracker of this process's writes; not one inherited by fork."""
    for tracker in task.trackers:
        if tracker.owned_by(task.pid, task.stat.start_time):
            return tracker
    return None


@dataclass(slots=True)
class Vouched:
    """A tracker's answer: which pages of a process have not changed since a level. Call ``close``.

    ``with_``, ``without``: PAGEMAP_SCAN categories of unchanged pages, except in the mappings of ``fresh``.
    """

    method: str
    uffd: int | None

    @property
    def with_(self) -> int:
        """Categories (LP_PAGE_*) that an unchanged page has."""
        return int(CATEGORIES[self.method][0])

    @property
    def without(self) -> int:
        """Categories (LP_PAGE_*) that an unchanged page does not have."""
        return int(CATEGORIES[self.method][1])

    def fresh(self, mappings: Iterable[Mapping]) -> frozenset[int]:
        """Start addresses of private mappings that may not be those of the level. Call it before ``Armed.watch``.

        A mapping that is still registered with the userfaultfd is the same. In others the bits of the pages may
        come from another address: up to Linux 6.13 write protection moves with a page, and a page table that is moved
        as a whole keeps its soft-dirty bits. (VmFlags `sd` does not help: all mappings have it until clear_refs is
        written.)
        """
        return frozenset(
            mapping.entry.start
            for mapping in mappings
            if mapping.private and not self._is_known(mapping.entry.start, mapping.entry.end)
        )

    def _is_known(self, start: int, end: int) -> bool:
        if self.uffd is not None and lib.lp_is_registered(self.uffd, start):
            return _register(self.uffd, start, end)
        return self.method == SOFT_DIRTY and start >> TABLE_SHIFT == end >> TABLE_SHIFT

    def close(self) -> None:
        """Closes our descriptor."""
        if self.uffd is not None:
            os.close(self.uffd)


def vouched(task: Task, run_id: str) -> Vouched | None:
    """What the tracker knows of the pages of the level ``run_id``; None if it knows nothing."""
    tracker = own_tracker(task)
    if tracker is None or tracker.record is None or not run_id or tracker.record.level != run_id:
        return None
    record = tracker.record
    if record.method not in CATEGORIES:
        return None
    if record.method == SOFT_DIRTY and not (record.witness and is_soft_dirty(task.pid, record.witness)):
        return None
    return Vouched(record.method, None if tracker.uffd is None else take_fd(task.pid, tracker.uffd))


def is_soft_dirty(pid: int, address: int) -> bool:
    """Whether a page is there (present or swapped) and soft-dirty."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        (entry,) = struct.unpack("<Q", os.pread(file.fileno(), 8, address // mmap.PAGESIZE * 8))
    return bool(entry & ENTRY_SOFT_DIRTY and entry & ENTRY_THERE)


def _register(uffd: int, start: int, end: int) -> bool:
    """Registers a mapping with a userfaultfd for write protection. False if the kernel does not support that.

    It never does for special mappings such as the vdso, and before Linux 6.7 only for anonymous memory.
    Raises ``DumpError`` if the mapping is registered with another userfaultfd.
    """
    request = struct.pack("<QQQQ", start, end - start, UFFDIO_REGISTER_MODE_WP, 0)
    try:
        fcntl.ioctl(uffd, UFFDIO_REGISTER, request)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DumpError(
                f"mapping {start:x}-{end:x} has a userfaultfd that is not ours, which is not saved"
            ) from None
        return False
    return True


@dataclass(slots=True)
class Armed:
    """A tracker in use, from before a level is taken until the level is complete. Call ``close``.

    ``can_protect``: PAGEMAP_SCAN can write-protect pages; else soft-dirty bits have to be cleared.
    ``new``: just created, so it knows of no earlier writes.
    """

    task: Task
    record: Record
    memfd: int
    uffd: int | None
    new: bool = False

    @property
    def can_protect(self) -> bool:
        return self.record.method == UFFD_WP

    def watch(self, mappings: Iterable[Mapping]) -> None:
        """Tracks writes to all private mappings, including those mapped since the last level."""
        if self.uffd is None:
            return
        for mapping in mappings:
            if mapping.private:
                _register(self.uffd, mapping.entry.start, mapping.entry.end)

    def clear(self) -> None:
        """With soft-dirty bits: clears them."""
        if self.can_protect:
            return
        pid = self.task.pid
        with open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as file:
            file.write(b"4")
        witness = next((vma.start for vma in self.task.layout.vmas if vma.name == "[vdso]"), 0)
        if not (witness and _mark(pid, witness)):
            witness = 0
        self.record = replace(self.record, witness=witness)

    def complete(self, run_id: str) -> None:
        """Records that the level ``run_id`` has all that was written before arming, unless it was armed again since."""
        now = Record.decode(os.pread(self.memfd, trackers.RECORD_SIZE, 0))
        if now is not None and now.arming == self.record.arming:
            trackers.store(self.memfd, replace(self.record, level=run_id))

    def close(self) -> None:
        """Closes our descriptors; the process keeps its own."""
        for fd in (self.memfd, self.uffd):
            if fd is not None:
                os.close(fd)


def arm(task: Task, gadgets: Gadgets, method: Method) -> Armed | None:
    """Arms the tracker of a frozen process, a new one if needed. None if the kernel has no means of tracking.

    From now until ``Armed.complete`` all pages count as changed. Raises ``DumpError``.
    """
    if method is Method.COMPARE:
        return None
    tracker = own_tracker(task)
    new = tracker is None or tracker.record is None or not _fits(tracker.record, method)
    if tracker is not None and tracker.record is not None and not new:
        memfd = take_fd(task.pid, tracker.memfd)
        uffd = None if tracker.uffd is None else take_fd(task.pid, tracker.uffd)
        record = tracker.record
    else:
        with session(task.pid, gadgets) as inside:
            remove_from(inside, task.trackers)
            made = make_tracker(task, inside, method)
        if made is None:
            return None
        memfd, uffd, record = made
    record = replace(record, arming=uuid.uuid4().hex, level="")
    trackers.store(memfd, record)
    return Armed(task, record, memfd, uffd, new=new)


def _mark(pid: int, address: int) -> bool:
    """Writes a page's own byte back to it, and returns whether that has made it soft-dirty.

    For a page that the process can't write itself: it becomes a private copy, as with a debugger's breakpoint.
    """
    try:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), os.pread(file.fileno(), 1, address), address)
    except OSError:
        return False
    return is_soft_dirty(pid, address)


def _fits(record: Record, method: Method) -> bool:
    return record.method in CATEGORIES if method is Method.AUTO else record.method == method.value


def make_tracker(task: Task, inside: Session, method: Method) -> tuple[int, int | None, Record] | None:
    """Creates memfd and userfaultfd in the process. Returns our descriptors of them, and the record."""
    if method is Method.SOFT_DIRTY and not soft_dirty_works():
        raise DumpError("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")
    soft_limit = proc.parse_limits(proc.read_text(task.pid, "limits"))[7][0]
    low = max(0, min(HIGHEST_FD, soft_limit) - FDS_OF_OURS)
    memfd = inside.checked(NR_MEMFD_CREATE, inside.put(trackers.MEMFD_NAME.encode() + b"\0"), MFD_CLOEXEC)
    memfd = _move_up(inside, memfd, low)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    uffd, our_uffd, can_protect = inside.call(NR_USERFAULTFD, flags), None, False
    if uffd == -EPERM:  # vm.unprivileged_userfaultfd is 0: allowed if it does not handle faults of the kernel
        uffd = inside.call(NR_USERFAULTFD, flags | UFFD_USER_MODE_ONLY)
    if uffd >= 0:
        uffd = _move_up(inside, uffd, low)
        our_uffd = take_fd(task.pid, uffd)
        can_protect = _handshake(our_uffd, FEATURES)
        if not can_protect and not _handshake(our_uffd, OLD_FEATURES):
            os.close(our_uffd)
            inside.call(NR_CLOSE, uffd)
            uffd, our_uffd = NO_UFFD, None
    record = Record(task.pid, task.stat.start_time, max(uffd, NO_UFFD))
    if can_protect and method is not Method.SOFT_DIRTY:
        return take_fd(task.pid, memfd), our_uffd, replace(record, method=UFFD_WP)
    if method is not Method.UFFD_WP and soft_dirty_works():
        return take_fd(task.pid, memfd), our_uffd, replace(record, method=SOFT_DIRTY)
    if our_uffd is not None:
        os.close(our_uffd)
        inside.call(NR_CLOSE, uffd)
    inside.call(NR_CLOSE, memfd)
    if method is Method.UFFD_WP:
        raise DumpError(f"pid {task.pid}: can't create a userfaultfd with WP_ASYNC (needs Linux 6.7) in it")
    return None


def _move_up(inside: Session, fd: int, low: int) -> int:
    moved = inside.call(NR_FCNTL, fd, F_DUPFD_CLOEXEC, low)
    if moved < 0:
        return fd
    inside.call(NR_CLOSE, fd)
    return moved


def _handshake(uffd: int, features: int) -> bool:
    try:
        fcntl.ioctl(uffd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, features, 0))
    except OSError:
        return False
    return True


def remove_from(inside: Session, found: Iterable[Tracker]) -> None:
    """Closes the descriptors of trackers in the process."""
    for tracker in found:
        for fd in tracker.fds:
            inside.call(NR_CLOSE, fd)


def remove(task: Task, gadgets: Gadgets) -> list[int]:
    """Ends the tracking of a frozen process and removes all traces of it.

    Returns descriptors of ours that keep the userfaultfds alive. Closing the last one makes the kernel walk all
    tracked memory: close them when the process runs again.
    """
    if not task.trackers:
        return []
    kept = [take_fd(task.pid, uffd) for tracker in task.trackers for uffd in tracker.uffds]
    with session(task.pid, gadgets) as inside:
        remove_from(inside, task.trackers)
    return kept


def lock(task: Task) -> int | None:
    """Locks a tracked process against other runs of dumptool until the returned descriptor is closed.

    None if there is no tracker. Raises ``DumpError`` if another run has the lock.
    """
    tracker = own_tracker(task)
    if tracker is None:
        return None
    try:
        fd = os.open(f"/proc/{task.pid}/fd/{tracker.memfd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # closed in the meantime, or the process has exited
    if os.readlink(f"/proc/self/fd/{fd}") != trackers.MEMFD_LINK:
        os.close(fd)
        return None  # the number now refers to another file, or the pid to another process
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise DumpError(f"pid {task.pid}: another dumptool is working on it; wait for it to end") from None
    return fd
