"""``--dry-run``: what a dump would refuse, and how much memory it would save. Writes nothing.

The tree is stopped only for what can't be seen while it runs; its pages are counted afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dumptool import mappings, memory, proc, saveable, survey
from dumptool.errors import DumpError, TaskGoneError
from dumptool.freeze import Process, freeze
from dumptool.holders import Holders
from dumptool.memory import Marks, Part
from dumptool.settings import Settings
from dumptool.survey import Task
from images_spec.flags import PE_LAZY


@dataclass(slots=True)
class Rehearsal:
    """``pages``: of private and shared anonymous memory and changed pages of files, without those of parent levels;
    ``lazy``: those that ``--lazy-pages`` leaves out. ``freezing``, ``frozen``: as in Report, s."""

    processes: int
    threads: int
    freezing: float
    frozen: float
    pages: int = 0
    lazy: int = 0


def rehearse(settings: Settings, *, memory_only: bool) -> Rehearsal:
    """Raises ``DumpError`` (``UnsupportedError``) as a dump does before it writes anything.

    ``memory_only``: as for a pre-dump, or a dump in which CRIU saves everything else.
    """

    def check(processes: Sequence[Process], tasks: dict[int, Task], *, frozen: bool = False) -> None:
        if memory_only:
            survey.check_memory(processes, tasks, frozen=frozen)
        else:
            saveable.check(processes, tasks, settings.allow, frozen=frozen)

    memory.guard_category()
    survey.check_permission(settings.pid)
    with Holders() as holders:
        files = not memory_only
        before = survey.look_until_settled(settings.pid, check, holders, files=files)
        with freeze(settings.pid, settings.timeout) as tree:
            tasks = survey.look_at_all(tree.processes, before, holders=holders, files=files)
            check(tree.processes, tasks, frozen=True)
            threads = sum(len(process.threads) for process in tree.alive)
            found = Rehearsal(len(tree.processes), threads, tree.freezing_time, tree.thaw())
    shared: set[int] = set()
    for task in tasks.values():
        try:
            _count(found, _private(task))
            _count(found, _shared(task, shared))
        except (TaskGoneError, FileNotFoundError, ProcessLookupError):
            if task.pid == settings.pid:
                raise TaskGoneError(f"pid {task.pid}: has exited") from None
        except OSError as error:
            raise DumpError(f"pid {task.pid}: its pages can't be counted: {error.strerror}") from None
    return found


def _count(found: Rehearsal, parts: Iterable[Part]) -> None:
    for part in parts:
        found.pages += part.runs.pages()
        found.lazy += part.runs.pages(PE_LAZY)


def _private(task: Task) -> list[Part]:
    described = mappings.describe(proc.layout(task.pid, task.layout), lambda _vma, _flags: (0, 0))
    pagemap = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return memory.scan(pagemap, described, Marks())
    finally:
        os.close(pagemap)


def _shared(task: Task, seen: set[int]) -> Collection[Part]:
    """Each piece of shared anonymous memory that is not `seen` yet, by inode."""
    parts = []
    for vma in task.layout.vmas:
        if survey.is_shared_anonymous(vma) and vma.inode not in seen:
            seen.add(vma.inode)
            fd = os.open(f"/proc/{task.pid}/{vma.link}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                parts.append(memory.shared_part(fd, os.fstat(fd).st_size))
            finally:
                os.close(fd)
    return parts
