"""The parts of a dump by CRIU that need no CRIU."""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from pathlib import Path

import click
import pytest

from dumptool._ptrace import ffi, lib
from dumptool.backend import Backend
from dumptool.criu import Criu, CriuDump, find_criu, reasons
from dumptool.criu_options import FLAGS, VALUES, choice
from dumptool.criu_pages import readable
from dumptool.errors import DumpError
from dumptool.later import SHARE, Later, put_off, room
from dumptool.mappings import Mapping
from dumptool.memory import Marks, Part, Runs, Source, Target, write
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT
from images_spec.messages import VmaEntry
from images_spec.pagemap import Pagemap
from lazypages.cli import probes

LAZY_DATA = PE_LAZY | PE_PRESENT


def runs(*items: tuple[int, int, int]) -> Runs:
    """Of (first page, number behind the last, flags)."""
    made = Runs()
    for start, end, flags in items:
        made.append(start * PAGE_SIZE, end * PAGE_SIZE, flags)
    return made


def marked(given: Runs, others: Runs, *, lazy: bool) -> list[tuple[int, int, int]]:
    result = given.rewritten(lib.lp_mark_unchanged, others.array, others.count, lazy)
    return [(start // PAGE_SIZE, end // PAGE_SIZE, flags) for start, end, flags in result]


def test_unchanged_pages_are_cut_out_of_runs() -> None:
    given = runs((0, 4, LAZY_DATA), (6, 10, PE_PRESENT), (12, 13, PE_LAZY))
    others = runs((1, 2, PE_PARENT), (3, 7, PE_PARENT | PE_LAZY), (8, 9, LAZY_DATA), (9, 20, PE_PARENT))
    for lazy, unchanged in ((True, PE_PARENT | PE_LAZY), (False, PE_PARENT)):
        assert marked(given, others, lazy=lazy) == [
            *((0, 1, LAZY_DATA), (1, 2, unchanged), (2, 3, LAZY_DATA), (3, 4, unchanged)),
            *((6, 7, PE_PARENT), (7, 9, PE_PRESENT), (9, 10, PE_PARENT), (12, 13, unchanged)),
        ]
    assert marked(given, runs(), lazy=True) == [(0, 4, LAZY_DATA), (6, 10, PE_PRESENT), (12, 13, PE_LAZY)]


def test_the_reasons_of_criu() -> None:
    log = (
        "(00.1) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
        "(00.2) Warn  (criu/x.c:1): harmless\n"
        "(00.3) Error (criu/sk-unix.c:1): unix: External socket is used.\n"
        "Error (criu/sk-unix.c:1): unix: External socket is used.\n"
        "(00.4)     12: Error (criu/cr-dump.c:2): Dump files (pid: 1) failed with -1\n"
        "(00.5) Error (criu/cr-dump.c:3): Dumping FAILED.\n"
    )
    assert reasons(log) == ["unix: External socket is used.", "Dump files (pid: 1) failed with -1"]


def options(**given: object) -> dict[str, object]:
    names = {name.replace("-", "_"): False for name in FLAGS} | {
        name.replace("-", "_"): () for name in VALUES
    }
    return {"backend": "auto", "criu": None, "rest": (), **names, **given}


def test_options_for_criu() -> None:
    made = choice(options(tcp_close=True, external=("mnt[a]:b", "c"), rest=("--skip-mnt", "/x")))
    assert made.backend is Backend.AUTO
    assert list(made.arguments) == [
        *("--tcp-close", "--external", "mnt[a]:b", "--external", "c", "--skip-mnt", "/x")
    ]
    for rest in (("-D", "x"), ("--images-dir=x",), ("-Dx",), ("--lazy-pages",), ("stray",)):
        with pytest.raises(click.UsageError):
            choice(options(rest=rest))
    with pytest.raises(click.UsageError, match="--tcp-close is an option of CRIU"):
        choice(options(backend="own", tcp_close=True))


def test_a_criu_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="can't be started"):
        find_criu(tmp_path / "criu")
    with pytest.raises(DumpError, match="is no CRIU"):
        find_criu(Path("/bin/true"))


def test_how_pages_are_read() -> None:
    def described(start: int, end: int, prot: int) -> Mapping:
        entry = VmaEntry(start=start * PAGE_SIZE, end=end * PAGE_SIZE, pgoff=0, shmid=0, prot=prot)
        return Mapping(
            entry, private=True, file_backed=False, lazy=True, readable=bool(prot & 1), whole=False
        )

    mappings = [described(0, 4, 3), described(4, 6, 0), described(6, 9, 1)]
    assert readable(runs((0, 4, LAZY_DATA), (4, 6, PE_LAZY), (6, 7, PE_PRESENT)), mappings)
    assert not readable(runs((3, 5, PE_PRESENT)), mappings)


def test_pages_that_are_written_later(tmp_path: Path) -> None:
    """The same file as without, and nothing before; what does not fit in memory is written at once."""
    pages = os.urandom(3000 * PAGE_SIZE)
    source = tmp_path / "source"
    source.write_bytes(pages)
    with source.open("rb") as file:
        mapped = ffi.from_buffer(mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ))
    base = int(ffi.cast("uintptr_t", mapped))
    parts = [Part(runs((0, 2000, LAZY_DATA), (2000, 2001, PE_LAZY), (2500, 3000, PE_PRESENT)), True, False)]
    with ExitStack() as resources:
        small, large = Target(tmp_path, "pagemap-1.img", 1), Target(tmp_path, "pagemap-2.img", 2)
        later, at_once = put_off([(small, 2500), (large, 2500)], 4000, resources)
        assert at_once is large
        assert isinstance(later, Later)
        for target in (later, at_once):
            write(target, Source(os.getpid(), base), parts, Marks(), lambda _pages: None)
        assert not (tmp_path / "pagemap-1.img").exists()
        later.write_out()
    assert (tmp_path / "pages-1.img").read_bytes() == (tmp_path / "pages-2.img").read_bytes()
    assert (tmp_path / "pages-1.img").read_bytes() == pages[: 2000 * PAGE_SIZE] + pages[2500 * PAGE_SIZE :]
    one, two = ({at: flags for at, _, flags in Pagemap.load(tmp_path / f"pagemap-{n}.img")} for n in (1, 2))
    assert {2000 * PAGE_SIZE: PE_LAZY, 2500 * PAGE_SIZE: PE_PRESENT}.items() <= two.items() <= one.items()


@pytest.mark.parametrize(
    ("group", "files"),
    [
        (
            "0::/a/b",
            {
                "/sys/fs/cgroup/a/b/memory.max": "max",
                "/sys/fs/cgroup/a/memory.max": str(30 << 20),
                "/sys/fs/cgroup/a/memory.current": str(20 << 20),
                "/sys/fs/cgroup/a/memory.stat": f"active_file 77\ninactive_file {6 << 20}",
            },
        ),
        (
            "3:cpu:/\n4:memory:/a",
            {
                "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(30 << 20),
                "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(20 << 20),
                "/sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 5\ntotal_inactive_file {6 << 20}",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
        ),
    ],
    ids=["v2", "v1"],
)
def test_room_in_memory(group: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a memory cgroup leaves counts, too; what it has of files can be given up."""
    monkeypatch.setattr(probes, "text_of", files.get)
    files["/proc/self/cgroup"] = group
    assert room() == (16 << 20) // PAGE_SIZE // SHARE
    files["/proc/meminfo"] = "MemTotal: 9 kB\nMemAvailable:    4096 kB\n"
    assert room() == 1024 // SHARE
    files.clear()
    assert room() == 0


CALLS_AT_ONCE = """#!/bin/sh
exec 3<"$DUMPTOOL_VERDICT"
printf 'pre-dump\\npost-dump\\n' >"$DUMPTOOL_EVENTS"
cat <&3
exit 1
"""


def test_calls_of_the_hook_that_are_heard_at_once(tmp_path: Path) -> None:
    """As by a dumptool that did not run meanwhile."""
    program = tmp_path / "criu"
    program.write_text(CALLS_AT_ONCE)
    program.chmod(0o755)
    criu = Criu(program, "4.2")
    with CriuDump(criu, [], log=tmp_path / "log", commit=None, kills=False) as dump:
        dump.start()
        assert dump.ready_since >= dump.frozen_since > 0
