"""``lazypages serve``: the options, which are those of ``criu lazy-pages``, and everything around the event loop."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import click

from images_spec.errors import ImageError
from lazypages import logs
from lazypages.cli.daemonize import daemonize, open_pidfile, report_ready
from lazypages.cli.imports import importing
from lazypages.cli.options import verbosity_option
from lazypages.cli.remote_options import SOURCE_OPTIONS, add_options, sources_of
from lazypages.control import descriptors
from lazypages.control.listener import ControlSocket
from lazypages.engine import kernel
from lazypages.engine.guard import Guard
from lazypages.engine.memory import PAGE_SIZE
from lazypages.errors import LazyPagesError
from lazypages.logs import MESSAGE
from lazypages.loop.options import ServeOptions
from lazypages.observe import summary
from lazypages.observe.metrics import Summary
from lazypages.sources.checkpoint import Expected, expect, written_by

if TYPE_CHECKING:
    from rich.console import Console

    from lazypages.observe.tracing import Tracer

log = logging.getLogger("lazypages")

#: The keys of lazypages.loop.run.LOOPS, which is imported later. Each is also the name of a Python package.
LOOPS = ("uvloop", "asyncio", "trio")

#: The lowest verbosity at which messages are printed.
PRINTS_MESSAGES = 1

EPILOG = """\b
Examples
  Start the daemon first, then the restore:
    lazypages serve -D /var/ckpt/job1
    criu restore -D /var/ckpt/job1 --lazy-pages -d
  In the background; the command returns when a restore can be started:
    lazypages serve -D /var/ckpt/job1 -d --pidfile serve.pid -o serve.log
  Statistics as JSON, and a picture of all faults and transfers:
    lazypages serve -D /var/ckpt/job1 --stats-json stats.json --trace trace
    lazypages plot /var/ckpt/job1/trace -o trace.html

\b
Ctrl-C (SIGINT) and SIGTERM
  Before a restore has connected: ends at once.
  After that: first completes the memory of all tasks. A second signal ends at
  once and kills the tasks that still miss memory: they would read zeros.

\b
Exit status
  0  every task has all its memory, or has exited by itself before
  1  the daemon failed; or a task lost memory; or a task was killed while it
     missed memory; or it ended then and how it ended is unknown
  2  wrong command line
"""


class Places(NamedTuple):
    """Directories and files. Relative paths of files are relative to the work directory, as with ``criu``."""

    images_dir: Path
    work_dir: Path
    log_file: Path | None
    pidfile: Path | None
    stats_json: Path | None
    trace: Path | None

    @classmethod
    def of(  # noqa: PLR0917 - the options
        cls,
        images_dir: Path,
        work_dir: Path | None,
        log_file: Path | None,
        pidfile: Path | None,
        stats_json: Path | None,
        trace: Path | None,
    ) -> Places:
        """Raises LazyPagesError if a directory or the inventory does not exist."""
        _check_directory("-D", images_dir)
        if work_dir is not None:
            _check_directory("-W", work_dir)
        if not (images_dir / "inventory.img").exists():
            raise LazyPagesError(f"-D {images_dir} is not a checkpoint: inventory.img not found")
        work = (work_dir or images_dir).absolute()
        log_path = log_file and (log_file if log_file == logs.STDOUT else work / log_file)
        return cls(
            images_dir.absolute(),
            work,
            log_path,
            pidfile and work / pidfile,
            stats_json and work / stats_json,
            trace and work / trace,
        )


def _check_directory(option: str, path: Path) -> None:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise LazyPagesError(f"{option} {path} {what}: use the same directory as for the restore")


@click.command(epilog=EPILOG)
@click.option(
    "-D",
    "--images-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path(),
    help="The images of the checkpoint, the same as for criu restore.  [default: .]",
)
@click.option(
    "-W",
    "--work-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Directory of the socket, the log, the pidfile and the statistics; must be the same for the restore.  "
    "[default: the images directory]",
)
@click.option(
    "-o", "--log-file", metavar="FILE", type=click.Path(path_type=Path), help="Log to FILE (- for stdout)."
)
@verbosity_option()
@click.option(
    "-d", "--daemon", is_flag=True, help="Go into the background as soon as a restore can be started."
)
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
    help="Write one 0 byte to file descriptor FD and close it when a restore can be started.",
)
@add_options(SOURCE_OPTIONS)
@click.option(
    "--no-background",
    is_flag=True,
    help="Copy pages only when they are touched.",
)
@click.option(
    "--stats-json",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write statistics to FILE at the end.",
)
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Record every fault and transfer in FILE; `lazypages plot` draws it.",
)
@click.option(
    "--loop",
    type=click.Choice(LOOPS),
    default="uvloop",
    envvar="LAZYPAGES_LOOP",
    show_default=True,
    help="The event loop.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    *,
    images_dir: Path,
    work_dir: Path | None,
    log_file: Path | None,
    verbosity: int,
    daemon: bool,
    pidfile: Path | None,
    status_fd: int | None,
    no_background: bool,
    stats_json: Path | None,
    trace: Path | None,
    loop: str,
    **source_options: Any,
) -> None:
    """Serve the memory of restored tasks on demand.

    Replaces `criu lazy-pages` beside an unchanged `criu restore --lazy-pages`. The tasks run at once; pages that
    they touch are copied first, all others in the background. Serves one restore, prints a summary, and exits.

    Listens on the socket lazy-pages.socket in the work directory, where the restore connects.
    """
    sources = sources_of(source_options)
    places = Places.of(images_dir, work_dir, log_file, pidfile, stats_json, trace)
    if daemon:
        # Keep the caller's standard error for the log, as criu does (observed with CRIU 4.2.1): daemonize() redirects
        # ours to /dev/null.
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    terminal = _terminal() if verbosity >= PRINTS_MESSAGES and not daemon and sys.stderr.isatty() else None
    log_stream = _log_stream(places.log_file, terminal)
    logs.start(verbosity, log_stream, terminal)
    descriptors.raise_limit()
    try:
        result = _serve(
            places,
            ServeOptions(not no_background, sources.page_servers, sources.remote),
            sources.directories,
            loop=loop,
            daemon=daemon,
            status_fd=status_fd,
            terminal=terminal,
            log_fd=(log_stream or sys.stderr).fileno(),
        )
    except Exception as error:
        expected = isinstance(error, LazyPagesError | ImageError)
        log.error("%s", error, extra=logs.PRINTED, exc_info=not expected)
        raise
    finally:
        _discard_unwritten()
    ctx.exit(0 if result.ok else 1)


def _serve(
    places: Places,
    options: ServeOptions,
    directories: Sequence[Path],
    *,
    loop: str,
    daemon: bool,
    status_fd: int | None,
    terminal: Console | None,
    log_fd: int,
) -> Summary:
    """Everything that can be checked is checked before readiness is signalled to a restore."""
    if status_fd is not None:
        _check_status_fd(status_fd)  # first, before a file that we open can get this number
    expected = _expect(places, options, directories)
    if options.remote:
        from dataclasses import replace  # noqa: PLC0415 - slow to import

        from images_spec.identity import identify  # noqa: PLC0415 - only needed with a page server

        remote = replace(
            options.remote,
            checkpoint=identify(places.images_dir),
            written_by=written_by(places.images_dir),
        )
        options = options._replace(remote=remote)
    tracer = _tracer(places, expected)
    _check_userfaultfd()
    if options.page_servers:
        _check_certificates(options)
    _check_loop(loop)
    ready: list[Callable[[], None]] = [
        lambda: log.log(MESSAGE, "%s", _invitation(places, expected)),
    ]
    if status_fd is not None:
        ready.append(partial(report_ready, status_fd))
    with ControlSocket(places.work_dir) as control:
        if daemon:
            ready.append(daemonize(open_pidfile(places.pidfile) if places.pidfile else None))
        elif places.pidfile:
            log.warning("--pidfile has no effect without -d")
        # A terminal that is closed must not leave tasks without their memory.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # The control socket closes before the guard ends: the guard holds uffds that were sent but never served.
        with Guard(log_fd) as guard, closing(control), ExitStack() as until_running:
            until_running.enter_context(
                _signals_blocked()
            )  # before any thread starts, since threads inherit it
            with tracer or nullcontext():
                options = options._replace(trace=tracer.ring if tracer else None)
                if not options.page_servers:
                    _signal_readiness(ready)
                until_running.enter_context(importing())
                from lazypages.loop.run import run  # noqa: PLC0415 - slow; runs while the restore starts

                result = run(
                    loop,
                    expected,
                    control,
                    options,
                    guard,
                    terminal=terminal,
                    begin=partial(_begin, ready) if options.page_servers else None,
                    running=until_running.close,
                )
    if result.tasks or result.finished:
        if terminal:
            with suppress(OSError):  # the terminal was closed
                terminal.print(summary.table(result))
        for line in summary.lines(result):
            log.log(MESSAGE, "%s", line, extra=logs.NOT_ON_TERMINAL)
    if places.stats_json:
        write_stats(places.stats_json, result)
    return result


def _expect(places: Places, options: ServeOptions, directories: Sequence[Path]) -> dict[int, Expected]:
    """Raises ImageError, LazyPagesError."""
    try:
        expected = expect(places.images_dir, remote=bool(options.page_servers), others=directories)
    except ImageError:
        if descriptors.exhausted():
            raise descriptors.too_few_for_images() from None
        raise
    alive = sum(task.memory is not None for task in expected.values())
    descriptors.check_enough(alive, len(options.page_servers))
    return expected


def _invitation(places: Places, expected: Mapping[int, Expected]) -> str:
    """The message when the daemon is ready: how much it will serve, and the command to start the restore."""
    alive = [task for task in expected.values() if task.memory is not None]
    pages = sum(task.lazy_pages for task in alive)
    where = f"-D {places.images_dir}"
    if places.work_dir != places.images_dir:
        where += f" -W {places.work_dir}"
    return (
        f"serving {summary.size(pages * PAGE_SIZE)} for {summary.count(len(alive), 'task')}; "
        f"waiting for: criu restore --lazy-pages {where}"
    )


def _tracer(places: Places, expected: Mapping[int, Expected]) -> Tracer | None:
    """Create the trace's file; its thread starts later, in the daemon. Raises TraceError."""
    if places.trace is None:
        return None
    from lazypages.observe.tracing import Tracer  # noqa: PLC0415 - keeps the start short

    levels = {pid: task.sources for pid, task in expected.items() if task.memory is not None}
    return Tracer(places.trace, places.images_dir, levels)


def _check_userfaultfd() -> None:
    """The restore creates the uffds; if this process can't create one, the restore probably can't either.

    Raises LazyPagesError.
    """
    match kernel.try_userfaultfd():
        case errno.ENOSYS:
            raise LazyPagesError(kernel.NO_USERFAULTFD)
        case 0:
            pass
        case error:
            log.warning(
                "this process cannot create a userfaultfd (%s); the restore must be able to",
                os.strerror(error),
            )


def _check_certificates(options: ServeOptions) -> None:
    """Raises TlsError."""
    from lazypages.sources.remote import check_certificates  # noqa: PLC0415 - slow to import

    check_certificates(options.page_servers, options.remote)


def _check_loop(loop: str) -> None:
    if find_spec(loop) is None:
        raise LazyPagesError(f"--loop {loop}: not installed; install the Python package {loop}")


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM until the server handles them; only the server can complete the tasks first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(ready: Sequence[Callable[[], None]], problems: Sequence[str]) -> None:
    """Signal that a restore can be started; before that, print the problems with page servers, wherever the log is."""
    for problem in problems:
        log.error("%s", problem, extra=logs.PRINTED)
        if log.isEnabledFor(logging.ERROR):
            with suppress(OSError):  # a closed terminal or pipe, a full disk: not a reason to end
                click.echo(f"lazypages: {problem}", err=True)
    _signal_readiness(ready)


def _signal_readiness(ready: Sequence[Callable[[], None]]) -> None:
    """Signal that a restore can be started. A failure is logged; it does not end the daemon."""
    for signal_ready in ready:
        try:
            signal_ready()
        except (OSError, LazyPagesError) as error:
            log.warning("cannot signal readiness: %s", error)


def _terminal() -> Console:
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only needed on terminals

    return Console(stderr=True, highlight=False)


def _log_stream(log_file: Path | None, terminal: Console | None) -> TextIO | None:
    """The stream for log lines beside the terminal; None: the terminal only."""
    if log_file is not None:
        return logs.open_log(log_file)
    return None if terminal else sys.stderr


def _discard_unwritten() -> None:
    """Discard output for a closed terminal or pipe; Python would otherwise exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _check_status_fd(status_fd: int) -> None:
    try:
        os.fstat(status_fd)
    except OSError as error:
        raise LazyPagesError(f"--status-fd {status_fd}: {error.strerror}") from error


def write_stats(path: Path, result: Summary) -> None:
    """Write a summary as JSON. Raises LazyPagesError."""
    import json  # noqa: PLC0415 - keeps the start short

    try:
        # On one line: indentation makes it ten times slower, which counts for a thousand tasks.
        path.write_text(json.dumps(result.as_dict()) + "\n")
    except OSError as error:
        raise LazyPagesError(f"--stats-json {path}: {error.strerror}") from error
