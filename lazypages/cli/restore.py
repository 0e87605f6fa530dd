"""``lazypages restore``: the options, which are those of ``criu restore``, and the start of the restorer."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import click

from images_spec.errors import ImageError
from lazypages import logs, restore
from lazypages.cli.options import verbosity_option
from lazypages.errors import LazyPagesError
from lazypages.outputs import check_output
from lazypages.restore.dump import load
from lazypages.restore.errors import RestoreError
from lazypages.restore.machine import Machine
from lazypages.restore.memory import parking_size
from lazypages.restore.planner import Order, check, make_plan

RESTORER = Path(restore.__file__).parent / "uffd_restorer"
SOCKET = "lazy-pages.socket"

#: From this verbosity on the restorer logs each step of each task.
STEPS = 4

EPILOG = """\b
Examples
  Restore the tasks and leave them running:
    lazypages restore -D /var/ckpt/job1 -d
  Restore them at once, with memory on demand:
    lazypages serve -D /var/ckpt/job1 &
    lazypages restore -D /var/ckpt/job1 --lazy-pages -d

\b
Exit status
  that of the root task (128 + n if signal n ended it); with -d: 0
  1  the restore failed; no restored task is left running
  2  wrong command line
"""


@click.command(epilog=EPILOG)
@click.option(
    "-D",
    "--images-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path(),
    help="The images of the checkpoint.  [default: .]",
)
@click.option(
    "-W",
    "--work-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Directory of the log, the pidfile and the daemon's socket.  [default: the images directory]",
)
@click.option("--lazy-pages", is_flag=True, help="Leave lazy memory to the daemon, `lazypages serve`.")
@click.option("-d", "--restore-detached", is_flag=True, help="Do not wait for the tasks to end.")
@click.option(
    "--pidfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the root task's pid to FILE, which must not exist.",
)
@click.option("--shell-job", is_flag=True, help="Restore the tasks into this session, on this terminal.")
@click.option("-o", "--log-file", metavar="FILE", type=click.Path(path_type=Path), help="Log to FILE.")
@verbosity_option("4: log each step; less: errors only.  [default: 2]")
def restore_command(  # noqa: PLR0917 - the options
    images_dir: Path,
    work_dir: Path | None,
    lazy_pages: bool,
    restore_detached: bool,
    pidfile: Path | None,
    shell_job: bool,
    log_file: Path | None,
    verbosity: int,
) -> None:
    """Restore the tasks of a checkpoint, with their pids.

    With --lazy-pages they run before their memory has arrived. `lazypages serve` (or `criu lazy-pages`) must
    listen in the work directory.
    """
    for option, directory in (("-D", images_dir), ("-W", work_dir)):
        if directory is not None and not directory.is_dir():
            raise RestoreError(f"{option} {directory}: not a directory")
    images_dir = images_dir.absolute()
    work = (work_dir or images_dir).absolute()
    if pidfile is not None:
        check_output("--pidfile", work / pidfile, new=True)  # before the log is emptied
    log_fd = -1
    if log_file is not None:
        with logs.open_log(work / log_file) as log:
            log_fd = os.dup(log.fileno())
    try:
        order = Order(
            lazy=lazy_pages,
            shell_job=shell_job,
            detached=restore_detached,
            own_session=os.getsid(0),
            own_group=os.getpgid(0),
            pidfile=work / pidfile if pidfile else None,
        )
        control_fd = connect(work) if lazy_pages else -1
        plan = _plan(images_dir, order, control_fd, log_fd, verbosity)
    except (LazyPagesError, ImageError) as error:
        if log_fd >= 0:
            os.write(log_fd, f"Error: {error}\n".encode(errors="replace"))
        raise
    _become_restorer(plan, [fd for fd in (control_fd, log_fd) if fd >= 0])


def _plan(images_dir: Path, order: Order, control_fd: int, log_fd: int, verbosity: int) -> bytes:
    machine = Machine()
    dump = load(images_dir, lazy=order.lazy)
    check(dump, order, machine)
    plan, link_fd = make_plan(dump, order, machine)
    return plan.encode(
        parking=parking_size(machine),
        link_fd=link_fd,
        control_fd=control_fd,
        log_fd=log_fd,
        verbose=verbosity >= STEPS,
    )


def connect(work: Path) -> int:
    """Connect to the daemon's control socket in the work directory; return its fd. Raises ``RestoreError``."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(work, os.O_PATH | os.O_DIRECTORY)
    try:
        # A short path: sun_path has room for 107 bytes only (unix(7)).
        connection.connect(f"/proc/self/fd/{directory}/{SOCKET}")
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ECONNREFUSED)
        hint = ": start `lazypages serve` there first" if absent else ""
        raise RestoreError(f"{work / SOCKET}: no daemon listens ({error.strerror}){hint}") from None
    finally:
        os.close(directory)
    return connection.detach()


def _become_restorer(plan: bytes, inherited: Sequence[int]) -> None:
    """Replace this process by the restorer, so that the root task is a child of the process that the caller started."""
    if not RESTORER.exists():
        raise RestoreError(
            f"{RESTORER} not found: build it with `pip install` or `python setup.py build_ext`"
        )
    fd = os.memfd_create("lazypages-plan")
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(plan)
    for number in (fd, *inherited):
        os.set_inheritable(number, True)
    os.execv(RESTORER, [RESTORER.name, str(fd)])  # noqa: S606 - a shell is no use here
