"""Shared memory in a dump by CRIU: CRIU's copy of it is thrown away, and dumptool writes what has changed.

CRIU writes pages-1.img, pages-2.img and so on in the order in which it dumps processes and the shared memory that they
use; that of System V comes last, from another process. It opens them without O_EXCL (open_image_at(), criu/image.c, 4.1
to 4.2), so a symbolic link to /dev/null that is there already takes the pages. splice() to /dev/null copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dumptool.errors import DumpError
from dumptool.memory import Runs
from dumptool.proc import Layout
from images_spec.flags import PAGE_SIZE, PE_PRESENT
from images_spec.images import Kind
from images_spec.pagemap import Pagemap, pages_name

SHARED = "pagemap-shmem-"
MOST_NUMBERS = 1 << 32
"""CRIU cuts numbers of memfds to 32 bits."""


class SharedMemoryLostError(DumpError):
    """CRIU's copy of shared memory that dumptool can't find in the tree was thrown away."""


def has_huge_pages(layout: Layout) -> bool:
    """Whether a process maps shared huge pages (hugetlb), which are left to CRIU."""
    return any(vma.inode and "ht" in layout.flags[vma.start] for vma in layout.vmas)


def throw_away(written: Path, count: int) -> None:
    """CRIU's first ``count`` pages files in the directory ``written`` will be thrown away. Raises ``DumpError``."""
    try:
        for number in range(1, count + 1):
            (written / pages_name(number)).symlink_to("/dev/null")
    except OSError as error:
        raise DumpError(f"{written}: {error.strerror}") from None


def thrown_away(written: Path) -> Iterator[tuple[int, Pagemap]]:
    """The shared memory whose pages CRIU has not written: number and pagemap. Raises ``ImageError``."""
    for path in sorted(written.glob(f"{SHARED}*.img")):
        pagemap = Pagemap.load(path)
        if (written / pages_name(pagemap.pages_id)).is_symlink():
            yield int(path.stem.removeprefix(SHARED)), pagemap


def names(number: int, pagemap: Pagemap) -> set[str]:
    """The names of both images of shared memory."""
    return {Kind.PAGEMAP.file_name(f"shmem-{number}"), pages_name(pagemap.pages_id)}


def pages(pagemap: Pagemap) -> Runs:
    """All pages of a pagemap, to be copied."""
    runs = Runs(len(pagemap))
    for vaddr, nr_pages, _ in pagemap:
        runs.append(vaddr, vaddr + nr_pages * PAGE_SIZE, PE_PRESENT)
    return runs
