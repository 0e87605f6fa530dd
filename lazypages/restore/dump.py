"""All images of a checkpoint that a restore needs, read and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from images_spec import images
from images_spec.checkpoint import Checkpoint, TaskImages, open_checkpoint
from images_spec.errors import ImageError, ImageMissingError
from images_spec.flags import VMA_ANON_SHARED, VMA_MEMFD, VMA_SYSVIPC
from images_spec.images import Kind, M
from images_spec.messages import (
    CoreEntry,
    FdinfoEntry,
    FdType,
    FileEntry,
    FileLockEntry,
    FsEntry,
    MemfdFileEntry,
    MemfdInodeEntry,
    MmEntry,
    PipeDataEntry,
    PstreeEntry,
    TaskKobjIdsEntry,
    TaskState,
    TtyInfoEntry,
    VmaEntry,
)
from images_spec.pagemap import Pagemap, pages_name
from images_spec.placement import ExtentTable, mappings, resolve
from images_spec.unknown import refuse_unknown_fields

T = TypeVar("T")

SHARED_ANONYMOUS: Final = "/dev/zero"
"""Name of shared anonymous memory that is dumped as a memfd (observed with CRIU 4.1.1 and 4.2.1)."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The images of a task that is not a zombie. ``threads``: cores by tid, the leader's first.

    ``mm`` has mappings only; guard regions are in ``memory``.
    """

    ids: TaskKobjIdsEntry
    mm: MmEntry
    fs: FsEntry
    fds: list[FdinfoEntry]
    threads: Mapping[int, CoreEntry]
    memory: TaskImages


@dataclass(frozen=True, slots=True)
class Process:
    """A task of the tree. ``alive``: None for a zombie."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    core: CoreEntry
    alive: Alive | None


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Shared anonymous memory. Addresses in ``extents`` are offsets. ``levels``: pages files."""

    extents: ExtentTable
    levels: list[Path | None]


@dataclass(frozen=True, slots=True)
class SharedMemories:
    """Shared anonymous memory by its id.

    CRIU writes a mapping of it as a mapping of a memfd named /dev/zero: the mapping refers to a file of that type,
    and that to memfd.img. A mapping may also contain the id itself (VMA_ANON_SHARED).
    """

    by_id: Mapping[int, SharedMemory]
    sizes: Mapping[int, int]
    """Bytes: large enough for every mapping of it."""
    ids_of_files: Mapping[int, int]
    """Id of the memory by the id of its file of type memfd; other files are not in here."""

    def find(self, vma: VmaEntry) -> int | None:
        """The id of the memory that a mapping shows; None if it is a mapping of something else."""
        if vma.status & VMA_MEMFD:
            return self.ids_of_files.get(vma.shmid)
        return vma.shmid if vma.status & VMA_ANON_SHARED and not vma.status & VMA_SYSVIPC else None


@dataclass(frozen=True)
class Dump:
    """A checkpoint. ``processes``: the root first, parents before their children."""

    checkpoint: Checkpoint
    processes: list[Process]
    files: Mapping[int, FileEntry]
    pipes: Mapping[int, tuple[PipeDataEntry, bytes]]
    ttys: Mapping[int, TtyInfoEntry]
    deleted: frozenset[int]
    """Ids of files that were deleted at the time of the dump."""
    shared: SharedMemories
    locks: list[FileLockEntry]

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    def path(self, kind: Kind[M], ident: int | str | None = None) -> Path:
        """The path of an image, for messages."""
        return self.directory / kind.file_name(ident)

    def file(self, ident: int, subject: str) -> FileEntry:
        """A file by its id. ``subject``: its user, for messages. Raises ``ImageError``."""
        try:
            return self.files[ident]
        except KeyError:
            raise ImageError(self.path(Kind.FILES), f"has no file {ident}, which is {subject}") from None


def load(directory: Path, *, lazy: bool) -> Dump:
    """Reads a checkpoint. ``lazy``: a daemon will serve pages. Raises ``ImageError``."""
    checkpoint = open_checkpoint(directory)
    entries = _read(directory / Kind.PSTREE.file_name(), Kind.PSTREE)
    processes = [_process(checkpoint, entry, lazy) for entry in entries]
    files = {entry.id: entry for entry in _read(directory / Kind.FILES.file_name(), Kind.FILES)}
    return Dump(
        checkpoint,
        processes,
        files,
        {
            entry.pipe_id: (entry, data)
            for entry, data in _optional(_read_with_data, directory, Kind.PIPES_DATA)
        },
        {entry.id: entry for entry in _optional(_read, directory, Kind.TTY_INFO)},
        frozenset(entry.orig_id for entry in _optional(_read, directory, Kind.REMAP_FPATH)),
        _shared_memories(checkpoint, files, processes),
        _optional(_read, directory, Kind.FILE_LOCKS),
    )


def _read(path: Path, kind: Kind[M]) -> list[M]:
    return [message for message, _ in _read_with_data(path, kind)]


def _read_one(path: Path, kind: Kind[M]) -> M:
    (message,) = _read(path, kind)
    return message


def _read_with_data(path: Path, kind: Kind[M]) -> list[tuple[M, bytes]]:
    """Rejects unknown fields: the restored task would lack what they describe."""
    items = images.read_with_data(path, kind)
    refuse_unknown_fields((message for message, _ in items), path)
    return items


def _optional(read: Callable[[Path, Kind[M]], list[T]], directory: Path, kind: Kind[M]) -> list[T]:
    """The messages of an image that is written only if needed."""
    try:
        return read(directory / kind.file_name(), kind)
    except ImageMissingError:
        return []


def _process(checkpoint: Checkpoint, entry: PstreeEntry, lazy: bool) -> Process:
    directory, pid = checkpoint.directory, entry.pid
    core = _core(directory, pid)
    alive = None
    if core.tc.task_state != TaskState.TASK_DEAD:
        if pid not in entry.threads:
            raise ImageError(
                directory / Kind.PSTREE.file_name(), f"task {pid} has no leader among its threads"
            )
        ids = core.ids if core.HasField("ids") else _read_one(directory / Kind.IDS.file_name(pid), Kind.IDS)
        threads = {pid: core} | {tid: _core(directory, tid) for tid in entry.threads if tid != pid}
        for tid, thread in threads.items():
            if not thread.HasField("thread_info") or not thread.HasField("thread_core"):
                raise ImageError(directory / Kind.CORE.file_name(tid), "has no registers of an x86_64 thread")
        alive = Alive(
            ids,
            _without_guards(_read_one(directory / Kind.MM.file_name(pid), Kind.MM)),
            _read_one(directory / Kind.FS.file_name(pid), Kind.FS),
            _read(directory / Kind.FDINFO.file_name(ids.files_id), Kind.FDINFO),
            threads,
            checkpoint.load_task(pid, remote=lazy),
        )
    return Process(pid, entry.ppid, entry.pgid, entry.sid, core, alive)


def _without_guards(mm: MmEntry) -> MmEntry:
    kept = mappings(mm)
    del mm.vmas[:]
    mm.vmas.extend(kept)
    return mm


def _core(directory: Path, tid: int) -> CoreEntry:
    return _read_one(directory / Kind.CORE.file_name(tid), Kind.CORE)


def _shared_memories(
    checkpoint: Checkpoint, files: Mapping[int, FileEntry], processes: list[Process]
) -> SharedMemories:
    inodes = {entry.inode_id: entry for entry in _optional(_read, checkpoint.directory, Kind.MEMFD)}
    ids_of_files = {
        entry.id: inode.shmid
        for entry in files.values()
        if entry.type == FdType.FD_MEMFD and (inode := _inode(entry, inodes)) is not None
    }
    sizes: dict[int, int] = {}
    names = SharedMemories({}, sizes, ids_of_files)
    for process in processes:
        for vma in process.alive.mm.vmas if process.alive else ():
            ident = names.find(vma)
            if ident is not None:
                sizes[ident] = max(vma.pgoff + vma.end - vma.start, sizes.get(ident, 0))
    for inode in inodes.values():
        if inode.shmid in sizes:
            sizes[inode.shmid] = max(inode.size, sizes[inode.shmid])
    return SharedMemories({ident: _shared(checkpoint, ident) for ident in sizes}, sizes, ids_of_files)


def _inode(entry: FileEntry, inodes: Mapping[int, MemfdInodeEntry]) -> MemfdInodeEntry | None:
    """The inode of a file of type memfd; None if it is not shared anonymous memory."""
    try:
        inode = inodes.get(MemfdFileEntry.FromString(entry.memfd).inode_id)
    except DecodeError:
        return None
    return inode if inode is not None and inode.name == SHARED_ANONYMOUS else None


def _shared(checkpoint: Checkpoint, ident: int) -> SharedMemory:
    """The contents of shared memory, from all levels of the chain that have it."""
    pagemaps: list[Pagemap] = []
    levels: list[Path | None] = []
    for directory in checkpoint.chain:
        path = directory / Kind.PAGEMAP.file_name(f"shmem-{ident}")
        try:
            pagemap = Pagemap.load(path)
        except ImageMissingError:
            if not pagemaps:
                raise
            break
        pages = directory / pages_name(pagemap.pages_id)
        if pagemap.present_pages:
            try:
                pagemap.check_pages_size(pages.stat().st_size, pages)
            except OSError as error:
                raise ImageError(pages, f"can't be opened: {error.strerror}") from None
        pagemaps.append(pagemap)
        levels.append(pages if pagemap.present_pages else None)
    extents = resolve(pagemaps, remote=False)
    if extents.counts().lost.total:
        raise ImageError(pagemaps[0].path, "has pages that are in no image of the chain")
    return SharedMemory(extents, levels)
