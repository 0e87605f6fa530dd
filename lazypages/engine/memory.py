"""The engine's input for a task: its extents, VMAs and mapped pages files."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from images_spec.opening import open_image
from lazypages.engine._uffd import ffi, lib

PAGE_SIZE = 4096

MAP_FAILED: Any = ffi.cast("void *", -1)

#: Pages that sequential faults may read ahead, at most.
MAX_READAHEAD = 128


class ExtentArray(Protocol):
    """A C array of ``struct lp_extent``, valid as long as this object (images_spec.placement.ExtentTable)."""

    @property
    def address(self) -> int: ...

    def __len__(self) -> int: ...


class MappedFile:
    """The first ``size`` bytes of a pages file, mapped, and its file descriptor, with which the engine detects
    truncation."""

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        """Raises OSError."""
        self.size = size
        self.fd = open_image(path)
        self._closer = weakref.finalize(self, os.close, self.fd)
        address = lib.mmap(ffi.NULL, size, lib.PROT_READ, lib.MAP_SHARED, self.fd, 0)
        if address == MAP_FAILED:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.address = ffi.gc(address, lambda mapped: lib.munmap(mapped, size))


class TaskMemory(NamedTuple):
    """A task's memory at dump time.

    ``vmas``: lazy-capable VMAs as (start, end) in bytes, sorted. ``wiped``: ranges that are zero in a forked child
    (MADV_WIPEONFORK). ``levels``: the pages file of each level of the image chain (None: it has none); they must
    outlive the engine. ``max_readahead``: in pages.
    """

    extents: ExtentArray
    vmas: Sequence[tuple[int, int]]
    wiped: Sequence[tuple[int, int]] = ()
    levels: Sequence[MappedFile | None] = ()
    max_readahead: int = MAX_READAHEAD


def _ranges(ranges: Sequence[tuple[int, int]]) -> Any:
    return ffi.new("struct lp_range[]", [(start, end) for start, end in ranges])


class PreparedMemory:
    """The engine's representation of the memory of one task, made before the task arrives to shorten its wait."""

    def __init__(self, memory: TaskMemory) -> None:
        """Raises OSError: EINVAL if extents, VMAs and pages files are inconsistent."""
        self.max_readahead = memory.max_readahead
        self.nr_extents = len(memory.extents)
        #: The pages files; they must outlive the engine.
        self.files = [file for file in memory.levels if file]
        levels = ffi.new("struct lp_level[]", max(1, len(memory.levels)))
        for index, file in enumerate(memory.levels):
            if file:
                lib.lp_level_of_file(ffi.addressof(levels, index), file.address, file.size, file.fd)
        handle = lib.lp_memory_new(
            ffi.cast("struct lp_extent *", memory.extents.address),
            len(memory.extents),
            _ranges(memory.vmas),
            len(memory.vmas),
            _ranges(memory.wiped),
            len(memory.wiped),
            levels,
            len(memory.levels),
        )
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._handle = ffi.gc(handle, lib.lp_memory_free)

    def take(self) -> Any:
        """Transfers ownership of the C object to the caller. Raises ValueError on a second call."""
        handle, self._handle = self._handle, None
        if handle is None:
            raise ValueError("the memory is already in use by a task")
        ffi.gc(handle, None)
        return handle
