"""Image files as bytes; what goes wrong with them as ``ImageError``."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

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
            return file.read(MAX_SIZE)
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None
    finally:
        os.close(fd)


def create_file(path: Path) -> BinaryIO:
    """Opens an image for writing, empty, mode 0600: it may hold secrets of the task. Raises ``OSError``."""
    return open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600))
