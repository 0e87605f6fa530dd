"""Pages from the local disk: the task's own image and its parents, mapped.

The engine copies straight from the mapping into the task; what can't be read (a file cut short, an I/O error) is lost,
never zeros: csrc/common/pages_file.h.
"""

from __future__ import annotations

from pathlib import Path

from images_spec.errors import ImageError
from lazypages.engine.memory import MappedFile


class MappedPages:
    """The pages files of a checkpoint, each mapped once. They stay mapped as long as anyone holds them."""

    def __init__(self) -> None:
        self._mapped: dict[Path, MappedFile] = {}

    def map(self, path: Path | None, size: int) -> MappedFile | None:
        """The file of one level, `size` bytes as when it was checked. None for no file, or an empty one.

        Raises ImageError.
        """
        if path is None or size == 0:
            return None
        if path not in self._mapped:
            try:
                self._mapped[path] = MappedFile(path, size)
            except OSError as error:
                raise ImageError(path, f"can't be mapped: {error.strerror}") from None
        return self._mapped[path]
