"""One restore of the resident daemon: from the request until its last task is complete, gone or given up."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
from anyio import to_thread

from images_spec.errors import ImageError
from images_spec.opening import OPEN
from lazypages.control import descriptors
from lazypages.control.listener import ControlSocket, discard
from lazypages.engine.guard import Guard
from lazypages.errors import LazyPagesError
from lazypages.export.exporter import Exporter
from lazypages.export.exporter import Restore as Exported
from lazypages.logs import MESSAGE
from lazypages.loop.options import ServeOptions
from lazypages.loop.preparing import (
    check_certificates,
    identified,
    invitation,
    open_tracer,
    read_checkpoint,
    with_memory,
)
from lazypages.loop.processes import Process
from lazypages.loop.server import Server
from lazypages.observe import summary
from lazypages.observe.metrics import Summary, TaskReport
from lazypages.observe.progress import watch_in_log
from lazypages.resident.tracers import SharedTracers
from lazypages.resident.users import User, acting_as, open_as
from lazypages.sources.checkpoint import Expected

log = logging.getLogger("lazypages")

#: Descriptors of a restore beside those of its tasks, images and page servers: its control socket, its engine, and what
#: watches for exits and tracers.
DESCRIPTORS = 24

#: Tables of a restore, in bytes: for each task, for each run of pages in its pagemap (observed: 74, with the bits
#: of one page), and lazy pages for each byte of bits.
BYTES_PER_TASK = 16 << 10
BYTES_PER_EXTENT = 96
PAGES_PER_BYTE = 2

#: The restore that the running code works for, in its threads, too.
CURRENT: ContextVar[Restore | None] = ContextVar("restore", default=None)


#: `extra` of a record whose text the client gets in an answer.
NOT_TO_CLIENT = {"to_client": False}


class Descriptor(NamedTuple):
    """A descriptor of a client, and its file: the one of a page server is closed with the connection, and its number
    may be reused then. That of a directory is closed here only."""

    fd: int
    device: int
    inode: int
    is_directory: bool

    @classmethod
    def of(cls, fd: int) -> Descriptor:
        found = os.fstat(fd)
        return cls(fd, found.st_dev, found.st_ino, stat.S_ISDIR(found.st_mode))

    def close(self) -> None:
        with suppress(OSError):
            # a file system may refuse to be asked again, or hang
            if self.is_directory or Descriptor.of(self.fd) == self:
                discard([self.fd])


class Asked(NamedTuple):
    """What the client ``user`` has asked for. Paths are absolute; ``fds``: descriptors that belong to the restore.

    ``names``: of the images and the work directory in messages.
    """

    user: User
    images: Path
    work: Path
    names: tuple[str, str]
    options: ServeOptions
    directories: Sequence[Path]
    trace: Path | None
    fds: Sequence[Descriptor]

    def directory_fds(self) -> set[int]:
        """Without sockets, whose numbers may be others' soon."""
        return {descriptor.fd for descriptor in self.fds if descriptor.is_directory}

    def close(self) -> None:
        for descriptor in self.fds:
            descriptor.close()


class Needs(NamedTuple):
    """What a restore may need: file descriptors, and bytes for tables of its memory."""

    descriptors: int
    memory: int


def _table_bytes(task: Expected) -> int:
    extents = task.memory.nr_extents if task.memory else 0
    return extents * BYTES_PER_EXTENT + task.lazy_pages // PAGES_PER_BYTE


class Restore:
    """One restore. :meth:`run` reports every error of it, and raises none."""

    def __init__(
        self,
        number: int,
        asked: Asked,
        *,
        guard: Guard,
        tracers: SharedTracers,
        admit: Callable[[Restore, Needs], None],
        say: Callable[..., None] | None,
    ) -> None:
        """``admit`` raises LazyPagesError if the restore needs too much.

        ``say``: gets each log record of this restore; may be called in any thread.
        """
        self.number = number
        self.asked = asked
        self.say = say
        self.needs = Needs(0, 0)
        #: Set when a restorer may connect, or when that has failed.
        self.started = anyio.Event()
        self.ended = anyio.Event()
        #: Whether a restorer could connect.
        self.admitted = False
        #: Of page servers that are waited for.
        self.problems: Sequence[str] = ()
        #: Why nothing, or nothing more, is served.
        self.error: str | None = None
        self.invitation = ""
        #: Of the error, as in an answer.
        self.code = "failed"
        #: After the end: processes that the guard may have to kill.
        self.held: Sequence[Process] = ()
        self._guard = guard
        self._tracers = tracers
        self._admit = admit
        self._server: Server | None = None
        self._result: Summary | None = None
        self._exported: Exported | None = None
        self._begun = time.monotonic()
        #: Number of tasks that have memory.
        self.tasks = 0
        self._seconds = 0.0  # from the request to the end

    def export_to(self, exporter: Exporter) -> None:
        """Before it runs."""
        self._exported = exporter.begin(
            self.asked.names[0], state=lambda: self.state, summary=self.summary, number=self.number
        )

    @property
    def state(self) -> str:
        if self.ended.is_set():
            return "ended"
        if self._server is None or not self.started.is_set():
            return "preparing"
        return self._server.state

    @property
    def exit_status(self) -> int:
        """After the end: that of `lazypages serve`."""
        return 0 if self._result is not None and self._result.ok and self.error is None else 1

    async def run(self) -> None:
        CURRENT.set(self)
        if not self.asked.user.is_privileged:
            OPEN.set(partial(open_as, self.asked.user, directories=self.asked.directory_fds()))
        try:
            await self._serve()
        except (LazyPagesError, ImageError) as error:
            self.code = getattr(error, "code", self.code)
            self._fail(str(error))
        except Exception as error:
            log.exception("the service of this restore has failed", extra=NOT_TO_CLIENT)
            self._fail(f"internal error: {error!r}; the daemon's log has the details")
        finally:
            self._keep_result()
            self.asked.close()
            self.say = None
            self.ended.set()
            self.started.set()

    def _fail(self, why: str) -> None:
        # a directory that came as a descriptor has another name for the client
        for path, name in zip((self.asked.images, self.asked.work), self.asked.names, strict=True):
            why = why.replace(str(path), name) if path.is_relative_to("/proc/self/fd") else why
        self.error = why
        log.error("%s", why, extra=NOT_TO_CLIENT)

    async def _serve(self) -> None:
        asked = self.asked
        expected, options = await to_thread.run_sync(self._prepare, limiter=anyio.CapacityLimiter(1))
        self.tasks = len(with_memory(expected))
        with ExitStack() as stack:
            # in this thread: while it binds, it changes the umask of the process
            with acting_as(asked.user):
                control = stack.enter_context(ControlSocket(asked.work, [asked.user.uid]))
            if asked.trace:
                tracer = stack.enter_context(open_tracer(asked.trace, asked.images, expected))
                options = options._replace(trace=tracer.ring)
            self._server = Server(
                expected, control, options, self._guard, alone=False, open_tracers=self._tracers.open
            )
            self.invitation = invitation(Path(asked.names[0]), Path(asked.names[1]), expected)
            del expected
            self._result = await self._server.run(self._beside, self._begin)
        if self._result.tasks or self._result.finished:
            for line in summary.lines(self._result):
                log.log(MESSAGE, "%s", line)

    def _prepare(self) -> tuple[dict[int, Expected], ServeOptions]:
        asked = self.asked
        expected = read_checkpoint(asked.images, asked.options, asked.directories)
        alive = with_memory(expected)
        files = {file.fd for task in alive.values() if task.memory for file in task.memory.files}
        needs = Needs(
            len(files) + DESCRIPTORS + descriptors.needed(len(alive), len(asked.options.page_servers)),
            sum(BYTES_PER_TASK + _table_bytes(task) for task in alive.values()),
        )
        self._admit(self, needs)
        options = identified(asked.options, asked.images)
        check_certificates(options)
        return expected, options

    def _begin(self, problems: Sequence[str]) -> None:
        """As Begin: not called if no page server can be used."""
        for problem in problems:
            log.error("%s", problem, extra=NOT_TO_CLIENT)
        self.problems = problems
        log.log(MESSAGE, "%s", self.invitation, extra=NOT_TO_CLIENT)
        self.admitted = True

    async def _beside(self, server: Server) -> None:
        if self.admitted:
            self.started.set()
        async with anyio.create_task_group() as group:
            if self._exported:
                group.start_soon(self._exported.watch, server)
            await watch_in_log(server)

    def _keep_result(self) -> None:
        """Keep the numbers; everything else goes."""
        if self._server:
            self.held = self._server.held
        self._server = None
        self.needs = Needs(0, 0)
        self._seconds = time.monotonic() - self._begun
        if self._exported:
            ended = "complete" if self.exit_status == 0 else "failed"
            self._exported.end(self._result, ended if self.admitted else "refused")
            self._exported = None

    # Commands. What they log and start belongs to this restore.

    async def stop(self, *, now: bool) -> None:
        """As Server.interrupt, but only `now` kills: who stops it need not know that it has been stopped already."""
        await self.started.wait()
        if self._server and (now or not self._server.draining):
            with self._current():
                await self._server.interrupt(now=now)

    def complete(self) -> None:
        """As Server.complete."""
        if self._server:
            with self._current():
                self._server.complete()

    def bring_first(self, pid: int, start: int, end: int) -> None:
        """Raises LazyPagesError."""
        if self.state != "serving":
            raise LazyPagesError(f"restore {self.number} has no running tasks: it is {self.state}")
        assert self._server is not None
        with self._current():
            found = self._server.bring_first(pid, start, end)
        if not found:
            raise LazyPagesError(f"restore {self.number} has no task {pid} that misses pages")

    @contextmanager
    def _current(self) -> Iterator[None]:
        before = CURRENT.set(self)
        try:
            yield
        finally:
            CURRENT.reset(before)

    def rounds(self) -> int | None:
        """As Server.rounds."""
        return self._server.rounds() if self._server else None

    def summary(self) -> Summary | None:
        return self._server.summary() if self._server else self._result

    def task_reports(self) -> Sequence[TaskReport]:
        numbers = self.summary()
        return numbers.tasks if numbers else ()

    def status(self) -> dict[str, Any]:
        """Numbers for a list of all restores."""
        ended = self.ended.is_set()
        tasks = self.task_reports()
        return {
            "restore": self.number,
            "state": self.state,
            "exit": self.exit_status if ended else None,
            "error": self.error,
            "user": self.asked.user.uid,
            "images": self.asked.names[0],
            "work": self.asked.names[1],
            "tasks": {"expected": self.tasks, "served": len(tasks)},
            "pages": {
                "total": sum(task.total for task in tasks),
                "pending": sum(task.pending for task in tasks),
            },
            "faults": sum(task.stats.faults for task in tasks),
            "seconds": round(self._seconds if ended else time.monotonic() - self._begun, 3),
        }
