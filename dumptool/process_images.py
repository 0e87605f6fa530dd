"""The images beside memory: inventory, those of each process, and those of the whole tree."""

from __future__ import annotations

from dataclasses import dataclass

from dumptool import core, mappings, proc
from dumptool.files import FileTable
from dumptool.freeze import FrozenTree
from dumptool.mappings import Mapping
from dumptool.output import Output
from dumptool.survey import Task
from images_spec.images import Kind
from images_spec.messages import FsEntry, InventoryEntry, PstreeEntry, SeccompEntry, TaskKobjIdsEntry
from images_spec.placement import Span

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
"""Equal in inventory and ids images: the tasks share the namespaces of the dumper (images_spec/ids.md)."""
ROOT_OBJECT = 1
"""vm, files, fs and sighand id of the dumper in the inventory; the ids of tasks start above it."""


@dataclass(frozen=True, slots=True)
class CapturedTask:
    """The contents of one process's images. ``guards``: its guard regions (``memory.guard_regions``)."""

    task: Task
    captured: core.Captured
    described: list[Mapping]
    guards: list[Span]
    ids: TaskKobjIdsEntry


def object_ids(number: int) -> TaskKobjIdsEntry:
    """Ids of a process that shares no kernel object with others. ``number``: unique, above ``ROOT_OBJECT``."""
    return TaskKobjIdsEntry(vm_id=number, files_id=number, fs_id=number, sighand_id=number, **NAMESPACE_IDS)


def inventory(run_id: str) -> InventoryEntry:
    """The inventory of a level. ``run_id``: by which trackers and later levels recognise it."""
    return InventoryEntry(
        img_version=IMAGE_VERSION,
        fdinfo_per_id=True,
        root_ids=object_ids(ROOT_OBJECT),
        ns_per_id=True,
        lsmtype=0,
        network_lock_method=0,
        dump_criu_run_id=run_id,
    )


def write_task(what: CapturedTask, output: Output, table: FileTable) -> None:
    """Writes core, ids, fs, mm and fdinfo of one process, and adds its files to ``table``.

    Raises ``DumpError``, ``ImageError``.
    """
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


def write_tree(output: Output, tree: FrozenTree, table: FileTable) -> None:
    """Writes the process tree, the cores of zombies, and the files of all processes.

    Call it after ``write_task`` for each process. Raises ``DumpError``, ``ImageError``.
    """
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
