"""The command ``dumptool``. Options have the names and meanings of those of ``criu dump`` and ``criu pre-dump``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dumptool.backend import Backend, Choice, dump_by
from dumptool.criu import find_criu
from dumptool.criu_options import choice, criu_options
from dumptool.dump import Report, Settings, Watcher, pre_dump
from dumptool.errors import UnsupportedError, one_line_each
from dumptool.output import Output
from dumptool.rehearsal import Rehearsal, rehearse
from dumptool.saveable import Options
from dumptool.send import PageServer
from dumptool.serve import PageService
from dumptool.tracking import Method
from dumptool.untrack import untrack
from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE
from lazypages import logs
from lazypages.cli.daemonize import check_status_fd
from lazypages.cli.options import verbosity_option
from lazypages.cli.remote_options import PROTOCOL_OPTION, TLS_FILE_OPTIONS, tls_files
from lazypages.errors import LazyPagesError
from lazypages.logs import MESSAGE
from lazypages.net.listen import LOOPBACK, UNIX_PREFIX, listen
from lazypages.net.names import AUTO
from lazypages.net.url import ConnectedSocket, TcpServer, UnixServer
from lazypages.net.wire import Layout
from lazypages.outputs import STDOUT
from lazypages.wording import count, duration, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger("lazypages")

F = TypeVar("F", bound=Callable[..., Any])

VERBOSITY_OF_PROGRESS = 1
PROGRESS_PAGES = 16384
"""A dump of at least 64 MiB shows a progress bar."""

DUMP_EPILOG = """\b
Examples
  Checkpoint a service that was started with setsid, and end it:
    dumptool dump -t 4711 -D /var/ckpt/job1
  Checkpoint a program of this shell and terminal, which goes on afterwards:
    dumptool dump -t 4711 -D /var/ckpt/job1 --shell-job --leave-running
  Stop the program only briefly; most memory is copied while it runs:
    dumptool pre-dump -t 4711 -D /var/ckpt/1
    dumptool pre-dump -t 4711 -D /var/ckpt/2 --prev-images-dir ../1
    dumptool dump     -t 4711 -D /var/ckpt/3 --prev-images-dir ../2
  Restore it lazily, including pages unchanged since the pre-dumps:
    lazypages serve -D /var/ckpt/3 &
    criu restore --lazy-pages -D /var/ckpt/3 -d
  A redis; its clients connect again:
    dumptool dump -t 4711 -D /var/ckpt/redis --tcp-close
    criu restore -D /var/ckpt/redis -d --tcp-close
  Write the pages to the disk of another host. Together with the small images in
  /var/ckpt/1 here they are a complete checkpoint:
    lazypages page-server -D /var/ckpt/1 --address 10.0.0.2 --port 27001 --tls
    dumptool dump -t 4711 -D /var/ckpt/1 \\
      --page-server --address 10.0.0.2 --port 27001 --tls
  Migrate to another host, which has all image directories, but not yet the pages
  changed since the last pre-dump. The program ends here when all have arrived:
    dumptool dump -t 4711 -D /var/ckpt/3 --prev-images-dir ../2 \\
      --lazy-pages --address 10.0.0.1 --port 27000 --tls
    lazypages serve -D /var/ckpt/3 --page-server \\
      --address 10.0.0.1 --port 27000 --tls &
    criu restore --lazy-pages -D /var/ckpt/3 -d

\b
  What would be refused, and how much memory there is; nothing is written:
    dumptool dump -t 4711 --dry-run

\b
--lazy-pages
  The loss of a client changes nothing: the tasks stay stopped, and the next
  client gets every page. The tasks are ended when a client reports that all of
  its tasks are complete or have exited; `criu lazy-pages` can't report that,
  so for it when it has requested every page.
  Ctrl-C or SIGTERM ends dumptool (exit status 1). If no client can have started
  the tasks, they go on here. Otherwise they stay stopped, as by SIGSTOP, even
  if dumptool is killed, so that they can't run twice. Then you decide:
  `kill -CONT` of each process lets them go on here, and what was restored
  elsewhere must not run; `kill -KILL` ends them.

\b
--page-server
  Connects to `lazypages page-server` or `criu page-server`, which writes each
  level to a directory of its own (give it --prev-images-dir as here). No page
  is written here. If the server is lost before it has all pages, the tasks go
  on and there is no dump. For CRIU's server from 4.2 on with --tls, add
  --page-server-protocol criu-4.2.

\b
What can't be saved by --backend own
  Sockets, epoll, eventfd, timerfd and similar descriptors, io_uring, memfd, huge
  pages, System V shared memory, deleted files, devices, pipes shared with
  processes outside of the tree, seccomp, shadow stacks, SCHED_DEADLINE, timers on
  the CPU time of one of many threads, namespaces other than dumptool's, tasks
  traced by a debugger. All of these are found and reported before the tree is
  stopped. Syscall User Dispatch is found only after it is stopped. The tasks go
  on in both cases. With --backend auto, CRIU dumps them instead if it is
  installed: it saves everything but memory, and dumptool the memory. What CRIU
  can't save it says itself, and the tasks go on. Everything after -- goes to
  `criu dump`.

\b
Exit status
  0  all images are written
  1  an error; the tasks go on as before (but see --lazy-pages)
  2  wrong command line
"""

PRE_DUMP_EPILOG = """\b
Examples
    dumptool pre-dump -t 4711 -D /var/ckpt/1
    dumptool pre-dump -t 4711 -D /var/ckpt/2 --prev-images-dir ../1
  The last level is written by `dumptool dump --prev-images-dir ../2`.
  The same, but with the pages sent to another host, where this runs:
  `lazypages page-server -D …/2 --port 27001 --prev-images-dir ../1`
    dumptool pre-dump -t 4711 -D /var/ckpt/2 --prev-images-dir ../1 \\
      --page-server --address 10.0.0.2 --port 27001

\b
Dirty tracking
  uffd-wp     a userfaultfd for the task's memory (needs Linux 6.7)
  soft-dirty  the kernel's soft-dirty bits (needs CONFIG_MEM_SOFT_DIRTY). Clearing
              them breaks CRIU's --track-mem of the same task; clearing by CRIU
              is detected. The only kind of tracking before Linux 6.7
  compare     no tracking: the next level reads all pages and compares them with
              the parent's bytes
  auto        the first of these that works
  A small process, `tracker_holder`, keeps what is needed for it (one for each
  tree) until the final dump, the end of the tree, or `dumptool untrack`; if it
  is killed, the next level has all pages. Nothing is left in the tasks: other
  programs, such as `criu dump`, can dump them.

\b
What can be pre-dumped
  Every tree that CRIU can dump: only memory is looked at. Refused are tasks that
  are traced, share their memory with another process (CLONE_VM), have memory
  registered with a userfaultfd of others, a shadow stack, or Syscall User
  Dispatch. Left to the final dump: huge pages (hugetlb), memory of devices.
  Shared memory (MAP_SHARED, memfd) is compared with the parent's bytes, also by the
  final dump, which writes what has changed. Pre-dumps contain no pages of files, no
  System V shared memory, and with --page-server no shared memory at all.
"""


class _Commands(click.Group):
    """Reports expected errors as one line each, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UnsupportedError as error:
            for refusal in error.refusals:
                log.info("%s", refusal)
            for line in one_line_each(error.refusals):
                _report_error(f"can't be dumped: {line}")
        except (LazyPagesError, ImageError) as error:
            _report_error(str(error))
        return ctx.exit(1)


def _report_error(text: str) -> None:
    if log.handlers:  # else logging has not been set up, and would print it as well
        log.error("%s", text, extra=logs.PRINTED)
    click.echo(f"dumptool: {text}", err=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="lazypages")
def cli() -> None:
    """Checkpoint a tree of processes into images for `criu restore` and `lazypages restore`.

    \b
    Instead of                         run
      criu dump -t PID -D DIR            dumptool dump -t PID -D DIR
      criu pre-dump -t PID -D DIR        dumptool pre-dump -t PID -D DIR

    `dumptool untrack -t PID` stops the tracking of writes that a pre-dump has begun.

    Pre-dumps work without soft-dirty bits, too (Linux 6.7). Programs with sockets or epoll, as most servers are, need
    CRIU for the dump (--backend). `dumptool COMMAND --help` explains each command.
    """


def _tree_option(text: str) -> Callable[[F], F]:
    """``-t``, the parameter ``pid``. ``text``: its help."""
    return click.option(
        "-t", "--tree", "pid", metavar="PID", type=click.IntRange(min=1), required=True, help=text
    )


def _common(command: F, *, address: str, port: str) -> F:
    """Adds the options of both commands. ``address``, ``port``: help texts that differ."""
    for option in reversed(
        (
            _tree_option(
                "Root of the tree: this process, all its descendants and all their threads are dumped."
            ),
            click.option(
                "-D",
                "--images-dir",
                metavar="DIR",
                type=click.Path(path_type=Path),
                default=Path(),
                help="Directory of the images; created if missing, with its parents.  [default: .]",
            ),
            click.option(
                "--prev-images-dir",
                metavar="DIR",
                help="Directory of the level before this one, relative to the images directory. Pages unchanged "
                "since then are not written again.",
            ),
            click.option(
                "--dirty-tracking",
                type=click.Choice([method.value for method in Method]),
                default=Method.AUTO.value,
                show_default=True,
                help="How to find the pages that have changed since the level before.",
            ),
            click.option(
                "--parent-pages",
                type=click.Choice(["lazy", "eager"]),
                default="lazy",
                show_default=True,
                help="Unchanged pages at a lazy restore: left to the daemon (needs `lazypages serve`), or "
                "read by the restore itself (needed for `criu lazy-pages`).",
            ),
            click.option(
                "--page-server",
                is_flag=True,
                help="Send all pages to a page server and write none here.",
            ),
            click.option(
                "--address",
                metavar="ADDRESS",
                help=f"{address}  A host, an IPv4 or IPv6 address, or unix:PATH.  [default: {LOOPBACK}]",
            ),
            click.option("--port", metavar="PORT", type=click.IntRange(0, 65535), help=port),
            click.option(
                "--ps-socket",
                metavar="FD",
                type=click.IntRange(min=0),
                help="With --page-server: a connected socket.",
            ),
            PROTOCOL_OPTION,
            click.option("--tls", is_flag=True, help="Encrypt, and verify the certificates of both sides."),
            *TLS_FILE_OPTIONS,
            click.option(
                "--tls-no-cn-verify",
                is_flag=True,
                help="Do not require that the other side's certificate names --address.",
            ),
            click.option(
                "-j",
                "--shell-job",
                is_flag=True,
                help="Allow a session and terminal that belong to processes outside of the tree.",
            ),
            click.option(
                "--timeout",
                metavar="SECONDS",
                type=click.FloatRange(min=0, min_open=True),
                default=10,
                show_default=True,
                help="Time for all threads to stop.",
            ),
            click.option(
                "--no-sync",
                is_flag=True,
                help="Do not wait for the disk: faster, but a power failure can destroy the dump.",
            ),
            click.option(
                "--dry-run",
                is_flag=True,
                help="Say what would be refused and how much memory there is, and write nothing. The tree is stopped "
                "for a moment, unless something is refused before.",
            ),
            click.option("--track-mem", is_flag=True, help="With --leave-running: track writes from now on."),
            click.option(
                "-o",
                "--log-file",
                metavar="FILE",
                type=click.Path(path_type=Path),
                help="Log to FILE in the images directory (- for stdout).",
            ),
            verbosity_option(),
        )
    ):
        command = option(command)
    return command


def _settings(options: dict[str, Any]) -> Settings:
    return Settings(
        pid=options["pid"],
        images=options["images_dir"].absolute(),
        parent=options["prev_images_dir"],
        method=Method(options["dirty_tracking"]),
        lazy_parents=options["parent_pages"] == "lazy",
        lazy_pages=options.get("lazy_pages", False),
        leave_running=options.get("leave_running", False),
        leave_stopped=options.get("leave_stopped", False),
        track=options["track_mem"],
        allow=Options(shell_job=options["shell_job"], file_locks=options.get("file_locks", False)),
        timeout=options["timeout"],
        page_server=_page_server(options),
        sync=not options["no_sync"],
    )


def _page_server(options: dict[str, Any]) -> PageServer | None:
    """The page server of --page-server. Raises ``click.UsageError`` for options that can't be combined."""
    address, port, ps_socket, tls = (options[name] for name in ("address", "port", "ps_socket", "tls"))
    lazy = options.get("lazy_pages", False)
    if not options["page_server"]:
        if ps_socket is not None:
            raise click.UsageError("--ps-socket goes with --page-server")
        if not lazy and (
            address is not None or port is not None or tls or options.get("status_fd") is not None
        ):
            raise click.UsageError(
                "--address, --port and --tls go with --page-server or --lazy-pages, --status-fd with --lazy-pages"
            )
        return None
    if lazy or options.get("status_fd") is not None:
        raise click.UsageError(
            "--lazy-pages and --status-fd can't be combined with --page-server: --lazy-pages listens at --address, "
            "--page-server connects to it"
        )
    protocol = options["page_server_protocol"]
    layout = None if protocol == AUTO else Layout(protocol)
    on_this_machine = address is not None and address.startswith(UNIX_PREFIX)
    if tls and (on_this_machine or ps_socket is not None):
        raise click.UsageError("--tls needs a host to be verified: it goes with --address and --port")
    if ps_socket is not None:
        return PageServer(ConnectedSocket(ps_socket), None, layout)
    if on_this_machine:
        return PageServer(UnixServer(Path(address.removeprefix(UNIX_PREFIX))), None, layout)
    if not port:
        raise click.UsageError(
            "--page-server needs --port (and --address, if it is on another machine), or --ps-socket"
        )
    return PageServer(TcpServer(address or LOOPBACK, port, tls), tls_files(options) if tls else None, layout)


@cli.command("dump", epilog=DUMP_EPILOG)
@partial(
    _common,
    address="Address of the page server; with --lazy-pages, the address to listen at.",
    port="Port of the page server; with --lazy-pages, the port to listen at: 0, the default, picks a free one and "
    "logs it.",
)
@click.option(
    "-R", "--leave-running", is_flag=True, help="Let the tasks go on afterwards.  [default: end them]"
)
@click.option("-s", "--leave-stopped", is_flag=True, help="Leave the tasks stopped, as by SIGSTOP.")
@click.option("-l", "--file-locks", is_flag=True, help="Allow file locks and save them.")
@click.option(
    "--lazy-pages",
    is_flag=True,
    help="Leave out pages that a lazy restore fetches later; keep the tree stopped and serve these pages to "
    "`lazypages serve --page-server` (or `criu lazy-pages --page-server`) until it has all.",
)
@click.option(
    "--status-fd",
    metavar="FD",
    type=click.IntRange(min=0),
    help="With --lazy-pages: write a 0 byte to FD when the images are complete and the pages are served.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="With --lazy-pages without --tls: allow an address that other hosts can reach, and other users of this host.",
)
@criu_options
def dump_command(**options: Any) -> None:
    """Write all images of a tree of processes, then end it (or let it go on).

    The tree is stopped meanwhile. If anything fails it goes on unharmed, even if dumptool is killed (but see
    --lazy-pages below).
    """
    settings, by = _settings(options), choice(options)
    if settings.leave_running and settings.leave_stopped:
        raise click.UsageError("--leave-running and --leave-stopped can't be combined")
    if options["dry_run"]:
        _rehearse(options, lambda: _rehearse_dump(settings, by))
        return
    if options["status_fd"] is not None:
        check_status_fd(options["status_fd"])
    with _watcher(options) as watcher, _service(options) as serve:
        report = dump_by(by, settings, watcher, serve)
    _log_report(report, "dumped", settings.page_server)


@contextmanager
def _service(options: dict[str, Any]) -> Iterator[PageService | None]:
    """The page server of --lazy-pages, already listening: an error in its options must not stop a task."""
    address, port, tls = options["address"], options["port"], None
    if not options["lazy_pages"]:
        yield None
        return
    if options["tls"]:
        tls = tls_files(options)
        tls.server_context()  # raises for bad files while the tree still runs
    listener, name = listen(address, port or 0, insecure=options["insecure"], tls=options["tls"])
    try:
        with listener:
            yield PageService(
                listener, name, address, tls, options["status_fd"], strangers=options["insecure"]
            )
    finally:
        if address is not None and address.startswith(UNIX_PREFIX):
            Path(address.removeprefix(UNIX_PREFIX)).unlink(missing_ok=True)


@cli.command("pre-dump", epilog=PRE_DUMP_EPILOG)
@partial(_common, address="Address of the page server.", port="Port of the page server.")
def pre_dump_command(**options: Any) -> None:
    """Copy the memory of a tree while it runs, and track its writes from then on.

    The tree is stopped only for a moment. The next level (another pre-dump, or the dump) then contains only the
    changed pages.
    """
    settings = _settings(options)
    if options["dry_run"]:
        _rehearse(options, lambda: rehearse(settings, memory_only=True))
        return
    with _watcher(options) as watcher:
        report = pre_dump(settings, watcher)
    _log_report(report, "pre-dumped", settings.page_server)


@cli.command("untrack")
@_tree_option("Root of the tree: this process and all its descendants.")
@verbosity_option()
def untrack_command(pid: int, verbosity: int) -> None:
    """Stop tracking the writes of a tree: undo what pre-dump has left.

    The next level then has all pages. It is not an error if nothing is tracked.
    """
    logs.start(verbosity, sys.stderr, None)
    ended = untrack(pid)
    processes = count(ended, "process", "processes")
    what = f"writes of {processes} are not tracked any more" if ended else "nothing was tracked"
    log.log(MESSAGE, "pid %d: %s", pid, what)


def _rehearse_dump(settings: Settings, by: Choice) -> Rehearsal:
    if by.backend is Backend.CRIU or by.arguments:
        return rehearse(settings, memory_only=True)
    try:
        return rehearse(settings, memory_only=False)
    except UnsupportedError as error:
        criu = find_criu(by.criu) if by.backend is Backend.AUTO else None
        if criu is None:
            raise
        log.log(MESSAGE, "CRIU (%s) would save everything but memory: %s", criu.path, error.refusals[0])
        return rehearse(settings, memory_only=True)


def _rehearse(options: dict[str, Any], rehearsal: Callable[[], Rehearsal]) -> None:
    """--dry-run: the log is standard error, because the images directory need not exist."""
    logs.start(options["verbosity"], sys.stderr, None)
    found = rehearsal()
    lazy = f", of which --lazy-pages leaves out {size(found.lazy * PAGE_SIZE)}" if found.lazy else ""
    log.log(
        MESSAGE,
        "nothing is refused: %s, %s; %s of memory%s; stopped in %s, for %s",
        count(found.processes, "process", "processes"),
        count(found.threads, "thread"),
        size(found.pages * PAGE_SIZE),
        lazy,
        duration(found.freezing * 1e9),
        duration(found.frozen * 1e9),
    )


def _log_report(report: Report, what: str, page_server: PageServer | None) -> None:
    counts = report.counts

    def megabytes(pages: int) -> str:
        return f"{pages * PAGE_SIZE / (1 << 20):.1f} MiB"

    done = "written" if page_server is None else f"sent to {page_server.address}"
    parts = [f"{megabytes(counts.written + report.shared.written)} {done}"]
    if unchanged := counts.in_parent + report.shared.in_parent:
        parts.append(f"{megabytes(unchanged)} unchanged since the parent")
    if counts.lazy:
        parts.append(f"{megabytes(counts.lazy)} left out")
    if report.tracked:
        parts.append(f"writes tracked by {report.tracked}")
    log.log(
        MESSAGE,
        "%s: %s, %s; %s; stopped in %s, %s",
        what,
        count(report.processes, "process", "processes"),
        count(report.threads, "thread"),
        ", ".join(parts),
        duration(report.freezing * 1e9),
        _standstill(report),
    )


def _standstill(report: Report) -> str:
    """How long the tree was stopped; if it ran on elsewhere meanwhile, when that can have begun."""
    if report.served is None:
        return f"for {duration(report.frozen * 1e9)}"
    requested = (
        "" if report.requested is None else f"; first page requested after {duration(report.requested * 1e9)}"
    )
    return (
        f"images complete after {duration(report.served * 1e9)}{requested}; "
        f"kept stopped here for {duration(report.frozen * 1e9)}"
    )


class _Log(Watcher):
    """Logs the stages."""

    def stage(self, name: str) -> None:
        log.info("%s", name)


class _Bar(_Log):
    """Shows a progress bar for a large copy."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: TaskID | None = None

    def total(self, pages: int) -> None:
        if pages >= PROGRESS_PAGES:
            self._bar = self._progress.add_task("copying memory", total=pages * PAGE_SIZE)

    def copied(self, pages: int) -> None:
        if self._bar is not None:
            self._progress.advance(self._bar, pages * PAGE_SIZE)


@contextmanager
def _watcher(options: dict[str, Any]) -> Iterator[Watcher]:
    """Sets up logging and progress."""
    level = options["verbosity"]
    console = logs.on_terminal() if level >= VERBOSITY_OF_PROGRESS else None
    stream = sys.stderr
    if options["log_file"] is not None:
        Output(options["images_dir"].absolute(), durable=not options["no_sync"]).make_directory()
        path = options["log_file"]
        stream = logs.open_log(path if path == STDOUT else options["images_dir"] / path)
    if console is None:
        logs.start(level, stream, None)
        yield _Log()
        return

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    logs.start(level, None if options["log_file"] is None else stream, console)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress)
