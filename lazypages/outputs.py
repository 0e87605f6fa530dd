"""Files that a command writes, checked at its start: hours of work must not end in a misspelt directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lazypages.errors import LazyPagesError

#: As the name of a file: standard output.
STDOUT = Path("-")


def check_output(option: str, path: Path, *, new: bool = False) -> None:
    """Raises LazyPagesError if the file `path`, the value of `option`, can't be created or opened for writing.

    `new`: it must not exist. A file that exists keeps its contents; one that does not exist still does not afterwards.
    """
    if new and os.path.lexists(path):
        raise already_there(option, path)
    if path.is_dir():
        raise LazyPagesError(f"{option} {path} is a directory: name a file")
    if not path.parent.is_dir():
        what = "is not a directory" if path.parent.exists() else "does not exist"
        raise LazyPagesError(f"{option} {path}: the directory {path.parent} {what}: create it first")
    if path.is_fifo():
        return  # its reader would take our check for the end
    exists = os.path.lexists(path)
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags if exists else flags | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if exists and error.errno == errno.ENOENT:
            return  # a link to a file that does not exist yet
        raise cannot_write(option, path, error, exists=exists) from None
    os.close(fd)
    if not exists:
        path.unlink()


def already_there(option: str, path: Path) -> LazyPagesError:
    """The error for a file with a pid that must not exist."""
    return LazyPagesError(f"{option} {path} exists: remove it if no process of that pid runs")


def cannot_write(option: str, path: Path, error: OSError, *, exists: bool) -> LazyPagesError:
    """The error for a file that can't be written, `exists` or not."""
    what = "opened for writing" if exists else "created"
    return LazyPagesError(f"{option} {path} can't be {what}: {error.strerror}")
