"""Completes tasks that a thread begins to trace while they miss pages, before the tracer continues (docs/criu.md).

The kernel does not fetch missing pages for a reader outside of the task: `criu dump` takes them for pages that were
never touched, and a debugger gets EIO.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from lazypages.engine.tracers import Attach, Tracers
from lazypages.loop.processes import Process, process_of, tracer_of
from lazypages.wording import count

if TYPE_CHECKING:
    from lazypages.loop.service import TaskService

log = logging.getLogger("lazypages")

#: Where the kernel does not report every tracer: seconds between two polls, and tasks per poll. One takes 12 us.
POLL_PAUSE = 0.02
POLLS = 8

#: Seconds within which a restorer detaches from its tasks after it has said that the restore has finished.
RESTORER_LEAVES = 10.0

#: Name of the file that CRIU maps into each task before it reads its pagemap (observed with 4.1.1 and 4.2.1).
PARASITE = b"CRIUMFD"


class Tracing(Protocol):
    """What is needed of :class:`lazypages.engine.tracers.Tracers`, which describes it."""

    @property
    def told(self) -> bool: ...

    @property
    def event_fd(self) -> int: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def run(self) -> None: ...

    def stop(self) -> None: ...

    def watch(self, pid: int, *, watched: bool) -> None: ...

    def report(self, pid: int, tracer: int, owner: int) -> None: ...

    def release(self, tracer: int) -> None: ...

    def take(self) -> list[Attach]: ...


async def drive(tracers: Tracing) -> None:
    """Runs the thread that watches, until `stop`."""
    with anyio.CancelScope(shield=True):
        try:
            await to_thread.run_sync(tracers.run, limiter=anyio.CapacityLimiter(1))
        except OSError as error:
            log.warning("cannot watch for tracers of tasks that miss pages: %s", error.strerror)


class TracedTasks:
    """Watches for tracers of all tasks.

    `families`: services of each restored task and its forked children; `processes`: of the restored tasks; both by pid
    in the images. The server changes them, and calls `started` and `ended`. `open_tracers` may raise OSError.
    """

    def __init__(
        self,
        families: Mapping[int, Sequence[TaskService]],
        processes: Mapping[int, Process],
        open_tracers: Callable[[], Tracing] = Tracers,
    ) -> None:
        self._families = families
        self._processes = processes
        self._finished = anyio.Event()
        self._open_tracers = open_tracers
        self._tracers: Tracing | None = None
        self._unknown = 0  # number of services whose process is unknown
        self._tasks: dict[int, int] = {}  # pids in the images, by pid in our namespace
        self._seen: dict[int, int] = {}  # tracers already handled, or the restorer's, by pid of the task
        self._restorers: set[int] = set()
        self._restored_at = 0.0

    def restored_by(self, pid: int) -> None:
        """The restorer has connected. It traces the tasks until they run; with it one that traces it (`strace -f`)."""
        self._restorers = {pid, tracer_of(pid)}

    def restore_finished(self) -> None:
        """Start to watch. Before this, the restorer itself traces the tasks."""
        self._restored_at = time.monotonic()
        self._finished.set()

    def started(self, service: TaskService) -> None:
        self._unknown += _is_unknown(service)
        self._watch_unknown()

    def ended(self, service: TaskService) -> None:
        """A service has ended. The server has removed it from its family already."""
        self._unknown -= _is_unknown(service)
        self._watch_unknown()
        if self._tracers and service.process and not self._families.get(service.identity.pid):
            self._tracers.watch(service.process.pid, watched=False)

    def _watch_unknown(self) -> None:
        """While a task's process is unknown, every tracer on the machine waits until the traced process was checked."""
        if self._tracers:
            self._tracers.watch(0, watched=self._unknown > 0)

    async def run(self) -> None:
        await self._finished.wait()
        try:
            tracers = self._open_tracers()
        except OSError as error:
            log.warning("cannot watch for tracers of tasks that miss pages: %s", error.strerror)
            return
        with tracers:
            async with anyio.create_task_group() as group:
                self._tracers = tracers
                group.start_soon(drive, tracers)
                try:
                    self._tasks = {process.pid: pid for pid, process in self._processes.items()}
                    for process in self._processes.values():
                        tracers.watch(process.pid, watched=True)
                    self._watch_unknown()
                    self._look_for_early(tracers)
                    if not tracers.told:
                        log.debug("the kernel does not report tracers: polling the tasks")
                        group.start_soon(self._poll, tracers)
                    while True:
                        await anyio.wait_readable(tracers.event_fd)
                        for attach in tracers.take():
                            await self._attached(attach, tracers, group)
                finally:
                    self._tracers = None
                    tracers.stop()

    def _look_for_early(self, tracers: Tracing) -> None:
        """One that has attached since the restore has finished, and before we watched: long on a busy machine."""
        for process in self._processes.values():
            tracer = tracer_of(process.pid)
            self._seen[process.pid] = tracer
            if tracer and not self._is_restorer(process_of(tracer)):
                tracers.report(process.pid, tracer, process_of(tracer))

    def _is_restorer(self, owner: int) -> bool:
        """It goes on tracing for a moment after the restore has finished. Later its pid may be another's."""
        return owner in self._restorers and time.monotonic() - self._restored_at < RESTORER_LEAVES

    async def _attached(self, attach: Attach, tracers: Tracing, group: TaskGroup) -> None:
        if not attach.pid:
            self._look(tracers, list(self._processes.values()))
            return
        if self._is_restorer(attach.owner):
            if not attach.error:
                tracers.release(attach.tracer)
            return
        task = self._tasks.get(attach.pid)
        if task is not None and attach.error == errno.EAGAIN:  # reported before we watched the task
            tracers.report(attach.pid, attach.tracer, attach.owner)
            return
        if task is not None:
            self._seen[attach.pid] = attach.tracer
            families = [self._families.get(task, ())]
            name = f"task {task}"
        else:
            families = [family for family in self._families.values() if any(map(_is_unknown, family))]
            name = f"process {attach.pid}, forked by a task"
            if not self._unknown or not await to_thread.run_sync(_misses_pages, attach.pid):
                families = []
            elif attach.error == errno.EAGAIN:
                tracers.report(attach.pid, attach.tracer, attach.owner)
                return
        missing = sum(service.pending for family in families for service in family)
        if missing:
            self._log_attach(attach, name, missing)
            group.start_soon(self._complete, attach, tracers, name, families)
        elif not attach.error:
            tracers.release(attach.tracer)

    def _log_attach(self, attach: Attach, name: str, missing: int) -> None:
        tracer = _describe(attach.owner)
        pages = count(missing, "page")
        if not attach.error and not _has_parasite(attach.pid):
            log.warning("%s: %s traces it and has to wait for %s", name, tracer, pages)
            return
        why = f" and could not be stopped ({os.strerror(attach.error)})" if attach.error else ""
        log.error(
            "%s: %s traces it%s while it misses %s: a dump that is made now lacks them. "
            "Discard that dump, and dump again when this daemon has ended",
            name,
            tracer,
            why,
            pages,
        )

    async def _complete(
        self, attach: Attach, tracers: Tracing, name: str, families: list[Sequence[TaskService]]
    ) -> None:
        while services := [service for family in families for service in family if service.pending]:
            async with anyio.create_task_group() as group:
                for service in services:
                    group.start_soon(service.complete)
        if not attach.error:
            log.info("%s: no page is missing any more; %s continues", name, _describe(attach.owner))
            tracers.release(attach.tracer)

    # Where the kernel does not report tracers.

    async def _poll(self, tracers: Tracing) -> None:
        while True:
            waiting = [
                self._processes[pid]
                for pid, family in self._families.items()
                if family and pid in self._processes
            ]
            for start in range(0, len(waiting), POLLS):
                await anyio.sleep(POLL_PAUSE)
                self._look(tracers, waiting[start : start + POLLS])
            if not waiting:
                await anyio.sleep(POLL_PAUSE)

    def _look(self, tracers: Tracing, processes: Sequence[Process]) -> None:
        for process in processes:
            tracer = tracer_of(process.pid)
            if tracer and tracer != self._seen.get(process.pid):
                tracers.report(process.pid, tracer, tracer)
            self._seen[process.pid] = tracer


def _is_unknown(service: TaskService) -> bool:
    """Whether the process of a service is unknown: a FORK event does not name the child."""
    return service.identity.forked or service.process is None


def _describe(pid: int) -> str:
    try:
        return f"{Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()} (pid {pid})"
    except OSError:
        return f"pid {pid}"


def _has_parasite(pid: int) -> bool:
    """Whether CRIU may have read the pagemap already. Also True if /proc can't be read."""
    try:
        return PARASITE in Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return True


def _misses_pages(pid: int) -> bool:
    """Whether a mapping of the process is registered for missing pages ("um" in smaps, proc_pid_smaps(5))."""
    try:
        with Path(f"/proc/{pid}/smaps").open("rb") as smaps:
            return any(line.startswith(b"VmFlags:") and b" um" in line for line in smaps)
    except OSError:
        return False
