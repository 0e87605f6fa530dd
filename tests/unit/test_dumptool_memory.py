"""Runs of pages against dictionaries of pages: labels, pins, parents, copies."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dumptool import memory
from dumptool._ptrace import ffi, lib
from dumptool.chain import Chain, ParentPages
from dumptool.errors import DumpError
from dumptool.memory import Marks, Part, Runs, Source, Target
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT
from images_spec.images import Kind, write
from images_spec.messages import InventoryEntry
from images_spec.pagemap import Pagemap
from images_spec.pagemap import write as write_pagemap
from images_spec.placement import resolve

BASE = 0x10000000
SPACE = 64


def address(page: int) -> int:
    return BASE + page * PAGE_SIZE


@st.composite
def page_flags(draw: st.DrawFn, values: list[int]) -> dict[int, int]:
    """Page -> flags, for some pages of a small space."""
    return draw(st.dictionaries(st.integers(0, SPACE - 1), st.sampled_from(values)))


def as_runs(pages: dict[int, int]) -> Runs:
    runs = Runs(1)
    for page in sorted(pages):
        runs.append(address(page), address(page + 1), pages[page])
    return runs


def as_pages(runs: Runs) -> dict[int, int]:
    pages: dict[int, int] = {}
    end = 0
    for start, stop, flags in runs:
        assert end <= start < stop
        end = stop
        for place in range(start, stop, PAGE_SIZE):
            pages[(place - BASE) // PAGE_SIZE] = flags
    return pages


@given(page_flags(list(range(8))), st.integers(0, 7), st.integers(0, 7))
def test_labels(pages: dict[int, int], with_: int, without: int) -> None:
    runs = as_runs(pages)
    lib.lp_label_runs(runs.array, runs.count, with_, without, 100, 200)
    assert as_pages(runs) == {
        page: 100 if has & with_ == with_ and not has & without else 200 for page, has in pages.items()
    }


FLAGS = [PE_PRESENT, PE_PRESENT | PE_LAZY, PE_LAZY, PE_PARENT, PE_PARENT | PE_LAZY]


@given(page_flags(FLAGS), st.sets(st.integers(0, SPACE - 1)))
def test_pages_with_a_stack_pointer_are_not_lazy(pages: dict[int, int], pins: set[int]) -> None:
    pinned = as_runs(pages).rewritten(
        lib.lp_pin_pages, ffi.new("uint64_t[]", [address(page) for page in sorted(pins)]), len(pins)
    )
    assert as_pages(pinned) == {
        page: (flags & ~PE_LAZY or PE_PRESENT) if page in pins else flags for page, flags in pages.items()
    }


def parent_of(pages: dict[int, int], folder: Path) -> ParentPages:
    """A chain of one level that holds these pages (its pages file is not made)."""
    path = folder / "pagemap-1.img"
    write_pagemap(path, 1, [(address(page), 1, pages[page]) for page in sorted(pages)])
    return ParentPages(resolve([Pagemap.load(path)], remote=False), [folder / "pages-1.img"])


@given(page_flags(FLAGS), page_flags(FLAGS), st.booleans())
def test_parent_only_where_the_parent_has_data(
    pages: dict[int, int], held: dict[int, int], lazy_dump: bool
) -> None:
    with TemporaryDirectory() as folder:
        parent = parent_of(held, Path(folder))
        marks = Marks(lazy_dump=lazy_dump)
        (part,) = memory.only_in_parent([Part(as_runs(pages), True, True)], parent, marks)
    expected = {}
    for page, flags in pages.items():
        if flags & PE_PARENT and not held.get(page, 0) & PE_PRESENT:
            rest = flags & ~PE_PARENT
            expected[page] = rest if rest & PE_LAZY and lazy_dump else rest | PE_PRESENT
        else:
            expected[page] = flags
    assert as_pages(part.runs) == expected


@given(page_flags(FLAGS))
def test_no_parent_at_all(pages: dict[int, int]) -> None:
    (part,) = memory.only_in_parent([Part(as_runs(pages), True, True)], None, Marks())
    assert not any(flags & PE_PARENT for flags in as_pages(part.runs).values())


class Memory:
    """Memory of this process: page -> the byte that it is full of, 0 for zero."""

    def __init__(self, contents: list[int]) -> None:
        self._map = mmap.mmap(-1, len(contents) * PAGE_SIZE)
        for page, byte in enumerate(contents):
            self._map[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([byte]) * PAGE_SIZE
        self._view = ctypes.c_char.from_buffer(self._map)
        self.start = ctypes.addressof(self._view)

    def close(self) -> None:
        del self._view
        self._map.close()


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=SPACE),
    st.data(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_copies(contents: list[int], data: st.DataObject, drop: bool, mem: bool, compare: bool) -> None:
    """What is written is what was there; zero pages and pages that a parent has with these bytes are left out."""
    flags = data.draw(st.lists(st.sampled_from(FLAGS), min_size=len(contents), max_size=len(contents)))
    old = data.draw(st.lists(st.integers(0, 2), min_size=len(contents), max_size=len(contents)))
    task = Memory(contents)
    runs = Runs(1)
    for page, flag in enumerate(flags):
        runs.append(task.start + page * PAGE_SIZE, task.start + (page + 1) * PAGE_SIZE, flag)
    with TemporaryDirectory() as name:
        folder = Path(name)
        parent = None
        if compare:
            (folder / "parent").mkdir()
            write_pagemap(folder / "parent" / "pagemap-7.img", 1, [(task.start, len(old), PE_PRESENT)])
            (folder / "parent" / "pages-1.img").write_bytes(
                b"".join(bytes([byte]) * PAGE_SIZE for byte in old)
            )
            write(folder / "parent" / "inventory.img", Kind.INVENTORY, [InventoryEntry(img_version=2)])
            parent = Chain(folder / "parent").pages_of(7)
            assert parent is not None
        target = Target(folder, "pagemap-1.img", 1)
        source = Source(os.getpid(), compare=parent)
        counts = memory.write(target, source, [Part(runs, not mem, drop)], Marks(), lambda _: None)
        entries = list(Pagemap.load(folder / "pagemap-1.img"))
        stored = target.pages.read_bytes()
    task.close()

    expected, expected_bytes = {}, b""
    for page, (byte, flag) in enumerate(zip(contents, flags, strict=True)):
        if flag & PE_PRESENT and byte == 0 and drop:
            continue
        if flag & PE_PRESENT and compare and old[page] == byte:
            flag = flag & ~PE_PRESENT | PE_PARENT  # noqa: PLW2901
        expected[page] = flag
        if flag & PE_PRESENT:
            expected_bytes += bytes([byte]) * PAGE_SIZE
    found = {
        (entry.vaddr - task.start) // PAGE_SIZE + index: entry.flags
        for entry in entries
        for index in range(entry.nr_pages)
    }
    assert found == expected
    assert stored == expected_bytes
    assert counts.scanned == len(contents)
    assert counts.written * PAGE_SIZE == len(expected_bytes)


@pytest.mark.parametrize("more", [0, 1, PAGE_SIZE - 1])
def test_a_parent_that_is_cut_short_while_it_is_compared_with(more: int) -> None:
    """What it does not hold any more is written anew, and not said to be there."""
    contents = [1] * 30 + [0] * 3  # of zeros like those behind the end of the file
    task = Memory(contents)
    runs = Runs()
    runs.append(task.start, task.start + len(contents) * PAGE_SIZE, PE_PRESENT)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_pagemap(folder / "pagemap-1.img", 1, [(task.start, len(contents), PE_PRESENT)])
        path = folder / "pages-1.img"
        path.write_bytes(b"".join(bytes([byte]) * PAGE_SIZE for byte in contents))
        parent = ParentPages(resolve([Pagemap.load(folder / "pagemap-1.img")], remote=False), [path])
        os.truncate(path, 31 * PAGE_SIZE + more)
        target = Target(folder, "pagemap-2.img", 2)
        source = Source(os.getpid(), compare=parent)
        memory.write(target, source, [Part(runs, True, False)], Marks(), lambda _: None)
        entries = [(entry.nr_pages, entry.flags) for entry in Pagemap.load(folder / "pagemap-2.img")]
    task.close()
    assert entries == [(31, PE_PARENT), (2, PE_PRESENT)]


def test_pages_of_shared_memory() -> None:
    fd = os.memfd_create("shared")
    for page in (2, 3, 70):
        os.pwrite(fd, b"x", page * PAGE_SIZE + 5)
    os.ftruncate(fd, 99 * PAGE_SIZE)
    part = memory.shared_part(fd, 99 * PAGE_SIZE)
    os.close(fd)
    spans = [(start // PAGE_SIZE, end // PAGE_SIZE) for start, end, _ in part.runs]
    assert spans == [(2, 4), (70, 71)]


def test_shared_memory_that_can_t_be_looked_at() -> None:
    """Only ENXIO says that there is no more; what can't be told is not taken for zeros."""
    ends = os.pipe()
    with pytest.raises(DumpError, match="Illegal seek"):
        memory.shared_part(ends[0], PAGE_SIZE)
    for end in ends:
        os.close(end)


def test_memory_that_vanishes_while_a_task_runs() -> None:
    """Left out of a pre-dump; an error in a dump."""
    task = Memory([1, 1, 1, 1])
    libc = ctypes.CDLL(None)
    libc.mprotect(ctypes.c_void_p(task.start + PAGE_SIZE), PAGE_SIZE, 0)
    runs = Runs()
    runs.append(task.start, task.start + 4 * PAGE_SIZE, PE_PRESENT)
    with TemporaryDirectory() as name:
        target = Target(Path(name), "pagemap-1.img", 1)
        source = Source(os.getpid(), running=True)
        counts = memory.write(target, source, [Part(runs, True, True)], Marks(), lambda _: None)
        assert counts.written == 3
        assert [entry.nr_pages for entry in Pagemap.load(Path(name) / "pagemap-1.img")] == [1, 2]
    libc.mprotect(ctypes.c_void_p(task.start + PAGE_SIZE), PAGE_SIZE, 3)
    task.close()


def test_scans_find_each_page_once() -> None:
    """Many runs: more than the kernel hands out in one step."""
    task = Memory([1])
    task.close()
    space = mmap.mmap(-1, 4000 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(space)
    start = ctypes.addressof(view)
    for page in range(0, 4000, 2):
        space[page * PAGE_SIZE] = 1
    what = ffi.new("struct lp_scan *", {"any": lib.LP_PAGE_PRESENT, "excluded": lib.LP_PAGE_PFNZERO})
    at, count, runs = ffi.new("uint64_t *", start), ffi.new("size_t *"), Runs(4096)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    assert lib.lp_scan_pages(fd, what, at, start + len(space), runs.array, runs.room, count) == 0
    os.close(fd)
    runs.count = count[0]
    assert [(run[0] - start) // PAGE_SIZE for run in runs] == list(range(0, 4000, 2))
    assert at[0] == start + len(space)
    del view
    space.close()
