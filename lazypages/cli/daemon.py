"""``lazypages daemon``: the resident daemon, for many restores (docs/daemon.md)."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from lazypages import logs
from lazypages.cli.activation import ActivationError, listener_of, name_of, take_passed
from lazypages.cli.daemon_socket import socket_option
from lazypages.cli.daemonize import (
    check_status_fd,
    into_background,
    kept_standard_error,
    report_ready,
    signal_readiness,
    signals_blocked,
)
from lazypages.cli.export_options import EXPORT_OPTIONS, exporting
from lazypages.cli.imports import importing
from lazypages.cli.options import (
    LOG_FORMAT_OPTION,
    LOOP_OPTION,
    add_options,
    check_loop,
    readiness_options,
    verbosity_option,
)
from lazypages.control import descriptors
from lazypages.engine.guard import Guard
from lazypages.errors import LazyPagesError
from lazypages.logs import MESSAGE
from lazypages.loop.preparing import check_userfaultfd
from lazypages.notify import Notifier

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from lazypages.export.options import ExportOptions

log = logging.getLogger("lazypages")

#: The user and group nobody of Debian; any but root would do.
_NOBODY = 65534

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
@socket_option("Listen at this unix socket.")
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
@click.option(
    "--max-memory",
    metavar="MIB",
    type=click.IntRange(min=1),
    help="MiB for tables of the memory of tasks: about 0.5 byte for each page.  [default: no limit]",
)
@click.option(
    "--all-users",
    is_flag=True,
    help="Let every user of this machine connect. A user may have served what this user may read (docs/daemon.md).",
)
@click.option("-o", "--log-file", metavar="FILE", type=click.Path(path_type=Path), help="Log to FILE.")
@LOG_FORMAT_OPTION
@verbosity_option()
@add_options(readiness_options("clients can connect"))
@add_options(EXPORT_OPTIONS)
@LOOP_OPTION
@click.pass_context
def daemon_command(
    ctx: click.Context,
    /,
    *,
    path: Path,
    max_restores: int,
    max_descriptors: int | None,
    max_memory: int | None,
    all_users: bool,
    log_file: Path | None,
    log_format: str,
    verbosity: int,
    daemon: bool,
    pidfile: Path | None,
    status_fd: int | None,
    metrics: str | None,
    metrics_textfile: Path | None,
    otel: bool,
    loop: str,
) -> None:
    """Serve many restores in one process.

    Clients ask it over a unix socket to serve a checkpoint in a work directory: `lazypages serve --via`,
    `lazypages ctl`, or any program (docs/daemon.md describes the messages). Only root and the daemon's own user may,
    unless --all-users is given. systemd can start it when the first client connects (docs/systemd.md).
    """
    notifier = Notifier.take()
    passed = listener_of(take_passed(os.environ, os.getpid()))
    if passed and ctx.get_parameter_source("path") is ParameterSource.COMMANDLINE:
        raise ActivationError(
            f"--socket {path}: systemd has passed a socket already, {name_of(passed)}: leave one out"
        )
    if status_fd is not None:
        check_status_fd(status_fd)
    check_loop(loop)
    if all_users and os.geteuid():
        raise LazyPagesError("--all-users: only root can open files as other users: start it as root")
    if all_users:
        _check_can_act()
    if daemon:
        sys.stderr = kept_standard_error()
    stream = logs.open_log(log_file.absolute()) if log_file else sys.stderr
    logs.start(verbosity, stream, None, log_format=log_format)
    _limit_descriptors(max_descriptors)
    check_userfaultfd()
    textfile = metrics_textfile and metrics_textfile.absolute()
    mode = 0o666 if all_users else 0o600
    with (
        exporting(metrics, textfile, otel=otel) as export,
        passed or _listening(path.absolute(), mode) as listener,
    ):
        ready: list[Callable[[], None]] = [
            lambda: log.log(MESSAGE, "waiting for clients at %s", name_of(listener))
        ]
        if status_fd is not None:
            ready.append(partial(report_ready, status_fd))
        ready.append(notifier.ready)
        ready += into_background(daemon, pidfile and pidfile.absolute())
        memory = None if max_memory is None else max_memory << 20
        limits = max_restores, memory, all_users
        # A terminal that is closed must not leave tasks without their memory.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        shared = passed.fileno() if passed else -1
        with Guard(stream.fileno(), json=logs.is_json(), shared=shared) as guard:
            _serve(loop, listener, guard, limits, notifier=notifier, ready=ready, export=export)


def _serve(
    loop: str,
    listener: socket.socket,
    guard: Guard,
    limits: tuple[int, int | None, bool],
    *,
    notifier: Notifier,
    ready: list[Callable[[], None]],
    export: ExportOptions | None,
) -> None:
    with ExitStack() as until_running:
        until_running.enter_context(importing())
        until_running.enter_context(signals_blocked())
        from lazypages.resident.run import run  # noqa: PLC0415 - slow to import
        from lazypages.resident.service import Limits  # noqa: PLC0415

        def running() -> None:
            until_running.close()
            signal_readiness(ready)

        restores, memory, all_users = limits
        run(
            loop,
            listener,
            guard,
            Limits(restores, descriptors.limit(), memory, all_users),
            ready=running,
            notifier=notifier,
            export=export,
        )
    notifier.stopping()


def _check_can_act() -> None:
    """Whether files can be opened as other users. Raises LazyPagesError."""
    from lazypages.resident.users import User, acting_as  # noqa: PLC0415 - only needed here

    try:
        with acting_as(User(_NOBODY, _NOBODY)):
            pass
    except OSError:
        raise LazyPagesError(
            "--all-users: files can't be opened as other users: start it with CAP_SETUID and CAP_SETGID (in its "
            "systemd unit: CapabilityBoundingSet=)"
        ) from None


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
def _listening(path: Path, mode: int) -> Iterator[socket.socket]:
    """The listening socket. On exit its file is removed, if it is still ours. Raises ListenError."""
    from lazypages.net.listen import (  # noqa: PLC0415 - slow to import
        UNIX_PREFIX,
        ListenError,
        listen,
        removed_afterwards,
    )

    try:
        listener, _name = listen(f"{UNIX_PREFIX}{path}", 0, insecure=False, tls=False)
    except ListenError as error:
        if path.is_socket():
            raise ListenError(
                f"{path} is served by another daemon: end that one, or choose another --socket"
            ) from None
        raise ListenError(f"--socket: {error}") from None
    with listener:
        path.chmod(mode)
        with removed_afterwards(path):
            yield listener
