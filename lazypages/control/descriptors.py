"""File descriptors: the limit, how many a restore needs, and a reserve for when none is free.

A shortage of descriptors must not cost a task its memory. A message from a restorer stays in its socket
(:func:`lazypages.control.listener.receive`), and the kernel does not deliver a FORK event before a number is free for
the child's userfaultfd (fs/userfaultfd.c, userfaultfd_ctx_read; docs/kernel.md, "Descriptors"). The tasks wait
meanwhile.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from typing import TypeVar

from lazypages.engine.guard import Guard
from lazypages.errors import LazyPagesError

T = TypeVar("T")

#: Descriptors for one task: its userfaultfd and its pidfd.
PER_TASK = 2

#: Descriptors for one page server: two connections, which the engine duplicates, an eventfd for each, a socket pair
#: where a relay stands between, and two more while a connection is being replaced.
PER_SERVER = 12

#: Descriptors for the daemon itself, beside those that are open when the images have been read: control socket, guard,
#: engine, event loop.
DAEMON = 32

#: Reserved for forked children: a userfaultfd each.
FOR_FORKS = 32

#: Reserved for reading /proc and killing processes.
FOR_EMERGENCIES = 8

#: errno values for "no descriptor is free": in this process, in the whole system.
NONE_LEFT = (errno.EMFILE, errno.ENFILE)


def highest_limit() -> int:
    """The hard limit, but not above the number of descriptors that the guard can track."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return hard if 0 <= hard < Guard.MAX_FDS else Guard.MAX_FDS


def raise_limit() -> None:
    """Raise the soft limit to the highest."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest_limit(), hard))


def limit() -> int:
    """The soft limit of open descriptors (RLIMIT_NOFILE)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def exhausted() -> bool:
    """Whether no descriptor is free at the moment."""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in NONE_LEFT
    return False


def needed(tasks: int, page_servers: int) -> int:
    """Descriptors of a restore, with those in reserve, beside those of its images."""
    return tasks * PER_TASK + page_servers * PER_SERVER + FOR_FORKS + FOR_EMERGENCIES


def check_enough(tasks: int, page_servers: int) -> None:
    """Check the limit for a restore. Call it when the images have been read, since they stay open.

    Raises LazyPagesError.
    """
    total = len(os.listdir("/proc/self/fd")) + DAEMON + needed(tasks, page_servers)
    if total > limit():
        raise LazyPagesError(
            f"too few file descriptors: this restore needs {total}, the limit is {limit()} (RLIMIT_NOFILE): "
            f"{how_to_raise(total)}"
        )


def too_few_for_images() -> LazyPagesError:
    return LazyPagesError(
        f"too few file descriptors: the images alone need more than the limit of {limit()} "
        f"(RLIMIT_NOFILE): {how_to_raise(4 * limit())}"
    )


def how_to_raise(needed: int) -> str:
    """How to start with a higher limit."""
    needed = -(-needed // 64) * 64  # the next start may have a few more open
    return (
        f"start it with `prlimit --nofile={needed} lazypages serve ...` as root, or after `ulimit -Hn {needed}`; "
        f"in a systemd unit: LimitNOFILE={needed}"
    )


def how_to_raise_now() -> str:
    """How to raise the limit of this running process."""
    return f"`prlimit --pid {os.getpid()} --nofile={2 * limit()}` as root raises the limit"


class NoDescriptorError(LazyPagesError):
    """No file descriptor is free at the moment. Nothing has changed; the operation may be repeated."""


class Reserve:
    """A reserve of open descriptors, to be closed when others are needed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._fds: list[int] = []
        self.refill()

    def refill(self) -> None:
        """Open all descriptors of the reserve; if that fails, none, so that the remaining ones stay free for others."""
        try:
            while len(self._fds) < self._size:
                self._fds.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
        except OSError:
            self.release()

    def release(self) -> None:
        """Close all descriptors of the reserve, for others to use."""
        while self._fds:
            os.close(self._fds.pop())

    def attempt(self, action: Callable[[], T]) -> T:
        """Call `action`; if no descriptor is free, release the reserve and call it once more.

        Other threads may take some of the released descriptors; that is why the reserve has several.
        """
        try:
            return action()
        except OSError as error:
            if error.errno not in NONE_LEFT:
                raise
        self.release()
        try:
            return action()
        finally:
            self.refill()
