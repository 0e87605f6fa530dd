"""File descriptors: how many may be open, how many a restore needs, and a few kept back for when there are no others.

A descriptor that can't be had must never cost a task its memory: what a restorer sends stays in its socket
(:func:`lazypages.control.listener.receive`), and a fork is not reported until there is a number for its userfaultfd
(fs/userfaultfd.c, userfaultfd_ctx_read). Both wait then, and so do their tasks.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from typing import TypeVar

from lazypages.engine.uffd import Guard
from lazypages.errors import LazyPagesError

T = TypeVar("T")

#: Of one task: its userfaultfd and its pidfd.
PER_TASK = 2

#: Of one page server: two connections, each of which the engine duplicates and has an eventfd for, with a socket pair
#: where a relay stands between; and two more while one connection takes the place of another.
PER_SERVER = 12

#: Of the daemon itself beside what is open when the images have been read: control socket, guard, engine, event loop.
DAEMON = 32

#: Kept back for what the tasks fork: a userfaultfd each.
FOR_FORKS = 32

#: Kept back for looking after processes in /proc and ending them.
FOR_EMERGENCIES = 8

#: errno values that mean that there is no descriptor: for this process, for the whole system.
NONE_LEFT = (errno.EMFILE, errno.ENFILE)


def raise_limit() -> None:
    """Allows this process all that it may have; but none that the guard does not look after."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if 0 <= hard < Guard.MAX_FDS else Guard.MAX_FDS
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def limit() -> int:
    """How many this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def exhausted() -> bool:
    """Whether none can be had at the moment."""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in NONE_LEFT
    return False


def check_enough(tasks: int, page_servers: int) -> None:
    """To be called when the images have been read, which stay open. Raises LazyPagesError."""
    open_now = len(os.listdir("/proc/self/fd"))
    needed = open_now + DAEMON + tasks * PER_TASK + page_servers * PER_SERVER + FOR_FORKS + FOR_EMERGENCIES
    if needed > limit():
        raise LazyPagesError(
            f"too few file descriptors: this restore needs {needed} and {limit()} are allowed (RLIMIT_NOFILE): "
            f"{how_to_raise(needed)}"
        )


def too_few_for_images() -> LazyPagesError:
    return LazyPagesError(
        f"too few file descriptors: the images alone need more than the {limit()} that are allowed "
        f"(RLIMIT_NOFILE): {how_to_raise(4 * limit())}"
    )


def how_to_raise(needed: int) -> str:
    """What to do about too low a limit, before the start."""
    needed = -(-needed // 64) * 64  # another start may find a few more open
    return (
        f"start it with `prlimit --nofile={needed} lazypages serve ...` as root, or after `ulimit -Hn {needed}`; "
        f"in a systemd unit: LimitNOFILE={needed}"
    )


def how_to_raise_now() -> str:
    """The same for this process, which runs."""
    return f"`prlimit --pid {os.getpid()} --nofile={2 * limit()}` as root allows more"


class NoDescriptorError(LazyPagesError):
    """No file descriptor is free at the moment. Whatever it was for is as before, and may be tried again."""


class Reserve:
    """Descriptors that are open for nothing but to be closed when others are needed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._fds: list[int] = []
        self.refill()

    def refill(self) -> None:
        """All of it, or nothing: what there are few of is for those who need it."""
        try:
            while len(self._fds) < self._size:
                self._fds.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
        except OSError:
            self.release()

    def release(self) -> None:
        """Gives all of them to whoever needs some."""
        while self._fds:
            os.close(self._fds.pop())

    def attempt(self, action: Callable[[], T]) -> T:
        """Calls `action`, and if there is no descriptor once more, with these free for it.

        Other threads may take some of them, too; that is why there are several.
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
