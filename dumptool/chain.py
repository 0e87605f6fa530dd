"""The parent levels of a dump: which pages they have, and those pages' bytes."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dumptool._ptrace import ffi
from dumptool.errors import DumpError
from images_spec.checkpoint import check_inventory
from images_spec.errors import ImageError, ImageMissingError
from images_spec.images import Kind, read_one
from images_spec.pagemap import Pagemap, pages_name
from images_spec.placement import ExtentTable, resolve

PARENT_LINK = "parent"
SENT_PREFIX = "sent-"
"""Name prefix of a pagemap whose pages a page server has received; a copy of that pagemap stays here."""
MAX_LEVELS = 256


class Chain:
    """The levels below the one that is being made: the parent, the parent's parent, and so on."""

    def __init__(self, directory: Path) -> None:
        """``directory``: of the parent. Raises ``ImageError``, ``DumpError`` if it is not a level."""
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

    def pages_of(self, number: int | str) -> ParentPages | None:
        """The pages that all levels together have of a process; None if the parent has no pagemap of it.

        ``number``: its pid, or ``shmem-`` and the number of shared memory.

        Raises ``ImageError`` if a pages file has not the size that its pagemap implies.
        """
        pagemaps: list[Pagemap | None] = []
        paths: list[Path | None] = []
        for level in self.levels:
            pagemap, path = _load(level, Kind.PAGEMAP.file_name(number))
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
    """The pagemap of a level and its pages file. The file is None if it is at a page server; both: no pagemap."""
    try:
        pagemap = Pagemap.load(level / name)
        return pagemap, level / pages_name(pagemap.pages_id)
    except ImageMissingError:
        pass
    try:
        return Pagemap.load(level / (SENT_PREFIX + name)), None
    except ImageMissingError:
        return None, None


class ParentPages:
    """The location of each page of one process in a chain, and access to the bytes."""

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

        A level whose pages file can't be opened has no bytes to compare with.
        """
        with ExitStack() as stack:
            levels = ffi.new("int[]", [_open(path, stack) for path in self._paths])
            yield ffi.new("struct lp_parent *", (self.extents_pointer, len(self.extents), levels))

    def read_ahead(self) -> None:
        """Has the kernel read the pages files into its cache, as far as they are not there."""
        with ExitStack() as stack:
            for fd in (_open(path, stack) for path in self._paths):
                if fd >= 0:
                    with suppress(OSError):
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)

    @contextmanager
    def mapped(self, memory: Any) -> Iterator[Any]:
        """``struct lp_compared *`` (csrc/dump/dump_compare.h), valid for the block. ``memory``: what is compared.

        Raises ``ImageError`` at the end of the block if a file was cut short in it: what was compared is void.
        """
        with ExitStack() as stack:
            descriptors = [_open(path, stack) for path in self._paths]
            maps = [_map(fd) for fd in descriptors]
            levels = ffi.new(
                "struct lp_mapped[]", [(ffi.NULL if one is None else one, len(one or b"")) for one in maps]
            )
            yield ffi.new(
                "struct lp_compared *", (memory, self.extents_pointer, len(self.extents), levels, 0)
            )
            for path, fd, one in zip(self._paths, descriptors, maps, strict=True):
                if one is not None and os.fstat(fd).st_size < len(one):
                    raise ImageError(path or Path(), "was cut short while it was read")


def _map(fd: int) -> Any:
    """A mapping of a file, to read; None if there is none, or it is empty."""
    if fd < 0:
        return None
    try:
        return ffi.from_buffer("unsigned char[]", mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ))
    except (OSError, ValueError):
        return None


def _open(path: Path | None, stack: ExitStack) -> int:
    """A descriptor that ``stack`` closes; -1 if there is no file or it can't be opened."""
    if path is None:
        return -1
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    stack.callback(os.close, fd)
    return fd
