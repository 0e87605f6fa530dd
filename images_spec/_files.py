"""Image files as bytes. Errors are raised as ``ImageError``."""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from images_spec.errors import ImageError, ImageMissingError
from images_spec.opening import open_image

MAX_SIZE = 1 << 30
"""Limit of every image but pages-*.img: 1 GiB. A pagemap of 1,000,000 entries has about 25 MB."""


def read_file(path: Path) -> bytes:
    """The contents of an image of at most ``MAX_SIZE`` bytes. Raises ``ImageError``."""
    try:
        fd = open_image(path)
    except FileNotFoundError:
        raise ImageMissingError(path, "no such image") from None
    except OSError as error:
        raise ImageError(path, f"can't be opened: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "not a regular file")
        if status.st_size > MAX_SIZE:
            raise ImageError(path, f"is too large for such an image: {status.st_size} bytes")
        with open(fd, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    finally:
        os.close(fd)


class OutputFile:
    """An image being written, with mode 0600, because it may contain secrets of the task. Raises ``ImageError``.

    A context manager: if the block fails, the file is discarded. ``keep`` is called with the path and a descriptor of
    the complete file before it is closed.
    """

    def __init__(self, path: Path, keep: Callable[[Path, int], None] | None = None) -> None:
        self._path, self._keep = path, keep
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(self, data: bytes) -> None:
        """Writes all of ``data``."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                raise self._failure(error) from None

    def skip(self, size: int) -> None:
        """Leaves a hole: ``size`` bytes that are zero."""
        try:
            os.ftruncate(self._fd, os.lseek(self._fd, size, os.SEEK_CUR))
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        try:
            if self._keep is not None:
                self._keep(self._path, self._fd)
        finally:
            try:
                os.close(self._fd)
            except OSError as error:  # some network file systems report failed writes here
                raise self._failure(error) from None

    def discard(self) -> None:
        """Empties the file, so that every reader rejects it.

        A pagemap cut at an entry would look complete, and the pages that it lacks would be restored as zeros.
        """
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def _failure(self, error: OSError) -> ImageError:
        return ImageError(self._path, f"can't be written: {error.strerror}")
