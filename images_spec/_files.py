"""Image files as bytes; what goes wrong with them is an ``ImageError``."""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from images_spec.errors import ImageError, ImageMissingError

MAX_SIZE = 1 << 30
"""No image but pages-*.img comes near this many bytes (a pagemap of 1,000,000 entries has some 25 MB)."""


def read_file(path: Path) -> bytes:
    """The contents of an image, ``MAX_SIZE`` bytes at most. Raises ``ImageError``."""
    try:
        # O_NONBLOCK: a FIFO under this name must not block us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageMissingError(path, "no such image") from None
    except OSError as error:
        raise ImageError(path, f"can't be opened: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "not a regular file")
        if status.st_size > MAX_SIZE:
            raise ImageError(path, f"{status.st_size} bytes are absurd for such an image")
        with open(fd, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    finally:
        os.close(fd)


class OutputFile:
    """An image being written, mode 0600: it may hold secrets of the task. Raises ``ImageError``.

    A context manager: when the block fails, the file is discarded. ``keep`` is called with a descriptor of the
    whole file before that is closed.
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

    def close(self) -> None:
        try:
            if self._keep is not None:
                self._keep(self._path, self._fd)
        finally:
            try:
                os.close(self._fd)
            except OSError as error:  # of a file system on a network
                raise self._failure(error) from None

    def discard(self) -> None:
        """Leaves an empty file, which no reader takes for an image.

        A pagemap that is cut short would look whole, and the pages that it lacks would be zeros.
        """
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def _failure(self, error: OSError) -> ImageError:
        return ImageError(self._path, f"can't be written: {error.strerror}")
