"""Binding of csrc/serve/guard.h: a process that kills the tasks with missing pages if this process dies."""

from __future__ import annotations

import os

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.errors import check_errno


class Guard:
    """A second process that keeps the uffds open if this process is killed.

    Without it the kernel would then serve zeros for missing pages. The guard kills the tasks with missing pages before
    it closes their uffds, and logs that to `log_fd` (as text, or `json`). It can't kill a forked task whose process is
    not known: the task's uffd stays open, and its faults wait.

    ``shared``: a listening socket that this process has from another one, as systemd's (-1: none). Restorers do not
    connect there, so the guard leaves it alone. Close it only after the guard's end.

    Start it while this process has a single thread: the two share the table of file descriptors (csrc/serve/guard.h).
    A context manager. The guard exits with the context, unless a task misses pages then: it handles such tasks as soon
    as this process has exited. The constructor raises OSError.
    """

    #: The guard handles descriptors below this number only; limit the others with RLIMIT_NOFILE.
    MAX_FDS = int(lib.LP_GUARD_FDS)

    def __init__(self, log_fd: int, *, json: bool = False, shared: int = -1) -> None:
        self.handle = lib.lp_guard_start(log_fd, json, shared)
        if self.handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        #: Number of times that :meth:`restart` has started another one.
        self.restarts = 0

    @property
    def pid(self) -> int:
        """Of the guard's process."""
        return int(lib.lp_guard_pid(self.handle))

    @property
    def pidfd(self) -> int:
        """Readable when the guard's process has died unexpectedly; -1: there is no such process."""
        return int(lib.lp_guard_pidfd(self.handle))

    def restart(self) -> None:
        """If the guard's process has died, starts another one for the same tasks.

        Raises OSError: then there is no guard.
        """
        check_errno(int(lib.lp_guard_restart(self.handle)))
        self.restarts += 1

    # For a process that outlives its restores.

    def leave(self, uffd: int, pid: int = 0, pidfd: int = -1) -> None:
        """Nobody serves this uffd any more; it stays open until the memory behind it is gone.

        ``pid``, ``pidfd``: its process, if known; the pidfd must stay open as long as :meth:`needs` says so.
        """
        lib.lp_guard_names(self.handle, uffd, pid, pidfd)
        lib.lp_guard_leave(self.handle, uffd)

    def close_gone(self) -> int:
        """Closes uffds that were left, by :meth:`leave` or by an engine, and whose memory is gone by now.

        Returns how many are left. One thread at a time calls this.
        """
        return int(lib.lp_guard_close_gone(self.handle))

    def needs(self, pidfd: int) -> bool:
        """Whether this pidfd names the process of a uffd that is left: it must stay open."""
        return bool(lib.lp_guard_needs(self.handle, pidfd))

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.lp_guard_end(self.handle)
