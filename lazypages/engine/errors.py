"""What calls of the engine raise."""

from __future__ import annotations

import errno
import os

from lazypages.errors import LazyPagesError


class TaskGoneError(LazyPagesError):
    """The task's memory does not exist any more: it exited, was killed, or called execve. Routine."""


class BusyError(LazyPagesError):
    """A layout event of the task (fork, mremap, munmap, madvise) is under way; try again in a moment."""


def check(rc: int) -> int:
    """What C returns, unless it is -errno: then TaskGoneError, BusyError or OSError is raised."""
    if rc >= 0:
        return rc
    if rc == -errno.ESRCH:
        raise TaskGoneError("the task is gone")
    if rc == -errno.EAGAIN:
        raise BusyError("a layout event of the task is under way")
    raise OSError(-rc, os.strerror(-rc))


def check_errno(rc: int) -> None:
    """Raises OSError for what C returns as -errno."""
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
