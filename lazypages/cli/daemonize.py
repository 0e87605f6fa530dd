"""Going into the background and signalling readiness, as ``criu lazy-pages`` does (docs/criu.md, "Control socket")."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lazypages.errors import LazyPagesError


def open_pidfile(path: Path) -> int:
    """Create a pidfile with mode 0600. Raises LazyPagesError, also if it exists."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise LazyPagesError(f"--pidfile {path} exists: remove it if no daemon of that pid runs") from error
    except OSError as error:
        raise LazyPagesError(f"--pidfile {path}: {error.strerror}") from error


def daemonize(pidfile: int | None) -> Callable[[], None]:
    """Fork, and return in the child: the daemon, in a session of its own, its pid in `pidfile`, stdio on /dev/null.

    The child calls the returned function when it is ready. The parent does not return: it exits with 0 when the
    child is ready, and with 1 if the child ends before; then it removes the pidfile. The process must have only one
    thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ready, ready_writer = os.pipe()
    if os.fork():
        os.close(ready_writer)
        # _exit: no clean-up here; the control socket and other resources belong to the child.
        if os.read(ready, 1):
            os._exit(0)
        if pidfile is not None:  # it would be in the way of the next try
            with suppress(OSError):
                os.unlink(os.readlink(f"/proc/self/fd/{pidfile}"))
        os._exit(1)
    os.close(ready)
    os.setsid()
    if pidfile is not None:
        os.write(pidfile, str(os.getpid()).encode())
        os.close(pidfile)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)

    def signal_ready() -> None:
        os.write(ready_writer, b"\0")
        os.close(ready_writer)

    return signal_ready


def check_status_fd(status_fd: int) -> None:
    """Call it before any file is opened, which could get this number. Raises LazyPagesError if the fd is not open."""
    try:
        os.fstat(status_fd)
    except OSError as error:
        raise LazyPagesError(f"--status-fd {status_fd}: {error.strerror}") from error


def report_ready(status_fd: int) -> None:
    """Write one 0 byte and close the fd, as ``criu lazy-pages --status-fd`` does. Raises LazyPagesError."""
    try:
        os.write(status_fd, b"\0")
        os.close(status_fd)
    except OSError as error:
        raise LazyPagesError(f"--status-fd {status_fd}: {error.strerror}") from error
