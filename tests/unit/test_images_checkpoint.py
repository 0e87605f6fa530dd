"""Image directories as a whole: tasks, chains of parents, and everything that may not fit together."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from images_spec import images, pagemap
from images_spec.checkpoint import Task, TaskImages, TaskLevel, open_checkpoint, parent_chain
from images_spec.errors import ImageError, ImageMissingError
from images_spec.flags import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    VMA_ANON_PRIVATE,
    VMA_FILE_PRIVATE,
    VMA_GUARD,
    VMA_REGULAR,
)
from images_spec.images import Kind
from images_spec.messages import (
    CoreEntry,
    InventoryEntry,
    MmEntry,
    PstreeEntry,
    TaskCoreEntry,
    TaskState,
    VmaEntry,
)
from images_spec.placement import SOURCE_LOST, SOURCE_REMOTE, Extent, PageCount, Span

ANON = MAP_PRIVATE | MAP_ANONYMOUS
HERE, LAZY, PARENT = PE_PRESENT, PE_LAZY, PE_PARENT


@dataclass
class Draft:
    """An image directory to be written: the least that ``open_checkpoint`` and ``load_task`` read."""

    directory: Path
    tasks: dict[int, int] = field(default_factory=lambda: {10: 0})
    version: int = 2

    def write(self) -> Path:
        self.directory.mkdir(exist_ok=True)
        self.inventory(self.version)
        self.pstree([(pid, ppid) for pid, ppid in self.tasks.items()])
        for pid in self.tasks:
            self.core(pid)
            self.mm(pid, [(0x10, 0x20, ANON)])
            self.memory(pid, [(0x10, 2, LAZY | HERE), (0x18, 1, HERE)])
        return self.directory

    def inventory(self, version: int) -> None:
        images.write(self.directory / "inventory.img", Kind.INVENTORY, [InventoryEntry(img_version=version)])

    def pstree(self, tasks: list[tuple[int, int]]) -> None:
        entries = [PstreeEntry(pid=pid, ppid=ppid, pgid=10, sid=10, threads=[pid]) for pid, ppid in tasks]
        images.write(self.directory / "pstree.img", Kind.PSTREE, entries)

    def core(self, pid: int, state: int = TaskState.TASK_ALIVE, exit_code: int = 0) -> None:
        tc = TaskCoreEntry(
            task_state=state, exit_code=exit_code, personality=0, flags=0, blk_sigset=0, comm=b"task"
        )
        core = CoreEntry(mtype=1, tc=tc)
        images.write(self.directory / Kind.CORE.file_name(pid), Kind.CORE, [core])

    def mm(self, pid: int, vmas: list[tuple[int, int, int]]) -> None:
        """Mappings as (first page, page after the last, MAP_* flags)."""
        mm = MmEntry()
        for descriptor in mm.DESCRIPTOR.fields:
            if descriptor.is_required:
                setattr(mm, descriptor.name, 0)
        for start, end, flags in vmas:
            status = VMA_REGULAR | (VMA_ANON_PRIVATE if flags & MAP_ANONYMOUS else VMA_FILE_PRIVATE)
            places = {"start": start * PAGE_SIZE, "end": end * PAGE_SIZE, "pgoff": 0, "shmid": 1}
            mm.vmas.append(VmaEntry(**places, prot=3, flags=flags, status=status, fd=-1))
        images.write(self.directory / Kind.MM.file_name(pid), Kind.MM, [mm])

    def guard(self, pid: int, start: int, end: int) -> None:
        """A guard region, pages as above, after what is there."""
        path = self.directory / Kind.MM.file_name(pid)
        mm = images.read_one(path, Kind.MM)
        places = {"start": start * PAGE_SIZE, "end": end * PAGE_SIZE, "pgoff": 0, "shmid": 0}
        mm.vmas.append(VmaEntry(**places, prot=0, flags=0, status=VMA_GUARD, fd=-1))
        images.write(path, Kind.MM, [mm])

    def memory(self, pid: int, entries: list[tuple[int, int, int]], pages: int | None = None) -> None:
        """Pagemap of (first page, count, PE_* flags), and as many pages as it promises, or ``pages``."""
        if pages is None:
            pages = sum(count for _, count, flags in entries if flags & HERE)
        path = self.directory / Kind.PAGEMAP.file_name(pid)
        pagemap.write(path, pid, [(first * PAGE_SIZE, count, flags) for first, count, flags in entries])
        (self.directory / f"pages-{pid}.img").write_bytes(bytes(pages * PAGE_SIZE))


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    draft = Draft(tmp_path / "top")
    draft.write()
    return draft


def chained(draft: Draft, *names: str) -> list[Draft]:
    """Parents of the draft, parents of parents, ... each with the link to the next."""
    drafts = [draft]
    for name in names:
        parent = Draft(draft.directory.parent / name)
        parent.directory.mkdir()
        (drafts[-1].directory / "parent").symlink_to(f"../{name}")
        drafts.append(parent)
    return drafts


def load(draft: Draft, pid: int = 10, *, remote: bool = False) -> TaskImages:
    return open_checkpoint(draft.directory).load_task(pid, remote)


def refusal(draft: Draft) -> str:
    """What opening the draft and loading its task 10 says, without the directories before it."""
    with pytest.raises(ImageError) as caught:
        load(draft)
    return str(caught.value).replace(f"{draft.directory.parent}/", "")


def test_tasks(tmp_path: Path) -> None:
    directory = Draft(tmp_path / "top", tasks={10: 0, 12: 10, 11: 12}).write()
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.tasks == (Task(10, 0, (10,)), Task(12, 10, (12,)), Task(11, 12, (11,)))
    assert checkpoint.inventory.img_version == 2
    assert (checkpoint.directory, checkpoint.chain) == (directory, (directory,))


def test_memory_of_a_task(draft: Draft) -> None:
    task = load(draft)
    assert (task.pid, task.is_dead) == (10, False)
    assert list(task.extents) == [
        Extent(0x10 * PAGE_SIZE, 2, 0, 0, True),
        Extent(0x18 * PAGE_SIZE, 1, 2 * PAGE_SIZE, 0, False),
    ]
    assert task.vmas == [Span(0x10 * PAGE_SIZE, 0x20 * PAGE_SIZE)]
    assert task.levels == [TaskLevel(draft.directory, draft.directory / "pages-10.img", 3 * PAGE_SIZE)]


def test_a_guard_has_no_page(draft: Draft) -> None:
    """Whatever the pagemap says."""
    draft.mm(10, [(0x10, 0x20, ANON)])
    draft.guard(10, 0x11, 0x13)
    draft.memory(10, [(0x10, 2, LAZY | HERE), (0x18, 1, HERE)])
    task = load(draft)
    assert task.guards == [Span(0x11 * PAGE_SIZE, 0x13 * PAGE_SIZE)]
    assert task.vmas == [Span(0x10 * PAGE_SIZE, 0x20 * PAGE_SIZE)]
    assert list(task.extents) == [
        Extent(0x10 * PAGE_SIZE, 1, 0, 0, True),
        Extent(0x18 * PAGE_SIZE, 1, 2 * PAGE_SIZE, 0, False),
    ]


def test_a_dead_task_has_no_memory(draft: Draft) -> None:
    draft.core(10, TaskState.TASK_DEAD)
    for name in ("mm-10.img", "pagemap-10.img", "pages-10.img"):
        (draft.directory / name).unlink()
    task = load(draft)
    assert (task.is_dead, len(task.extents), task.vmas, task.levels) == (True, 0, [], [])


def test_a_stopped_task_has_memory(draft: Draft) -> None:
    draft.core(10, TaskState.TASK_STOPPED)
    assert not load(draft).is_dead


# Chains


@pytest.mark.parametrize("depth", [1, 2, 5, 50])
def test_chain_of_any_depth(draft: Draft, depth: int) -> None:
    """Level k holds the k-th page; the link of each level is relative to it."""
    drafts = chained(draft, *(f"pre-{number}" for number in range(1, depth)))
    for level, part in enumerate(drafts):
        below = [(0x10 + level + 1, depth - level - 1, PARENT | LAZY)] if level < depth - 1 else []
        part.memory(10, [(0x10 + level, 1, LAZY | HERE), *below])
    draft.mm(10, [(0x10, 0x10 + depth, ANON)])
    task = load(draft)
    assert list(task.extents) == [
        Extent((0x10 + level) * PAGE_SIZE, 1, 0, level, True) for level in range(depth)
    ]
    assert [level.directory for level in task.levels] == [part.directory.resolve() for part in drafts]
    assert all(level.pages == level.directory / "pages-10.img" for level in task.levels)


def test_chain_ends_where_a_level_knows_nothing_of_the_task(draft: Draft) -> None:
    """Also if a level below has a pagemap of the task: as in CRIU (docs/criu.md, "Pagemap")."""
    _, _, lowest = chained(draft, "middle", "lowest")
    lowest.memory(10, [(0x10, 1, HERE)])
    draft.memory(10, [(0x10, 1, PARENT | LAZY)])
    task = load(draft, remote=True)
    assert [extent.source for extent in task.extents] == [SOURCE_LOST]
    assert len(task.levels) == 1
    assert len(open_checkpoint(draft.directory).chain) == 3


def test_remote_pages_need_no_pages_file(draft: Draft) -> None:
    draft.memory(10, [(0x10, 4, LAZY)])
    (draft.directory / "pages-10.img").unlink()
    task = load(draft, remote=True)
    assert [extent.source for extent in task.extents] == [SOURCE_REMOTE]
    assert task.levels == [TaskLevel(draft.directory, None, 0)]
    assert load(draft, remote=False).extents.counts().lost == PageCount(lazy=4)


def test_parent_may_be_a_directory(draft: Draft) -> None:
    (draft.directory / "parent").mkdir()
    assert len(parent_chain(draft.directory)) == 2


def test_circular_chains(draft: Draft) -> None:
    _, second = chained(draft, "second")
    (second.directory / "parent").symlink_to("../top")
    assert refusal(draft) == "second/parent: leads back to a directory of the same chain"
    (second.directory / "parent").unlink()
    (second.directory / "parent").symlink_to(".")
    assert refusal(draft) == "second/parent: leads back to a directory of the same chain"


def test_broken_links(draft: Draft) -> None:
    link = draft.directory / "parent"
    link.symlink_to("../gone")
    assert refusal(draft) == (
        "top/parent: can't be followed: No such file or directory (it points to ../gone)"
    )
    link.unlink()
    link.symlink_to("parent")
    assert "top/parent: can't be followed: Too many levels of symbolic links" in refusal(draft)
    link.unlink()
    link.touch()
    assert refusal(draft) == "top/parent: not a directory"


# What may be wrong


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageMissingError, match=r"/none/inventory\.img: no such image"):
        open_checkpoint(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["inventory.img", "pstree.img", "core-10.img", "mm-10.img", "pagemap-10.img", "pages-10.img"]
)
def test_every_image_must_be_there_and_be_one(draft: Draft, name: str) -> None:
    path = draft.directory / name
    data = path.read_bytes()
    path.unlink()
    promise = ", but pagemap-10.img promises 3 pages" if name == "pages-10.img" else ""
    assert refusal(draft) == f"top/{name}: no such image{promise}"
    path.mkdir()
    assert refusal(draft) == f"top/{name}: not a regular file"
    path.rmdir()
    if name != "pages-10.img":
        path.write_bytes(data[:-1])
        assert f"top/{name}: " in refusal(draft)
        path.write_bytes(data + b"\0")
        assert f"top/{name}: " in refusal(draft)
        path.write_bytes(b"")
        assert refusal(draft) == f"top/{name}: truncated in its magic (at byte 0)"


def test_pages_file_is_short(draft: Draft) -> None:
    draft.memory(10, [(0x10, 3, HERE)], pages=2)
    assert refusal(draft) == (
        "top/pages-10.img: holds 8192 bytes, but pagemap-10.img promises 3 pages (12288 bytes)"
    )


def test_parent_is_broken(draft: Draft) -> None:
    _, parent = chained(draft, "parent-level")
    parent.memory(10, [(0x10, 3, HERE)], pages=2)
    assert refusal(draft).startswith("parent-level/pages-10.img: holds 8192 bytes, but ")
    (parent.directory / "pagemap-10.img").write_bytes(b"\0" * 100)
    assert refusal(draft).startswith("parent-level/pagemap-10.img: magic 0x00000000, but ")


def test_unknown_version(draft: Draft) -> None:
    draft.inventory(3)
    assert refusal(draft) == "top/inventory.img: image version 3 is not supported, only 1 and 2"


@pytest.mark.parametrize(
    ("tasks", "what"),
    [
        ([], "holds no task"),
        ([(0, 0)], "0 is not a pid"),
        ([(1 << 31, 0)], "2147483648 is not a pid"),
        ([(10, 0), (11, 10), (11, 10)], "holds task 11 twice"),
        ([(10, 0), (11, 0)], "task 11 is a second root"),
        ([(10, 0), (11, 12)], "task 11 comes before its parent 12, or has none"),
        ([(10, 0), (11, 12), (12, 10)], "task 11 comes before its parent 12, or has none"),
        ([(10, 11), (11, 10)], "task 10 comes before its parent 11, or has none"),
        ([(10, 10)], "task 10 comes before its parent 10, or has none"),
    ],
)
def test_what_is_no_tree(draft: Draft, tasks: list[tuple[int, int]], what: str) -> None:
    draft.pstree(tasks)
    assert refusal(draft) == f"top/pstree.img: {what}"


def test_unknown_task(draft: Draft) -> None:
    with pytest.raises(ImageError, match=r"pstree\.img: has no task 77"):
        load(draft, 77)


def test_lazy_pages_where_no_mapping_can_be_lazy(draft: Draft) -> None:
    draft.memory(10, [(0x10, 4, LAZY | HERE), (0x1F, 2, LAZY | HERE)])
    assert refusal(draft) == (
        "top/pagemap-10.img: pages 0x20000-0x21000 are lazy, but no mapping there can be (see mm image)"
    )
    draft.mm(10, [(0x10, 0x30, MAP_PRIVATE)])
    assert refusal(draft).startswith("top/pagemap-10.img: pages 0x10000-0x14000 are lazy, but ")
    draft.mm(10, [(0x10, 0x30, ANON), (0x2F, 0x40, ANON)])
    assert refusal(draft) == (
        "top/mm-10.img: mapping 0x2f000-0x40000 is not sorted or overlaps the one before it"
    )


def test_a_thousand_tasks(draft: Draft) -> None:
    """All of them hard links of one: it is their number that counts."""
    pids = range(10, 1010)
    draft.pstree([(pid, pid - 1 if pid > 10 else 0) for pid in pids])
    for pid in pids[1:]:
        for name in ("core", "mm", "pagemap"):
            os.link(draft.directory / f"{name}-10.img", draft.directory / f"{name}-{pid}.img")
    checkpoint = open_checkpoint(draft.directory)
    assert sum(
        checkpoint.load_task(task.pid, False).extents.counts().levels[0].total for task in checkpoint.tasks
    ) == (3 * len(pids))


def test_a_directory_can_be_anywhere(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it under a name that is no text, opened by a relative path."""
    odd = os.fsdecode(os.fsencode(draft.directory.parent) + b"/\xff odd")
    shutil.copytree(draft.directory, odd)
    monkeypatch.chdir(odd)
    checkpoint = open_checkpoint(".")
    monkeypatch.chdir("/")
    assert checkpoint.load_task(10, False).levels[0].pages == Path(odd, "pages-10.img")
