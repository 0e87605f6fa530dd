"""The limit of the size of pipes, raised while CRIU's page server needs that. It is the limit of the whole machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazypages.bench.errors import BenchError

LIMIT = Path("/proc/sys/fs/pipe-max-size")
#: Has the limit of before the first user. Each user holds a shared lock of it (flock(2)), which ends with the process.
#: Whoever comes or goes has the other kind of lock as well (fcntl(2), F_SETLKW).
USERS = Path("/run/lazypages-pipe-max-size")


@contextmanager
def raised_pipe_limit(size: int = 16 << 20) -> Iterator[None]:
    """Raise fs.pipe-max-size to at least `size` bytes for the block. The last of several users restores it.

    Without CAP_SYS_RESOURCE, CRIU's page server ends at requests past the first 16 pages of a pipe
    (docs/criu.md, "Page server protocol"). Raises BenchError.
    """
    try:
        users = os.open(USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with _alone(users) as alone:
                before = LIMIT.read_bytes()
                if alone:
                    os.ftruncate(users, 0)
                    os.pwrite(users, before, 0)
                LIMIT.write_text(str(max(size, int(before))))
        except BaseException:
            os.close(users)
            raise
    except OSError as error:
        raise BenchError(f"cannot raise {LIMIT} for CRIU's page server: {error.strerror}") from None
    try:
        yield
    finally:
        with _alone(users) as alone:
            if alone:
                LIMIT.write_bytes(os.pread(users, 100, 0))
        os.close(users)


@contextmanager
def _alone(users: int) -> Iterator[bool]:
    """Whether there is no other user; none comes or goes in the block. At its end this is one."""
    fcntl.lockf(users, fcntl.LOCK_EX)
    try:
        alone = False
        with suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        yield alone
        fcntl.flock(users, fcntl.LOCK_SH)
    finally:
        fcntl.lockf(users, fcntl.LOCK_UN)
