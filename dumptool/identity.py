"""Processes by pidfd: a pid may be reused as soon as its process has been reaped."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dumptool.errors import DumpError, TaskGoneError

MANY_DESCRIPTORS = 65536


def open_pidfd(pid: int) -> int:
    """A descriptor for the process that has this pid at the moment. Raises ``TaskGoneError``, ``DumpError``."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise TaskGoneError(f"pid {pid}: no such process (any more)") from None
    except OSError as error:
        raise DumpError(f"pid {pid}: can't open a pidfd: {error.strerror}") from None


def is_there(pidfd: int) -> bool:
    """Whether the process still exists, perhaps as a zombie. If so, all that was read by its pid so far was its own."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check(pid: int, pidfd: int | None) -> None:
    """Raises ``TaskGoneError`` unless the process still exists. ``pidfd``: None for one killed during the freeze."""
    if pidfd is None or not is_there(pidfd):
        raise TaskGoneError(f"pid {pid}: no such process (any more)")


@contextmanager
def one_process(pid: int) -> Iterator[None]:
    """Raises ``TaskGoneError`` unless all that the block reads by pid (as of /proc/<pid>) is of one process."""
    pidfd = open_pidfd(pid)
    try:
        yield
        check(pid, pidfd)
    finally:
        os.close(pidfd)


def allow_many_descriptors() -> None:
    """Raises the soft limit of descriptors: each frozen process takes one (its pidfd)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MANY_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
