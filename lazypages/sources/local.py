"""Pages from the local disk: the task's own image and its parents, mapped.

The engine copies straight from the mapping into the task; what can't be read (a file cut short, an I/O error)
comes back as EFAULT from the copy and is lost, never zeros.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from images_spec.errors import ImageError


class MappedPages:
    """The pages files of a checkpoint, each mapped once. They stay mapped as long as anyone holds them."""

    def __init__(self) -> None:
        self._mapped: dict[Path, mmap.mmap] = {}

    def map(self, path: Path | None, size: int) -> mmap.mmap | None:
        """The file of one level, `size` bytes as when it was checked. None for no file, or an empty one.

        Raises ImageError.
        """
        if path is None or size == 0:
            return None
        if path not in self._mapped:
            self._mapped[path] = _map(path, size)
        return self._mapped[path]


def _map(path: Path, size: int) -> mmap.mmap:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise ImageError(path, f"can't be mapped: {error}") from None
