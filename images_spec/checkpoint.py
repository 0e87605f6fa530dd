"""An image directory as a whole: its tasks, its chain of parents, and the place of each task's pages.

Everything is validated before it is returned, so that no part of an invalid checkpoint is served.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from images_spec import images, seen
from images_spec.core_pb2 import TaskState
from images_spec.errors import ImageError, ImageMissingError
from images_spec.flags import MADV_WIPEONFORK, VMA_KNOWN
from images_spec.images import Kind
from images_spec.pagemap import Pagemap, pages_name
from images_spec.placement import ExtentTable, Span, guard_regions, lazy_vmas, mappings, resolve
from images_spec.unknown import NEWER, has_unknown_fields, refuse_unknown_fields

if TYPE_CHECKING:
    from images_spec.messages import InventoryEntry, MmEntry, PstreeEntry

PARENT_LINK = "parent"


class Task(NamedTuple):
    """A task of the tree. ``ppid``: 0 for the root.

    ``threads``: thread ids, including the leader's. For a zombie they are meaningless: CRIU 4.1.1 and 4.2.1
    write uninitialised memory (observed).
    """

    pid: int
    ppid: int
    threads: tuple[int, ...]


class TaskLevel(NamedTuple):
    """A task's pages file in one level of the chain, and its size in bytes. None and 0 if the level has no data."""

    directory: Path
    pages: Path | None
    pages_size: int


class TaskImages(NamedTuple):
    """A task's memory. ``Extent.source`` is an index into ``levels``.

    ``vmas``: the mappings that the restorer registers with userfaultfd. ``wiped``: those of them that are
    zero in a forked child (MADV_WIPEONFORK). ``guards``: pages that raise SIGSEGV, in these or other mappings;
    ``extents`` does not contain them. A zombie has no memory: everything is empty.

    ``seen``: memory that other processes read without the task's help: arguments, environment and auxiliary vector
    (/proc/<pid>/cmdline and so on), and the top of the leader's stack. ``comm``: the name of its program,
    up to 15 bytes.
    """

    pid: int
    is_dead: bool
    extents: ExtentTable
    vmas: list[Span]
    wiped: list[Span]
    guards: list[Span]
    levels: list[TaskLevel]
    seen: Sequence[Span] = ()
    comm: bytes = b""


class Checkpoint:
    """An image directory, opened by ``open_checkpoint``."""

    def __init__(self, directory: Path, inventory: InventoryEntry, tasks: tuple[Task, ...]) -> None:
        self.directory = directory
        self.inventory = inventory
        self.tasks = tasks

    @cached_property
    def chain(self) -> tuple[Path, ...]:
        """The directories of the chain, this one first. Raises ``ImageError`` if it is broken or circular."""
        chain = parent_chain(self.directory)
        for directory in chain[1:]:
            check_inventory(directory)
        return chain

    @cached_property
    def _pids(self) -> frozenset[int]:
        return frozenset(task.pid for task in self.tasks)

    def load_task(self, pid: int, remote: bool) -> TaskImages:
        """The memory of a task, validated. ``remote``: as for ``placement.resolve``.

        Raises ``ImageError``. Lost pages are not an error here: see ``extents.counts().lost``.
        """
        if pid not in self._pids:
            raise ImageError(self.directory / Kind.PSTREE.file_name(), f"has no task {pid}")
        core = images.read_one(self.directory / Kind.CORE.file_name(pid), Kind.CORE)
        if core.tc.task_state == TaskState.TASK_DEAD:
            return TaskImages(pid, True, resolve([None], remote=remote), [], [], [], [], comm=core.tc.comm)
        mm_path = self.directory / Kind.MM.file_name(pid)
        mm = images.read_one(mm_path, Kind.MM)
        _check_mappings(mm, mm_path)
        vmas = lazy_vmas(mm, mm_path)
        guards = guard_regions(mm, mm_path)
        advised = {Span(vma.start, vma.end) for vma in mappings(mm) if vma.madv >> MADV_WIPEONFORK & 1}
        levels, pagemaps = self._load_levels(pid)
        extents = resolve(pagemaps, remote=remote).without(guards)
        extents.check_covered(vmas, pagemaps[0].path)
        wiped = [vma for vma in vmas if vma in advised]
        return TaskImages(
            pid, False, extents, vmas, wiped, guards, levels, seen.of_task(mm, core), core.tc.comm
        )

    def thread_stacks(self, pid: int) -> Iterator[Span]:
        """The tops of the stacks of a task's threads, except the leader's. Raises ``ImageError``."""
        (task,) = (task for task in self.tasks if task.pid == pid)
        for tid in task.threads:
            if tid != pid:
                yield from seen.of_thread(
                    images.read_one(self.directory / Kind.CORE.file_name(tid), Kind.CORE)
                )

    def _load_levels(self, pid: int) -> tuple[list[TaskLevel], list[Pagemap]]:
        """The pagemaps of a task. The first level without one ends its chain, as for CRIU."""
        levels: list[TaskLevel] = []
        pagemaps: list[Pagemap] = []
        for directory in self.chain:
            try:
                pagemap = Pagemap.load(directory / Kind.PAGEMAP.file_name(pid))
            except ImageMissingError:
                if not pagemaps:
                    raise
                break
            levels.append(_find_pages(pagemap, directory))
            pagemaps.append(pagemap)
        return levels, pagemaps


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Reads inventory and tree of an image directory. Raises ``ImageError``.

    All resulting paths are absolute, so they remain valid if the working directory changes.
    """
    directory = Path(os.path.abspath(directory))
    inventory = _inventory(directory)
    path = directory / Kind.PSTREE.file_name()
    return Checkpoint(directory, inventory, _tasks(images.read(path, Kind.PSTREE), path))


def check_inventory(directory: Path) -> None:
    """Raises ``ImageError`` for an inventory that ``open_checkpoint`` rejects. It may be missing (page servers)."""
    with suppress(ImageMissingError):
        _inventory(directory)


def _inventory(directory: Path) -> InventoryEntry:
    path = directory / Kind.INVENTORY.file_name()
    inventory = images.read_one(path, Kind.INVENTORY)
    if inventory.img_version not in (1, 2):
        raise ImageError(path, f"image version {inventory.img_version} is not supported, only 1 and 2")
    refuse_unknown_fields([inventory], path)
    return inventory


def parent_chain(directory: Path) -> tuple[Path, ...]:
    """``directory`` and, through the ``parent`` links, all directories below it. Raises ``ImageError``."""
    chain = [directory]
    seen = {_identity(directory)}
    while os.path.lexists(link := chain[-1] / PARENT_LINK):
        identity = _identity(link)
        if identity in seen:
            raise ImageError(link, "leads back to a directory of the same chain")
        seen.add(identity)
        chain.append(Path(os.path.realpath(link)))
    return tuple(chain)


def _identity(directory: Path) -> tuple[int, int]:
    try:
        status = directory.stat()
    except OSError as error:
        where = f" (it points to {os.readlink(directory)})" if directory.is_symlink() else ""
        raise ImageError(directory, f"can't be followed: {error.strerror}{where}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise ImageError(directory, "not a directory")
    return status.st_dev, status.st_ino


def _tasks(entries: list[PstreeEntry], path: Path) -> tuple[Task, ...]:
    """Checks the tree: root first, parents before their children. CRIU's restore requires the same."""
    tasks: dict[int, Task] = {}
    for entry in entries:
        if not 0 < entry.pid < 1 << 31:
            raise ImageError(path, f"{entry.pid} is not a pid")
        if entry.pid in tasks:
            raise ImageError(path, f"holds task {entry.pid} twice")
        if tasks and not entry.ppid:
            raise ImageError(path, f"task {entry.pid} is a second root")
        if entry.ppid and entry.ppid not in tasks:
            raise ImageError(path, f"task {entry.pid} comes before its parent {entry.ppid}, or has none")
        tasks[entry.pid] = Task(entry.pid, entry.ppid, tuple(entry.threads))
    if not tasks:
        raise ImageError(path, "holds no task")
    return tuple(tasks.values())


def _check_mappings(mm: MmEntry, path: Path) -> None:
    """Rejects unknown kinds of mappings: the kind decides about lazy pages, and whether absent pages are zero."""
    for vma in mm.vmas:
        if unknown := vma.status & ~VMA_KNOWN:
            raise ImageError(path, f"mapping {vma.start:#x}-{vma.end:#x} has status {unknown:#x}, {NEWER}")
    if has_unknown_fields(mm):
        refuse_unknown_fields(mm.vmas, path)


def _find_pages(pagemap: Pagemap, directory: Path) -> TaskLevel:
    path = directory / pages_name(pagemap.pages_id)
    try:
        status = path.stat()
    except FileNotFoundError:
        if pagemap.present_pages:
            promised = pagemap.present_pages
            promise = f"{pagemap.path.name} promises {promised} page{'' if promised == 1 else 's'}"
            raise ImageMissingError(path, f"no such image, but {promise}") from None
        return TaskLevel(directory, None, 0)
    except OSError as error:
        raise ImageError(path, f"can't be opened: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "not a regular file")
    pagemap.check_pages_size(status.st_size, path)
    return TaskLevel(directory, path, status.st_size)
