"""Which pages of a process go into an image, and the copy of their bytes.

There is no Python object per page: pages are runs in C arrays (csrc/dump/dump_pages.h).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from dumptool._ptrace import ffi, lib
from dumptool.chain import ParentPages
from dumptool.errors import DumpError, system_error
from dumptool.mappings import Mapping
from images_spec.flags import (
    MAP_LOCKED,
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
)
from images_spec.pagemap import PagemapWriter, pages_name
from images_spec.placement import Span

BUFFER_PAGES = 256
"""Pages read and written at a time: 1 MiB, which fits in the CPU's cache."""
STEP_PAGES = 16384
"""Pages copied per call into C, after which progress is reported."""
CHUNK = 4096
"""Initial capacity of an array of runs."""
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a copy that come from writing: lp_copy_pages() reports an EIO of reading as EFAULT."""
HUGE_SIZE = 2 << 20
ENTRY_FILE = 1 << 61
"""Bit of an entry of /proc/<pid>/pagemap: not an anonymous page (Documentation/admin-guide/mm/pagemap.rst)."""

WANTED = (
    lib.LP_PAGE_WPALLOWED
    | lib.LP_PAGE_WRITTEN
    | lib.LP_PAGE_SOFT_DIRTY
    | lib.LP_PAGE_PFNZERO
    | lib.LP_PAGE_HUGE
)
NEVER = (1 << 63, 0)
"""Categories that no page has."""

Progress = Callable[[int], None]
"""Receives the number of pages copied since the last call."""


@dataclass(frozen=True, slots=True)
class Marks:
    """How pages are labelled.

    ``with_``, ``without``: categories (LP_PAGE_*) that a page unchanged since the parent level has, and has not;
    both 0: unknown, all pages count as changed. ``lazy_dump``: pages that can be lazy are not written
    (``--lazy-pages``). ``lazy_parents``: unchanged pages that can be lazy are PARENT | LAZY, not only PARENT.
    """

    with_: int = 0
    without: int = 0
    lazy_dump: bool = False
    lazy_parents: bool = True

    @property
    def known(self) -> bool:
        return bool(self.with_ or self.without)

    def unchanged(self, *, lazy: bool) -> int:
        return PE_PARENT | (PE_LAZY if lazy and self.lazy_parents else 0)

    def changed(self, *, lazy: bool) -> int:
        if not lazy:
            return PE_PRESENT
        return PE_LAZY if self.lazy_dump else PE_LAZY | PE_PRESENT


class Runs:
    """A growing array of ``struct lp_run``. Iteration yields (start, end, flags)."""

    def __init__(self, room: int = CHUNK) -> None:
        self.array = ffi.new("struct lp_run[]", max(room, 1))
        self.room, self.count = max(room, 1), 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for index in range(self.count):
            run = self.array[index]
            yield int(run.start), int(run.end), int(run.flags)

    def reserve(self, more: int) -> None:
        """Makes room for ``more`` further runs."""
        if self.count + more > self.room:
            room = max(2 * self.room, self.count + more)
            array = ffi.new("struct lp_run[]", room)
            ffi.memmove(array, self.array, self.count * ffi.sizeof("struct lp_run"))
            self.array, self.room = array, room

    def append(self, start: int, end: int, flags: int) -> None:
        """Adds a run at the end."""
        self.reserve(1)
        run = self.array[self.count]
        run.start, run.end, run.flags = start, end, flags
        self.count += 1

    def extend(self, others: Runs) -> None:
        """Adds runs at the end."""
        self.reserve(others.count)
        ffi.memmove(self.end, others.array, others.count * ffi.sizeof("struct lp_run"))
        self.count += others.count

    @property
    def end(self) -> Any:
        """Pointer behind the last run."""
        return self.array + self.count

    def pages(self, flags: int = 0) -> int:
        """The number of pages in runs that have all of ``flags``."""
        return int(lib.lp_count_run_pages(self.array, self.count, flags))

    def rewritten(self, function: Callable[..., int], *arguments: object) -> Runs:
        """The runs that a function of dump_pages.h makes of these."""
        room = self.count + CHUNK
        while True:
            made = Runs(room)
            made.count = function(self.array, self.count, *arguments, made.array, made.room)
            if made.count <= made.room:
                return made
            room = made.count


@lru_cache(maxsize=1)
def guard_category() -> int:
    """LP_PAGE_GUARD where the kernel knows it (Linux 6.15), else 0."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for category in (lib.LP_PAGE_GUARD, 0):
            what = ffi.new("struct lp_scan *", {"any": lib.LP_PAGE_PRESENT, "wanted": category})
            at, count, runs = ffi.new("uint64_t *"), ffi.new("size_t *"), Runs(1)
            if lib.lp_scan_pages(fd, what, at, PAGE_SIZE, runs.array, runs.room, count) == 0:
                return int(category)
    finally:
        os.close(fd)
    return 0


@dataclass(slots=True)
class Part:
    """Runs that are copied in the same way. ``readable``: see Mapping; ``drop_zero``: a zero page gets no entry."""

    runs: Runs
    readable: bool
    drop_zero: bool


def scan(
    pagemap_fd: int,
    mappings: Iterable[Mapping],
    marks: Marks,
    *,
    protect: bool = False,
    stack_pointers: Sequence[int] = (),
    fresh: Collection[int] = frozenset(),
) -> list[Part]:
    """The pages that a process does not share, labelled, in the order of addresses.

    ``fresh``: start addresses of mappings in which all pages count as changed, whatever their categories.
    ``protect``: also write-protects the pages, where our userfaultfd is registered, so that later writes are recorded.
    ``stack_pointers``: their pages are never lazy; they must be there before the task runs.
    """
    pins = sorted({pointer // PAGE_SIZE * PAGE_SIZE for pointer in stack_pointers})
    pages = ffi.new("uint64_t[]", pins)
    parts = []
    private = (mapping for mapping in mappings if mapping.private)
    for (readable, file_backed), group in groupby(private, lambda one: (one.readable, one.file_backed)):
        runs = Runs()
        for mapping in group:
            first = runs.count
            if mapping.whole:
                runs.append(mapping.entry.start, mapping.entry.end, 0)
            else:
                _scan_mapping(pagemap_fd, mapping, protect, runs)
                if marks.without & lib.LP_PAGE_SOFT_DIRTY:
                    doubt_huge_zeros(pagemap_fd, runs, first)
            lib.lp_label_runs(
                runs.array + first,
                runs.count - first,
                *(
                    (marks.with_, marks.without)
                    if marks.known and not (mapping.entry.start in fresh or mapping.whole)
                    else NEVER
                ),
                marks.unchanged(lazy=mapping.lazy),
                marks.changed(lazy=mapping.lazy),
            )
        if runs.count:
            runs = runs.rewritten(lib.lp_pin_pages, pages, len(pins))
            parts.append(Part(runs, readable, not file_backed))
    return parts


def _scan_mapping(pagemap_fd: int, mapping: Mapping, protect: bool, runs: Runs) -> None:
    what = ffi.new(
        "struct lp_scan *",
        {
            # Guard regions look like swapped pages. They must be excluded here: ``protect`` would mark them.
            "excluded": guard_category() | (lib.LP_PAGE_FILE if mapping.file_backed else lib.LP_PAGE_PFNZERO),
            "any": lib.LP_PAGE_PRESENT | lib.LP_PAGE_SWAPPED,
            "wanted": WANTED,
            "protect": protect,
        },
    )
    at, count = ffi.new("uint64_t *", mapping.entry.start), ffi.new("size_t *")
    while at[0] < mapping.entry.end:
        runs.reserve(CHUNK)
        outcome = lib.lp_scan_pages(
            pagemap_fd, what, at, mapping.entry.end, runs.end, runs.room - runs.count, count
        )
        runs.count += count[0]
        if outcome == -1 and protect:  # EPERM: not registered with our userfaultfd
            what.protect = False
        elif outcome:
            raise system_error(-outcome, f"pages of {mapping.entry.start:#x}-{mapping.entry.end:#x}")


def guard_regions(pid: int, mappings: Iterable[Mapping]) -> list[Span]:
    """Guard regions (MADV_GUARD_INSTALL) of a frozen process, in the order of addresses (images_spec/mm.md).

    Empty if the kernel can't report them; then the dump fails when it reads one. Raises ``DumpError``.
    """
    if not guard_category():
        return []
    what = ffi.new("struct lp_scan *", {"required": guard_category()})
    at, count, runs = ffi.new("uint64_t *"), ffi.new("size_t *"), Runs()
    found: list[Span] = []
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in mappings:
            if mapping.entry.status & (VMA_VSYSCALL | VMA_VVAR | VMA_VDSO):
                continue
            at[0], end = mapping.entry.start, mapping.entry.end
            while at[0] < end:
                outcome = lib.lp_scan_pages(fd, what, at, end, runs.array, runs.room, count)
                if outcome:
                    raise system_error(-outcome, f"guard regions of {mapping.entry.start:#x}-{end:#x}")
                runs.count = count[0]
                if runs.count and mapping.entry.flags & MAP_LOCKED:
                    raise DumpError(
                        f"pid {pid}: locked memory at {mapping.entry.start:#x} has guard regions (madvise), "
                        "which can't be installed there: call munlock or remove them"
                    )
                for first, last, _ in runs:
                    before = found.pop() if found and found[-1].end == first else Span(first, first)
                    found.append(Span(before.start, last))
    finally:
        os.close(fd)
    return found


def doubt_huge_zeros(pagemap_fd: int, runs: Runs, first: int) -> None:
    """Labels runs that contain the huge zero page as written: a read that maps it sets no soft-dirty bit.

    Not all kernels from 6.7 on report it as PFNZERO in PAGEMAP_SCAN; in /proc/<pid>/pagemap it is never anonymous.
    """
    for index in range(first, runs.count):
        run = runs.array[index]
        if run.flags & lib.LP_PAGE_HUGE and not run.flags & lib.LP_PAGE_SOFT_DIRTY:
            for address in range(run.start, run.end, HUGE_SIZE):
                (entry,) = struct.unpack("<Q", os.pread(pagemap_fd, 8, address // PAGE_SIZE * 8))
                if entry & ENTRY_FILE:
                    run.flags |= lib.LP_PAGE_SOFT_DIRTY
                    break


def only_in_parent(parts: Iterable[Part], parent: ParentPages | None, marks: Marks) -> list[Part]:
    """Keeps PARENT only for pages that the parent levels have; all others become data (or lazy)."""
    held, count = (ffi.NULL, 0) if parent is None else (parent.extents_pointer, len(parent.extents))
    return [
        Part(
            part.runs.rewritten(lib.lp_check_parent, held, count, not marks.lazy_dump),
            part.readable,
            part.drop_zero,
        )
        for part in parts
    ]


@dataclass(slots=True)
class Counts:
    """Numbers of pages: scanned, unchanged since the parent, written, not written but lazy."""

    scanned: int = 0
    in_parent: int = 0
    written: int = 0
    lazy: int = 0

    def add(self, other: Counts) -> None:
        self.scanned += other.scanned
        self.in_parent += other.in_parent
        self.written += other.written
        self.lazy += other.lazy


@dataclass(frozen=True, slots=True)
class Source:
    """Where bytes are read from: the memory of ``pid``; the page with address 0 of the runs is at ``base``.

    ``running``: the process runs; pages that have vanished are left out.
    ``compare``: pages with the same bytes there become PARENT. ``name``: for messages. ``memory``: kept alive.
    """

    pid: int
    base: int = 0
    name: str = ""
    running: bool = False
    compare: ParentPages | None = None
    memory: object = None

    def __str__(self) -> str:
        return self.name or f"pid {self.pid}"


class Image(Protocol):
    """An open image of the pages of one process.

    ``pages_fd``: pages are written to it, at its file position. ``step_pages``: about how many before ``add`` is
    called. ``durable``: an fsync will follow.
    """

    @property
    def pages_fd(self) -> int: ...

    @property
    def step_pages(self) -> int: ...

    @property
    def durable(self) -> bool: ...

    def add(self, runs: Runs) -> None:
        """Adds the entries of one step; the pages of the PRESENT ones have been written to ``pages_fd``."""


class Sink(Protocol):
    """A place for one image."""

    def open(self) -> AbstractContextManager[Image]:
        """Opens the image; call it once. Raises ``DumpError``, ``ImageError``."""

    def remove(self) -> None:
        """Removes the image."""


@dataclass(frozen=True, slots=True)
class _LocalImage:
    pages_fd: int
    writer: PagemapWriter
    durable: bool
    step_pages: int = STEP_PAGES

    def add(self, runs: Runs) -> None:
        for start, end, flags in runs:
            self.writer.add(start, (end - start) // PAGE_SIZE, flags)


@dataclass(frozen=True, slots=True)
class Target:
    """A ``Sink`` on the disk: a pagemap of the given name, and pages-<pages_id>.img in the same directory.

    ``keep``: see ``dumptool.output.Output``.
    """

    directory: Path
    pagemap_name: str
    pages_id: int
    keep: Callable[[Path, int], None] | None = None

    @property
    def pages(self) -> Path:
        return self.directory / pages_name(self.pages_id)

    @contextmanager
    def open(self) -> Iterator[Image]:
        """Creates both files. Raises ``DumpError``, ``ImageError``."""
        path = self.pages
        try:
            pages_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DumpError(f"{path}: can't be written: {error.strerror}") from None
        try:
            with PagemapWriter(self.directory / self.pagemap_name, self.pages_id, self.keep) as writer:
                yield _LocalImage(pages_fd, writer, self.keep is not None)
            if self.keep is not None:
                self.keep(path, pages_fd)
        finally:
            _close(pages_fd, path)

    def remove(self) -> None:
        """Removes both files."""
        self.pages.unlink(missing_ok=True)
        (self.directory / self.pagemap_name).unlink(missing_ok=True)


def _close(fd: int, path: Path) -> None:
    try:
        os.close(fd)
    except OSError as error:  # some network file systems report failed writes here
        raise DumpError(f"{path}: can't be written: {error.strerror}") from None


def write(target: Sink, source: Source, parts: Sequence[Part], marks: Marks, progress: Progress) -> Counts:
    """Writes a pagemap and its pages. Raises ``DumpError`` (memory, network) or ``ImageError`` (files)."""
    counts = Counts()
    with target.open() as image:
        for part in parts:
            counts.scanned += part.runs.pages()
            for runs in _copied(image, source, part, marks):
                image.add(runs)
                written = runs.pages(PE_PRESENT)
                counts.in_parent += runs.pages(PE_PARENT)
                counts.lazy += runs.pages() - runs.pages(PE_PRESENT) - runs.pages(PE_PARENT)
                counts.written += written
                progress(written)
    return counts


def _copied(image: Image, source: Source, part: Part, marks: Marks) -> Iterator[Runs]:
    """Copies a part step by step; yields the pagemap entries of each step."""
    with ExitStack() as stack:
        mem_fd = -1
        if not part.readable:
            mem_fd = os.open(f"/proc/{source.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, mem_fd)
        parent = ffi.NULL if source.compare is None else stack.enter_context(source.compare.opened())
        buffer = ffi.new("unsigned char[]", 2 * BUFFER_PAGES * PAGE_SIZE)
        copy = ffi.new(
            "struct lp_copy *",
            {
                "pid": source.pid,
                "base": source.base,
                "mem_fd": mem_fd,
                "pages_fd": image.pages_fd,
                "durable": image.durable,
                "drop_zero": part.drop_zero,
                "drop_missing": source.running,
                "parent": parent,
                "same_lazy": marks.unchanged(lazy=True),
                "buffer": buffer,
                "buffer_size": BUFFER_PAGES * PAGE_SIZE,
            },
        )
        cursor, found, written = (ffi.new(kind) for kind in ("struct lp_cursor *", "size_t *", "uint64_t *"))
        made = Runs(image.step_pages + BUFFER_PAGES + part.runs.count)
        while cursor.run < part.runs.count:
            found[0] = 0
            outcome = lib.lp_copy_pages(
                copy,
                part.runs.array,
                part.runs.count,
                cursor,
                image.step_pages,
                made.array,
                made.room,
                found,
                written,
            )
            if outcome == -14:  # EFAULT
                run = part.runs.array[cursor.run]
                raise DumpError(f"{source}: page {run.start + cursor.offset:#x} can't be read")
            if -outcome in OF_WRITING:
                path = os.readlink(f"/proc/self/fd/{image.pages_fd}")
                raise DumpError(f"{path}: can't be written: {os.strerror(-outcome)}")
            if outcome:
                raise system_error(-outcome, f"copying pages of {source}")
            made.count = found[0]
            yield made


def shared_part(fd: int, size: int) -> Part:
    """The allocated pages of shared memory. ``fd``: opened on it; addresses are offsets. Raises ``DumpError``."""
    runs = Runs()
    at = 0
    try:
        while at < size and (start := _next_data(fd, at)) is not None and start < size:
            at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            runs.append(start // PAGE_SIZE * PAGE_SIZE, -(-at // PAGE_SIZE) * PAGE_SIZE, PE_PRESENT)
    except OSError as error:
        raise DumpError(f"can't find the pages of shared memory: {error.strerror}") from None
    return Part(runs, readable=True, drop_zero=True)


def _next_data(fd: int, at: int) -> int | None:
    """The next offset with data; None if only a hole follows (lseek(2)). Raises OSError."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None
