"""Going into the background once everything is checked, and saying so, as ``criu lazy-pages`` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from lazypages.errors import LazyPagesError


def open_pidfile(path: Path) -> int:
    """A new file for its owner only; one that exists is somebody's and an error. Raises LazyPagesError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise LazyPagesError(f"--pidfile {path} exists: remove it if no daemon of that pid runs") from error
    except OSError as error:
        raise LazyPagesError(f"--pidfile {path}: {error.strerror}") from error


def daemonize(pidfile: int | None) -> Callable[[], None]:
    """Returns in the daemon: a child in a session of its own, its pid in `pidfile`, stdio on /dev/null.

    The process that calls it ends here: with 0 when the child calls what this returns, to say that it is
    ready; with 1 when the child ends before that. It must have one thread only.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ready, tell_ready = os.pipe()
    if os.fork():
        os.close(tell_ready)
        # _exit: what is open here (the control socket above all) is the child's to clean up.
        os._exit(0 if os.read(ready, 1) else 1)
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

    def tell() -> None:
        os.write(tell_ready, b"\0")
        os.close(tell_ready)

    return tell


def tell_ready(status_fd: int) -> None:
    """One 0 byte, then the fd is closed, as ``criu lazy-pages --status-fd`` does. Raises LazyPagesError."""
    try:
        os.write(status_fd, b"\0")
        os.close(status_fd)
    except OSError as error:
        raise LazyPagesError(f"--status-fd {status_fd}: {error.strerror}") from error
