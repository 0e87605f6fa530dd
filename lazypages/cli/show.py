"""``lazypages show DIR``: prints the contents of an image directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from images_spec import flags, images
from images_spec.checkpoint import Checkpoint, Task, TaskImages, open_checkpoint
from images_spec.errors import ImageMissingError
from images_spec.flags import PAGE_SIZE, lazy_capable
from images_spec.images import Kind
from images_spec.messages import CoreEntry, MmEntry, TaskState, VmaEntry
from images_spec.placement import PageCount, PageCounts, Span, mappings
from lazypages.wording import printable

WIDE = 10_000
"""Width in columns, larger than any line."""

STATES: dict[int, str] = {
    TaskState.TASK_ALIVE: "alive",
    TaskState.TASK_DEAD: "zombie",
    TaskState.TASK_STOPPED: "stopped",
}

VMA_NAMES = {
    flags.VMA_HEAP: "[heap]",
    flags.VMA_VDSO: "[vdso]",
    flags.VMA_VVAR: "[vvar]",
    flags.VMA_VSYSCALL: "[vsyscall]",
    flags.VMA_SYSVIPC: "System V shared memory",
    flags.VMA_AIORING: "aio ring",
    flags.VMA_SOCKET: "packet socket",
    flags.VMA_MEMFD: "memfd",
    flags.VMA_ANON_SHARED: "shared memory",
}
"""Name of a mapping without a file, by the first of these bits that its status has."""


@dataclass(frozen=True)
class _TaskReport:
    """The images of one task. ``mm`` is None for a dead task."""

    task: Task
    core: CoreEntry
    memory: TaskImages
    mm: MmEntry | None

    @property
    def title(self) -> str:
        return f"{printable(self.core.tc.comm)} ({self.task.pid})"


def show(directory: Path, console: Console) -> None:
    """Print tasks, mappings, and where their pages are. All images are read before anything is printed.

    A lazy page that is in no image is counted as being at a page server. Raises ``ImageError``.
    """
    checkpoint = open_checkpoint(directory)
    reports = [_load(checkpoint, task) for task in checkpoint.tasks]
    names = _file_names(directory)

    _print(console, _chain(checkpoint))
    _print(console, _tree(reports))
    for report in reports:
        if report.mm is not None:
            _print(console, _pages(report))
            _print(console, _mappings(report, report.mm, names))


@dataclass(frozen=True)
class _Wide:
    """Renders a part at a width at which no line is cut."""

    part: Table | Tree

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return console.render(self.part, options.update(width=WIDE))


def _print(console: Console, part: Table | Tree) -> None:
    """Fit the part to a terminal; in a file or pipe do not cut or wrap lines."""
    console.print(part if console.is_terminal else _Wide(part), "", crop=False)


def _load(checkpoint: Checkpoint, task: Task) -> _TaskReport:
    core = images.read_one(checkpoint.directory / Kind.CORE.file_name(task.pid), Kind.CORE)
    memory = checkpoint.load_task(task.pid, remote=True)
    mm_path = checkpoint.directory / Kind.MM.file_name(task.pid)
    return _TaskReport(task, core, memory, None if memory.is_dead else images.read_one(mm_path, Kind.MM))


def _file_names(directory: Path) -> dict[int, str]:
    """Names of regular files by id. Empty without `files.img`, which is only needed to name mappings."""
    try:
        files = images.read(directory / Kind.FILES.file_name(), Kind.FILES)
    except ImageMissingError:
        return {}
    return {entry.id: printable(entry.reg.name) for entry in files if entry.HasField("reg")}


def _chain(checkpoint: Checkpoint) -> Table:
    table = _table("Chain of images", "level", "directory")
    for level, directory in enumerate(checkpoint.chain):
        _add_row(table, f"{level} ({'parent' if level else 'own'})", printable(os.fsencode(directory)))
    return table


def _tree(reports: list[_TaskReport]) -> Tree:
    """The tasks as a tree. Parents come before their children in `reports` (images_spec.checkpoint)."""
    root, *others = reports
    branches = {root.task.pid: Tree(_describe(root))}
    for report in others:
        branches[report.task.pid] = branches[report.task.ppid].add(_describe(report))
    return branches[root.task.pid]


def _describe(report: _TaskReport) -> Text:
    core = report.core.tc
    state = STATES.get(core.task_state, f"state {core.task_state}")
    if report.memory.is_dead:
        return Text(f"{report.title}: {state}, {_ending(core.exit_code)}")
    number = len(report.task.threads)
    size = sum(count.total for _, count in _places(report.memory.extents.counts()))
    return Text(
        f"{report.title}: {state}, {number} thread{'s' if number != 1 else ''}, {_size(size)} of memory"
    )


def _ending(status: int) -> str:
    """The end of a zombie, from its wait(2) status."""
    return f"killed by signal {status & 0x7F}" if status & 0x7F else f"exit status {status >> 8 & 0xFF}"


def _places(counts: PageCounts) -> list[tuple[str, PageCount]]:
    own, *parents = counts.levels
    return [
        ("own images", own),
        *((f"parent, level {level}", count) for level, count in enumerate(parents, 1)),
        ("page server", counts.remote),
        ("lost", counts.lost),
    ]


def _pages(report: _TaskReport) -> Table:
    """Number of pages of a task by place."""
    table = _table(f"{report.title}: pages", "where", "lazy", "size", "eager", "size", right=range(1, 5))
    memory = report.memory
    for name, count in _places(memory.extents.counts()):
        _add_row(table, *_row(name, count), style="bold red" if name == "lost" and count.total else "")
    zero = _untouched(memory.vmas, memory)
    _add_row(table, *_row("zero (never touched)", PageCount(lazy=sum(zero))))
    if memory.guards:
        lazy = sum(_guarded(memory.vmas, memory.guards))
        rest = sum(end - start for start, end in memory.guards) // PAGE_SIZE - lazy
        _add_row(table, *_row("guard (SIGSEGV)", PageCount(lazy, rest)))
    return table


def _row(name: str, count: PageCount) -> tuple[str, str, str, str, str]:
    return name, str(count.lazy), _size(count.lazy), str(count.eager), _size(count.eager)


def _untouched(vmas: Sequence[Span], memory: TaskImages) -> list[int]:
    """For each mapping the number of pages without a pagemap entry, not counting guards."""
    counts = memory.extents.counts_within(vmas)
    return [
        (vma.end - vma.start) // PAGE_SIZE - sum(place.total for _, place in _places(count)) - guards
        for vma, count, guards in zip(vmas, counts, _guarded(vmas, memory.guards), strict=True)
    ]


def _guarded(vmas: Iterable[Span], guards: Sequence[Span]) -> list[int]:
    """For each mapping the number of guard pages. Both arguments are sorted."""
    numbers, first = [], 0
    for vma in vmas:
        while first < len(guards) and guards[first].end <= vma.start:
            first += 1
        size = 0
        for guard in islice(guards, first, None):
            if guard.start >= vma.end:
                break
            size += min(guard.end, vma.end) - max(guard.start, vma.start)
        numbers.append(size // PAGE_SIZE)
    return numbers


def _mappings(report: _TaskReport, mm: MmEntry, names: dict[int, str]) -> Table:
    """The mappings of a task, with numbers of pages.

    "missing" pages are at a page server or lost. Pages without a pagemap entry are zero only in lazy-capable
    mappings; in other mappings they may be in a file.
    """
    vmas, guards = mappings(mm), report.memory.guards
    spans = [Span(vma.start, vma.end) for vma in vmas]
    counts = report.memory.extents.counts_within(spans)
    missing = any(count.remote.total or count.lost.total for count in counts)
    columns = ["address", "size", "access", "lazy", "stored", *(["missing"] if missing else []), "zero"]
    columns += ["guard"] if guards else []
    table = _table(f"{report.title}: mappings", *columns, "what", right=[1, *range(4, len(columns))])
    table.columns[-1].no_wrap = False
    rows = zip(vmas, counts, _untouched(spans, report.memory), _guarded(spans, guards), strict=True)
    for vma, count, zero, guarded in rows:
        lazy = lazy_capable(vma.flags, vma.status)
        _add_row(
            table,
            f"{vma.start:x}",
            _size((vma.end - vma.start) // PAGE_SIZE),
            _access(vma),
            "yes" if lazy else "no",
            str(sum(level.total for level in count.levels)),
            *([str(count.remote.total + count.lost.total)] if missing else []),
            str(zero) if lazy else "",
            *([str(guarded)] if guards else []),
            _what(vma, names),
        )
    return table


def _access(vma: VmaEntry) -> str:
    """The access as in /proc/<pid>/maps: PROT_READ is 1, PROT_WRITE 2, PROT_EXEC 4."""
    letters = "".join(letter if vma.prot & 1 << bit else "-" for bit, letter in enumerate("rwx"))
    return letters + ("s" if vma.flags & flags.MAP_SHARED else "p")


def _what(vma: VmaEntry, names: dict[int, str]) -> str:
    if vma.status & (flags.VMA_FILE_PRIVATE | flags.VMA_FILE_SHARED):
        return names.get(vma.shmid, f"file {vma.shmid}")
    if vma.flags & flags.MAP_GROWSDOWN:
        return "[stack]"
    return next((name for bit, name in VMA_NAMES.items() if vma.status & bit), "")


def _table(title: str, *columns: str, right: Iterable[int] = ()) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", no_wrap=True, overflow="fold")
    return table


def _add_row(table: Table, *cells: str, style: str = "") -> None:
    """Add cells without interpreting markup in them."""
    table.add_row(*map(Text, cells), style=style)


def _size(nr_pages: int) -> str:
    """The size of pages in binary units: 20.0 MiB."""
    size = float(nr_pages * PAGE_SIZE)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit in ("bytes", "KiB") else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
