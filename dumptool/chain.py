"""The parent levels of a dump: which pages they hold, and their bytes to compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dumptool._ptrace import ffi
from dumptool.errors import DumpError
from images_spec.checkpoint import check_inventory
from images_spec.errors import ImageError, ImageMissingError
from images_spec.images import Kind, read_one
from images_spec.pagemap import Pagemap
from images_spec.placement import ExtentTable, resolve

PARENT_LINK = "parent"
SENT_PREFIX = "sent-"
"""Of the name of a pagemap whose pages (and which itself) a page server has been sent."""
MAX_LEVELS = 256


class Chain:
    """The levels below the one that is being made: its parent, the parent's parent, and so on."""

    def __init__(self, directory: Path) -> None:
        """``directory``: of the parent. Raises ``ImageError`` or ``DumpError`` when it is none."""
        self.run_id = read_one(directory / Kind.INVENTORY.file_name(), Kind.INVENTORY).dump_criu_run_id
        self.levels: list[Path] = []
        here: Path | None = directory
        while here is not None:
            if len(self.levels) == MAX_LEVELS:
                raise DumpError(f"{directory}: more than {MAX_LEVELS} levels of parents (a loop?)")
            check_inventory(here)
            self.levels.append(here)
            link = here / PARENT_LINK
            here = link if os.path.lexists(link) else None

    def pages_of(self, pid: int) -> ParentPages | None:
        """What the levels hold of a process; None when the parent knows nothing of it.

        Raises ``ImageError`` when a level can't be what its pagemap promises.
        """
        pagemaps: list[Pagemap | None] = []
        paths: list[Path | None] = []
        for level in self.levels:
            pagemap, path = _load(level, Kind.PAGEMAP.file_name(pid))
            if pagemap is None and not pagemaps:
                return None
            pagemaps.append(pagemap)
            if pagemap is not None and path is not None and pagemap.present_pages:
                try:
                    pagemap.check_pages_size(path.stat().st_size, path)
                except OSError as error:
                    raise ImageError(path, f"can't be read: {error.strerror}") from None
            paths.append(path)
        return ParentPages(resolve(pagemaps, remote=False), paths)


def _load(level: Path, name: str) -> tuple[Pagemap | None, Path | None]:
    """A pagemap of a level and its pages file; None where there is none: those of --page-server are elsewhere."""
    try:
        pagemap = Pagemap.load(level / name)
        return pagemap, level / f"pages-{pagemap.pages_id}.img"
    except ImageMissingError:
        pass
    try:
        return Pagemap.load(level / (SENT_PREFIX + name)), None
    except ImageMissingError:
        return None, None


class ParentPages:
    """Where the pages of one process are in a chain, and their bytes to compare with."""

    def __init__(self, extents: ExtentTable, paths: Sequence[Path | None]) -> None:
        self.extents = extents
        self._paths = paths

    @property
    def extents_pointer(self) -> Any:
        """``const struct lp_extent *`` (csrc/common/extent.h), valid while this object lives."""
        return ffi.cast("const struct lp_extent *", self.extents.address)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """``struct lp_parent *`` (csrc/dump/dump_pages.h), valid for the block.

        Levels that can't be opened have nothing.
        """
        with ExitStack() as stack:
            levels = ffi.new("int[]", [_open(path, stack) for path in self._paths])
            yield ffi.new("struct lp_parent *", (self.extents_pointer, len(self.extents), levels))


def _open(path: Path | None, stack: ExitStack) -> int:
    """-1 where there is nothing to be opened."""
    if path is None:
        return -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    stack.callback(os.close, fd)
    return fd
