"""Pages from the local disk: the task's own image and its parents, mapped.

The engine copies from the mapping into the task. A page that can't be read (truncated file, I/O error) is lost, never
zeros: csrc/common/pages_file.h.
"""

from __future__ import annotations

from pathlib import Path

from images_spec.errors import ImageError
from lazypages.engine.memory import MappedFile


class MappedPages:
    """The pages files of a checkpoint, each mapped once. A file stays mapped while its MappedFile is referenced."""

    def __init__(self) -> None:
        self._mapped: dict[Path, MappedFile] = {}

    def map(self, path: Path | None, size: int) -> MappedFile | None:
        """Maps the first `size` bytes, the file's size when it was checked. None if there is no file or it is empty.

        Raises ImageError.
        """
        if path is None or size == 0:
            return None
        if path not in self._mapped:
            try:
                self._mapped[path] = MappedFile(path, size)
            except OSError as error:
                raise ImageError(path, f"cannot be mapped: {error.strerror}") from None
        return self._mapped[path]
