"""Files that a command writes at its end, checked at its start: hours of work must not end in a misspelt directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lazypages.errors import LazyPagesError


def check_output(option: str, path: Path) -> None:
    """Raises LazyPagesError if the file `path`, the value of `option`, can't be created or opened for writing.

    A file that exists keeps its contents; one that does not exist still does not afterwards.
    """
    if path.is_dir():
        raise LazyPagesError(f"{option} {path} is a directory: name a file")
    if not path.parent.is_dir():
        what = "is not a directory" if path.parent.exists() else "does not exist"
        raise LazyPagesError(f"{option} {path}: the directory {path.parent} {what}: create it first")
    exists = os.path.lexists(path)
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags if exists else flags | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if exists and error.errno in {errno.ENXIO, errno.ENOENT}:
            return  # a FIFO that nobody reads yet; a link to a file that does not exist yet
        what = "opened for writing" if exists else "created"
        raise LazyPagesError(f"{option} {path} can't be {what}: {error.strerror}") from None
    os.close(fd)
    if not exists:
        path.unlink()
