"""Exceptions of the engine, and the conversion of C's return values to them."""

from __future__ import annotations

import errno
import os

from lazypages.errors import LazyPagesError


class TaskGoneError(LazyPagesError):
    """The task's memory no longer exists: it exited, was killed, or called execve. Not an error of the daemon."""


class BusyError(LazyPagesError):
    """A layout event of the task (fork, mremap, munmap, madvise) is not finished; try again later."""


def check(rc: int) -> int:
    """Returns `rc` unless it is negative. Raises TaskGoneError for -ESRCH, BusyError for -EAGAIN, else OSError."""
    if rc >= 0:
        return rc
    if rc == -errno.ESRCH:
        raise TaskGoneError("the task no longer exists")
    if rc == -errno.EAGAIN:
        raise BusyError("a layout event of the task is not finished")
    raise OSError(-rc, os.strerror(-rc))


def check_errno(rc: int) -> None:
    """Raises OSError if `rc` is -errno."""
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
