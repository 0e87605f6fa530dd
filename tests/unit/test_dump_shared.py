"""Shared memory: which there is, and the comparison with the parent levels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dumptool import memory, shared
from dumptool._ptrace import ffi
from dumptool.chain import ParentPages
from dumptool.criu_shared import names, pages, throw_away, thrown_away
from dumptool.errors import DumpError, TaskGoneError
from dumptool.memory import Marks, Source, Target
from dumptool.proc import Vma
from dumptool.shared import Memory, Piece, device, find
from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE, PE_PARENT, PE_PRESENT
from images_spec.pagemap import Pagemap
from images_spec.pagemap import write as write_pagemap
from images_spec.placement import resolve

OLD = b"abcdabcdab"
NEW = b"abXdabc\0ab"


def vma(inode: int, name: str, *, on: int | None = None) -> Vma:
    return Vma(
        inode * 0x10000, inode * 0x10000 + PAGE_SIZE, "rw-s", 0, device() if on is None else on, inode, name
    )


def test_which_there_is() -> None:
    """Once each, and no number that two pieces have."""
    fd = os.memfd_create("here")
    inode = os.fstat(fd).st_ino
    one = [vma(7, "/dev/zero (deleted)"), vma(8, "/SYSV00000000 (deleted)"), vma(9, "/memfd:x (deleted)")]
    two = [
        vma(8, "/SYSV00000000 (deleted)"),
        vma(9, "/SYSV00000001 (deleted)"),
        vma(5, "/file", on=device() + 1),
    ]
    found = find([(1, one), (2, two)], descriptors=False)
    assert {number: piece.sysv for number, piece in found.items()} == {7: False, 8: True}
    assert found[8] == Piece(8, "/proc/1/map_files/80000-81000", PAGE_SIZE, sysv=True)
    assert find([(os.getpid(), [])], descriptors=True)[inode].path == f"/proc/{os.getpid()}/fd/{fd}"
    os.close(fd)


def spread(contents: bytes) -> bytes:
    return b"".join(bytes([byte]) * PAGE_SIZE for byte in contents)


@pytest.fixture
def fd() -> Iterator[int]:
    """Shared memory, which ends in the middle of its last page."""
    fd = os.memfd_create("shared")
    os.write(fd, spread(NEW)[:-100])
    yield fd
    os.close(fd)


@pytest.fixture
def parent(tmp_path: Path) -> ParentPages:
    """Two levels."""
    write_pagemap(tmp_path / "pagemap-1.img", 1, [(0, 4, PE_PRESENT), (4 * PAGE_SIZE, 6, PE_PARENT)])
    write_pagemap(tmp_path / "pagemap-2.img", 2, [(0, 10, PE_PRESENT)])
    (tmp_path / "pages-1.img").write_bytes(spread(OLD[:4]))
    (tmp_path / "pages-2.img").write_bytes(spread(b"...." + OLD[4:-1]) + spread(OLD[-1:])[:-100] + bytes(100))
    pagemaps = [Pagemap.load(tmp_path / f"pagemap-{level}.img") for level in (1, 2)]
    return ParentPages(resolve(pagemaps, remote=False), [tmp_path / f"pages-{level}.img" for level in (1, 2)])


def opened(fd: int) -> Memory:
    return Memory(Piece(os.fstat(fd).st_ino, f"/proc/self/fd/{fd}"))


def all_pages(number: int = 10) -> memory.Runs:
    runs = memory.Runs()
    runs.append(0, number * PAGE_SIZE, PE_PRESENT)
    return runs


def test_what_is_the_same_is_in_the_parent(
    fd: int, parent: ParentPages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if few pages are compared at a time; the bytes behind the end of the file count."""
    monkeypatch.setattr(shared, "STEP_PAGES", 3)
    piece = opened(fd)
    piece.close()
    runs = piece.compared(all_pages(), parent)
    found = [(start // PAGE_SIZE, end // PAGE_SIZE, flags) for start, end, flags in runs]
    assert found == [
        *((0, 2, PE_PARENT), (2, 3, PE_PRESENT), (3, 7, PE_PARENT), (7, 8, PE_PRESENT), (8, 10, PE_PARENT)),
    ]
    source = Source(os.getpid(), piece.address, memory=piece)
    target = Target(tmp_path, "pagemap-3.img", 3)
    counts = memory.write(target, source, [memory.Part(runs, True, True)], Marks(), lambda _: None)
    assert (counts.in_parent, counts.written) == (8, 1)
    assert target.pages.read_bytes() == spread(b"X")


def test_memory_that_is_cut_short(fd: int, parent: ParentPages, tmp_path: Path) -> None:
    """By a process outside of the tree: no SIGBUS for us, and no zeros in its place."""
    piece = opened(fd)
    piece.close()
    os.ftruncate(fd, 5 * PAGE_SIZE)
    runs = piece.compared(all_pages(), parent)
    assert [(end // PAGE_SIZE, flags) for _, end, flags in runs][-1] == (10, PE_PRESENT)
    source = Source(os.getpid(), piece.address, "shared memory", memory=piece)
    with pytest.raises(DumpError, match="shared memory: page 0x5000 can't be read"):
        memory.write(
            Target(tmp_path, "pagemap-3.img", 3),
            source,
            [memory.Part(runs, True, False)],
            Marks(),
            lambda _: None,
        )


def test_a_parent_that_is_cut_short_meanwhile(parent: ParentPages, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pages-2.img: was cut short"), parent.mapped(ffi.NULL):
        os.truncate(tmp_path / "pages-2.img", PAGE_SIZE)


def test_another_piece_in_its_place(fd: int) -> None:
    with pytest.raises(TaskGoneError, match="is not there any more"):
        Memory(Piece(os.fstat(fd).st_ino + 1, f"/proc/self/fd/{fd}"))
    with pytest.raises(TaskGoneError, match="can't be opened"):
        Memory(Piece(1, "/proc/self/fd/none"))


def test_what_criu_writes_is_thrown_away(tmp_path: Path) -> None:
    throw_away(tmp_path, 2)
    for pages_id in (2, 3):
        (tmp_path / f"pages-{pages_id}.img").write_bytes(bytes(PAGE_SIZE))
        write_pagemap(tmp_path / f"pagemap-shmem-7{pages_id}.img", pages_id, [(PAGE_SIZE, 1, PE_PRESENT)])
    ((number, pagemap),) = thrown_away(tmp_path)
    assert number == 72
    assert names(number, pagemap) == {"pagemap-shmem-72.img", "pages-2.img"}
    assert list(pages(pagemap)) == [(PAGE_SIZE, 2 * PAGE_SIZE, PE_PRESENT)]
    with pytest.raises(DumpError, match="File exists"):
        throw_away(tmp_path, 1)


def test_data_behind_the_end_and_a_hole_before_it() -> None:
    """Only what lies before the size that is asked for."""
    fd = os.memfd_create("shared")
    try:
        os.ftruncate(fd, 16 * PAGE_SIZE)
        for page in (1, 2, 12, 13):
            os.pwrite(fd, b"data", page * PAGE_SIZE)
        for size, ends in ((8, [3]), (13, [3, 13]), (16, [3, 14]), (2, [2])):
            part = memory.shared_part(fd, size * PAGE_SIZE)
            assert [end // PAGE_SIZE for _, end, _ in part.runs] == ends
    finally:
        os.close(fd)
