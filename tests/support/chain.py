"""Turn a plain checkpoint into a chain of parent images, as pre-dumps would have left it.

CRIU cannot pre-dump on a kernel without soft-dirty, so the chain is made by splitting a real dump: every page
gets an owner among the levels, and the level of the dump itself (the top, 0) says PARENT|LAZY for what is not
its own. To catch a daemon that looks in the wrong place, the levels below the owner hold stale bytes for some
pages, and parents hold bytes even for pages that the top does not mention (which are zero, whatever a parent
says).
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from images_spec import images
from images_spec import pagemap as pagemaps
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT
from images_spec.images import Kind
from images_spec.pagemap import Pagemap
from images_spec.placement import lazy_vmas

STALE = b"stale..." * (PAGE_SIZE // 8)


@dataclass(frozen=True)
class Chain:
    """A chain on disk: `top` is restored; pages a daemon has to give, as pid -> level -> number."""

    top: Path
    lazy_pages: dict[int, Counter[int]]

    def source_pages(self, pid: int | None = None) -> Counter[str]:
        """Lazy pages of one task, or of all, by the name that the daemon's statistics give to each source."""
        total: Counter[str] = Counter()
        for levels in self.lazy_pages.values() if pid is None else [self.lazy_pages[pid]]:
            for level, pages in levels.items():
                total["local" if level == 0 else f"parent-{level}"] += pages
        return total


@dataclass
class _Level:
    """The pagemap and the pages of one task at one level, under construction."""

    pages: bytearray = field(default_factory=bytearray)
    entries: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, vaddr: int, flags: int, data: bytes = b"") -> None:
        if self.entries:
            start, nr, last = self.entries[-1]
            if start + nr * PAGE_SIZE == vaddr and last == flags:
                self.entries[-1] = (start, nr + 1, flags)
                self.pages += data
                return
        self.entries.append((vaddr, 1, flags))
        self.pages += data

    def write(self, folder: Path, pid: int, pages_id: int) -> None:
        pagemaps.write(folder / f"pagemap-{pid}.img", pages_id, self.entries)
        (folder / f"pages-{pages_id}.img").write_bytes(self.pages)


def split(source: Path, target: Path, depth: int, *, longest_run: int = 40) -> Chain:
    """Write the checkpoint `source` as a chain with `depth` parents into the new folder `target`.

    Ownership changes after runs of 1 to `longest_run` pages. Level 0 is `target`/level-0, its parent
    `target`/level-1, and so on.
    """
    folders = [target / f"level-{number}" for number in range(depth + 1)]
    for folder, parent in zip(folders, [*folders[1:], None], strict=True):
        folder.mkdir(parents=True)
        if parent is not None:
            (folder / "parent").symlink_to(os.path.relpath(parent, folder))
    for path in source.glob("*.img"):
        if not path.name.startswith(("pagemap-", "pages-")):
            shutil.copy(path, folders[0])
    lazy_pages = {}
    for place, path in enumerate(sorted(source.glob("pagemap-*.img"))):
        number = path.stem.removeprefix("pagemap-")
        if number.startswith("shmem-"):  # shared memory is never lazy and stays whole
            shutil.copy(path, folders[0])
            shutil.copy(source / f"pages-{Pagemap.load(path).pages_id}.img", folders[0])
            continue
        lazy_pages[int(number)] = _split_task(
            source, folders, int(number), random.Random(100 * depth + place), longest_run
        )
    return Chain(folders[0], lazy_pages)


def _split_task(
    source: Path, folders: list[Path], pid: int, numbers: random.Random, longest_run: int
) -> Counter[int]:
    pagemap = Pagemap.load(source / f"pagemap-{pid}.img")
    data = memoryview((source / f"pages-{pagemap.pages_id}.img").read_bytes())
    levels = [_Level() for _ in folders]
    owned: Counter[int] = Counter()
    offset = 0
    owner = left = stale = 0
    gaps = _gaps(pagemap, source / f"mm-{pid}.img")
    for vaddr, nr_pages, flags in sorted([*pagemap, *gaps]):
        for page in range(nr_pages):
            if left == 0:
                left = numbers.randint(1, longest_run)
                owner = numbers.randrange(len(levels))
                stale = numbers.getrandbits(len(levels))
            left -= 1
            address = vaddr + page * PAGE_SIZE
            if not flags:  # the top does not mention it: whatever the parents hold is of no interest
                for below in range(1, len(levels)):
                    if stale >> below & 1:
                        levels[below].add(address, PE_PRESENT | PE_LAZY, STALE)
                continue
            lazy = flags & PE_LAZY
            for above in range(owner):
                levels[above].add(address, PE_PARENT | lazy)
            levels[owner].add(address, PE_PRESENT | lazy, bytes(data[offset : offset + PAGE_SIZE]))
            for below in range(owner + 1, len(levels)):
                if stale >> below & 1:
                    levels[below].add(address, PE_PRESENT | lazy, STALE)
            if lazy:
                owned[owner] += 1
            offset += PAGE_SIZE
    for number, (level, folder) in enumerate(zip(levels, folders, strict=True)):
        level.write(folder, pid, pagemap.pages_id + 1000 * number)  # ids differ from level to level
    return owned


def _gaps(pagemap: Pagemap, mm: Path, longest: int = 200) -> list[tuple[int, int, int]]:
    """Runs of at most `longest` pages, flags 0, that lazy mappings have and the pagemap does not mention."""
    mentioned = [(vaddr, vaddr + nr * PAGE_SIZE) for vaddr, nr, _ in pagemap]
    found = []
    for start, end in lazy_vmas(images.read_one(mm, Kind.MM), mm):
        cursor = start
        inside = [span for span in mentioned if span[0] < end and span[1] > start]
        for low, high in [*inside, (end, end)]:
            if cursor < low:
                found.append((cursor, min((low - cursor) // PAGE_SIZE, longest), 0))
            cursor = high
    return found
