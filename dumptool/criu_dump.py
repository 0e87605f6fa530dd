"""Dump a tree with CRIU, which writes everything but memory, and write the memory: the order of the steps.

CRIU writes its images to a directory of its own. They are moved into the images directory when all else is there, and
on the disk; the inventory comes last. The name of the inventory is the commit: from then on the tree is killed,
whoever of CRIU and us is killed in the meantime (``dumptool.criu``). Before, it goes on.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dumptool import proc, shared, survey
from dumptool.chain import ParentPages
from dumptool.criu import LOG_NAME, Criu, CriuDump
from dumptool.criu_pages import StoppedTask, find_pages
from dumptool.criu_shared import (
    MOST_NUMBERS,
    SharedMemoryLostError,
    has_huge_pages,
    names,
    pages,
    throw_away,
    thrown_away,
)
from dumptool.criu_tree import CriuTree, open_tree
from dumptool.dump import Run, Seen, find_gadgets
from dumptool.errors import DumpError, TaskGoneError
from dumptool.freeze import members
from dumptool.later import Later, put_off, room
from dumptool.level import PageJob
from dumptool.settings import Report, Serve, Settings, Watcher
from dumptool.survey import Task
from images_spec import images
from images_spec.images import Kind
from images_spec.pagemap import Pagemap, pages_name

log = logging.getLogger("lazypages")

WORK = ".criu-dump"
"""Directory in the images directory in which CRIU writes. What is in it is no dump."""


@dataclass(frozen=True, slots=True)
class ByCriu:
    """``arguments``: options for `criu dump` beside those that follow from ``Settings``."""

    criu: Criu
    arguments: tuple[str, ...] = ()


def dump_by_criu(settings: Settings, how: ByCriu, watcher: Watcher, serve: Serve | None = None) -> Report:
    """As ``dumptool.dump.dump``; also raises ``CriuError`` with CRIU's reason."""
    try:
        return _dump_by_criu(settings, how, watcher, serve, shared_by_us=True)
    except SharedMemoryLostError as error:
        log.warning("%s; the tree goes on, and is dumped once more: CRIU writes all shared memory", error)
    return _dump_by_criu(settings, how, watcher, serve, shared_by_us=False)


def _dump_by_criu(
    settings: Settings, how: ByCriu, watcher: Watcher, serve: Serve | None, *, shared_by_us: bool
) -> Report:
    with _CriuRun(settings, how, watcher, shared_by_us=shared_by_us) as run:
        run.look()
        run.make_trackers()
        with run.stopped() as tree:
            run.look_again(tree)
            run.find_thrown_away(tree)  # may lead to another attempt, with the trackers as they are
            with run.untracked_on_error():
                _save(run, tree, settings, serve)
        if not settings.lazy_pages:
            run.write_stats()
    return run.report


def _save(run: _CriuRun, tree: CriuTree, settings: Settings, serve: Serve | None) -> None:
    """All that is done with the stopped tree."""
    run.find(tree)
    if settings.leave_running and not settings.lazy_pages:
        run.put_off()
        run.copy(run.tasks, running=False)
        run.copy_shared(run.shared, running=False)
        run.still_stopped()
        run.report.frozen = run.end(tree)
        run.write_out()
        run.publish()
        return
    run.copy(run.tasks, running=False)
    run.copy_shared(run.shared, running=False)
    run.output.sync()
    run.still_stopped()
    run.publish()
    if settings.lazy_pages and serve is not None:
        run.serve(tree, serve)
    elif settings.lazy_pages:
        return  # the images lack pages: the tree goes on
    run.report.frozen = run.end(tree)


class _CriuRun(Run):
    """One run; see ``Run``. ``shared_by_us``: dumptool writes shared memory if it can find it, and not CRIU."""

    def __init__(self, settings: Settings, how: ByCriu, watcher: Watcher, *, shared_by_us: bool) -> None:
        super().__init__(settings, watcher, memory_only=True, track=settings.leave_running and settings.track)
        self._how, self._shared_by_us = how, shared_by_us
        self._work = settings.images / WORK
        self._parents: dict[int, ParentPages | None] = {}  # by the pid in images
        self._tasks: dict[int, Task] = {}  # as they were before
        self._layouts: dict[int, proc.Layout] = {}  # of the stopped processes
        self._criu: CriuDump | None = None
        self._own: set[str] = set()  # names of CRIU's images that ours replace
        self._later: list[Later] = []
        self.tasks: list[StoppedTask] = []
        self.shared: list[PageJob] = []

    def look(self) -> None:
        """Opens all that a dump needs while the tree still runs. Raises ``DumpError``, ``ImageError``."""
        self.watcher.stage("looking")
        settings = self.settings
        survey.check_permission(settings.pid)
        self._holders.look()
        self._tasks = seen = survey.look_at_all(members(settings.pid), holders=self._holders, files=False)
        for task in seen.values():
            survey.check_filled(task.pid, task.layout)
        for task in seen.values():
            self._hold(task)
        self._set_up_directory()
        parents = self.level.open({pid: task.image_pid for pid, task in seen.items()})
        self._parents = {seen[pid].image_pid: parent for pid, parent in parents.items()}
        try:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(0o700)
            (settings.images / LOG_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise DumpError(f"{self._work}: {error.strerror}") from None
        self._resources.callback(shutil.rmtree, self._work, ignore_errors=True)
        if self._shared_by_us and not any(has_huge_pages(task.layout) for task in seen.values()):
            layouts = [(pid, task.layout.vmas) for pid, task in seen.items()]
            pieces = shared.find(layouts, descriptors=True)
            if max(pieces, default=0) < MOST_NUMBERS:
                self.level.look_at_shared(pieces.values())
                throw_away(self._work, len(seen) + sum(not piece.sysv for piece in pieces.values()))

    def make_trackers(self) -> None:
        """Gives each process a tracker that has none: no call can be made in it when CRIU has stopped it.

        The tree is stopped for a moment.
        """
        if not self._track or self._held.keys() >= self._tasks.keys():
            return
        self._seen = {pid: Seen(task, find_gadgets(task), None) for pid, task in self._tasks.items()}
        with self.frozen() as tree:
            for frozen in self.live(tree):
                assert self.holder is not None
                held = self.level.tracker(frozen, self.holder)
                self._tasks[frozen.task.pid] = frozen.task
                if held is not None:
                    self._held[frozen.task.pid] = held
            tree.thaw()

    @contextmanager
    def stopped(self) -> Iterator[CriuTree]:
        """The tree, stopped by CRIU. At the end of the block it goes on, unless it was killed."""
        self.watcher.stage("freezing")
        settings = self.settings
        by_us = settings.leave_running or settings.lazy_pages
        with CriuDump(
            self._how.criu,
            [*self._arguments(), *self._how.arguments],
            log=settings.images / LOG_NAME,
            commit=None if by_us else settings.images / Kind.INVENTORY.file_name(),
            kills=not (settings.leave_running or settings.leave_stopped),
        ) as self._criu:
            self._criu.start()
            tree = open_tree(settings.pid, self._criu, self._work)
            try:
                self.report.processes = len(tree.processes)
                self.report.threads = sum(len(process.threads) for process in tree.alive)
                self.report.freezing = tree.freezing_time
                self._criu.will_kill([process.pid for process in tree.alive])
                yield tree
            finally:
                try:
                    tree.thaw()
                finally:
                    for pidfd in tree.pidfds.values():
                        os.close(pidfd)

    def _arguments(self) -> list[str]:
        settings = self.settings
        chosen = [
            ("--leave-running", settings.leave_running),
            ("--leave-stopped", settings.leave_stopped),
            ("--shell-job", settings.allow.shell_job),
            ("--file-locks", settings.allow.file_locks),
        ]
        return [
            *("--tree", str(settings.pid), "--images-dir", str(self._work)),
            *("--timeout", str(math.ceil(settings.timeout))),
            *(name for name, given in chosen if given),
        ]

    def look_again(self, tree: CriuTree) -> None:
        """The memory of the stopped processes. Raises ``DumpError`` if it is being filled by a daemon."""
        for process in tree.alive:
            before = self._tasks.get(process.pid)
            layout = proc.layout(process.pid, None if before is None else before.layout)
            self._layouts[process.pid] = layout
            survey.check_filled(process.pid, layout)

    def find(self, tree: CriuTree) -> None:
        """Finds the pages of all processes that will be written."""
        begin = time.monotonic()
        for process in tree.alive:
            pid = tree.image_pid(process.pid)
            before = self._tasks.get(process.pid)
            pidfd = os.dup(tree.pidfds[process.pid])
            self._resources.callback(os.close, pidfd)
            held = self._held.get(process.pid)
            if held is not None and held.record.start_time != proc.stat(process.pid).start_time:
                held = None  # of another process, which has ended
            task = StoppedTask(process.pid, pid, self._parents.get(pid), pidfd, held)
            name = Kind.PAGEMAP.file_name(pid)
            pages_id = Pagemap.load(self._work / name).pages_id
            self._own |= {name, pages_name(pages_id)}
            target = self.level.task_target(pid, pages_id, parents=task.parent is not None)
            changes = self.level.changes(task)  # before the tracker is armed
            if self._track and before is not None:
                task.armed = self.level.arm_again(before, held)
            find_pages(task, self._work, target, changes)
            self.tasks.append(task)
        self.report.scanning += time.monotonic() - begin

    def find_thrown_away(self, tree: CriuTree) -> None:
        """Finds the pages of shared memory that will be written. Raises ``SharedMemoryLostError`` as well."""
        begin = time.monotonic()
        lost = list(thrown_away(self._work))
        layouts = [(process.pid, self._layouts[process.pid].vmas) for process in tree.alive]
        pieces = shared.find(layouts, descriptors=False)
        if not pieces.keys() >= {number for number, _ in lost}:
            pieces = shared.find(layouts, descriptors=True)  # a process may have many
        for number, pagemap in lost:
            if number not in pieces:
                raise SharedMemoryLostError(f"no process has shared memory {number} mapped or open")
            try:
                job = self.level.find_shared(pieces[number], pagemap.pages_id, given=pages(pagemap))
            except TaskGoneError as error:
                raise SharedMemoryLostError(str(error)) from None
            self._own |= names(number, pagemap)
            self.shared.append(job)
        self.report.scanning += time.monotonic() - begin

    def put_off(self) -> None:
        """Has pages copied to memory first, as far as there is room: the tree does not wait for the disk."""
        own = [(task, task.job) for task in self.tasks if task.job is not None]
        jobs = [*(job for _, job in own), *self.shared]
        sinks = put_off([(job.target, job.pages) for job in jobs], room(), self._resources)
        jobs = [replace(job, target=sink) for job, sink in zip(jobs, sinks, strict=True)]
        self.shared = jobs[len(own) :]
        for (task, _), job in zip(own, jobs, strict=False):
            task.job = job
        self._later = [sink for sink in sinks if isinstance(sink, Later)]

    def write_out(self) -> None:
        """Writes what was put off."""
        begin = time.monotonic()
        for sink in self._later:
            sink.write_out()
        self.report.writing += time.monotonic() - begin

    def still_stopped(self) -> None:
        """Raises ``CriuError`` if CRIU has ended: what was read may be of a tree that ran."""
        assert self._criu is not None
        self._criu.check_alive()

    def publish(self) -> None:
        """Adds CRIU's images, and publishes the inventory when all is on the disk, and at the page server."""
        self.watcher.stage("syncing")
        self.level.close()
        inventory = images.read_one(self._work / Kind.INVENTORY.file_name(), Kind.INVENTORY)
        if inventory.dump_criu_run_id:
            self._run_id = inventory.dump_criu_run_id  # what trackers and later levels know this one by
        else:
            inventory.dump_criu_run_id = self._run_id  # CRIU before 4.1
        left = {Kind.INVENTORY.file_name(), Kind.STATS.file_name("dump"), *self._own}
        for path in sorted(self._work.iterdir()):
            if path.name not in left and path.is_file():
                self._adopt(path)
        self.output.sync()
        self.output.publish(inventory)
        self.complete([task.armed for task in self.tasks if task.armed is not None])

    def _adopt(self, path: Path) -> None:
        to = self.settings.images / path.name
        try:
            path.replace(to)
            if self.output.keep is not None:
                fd = os.open(to, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    self.output.keep(to, fd)
                finally:
                    os.close(fd)
        except OSError as error:
            raise DumpError(f"{to}: can't be written: {error.strerror}") from None

    def serve(self, tree: CriuTree, serve: Serve) -> None:
        """Serves the pages that the images lack. Raises as ``serve`` does."""
        self.watcher.stage("serving")
        self.report.frozen = self.report.served = time.monotonic() - tree.frozen_since
        self.write_stats()
        self.ignore_interrupts()
        tree.hold()
        with self.withdrawn_on_error():
            first = serve(tree, self.settings)
        if first is not None:
            self.report.requested = first - tree.frozen_since
        if self.settings.leave_running or self.settings.leave_stopped:
            tree.release()

    def end(self, tree: CriuTree) -> float:
        """The tree ends, stays or goes on, as was asked for. Returns how long it was stopped, in seconds."""
        settings = self.settings
        stopped = tree.finish(kill=not (settings.leave_running or settings.leave_stopped))
        if not self._track:
            self._drop()
        if settings.leave_stopped:
            self._stop(tree)
        return stopped

    def _stop(self, tree: CriuTree) -> None:
        """CRIU has left them stopped, unless it was killed."""
        for process in tree.alive:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(tree.pidfds[process.pid], signal.SIGSTOP)
