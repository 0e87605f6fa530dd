"""The process that kills tasks which miss pages when this one is killed; see csrc/serve/guard.h."""

from __future__ import annotations

import os

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.errors import check_errno


class Guard:
    """A second process that holds this one's file descriptors, and so the uffds, when this one is killed.

    Tasks that miss pages would read zeros where they are missing then; it kills them first, and says so on
    `log_fd`. Forked tasks, whose processes are not known, it keeps waiting. It is begun while there is one thread
    only, and shares the table of file descriptors from then on (see csrc/serve/guard.h). It ends with the context
    unless tasks that miss pages are left then: with these it deals as soon as this process has ended. Raises OSError.
    """

    #: It looks after descriptors below this number only: see to it that there are no others (RLIMIT_NOFILE).
    MAX_FDS = int(lib.LP_GUARD_FDS)

    def __init__(self, log_fd: int) -> None:
        self.handle = lib.lp_guard_start(log_fd)
        if self.handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    @property
    def pid(self) -> int:
        return int(lib.lp_guard_pid(self.handle))

    @property
    def pidfd(self) -> int:
        """Readable when that process has ended, though it should not; -1: there is none."""
        return int(lib.lp_guard_pidfd(self.handle))

    def restart(self) -> None:
        """If it has ended, begins another one, which knows what it knew. Raises OSError: there is none then."""
        check_errno(int(lib.lp_guard_restart(self.handle)))

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.lp_guard_end(self.handle)
