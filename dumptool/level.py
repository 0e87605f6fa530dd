"""The pages of one level: which pages of each process it gets, and the copy to the disk or to a page server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from dumptool import identity, mappings, memory, proc, tracking
from dumptool.chain import Chain, ParentPages
from dumptool.errors import TaskGoneError
from dumptool.holders import Holder
from dumptool.mappings import FileIds, Mapping
from dumptool.memory import Counts, Marks, Part, Progress, Runs, Sink, Source, Target
from dumptool.output import Keep
from dumptool.send import Sender, SentTarget
from dumptool.settings import Settings
from dumptool.shared import Memory, Piece
from dumptool.survey import Task
from dumptool.tracee import Gadgets, registers
from dumptool.tracking import Armed, Held, Method, Vouched
from images_spec.flags import PE_PRESENT
from images_spec.images import Kind
from lazypages.net.wire import ImageType


@dataclass(frozen=True, slots=True)
class PageJob:
    """The pages of one process that will be copied."""

    source: Source
    target: Sink
    parts: list[Part]
    marks: Marks

    @property
    def pages(self) -> int:
        """Number of pages with data."""
        return sum(part.runs.pages(PE_PRESENT) for part in self.parts)


class HasPages(Protocol):
    """A process whose pages are copied; see ``FrozenTask``."""

    @property
    def parent(self) -> ParentPages | None: ...

    @property
    def pidfd(self) -> int | None: ...

    @property
    def held(self) -> Held | None: ...

    @property
    def job(self) -> PageJob | None: ...


@dataclass(slots=True)
class FrozenTask:
    """A process of the frozen tree.

    ``parent``: its pages in the parent levels; None: all of its pages are written. ``pidfd``: identifies the process
    also after the thaw; None if it was killed during the freeze. ``held``: the tracker of its writes. ``armed``: the
    same, while it is used for this level, and ``job``: its pages, both set by ``Level.find_pages``.
    """

    task: Task
    gadgets: Gadgets
    parent: ParentPages | None
    pidfd: int | None
    held: Held | None = None
    armed: Armed | None = None
    job: PageJob | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """How changed pages of a process are found.

    ``vouched``: by its tracker. ``compare``: by comparison with these pages. Neither: all pages count as changed.
    """

    marks: Marks
    compare: ParentPages | None = None
    vouched: Vouched | None = None


class Level:
    """The level that is being made. ``resources`` closes what it opens."""

    def __init__(self, settings: Settings, keep: Keep | None, resources: ExitStack) -> None:
        self._settings, self._keep, self._resources = settings, keep, resources
        self._chain: Chain | None = None
        self._sender: Sender | None = None
        self._shared_parents: dict[int, ParentPages] = {}

    def open(self, image_pids: dict[int, int]) -> dict[int, ParentPages | None]:
        """Opens the parent levels and connects to the page server. Returns the parent's pages of each process.

        ``image_pids``: pid -> ``Task.image_pid``. The pages are None for a process that the parent does not have, here
        or at the page server. Raises ``DumpError``, ``ImageError``.
        """
        settings = self._settings
        parents: dict[int, ParentPages | None] = dict.fromkeys(image_pids)
        if settings.parent is not None:
            self._chain = Chain(settings.images / settings.parent)
            parents = {pid: self._chain.pages_of(image_pid) for pid, image_pid in image_pids.items()}
        if settings.page_server is not None:
            self._sender = self._resources.enter_context(Sender(settings.page_server))
            for pid, pages in parents.items():
                if pages is not None and not self._sender.has_parent(image_pids[pid]):
                    parents[pid] = None
        return parents

    def find_pages(
        self, frozen: FrozenTask, file_id: FileIds, pages_id: int, *, holder: Holder | None
    ) -> list[Mapping]:
        """Finds the pages of a frozen process that will be copied (``frozen.job``). Returns its mappings.

        ``holder``: track writes from now on; a new tracker goes there. Raises ``DumpError``.
        """
        task = frozen.task
        pid = task.pid
        changes = self.changes(frozen)  # before the tracker is armed, or replaced by one that knows nothing
        armed = None if holder is None else self._arm(frozen, holder)
        marks = changes.marks
        described = mappings.describe(proc.layout(pid, task.layout), file_id)
        pointers = [registers(tid).rsp for tid in task.process.threads]
        parts = scan(pid, described, changes, armed, stack_pointers=pointers)
        if marks.known:
            parts = memory.only_in_parent(parts, frozen.parent, marks)
        target = self._target(ImageType.TASK, task.image_pid, pages_id, parents=frozen.parent is not None)
        frozen.job = PageJob(Source(pid, compare=changes.compare), target, parts, marks)
        return described

    def _arm(self, frozen: FrozenTask, holder: Holder) -> Armed | None:
        """Arms the tracker of a process, a new one if needed. None if there is no means of tracking."""
        held = self.tracker(frozen, holder)
        if held is not None:
            frozen.armed = tracking.arm(frozen.task, held)
        return frozen.armed

    def tracker(self, frozen: FrozenTask, holder: Holder) -> Held | None:
        """The tracker of a frozen process (``frozen.held``), a new one if it needs one. None: no means of tracking."""
        task, method = frozen.task, self._settings.method
        if method is Method.COMPARE:
            return None
        if frozen.held is None or not tracking.fits(frozen.held, method):
            self._end_tracking(frozen)
            if frozen.pidfd is None:
                return None  # killed
            frozen.held = tracking.make(task, frozen.pidfd, frozen.gadgets, method, holder)
            if frozen.held is not None:
                self._resources.callback(frozen.held.close)
        return frozen.held

    def arm_again(self, task: Task, held: Held | None) -> Armed | None:
        """Arms a tracker that there is, of a process in which no call can be made. None if it does not fit."""
        if held is None or not tracking.fits(held, self._settings.method):
            return None
        return tracking.arm(task, held)

    def _end_tracking(self, frozen: FrozenTask) -> None:
        """Its memory can be registered with another userfaultfd afterwards."""
        for fd in tracking.close_in(frozen.task, frozen.gadgets, frozen.task.leftovers):
            os.close(fd)
        if frozen.held is not None:
            frozen.held.drop()
            frozen.held.close()
            frozen.held.holder.sync()
            frozen.held = None

    def changes(self, frozen: HasPages) -> Changes:
        """How its pages that have changed since the parent level are found. The process is stopped."""
        settings = self._settings
        marks = Marks(lazy_dump=settings.lazy_pages, lazy_parents=settings.lazy_parents)
        if self._chain is None or frozen.parent is None:
            return Changes(marks)
        if frozen.held is not None and tracking.fits(frozen.held, settings.method):
            vouched = tracking.vouched(frozen.held, self._chain.run_id)
            if vouched is not None:
                marks = replace(marks, with_=vouched.with_, without=vouched.without)
                return Changes(marks, vouched=vouched)
        compare = settings.method in (Method.AUTO, Method.COMPARE) and not settings.lazy_pages
        return Changes(marks, compare=frozen.parent if compare else None)

    def task_target(self, image_pid: int, pages_id: int, *, parents: bool) -> Sink:
        """The place for the pages of a process. ``parents``: they refer to those of its parent."""
        return self._target(ImageType.TASK, image_pid, pages_id, parents=parents)

    def _target(
        self, kind: ImageType, number: int, pages_id: int, *, parents: bool = False, local: bool = False
    ) -> Sink:
        directory = self._settings.images
        if self._sender is not None and not local:
            return SentTarget(self._sender, directory, kind, number, parents, self._keep)
        name = Kind.PAGEMAP.file_name(number if kind is ImageType.TASK else f"shmem-{number}")
        return Target(directory, name, pages_id, self._keep)

    def copy(self, frozen: HasPages, progress: Progress, *, running: bool) -> Counts:
        """Copies the pages that ``find_pages`` found. ``running``: the tree runs again.

        A running process that ends meanwhile gets no image, unless it is the root. Raises ``DumpError``,
        ``ImageError``.
        """
        job = frozen.job
        if job is None:
            return Counts()
        source = replace(job.source, running=running)
        try:
            counts = memory.write(job.target, source, job.parts, job.marks, progress)
            # Without this check the bytes could be those of another process that reuses the pid.
            identity.check(source.pid, frozen.pidfd)
        except TaskGoneError:
            if not running or source.pid == self._settings.pid:
                raise
            job.target.remove()
            return Counts()
        return counts

    def look_at_shared(self, pieces: Iterable[Piece]) -> None:
        """Finds shared memory in the parent levels, which takes time. Memory that is not looked at has no parent.

        Raises ``ImageError``.
        """
        if self._chain is not None and self._sender is None:
            for piece in pieces:
                pages = self._chain.pages_of(f"shmem-{piece.number}")
                if pages is not None:
                    pages.read_ahead()
                    self._shared_parents[piece.number] = pages

    def find_shared(
        self, piece: Piece, pages_id: int, *, given: Runs | None = None, mapped: bool = False
    ) -> PageJob:
        """The pages of shared memory that will be copied.

        ``given``: its pages as CRIU has found them, which go to files here; else all that it has, which can also be
        sent. ``mapped``: but none behind the end of what is mapped. CRIU's restore makes anonymous memory of that
        size, and ends silently at a run of pages that reaches further (do_restore_shmem_content(), 4.1 to 4.2).

        Raises ``TaskGoneError`` if it is not there any more, ``DumpError``, ``ImageError``.
        """
        shared = Memory(piece)
        try:
            if given is None:
                part = memory.shared_part(
                    shared.fd, min(shared.size, piece.mapped) if mapped else shared.size
                )
            elif given.count and given.array[given.count - 1].end > shared.size:
                raise TaskGoneError(f"shared memory {piece.number} has become smaller")
            else:
                part = Part(given, readable=True, drop_zero=True)
        finally:
            shared.close()
        parent = self._shared_parents.get(piece.number)
        if parent is not None:
            part = replace(part, runs=shared.compared(part.runs, parent))
        source = Source(os.getpid(), shared.address, f"shared memory {piece.number}", memory=shared)
        target = self._target(ImageType.SHMEM, piece.number, pages_id, local=given is not None)
        return PageJob(source, target, [part], Marks())

    def copy_shared(self, job: PageJob, progress: Progress, *, running: bool) -> Counts:
        """Copies the pages that ``find_shared`` found. Raises ``DumpError``, ``ImageError``."""
        return memory.write(job.target, replace(job.source, running=running), job.parts, job.marks, progress)

    def close(self) -> None:
        """Returns when the page server, if there is one, has everything. Raises ``DumpError``."""
        if self._sender is not None:
            self._sender.close()


def scan(
    pid: int,
    described: Sequence[Mapping],
    changes: Changes,
    armed: Armed | None,
    *,
    stack_pointers: Sequence[int] = (),
) -> list[Part]:
    """The pages of a stopped process, marked; writes are tracked from here on if its tracker is ``armed``."""
    fresh = changes.vouched.fresh(described) if changes.vouched is not None else frozenset()
    if armed is not None:
        armed.watch(described)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        protect = armed is not None and armed.can_protect
        parts = memory.scan(
            pagemap, described, changes.marks, protect=protect, stack_pointers=stack_pointers, fresh=fresh
        )
    finally:
        os.close(pagemap)
    if armed is not None:
        armed.clear()
    return parts
