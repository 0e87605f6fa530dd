"""Where each page of a task is: the Python interface of csrc/images/placement.c (images_spec/placement.md).

Python objects of extents are made only on access.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from images_spec._pagemap import ffi, lib
from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE, is_guard, lazy_capable
from images_spec.pagemap import Pagemap

if TYPE_CHECKING:
    from images_spec.mm_pb2 import MmEntry, VmaEntry

LAST_PAGE: Final = (1 << 64) - PAGE_SIZE
"""Behind the last address of any pagemap."""

SOURCE_REMOTE: Final[int] = lib.LP_SOURCE_REMOTE
"""``Extent.source``: lazy, and a page server has the data."""
SOURCE_LOST: Final[int] = lib.LP_SOURCE_LOST
"""``Extent.source``: in a pagemap, but no level has the data."""


class Extent(NamedTuple):
    """A run of pages whose data is in one place.

    ``start``: address at dump time. ``source``: the level with the data (0: the task's own image, 1:
    its parent, ...) or ``SOURCE_*``. ``offset``: of the first page in that level's pages file, bytes.
    ``lazy``: the restorer leaves the pages to the daemon.
    """

    start: int
    nr_pages: int
    offset: int
    source: int
    lazy: bool

    @property
    def end(self) -> int:
        """The address behind the last page."""
        return self.start + self.nr_pages * PAGE_SIZE


class PageCount(NamedTuple):
    """Numbers of pages."""

    lazy: int = 0
    eager: int = 0

    @property
    def total(self) -> int:
        return self.lazy + self.eager


class PageCounts(NamedTuple):
    """Numbers of pages, in each level of the chain and in none."""

    levels: tuple[PageCount, ...]
    remote: PageCount
    lost: PageCount


class Span(NamedTuple):
    """Addresses ``[start, end)``."""

    start: int
    end: int


class ExtentTable:
    """All pages in a task's pagemap: a sorted array of ``struct lp_extent`` (csrc/common/extent.h).

    Created by ``resolve``.
    """

    def __init__(self, table: Any, nr_levels: int) -> None:
        self._table = ffi.gc(table, lib.lp_extents_free, table.count * ffi.sizeof("struct lp_extent"))
        self.nr_levels = nr_levels

    @property
    def address(self) -> int:
        """Address of the first ``struct lp_extent``, for other C modules; valid while this object lives."""
        return int(ffi.cast("uintptr_t", self._table.extents))

    def __len__(self) -> int:
        count: int = self._table.count
        return count

    def __getitem__(self, index: int) -> Extent:
        index = range(len(self))[operator.index(index)]
        extent = self._table.extents[index]
        return Extent(extent.start, extent.nr_pages, extent.offset, extent.source, bool(extent.lazy))

    def __iter__(self) -> Iterator[Extent]:
        return map(self.__getitem__, range(len(self)))

    def find(self, address: int) -> Extent | None:
        """The extent that contains the address."""
        at = bisect_right(self._starts, address) - 1
        extent = self[at] if at >= 0 else None
        return extent if extent is not None and address < extent.end else None

    @cached_property
    def _starts(self) -> memoryview:
        """``start`` of each extent, where it is."""
        size = ffi.sizeof("struct lp_extent")
        return memoryview(ffi.buffer(self._table.extents, len(self) * size)).cast("Q")[:: size // 8]

    def counts(self) -> PageCounts:
        """Counts all pages, by place."""
        return self.counts_within([Span(0, LAST_PAGE)])[0]

    def counts_within(self, spans: Sequence[Span]) -> list[PageCounts]:
        """Counts the pages in each of the spans (page aligned, sorted, disjoint), by place."""
        width = self.nr_levels + 2
        rows = ffi.new("struct lp_page_count[]", len(spans) * width)
        lib.lp_count_pages(
            self._table, self.nr_levels, ffi.new("struct lp_span[]", list(spans)), len(spans), rows
        )
        counts = [PageCount(row.lazy, row.eager) for row in rows]
        return [
            PageCounts(tuple(counts[at : at + self.nr_levels]), *counts[at + self.nr_levels : at + width])
            for at in range(0, len(counts), width)
        ]

    def filled_from(self, other: ExtentTable) -> ExtentTable:
        """The same pages, but those that are lazy and in no level here are taken from ``other`` if it has them.

        The levels of ``other`` are numbered from ``nr_levels`` on.
        """
        table = ffi.new("struct lp_extents *")
        if lib.lp_fill(self._table, self.nr_levels, other._table, table):
            raise MemoryError
        return ExtentTable(table, self.nr_levels + other.nr_levels)

    def without(self, spans: Sequence[Span]) -> ExtentTable:
        """The same pages without those in the spans (page aligned, sorted, disjoint): guard regions."""
        if not spans:
            return self
        table = ffi.new("struct lp_extents *")
        if lib.lp_exclude(self._table, ffi.new("struct lp_span[]", list(spans)), len(spans), table):
            raise MemoryError
        return ExtentTable(table, self.nr_levels)

    def check_covered(self, spans: Sequence[Span], path: Path) -> None:
        """Raises ``ImageError`` (for the pagemap at ``path``) if a lazy page lies in none of the spans.

        Such a page would not be registered with userfaultfd, and the restorer would leave it out: the task would read
        zeros. ``spans``: from ``lazy_vmas``.
        """
        array, found = ffi.new("struct lp_span[]", list(spans)), ffi.new("struct lp_span *")
        if lib.lp_find_uncovered(self._table, array, len(spans), found):
            raise ImageError(
                path,
                f"pages {found.start:#x}-{found.end:#x} are lazy, but no mapping there can be (see mm image)",
            )


def resolve(levels: Sequence[Pagemap | None], *, remote: bool) -> ExtentTable:
    """Places every page of ``levels[0]``, the top of a chain. ``None``: a level without pages of the task.

    ``remote``: a page server has the pages that are lazy and nowhere in the chain; without one they
    are lost. Time is linear in the entries of all levels. Lost pages are not an error here: see
    ``ExtentTable.counts``.
    """
    if not levels:
        raise ValueError("a chain has at least one level")
    array = ffi.new("struct lp_level[]", len(levels))
    for place, pagemap in zip(array, levels, strict=True):
        if pagemap is not None:
            place.entries, place.count = pagemap.entries_pointer, len(pagemap)
    table = ffi.new("struct lp_extents *")
    if lib.lp_place(array, len(levels), remote, table):
        raise MemoryError
    return ExtentTable(table, len(levels))


def mappings(mm: MmEntry) -> list[VmaEntry]:
    """The entries of an mm image that are mappings, not guard regions."""
    return [vma for vma in mm.vmas if not is_guard(vma.status)]


def lazy_vmas(mm: MmEntry, path: Path) -> list[Span]:
    """The mappings that the restorer registers with userfaultfd, sorted; adjacent ones are not merged.

    Raises ``ImageError`` (for the mm image at ``path``) if mappings of any kind are unsorted,
    overlapping, unaligned or empty.
    """
    vmas = mappings(mm)
    return [
        span
        for vma, span in zip(vmas, _checked(vmas, "mapping", path), strict=True)
        if lazy_capable(vma.flags, vma.status)
    ]


def guard_regions(mm: MmEntry, path: Path) -> list[Span]:
    """Pages that raise SIGSEGV on access (MADV_GUARD_INSTALL), sorted.

    They are neither data nor zero, whatever the pagemap says. They lie within mappings, and one region may
    span several. Raises ``ImageError`` (for the mm image at ``path``) if they are unsorted, overlapping,
    unaligned, empty, or where nothing is mapped.
    """
    spans = _checked([vma for vma in mm.vmas if is_guard(vma.status)], "guard region", path)
    mapped = iter(mappings(mm))
    vma = next(mapped, None)
    for span in spans:
        at = span.start
        while at < span.end:
            while vma is not None and vma.end <= at:
                vma = next(mapped, None)
            if vma is None or vma.start > at:
                raise ImageError(
                    path, f"guard region {span.start:#x}-{span.end:#x}: nothing is mapped at {at:#x}"
                )
            at = vma.end
    return spans


def _checked(vmas: Sequence[VmaEntry], kind: str, path: Path) -> list[Span]:
    """The spans of the entries, after the checks that ``lazy_vmas`` and ``guard_regions`` have in common."""
    before = 0
    for vma in vmas:
        name = f"{kind} {vma.start:#x}-{vma.end:#x}"
        if vma.start % PAGE_SIZE or vma.end % PAGE_SIZE:
            raise ImageError(path, f"{name} is not page aligned")
        if vma.start >= vma.end:
            raise ImageError(path, f"{name} is empty")
        if vma.start < before:
            raise ImageError(path, f"{name} is not sorted or overlaps the one before it")
        before = vma.end
    return [Span(vma.start, vma.end) for vma in vmas]
