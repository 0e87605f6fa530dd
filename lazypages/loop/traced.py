"""Tasks that somebody begins to trace while they miss pages: completed before the tracer goes on (docs/criu.md).

Who looks at a task's memory from outside is not given what is missing, and is not told: `criu dump` takes pages that
have not come for pages that were never touched, a debugger reads EIO.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from lazypages.engine.tracers import Attach, Tracers
from lazypages.loop.processes import Process, tracer_of
from lazypages.observe.summary import count

if TYPE_CHECKING:
    from lazypages.loop.service import TaskService

log = logging.getLogger("lazypages")

#: Where the kernel does not tell of every tracer: seconds between looks, and how many tasks are looked at. 12 us each.
POLL_PAUSE = 0.02
POLLS = 8

#: What CRIU maps into each task that it dumps, before it asks which pages are there (observed with 4.1.1 and 4.2.1).
PARASITE = b"CRIUMFD"


class TracedTasks:
    """`families`: a restored task and what it has forked; `processes`: of the restored ones. By pid in the images.

    The server changes them, and says so.
    """

    def __init__(
        self, families: Mapping[int, Sequence[TaskService]], processes: Mapping[int, Process]
    ) -> None:
        self._families = families
        self._processes = processes
        self._finished = anyio.Event()
        self._tracers: Tracers | None = None
        self._unknown = 0  # services of processes that are not known
        self._tasks: dict[int, int] = {}  # pids in the images by pids here
        self._seen: dict[int, int] = {}  # tracers that are dealt with, or the restorer's, by pid of the task

    def restore_finished(self) -> None:
        """Before, it is the restorer that traces them."""
        self._finished.set()

    def started(self, service: TaskService) -> None:
        self._unknown += _is_unknown(service)
        self._watch_unknown()

    def ended(self, service: TaskService) -> None:
        """It has left its family already."""
        self._unknown -= _is_unknown(service)
        self._watch_unknown()
        if self._tracers and service.process and not self._families.get(service.identity.pid):
            self._tracers.watch(service.process.pid, watched=False)

    def _watch_unknown(self) -> None:
        """Any process may be one of them: whoever attaches to one is held until we have looked at it."""
        if self._tracers:
            self._tracers.watch(0, watched=self._unknown > 0)

    async def run(self) -> None:
        await self._finished.wait()
        try:
            tracers = Tracers()
        except OSError as error:
            log.warning("nobody looks who traces tasks that miss pages: %s", error.strerror)
            return
        with tracers:
            async with anyio.create_task_group() as group:
                self._tracers = tracers
                group.start_soon(self._drive, tracers)
                try:
                    self._tasks = {process.pid: pid for pid, process in self._processes.items()}
                    for process in self._processes.values():
                        tracers.watch(process.pid, watched=True)
                    self._watch_unknown()
                    if not tracers.told:
                        log.debug("the kernel does not tell who traces tasks: looking at them in turn")
                        group.start_soon(self._poll, tracers)
                    while True:
                        await anyio.wait_readable(tracers.event_fd)
                        for attach in tracers.take():
                            await self._attached(attach, tracers, group)
                finally:
                    self._tracers = None
                    tracers.stop()

    async def _drive(self, tracers: Tracers) -> None:
        with anyio.CancelScope(shield=True):  # stop() ends it
            try:
                await to_thread.run_sync(tracers.run, limiter=anyio.CapacityLimiter(1))
            except OSError as error:
                log.warning("nobody looks who traces tasks that miss pages: %s", error.strerror)

    async def _attached(self, attach: Attach, tracers: Tracers, group: TaskGroup) -> None:
        if not attach.pid:
            self._look(tracers, list(self._processes.values()))
            return
        task = self._tasks.get(attach.pid)
        if task is not None:
            self._seen[attach.pid] = attach.tracer
            families = [self._families.get(task, ())]
            name = f"task {task}"
        else:
            families = [family for family in self._families.values() if any(map(_is_unknown, family))]
            name = f"process {attach.pid}, which a task has forked,"
            if not self._unknown or not await to_thread.run_sync(_misses_pages, attach.pid):
                families = []
            elif attach.error == errno.EAGAIN:
                tracers.report(attach.pid, attach.tracer, attach.owner)
                return
        missing = sum(service.pending for family in families for service in family)
        if missing:
            self._say(attach, name, missing)
            group.start_soon(self._complete, attach, tracers, name, families)
        elif not attach.error:
            tracers.release(attach.tracer)

    def _say(self, attach: Attach, name: str, missing: int) -> None:
        who = _describe(attach.owner)
        if not attach.error and not _has_parasite(attach.pid):
            log.warning("%s: traced by %s, which waits until %s have come", name, who, count(missing, "page"))
            return
        why = f" and could not be stopped ({os.strerror(attach.error)})" if attach.error else ""
        log.error(
            "%s: traced by %s%s while it missed %s: a dump that this one makes now lacks them. "
            "Throw it away, and dump again when this daemon has ended",
            name,
            who,
            why,
            count(missing, "page"),
        )

    async def _complete(
        self, attach: Attach, tracers: Tracers, name: str, families: list[Sequence[TaskService]]
    ) -> None:
        while services := [service for family in families for service in family if service.pending]:
            async with anyio.create_task_group() as group:
                for service in services:
                    group.start_soon(service.complete)
        if not attach.error:
            log.info("%s: nothing is missing any more; %s goes on", name, _describe(attach.owner))
            tracers.release(attach.tracer)

    # Where the kernel does not tell.

    async def _poll(self, tracers: Tracers) -> None:
        for process in self._processes.values():
            self._seen[process.pid] = tracer_of(process.pid)  # the restorer, if it has not let go yet
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

    def _look(self, tracers: Tracers, processes: Sequence[Process]) -> None:
        for process in processes:
            tracer = tracer_of(process.pid)
            if tracer and tracer != self._seen.get(process.pid):
                tracers.report(process.pid, tracer, tracer)
            self._seen[process.pid] = tracer


def _is_unknown(service: TaskService) -> bool:
    """Whether its process is not known: the kernel does not tell which one a task has forked."""
    return service.identity.forked or service.process is None


def _describe(pid: int) -> str:
    try:
        return f"{Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()} (pid {pid})"
    except OSError:
        return f"pid {pid}"


def _has_parasite(pid: int) -> bool:
    """Whether CRIU may have asked already which pages are there. True too when that can't be told."""
    try:
        return PARASITE in Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return True


def _misses_pages(pid: int) -> bool:
    """Whether userfaultfd waits for missing pages of the process ("um" in smaps, proc_pid_smaps(5)): some daemon's."""
    try:
        with Path(f"/proc/{pid}/smaps").open("rb") as smaps:
            return any(line.startswith(b"VmFlags:") and b" um" in line for line in smaps)
    except OSError:
        return False
