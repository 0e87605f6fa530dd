"""``lazypages serve``: the options, which are those of ``criu lazy-pages``, and everything around the event loop."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import click

from images_spec.errors import ImageError
from lazypages import logs
from lazypages.cli.config_files import CRIU_OPTIONS, Configured, log_settings
from lazypages.cli.config_files import EPILOG as CONFIG_EPILOG
from lazypages.cli.daemonize import (
    check_status_fd,
    into_background,
    kept_standard_error,
    report_ready,
    signal_readiness,
    signals_blocked,
)
from lazypages.cli.imports import importing
from lazypages.cli.options import LOOP_OPTION, add_options, check_loop, readiness_options, verbosity_option
from lazypages.cli.remote_options import SOURCE_OPTIONS, Sources, sources_of
from lazypages.control import descriptors
from lazypages.control.listener import ControlSocket
from lazypages.engine.guard import Guard
from lazypages.errors import LazyPagesError
from lazypages.logs import MESSAGE
from lazypages.loop.options import ServeOptions
from lazypages.loop.preparing import (
    check_certificates,
    check_userfaultfd,
    identified,
    invitation,
    open_tracer,
    read_checkpoint,
    with_memory,
)
from lazypages.observe import summary
from lazypages.observe.metrics import Summary
from lazypages.outputs import check_output

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("lazypages")

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
  Statistics or a trace that can't be written at the end change nothing of it;
  that is reported on standard error.
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
        """Raises LazyPagesError if a directory or the inventory does not exist, or the statistics can't be written."""
        _check_directory("-D", images_dir)
        if work_dir is not None:
            _check_directory("-W", work_dir)
        if not (images_dir / "inventory.img").exists():
            raise LazyPagesError(f"-D {images_dir} is not a checkpoint: inventory.img not found")
        work = (work_dir or images_dir).absolute()
        log_path = log_file and (log_file if log_file == logs.STDOUT else work / log_file)
        if stats_json:
            check_output("--stats-json", work / stats_json)
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


@click.command(cls=Configured, epilog=EPILOG + CONFIG_EPILOG)
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
@add_options(readiness_options("a restore can be started"))
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
@LOOP_OPTION
@click.option(
    "--via",
    metavar="SOCKET",
    type=click.Path(path_type=Path),
    help="Let the resident daemon at SOCKET (lazypages daemon) serve the restore.",
)
@add_options(CRIU_OPTIONS)
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
    via: Path | None,
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
        sys.stderr = kept_standard_error()
    terminal = logs.on_terminal() if verbosity >= PRINTS_MESSAGES and not daemon else None
    log_stream = _log_stream(places.log_file, terminal)
    logs.start(verbosity, log_stream, terminal)
    log_settings(ctx)
    descriptors.raise_limit()
    try:
        if via is not None:
            status = _serve_via(
                via,
                places,
                sources,
                background=not no_background,
                daemon=daemon,
                status_fd=status_fd,
                verbosity=verbosity,
            )
        else:
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
            status = 0 if result.ok else 1
    except Exception as error:
        expected = isinstance(error, LazyPagesError | ImageError)
        log.error("%s", error, extra=logs.PRINTED, exc_info=not expected)
        raise
    finally:
        _discard_unwritten()
    ctx.exit(status)


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
        check_status_fd(status_fd)  # first, before a file that we open can get this number
    expected = read_checkpoint(places.images_dir, options, directories)
    descriptors.check_enough(len(with_memory(expected)), len(options.page_servers))
    options = identified(options, places.images_dir)
    check_userfaultfd()
    check_certificates(options)
    check_loop(loop)
    ready: list[Callable[[], None]] = [
        lambda: log.log(MESSAGE, "%s", invitation(places.images_dir, places.work_dir, expected)),
    ]
    if status_fd is not None:
        ready.append(partial(report_ready, status_fd))
    with ControlSocket(places.work_dir) as control:
        # after the checks: it empties the file
        tracer = open_tracer(places.trace, places.images_dir, expected) if places.trace else None
        ready += into_background(daemon, places.pidfile)
        # A terminal that is closed must not leave tasks without their memory.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # The control socket closes before the guard ends: the guard holds uffds that were sent but never served.
        with Guard(log_fd) as guard, closing(control), ExitStack() as until_running:
            until_running.enter_context(signals_blocked())
            with tracer or nullcontext():
                options = options._replace(trace=tracer.ring if tracer else None)
                if not options.page_servers:
                    signal_readiness(ready)
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
        _write_stats(places.stats_json, result.as_dict())
    return result


def _serve_via(
    via: Path,
    places: Places,
    sources: Sources,
    *,
    background: bool,
    daemon: bool,
    status_fd: int | None,
    verbosity: int,
) -> int:
    """As _serve, by the resident daemon. Returns the exit status."""
    from lazypages.cli.via import Handed  # noqa: PLC0415 - only needed here

    if status_fd is not None:
        check_status_fd(status_fd)
    ready: list[Callable[[], None]] = [] if status_fd is None else [partial(report_ready, status_fd)]
    handed = Handed(
        via,
        places.images_dir,
        places.work_dir,
        sources,
        background=background,
        trace=places.trace,
        verbosity=verbosity,
    )
    try:
        ready += into_background(daemon, places.pidfile)
    except LazyPagesError:
        handed.abandon()
        raise
    result = handed.wait(_begin, ready)
    if places.stats_json:
        _write_stats(places.stats_json, result["summary"])
    return int(result["exit"])


def _begin(ready: Sequence[Callable[[], None]], problems: Sequence[str]) -> None:
    """Signal that a restore can be started; before that, print the problems with page servers, wherever the log is."""
    if log.isEnabledFor(logging.ERROR):
        for problem in problems:
            _report(problem)
    signal_readiness(ready)


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


def _write_stats(path: Path, result: dict[str, Any]) -> None:
    """Write a summary as JSON. A failure is reported, and is not a failure of the restore."""
    import json  # noqa: PLC0415 - keeps the start short

    try:
        # On one line: indentation makes it ten times slower, which counts for a thousand tasks.
        path.write_text(json.dumps(result) + "\n")
    except OSError as error:
        _report(f"--stats-json {path}: {error.strerror}; this concerns the statistics only")


def _report(text: str) -> None:
    """An error that does not end the command: in the log, and on standard error wherever the log goes."""
    log.error("%s", text, extra=logs.PRINTED)
    with suppress(OSError):  # a closed terminal or pipe, a full disk: not a reason to end
        click.echo(f"lazypages: {text}", err=True)
