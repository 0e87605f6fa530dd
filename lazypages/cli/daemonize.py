"""Going into the background and signalling readiness, as ``criu lazy-pages`` does (docs/criu.md, "Control socket")."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from lazypages.errors import LazyPagesError
from lazypages.outputs import already_there, cannot_write

log = logging.getLogger("lazypages")


def kept_standard_error() -> TextIO:
    """The caller's standard error for the log, as ``criu`` keeps it (seen with 4.2.1): daemonize() redirects ours."""
    return os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")


def into_background(daemon: bool, pidfile: Path | None) -> list[Callable[[], None]]:
    """With `daemon`, as daemonize(): what signals readiness to the parent; else nothing. Raises LazyPagesError."""
    if daemon:
        return [daemonize(pidfile)]
    if pidfile:
        log.warning("--pidfile has no effect without -d")
    return []


def daemonize(pidfile: Path | None) -> Callable[[], None]:
    """Fork, and return in the child: the daemon, in a session of its own, its pid in `pidfile`, stdio on /dev/null.

    The child calls the returned function when it is ready. The parent does not return: it exits with 0 when the
    child is ready, and with 1 if the child ends before; then it removes the pidfile. The process must have only one
    thread. Raises LazyPagesError if the pidfile, an absolute path, exists or can't be created.
    """
    pid_fd = _open_pidfile(pidfile) if pidfile else None
    sys.stdout.flush()
    sys.stderr.flush()
    ready, ready_writer = os.pipe()
    if os.fork():
        os.close(ready_writer)
        # _exit: no clean-up here; the control socket and other resources belong to the child.
        if os.read(ready, 1):
            os._exit(0)
        if pidfile:  # it would be in the way of the next try
            with suppress(OSError):
                pidfile.unlink()
        os._exit(1)
    os.close(ready)
    os.setsid()
    if pid_fd is not None:
        os.write(pid_fd, str(os.getpid()).encode())
        os.close(pid_fd)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)

    def signal_ready() -> None:
        os.write(ready_writer, b"\0")
        os.close(ready_writer)

    return signal_ready


def _open_pidfile(path: Path) -> int:
    """With mode 0600."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise already_there("--pidfile", path) from None
    except OSError as error:
        raise cannot_write("--pidfile", path, error, exists=False) from None


def signal_readiness(ready: Sequence[Callable[[], None]]) -> None:
    """Call what signals readiness. A failure is logged; it does not end the daemon."""
    for signal_ready in ready:
        try:
            signal_ready()
        except (OSError, LazyPagesError) as error:
            log.warning("cannot signal readiness: %s", error)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM until the event loop handles them; only it can complete the tasks first.

    Before any thread starts, since threads inherit it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
