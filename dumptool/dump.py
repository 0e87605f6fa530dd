"""Make a dump or a pre-dump of a tree of processes: who does what, in which order.

Refusals come before anything is stopped. While the tree is stopped nothing is changed in it that does not come
back by itself, so that it goes on after every failure, and when this process is killed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dumptool import core, mappings, memory, proc, survey, tracking
from dumptool.chain import PARENT_LINK, Chain, ParentPages
from dumptool.errors import DumpError
from dumptool.files import FileTable
from dumptool.freeze import FrozenTree, Process, freeze, members
from dumptool.mappings import Mapping
from dumptool.memory import Counts, Marks, Part, Source, Target
from dumptool.survey import Task
from dumptool.tracee import Gadgets, registers, xstate_components
from dumptool.tracking import Armed, Method
from images_spec import images
from images_spec.flags import PE_PRESENT
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


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says.

    ``parent``: directory of the parent level relative to ``images``, or None. ``timeout``: seconds for the
    tree to stop.
    """

    pid: int
    images: Path
    parent: str | None = None
    method: Method = Method.AUTO
    lazy_parents: bool = True
    lazy_pages: bool = False
    leave_running: bool = False
    allow: survey.Options = field(default_factory=survey.Options)
    timeout: float = 10


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


@dataclass(slots=True)
class _Job:
    """One process: what is known of it and what is to be written."""

    task: Task
    gadgets: Gadgets
    mappings: list[Mapping]
    marks: Marks
    parts: list[Part]
    compare: ParentPages | None
    pages_id: int

    def source(self, *, running: bool) -> Source:
        return Source(self.task.pid, running=running, compare=self.compare)

    def target(self, directory: Path) -> Target:
        return Target(directory, Kind.PAGEMAP.file_name(self.task.pid), self.pages_id)


@dataclass(slots=True)
class _Look:
    """The survey made while the tree was running."""

    processes: list[Process]
    tasks: dict[int, Task]
    gadgets: dict[int, Gadgets]
    chain: Chain | None
    parents: dict[int, ParentPages | None]


def _prepare(settings: Settings) -> _Look:
    """All that can be found out and refused before anything is stopped."""
    survey.check_permission(settings.pid)
    processes = members(settings.pid)
    tasks = survey.look_at_all(processes)
    survey.check(processes, tasks, settings.allow)
    gadgets = {pid: Gadgets(pid, task.layout.vmas) for pid, task in tasks.items()}
    chain, parents = None, {}
    if settings.parent is not None:
        chain = Chain(settings.images / settings.parent)
        parents = {pid: chain.pages_of(pid) for pid in tasks}
    _set_up_directory(settings)
    return _Look(processes, tasks, gadgets, chain, parents)


def _set_up_directory(settings: Settings) -> None:
    directory, link = settings.images, settings.images / PARENT_LINK
    try:
        directory.mkdir(exist_ok=True)
        if link.is_symlink():
            link.unlink()
        if settings.parent is not None:
            if (directory / settings.parent).samefile(directory):
                raise DumpError(f"{directory}: is its own --prev-images-dir")
            link.symlink_to(settings.parent)
        (directory / Kind.INVENTORY.file_name()).unlink(missing_ok=True)
    except OSError as error:
        raise DumpError(f"{directory}: {error.strerror}") from None


@contextmanager
def _frozen(settings: Settings, look: _Look, report: Report) -> Iterator[tuple[FrozenTree, list[Task]]]:
    """The tree, stopped, and looked at once more."""
    with ExitStack() as locks:
        for task in look.tasks.values():
            fd = tracking.lock(task)
            if fd is not None:
                locks.callback(os.close, fd)
        with freeze(settings.pid, settings.timeout) as tree:
            tasks = survey.look_at_all(tree.processes, look.tasks)
            survey.check(tree.processes, tasks, settings.allow)
            for pid, task in tasks.items():
                if pid not in look.gadgets:
                    look.gadgets[pid] = Gadgets(pid, task.layout.vmas)
            report.processes = len(tree.processes)
            report.threads = sum(len(process.threads) for process in tree.alive)
            report.freezing = tree.freezing_time
            yield tree, list(tasks.values())


def _marks(settings: Settings, look: _Look, task: Task) -> tuple[Marks, ParentPages | None]:
    """How pages of a process are to be labelled, and what they have to be compared with, if anything."""
    marks = Marks(lazy_dump=settings.lazy_pages, lazy_parents=settings.lazy_parents)
    parent = look.parents.get(task.pid)
    if look.chain is None or parent is None:
        return marks, None
    known = None if settings.method is Method.COMPARE else tracking.vouched(task, look.chain.run_id)
    if known is not None:
        return replace(marks, with_=known[0], without=known[1]), None
    wanted = settings.method in (Method.AUTO, Method.COMPARE)
    return marks, parent if wanted and not settings.lazy_pages else None


def _job(
    settings: Settings, look: _Look, task: Task, described: list[Mapping], armed: Armed | None, pages_id: int
) -> _Job:
    """Finds the pages of a frozen process, and arms its tracker if there is one."""
    marks, compare = _marks(settings, look, task)
    protect = armed is not None and armed.can_protect
    pointers = [registers(tid).rsp for tid in task.process.threads]
    pagemap = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if armed is not None:
            armed.watch(described)
        parts = memory.scan(pagemap, described, marks, protect=protect, stack_pointers=pointers)
        if armed is not None:
            armed.clear()
    finally:
        os.close(pagemap)
    if marks.known:
        parts = memory.only_in_parent(parts, look.parents.get(task.pid), marks)
    return _Job(task, look.gadgets[task.pid], described, marks, parts, compare, pages_id)


def _shared_memory(tasks: list[Task]) -> Iterator[tuple[int, Source, Part]]:
    """Each piece of shared anonymous memory once: its id, and its pages; close the source's fd."""
    seen = set()
    for task in tasks:
        for vma in task.layout.vmas:
            if survey.is_shared_anonymous(vma) and vma.inode not in seen:
                seen.add(vma.inode)
                fd = os.open(f"/proc/{task.pid}/{vma.link}", os.O_RDONLY | os.O_CLOEXEC)
                yield vma.inode, Source(task.pid, fd=fd), memory.shared_part(fd, os.fstat(fd).st_size)


def _write_inventory(directory: Path, run_id: str) -> None:
    """Last of all: without it the directory is no dump."""
    root = TaskKobjIdsEntry(
        vm_id=ROOT_OBJECT, files_id=ROOT_OBJECT, fs_id=ROOT_OBJECT, sighand_id=ROOT_OBJECT, **NAMESPACE_IDS
    )
    entry = InventoryEntry(
        img_version=IMAGE_VERSION,
        fdinfo_per_id=True,
        root_ids=root,
        ns_per_id=True,
        lsmtype=0,
        network_lock_method=0,
        dump_criu_run_id=run_id,
    )
    images.write(directory / Kind.INVENTORY.file_name(), Kind.INVENTORY, [entry])


def _write_stats(directory: Path, report: Report) -> None:
    images.write(directory / Kind.STATS.file_name("dump"), Kind.STATS, [report.entry()])


def pre_dump(settings: Settings, watcher: Watcher) -> Report:
    """One level of pages while the tree runs, and tracking of what is written from then on.

    The tree stands still only while it is looked at and its memory is write-protected. Raises ``DumpError``
    (``UnsupportedError``) or ``ImageError``.
    """
    report, run_id = Report(), str(uuid.uuid4())
    watcher.stage("looking")
    look = _prepare(settings)
    watcher.stage("freezing")
    with ExitStack() as trackers:
        jobs: list[_Job] = []
        armed: list[Armed] = []
        with _frozen(settings, look, report) as (tree, tasks):
            begin = time.monotonic()
            for number, task in enumerate(tasks, start=1):
                tracker = tracking.arm(task, look.gadgets[task.pid], settings.method)
                if tracker is not None:
                    armed.append(tracker)
                    trackers.callback(tracker.close)
                described = mappings.describe(task, lambda _: (0, 0))
                jobs.append(_job(settings, look, task, described, tracker, number))
            report.scanning = time.monotonic() - begin
            report.frozen = tree.thaw()
        report.tracked = _tracked(armed)
        watcher.stage("copying")
        _copy(settings, jobs, report, watcher, running=True)
        _write_inventory(settings.images, run_id)
        for tracker in armed:
            tracker.complete(run_id)
    _write_stats(settings.images, report)
    return report


def _tracked(armed: list[Armed]) -> str:
    return ", ".join(sorted({"uffd-wp" if one.can_protect else "soft-dirty" for one in armed})) or "nothing"


def _copy(settings: Settings, jobs: list[_Job], report: Report, watcher: Watcher, *, running: bool) -> None:
    begin = time.monotonic()
    watcher.total(sum(part.runs.pages(PE_PRESENT) for job in jobs for part in job.parts))
    for job in jobs:
        report.counts.add(
            memory.write(
                job.target(settings.images),
                job.source(running=running),
                job.parts,
                job.marks,
                watcher.copied,
            )
        )
    report.writing += time.monotonic() - begin


def dump(settings: Settings, watcher: Watcher, serve: Serve | None = None) -> Report:
    """All images of the tree; then it is ended, or goes on (``leave_running``).

    ``serve`` is called, when all images are complete and the tree still stands, if ``lazy_pages`` is set; without
    it such a tree goes on, because its images lack pages. Raises as ``pre_dump``.
    """
    report = Report()
    watcher.stage("looking")
    look = _prepare(settings)
    keep = settings.leave_running or (settings.lazy_pages and serve is None)
    watcher.stage("freezing")
    released: list[int] = []
    try:
        with _frozen(settings, look, report) as (tree, tasks):
            _write_all(settings, look, tree, tasks, report, watcher)
            if settings.lazy_pages and serve is not None:
                watcher.stage("serving")
                serve(tree, settings)
            if keep:
                for task in tasks:
                    released += tracking.remove(task, look.gadgets[task.pid])
                report.frozen = tree.thaw()
            else:
                report.frozen = time.monotonic() - tree.frozen_since
                tree.kill()
    finally:
        for fd in released:
            os.close(fd)
    _write_stats(settings.images, report)
    return report


def _write_all(
    settings: Settings,
    look: _Look,
    tree: FrozenTree,
    tasks: list[Task],
    report: Report,
    watcher: Watcher,
) -> None:
    directory, components = settings.images, xstate_components()
    table, jobs = FileTable(), []
    begin = time.monotonic()
    for number, task in enumerate(tasks, start=1):
        shared_id = ROOT_OBJECT + number
        ids = TaskKobjIdsEntry(
            vm_id=shared_id, files_id=shared_id, fs_id=shared_id, sighand_id=shared_id, **NAMESPACE_IDS
        )
        captured = core.capture(task, look.gadgets[task.pid], components, ids)
        described = mappings.describe(task, lambda vma, task=task: table.add_mapped(task, vma))
        jobs.append(_job(settings, look, task, described, None, number))
        _write_task(directory, task, captured, described, ids, table)
    for process in tree.processes:
        if process.zombie:
            images.write(directory / Kind.CORE.file_name(process.pid), Kind.CORE, [core.zombie(process.pid)])
    _write_tables(directory, tree, table)
    report.scanning = time.monotonic() - begin

    watcher.stage("copying")
    _copy(settings, jobs, report, watcher, running=False)
    for number, (shmid, source, part) in enumerate(_shared_memory(tasks), start=len(jobs) + 1):
        try:
            target = Target(directory, Kind.PAGEMAP.file_name(f"shmem-{shmid}"), number)
            report.shared.add(memory.write(target, source, [part], Marks(), watcher.copied))
        finally:
            if source.fd is not None:
                os.close(source.fd)
    _write_inventory(directory, str(uuid.uuid4()))


def _write_task(
    directory: Path,
    task: Task,
    captured: core.Captured,
    described: list[Mapping],
    ids: TaskKobjIdsEntry,
    table: FileTable,
) -> None:
    pid = task.pid
    fs = FsEntry(
        cwd_id=table.add_link(pid, "cwd"),
        root_id=table.add_link(pid, "root"),
        umask=int(task.status["Umask"], 8),
    )
    mm = mappings.mm_entry(task, captured.inside, described, table.add_link(pid, "exe"))
    for tid, entry in captured.cores.items():
        images.write(directory / Kind.CORE.file_name(tid), Kind.CORE, [entry])
    images.write(directory / Kind.IDS.file_name(pid), Kind.IDS, [ids])
    images.write(directory / Kind.FS.file_name(pid), Kind.FS, [fs])
    images.write(directory / Kind.MM.file_name(pid), Kind.MM, [mm])
    images.write(directory / Kind.FDINFO.file_name(ids.files_id), Kind.FDINFO, table.add_descriptors(task))


def _write_tables(directory: Path, tree: FrozenTree, table: FileTable) -> None:
    tree_entries = []
    for process in tree.processes:
        stat = proc.stat(process.pid)
        tree_entries.append(
            PstreeEntry(
                pid=process.pid,
                ppid=process.ppid,
                pgid=stat.pgrp,
                sid=stat.session,
                threads=process.threads,
            )
        )
    images.write(directory / Kind.PSTREE.file_name(), Kind.PSTREE, tree_entries)
    images.write(directory / Kind.FILES.file_name(), Kind.FILES, table.entries)
    images.write(directory / Kind.SECCOMP.file_name(), Kind.SECCOMP, [SeccompEntry()])
    if table.pipes:
        images.write_with_data(directory / Kind.PIPES_DATA.file_name(), Kind.PIPES_DATA, table.pipes)
    if table.terminals:
        images.write(directory / Kind.TTY_INFO.file_name(), Kind.TTY_INFO, table.terminals)
