"""Dump or pre-dump a tree of processes: the order of the steps.

Everything that can be refused is refused before the tree is stopped. While it is stopped, nothing in it is changed
that the kernel or ``freeze`` does not undo, so that it goes on after every failure, and if dumptool is killed.
Exception: while its pages are served (``--lazy-pages``) it stays stopped if dumptool is killed, because it may be
running elsewhere. The images are on the disk before the inventory, and the inventory before the tree is killed or its
pages are served (``dumptool.output``). A tree that goes on in any case does not wait for the disk.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

from dumptool import core, memory, proc, saveable, shared, survey, tracking
from dumptool.chain import PARENT_LINK, SENT_PREFIX, ParentPages
from dumptool.errors import DumpError, TaskGoneError
from dumptool.files import FileTable
from dumptool.freeze import FrozenTree, Process, freeze
from dumptool.holders import Holder, Holders
from dumptool.level import FrozenTask, HasPages, Level, PageJob
from dumptool.output import Output
from dumptool.process_images import (
    ROOT_OBJECT,
    CapturedTask,
    inventory,
    object_ids,
    write_task,
    write_tree,
)
from dumptool.settings import Report, Serve, Settings, Watcher
from dumptool.survey import Task
from dumptool.tracee import Gadgets, find_room, xstate_components
from dumptool.tracking import Armed, Held, Method
from images_spec import images
from images_spec.errors import ImageError
from images_spec.identity import new_run_id
from images_spec.images import Kind

__all__ = ["Report", "Serve", "Settings", "Watcher", "dump", "pre_dump"]

log = logging.getLogger("lazypages")


def pre_dump(settings: Settings, watcher: Watcher) -> Report:
    """Writes one level of pages while the tree runs, and tracks writes from then on.

    The tree is stopped only while its page tables are scanned and write-protected. Raises ``DumpError``
    (``UnsupportedError``) or ``ImageError``; then, too, the tree goes on.
    """
    with Run(settings, watcher, memory_only=True, track=True) as run:
        run.look()
        with run.frozen() as tree:
            tasks = run.live(tree)
            for number, frozen in enumerate(tasks, start=1):
                begin = time.monotonic()
                run.level.find_pages(frozen, _no_file, number, holder=run.holder)
                run.report.scanning += time.monotonic() - begin
            run.report.frozen = tree.thaw()
        run.copy(tasks, running=True)
        run.copy_shared(run.find_shared(tasks, running=True), running=True)
        run.finish(tasks)
        run.write_stats()
    return run.report


def dump(settings: Settings, watcher: Watcher, serve: Serve | None = None) -> Report:
    """Writes all images of the tree; then kills it, lets it go on (``leave_running``) or leaves it stopped.

    With ``lazy_pages``, ``serve`` is called when all images are complete, while the tree is still frozen. Without
    ``serve`` such a tree goes on, because its images lack pages. Raises as ``pre_dump``. If the dump fails when the
    tree has been frozen, its writes are not tracked any more, as after a dump that succeeds (unless ``track``).
    """
    track = settings.leave_running and settings.track
    with Run(settings, watcher, track=track) as run:
        run.look()
        with run.frozen() as tree, run.untracked_on_error():
            tasks = run.live(tree)
            run.capture(tree, tasks)
            run.copy(tasks, running=False)
            run.copy_shared(run.find_shared(tasks, running=False), running=False)
            if settings.leave_running and not settings.lazy_pages:
                if not track:
                    run.untrack(tasks)
                # The tree goes on even if the images fail, so it need not wait for the disk.
                run.report.frozen = tree.thaw()
                run.finish(tasks)
                run.write_stats()
                return run.report
            run.finish(tasks)
            if settings.lazy_pages and serve is not None:
                watcher.stage("serving")
                run.report.frozen = run.report.served = time.monotonic() - tree.frozen_since
                run.write_stats()  # now: once pages are served, the user may move the images away
                run.ignore_interrupts()
                tree.hold()
                with run.withdrawn_on_error():
                    first = serve(tree, settings)
                if first is not None:
                    run.report.requested = first - tree.frozen_since
            if settings.leave_running or (settings.lazy_pages and serve is None):
                tree.release()
                if not track:
                    run.untrack(tasks)
                run.report.frozen = tree.thaw()
            elif settings.leave_stopped:
                tree.stays = True
                run.report.frozen = tree.thaw()
            else:
                run.report.frozen = time.monotonic() - tree.frozen_since
                tree.kill()
        if not settings.lazy_pages or serve is None:
            run.write_stats()
    return run.report


def _no_file(_vma: proc.Vma, _flags: frozenset[str]) -> tuple[int, int]:
    """A pre-dump has no files.img."""
    return 0, 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A process before the freeze. ``gadgets``: None if they were not found. ``parent``: as in ``FrozenTask``."""

    task: Task
    gadgets: Gadgets | None
    parent: ParentPages | None


class Run:
    """One run of the tool; a context manager that closes its descriptors.

    ``memory_only``: what else the tasks have is not looked at: nothing of it can be in the way. ``track``: writes are
    tracked from this level on; ``holder`` then keeps new trackers, from the freeze on.
    """

    def __init__(
        self, settings: Settings, watcher: Watcher, *, memory_only: bool = False, track: bool = False
    ) -> None:
        self.settings, self.watcher, self.report = settings, watcher, Report()
        self._memory_only, self._track = memory_only, track and settings.method is not Method.COMPARE
        self.holder: Holder | None = None
        self._held: dict[int, Held] = {}
        self._run_id = new_run_id()
        self._seen: dict[int, Seen] = {}
        self.output = Output(settings.images, durable=settings.sync)
        self._resources = ExitStack()
        self._resources.callback(self.output.close)
        self._holders = self._resources.enter_context(Holders())
        self.level = Level(settings, self.output.keep, self._resources)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def look(self) -> None:
        """Finds and refuses everything that can be found before the tree is stopped."""
        self.watcher.stage("looking")
        memory.guard_category()
        survey.check_permission(self.settings.pid)
        tasks = survey.look_until_settled(
            self.settings.pid, self._check, self._holders, files=not self._memory_only
        )
        gadgets = {pid: find_gadgets(task) for pid, task in tasks.items()}
        self._set_up_directory()
        parents = self.level.open({pid: task.image_pid for pid, task in tasks.items()})
        self._seen = {pid: Seen(task, gadgets[pid], parents[pid]) for pid, task in tasks.items()}
        self.level.look_at_shared(self._shared(tasks.values()).values())

    def _set_up_directory(self) -> None:
        """Makes the images directory ready, for this run alone. Raises ``DumpError``."""
        self.output.make_directory()
        self._resources.enter_context(self.output.alone())
        set_up_directory(self.settings, self.output)

    def _check(self, processes: Sequence[Process], tasks: dict[int, Task], *, frozen: bool = False) -> None:
        """Raises ``UnsupportedError`` with everything that this run can't save."""
        if self._memory_only:
            survey.check_memory(processes, tasks, frozen=frozen)
        else:
            saveable.check(processes, tasks, self.settings.allow, frozen=frozen)

    @contextmanager
    def frozen(self) -> Iterator[FrozenTree]:
        """The tree, stopped, and locked against other runs of the tool."""
        self.watcher.stage("freezing")
        for seen in self._seen.values():
            self._hold(seen.task)
        if self._track:
            self.holder = self._holders.for_tree(self._seen)
        with freeze(self.settings.pid, self.settings.timeout) as tree:
            self.report.processes = len(tree.processes)
            self.report.threads = sum(len(process.threads) for process in tree.alive)
            self.report.freezing = tree.freezing_time
            for process in tree.alive:
                core.settle(process)
            yield tree

    def live(self, tree: FrozenTree) -> list[FrozenTask]:
        """Looks at the frozen processes: they have run, and may have forked, since the first look."""
        before = {pid: seen.task for pid, seen in self._seen.items()}
        if not self._held.keys() >= {process.pid for process in tree.alive}:
            self._holders.look()  # another run may have tracked some since; those that are held are locked
        tasks = survey.look_at_all(tree.processes, before, holders=self._holders, files=not self._memory_only)
        self._check(tree.processes, tasks, frozen=True)
        for task in tasks.values():
            self._hold(task)
        return [self._frozen_task(task, tree) for task in tasks.values()]

    def _hold(self, task: Task) -> None:
        """Locks the tracker of a process, if it has one, and takes its descriptors."""
        held = self._held.get(task.pid)
        if held is not None and held.record.start_time == task.stat.start_time:
            return
        self._held.pop(task.pid, None)  # of an earlier process
        held = tracking.hold(task)
        if held is not None:
            self._resources.callback(held.close)
            self._held[task.pid] = held

    def _frozen_task(self, task: Task, tree: FrozenTree) -> FrozenTask:
        pid, vmas, seen = task.pid, task.layout.vmas, self._seen.get(task.pid)
        gadgets = None if seen is None else seen.gadgets
        if gadgets is None or not gadgets.are_there(pid, vmas):
            gadgets = Gadgets(pid, vmas)
        gadgets.room = find_room(pid, vmas, task.process.threads)
        pidfd = None
        if pid in tree.pidfds:
            pidfd = os.dup(tree.pidfds[pid])  # the tree closes its own at the thaw
            self._resources.callback(os.close, pidfd)
        # Its pid may have been that of another process before, with another one in its PID namespace.
        same = seen is not None and seen.task.image_pid == task.image_pid
        parent = seen.parent if seen is not None and same else None
        return FrozenTask(task, gadgets, parent, pidfd, self._held.get(pid))

    def capture(self, tree: FrozenTree, tasks: list[FrozenTask]) -> None:
        """Writes all images but the pages, and finds the pages."""
        components, table = xstate_components(), FileTable()
        for number, frozen in enumerate(tasks, start=1):
            pid, ids = frozen.task.pid, object_ids(ROOT_OBJECT + number)
            captured = core.capture(frozen.task, frozen.gadgets, components, ids)
            begin = time.monotonic()
            file_id = partial(table.add_mapped, pid)
            described = self.level.find_pages(frozen, file_id, number, holder=self.holder)
            self.report.scanning += time.monotonic() - begin
            guards = memory.guard_regions(pid, described)
            write_task(CapturedTask(frozen.task, captured, described, guards, ids), self.output, table)
        write_tree(self.output, tree, table)

    def copy(self, tasks: Sequence[HasPages], *, running: bool) -> None:
        """Copies the pages of all processes. ``running``: the tree runs again."""
        begin = time.monotonic()
        self.watcher.stage("copying")
        self.watcher.total(sum(frozen.job.pages for frozen in tasks if frozen.job is not None))
        for frozen in tasks:
            self.report.counts.add(self.level.copy(frozen, self.watcher.copied, running=running))
        self.report.writing += time.monotonic() - begin

    def _shared(self, tasks: Iterable[Task]) -> dict[int, shared.Piece]:
        """Dumptool's own images can't hold memory that is only open (memfd): pre-dumps have it for those of CRIU.

        CRIU writes that of System V itself.
        """
        layouts = [(task.pid, task.layout.vmas) for task in tasks]
        found = shared.find(layouts, descriptors=self._memory_only)
        return {number: piece for number, piece in found.items() if not piece.sysv}

    def find_shared(self, tasks: list[FrozenTask], *, running: bool) -> list[PageJob]:
        """Finds the pages of shared memory that will be copied. ``running``: the tree runs again.

        Pre-dumps with a page server have none: here would be no bytes to compare with later.
        """
        if self._memory_only and self.settings.page_server is not None:
            return []
        begin, jobs = time.monotonic(), []
        pieces = self._shared(frozen.task for frozen in tasks)
        for pages_id, piece in enumerate(pieces.values(), start=len(tasks) + 1):
            try:
                jobs.append(self.level.find_shared(piece, pages_id, mapped=not self._memory_only))
            except TaskGoneError:
                if not running:
                    raise
        self.report.scanning += time.monotonic() - begin
        return jobs

    def copy_shared(self, jobs: Iterable[PageJob], *, running: bool) -> None:
        """Copies the pages of shared memory. ``running``: the tree runs again."""
        begin = time.monotonic()
        for job in jobs:
            self.report.shared.add(self.level.copy_shared(job, self.watcher.copied, running=running))
        self.report.writing += time.monotonic() - begin

    def untrack(self, tasks: list[FrozenTask]) -> None:
        """Ends the tracking of frozen processes that go on."""
        for frozen in tasks:
            for fd in tracking.close_in(frozen.task, frozen.gadgets, frozen.task.leftovers):
                self._resources.callback(os.close, fd)  # when they run again
        self._drop()

    def _drop(self) -> None:
        """Ends the tracking of all processes; what takes long in that happens at the end of the run."""
        for held in self._held.values():
            held.drop()
            self._resources.callback(held.holder.sync)
        self._held.clear()

    @contextmanager
    def untracked_on_error(self) -> Iterator[None]:
        """Ends the tracking of all processes if the block fails."""
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def finish(self, tasks: list[FrozenTask]) -> None:
        """Publishes the inventory once all else is on the disk and at the page server, then completes the trackers."""
        self.watcher.stage("syncing")
        self.level.close()
        self.output.publish(inventory(self._run_id))
        self.complete([frozen.armed for frozen in tasks if frozen.armed is not None])

    def complete(self, trackers: Sequence[Armed]) -> None:
        """Completes the trackers that were armed for this level, which has been published."""
        if not all(holder.sync() for holder in {armed.held.holder for armed in trackers}):
            log.warning("what keeps the trackers has ended: the next level will have all pages")
            return
        for armed in trackers:
            armed.complete(self._run_id)
        self.report.tracked = ", ".join(sorted({armed.record.method for armed in trackers}))

    def ignore_interrupts(self) -> None:
        """From here to the end of the run, only the service handles SIGINT and SIGTERM.

        After the service has ended, the default handlers could resume a tree that runs elsewhere, stop half-way
        through resuming it here, or end dumptool before it has reported what became of the tree.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            self._resources.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))

    @contextmanager
    def withdrawn_on_error(self) -> Iterator[None]:
        """Removes the inventory if the service fails: the images lack pages that can't be served any more."""
        try:
            yield
        except BaseException:
            self.output.withdraw()
            raise

    def write_stats(self) -> None:
        """Writes stats-dump. A failure is only logged: the dump is complete without it."""
        try:
            images.write(
                self.settings.images / Kind.STATS.file_name("dump"), Kind.STATS, [self.report.entry()]
            )
        except ImageError as error:
            log.warning("%s (the dump is complete without it)", error)


def find_gadgets(task: Task) -> Gadgets | None:
    """None if they can't be found: a process in exit or execve has them, or an error message, once it is frozen."""
    with suppress(DumpError):
        return Gadgets(task.pid, task.layout.vmas)
    return None


def set_up_directory(settings: Settings, output: Output) -> None:
    """Makes the images directory ready, with no inventory and the link to the parent level. Raises ``DumpError``."""
    directory, link = settings.images, settings.images / PARENT_LINK
    try:
        if link.is_symlink():
            link.unlink()
        if settings.parent is not None:
            if not (directory / settings.parent).is_dir():
                raise DumpError(f"--prev-images-dir {settings.parent}: no such directory in {directory}")
            if (directory / settings.parent).samefile(directory):
                raise DumpError(f"{directory}: is its own --prev-images-dir")
            link.symlink_to(settings.parent)
        stale = [Kind.INVENTORY.file_name(), f"{SENT_PREFIX}*.img"]
        if settings.page_server is not None:
            stale.append(Kind.PAGEMAP.file_name("*"))  # a pagemap takes precedence over a sent-pagemap
        for path in [path for pattern in stale for path in directory.glob(pattern)]:
            path.unlink(missing_ok=True)
        output.sync_directory()  # after a power failure an old inventory must not stand beside new images
    except OSError as error:
        raise DumpError(f"{directory}: {error.strerror}") from None
