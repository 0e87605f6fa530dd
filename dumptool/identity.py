"""Processes by pidfd: a pid can be another process's as soon as somebody has waited for the first one."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dumptool.errors import DumpError, TaskGoneError

MANY_DESCRIPTORS = 65536


def open_pidfd(pid: int) -> int:
    """A descriptor for the process that has this pid now. Raises ``TaskGoneError``, ``DumpError``."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise TaskGoneError(f"pid {pid}: no such process (any more)") from None
    except OSError as error:
        raise DumpError(f"pid {pid}: no pidfd can be had: {error.strerror}") from None


def is_there(pidfd: int) -> bool:
    """Whether the process, perhaps as a zombie, has its pid still to itself: all that was read by pid was its own."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check(pid: int, pidfd: int | None) -> None:
    """Raises ``TaskGoneError`` unless the process is there. None: it was not when it was frozen."""
    if pidfd is None or not is_there(pidfd):
        raise TaskGoneError(f"pid {pid}: no such process (any more)")


@contextmanager
def one_process(pid: int) -> Iterator[None]:
    """What the block reads by pid (of /proc/<pid>, say) is all of one process; else ``TaskGoneError``."""
    pidfd = open_pidfd(pid)
    try:
        yield
        check(pid, pidfd)
    finally:
        os.close(pidfd)


def allow_many_descriptors() -> None:
    """Raise the soft limit: a frozen process takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MANY_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
