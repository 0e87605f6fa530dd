"""Mappings in the form of mm images, and which of them have private pages (images_spec/mm.md)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dumptool import proc
from dumptool.core import Inside
from dumptool.survey import Task, is_shared_anonymous
from images_spec.flags import (
    MAP_ANONYMOUS,
    MAP_GROWSDOWN,
    MAP_LOCKED,
    MAP_PRIVATE,
    MAP_SHARED,
    VMA_ANON_PRIVATE,
    VMA_ANON_SHARED,
    VMA_FILE_PRIVATE,
    VMA_FILE_SHARED,
    VMA_GUARD,
    VMA_HEAP,
    VMA_REGULAR,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
    lazy_capable,
)
from images_spec.messages import MmEntry, VmaEntry
from images_spec.placement import Span

MAP_NORESERVE = 0x4000
PROT_READ = 1
AUXV_WORDS = 44
"""CRIU's restore rejects a longer vector as a corrupted image (observed with 4.1.1)."""
SPECIAL = {
    "[vdso]": VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VDSO,
    "[vvar]": VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VVAR,
    "[vvar_vclock]": VMA_REGULAR | VMA_ANON_PRIVATE | VMA_VVAR,
    "[vsyscall]": VMA_ANON_PRIVATE | VMA_VSYSCALL,
}
"""Mappings of the kernel, as CRIU 4.1.1 writes them (observed). Not REGULAR: vsyscall is never restored."""

ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}
"""VmFlags -> the MADV_* number that sets it (proc_pid_smaps(5), madvise(2))."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping that will be written: its image entry, and how its pages are read.

    ``private``: may have pages of its own. ``file_backed``: unmodified pages are in a file.
    ``lazy``: the restorer may leave pages to the daemon. ``readable``: by process_vm_readv.
    ``whole``: all pages are written, because the kernel fills them and the pagemap may not show it.
    """

    entry: VmaEntry
    private: bool
    file_backed: bool
    lazy: bool
    readable: bool
    whole: bool


FileIds = Callable[[proc.Vma, frozenset[str]], tuple[int, int]]
"""For a mapping and its VmFlags: the file's id in files.img and the O_* flags to open it with."""


def describe(layout: proc.Layout, file_id: FileIds) -> list[Mapping]:
    """All mappings of a process, in the order of addresses."""
    mappings: list[Mapping] = []
    for vma in layout.vmas:
        flags = layout.flags[vma.start]
        left_out = is_left_out(vma, flags)
        entry = _entry(vma, flags, file_id)
        before = mappings[-1].entry if mappings else None
        if before is not None and before.status & entry.status & VMA_VVAR and before.end == entry.start:
            before.end = entry.end  # [vvar] and [vvar_vclock] are one entry in CRIU's images
            continue
        special = entry.status & (VMA_VVAR | VMA_VSYSCALL)
        mappings.append(
            Mapping(
                entry=entry,
                private=bool(entry.flags & MAP_PRIVATE) and not (special or left_out),
                file_backed=bool(entry.status & VMA_FILE_PRIVATE),
                lazy=lazy_capable(entry.flags, entry.status),
                readable=bool(vma.prot & PROT_READ),
                whole=bool(entry.status & VMA_VDSO),
            )
        )
    return mappings


def is_left_out(vma: proc.Vma, flags: frozenset[str]) -> bool:
    """Whether no page of the mapping is written: a device's, huge pages (hugetlb), a shadow stack, a uprobe's.

    ``dumptool dump`` refuses these; a pre-dump leaves them to the dump. ``flags``: VmFlags (proc_pid_smaps(5)).
    """
    if vma.name in SPECIAL:
        return False
    return bool(flags & {"ht", "ss", "io", "pf"}) or (vma.name.startswith("[") and "mm" in flags)


def _entry(vma: proc.Vma, flags: frozenset[str], file_id: FileIds) -> VmaEntry:
    entry = VmaEntry(
        start=vma.start,
        end=vma.end,
        pgoff=0,
        shmid=0,
        prot=vma.prot,
        flags=MAP_SHARED if vma.shared else MAP_PRIVATE,
        status=VMA_REGULAR,
        fd=-1,
    )
    for flag, bit in (("gd", MAP_GROWSDOWN), ("lo", MAP_LOCKED), ("nr", MAP_NORESERVE)):
        if flag in flags:
            entry.flags |= bit
    advice = sum(1 << number for flag, number in ADVICE.items() if flag in flags)
    if vma.name in SPECIAL:
        entry.flags = MAP_PRIVATE | MAP_ANONYMOUS
        entry.status = SPECIAL[vma.name]
    elif is_shared_anonymous(vma):
        entry.flags |= MAP_ANONYMOUS
        entry.status |= VMA_ANON_SHARED
        entry.pgoff, entry.shmid = vma.pgoff, vma.inode
    elif vma.inode:
        entry.status |= VMA_FILE_SHARED if vma.shared else VMA_FILE_PRIVATE
        entry.pgoff = vma.pgoff
        entry.shmid, entry.fdflags = file_id(vma, flags)
    else:
        entry.flags |= MAP_ANONYMOUS
        entry.status |= VMA_ANON_PRIVATE | (VMA_HEAP if vma.name == "[heap]" else 0)
    if advice:
        entry.madv = advice
    return entry


def mm_entry(
    task: Task, inside: Inside, mappings: list[Mapping], guards: Iterable[Span], exe_id: int
) -> MmEntry:
    """The mm image of a process."""
    stat_ = task.stat
    return MmEntry(
        start_code=stat_.start_code,
        end_code=stat_.end_code,
        start_data=stat_.start_data,
        end_data=stat_.end_data,
        start_stack=stat_.start_stack,
        start_brk=stat_.start_brk,
        brk=inside.brk,
        arg_start=stat_.arg_start,
        arg_end=stat_.arg_end,
        env_start=stat_.env_start,
        env_end=stat_.env_end,
        exe_file_id=exe_id,
        saved_auxv=auxiliary_vector(proc.read(task.pid, "auxv")),
        vmas=[*(mapping.entry for mapping in mappings), *map(_guard, guards)],
        dumpable=inside.dumpable,
        thp_disabled=inside.thp_disabled,
    )


def _guard(span: Span) -> VmaEntry:
    """A guard region as CRIU 4.2 writes it (images_spec/mm.md)."""
    places = {"start": span.start, "end": span.end, "pgoff": 0, "shmid": 0}
    return VmaEntry(**places, prot=0, flags=0, status=VMA_GUARD, fd=-1)


def auxiliary_vector(data: bytes) -> tuple[int, ...]:
    """The words of /proc/<pid>/auxv, cut to ``AUXV_WORDS`` and terminated; entries beyond that are lost."""
    words = struct.unpack(f"<{len(data) // 8}Q", data)
    return words if len(words) <= AUXV_WORDS else (*words[: AUXV_WORDS - 2], 0, 0)
