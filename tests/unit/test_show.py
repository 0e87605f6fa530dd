"""``lazypages show``: the numbers it prints are those of the images, and nothing in them can upset a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from images_spec import images
from images_spec.errors import ImageError
from images_spec.flags import MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_PRIVATE, PE_LAZY, PE_PARENT, PE_PRESENT
from images_spec.images import Kind
from images_spec.messages import FileEntry, FownEntry, RegFileEntry, TaskState
from lazypages.cli.main import cli
from lazypages.cli.show import load, show
from tests.unit.test_images_checkpoint import Draft, chained

ANON = MAP_PRIVATE | MAP_ANONYMOUS
HERE, LAZY, PARENT = PE_PRESENT, PE_LAZY, PE_PARENT


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    draft = Draft(tmp_path / "top")
    draft.write()
    return draft


def shown(directory: Path, *, terminal: bool = False, width: int = 80, each: bool = True) -> list[str]:
    """The lines that it prints, without spaces at their ends."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    show(load(directory), console, each=each)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def table(lines: list[str], title: str) -> list[list[str]]:
    """The rows under a title and its headings, split at two spaces and more."""
    start = lines.index(title) + 2
    rows = lines[start : lines.index("", start)]
    return [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]


def name_file(draft: Draft, ident: int, name: bytes) -> None:
    fown = FownEntry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    reg = RegFileEntry(id=ident, flags=0, pos=0, fown=fown, name=name)
    images.write(draft.directory / "files.img", Kind.FILES, [FileEntry(type=1, id=ident, reg=reg)])


def test_pages_by_where_they_are(draft: Draft) -> None:
    _, parent, grandparent = chained(draft, "second", "third")
    draft.mm(10, [(0x10, 0x110, ANON), (0x200, 0x204, MAP_PRIVATE)])
    draft.memory(
        10,
        [
            (0x10, 3, LAZY | HERE),
            (0x13, 1, HERE),
            (0x20, 0x20, PARENT | LAZY),
            (0x50, 7, LAZY),
            (0x60, 2, PARENT),
            (0x200, 1, HERE),
        ],
    )
    parent.memory(10, [(0x20, 10, HERE), (0x2A, 20, PARENT)])
    grandparent.memory(10, [(0x2A, 20, HERE)])
    lines = shown(draft.directory)
    assert table(lines, "task (10): pages") == [
        ["own images", "3", "12 KiB", "2", "8 KiB"],
        ["parent, level 1", "10", "40 KiB", "0", "0 bytes"],
        ["parent, level 2", "20", "80 KiB", "0", "0 bytes"],
        ["page server", "7", "28 KiB", "0", "0 bytes"],
        ["lost", "2", "8 KiB", "2", "8 KiB"],
        ["zero (never touched)", "211", "844 KiB", "0", "0 bytes"],
    ]
    assert table(lines, "task (10): mappings") == [
        ["10000", "1.0 MiB", "rw-p", "yes", "34", "11", "211"],
        ["200000", "16 KiB", "rw-p", "no", "1", "0", "file 1"],
    ]
    assert table(lines, "Chain of images") == [
        ["0 (own)", str(draft.directory)],
        ["1 (parent)", str(parent.directory.resolve())],
        ["2 (parent)", str(grandparent.directory.resolve())],
    ]


def test_nothing_missing_has_no_column_for_it(draft: Draft) -> None:
    lines = shown(draft.directory)
    headings = lines[lines.index("task (10): mappings") + 1]
    assert headings.split() == ["address", "size", "access", "lazy", "stored", "zero", "what"]
    assert table(lines, "task (10): mappings") == [["10000", "64 KiB", "rw-p", "yes", "3", "13"]]


def test_guards_are_neither_data_nor_zero(draft: Draft) -> None:
    draft.mm(10, [(0x10, 0x20, ANON), (0x20, 0x28, ANON), (0x30, 0x34, MAP_PRIVATE)])
    draft.guard(10, 0x1E, 0x22)
    draft.guard(10, 0x24, 0x25)
    draft.guard(10, 0x31, 0x33)
    lines = shown(draft.directory)
    pages = table(lines, "task (10): pages")
    assert pages[-2:] == [
        ["zero (never touched)", "16", "64 KiB", "0", "0 bytes"],
        ["guard (SIGSEGV)", "5", "20 KiB", "2", "8 KiB"],
    ]
    assert table(lines, "task (10): mappings") == [
        ["10000", "64 KiB", "rw-p", "yes", "3", "11", "2"],
        ["20000", "32 KiB", "rw-p", "yes", "0", "5", "3"],
        ["30000", "16 KiB", "rw-p", "no", "0", "2", "file 1"],
    ]


def test_tree_of_tasks(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "top", tasks={10: 0, 11: 10, 12: 11, 13: 10, 14: 10, 15: 10})
    draft.write()
    draft.core(11, TaskState.TASK_STOPPED)
    draft.core(12, TaskState.TASK_DEAD, 7 << 8)
    draft.core(13, TaskState.TASK_DEAD, 9)
    draft.core(14, TaskState.TASK_DEAD, 0x7F)
    draft.core(15, 77)
    lines = shown(draft.directory)
    start = lines.index("task (10): alive, 1 thread, 12 KiB of memory")
    assert lines[start + 1 : start + 6] == [
        "├── task (11): stopped, 1 thread, 12 KiB of memory",
        "│   └── task (12): zombie, exit status 7",
        "├── task (13): zombie, killed by signal 9",
        "├── task (14): zombie, killed by signal 127",
        "└── task (15): state 77, 1 thread, 12 KiB of memory",
    ]
    assert "task (12): pages" not in lines
    assert "task (15): pages" in lines


def test_names_of_mappings(draft: Draft) -> None:
    draft.mm(10, [(0x10, 0x20, ANON), (0x30, 0x31, MAP_PRIVATE), (0x40, 0x41, ANON | MAP_GROWSDOWN)])
    name_file(draft, 1, b"/lib/some.so")
    rows = table(shown(draft.directory), "task (10): mappings")
    assert [row[-1] for row in rows] == ["13", "/lib/some.so", "[stack]"]


def test_names_are_text_and_nothing_else(draft: Draft) -> None:
    """Neither markup nor control characters nor a broken encoding; CRIU takes names as they come."""
    draft.mm(10, [(0x10, 0x20, ANON), (0x30, 0x31, MAP_PRIVATE)])
    name_file(draft, 1, b"/[red]x[/red]\x1b[31m\xff\xc2\x9b\nend")
    core = images.read_one(draft.directory / "core-10.img", Kind.CORE)
    core.tc.comm = b"[b]\x07bell[/b]"
    images.write(draft.directory / "core-10.img", Kind.CORE, [core])
    for terminal in (False, True):
        lines = shown(draft.directory, terminal=terminal, width=200)
        title = "[b]\\x07bell[/b] (10)"
        assert f"{title}: alive, 1 thread, 12 KiB of memory" in lines
        assert table(lines, f"{title}: mappings")[1][-1] == "/[red]x[/red]\\x1b[31m\\xff\\x9b\\x0aend"


def test_lines_are_whole_unless_on_a_terminal(draft: Draft) -> None:
    draft.mm(10, [(0x10, 0x20, ANON), (0x30, 0x31, MAP_PRIVATE)])
    name = b"/" + b"long/" * 100
    name_file(draft, 1, name)
    assert table(shown(draft.directory), "task (10): mappings")[1][-1] == name.decode()
    lines = shown(draft.directory, terminal=True)
    assert max(map(len, lines)) <= 80
    assert name.decode() not in "".join(lines)


@pytest.mark.parametrize(
    "name", ["inventory.img", "pstree.img", "core-10.img", "mm-10.img", "pagemap-10.img"]
)
def test_a_broken_image_is_told_before_anything_is_shown(draft: Draft, name: str) -> None:
    (draft.directory / name).write_bytes(b"not an image")
    console = Console(file=io.StringIO())
    with pytest.raises(ImageError, match=rf"/{name}: magic"):
        show(load(draft.directory), console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_broken_names_are_told_as_well(draft: Draft) -> None:
    (draft.directory / "files.img").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"/files\.img: magic"):
        shown(draft.directory)


def test_the_short_form_has_all_tasks_in_two_tables(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "top", tasks={10: 0, 11: 10, 12: 11})
    draft.write()
    draft.core(12, TaskState.TASK_DEAD, 9)
    vmas = [
        (0x10, 0x20, ANON),
        (0x30, 0x31, MAP_PRIVATE),
        (0x32, 0x33, MAP_PRIVATE),
        (0x40, 0x41, ANON | MAP_GROWSDOWN),
    ]
    draft.mm(10, vmas)
    name_file(draft, 1, b"/lib/some.so")
    lines = shown(draft.directory, each=False)
    assert table(lines, "all 2 tasks: pages") == [
        ["own images", "4", "16 KiB", "2", "8 KiB"],
        ["page server", "0", "0 bytes", "0", "0 bytes"],
        ["lost", "0", "0 bytes", "0", "0 bytes"],
        ["zero (never touched)", "27", "108 KiB", "0", "0 bytes"],
    ]
    assert table(lines, "all 2 tasks: mappings by kind") == [
        ["anonymous memory", "2", "128 KiB", "6", "26"],
        ["files", "2", "8 KiB", "0", "0"],
        ["[stack]", "1", "4 KiB", "0", "1"],
    ]


def test_json_has_the_same(draft: Draft) -> None:
    draft.mm(10, [(0x10, 0x20, ANON), (0x30, 0x34, MAP_PRIVATE)])
    draft.memory(10, [(0x10, 3, LAZY | HERE), (0x13, 1, HERE), (0x14, 2, LAZY)])
    draft.guard(10, 0x1E, 0x20)
    done = CliRunner().invoke(cli, ["show", "--json", str(draft.directory)])
    assert done.exit_code == 0
    mapping = {"start": "0x10000", "end": "0x20000", "access": "rw-p", "lazy": True, "what": ""}
    other = {"start": "0x30000", "end": "0x34000", "access": "rw-p", "lazy": False, "what": "file 1"}
    nothing = {"lazy": 0, "eager": 0}
    assert json.loads(done.output) == {
        "format": 1,
        "chain": [str(draft.directory)],
        "tasks": [
            {
                "pid": 10,
                "ppid": 0,
                "program": "task",
                "state": "alive",
                "wait_status": None,
                "threads": [10],
                "pages": {
                    "local": {"lazy": 3, "eager": 1},
                    "remote": {"lazy": 2, "eager": 0},
                    "lost": nothing,
                    "zero": {"lazy": 8, "eager": 0},
                    "guard": {"lazy": 2, "eager": 0},
                },
                "mappings": [
                    mapping | {"stored": 4, "missing": 2, "zero": 8, "guard": 2},
                    other | {"stored": 0, "missing": 0, "zero": None, "guard": 0},
                ],
            }
        ],
    }
