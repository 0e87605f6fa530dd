"""The address space of a task: mappings, their contents, and the registration with userfaultfd."""

from __future__ import annotations

import ctypes
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from images_spec.errors import ImageError
from images_spec.flags import (
    MAP_ANONYMOUS,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_PRIVATE,
    MAP_SHARED,
    VMA_AIORING,
    VMA_ANON_PRIVATE,
    VMA_ANON_SHARED,
    VMA_FILE_PRIVATE,
    VMA_FILE_SHARED,
    VMA_MEMFD,
    VMA_SHSTK,
    VMA_SOCKET,
    VMA_SYSVIPC,
    VMA_UPROBES,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
    lazy_capable,
)
from images_spec.messages import MmEntry, VmaEntry
from images_spec.placement import ExtentTable
from lazypages.restore.dump import Alive, Dump, SharedMemory
from lazypages.restore.errors import RestoreError
from lazypages.restore.files import Files
from lazypages.restore.machine import Machine, Special
from lazypages.restore.plan import NONE, SCRATCH_CODE, SCRATCH_DATA, TAKE_EAGER, TAKE_LAZY, FillRange, Plan
from lazypages.restore.syscalls import (
    MADV_GUARD_INSTALL,
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    PROT_WRITE,
    SET_MM_MAP,
    Nr,
    Prctl,
)

EXTENT_SIZE: Final = 32
"""sizeof(struct lp_extent), csrc/common/extent.h."""

SCRATCH_LOW: Final = 1 << 40
SCRATCH_HIGH: Final = 0x500000000000
"""Addresses that neither the restorer (linked to a fixed, low address) nor its stack and libraries use."""

_KEPT_FLAGS = MAP_SHARED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_NORESERVE | MAP_LOCKED
_UNSUPPORTED = {
    VMA_SYSVIPC: "System V shared memory",
    VMA_SOCKET: "a packet socket's ring",
    VMA_AIORING: "an asynchronous I/O ring (io_setup)",
    VMA_SHSTK: "a shadow stack",
    VMA_UPROBES: "uprobes",
}
_SPECIAL = VMA_VDSO | VMA_VVAR | VMA_VSYSCALL


def parking_size(machine: Machine) -> int:
    """Bytes of vvar and vdso together."""
    return sum(part.size for part in machine.special)


def find_scratch(spaces: Iterable[MmEntry], machine: Machine) -> int:
    """An address for the scratch area that is free in all of the address spaces. Raises ``RestoreError``."""
    size = SCRATCH_CODE + SCRATCH_DATA + parking_size(machine)
    taken = sorted((vma.start, vma.end) for mm in spaces for vma in mm.vmas)
    place = SCRATCH_LOW
    for start, end in taken:
        if end <= place:
            continue
        if start >= place + size:
            break
        place = end
    if place + size > SCRATCH_HIGH:
        raise RestoreError(f"no range of {size} bytes is free in the address spaces of all tasks")
    return place


def special_places(mm: MmEntry, machine: Machine, path: Path) -> list[tuple[int, int]]:
    """Start and size of each of this kernel's vvar and vdso mappings in the task, in the machine's order; [] for none.

    CRIU writes the vvar mappings of newer kernels (from 6.13 on) as one (observed with CRIU 4.1.1), so total sizes are
    compared. Raises ``RestoreError`` if they are from another kernel.
    """
    dumped = [vma for vma in mm.vmas if vma.status & (VMA_VDSO | VMA_VVAR)]
    if not dumped:
        return []
    places = []
    for status, ours in (
        (VMA_VVAR, [part for part in machine.special if part.name != "[vdso]"]),
        (VMA_VDSO, [part for part in machine.special if part.name == "[vdso]"]),
    ):
        theirs = [vma for vma in dumped if vma.status & status]
        size, wanted = sum(vma.end - vma.start for vma in theirs), sum(part.size for part in ours)
        contiguous = all(a.end == b.start for a, b in pairwise(theirs))
        if size != wanted or not contiguous:
            name = "vdso" if status == VMA_VDSO else "vvar"
            raise RestoreError(
                f"{path.name}: the task has {size} bytes of {name}, this kernel's has {wanted}: "
                "it was dumped under another kernel, restore it under that one"
            )
        place = theirs[0].start if theirs else 0
        for part in ours:
            places.append((part, place))
            place += part.size
    order = {id(part): number for number, part in enumerate(machine.special)}

    def position(pair: tuple[Special, int]) -> int:
        return order[id(pair[0])]

    return [(place, part.size) for part, place in sorted(places, key=position)]


def overlapping(extents: ExtentTable, start: int, end: int) -> range:
    """Indices of the extents with pages in ``[start, end)``."""
    numbers = range(len(extents))
    first = bisect_right(numbers, start, key=lambda number: extents[number].end)
    last = bisect_right(numbers, end - 1, key=lambda number: extents[number].start)
    return range(first, max(first, last))


def check_vdso(alive: Alive, machine: Machine, pid: int, path: Path) -> None:
    """Checks that the dumped vdso equals this kernel's, byte for byte: the task may be executing it.

    Raises ``RestoreError``.
    """
    for vma in alive.mm.vmas:
        if not vma.status & VMA_VDSO:
            continue
        dumped = bytearray()
        for number in overlapping(alive.memory.extents, vma.start, vma.end):
            extent = alive.memory.extents[number]
            lo, hi = max(extent.start, vma.start), min(extent.end, vma.end)
            pages = alive.memory.levels[extent.source].pages
            if lo != vma.start + len(dumped) or pages is None:
                break
            with pages.open("rb") as file:
                file.seek(extent.offset + lo - extent.start)
                dumped += file.read(hi - lo)
        if len(dumped) != vma.end - vma.start:
            raise RestoreError(
                f"{path.name}: task {pid}'s vdso is not in the images, so its kernel is unknown"
            )
        if dumped != machine.vdso:
            raise RestoreError(
                f"{path.name}: task {pid}'s vdso is not this kernel's: it was dumped under another kernel, "
                "restore it under that one"
            )


def check_mappings(dump: Dump, alive: Alive, machine: Machine, pid: int, path: Path, *, lazy: bool) -> None:
    """Raises ``RestoreError`` for mappings that can't be restored, ``ImageError`` for invalid ones."""
    if alive.memory.guards and not machine.has_guards:
        raise RestoreError(f"task {pid}: has guard regions (MADV_GUARD_INSTALL), which need Linux 6.13")
    if alive.mm.aios:
        raise RestoreError(f"task {pid}: uses asynchronous I/O (io_setup), which can't be restored")
    for vma in alive.mm.vmas:
        where = f"task {pid}: mapping {vma.start:#x}-{vma.end:#x}"
        for bit, name in _UNSUPPORTED.items():
            if vma.status & bit:
                raise RestoreError(f"{where}: is {name}, which can't be restored")
        if vma.status & VMA_MEMFD and dump.shared.find(vma) is None:
            raise RestoreError(f"{where}: is a memfd, which can't be restored")
        if vma.flags & MAP_HUGETLB:
            raise RestoreError(f"{where}: is of huge pages (MAP_HUGETLB), which can't be restored")
        if vma.status & _SPECIAL:
            continue
        if not vma.status & (VMA_ANON_PRIVATE | VMA_ANON_SHARED | VMA_FILE_PRIVATE | VMA_FILE_SHARED):
            raise RestoreError(f"{where}: is of unknown kind {vma.status:#x}, which can't be restored")
        if vma.status & (VMA_ANON_SHARED | VMA_FILE_SHARED) and overlapping(
            alive.memory.extents, vma.start, vma.end
        ):
            raise ImageError(path, f"mapping {vma.start:#x}-{vma.end:#x} is shared, but has pages of its own")
    lost = alive.memory.extents.counts().lost
    if lost.total:
        hint = "" if lazy else " (of a lazy dump: restore it with --lazy-pages)" if lost.lazy else ""
        raise RestoreError(f"task {pid}: no image of the chain has {lost.total:,} of its pages{hint}")


def extent_bytes(extents: ExtentTable) -> bytes:
    """The table as an array of struct lp_extent."""
    return ctypes.string_at(extents.address, len(extents) * EXTENT_SIZE) if len(extents) else b""


class Shared:
    """Shared anonymous memory: a slot for each piece, filled on creation."""

    def __init__(self, dump: Dump, plan: Plan, files: Files) -> None:
        self._memories = dump.shared
        self._slots = {
            ident: self._make(plan, files, ident, size, dump.shared.by_id[ident])
            for ident, size in dump.shared.sizes.items()
        }

    def slot(self, vma: VmaEntry) -> int | None:
        """The slot of the memory that a mapping shows; None if it is a mapping of something else."""
        ident = self._memories.find(vma)
        return None if ident is None else self._slots[ident]

    def _make(self, plan: Plan, files: Files, ident: int, size: int, contents: SharedMemory) -> int:
        slot = plan.shared(size, f"make shared memory {ident} of {size} bytes")
        levels = [files.pages(level) if level else NONE for level in contents.levels]
        everything = [FillRange(0, size, TAKE_EAGER | TAKE_LAZY)]
        label = f"read the contents of shared memory {ident}"
        plan.fill(NONE, levels, everything, extents=extent_bytes(contents.extents), label=label, shared=slot)
        return slot


class Memory:
    """Plans the address space of one task. Until its files are set up, all its descriptors are free."""

    def __init__(self, plan: Plan, files: Files, shared: Shared, machine: Machine, *, lazy: bool) -> None:
        self._plan, self._files, self._shared, self._machine = plan, files, shared, machine
        self._lazy = lazy

    def build(self, thread: int, pid: int, alive: Alive, path: Path) -> None:
        """Plans everything except the registration with userfaultfd."""
        plan, mm = self._plan, alive.mm
        plan.switch(thread, special_places(mm, self._machine, path))
        if self._lazy:
            # Reading one eager page into a huge page would fill the lazy pages next to it with zeros.
            plan.call(thread, "disable huge pages", Nr.PRCTL, Prctl.SET_THP_DISABLE, 1)
        tighten = self._map(thread, pid, alive)
        ranges = [FillRange(vma.start, vma.end, self._take(vma)) for vma in mm.vmas]
        levels = [self._files.pages(level.pages) if level.pages else NONE for level in alive.memory.levels]
        plan.fill(
            thread,
            levels,
            ranges,
            extents=extent_bytes(alive.memory.extents),
            label="read the memory's contents",
        )
        for vma in tighten:
            size = vma.end - vma.start
            label = f"protect {vma.start:#x}-{vma.end:#x}"
            plan.call(thread, label, Nr.MPROTECT, vma.start, size, vma.prot)
        for vma in mm.vmas:
            if not vma.status & _SPECIAL:
                self._advise(thread, vma)
        for start, end in alive.memory.guards:
            label = f"install the guard region {start:#x}-{end:#x}"
            plan.call(thread, label, Nr.MADVISE, start, end - start, MADV_GUARD_INSTALL)
        self._describe(thread, pid, mm)
        if not self._lazy:
            self._huge_pages(thread, mm)

    def put_under_userfaultfd(self, thread: int, pid: int, alive: Alive) -> None:
        self._plan.uffd(thread, pid, alive.memory.vmas)
        self._huge_pages(thread, alive.mm)

    def _huge_pages(self, thread: int, mm: MmEntry) -> None:
        label = "disable or enable huge pages"
        self._plan.call(thread, label, Nr.PRCTL, Prctl.SET_THP_DISABLE, int(mm.thp_disabled))

    def _take(self, vma: VmaEntry) -> int:
        if vma.status & _SPECIAL:
            return 0
        if self._lazy and lazy_capable(vma.flags, vma.status):
            return TAKE_EAGER
        return TAKE_EAGER | TAKE_LAZY

    def _map(self, thread: int, pid: int, alive: Alive) -> Sequence[VmaEntry]:
        """Returns the mappings that are writable only until their contents are read."""
        plan = self._plan
        tighten = []
        by_file: dict[int, list[VmaEntry]] = {}
        for vma in alive.mm.vmas:
            if vma.status & _SPECIAL:
                continue
            where = f"task {pid}, mapping {vma.start:#x}-{vma.end:#x}"
            memory = self._shared.slot(vma)
            if memory is not None:
                by_file.setdefault(memory, []).append(vma)
            elif vma.status & (VMA_FILE_PRIVATE | VMA_FILE_SHARED):
                access = os.O_RDWR if vma.fdflags & os.O_ACCMODE == os.O_RDWR else os.O_RDONLY
                slot = self._files.mapped(vma.shmid, access, where)
                by_file.setdefault(slot, []).append(vma)
            else:
                tighten += self._map_one(thread, vma, alive, -1)
        for slot, vmas in by_file.items():
            plan.give(thread, slot, 0, False, "take a file for mapping")
            for vma in vmas:
                tighten += self._map_one(thread, vma, alive, 0)
            plan.call(thread, "close a mapped file", Nr.CLOSE, 0)
        return tighten

    def _map_one(self, thread: int, vma: VmaEntry, alive: Alive, fd: int) -> list[VmaEntry]:
        prot, flags = vma.prot, vma.flags & _KEPT_FLAGS
        if fd >= 0:
            flags &= ~MAP_ANONYMOUS
        open_up = (
            not prot & PROT_WRITE
            and bool(flags & MAP_PRIVATE)
            and bool(overlapping(alive.memory.extents, vma.start, vma.end))
        )
        self._plan.call(
            thread,
            f"map {vma.start:#x}-{vma.end:#x}",
            Nr.MMAP,
            vma.start,
            vma.end - vma.start,
            prot | PROT_WRITE if open_up else prot,
            flags | MAP_FIXED_NOREPLACE,
            fd,
            vma.pgoff if fd >= 0 else 0,
            exact=vma.start,
        )
        return [vma] if open_up else []

    def _advise(self, thread: int, vma: VmaEntry) -> None:
        for advice in range(64):
            if vma.madv >> advice & 1:
                label = f"give advice {advice} on {vma.start:#x}-{vma.end:#x}"
                self._plan.call(thread, label, Nr.MADVISE, vma.start, vma.end - vma.start, advice)

    def _describe(self, thread: int, pid: int, mm: MmEntry) -> None:
        """Sets the kernel's record of the address space: executable, break, arguments, auxiliary vector.

        PR_SET_MM_MAP needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, for the executable only. The other
        variants of PR_SET_MM need CAP_SYS_RESOURCE (prctl_set_mm_map() in kernel/sys.c; tested with Linux 6.18).
        """
        plan = self._plan
        slot = self._files.mapped(mm.exe_file_id, os.O_RDONLY, f"task {pid}, its program")
        auxv = struct.pack(f"<{len(mm.saved_auxv)}Q", *mm.saved_auxv)
        fields = (
            *(mm.start_code, mm.end_code, mm.start_data, mm.end_data, mm.start_brk, mm.brk, mm.start_stack),
            *(mm.arg_start, mm.arg_end, mm.env_start, mm.env_end),
        )
        size = 8 * len(fields) + 8 + 4 + 4
        record = struct.pack("<11QQII", *fields, plan.data + size, len(auxv), 0)
        plan.give(thread, slot, 0, False, "take the program's file")
        plan.call(
            thread,
            "set program, break, arguments and auxiliary vector",
            Nr.PRCTL,
            Prctl.SET_MM,
            SET_MM_MAP,
            plan.data,
            size,
            data=record + auxv,
        )
        plan.call(thread, "close the program's file", Nr.CLOSE, 0)
