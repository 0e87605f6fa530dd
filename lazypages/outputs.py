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

    `new`: it must not exist. A file that exists keeps its contents; one that does not exist is not made, not even for a
    moment.
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
    try:
        if exists:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
        else:
            _try_to_create(path.parent)
    except OSError as error:
        if exists and error.errno == errno.ENOENT:
            return  # a link to a file that does not exist yet
        raise cannot_write(option, path, error, exists=exists) from None


def _try_to_create(directory: Path) -> None:
    """Under no name, or another one: somebody may wait for the file that is to be there. Raises OSError."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        os.close(os.open(directory, flags | os.O_TMPFILE, 0o600))
    except OSError as error:
        if error.errno not in {
            errno.EOPNOTSUPP,
            errno.EISDIR,
        }:  # open(2): this file system has none (NFS, FAT)
            raise
        path = directory / f".lazypages-{os.getpid()}"
        os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600))
        path.unlink()


def already_there(option: str, path: Path) -> LazyPagesError:
    """The error for a file with a pid that must not exist."""
    return LazyPagesError(f"{option} {path} exists: remove it if no process of that pid runs")


def cannot_write(option: str, path: Path, error: OSError, *, exists: bool) -> LazyPagesError:
    """The error for a file that can't be written, `exists` or not."""
    what = "opened for writing" if exists else "created"
    return LazyPagesError(f"{option} {path} can't be {what}: {error.strerror}")
