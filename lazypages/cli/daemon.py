"""``lazypages daemon``: the resident daemon, for many restores (docs/daemon.md)."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazypages import logs
from lazypages.cli.daemonize import check_status_fd, daemonize, open_pidfile, report_ready
from lazypages.cli.imports import importing
from lazypages.cli.options import verbosity_option
from lazypages.control import descriptors
from lazypages.engine.guard import Guard
from lazypages.errors import LazyPagesError
from lazypages.logs import MESSAGE
from lazypages.loop.preparing import check_userfaultfd
from lazypages.resident.protocol import SOCKET

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

log = logging.getLogger("lazypages")

#: The keys of lazypages.loop.run.LOOPS, which is imported later. Each is also the name of a Python package.
LOOPS = ("uvloop", "asyncio", "trio")

EPILOG = """\b
Examples
    lazypages daemon -d --pidfile /run/lazypages.pid -o /var/log/lazypages.log
    lazypages serve --via /run/lazypages.socket -D /var/ckpt/job1
    lazypages ctl status

\b
SIGINT and SIGTERM
  The daemon admits no restore any more, completes the memory of all tasks, and
  ends. A second signal ends at once and kills the tasks that still miss memory.
"""


@click.command(epilog=EPILOG)
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    default=SOCKET,
    show_default=True,
    help="Listen at this unix socket.",
)
@click.option(
    "--max-restores",
    metavar="N",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Restores that are served at the same time.",
)
@click.option(
    "--max-descriptors",
    metavar="N",
    type=click.IntRange(min=1),
    help="File descriptors of the daemon: about 64 for each restore, 2 for each task.  [default: as many as allowed]",
)
@click.option("-o", "--log-file", metavar="FILE", type=click.Path(path_type=Path), help="Log to FILE.")
@verbosity_option()
@click.option("-d", "--daemon", is_flag=True, help="Go into the background as soon as clients can connect.")
@click.option(
    "--pidfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="With -d: write the daemon's pid to FILE, which must not exist.",
)
@click.option(
    "--status-fd",
    metavar="FD",
    type=click.IntRange(min=0),
    help="Write one 0 byte to file descriptor FD and close it when clients can connect.",
)
@click.option(
    "--loop",
    type=click.Choice(LOOPS),
    default="uvloop",
    envvar="LAZYPAGES_LOOP",
    show_default=True,
    help="The event loop.",
)
def daemon_command(
    *,
    path: Path,
    max_restores: int,
    max_descriptors: int | None,
    log_file: Path | None,
    verbosity: int,
    daemon: bool,
    pidfile: Path | None,
    status_fd: int | None,
    loop: str,
) -> None:
    """Serve many restores in one process.

    Clients ask it over a unix socket to serve a checkpoint in a work directory: `lazypages serve --via`,
    `lazypages ctl`, or any program (docs/daemon.md describes the messages). Only root and the daemon's own user may.
    """
    if status_fd is not None:
        check_status_fd(status_fd)
    if find_spec(loop) is None:
        raise LazyPagesError(f"--loop {loop}: not installed; install the Python package {loop}")
    if daemon:
        # Keep the caller's standard error for the log: daemonize() redirects ours to /dev/null.
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    stream = logs.open_log(log_file.absolute()) if log_file else sys.stderr
    logs.start(verbosity, stream, None)
    _limit_descriptors(max_descriptors)
    check_userfaultfd()
    with _listening(path.absolute()) as listener:
        ready: list[Callable[[], None]] = [
            lambda: log.log(MESSAGE, "waiting for clients at %s", path.absolute())
        ]
        if status_fd is not None:
            ready.append(partial(report_ready, status_fd))
        if daemon:
            ready.append(daemonize(open_pidfile(pidfile.absolute()) if pidfile else None))
        elif pidfile:
            log.warning("--pidfile has no effect without -d")
        _serve(loop, listener, max_restores, stream.fileno(), ready)


def _serve(
    loop: str, listener: socket.socket, max_restores: int, log_fd: int, ready: list[Callable[[], None]]
) -> None:
    # A terminal that is closed must not leave tasks without their memory.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Guard(log_fd) as guard, ExitStack() as until_running:
        until_running.enter_context(importing())
        # Before any thread starts, since threads inherit it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        until_running.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        from lazypages.resident.run import run  # noqa: PLC0415 - slow to import
        from lazypages.resident.service import Limits  # noqa: PLC0415

        def running() -> None:
            until_running.close()
            for signal_ready in ready:
                try:
                    signal_ready()
                except (OSError, LazyPagesError) as error:
                    log.warning("cannot signal readiness: %s", error)

        run(loop, listener, guard, Limits(max_restores, descriptors.limit()), ready=running)


def _limit_descriptors(most: int | None) -> None:
    """Raises LazyPagesError."""
    descriptors.raise_limit()
    if most is None:
        return
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most > descriptors.limit():
        raise LazyPagesError(
            f"--max-descriptors {most}: only {descriptors.limit()} are allowed (RLIMIT_NOFILE): start it after "
            f"`ulimit -Hn {most}` as root, or with LimitNOFILE={most} in its systemd unit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """The listening socket, with mode 0600. On exit its file is removed, if it is still ours. Raises ListenError."""
    from lazypages.net.listen import UNIX_PREFIX, ListenError, listen  # noqa: PLC0415 - slow to import

    try:
        listener, _name = listen(f"{UNIX_PREFIX}{path}", 0, insecure=False, tls=False)
    except ListenError as error:
        if path.is_socket():
            raise ListenError(
                f"{path} is served by another daemon: end that one, or choose another --socket"
            ) from None
        raise ListenError(f"--socket: {error}") from None
    with listener:
        made = path.lstat()
        try:
            yield listener
        finally:
            with suppress(OSError):
                found = path.lstat()
                if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
                    path.unlink()
