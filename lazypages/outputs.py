"""Files that a command writes at its end, checked at its start: hours of work must not end in a misspelt directory."""

from __future__ import annotations

import os
from pathlib import Path

from lazypages.errors import LazyPagesError


def check_output(option: str, path: Path) -> None:
    """Raises LazyPagesError if the file `path`, the value of `option`, can't be created or replaced. Writes nothing."""
    if path.is_dir():
        raise LazyPagesError(f"{option} {path} is a directory: name a file")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise LazyPagesError(f"{option} {path} can't be written: {_why(path)}")
        return
    directory = path.parent
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise LazyPagesError(f"{option} {path}: the directory {directory} {what}: create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise LazyPagesError(f"{option} {path} can't be created: {_why(directory)}")


def _why(path: Path) -> str:
    read_only = os.statvfs(path).f_flag & os.ST_RDONLY
    return "its file system is read-only" if read_only else "permission denied"
