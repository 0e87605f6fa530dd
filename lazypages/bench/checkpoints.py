"""Checkpoints of any size, written without a dump: images with the memory of the bench's task.

They have what daemons read (docs/criu.md, "Control socket"): inventory, tree, and for each task core, mm, pagemap and
pages. `criu restore` needs more.
"""

from __future__ import annotations

import array
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from images_spec import flags, images, pagemap
from images_spec.images import Kind
from images_spec.messages import (
    CoreEntry,
    InventoryEntry,
    Machine,
    MmEntry,
    PstreeEntry,
    TaskCoreEntry,
    TaskKobjIdsEntry,
    TaskState,
    VmaEntry,
)
from lazypages.bench.programs import Programs
from lazypages.bench.workloads import Layout, Order, Source, Workload, level_of, runs_of_level

#: Where the bench's task maps its memory.
BASE = 0x1000_0000_0000
#: The pid of the first task (task.c).
FIRST_PID = 2

#: Tags of stale pages: those of the tasks, plus this number for each level.
STALE = 1 << 20
_LAZY_DATA = flags.PE_PRESENT | flags.PE_LAZY


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint. ``images``: the daemon's images. ``served``: the page server's images, for a remote source.

    ``flat``: pages files for the bare loop, with %d for the number of the task. ``order``: file with the touches.
    """

    layout: Layout
    images: Path
    served: Path
    flat: str
    order: Path

    def files(self) -> list[Path]:
        """All files with pages."""
        folder = self.images.parent
        return [path for path in folder.glob("*/pages-*.img") if path.is_file()]


def write(workload: Workload, folder: Path, programs: Programs) -> Checkpoint:
    """Write the checkpoint of a workload into the new directory `folder`. Raises ImageError, BenchError."""
    layout = workload.layout
    folder.mkdir(parents=True)
    order = workload.order_of_touches()
    order_file = folder / "order"
    order_file.write_bytes(order.tobytes())
    chase = order_file if workload.order is Order.CHASE else None
    levels = [folder / f"level-{level}" for level in range(layout.depth + 1)]
    for level, directory in enumerate(levels):
        directory.mkdir()
        _write_tree(directory, layout)
        if level:
            (levels[level - 1] / "parent").symlink_to(f"../{directory.name}")
        for task in range(layout.tasks):
            pid, pages_id = FIRST_PID + task, task + 1
            pagemap.write(directory / Kind.PAGEMAP.file_name(pid), pages_id, _entries(layout, level))
            runs = _sparse(layout, order, task) if layout.sparse else _runs(layout, level, task)
            _fill(programs, directory / pagemap.pages_name(pages_id), runs, chase, layout)
    flat = levels[0]
    if layout.depth:
        flat = folder / "flat"
        flat.mkdir()
        for task in range(layout.tasks):
            runs = iter([(0, task + 1, 0, layout.pages, 1)])
            programs.fill_pages(flat / pagemap.pages_name(task + 1), runs, chase)
    images_dir = levels[0]
    if layout.source is Source.REMOTE:
        images_dir = folder / "remote"
        images_dir.mkdir()
        _write_tree(images_dir, layout)
        for task in range(layout.tasks):
            lazy = ((vaddr, count, flags.PE_LAZY) for vaddr, count, _flags in _entries(layout, 0))
            pagemap.write(images_dir / Kind.PAGEMAP.file_name(FIRST_PID + task), task + 1, lazy)
            (images_dir / pagemap.pages_name(task + 1)).touch()
    return Checkpoint(layout, images_dir, levels[0], str(flat / "pages-%d.img"), order_file)


def _fill(
    programs: Programs,
    path: Path,
    runs: Iterator[tuple[int, int, int, int, int]],
    chase: Path | None,
    layout: Layout,
) -> None:
    programs.fill_pages(path, runs, chase)
    if layout.sparse:
        os.truncate(path, layout.pages * flags.PAGE_SIZE)


def _entries(layout: Layout, level: int) -> Iterator[tuple[int, int, int]]:
    in_parent = flags.PE_PARENT | flags.PE_LAZY
    for first in range(0, layout.pages, layout.entry_pages):
        here = level_of(first, layout.depth) <= level
        count = min(layout.entry_pages, layout.pages - first)
        yield BASE + first * layout.stride * flags.PAGE_SIZE, count, _LAZY_DATA if here else in_parent


def _runs(layout: Layout, level: int, task: int) -> Iterator[tuple[int, int, int, int, int]]:
    if not layout.depth:
        yield 0, task + 1, 0, layout.pages, layout.stride
        return
    for place, first, count, owner in runs_of_level(layout, level):
        yield place, task + 1 + (0 if owner == level else STALE * level), first, count, 1


def _sparse(layout: Layout, order: array.array[int], task: int) -> Iterator[tuple[int, int, int, int, int]]:
    for page in order:
        if page % layout.stride == 0:
            yield page // layout.stride, task + 1, page, 1, 1


def _write_tree(directory: Path, layout: Layout) -> None:
    ids = TaskKobjIdsEntry(vm_id=1, files_id=1, fs_id=1, sighand_id=1)
    inventory = InventoryEntry(img_version=2, fdinfo_per_id=True, root_ids=ids)
    images.write(directory / Kind.INVENTORY.file_name(), Kind.INVENTORY, [inventory])
    pids = range(FIRST_PID, FIRST_PID + layout.tasks)
    images.write(
        directory / Kind.PSTREE.file_name(),
        Kind.PSTREE,
        (
            PstreeEntry(pid=pid, ppid=0 if pid == FIRST_PID else FIRST_PID, pgid=pid, sid=pid, threads=[pid])
            for pid in pids
        ),
    )
    core = CoreEntry(
        mtype=Machine.MACHINE_X86_64,
        tc=TaskCoreEntry(
            task_state=TaskState.TASK_ALIVE, exit_code=0, personality=0, flags=0, blk_sigset=0, comm=b"task"
        ),
    )
    mm = MmEntry(exe_file_id=1)
    for name in _MM_ADDRESSES:
        setattr(mm, name, 0)
    mm.vmas.append(
        VmaEntry(
            start=BASE,
            end=BASE + layout.span * flags.PAGE_SIZE,
            pgoff=0,
            shmid=0,
            prot=3,
            flags=flags.MAP_PRIVATE | flags.MAP_ANONYMOUS,
            status=flags.VMA_REGULAR | flags.VMA_ANON_PRIVATE,
            fd=-1,
        )
    )
    for pid in pids:
        images.write(directory / Kind.CORE.file_name(pid), Kind.CORE, [core])
        images.write(directory / Kind.MM.file_name(pid), Kind.MM, [mm])


_MM_ADDRESSES = (
    "start_code",
    "end_code",
    "start_data",
    "end_data",
    "start_stack",
    "start_brk",
    "brk",
    "arg_start",
    "arg_end",
    "env_start",
    "env_end",
)
