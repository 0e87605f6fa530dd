"""Dirty tracking: which pages a process has written since a level was made.

A level and a tracker match by the run id in the level's inventory. Only if the tracker was armed for exactly that level
does "not written" mean "as in that level". In all doubtful cases (a run or a holder that was killed, a level that was
skipped, an execve) all pages count as changed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import struct
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from dumptool import proc, trackers
from dumptool._ptrace import lib
from dumptool.errors import DumpError
from dumptool.holders import Holder, Tracker
from dumptool.mappings import Mapping
from dumptool.survey import Task
from dumptool.tracee import Gadgets, read_memory, seccomp_suspended, session, take_fd
from dumptool.trackers import FEATURES, OLD_FEATURES, SOFT_DIRTY, UFFD_WP, Record

log = logging.getLogger("lazypages")

NR_CLOSE = 3
NR_USERFAULTFD = 323

EPERM = 1
UFFD_USER_MODE_ONLY = 1
UFFD_API: Final = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_WP = 2
"""linux/userfaultfd.h, ioctl_userfaultfd(2)."""

AT_RANDOM = 25
"""elf.h: the address of 16 bytes that execve sets to random values."""

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


def program(pid: int) -> str:
    """Names what execve has started in a process; "" if it can't be known."""
    words = struct.iter_unpack("<QQ", proc.read(pid, "auxv"))
    address = next((value for kind, value in words if kind == AT_RANDOM), 0)
    with suppress(DumpError):
        return f"{address:x}:{read_memory(pid, address, 16).hex()}"
    return ""


@dataclass(slots=True)
class Held:
    """A process's tracker in use by this run, locked against others until ``close``.

    ``record``: as it was when the lock was taken. ``memfd``, ``uffd``: our own descriptors.
    """

    holder: Holder
    record: Record
    memfd: int
    uffd: int | None

    def of_this_program(self) -> bool:
        """Whether execve has not replaced the memory that it tracks. The process is frozen."""
        return self.record.program == program(self.record.pid) != ""

    def drop(self) -> None:
        """Ends the tracking. The kernel then walks all tracked memory, when ``close`` was called, too.

        After ``close``: nothing, another run may use the tracker.
        """
        if self.memfd < 0:
            return
        trackers.store(self.memfd, replace(self.record, level="", arming=""))
        with suppress(DumpError):  # if the holder has ended, nothing is tracked
            self.holder.drop(self.record.pid)

    def close(self) -> None:
        """Closes our descriptors, the holder keeps its own. Idempotent."""
        if self.uffd is not None:
            os.close(self.uffd)
            self.uffd = None
        if self.memfd >= 0:
            os.close(self.memfd)
            self.memfd = -1


def hold(task: Task) -> Held | None:
    """Locks the tracker of a process and takes its descriptors; None if there is none.

    Raises ``DumpError`` if another run has the lock.
    """
    tracker = task.tracker
    if tracker is None:
        return None
    memfd = tracker.holder.open(tracker)
    if memfd is None:
        return None
    held = None
    try:
        _lock(task.pid, memfd)
        held = _take(task, tracker, memfd)
    finally:
        if held is None:
            os.close(memfd)
    return held


def _take(task: Task, tracker: Tracker, memfd: int) -> Held | None:
    holder = tracker.holder
    record = trackers.load(memfd)
    if record is None or (record.pid, record.start_time) != (task.pid, task.stat.start_time):
        return None
    uffd = None
    if tracker.uffd is not None:
        try:
            uffd = holder.take(tracker.uffd)
        except DumpError:
            return None  # the holder has ended
    if not holder.still_has(tracker, memfd):
        if uffd is not None:
            os.close(uffd)
        return None
    return Held(holder, record, memfd, uffd)


def _lock(pid: int, memfd: int) -> None:
    try:
        fcntl.flock(memfd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DumpError(f"pid {pid}: another dumptool is working on it; wait for it to end") from None


@dataclass(slots=True)
class Vouched:
    """A tracker's answer: which pages of a process have not changed since a level.

    ``with_``, ``without``: PAGEMAP_SCAN categories of unchanged pages, except in the mappings of ``fresh``.
    ``uffd``: of the ``Held`` tracker.
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


def vouched(held: Held | None, run_id: str) -> Vouched | None:
    """What the tracker knew, when it was locked, of the pages of the level ``run_id``; None if it knew nothing."""
    if held is None or not run_id or held.record.level != run_id or not held.of_this_program():
        return None
    record = held.record
    if record.method not in CATEGORIES:
        return None
    if record.method == SOFT_DIRTY and not (record.witness and is_soft_dirty(record.pid, record.witness)):
        return None
    return Vouched(record.method, held.uffd)


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
    """A tracker from before a level is taken until the level is complete.

    ``record``: what it was armed with. ``can_protect``: PAGEMAP_SCAN can write-protect pages; else soft-dirty bits have
    to be cleared.
    """

    task: Task
    held: Held
    record: Record

    @property
    def can_protect(self) -> bool:
        return self.record.method == UFFD_WP

    def watch(self, mappings: Iterable[Mapping]) -> None:
        """Tracks writes to all private mappings, including those mapped since the last level."""
        if self.held.uffd is None:
            return
        for mapping in mappings:
            if mapping.private:
                _register(self.held.uffd, mapping.entry.start, mapping.entry.end)

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
        now = trackers.load(self.held.memfd)
        if now is not None and now.arming == self.record.arming:
            trackers.store(self.held.memfd, replace(self.record, level=run_id))


def arm(task: Task, held: Held) -> Armed:
    """Arms the tracker of a frozen process. From now until ``Armed.complete`` all pages count as changed."""
    record = replace(held.record, arming=uuid.uuid4().hex, level="")
    trackers.store(held.memfd, record)
    return Armed(task, held, record)


def fits(held: Held, method: Method) -> bool:
    """Whether the tracker can be armed: it is complete, of this memory, and of the method that is wanted."""
    wanted = held.record.method in CATEGORIES if method is Method.AUTO else held.record.method == method.value
    return wanted and held.of_this_program()


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


def make(task: Task, pidfd: int, gadgets: Gadgets, method: Method, holder: Holder) -> Held | None:
    """Makes a tracker for a frozen process, which has none. None if the kernel has no means of tracking.

    ``pidfd``: of the process; ``holder``: gets the tracker. Raises ``DumpError``.
    """
    if method is Method.SOFT_DIRTY and not soft_dirty_works():
        raise DumpError("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")
    pid = task.pid
    record = Record(pid, task.stat.start_time, program(pid))
    held = Held(holder, record, _new_memfd(record, pidfd, holder), None)
    keep = False
    try:
        # If we are killed from here on, the record without a method tells that a descriptor may be left in the process.
        held.uffd = _userfaultfd(task, gadgets)
        can_protect = held.uffd is not None and _handshake(held.uffd, FEATURES)
        if held.uffd is not None and not can_protect and not _handshake(held.uffd, OLD_FEATURES):
            os.close(held.uffd)
            held.uffd = None
        if can_protect and method is not Method.SOFT_DIRTY:
            held.record = replace(record, method=UFFD_WP)
        elif method is not Method.UFFD_WP and soft_dirty_works():
            held.record = replace(record, method=SOFT_DIRTY)
        elif method is Method.UFFD_WP:
            raise DumpError(f"pid {pid}: can't create a userfaultfd with WP_ASYNC (needs Linux 6.7) in it")
        else:
            return None
        if held.uffd is not None:
            holder.add_uffd(pid, held.uffd)
        trackers.store(held.memfd, held.record)
        keep = True
    finally:
        if not keep:
            held.drop()
            held.close()
    return held


def _new_memfd(record: Record, pidfd: int, holder: Holder) -> int:
    """Gives the holder a memfd with the record. Returns a description of our own, which has the lock."""
    memfd = os.memfd_create(trackers.MEMFD_NAME, os.MFD_CLOEXEC)
    try:
        trackers.store(memfd, record)
        ours = os.open(f"/proc/self/fd/{memfd}", os.O_RDWR | os.O_CLOEXEC)
        _lock(record.pid, ours)
        try:
            holder.hold(record.pid, pidfd, memfd)
        except BaseException:
            os.close(ours)
            raise
    finally:
        os.close(memfd)
    return ours


def _userfaultfd(task: Task, gadgets: Gadgets) -> int | None:
    """A userfaultfd for the memory of a frozen process, which has no descriptor of it. None: it can't make one."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    with seccomp_suspended(task.pid) as free:
        if not free:
            log.warning(
                "pid %d: its seccomp filter can't be suspended, so no userfaultfd can be made in it (that needs "
                "CAP_SYS_ADMIN, and a dumptool that is not under seccomp)",
                task.pid,
            )
            return None
        with session(task.pid, gadgets) as inside:
            number = inside.call(NR_USERFAULTFD, flags)
            if number == -EPERM:
                # vm.unprivileged_userfaultfd is 0: allowed if it does not handle faults of the kernel
                number = inside.call(NR_USERFAULTFD, flags | UFFD_USER_MODE_ONLY)
            if number < 0:
                log.warning("pid %d: no userfaultfd can be made in it: %s", task.pid, os.strerror(-number))
                return None
            try:
                return take_fd(task.pid, number)
            finally:
                inside.call(NR_CLOSE, number)


def _handshake(uffd: int, features: int) -> bool:
    try:
        fcntl.ioctl(uffd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, features, 0))
    except OSError:
        return False
    return True


def close_in(task: Task, gadgets: Gadgets, numbers: Sequence[int]) -> list[int]:
    """Closes descriptors of a frozen process: ``Task.leftovers``.

    Returns descriptors of ours that keep them alive. Closing the last one of a userfaultfd makes the kernel walk all
    tracked memory.
    """
    if not numbers:
        return []
    kept = [take_fd(task.pid, number) for number in numbers]
    with seccomp_suspended(task.pid) as free:
        if not free:
            log.warning("pid %d: old descriptors of dumptool stay in it: it is under seccomp", task.pid)
            return kept
        with session(task.pid, gadgets) as inside:
            for number in numbers:
                inside.call(NR_CLOSE, number)
    return kept
