"""Which pages of a process that CRIU has stopped are written. Its pagemap says which there are, and we which changed.

With ``--lazy-pages`` CRIU writes no page that can be lazy. In our pagemap each of its pages has a place: in the parent
level, in our pages file, or (lazy) in the memory of the stopped tree. The few pages that CRIU has written itself are
read again, because pages are in a pages file in the order of addresses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dumptool import memory
from dumptool._ptrace import lib
from dumptool.chain import ParentPages
from dumptool.level import Changes, PageJob, scan
from dumptool.mappings import PROT_READ, Mapping
from dumptool.memory import Marks, Part, Runs, Sink, Source
from dumptool.tracking import Armed, Held
from images_spec import images
from images_spec.flags import (
    MAP_PRIVATE,
    PAGE_SIZE,
    PE_LAZY,
    PE_PRESENT,
    VMA_FILE_PRIVATE,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
    is_guard,
    lazy_capable,
)
from images_spec.images import Kind
from images_spec.messages import VmaEntry
from images_spec.pagemap import Pagemap


@dataclass(slots=True)
class StoppedTask:
    """A process of a tree that CRIU has stopped. ``image_pid``: its pid in the images. Else as ``FrozenTask``.

    ``armed``: set before ``find_pages``.
    """

    pid: int
    image_pid: int
    parent: ParentPages | None
    pidfd: int | None
    held: Held | None
    armed: Armed | None = None
    job: PageJob | None = None


def find_pages(task: StoppedTask, written: Path, target: Sink, changes: Changes) -> None:
    """Sets ``task.job``. Writes are tracked from now on if the tracker is armed.

    ``written``: directory of CRIU's images. Raises ``DumpError``, ``ImageError``.
    """
    marks = changes.marks
    vmas = images.read_one(written / Kind.MM.file_name(task.image_pid), Kind.MM).vmas
    pagemap = Pagemap.load(written / Kind.PAGEMAP.file_name(task.image_pid))
    described = [mapping(entry) for entry in vmas if not is_guard(entry.status)]
    runs = _runs(pagemap, described, marks)
    if changes.vouched is not None or task.armed is not None:
        runs = _without_unchanged(task, runs, described, changes)
    (part,) = memory.only_in_parent(
        [Part(runs, readable(runs, described), drop_zero=False)], task.parent, marks
    )
    task.job = PageJob(Source(task.pid, compare=changes.compare), target, [part], marks)


def mapping(entry: VmaEntry) -> Mapping:
    """A mapping of an mm image that CRIU wrote."""
    special = entry.status & (VMA_VVAR | VMA_VSYSCALL)
    return Mapping(
        entry=entry,
        private=bool(entry.flags & MAP_PRIVATE) and not special,
        file_backed=bool(entry.status & VMA_FILE_PRIVATE),
        lazy=lazy_capable(entry.flags, entry.status),
        readable=bool(entry.prot & PROT_READ),
        whole=bool(entry.status & VMA_VDSO),
    )


def _runs(pagemap: Pagemap, described: Sequence[Mapping], marks: Marks) -> Runs:
    """The entries, adjacent ones joined. CRIU cuts them at the size of its pipes.

    If the stack pointer of a thread is the first byte of a page, CRIU takes all pages for its stack, and none is lazy
    (docs/criu.md, "Pagemap"). Then the mappings decide.
    """
    runs = Runs(len(pagemap))
    entries = list(pagemap)
    pieces: Iterable[tuple[int, int, bool]]
    if any(flags & PE_LAZY for _, _, flags in entries):
        pieces = ((at, at + count * PAGE_SIZE, bool(flags & PE_LAZY)) for at, count, flags in entries)
    else:
        pieces = _by_mapping([(at, at + count * PAGE_SIZE) for at, count, _ in entries], described)
    last = None
    for start, end, lazy in pieces:
        flags = marks.changed(lazy=lazy)
        if last is not None and last.end == start and last.flags == flags:
            last.end = end
        else:
            runs.append(start, end, flags)
            last = runs.array[runs.count - 1]
    return runs


def _by_mapping(
    ranges: Iterable[tuple[int, int]], described: Sequence[Mapping]
) -> Iterator[tuple[int, int, bool]]:
    """The ranges, cut at the mappings that they are in, and whether these can be lazy. Both are in order of address."""
    index = 0
    for start, end in ranges:
        at = start
        while at < end:
            while index < len(described) and described[index].entry.end <= at:
                index += 1
            inside = index < len(described) and described[index].entry.start <= at
            stop = described[index].entry.end if inside else end
            if not inside and index < len(described):
                stop = described[index].entry.start
            yield at, min(stop, end), inside and described[index].lazy
            at = min(stop, end)


def _without_unchanged(task: StoppedTask, runs: Runs, described: Sequence[Mapping], changes: Changes) -> Runs:
    scanned = scan(task.pid, described, changes, task.armed)
    found = Runs(sum(part.runs.count for part in scanned))
    for part in scanned:
        found.extend(part.runs)
    return runs.rewritten(lib.lp_mark_unchanged, found.array, found.count, changes.marks.lazy_parents)


def readable(runs: Runs, described: Sequence[Mapping]) -> bool:
    """Whether process_vm_readv can read all pages that will be copied."""
    hidden = [(one.entry.start, one.entry.end) for one in described if not one.readable]
    if not hidden:
        return True
    starts = [start for start, _, flags in runs if flags & PE_PRESENT]
    ends = [end for _, end, flags in runs if flags & PE_PRESENT]
    for start, end in hidden:
        index = bisect_left(ends, start + 1)
        if index < len(starts) and starts[index] < end:
            return False
    return True
