"""The files of csrc/serve are rooms on floors: each calls only what lies on a lower floor, so there is no circle.

What a file defines and what it needs is read from its object file. The drawing in docs/architecture.md is this.
"""

import re
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SERVE = CSRC / "serve"

CHANNEL = {"channel", "channel_receive", "channel_send"}

#: From the ground up. A new file is put on the lowest floor that it can be on.
FLOORS = (
    {
        *("space_extents", "space_regions", "space_wiped", "ranges", "readahead", "faults", "lock", "level"),
        *("uffd_ops", "smaps", "trace", "follow", "pace", "exits", "proc_connector", "calls"),
        *("channel_requests", "deferred_pages", "cold"),
    },
    {"space_pages", "old_length", "guard_takeover", "guarded", "wake", "tracers"} | CHANNEL,
    {"space_doubts", "fault_plan", "deferred", "guard", "channels"},
    {"space_changes", "address_space"},
    {"space_order", "doubt", "late", "memory", "stats", "events"},
    {"asking", "copy", "lost", "wiped"},
    {"deliver", "fault", "read_events", "task", "transfer"},
    {"channel_tasks", "forks"},
    {"layout"},
    {"lifecycle", "serve_task"},
    {"engine"},
)

#: They decide by what they are given, and know no system call.
SPACE = {"address_space", *(path.stem for path in SERVE.glob("space_*.c"))}
PURE = SPACE | {"ranges", "readahead", "pace", "cold", "faults", "doubt", "late", "fault_plan"}
MEMORY = {
    "malloc",
    "calloc",
    "realloc",
    "free",
    "aligned_alloc",
    "madvise",
    "qsort_r",
    "memcpy",
    "memmove",
    "memset",
}
LINKER = {"_GLOBAL_OFFSET_TABLE_", "__errno_location", "__stack_chk_fail", "__popcountdi2"}

#: Files that make ioctls: on a userfaultfd, on /proc/PID/pagemap, on a pidfd.
IOCTLS = {"uffd_ops", "guarded", "exits"}

#: They work without the engine's types (serving.h).
LEAVES = (
    FLOORS[0] | PURE | {"old_length", "guard", "guard_takeover", "guarded", "tracers", "channels"} | CHANNEL
)


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[set[str], set[str]]]:
    """By file: what it defines for others, and what it needs of others."""
    folder = tmp_path_factory.mktemp("objects")
    sources = sorted(SERVE.glob("*.c"))
    compilers = [
        subprocess.Popen(["gcc", "-std=gnu11", "-O0", f"-I{CSRC}", "-c", *sources[half::2]], cwd=folder)
        for half in (0, 1)
    ]
    assert [compiler.wait() for compiler in compilers] == [0, 0]
    result = {}
    for source in sources:
        listing = subprocess.run(
            ["nm", folder / f"{source.stem}.o"], check=True, capture_output=True, text=True
        ).stdout
        rows = [line.split()[-2:] for line in listing.splitlines()]
        result[source.stem] = (
            {name for kind, name in rows if kind in "TDBRC"},
            {name for kind, name in rows if kind == "U"},
        )
    return result


def test_every_file_has_a_floor(symbols: dict[str, tuple[set[str], set[str]]]) -> None:
    assert set.union(*FLOORS) == set(symbols)
    assert sum(map(len, FLOORS)) == len(symbols)


def test_calls_go_down(symbols: dict[str, tuple[set[str], set[str]]]) -> None:
    owner = {name: room for room, (defined, _) in symbols.items() for name in defined}
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = {
        f"{room} calls {owner[name]} ({name})"
        for room, (_, needed) in symbols.items()
        for name in needed
        if name in owner and floor[owner[name]] >= floor[room]
    }
    assert not wrong


def test_pure_is_pure(symbols: dict[str, tuple[set[str], set[str]]]) -> None:
    ours = {name for defined, _ in symbols.values() for name in defined}
    needed = {room: symbols[room][1] - ours - MEMORY - LINKER for room in PURE}
    assert not any(needed.values()), needed


def test_ioctls_have_few_homes(symbols: dict[str, tuple[set[str], set[str]]]) -> None:
    assert {room for room, (_, needed) in symbols.items() if "ioctl" in needed} == IOCTLS


def test_leaves_do_not_know_the_engine() -> None:
    def included(path: Path, seen: set[str]) -> set[str]:
        for name in re.findall(r'^#include "(?:serve/)?([^"]+)"', path.read_text(), re.MULTILINE):
            if name not in seen:
                seen.add(name)
                included(SERVE / name if (SERVE / name).exists() else CSRC / name, seen)
        return seen

    for room in LEAVES:
        assert not included(SERVE / f"{room}.c", set()) & {"serving.h", "engine.h"}, room
