"""Make a dump or a pre-dump of a tree of processes: who does what, in which order.

Refusals come before anything is stopped. While the tree is stopped nothing is changed in it that does not
come back by itself, so that it goes on after every failure, and when this process is killed. Once its
pages are being served (``--lazy-pages``), it stays stopped if we are killed: it may be running elsewhere.
Images and their names are on the disk before the inventory is, and the inventory before the tree is ended or its pages
are served (``dumptool.output``). A tree that goes on anyway does not wait for the disk.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

from dumptool import core, identity, mappings, memory, proc, survey, tracking
from dumptool.chain import PARENT_LINK, SENT_PREFIX, Chain, ParentPages
from dumptool.errors import DumpError, TaskGoneError, UnsupportedError
from dumptool.files import FileTable
from dumptool.freeze import FrozenTree, freeze, members
from dumptool.mappings import FileIds, Mapping
from dumptool.memory import Counts, Marks, Part, Sink, Source, Target
from dumptool.output import Output
from dumptool.send import PageServer, Sender, SentTarget
from dumptool.survey import Task
from dumptool.tracee import Gadgets, find_room, registers, xstate_components
from dumptool.tracking import Armed, Method
from images_spec import images
from images_spec.errors import ImageError
from images_spec.flags import PE_PRESENT
from images_spec.identity import new_run_id
from images_spec.images import Kind
from images_spec.messages import (
    DumpStatsEntry,
    FsEntry,
    InventoryEntry,
    PstreeEntry,
    SeccompEntry,
    StatsEntry,
    TaskKobjIdsEntry,
)
from images_spec.placement import Span
from lazypages.net.wire import ImageType

log = logging.getLogger("lazypages")

IMAGE_VERSION = 2
NAMESPACE_IDS = {
    "pid_ns_id": 1,
    "net_ns_id": 2,
    "ipc_ns_id": 3,
    "uts_ns_id": 4,
    "time_ns_id": 5,
    "mnt_ns_id": 6,
    "user_ns_id": 7,
    "cgroup_ns_id": 8,
}
"""Equal in inventory and ids images: the tasks have the namespaces of who dumps them."""
ROOT_OBJECT = 1
"""vm, files, fs and sighand id of the dumper in the inventory; those of tasks count on from here."""


#: Seconds for the child of a vfork to call execve or to exit.
VFORK_PATIENCE = 2.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says.

    ``parent``: directory of the parent level relative to ``images``, or None. ``leave_running``: the tree
    goes on after a dump; with ``track`` as well, what it writes from then on is tracked. ``timeout``:
    seconds for the tree to stop. ``page_server``: pages go there, not into ``images``. ``sync``: a dump counts, and
    the tree is ended, only when all of it is on the disk.
    """

    pid: int
    images: Path
    parent: str | None = None
    method: Method = Method.AUTO
    lazy_parents: bool = True
    lazy_pages: bool = False
    leave_running: bool = False
    track: bool = False
    allow: survey.Options = field(default_factory=survey.Options)
    timeout: float = 10
    page_server: PageServer | None = None
    sync: bool = True


@dataclass(slots=True)
class Report:
    """What has been done; times in seconds."""

    processes: int = 0
    threads: int = 0
    freezing: float = 0.0
    frozen: float = 0.0
    scanning: float = 0.0
    writing: float = 0.0
    counts: Counts = field(default_factory=Counts)
    shared: Counts = field(default_factory=Counts)
    tracked: str = ""

    def entry(self) -> StatsEntry:
        """For stats-dump: microseconds and pages."""

        def micro(seconds: float) -> int:
            return min(int(seconds * 1_000_000), 0xFFFFFFFF)

        return StatsEntry(
            dump=DumpStatsEntry(
                freezing_time=micro(self.freezing),
                frozen_time=micro(self.frozen),
                memdump_time=micro(self.scanning),
                memwrite_time=micro(self.writing),
                pages_scanned=self.counts.scanned,
                pages_skipped_parent=self.counts.in_parent,
                pages_written=self.counts.written,
                pages_lazy=self.counts.lazy,
                shpages_scanned=self.shared.scanned,
                shpages_skipped_parent=self.shared.in_parent,
                shpages_written=self.shared.written,
            )
        )


class Watcher:
    """Told what is going on; the command line draws a progress bar from it."""

    def stage(self, name: str) -> None:
        """A new stage of the work begins."""

    def total(self, pages: int) -> None:
        """So many pages are to be copied."""

    def copied(self, pages: int) -> None:
        """So many have been copied since the last call."""


Serve = Callable[[FrozenTree, Settings], None]
"""Serves the pages that were left out (``Settings.lazy_pages``) while the tree is frozen."""


def pre_dump(settings: Settings, watcher: Watcher) -> Report:
    """One level of pages while the tree runs, and tracking of what is written from then on.

    The tree stands still only while it is looked at and its memory is write-protected. Raises ``DumpError``
    (``UnsupportedError``) or ``ImageError``; the tree goes on then too.
    """
    settings = replace(settings, allow=replace(settings.allow, file_locks=True))  # not this level's business
    with _Run(settings, watcher) as run:
        run.look()
        with run.frozen() as tree:
            for number, task in enumerate(run.live(tree), start=1):
                run.find_pages(task, _no_file, number, arm=True)
            run.report.frozen = tree.thaw()
        run.copy(running=True)
        run.finish()
        run.write_stats()
    return run.report


def dump(settings: Settings, watcher: Watcher, serve: Serve | None = None) -> Report:
    """All images of the tree; then it is ended, or goes on (``leave_running``).

    ``serve`` is called, when all images are complete and the tree still stands, if ``lazy_pages`` is set;
    without it such a tree goes on, because its images lack pages. Raises as ``pre_dump``.
    """
    with _Run(settings, watcher) as run:
        run.look()
        with run.frozen() as tree:
            tasks = run.live(tree)
            run.capture(tree, tasks)
            run.copy(running=False)
            run.copy_shared(tasks)
            if settings.leave_running and not settings.lazy_pages:
                if not settings.track:
                    run.untrack(tasks)
                # It goes on whatever becomes of the images: it need not wait for the disk.
                run.report.frozen = tree.thaw()
                run.finish()
                run.write_stats()
                return run.report
            run.finish()
            if settings.lazy_pages and serve is not None:
                watcher.stage("serving")
                run.report.frozen = time.monotonic() - tree.frozen_since
                run.write_stats()  # with the images, which somebody may move away from now on
                run.ignore_interrupts()
                tree.hold()
                with run.worthless_on_error():
                    serve(tree, settings)
            if settings.leave_running or (settings.lazy_pages and serve is None):
                tree.release()
                if not settings.track:
                    run.untrack(tasks)
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


@dataclass(slots=True)
class _Job:
    """The pages of one process that are to be written."""

    source: Source
    target: Sink
    parts: list[Part]
    marks: Marks


class _Run:
    """One run of the tool; a context manager that gives back its descriptors."""

    def __init__(self, settings: Settings, watcher: Watcher) -> None:
        self.settings, self.watcher, self.report = settings, watcher, Report()
        self._run_id = new_run_id()
        self._chain: Chain | None = None
        self._sender: Sender | None = None
        self._parents: dict[int, ParentPages | None] = {}
        self._before: dict[int, Task] = {}
        self._gadgets: dict[int, Gadgets] = {}
        self._armed: list[Armed] = []
        self._pidfds: dict[int, int] = {}
        self._jobs: list[_Job] = []
        self._output = Output(settings.images, durable=settings.sync)
        self._resources = ExitStack()
        self._resources.callback(self._output.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def look(self) -> None:
        """All that can be found out and refused before anything is stopped."""
        settings = self.settings
        self.watcher.stage("looking")
        memory.guard_category()
        survey.check_permission(settings.pid)
        deadline = time.monotonic() + VFORK_PATIENCE
        refused = ""
        while True:
            processes = members(settings.pid)
            in_vfork = survey.any_in_vfork(processes)  # when the look is over, so may that be
            self._before = survey.look_at_all(processes)
            try:
                survey.check(processes, self._before, settings.allow)
                break
            except UnsupportedError as error:
                # For a moment a process that is just ending seems to be what it is not; one in execve too. The child
                # of a vfork shares its parent's memory for longer, and nothing is wrong with that.
                settled = str(error) == refused and not (in_vfork or survey.any_in_vfork(processes))
                if settled or time.monotonic() > deadline:
                    raise
                refused = str(error)
                time.sleep(0.005)
        for pid, task in self._before.items():
            # Where they can't be found now, in a process that is just ending or is not itself yet, a second look when
            # all stands still finds them, or says why not.
            with suppress(DumpError):
                self._gadgets[pid] = Gadgets(pid, task.layout.vmas)
        _set_up_directory(settings, self._output)
        if settings.parent is not None:
            self._chain = Chain(settings.images / settings.parent)
            self._parents = {pid: self._chain.pages_of(pid) for pid in self._before}
        if settings.page_server is not None:
            self._sender = self._resources.enter_context(Sender(settings.page_server))
            for pid, pages in self._parents.items():
                if pages is not None and not self._sender.has_parent(pid):
                    self._parents[pid] = None  # then all is sent

    @contextmanager
    def frozen(self) -> Iterator[FrozenTree]:
        """The tree, stopped. Other runs of the tool are kept away."""
        self.watcher.stage("freezing")
        for task in self._before.values():
            with suppress(TaskGoneError):
                fd = tracking.lock(task)
                if fd is not None:
                    self._resources.callback(os.close, fd)
        with freeze(self.settings.pid, self.settings.timeout) as tree:
            self.report.processes = len(tree.processes)
            self.report.threads = sum(len(process.threads) for process in tree.alive)
            self.report.freezing = tree.freezing_time
            for process in tree.alive:
                core.settle(process)
            for pid, pidfd in tree.pidfds.items():
                self._pidfds[pid] = os.dup(pidfd)  # for after the thaw, too
                self._resources.callback(os.close, self._pidfds[pid])
            yield tree

    def live(self, tree: FrozenTree) -> list[Task]:
        """Looks at everything once more: it has been running since the first look."""
        tasks = survey.look_at_all(tree.processes, self._before)
        survey.check(tree.processes, tasks, self.settings.allow, frozen=True)
        for pid, task in tasks.items():
            gadgets, vmas = self._gadgets.get(pid), task.layout.vmas
            if gadgets is None or not gadgets.are_there(pid, vmas):
                self._gadgets[pid] = Gadgets(pid, vmas)
            self._gadgets[pid].room = find_room(pid, vmas, task.process.threads)
        return list(tasks.values())

    def find_pages(self, task: Task, file_id: FileIds, pages_id: int, *, arm: bool) -> list[Mapping]:
        """Which pages of a frozen process are to be written; its mappings.

        ``arm``: writes from now on are noted.
        """
        begin = time.monotonic()
        settings, pid = self.settings, task.pid
        armed = tracking.arm(task, self._gadgets[pid], settings.method) if arm else None
        if armed is not None:
            self._armed.append(armed)
            self._resources.callback(armed.close)
        marks, compare, known = self._marks(task, armed)
        described = mappings.describe(proc.layout(pid, task.layout), file_id)
        pointers = [registers(tid).rsp for tid in task.process.threads]
        fresh = known.fresh(described) if known is not None else frozenset()
        if armed is not None:
            armed.watch(described)
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            protect = armed is not None and armed.can_protect
            parts = memory.scan(
                pagemap, described, marks, protect=protect, stack_pointers=pointers, fresh=fresh
            )
        finally:
            os.close(pagemap)
        if armed is not None:
            armed.clear()
        if marks.known:
            parts = memory.only_in_parent(parts, self._parents.get(pid), marks)
        target = self._target(ImageType.TASK, pid, pages_id)
        self._jobs.append(_Job(Source(pid, compare=compare), target, parts, marks))
        self.report.scanning += time.monotonic() - begin
        return described

    def _target(self, kind: ImageType, number: int, pages_id: int) -> Sink:
        directory = self.settings.images
        if self._sender is not None:
            parents = kind is ImageType.TASK and self._parents.get(number) is not None
            return SentTarget(self._sender, directory, kind, number, parents, self._output.keep)
        name = Kind.PAGEMAP.file_name(number if kind is ImageType.TASK else f"shmem-{number}")
        return Target(directory, name, pages_id, self._output.keep)

    def _marks(
        self, task: Task, armed: Armed | None
    ) -> tuple[Marks, ParentPages | None, tracking.Vouched | None]:
        """How the pages of a process are to be labelled, what to compare them with, if anything, and who says so."""
        settings = self.settings
        marks = Marks(lazy_dump=settings.lazy_pages, lazy_parents=settings.lazy_parents)
        parent = self._parents.get(task.pid)
        if self._chain is None or parent is None:
            return marks, None, None
        if settings.method is not Method.COMPARE and not (armed is not None and armed.new):
            known = tracking.vouched(task, self._chain.run_id)
            if known is not None:
                self._resources.callback(known.close)
                return replace(marks, with_=known.with_, without=known.without), None, known
        compare = settings.method in (Method.AUTO, Method.COMPARE) and not settings.lazy_pages
        return marks, parent if compare else None, None

    def capture(self, tree: FrozenTree, tasks: list[Task]) -> None:
        """Everything but the pages, into images."""
        output, components, table = self._output, xstate_components(), FileTable()
        for number, task in enumerate(tasks, start=1):
            ids = _object_ids(ROOT_OBJECT + number)
            captured = core.capture(task, self._gadgets[task.pid], components, ids)
            arm = self.settings.leave_running and self.settings.track
            described = self.find_pages(task, partial(table.add_mapped, task.pid), number, arm=arm)
            guards = memory.guard_regions(task.pid, described)
            _write_task(_Captured(task, captured, described, guards, ids), output, table)
        _write_tables(output, tree, table)

    def copy(self, *, running: bool) -> None:
        """The pages, into images; ``running``: the tree runs again."""
        begin = time.monotonic()
        self.watcher.stage("copying")
        self.watcher.total(sum(part.runs.pages(PE_PRESENT) for job in self._jobs for part in job.parts))
        for job in self._jobs:
            source = replace(job.source, running=running)
            try:
                counts = memory.write(job.target, source, job.parts, job.marks, self.watcher.copied)
                identity.check(source.pid, self._pidfds.get(source.pid))  # else these may be another's pages
            except TaskGoneError:
                if not running or source.pid == self.settings.pid:
                    raise
                job.target.remove()  # it has ended: the next level has it no more
            else:
                self.report.counts.add(counts)
        self.report.writing += time.monotonic() - begin

    def copy_shared(self, tasks: list[Task]) -> None:
        """Each piece of shared anonymous memory once."""
        begin, seen = time.monotonic(), set()
        for task in tasks:
            for vma in task.layout.vmas:
                if not survey.is_shared_anonymous(vma) or vma.inode in seen:
                    continue
                seen.add(vma.inode)
                target = self._target(ImageType.SHMEM, vma.inode, len(self._jobs) + len(seen))
                fd = os.open(f"/proc/{task.pid}/{vma.link}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    part = memory.shared_part(fd, os.fstat(fd).st_size)
                    source = Source(task.pid, fd=fd)
                    self.report.shared.add(memory.write(target, source, [part], Marks(), self.watcher.copied))
                finally:
                    os.close(fd)
        self.report.writing += time.monotonic() - begin

    def untrack(self, tasks: list[Task]) -> None:
        """A tree that goes on goes on as if it had never been tracked."""
        for task in tasks:
            for fd in tracking.remove(task, self._gadgets[task.pid]):
                self._resources.callback(os.close, fd)

    def finish(self) -> None:
        """The inventory, when all else is on the disk. Trackers now vouch for it.

        A page server must have everything before.
        """
        self.watcher.stage("syncing")
        if self._sender is not None:
            self._sender.close()
        root = _object_ids(ROOT_OBJECT)
        entry = InventoryEntry(
            img_version=IMAGE_VERSION,
            fdinfo_per_id=True,
            root_ids=root,
            ns_per_id=True,
            lsmtype=0,
            network_lock_method=0,
            dump_criu_run_id=self._run_id,
        )
        self._output.publish(entry)
        for armed in self._armed:
            armed.complete(self._run_id)
        methods = {armed.record.method for armed in self._armed}
        self.report.tracked = ", ".join(sorted(methods))

    def ignore_interrupts(self) -> None:
        """From here to the end SIGINT and SIGTERM are for who serves, alone.

        Right after that they would let a tree go on that runs elsewhere, stop half-way letting it go on here, or end us
        before we have said what became of it.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            self._resources.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))

    @contextmanager
    def worthless_on_error(self) -> Iterator[None]:
        """A directory that lacks pages which nobody serves any more is no dump."""
        try:
            yield
        except BaseException:
            self._output.withdraw()
            raise

    def write_stats(self) -> None:
        """stats-dump, when all times are known: the dump is complete without it, and its tree perhaps ended."""
        try:
            images.write(
                self.settings.images / Kind.STATS.file_name("dump"), Kind.STATS, [self.report.entry()]
            )
        except ImageError as error:
            log.warning("%s (the dump is complete without it)", error)


def _object_ids(number: int) -> TaskKobjIdsEntry:
    return TaskKobjIdsEntry(vm_id=number, files_id=number, fs_id=number, sighand_id=number, **NAMESPACE_IDS)


def _set_up_directory(settings: Settings, output: Output) -> None:
    directory, link = settings.images, settings.images / PARENT_LINK
    try:
        if not directory.is_dir():
            directory.mkdir()
            Output(directory.parent, durable=settings.sync).sync_directory()
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
            stale.append(Kind.PAGEMAP.file_name("*"))  # what is here counts more than what was sent
        for path in [path for pattern in stale for path in directory.glob(pattern)]:
            path.unlink(missing_ok=True)
        output.sync_directory()  # an old inventory must not come back beside new images
    except OSError as error:
        raise DumpError(f"{directory}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class _Captured:
    """What the images of one process are made from."""

    task: Task
    captured: core.Captured
    described: list[Mapping]
    guards: list[Span]
    ids: TaskKobjIdsEntry


def _write_task(what: _Captured, output: Output, table: FileTable) -> None:
    task, captured, ids = what.task, what.captured, what.ids
    pid = task.pid
    fs = FsEntry(
        cwd_id=table.add_link(pid, "cwd"),
        root_id=table.add_link(pid, "root"),
        umask=int(task.status["Umask"], 8),
    )
    mm = mappings.mm_entry(task, captured.inside, what.described, what.guards, table.add_link(pid, "exe"))
    for tid, entry in captured.cores.items():
        output.write(Kind.CORE.file_name(tid), Kind.CORE, [entry])
    output.write(Kind.IDS.file_name(pid), Kind.IDS, [ids])
    output.write(Kind.FS.file_name(pid), Kind.FS, [fs])
    output.write(Kind.MM.file_name(pid), Kind.MM, [mm])
    output.write(Kind.FDINFO.file_name(ids.files_id), Kind.FDINFO, table.add_descriptors(task))


def _write_tables(output: Output, tree: FrozenTree, table: FileTable) -> None:
    tree_entries = []
    for process in tree.processes:
        stat = proc.stat(process.pid)
        if process.zombie:
            output.write(Kind.CORE.file_name(process.pid), Kind.CORE, [core.zombie(process.pid)])
        tree_entries.append(
            PstreeEntry(
                pid=process.pid,
                ppid=process.ppid,
                pgid=stat.pgrp,
                sid=stat.session,
                threads=process.threads,
            )
        )
    output.write(Kind.PSTREE.file_name(), Kind.PSTREE, tree_entries)
    output.write(Kind.FILES.file_name(), Kind.FILES, table.entries)
    output.write(Kind.SECCOMP.file_name(), Kind.SECCOMP, [SeccompEntry()])
    if table.pipes:
        output.write_with_data(Kind.PIPES_DATA.file_name(), Kind.PIPES_DATA, table.pipes)
    if table.locks:
        output.write(Kind.FILE_LOCKS.file_name(), Kind.FILE_LOCKS, table.locks)
    if table.terminals:
        output.write(Kind.TTY_INFO.file_name(), Kind.TTY_INFO, table.terminals)
