"""The placement rule against a stupid model: a dictionary of pages."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images_spec import images, pagemap
from images_spec.errors import ImageError
from images_spec.flags import (
    MAP_ANONYMOUS,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    VMA_ANON_PRIVATE,
    VMA_GUARD,
    VMA_HEAP,
    VMA_REGULAR,
    VMA_VDSO,
    VMA_VSYSCALL,
    VMA_VVAR,
    lazy_capable,
)
from images_spec.images import Kind
from images_spec.messages import MmEntry, PagemapEntry, PagemapHead, VmaEntry
from images_spec.pagemap import Pagemap
from images_spec.placement import (
    SOURCE_LOST,
    SOURCE_REMOTE,
    Extent,
    ExtentTable,
    PageCount,
    PageCounts,
    Span,
    guard_regions,
    lazy_vmas,
    mappings,
    resolve,
)
from tests.support.examples import examples

PATH = Path("pagemap-1.img")

Entries = list[tuple[int, int, int]]
"""Of one level: first page (a number, not an address), count, flags."""


class Place(NamedTuple):
    """Where one page is; ``offset`` is None where there is no file."""

    source: int
    offset: int | None
    lazy: bool


def in_memory(entries: Entries) -> Pagemap:
    messages: list[tuple[PagemapHead | PagemapEntry, bytes]] = [(PagemapHead(pages_id=1), b"")]
    for page, count, flags in entries:
        messages.append((PagemapEntry(vaddr=page * PAGE_SIZE, compat_nr_pages=count, flags=flags), b""))
    return Pagemap(b"".join(images.encode(Kind.PAGEMAP, messages, PATH)), PATH)


def table(levels: Sequence[Entries | None], *, remote: bool = False) -> ExtentTable:
    return resolve([None if level is None else in_memory(level) for level in levels], remote=remote)


# The model


def page_dict(entries: Entries | None) -> dict[int, tuple[int, int]]:
    """Page -> flags, and offset in the pages file of the next PRESENT page."""
    pages, offset = {}, 0
    for first, count, flags in entries or []:
        for page in range(first, first + count):
            pages[page] = (flags, offset)
            if flags & PE_PRESENT:
                offset += PAGE_SIZE
    return pages


def model(levels: Sequence[Entries | None], *, remote: bool) -> dict[int, Place]:
    dicts = [page_dict(level) for level in levels]
    places = {}
    for page, (top, _) in dicts[0].items():
        lazy = bool(top & PE_LAZY)
        level = 0
        while level < len(dicts) and page in dicts[level] and dicts[level][page][0] & PE_PARENT:
            level += 1
        flags, offset = dicts[level].get(page, (0, 0)) if level < len(dicts) else (0, 0)
        if flags & PE_PRESENT:
            places[page] = Place(level, offset, lazy)
        elif level == 0 and lazy and remote:
            places[page] = Place(SOURCE_REMOTE, None, lazy)
        else:
            places[page] = Place(SOURCE_LOST, None, lazy)
    return places


def as_pages(extents: Sequence[Extent]) -> dict[int, Place]:
    pages: dict[int, Place] = {}
    for extent in extents:
        for index in range(extent.nr_pages):
            page = extent.start // PAGE_SIZE + index
            assert page not in pages
            offset = None if extent.source >= SOURCE_REMOTE else extent.offset + index * PAGE_SIZE
            pages[page] = Place(extent.source, offset, extent.lazy)
    return pages


def continues(first: Extent, second: Extent) -> bool:
    """Whether two neighbours should have been one extent."""
    if (first.end, first.source, first.lazy) != (second.start, second.source, second.lazy):
        return False
    return first.source >= SOURCE_REMOTE or first.offset + second.start - first.start == second.offset


@st.composite
def levels_of_pages(draw: st.DrawFn) -> Entries:
    entries, page = [], 0
    for gap, count in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=10)):
        entries.append((page + gap, count, draw(st.integers(0, 7))))
        page += gap + count
    return entries


chains = st.lists(st.none() | levels_of_pages(), min_size=1, max_size=5)


@st.composite
def sorted_spans(draw: st.DrawFn) -> list[Span]:
    spans, page = [], 0
    for gap, count in draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20)), max_size=6)):
        spans.append(Span((page + gap) * PAGE_SIZE, (page + gap + count) * PAGE_SIZE))
        page += gap + count
    return spans


@settings(max_examples=examples(600))
@given(chains, st.booleans())
def test_agrees_with_page_dict(levels: list[Entries | None], remote: bool) -> None:
    extents = list(table(levels, remote=remote))
    assert as_pages(extents) == model(levels, remote=remote)
    for first, second in pairwise(extents):
        assert first.end <= second.start
        assert not continues(first, second)


def counted(places: Sequence[Place], nr_levels: int) -> PageCounts:
    numbers = Counter((place.source, place.lazy) for place in places)

    def row(source: int) -> PageCount:
        return PageCount(lazy=numbers[source, True], eager=numbers[source, False])

    return PageCounts(tuple(map(row, range(nr_levels))), row(SOURCE_REMOTE), row(SOURCE_LOST))


@pytest.mark.slow
@settings(max_examples=examples(300))
@given(chains, st.booleans(), sorted_spans())
def test_counts_agree_with_page_dict(levels: list[Entries | None], remote: bool, spans: list[Span]) -> None:
    placed, places = table(levels, remote=remote), model(levels, remote=remote)
    assert placed.counts() == counted(list(places.values()), len(levels))
    inside = [
        [place for page, place in places.items() if span.start <= page * PAGE_SIZE < span.end]
        for span in spans
    ]
    assert placed.counts_within(spans) == [counted(part, len(levels)) for part in inside]


@pytest.mark.slow
@settings(max_examples=examples(300))
@given(chains, st.booleans(), sorted_spans())
def test_exclusion_agrees_with_page_dict(
    levels: list[Entries | None], remote: bool, spans: list[Span]
) -> None:
    extents = list(table(levels, remote=remote).without(spans))
    places = model(levels, remote=remote)
    for span in spans:
        for page in range(span.start // PAGE_SIZE, span.end // PAGE_SIZE):
            places.pop(page, None)
    assert as_pages(extents) == places
    for first, second in pairwise(extents):
        assert first.end <= second.start
        assert not continues(first, second)


@pytest.mark.slow
@settings(max_examples=examples(300))
@given(levels_of_pages(), sorted_spans())
def test_coverage_agrees_with_page_dict(entries: Entries, spans: list[Span]) -> None:
    placed = table([entries])
    covered = {page for span in spans for page in range(span.start // PAGE_SIZE, span.end // PAGE_SIZE)}
    lazy = [page for page, place in model([entries], remote=False).items() if place.lazy]
    bare = [page for page in lazy if page not in covered]
    if not bare:
        placed.check_covered(spans, PATH)
        return
    with pytest.raises(ImageError, match=f"^{PATH}: pages {bare[0] * PAGE_SIZE:#x}-"):
        placed.check_covered(spans, PATH)


# By example

P, L, HERE = PE_PARENT, PE_LAZY, PE_PRESENT


@pytest.mark.parametrize(
    ("flags", "remote", "parent", "place"),
    [
        (0, True, None, Place(SOURCE_LOST, None, False)),
        (HERE, True, None, Place(0, 0, False)),
        (L | HERE, True, None, Place(0, 0, True)),
        (L, True, None, Place(SOURCE_REMOTE, None, True)),
        (L, False, None, Place(SOURCE_LOST, None, True)),
        (P, True, HERE, Place(1, 0, False)),
        (P, True, L | HERE, Place(1, 0, False)),
        (P | L, True, HERE, Place(1, 0, True)),
        (P | HERE, True, HERE, Place(1, 0, False)),
        (P | L | HERE, True, HERE, Place(1, 0, True)),
        (P | L, True, L, Place(SOURCE_LOST, None, True)),
        (P | L, True, 0, Place(SOURCE_LOST, None, True)),
        (P | L, True, P, Place(SOURCE_LOST, None, True)),
        (P | L, True, None, Place(SOURCE_LOST, None, True)),
    ],
)
def test_one_page(flags: int, remote: bool, parent: int | None, place: Place) -> None:
    below = None if parent is None else [(7, 1, parent)]
    assert as_pages(list(table([[(7, 1, flags)], below], remote=remote))) == {7: place}
    if parent is None:
        assert as_pages(list(table([[(7, 1, flags)]], remote=remote))) == {7: place}


def test_parent_and_present_still_takes_room_in_the_pages_file() -> None:
    extents = list(table([[(0, 2, P | HERE), (2, 1, HERE)], [(0, 2, HERE)]]))
    assert extents == [
        Extent(start=0, nr_pages=2, offset=0, source=1, lazy=False),
        Extent(start=2 * PAGE_SIZE, nr_pages=1, offset=2 * PAGE_SIZE, source=0, lazy=False),
    ]


def test_neighbours_are_merged_and_parents_split() -> None:
    top: Entries = [(0, 256, L | HERE), (256, 256, L | HERE), (512, 10, P | L)]
    below: Entries = [(510, 5, HERE), (516, 10, HERE)]
    assert list(table([top, below])) == [
        Extent(0, 512, 0, 0, True),
        Extent(512 * PAGE_SIZE, 3, 2 * PAGE_SIZE, 1, True),
        Extent(515 * PAGE_SIZE, 1, 0, SOURCE_LOST, True),
        Extent(516 * PAGE_SIZE, 6, 5 * PAGE_SIZE, 1, True),
    ]


def test_nothing_is_an_empty_table() -> None:
    chains: list[list[Entries | None]] = [[None], [[]], [None, [(0, 1, HERE)]]]
    for levels in chains:
        placed = table(levels)
        assert (len(placed), list(placed)) == (0, [])
        placed.check_covered([], PATH)
    with pytest.raises(ValueError, match="at least one level"):
        resolve([], remote=False)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 4)), max_size=30))
def test_finds_the_extent_of_an_address(runs: list[tuple[int, int]]) -> None:
    entries: Entries = []
    for start, count in sorted(runs):
        if not entries or start >= entries[-1][0] + entries[-1][1]:
            entries.append((start, count, L))
    placed = table([entries], remote=True)
    for address in range(0, 210 * PAGE_SIZE, PAGE_SIZE // 2):
        expected = [extent for extent in placed if extent.start <= address < extent.end]
        assert [placed.find(address)] == (expected or [None])


def test_is_a_sequence() -> None:
    placed = table([[(0, 1, HERE), (5, 1, L)]], remote=True)
    assert placed[1] == placed[-1] == Extent(5 * PAGE_SIZE, 1, 0, SOURCE_REMOTE, True)
    for index in (2, -3):
        with pytest.raises(IndexError):
            placed[index]


class CExtent(ctypes.Structure):
    """``struct lp_extent`` of csrc/common/extent.h."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("nr_pages", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("source", ctypes.c_uint32),
        ("lazy", ctypes.c_uint32),
    )


def test_address_is_of_the_array_that_csrc_declares() -> None:
    placed = table([[(1, 2, HERE), (3, 1, L | HERE), (9, 4, L)]], remote=True)
    array = (CExtent * len(placed)).from_address(placed.address)
    assert [(e.start, e.nr_pages, e.offset, e.source, bool(e.lazy)) for e in array] == [
        (e.start, e.nr_pages, e.offset, e.source, e.lazy) for e in placed
    ]


@pytest.mark.slow
def test_a_million_fragments_five_levels_deep(tmp_path: Path) -> None:
    """Every second page, alternately in the top level and in the lowest one."""
    count = 1_000_000

    def write(level: int, flags: Sequence[int]) -> Pagemap:
        entries = ((2 * index * PAGE_SIZE, 1, flags[index % 2]) for index in range(count))
        pagemap.write(tmp_path / f"{level}.img", 1, entries)
        return Pagemap.load(tmp_path / f"{level}.img")

    top, middle, bottom = write(0, (P | L, L | HERE)), write(1, (P, P)), write(2, (HERE, HERE))
    placed = resolve([top, middle, middle, middle, bottom], remote=False)
    assert len(placed) == count
    assert placed[-2] == Extent(2 * (count - 2) * PAGE_SIZE, 1, (count - 2) * PAGE_SIZE, 4, True)
    assert placed[-1] == Extent(2 * (count - 1) * PAGE_SIZE, 1, (count // 2 - 1) * PAGE_SIZE, 0, True)
    half, none = PageCount(lazy=count // 2), PageCount()
    assert placed.counts() == PageCounts((half, none, none, none, half), none, none)


# Which mappings can be lazy


def vma(
    start: int, end: int, flags: int = MAP_PRIVATE | MAP_ANONYMOUS, status: int = VMA_REGULAR
) -> VmaEntry:
    """Addresses in pages."""
    return VmaEntry(start=start * PAGE_SIZE, end=end * PAGE_SIZE, flags=flags, status=status)


ANON = MAP_PRIVATE | MAP_ANONYMOUS


@pytest.mark.parametrize(
    ("flags", "status", "lazy"),
    [
        (ANON, VMA_REGULAR | VMA_ANON_PRIVATE, True),
        (ANON, VMA_REGULAR | VMA_ANON_PRIVATE | VMA_HEAP, True),
        (ANON | MAP_GROWSDOWN, VMA_REGULAR | VMA_ANON_PRIVATE, True),
        (ANON | MAP_LOCKED, VMA_REGULAR | VMA_ANON_PRIVATE, False),
        (ANON | MAP_HUGETLB, VMA_REGULAR | VMA_ANON_PRIVATE, False),
        (MAP_SHARED | MAP_ANONYMOUS, VMA_REGULAR, False),
        (MAP_PRIVATE, VMA_REGULAR, False),
        (ANON, VMA_REGULAR | VMA_VDSO | VMA_ANON_PRIVATE, False),
        (ANON, VMA_REGULAR | VMA_VVAR | VMA_ANON_PRIVATE, False),
        (ANON, VMA_REGULAR | VMA_VSYSCALL | VMA_ANON_PRIVATE, False),
    ],
)
def test_lazy_capable(flags: int, status: int, lazy: bool) -> None:
    assert lazy_capable(flags, status) == lazy
    mm = MmEntry(vmas=[vma(1, 3, flags, status)])
    assert lazy_vmas(mm, PATH) == ([Span(PAGE_SIZE, 3 * PAGE_SIZE)] if lazy else [])


def test_neighbouring_mappings_stay_apart() -> None:
    mm = MmEntry(vmas=[vma(1, 3), vma(3, 4), vma(4, 5, MAP_PRIVATE), vma(5, 6)])
    spans = lazy_vmas(mm, PATH)
    assert [(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in spans] == [(1, 3), (3, 4), (5, 6)]
    table([[(1, 3, L | HERE), (4, 1, HERE)]]).check_covered(spans, PATH)
    with pytest.raises(ImageError) as caught:
        table([[(2, 4, L | HERE)]]).check_covered(spans, PATH)
    assert caught.value.what == "pages 0x4000-0x5000 are lazy, but no mapping there can be (see mm image)"


def test_the_highest_mapping_is_no_problem() -> None:
    top = (1 << 64) // PAGE_SIZE - 2561
    assert lazy_vmas(MmEntry(vmas=[vma(top, top + 1, MAP_PRIVATE, VMA_VSYSCALL)]), PATH) == []


def test_guard_regions_are_no_mappings() -> None:
    """As CRIU 4.2.1 writes them: after all mappings, inside them, one in two of them."""
    top = vma(100, 101, MAP_PRIVATE, VMA_VSYSCALL)
    mm = MmEntry(vmas=[vma(1, 5), vma(5, 9), top, vma(2, 3, 0, VMA_GUARD), vma(4, 7, 0, VMA_GUARD)])
    assert lazy_vmas(mm, PATH) == [Span(PAGE_SIZE, 5 * PAGE_SIZE), Span(5 * PAGE_SIZE, 9 * PAGE_SIZE)]
    assert guard_regions(mm, PATH) == [
        Span(2 * PAGE_SIZE, 3 * PAGE_SIZE),
        Span(4 * PAGE_SIZE, 7 * PAGE_SIZE),
    ]
    assert mappings(mm) == list(mm.vmas)[:3]


@pytest.mark.parametrize(
    ("guards", "what"),
    [
        ([(2, 3), (2, 4)], "guard region 0x2000-0x4000 is not sorted or overlaps the one before it"),
        ([(3, 3)], "guard region 0x3000-0x3000 is empty"),
        ([(0, 2)], "guard region 0x0-0x2000: nothing is mapped at 0x0"),
        ([(4, 6)], "guard region 0x4000-0x6000: nothing is mapped at 0x5000"),
        ([(4, 5), (8, 12)], "guard region 0x8000-0xc000: nothing is mapped at 0xb000"),
    ],
)
def test_broken_guard_regions_are_refused(guards: list[tuple[int, int]], what: str) -> None:
    mm = MmEntry(vmas=[vma(1, 5), vma(7, 9), vma(9, 11)])
    mm.vmas.extend(vma(start, end, 0, VMA_GUARD) for start, end in guards)
    with pytest.raises(ImageError) as caught:
        guard_regions(mm, PATH)
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("vmas", "what"),
    [
        ([{"start": 0x1001, "end": 0x2000}], "mapping 0x1001-0x2000 is not page aligned"),
        ([{"start": 0x1000, "end": 0x2001}], "mapping 0x1000-0x2001 is not page aligned"),
        ([{"start": 0x1000, "end": 0x1000}], "mapping 0x1000-0x1000 is empty"),
        ([{"start": 0x2000, "end": 0x1000}], "mapping 0x2000-0x1000 is empty"),
        (
            [{"start": 0x1000, "end": 0x3000}, {"start": 0x2000, "end": 0x4000}],
            "mapping 0x2000-0x4000 is not sorted or overlaps the one before it",
        ),
        (
            [{"start": 0x2000, "end": 0x3000}, {"start": 0x1000, "end": 0x2000}],
            "mapping 0x1000-0x2000 is not sorted or overlaps the one before it",
        ),
    ],
)
def test_broken_mappings_are_refused(vmas: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(ImageError) as caught:
        lazy_vmas(MmEntry(vmas=[VmaEntry(**fields) for fields in vmas]), Path("mm-1.img"))
    assert (caught.value.path, caught.value.what) == ("mm-1.img", what)
