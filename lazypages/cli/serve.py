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
from lazypages.cli.packs import Cache, place_of, placed
from lazypages.cli.remote_options import SOURCE_OPTIONS, Sources, sources_of
from lazypages.control import descriptors
from lazypages.control.listener import ControlSocket
from lazypages.engine.guard import Guard
from lazypages.errors import LazyPagesError
from lazypages.export.options import ExportOptions
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
from lazypages.notify import Notifier
from lazypages.observe import summary
from lazypages.observe.metrics import Summary
from lazypages.outputs import STDOUT, check_output

if TYPE_CHECKING:
    from rich.console import Console

    from lazypages.sources.checkpoint import Expected

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
  Before the images are copied to this host, so that no time is lost then:
    lazypages serve -D /var/ckpt/job2 -W /run/job2 --wait &
    rsync -a source:/var/ckpt/job2/ /var/ckpt/job2.part/
    mv /var/ckpt/job2.part /var/ckpt/job2
    criu restore -D /var/ckpt/job2 -W /run/job2 --lazy-pages -d

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
    """Directories and files. Relative paths of files are relative to the work directory, as with ``criu``.

    ``pack``: the packed checkpoint whose images are placed in the work directory, which then is ``images_dir``.
    """

    images_dir: Path
    work_dir: Path
    log_file: Path | None
    pidfile: Path | None
    stats_json: Path | None
    trace: Path | None
    pack: Path | str | None

    @classmethod
    def of(  # noqa: PLR0917 - the options
        cls,
        images: Path | str,
        work_dir: Path | None,
        log_file: Path | None,
        pidfile: Path | None,
        stats_json: Path | None,
        trace: Path | None,
        *,
        daemon: bool,
        wait: bool,
    ) -> Places:
        """Raises LazyPagesError if a directory or the inventory does not exist, or a file can't be written.

        `wait`: the images need not be there yet.

        Nothing is changed: no file is created or emptied before all of them have been checked.
        """
        pack = None
        if _is_pack(images):
            if work_dir is None:
                raise LazyPagesError(
                    f"-D {images} is not a directory; if it is a packed checkpoint, name one for its images "
                    "with -W (it is -D of the restore)"
                )
            pack = images.absolute() if isinstance(images, Path) else images
            images, wait = work_dir, True  # its images are not there yet
        images_dir = Path(images)
        if wait and work_dir is None and not images_dir.is_dir():
            raise LazyPagesError(
                f"-D {images_dir} does not exist yet: with --wait, name a work directory with -W "
                "(the same for the restore)"
            )
        if not wait or images_dir.exists():
            _check_directory("-D", images_dir)
        if work_dir is not None:
            _check_directory("-W", work_dir)
        if not (wait or (images_dir / "inventory.img").exists()):
            raise LazyPagesError(f"-D {images_dir} is not a checkpoint: inventory.img not found")
        if daemon and stats_json == STDOUT:
            raise LazyPagesError("--stats-json - needs standard output, which -d closes: name a file")
        work = (work_dir or images_dir).absolute()

        def place(file: Path | None) -> Path | None:
            return file and (file if file == STDOUT else work / file)

        places = cls(
            images_dir.absolute(),
            work,
            place(log_file),
            pidfile and work / pidfile,
            place(stats_json),
            trace and work / trace,
            pack,
        )
        for option, path in (
            ("-o", places.log_file),
            ("--stats-json", places.stats_json),
            ("--trace", places.trace),
        ):
            if path is not None and path != STDOUT:
                check_output(option, path)
        if daemon and places.pidfile:
            check_output("--pidfile", places.pidfile, new=True)
        return places


def _is_pack(images: Path | str) -> bool:
    """Whether -D names a packed checkpoint."""
    return isinstance(images, str) or images.is_file()


def _check_directory(option: str, path: Path) -> None:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise LazyPagesError(f"{option} {path} {what}: use the same directory as for the restore")


@click.command(cls=Configured, epilog=EPILOG + CONFIG_EPILOG)
@click.option(
    "-D",
    "--images-dir",
    "images",
    metavar="DIR",
    type=click.Path(),
    default="",
    help="The images of the checkpoint, the same as for criu restore; or a packed checkpoint (lazypages pack): a file, "
    "or s3://, gs://, az://, http:// or https:// and the rest of its address. Its images are placed in the work "
    "directory, which is -D of the restore.  [default: .]",
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
@LOG_FORMAT_OPTION
@verbosity_option()
@add_options(readiness_options("a restore can be started"))
@add_options(SOURCE_OPTIONS)
@click.option(
    "--pack-cache",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep frames of a packed checkpoint in a store also in DIR, for later restores on this machine; DIR may be "
    "shared by any number of them.",
)
@click.option(
    "--pack-cache-size",
    metavar="MIB",
    type=click.IntRange(min=1),
    default=10 << 10,
    show_default=True,
    help="Keep at most so many MiB there, of all packs; those that were not used for the longest time are removed.",
)
@click.option(
    "--no-background",
    is_flag=True,
    help="Copy pages only when they are touched.",
)
@click.option(
    "--stats-json",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write statistics to FILE at the end (- for stdout).",
)
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Record every fault and transfer in FILE; `lazypages plot` draws it.",
)
@click.option(
    "--wait",
    is_flag=True,
    help="If the images are not there yet, wait for inventory.img. It must come last, or with its whole directory when "
    "that is renamed.",
)
@add_options(EXPORT_OPTIONS)
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
    images: str,
    work_dir: Path | None,
    log_file: Path | None,
    log_format: str,
    verbosity: int,
    daemon: bool,
    pidfile: Path | None,
    status_fd: int | None,
    pack_cache: Path | None,
    pack_cache_size: int,
    no_background: bool,
    stats_json: Path | None,
    trace: Path | None,
    wait: bool,
    metrics: str | None,
    metrics_textfile: Path | None,
    otel: bool,
    loop: str,
    via: Path | None,
    **source_options: Any,
) -> None:
    """Serve the memory of restored tasks on demand.

    Replaces `criu lazy-pages` beside an unchanged `criu restore --lazy-pages`. The tasks run at once; pages that
    they touch are copied first, all others in the background. Serves one restore, prints a summary, and exits.

    Listens on the socket lazy-pages.socket in the work directory, where the restore connects.
    """
    notifier = Notifier.take()
    place = place_of(images)
    sources = sources_of(source_options, packed=_is_pack(place))
    places = Places.of(place, work_dir, log_file, pidfile, stats_json, trace, daemon=daemon, wait=wait)
    cache = Cache(pack_cache.absolute(), pack_cache_size << 20) if pack_cache else None
    if cache and not isinstance(places.pack, str):
        raise LazyPagesError(f"--pack-cache {pack_cache}: -D is not a packed checkpoint in a store")
    if via is not None and places.pack is not None:
        raise LazyPagesError(
            f"-D {places.pack}: the resident daemon serves no packed checkpoint: leave out --via"
        )
    if via is not None and (metrics is not None or metrics_textfile is not None or otel):
        raise LazyPagesError(
            "--metrics, --metrics-textfile and --otel: give them to the daemon, not beside --via"
        )
    if daemon:
        sys.stderr = kept_standard_error()
    # JSON without a file goes to standard error, also if that is a terminal
    for_people = log_format != "json" or places.log_file is not None
    terminal = logs.on_terminal() if verbosity >= PRINTS_MESSAGES and for_people and not daemon else None
    log_stream = _log_stream(places.log_file, terminal)
    logs.start(verbosity, log_stream, terminal, log_format=log_format)
    log_settings(ctx)
    descriptors.raise_limit()
    try:
        if via is not None:
            if wait:
                with signals_blocked():
                    _wait_for_images(places.images_dir)
            status = _serve_via(
                via,
                places,
                sources,
                background=not no_background,
                daemon=daemon,
                status_fd=status_fd,
                verbosity=verbosity,
                notifier=notifier,
            )
        else:
            textfile = metrics_textfile and places.work_dir / metrics_textfile
            with exporting(metrics, textfile, otel=otel) as export, ExitStack() as opened:
                result = _serve(
                    places,
                    ServeOptions(not no_background, sources.page_servers, sources.remote),
                    sources.directories,
                    loop=loop,
                    daemon=daemon,
                    status_fd=status_fd,
                    wait=wait and places.pack is None,
                    terminal=terminal,
                    log_fd=(log_stream or sys.stderr).fileno(),
                    notifier=notifier,
                    export=export,
                    with_pack=partial(_with_pack, places, sources, cache, opened),
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
    wait: bool,
    terminal: Console | None,
    log_fd: int,
    notifier: Notifier,
    export: ExportOptions | None,
    with_pack: Callable[[ServeOptions], ServeOptions],
) -> Summary:
    """Everything that can be checked is checked before readiness is signalled to a restore.

    ``with_pack``: see _with_pack.
    """
    if status_fd is not None:
        check_status_fd(status_fd)  # first, before a file that we open can get this number
    check_userfaultfd()
    check_certificates(options)
    check_loop(loop)
    late = daemon and isinstance(
        places.pack, str
    )  # what reads from a store has threads, which end with a fork
    if not late:
        options = with_pack(options)
    found = None if wait or late else _read(places.images_dir, options, directories)
    with ControlSocket(places.work_dir) as control:
        background = into_background(daemon, places.pidfile)
        # A terminal that is closed must not leave tasks without their memory.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # The control socket closes before the guard ends: the guard holds uffds that were sent but never served.
        with Guard(log_fd, json=logs.is_json()) as guard, closing(control), ExitStack() as until_running:
            until_running.enter_context(signals_blocked())
            if found is None:  # a restorer that connects meanwhile waits
                if late:
                    options = with_pack(options)
                else:
                    _import_server(options)
                    _wait_for_images(places.images_dir)
                found = _read(places.images_dir, options, directories)
            expected, options = found
            tracer = open_tracer(places.trace, places.images_dir, expected) if places.trace else None
            text = invitation(places.images_dir, places.work_dir, expected)
            ready: list[Callable[[], None]] = [lambda: log.log(MESSAGE, "%s", text)]
            if status_fd is not None:
                ready.append(partial(report_ready, status_fd))
            ready.append(notifier.ready)
            ready += background
            with tracer or nullcontext():
                options = options._replace(trace=tracer.ring if tracer else None)
                if not options.remote_sources:
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
                    begin=partial(_begin, ready) if options.remote_sources else None,
                    running=until_running.close,
                    notifier=notifier,
                    export=export,
                    images=str(places.pack or places.images_dir),
                )
                notifier.stopping()
    if result.tasks or result.finished:
        if terminal:
            with suppress(OSError):  # the terminal was closed
                terminal.print(summary.table(result))
        for line in summary.lines(result):
            log.log(MESSAGE, "%s", line, extra=logs.NOT_ON_TERMINAL)
    if places.stats_json:
        _write_stats(places.stats_json, result.as_dict())
    return result


def _with_pack(
    places: Places, sources: Sources, cache: Cache | None, opened: ExitStack, options: ServeOptions
) -> ServeOptions:
    """Places the images of a packed checkpoint; it is a source then. ``opened``: keeps it open.

    Raises ImageError, LazyPagesError.
    """
    if places.pack is None:
        return options
    alone = not (sources.page_servers or sources.directories)
    source = opened.enter_context(placed(places.pack, places.images_dir, cache, alone=alone))
    return options._replace(others=[source])


def _read(
    images_dir: Path, options: ServeOptions, directories: Sequence[Path]
) -> tuple[dict[int, Expected], ServeOptions]:
    """The tasks by pid, and the options with what page servers must know. Raises ImageError, LazyPagesError."""
    expected = read_checkpoint(images_dir, options, directories)
    descriptors.check_enough(len(with_memory(expected)), options.remote_sources)
    return expected, identified(options, images_dir)


def _wait_for_images(images_dir: Path) -> None:
    """Raises LazyPagesError if a signal comes; SIGINT and SIGTERM must be blocked."""
    from lazypages.cli.arriving import wait_for_images  # noqa: PLC0415 - only needed here

    log.log(MESSAGE, "waiting for the images in %s", images_dir)
    wait_for_images(images_dir)


def _import_server(options: ServeOptions) -> None:
    """While there is time: what serving needs, which is slow to import."""
    with importing():
        import lazypages.loop.run  # noqa: PLC0415

        if options.page_servers:
            import lazypages.sources.remote  # noqa: F401, PLC0415


def _serve_via(
    via: Path,
    places: Places,
    sources: Sources,
    *,
    background: bool,
    daemon: bool,
    status_fd: int | None,
    verbosity: int,
    notifier: Notifier,
) -> int:
    """As _serve, by the resident daemon. Returns the exit status."""
    from lazypages.cli.via import Handed  # noqa: PLC0415 - only needed here

    if status_fd is not None:
        check_status_fd(status_fd)
    ready: list[Callable[[], None]] = [] if status_fd is None else [partial(report_ready, status_fd)]
    ready.append(notifier.ready)
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
        text = json.dumps(result) + "\n"
        if path == STDOUT:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            path.write_text(text)
    except OSError as error:
        _report(f"--stats-json {path}: {error.strerror}; this concerns the statistics only")


def _report(text: str) -> None:
    """An error that does not end the command: in the log, and on standard error wherever the log goes."""
    log.error("%s", text, extra=logs.PRINTED)
    with suppress(OSError):  # a closed terminal or pipe, a full disk: not a reason to end
        click.echo(f"lazypages: {text}", err=True)
