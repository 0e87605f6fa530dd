"""``lazypages show DIR``: prints the contents of an image directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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
from images_spec.packing import unpack_without_pages
from images_spec.placement import PageCount, PageCounts, Span, mappings
from lazypages.cli.packs import opened
from lazypages.wording import count, printable

WIDE = 10_000
"""Width in columns, larger than any line."""

FORMAT = 1
"""Of the JSON: raised when a field changes its meaning or goes."""

LABELS = {
    "local": "own images",
    "remote": "page server",
    "zero": "zero (never touched)",
    "guard": "guard (SIGSEGV)",
}
"""Names of places in tables; in JSON they have the names of `serve`'s summaries."""

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


class _Mapping(NamedTuple):
    """A mapping, with numbers of pages.

    ``missing``: at a page server or lost. ``zero``: without a pagemap entry; None if it is not lazy-capable: such
    pages may be in a file.
    """

    start: int
    end: int
    access: str
    lazy: bool
    stored: int
    missing: int
    zero: int | None
    guard: int
    what: str

    @property
    def pages(self) -> int:
        return (self.end - self.start) // PAGE_SIZE


@dataclass(frozen=True)
class Shown:
    """What is printed: a checkpoint whose images have all been read. ``chain``: directories, or one pack."""

    chain: tuple[Path | str, ...]
    reports: list[_TaskReport]
    mappings: dict[int, list[_Mapping]]


def load(path: Path | str) -> Shown:
    """Read all images of a directory or a packed checkpoint. Raises ``ImageError``, ``LinkError``.

    A lazy page that is in no image is counted as being at a page server.
    """
    if isinstance(path, str) or path.is_file():
        with opened(path) as reader, tempfile.TemporaryDirectory(prefix="lazypages-show-") as folder:
            unpack_without_pages(reader, Path(folder))
            return replace(load(Path(folder)), chain=(path,))
    checkpoint = open_checkpoint(path)
    reports = [_load(checkpoint, task) for task in checkpoint.tasks]
    names = _file_names(path)
    found = {report.task.pid: _mappings(report, report.mm, names) for report in reports if report.mm}
    return Shown(checkpoint.chain, reports, found)


def show(shown: Shown, console: Console, *, each: bool = False) -> None:
    """Print chain and tree, and where the pages of all tasks are. ``each``: of each task, with each mapping."""
    _print(console, _chain(shown.chain))
    _print(console, _tree(shown.reports))
    alive = [report for report in shown.reports if report.mm is not None]
    if each:
        for report in alive:
            _print(console, _pages([report], f"{report.title}: pages"))
            _print(console, _each_mapping(report.title, shown.mappings[report.task.pid]))
    elif alive:
        everything = [mapping for of_task in shown.mappings.values() for mapping in of_task]
        whose = f"all {len(alive)} tasks" if len(alive) > 1 else alive[0].title
        _print(console, _pages(alive, f"{whose}: pages"))
        _print(console, _kinds(f"{whose}: mappings by kind", everything))
        console.print(f"--mappings prints each of the {count(len(everything), 'mapping')}.", soft_wrap=True)


def as_dict(shown: Shown) -> dict[str, Any]:
    """For JSON. Addresses are strings: not every reader of JSON has integers of 64 bits."""
    return {
        "format": FORMAT,
        "chain": [str(directory) for directory in shown.chain],
        "tasks": [_task_as_dict(report, shown.mappings.get(report.task.pid, [])) for report in shown.reports],
    }


def _task_as_dict(report: _TaskReport, found: list[_Mapping]) -> dict[str, Any]:
    core = report.core.tc
    places = {} if report.memory.is_dead else dict(_all_places([report]))
    return {
        "pid": report.task.pid,
        "ppid": report.task.ppid,
        "program": printable(core.comm),
        "state": STATES.get(core.task_state, f"state {core.task_state}"),
        "wait_status": core.exit_code if report.memory.is_dead else None,
        "threads": list(report.task.threads),
        "pages": {name: {"lazy": place.lazy, "eager": place.eager} for name, place in places.items()},
        "mappings": [
            mapping._asdict() | {"start": f"{mapping.start:#x}", "end": f"{mapping.end:#x}"}
            for mapping in found
        ],
    }


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


def _chain(chain: tuple[Path | str, ...]) -> Table:
    table = _table("Chain of images", "level", "directory")
    for level, directory in enumerate(chain):
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
    size = _total(report.memory.extents.counts())
    return Text(
        f"{report.title}: {state}, {number} thread{'s' if number != 1 else ''}, {_size(size)} of memory"
    )


def _ending(status: int) -> str:
    """The end of a zombie, from its wait(2) status."""
    return f"killed by signal {status & 0x7F}" if status & 0x7F else f"exit status {status >> 8 & 0xFF}"


def _total(counts: PageCounts) -> int:
    return sum(place.total for place in (*counts.levels, counts.remote, counts.lost))


def _all_places(reports: Iterable[_TaskReport]) -> Iterable[tuple[str, PageCount]]:
    """Numbers of pages of live tasks by place, with those that are in no image."""
    levels: list[PageCount] = []
    others = {name: PageCount() for name in ("remote", "lost", "zero", "guard")}
    for report in reports:
        memory = report.memory
        counts = memory.extents.counts()
        levels += [PageCount()] * (len(counts.levels) - len(levels))
        for level, place in enumerate(counts.levels):
            levels[level] = _sum(levels[level], place)
        guarded = sum(_guarded(memory.vmas, memory.guards))
        all_guards = sum(end - start for start, end in memory.guards) // PAGE_SIZE
        for name, place in (
            ("remote", counts.remote),
            ("lost", counts.lost),
            ("zero", PageCount(lazy=sum(_untouched(memory.vmas, memory)))),
            ("guard", PageCount(guarded, all_guards - guarded)),
        ):
            others[name] = _sum(others[name], place)
    for level, place in enumerate(levels):
        yield (f"parent-{level}" if level else "local"), place
    yield from others.items()


def _sum(one: PageCount, other: PageCount) -> PageCount:
    return PageCount(one.lazy + other.lazy, one.eager + other.eager)


def _pages(reports: Iterable[_TaskReport], title: str) -> Table:
    """Number of pages of tasks by place."""
    table = _table(title, "where", "lazy", "size", "eager", "size", right=range(1, 5))
    for name, place in _all_places(reports):
        if place.total or name != "guard":
            label = LABELS.get(name, name.replace("parent-", "parent, level "))
            _add_row(table, *_row(label, place), style="bold red" if name == "lost" and place.total else "")
    return table


def _row(name: str, count: PageCount) -> tuple[str, str, str, str, str]:
    return name, str(count.lazy), _size(count.lazy), str(count.eager), _size(count.eager)


def _untouched(vmas: Sequence[Span], memory: TaskImages) -> list[int]:
    """For each mapping the number of pages without a pagemap entry, not counting guards."""
    counts = memory.extents.counts_within(vmas)
    return [
        (vma.end - vma.start) // PAGE_SIZE - _total(count) - guards
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


def _mappings(report: _TaskReport, mm: MmEntry, names: dict[int, str]) -> list[_Mapping]:
    """The mappings of a task."""
    vmas = mappings(mm)
    spans = [Span(vma.start, vma.end) for vma in vmas]
    counts = report.memory.extents.counts_within(spans)
    zeros, guards = _untouched(spans, report.memory), _guarded(spans, report.memory.guards)
    found = []
    for vma, place, zero, guard in zip(vmas, counts, zeros, guards, strict=True):
        lazy = lazy_capable(vma.flags, vma.status)
        stored, missing = sum(level.total for level in place.levels), place.remote.total + place.lost.total
        values = lazy, stored, missing, zero if lazy else None, guard
        found.append(_Mapping(vma.start, vma.end, _access(vma), *values, _what(vma, names)))
    return found


def _each_mapping(title: str, found: list[_Mapping]) -> Table:
    missing, guards = any(one.missing for one in found), any(one.guard for one in found)
    columns = ["address", "size", "access", "lazy", "stored", *(["missing"] if missing else []), "zero"]
    columns += ["guard"] if guards else []
    table = _table(f"{title}: mappings", *columns, "what", right=[1, *range(4, len(columns))])
    table.columns[-1].no_wrap = False
    for one in found:
        _add_row(
            table,
            f"{one.start:x}",
            _size(one.pages),
            one.access,
            "yes" if one.lazy else "no",
            str(one.stored),
            *([str(one.missing)] if missing else []),
            "" if one.zero is None else str(one.zero),
            *([str(one.guard)] if guards else []),
            one.what,
        )
    return table


def _kinds(title: str, found: list[_Mapping]) -> Table:
    """Mappings by kind: all files are one."""
    kinds: dict[str, list[_Mapping]] = {}
    for one in sorted(found, key=lambda one: -one.stored):
        kinds.setdefault(_kind(one), []).append(one)
    missing, guards = any(one.missing for one in found), any(one.guard for one in found)
    columns = ["number", "size", "stored", *(["missing"] if missing else []), "zero"]
    columns += ["guard"] if guards else []
    table = _table(title, "what", *columns, right=range(1, len(columns) + 1))
    rows = [(kind, of_kind, sum(one.stored for one in of_kind)) for kind, of_kind in kinds.items()]
    for kind, of_kind, stored in sorted(rows, key=lambda row: -row[2]):
        _add_row(
            table,
            kind,
            str(len(of_kind)),
            _size(sum(one.pages for one in of_kind)),
            str(stored),
            *([str(sum(one.missing for one in of_kind))] if missing else []),
            str(sum(one.zero or 0 for one in of_kind)),
            *([str(sum(one.guard for one in of_kind))] if guards else []),
        )
    return table


def _kind(mapping: _Mapping) -> str:
    if mapping.what.startswith(("/", "file ")):
        return "files"
    return mapping.what or "anonymous memory"


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
