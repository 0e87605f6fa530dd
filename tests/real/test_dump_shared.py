"""Shared memory in pre-dumps and dumps: written in every way between them, restored by real CRIU, byte for byte."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from images_spec.flags import PAGE_SIZE, PE_PARENT, PE_PRESENT
from images_spec.images import Kind
from images_spec.pagemap import Pagemap
from tests.real.test_criu_namespace import NAMESPACE
from tests.real.test_dump_backend import by_criu
from tests.real.test_dump_lazy import lazy_dump, ours
from tests.support.compiling import PROGRAMS, compiled
from tests.support.criu import Criu
from tests.support.dumptool import check, reap_all, stats
from tests.support.processes import descendants, end, nothing_left, start, wait_for

PAGES = 1024
CUT = 100
WRITTEN = 31
"""Pages that a step writes at most, in each piece; see sharing.c."""
OWN_IPC = ("unshare", "--ipc")
"""CRIU dumps System V shared memory only with its namespace."""


IN_FLIGHT = """
import os, socket, time
fd = os.memfd_create("flying")
os.write(fd, b"x" * 8192)
one, other = socket.socketpair()
socket.send_fds(one, [b"!"], [fd])
os.close(fd)
open("ready", "w").close()
while not os.path.exists("check"):
    time.sleep(0.01)
_, (fd,), _, _ = socket.recv_fds(other, 10, 1)
with open("verdict.new", "w") as file:
    file.write("right\\n" if os.pread(fd, 9000, 0) == b"x" * 8192 else "wrong\\n")
os.rename("verdict.new", "verdict")
"""


@dataclass
class Sharing:
    """A running `sharing.c`."""

    pid: int
    folder: Path
    number: int = 0

    def step(self) -> None:
        (self.folder / f"step-{self.number}").touch()
        done = self.folder / f"done-{self.number}"
        wait_for("a step", done.exists)
        self.number += 1

    def is_right(self) -> None:
        """Here, or where it was restored."""
        (self.folder / "check").touch()
        verdict = self.folder / "verdict"
        wait_for("the verdict", verdict.exists)
        assert verdict.read_text() == "right\n"

    def kinds(self, images: Path) -> list[dict[int, int]]:
        """Of each piece of shared memory in a level: page -> flags."""
        return [
            {
                entry.vaddr // PAGE_SIZE + i: entry.flags
                for entry in Pagemap.load(path)
                for i in range(entry.nr_pages)
            }
            for path in sorted(images.glob(Kind.PAGEMAP.file_name("shmem-*")))
        ]


@contextmanager
def sharing(folder: Path, *kinds: str, prefix: Sequence[str] = ()) -> Iterator[Sharing]:
    """With its memory filled. Ended on the way out."""
    program = compiled(PROGRAMS / "sharing.c")
    with nothing_left():
        process = start([*prefix, program, *kinds], cwd=folder)
        running = Sharing(process.pid, folder)
        running.step()
        yield running


def dumped(running: Sharing, folder: Path, *options: str) -> Path:
    """Two pre-dumps with a step behind each, and the dump."""
    check("pre-dump", "-t", running.pid, "-D", folder / "1")
    running.step()
    check("pre-dump", "-t", running.pid, "-D", folder / "2", "--prev-images-dir", "../1")
    running.step()
    check("dump", "-t", running.pid, "-D", folder / "3", "--prev-images-dir", "../2", *options)
    return folder / "3"


def in_parents(running: Sharing, top: Path, pieces: int) -> None:
    """Only what was written is written, also in the second pre-dump."""
    for level in (top, top.parent / "2"):
        found = running.kinds(level)
        assert len(found) == pieces
        for flags in found:
            assert set(flags.values()) == {PE_PARENT, PE_PRESENT}
            assert list(flags.values()).count(PE_PRESENT) <= WRITTEN
            assert len(flags) > PAGES - CUT - 10
    counted = stats(top)
    assert counted.shpages_skipped_parent > (PAGES - CUT - WRITTEN - 10) * pieces
    assert counted.shpages_written <= WRITTEN * pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criu", "goes_on"), [(Criu("4.1"), True), (Criu("4.2"), False)], ids=["4.1-goes-on", "4.2"]
)
def test_written_in_every_way(criu: Criu, goes_on: bool, tmp_path: Path) -> None:
    """A tree that goes on is ended later, when its memory has changed again."""
    with sharing(tmp_path, "anon", "memfd", "open", "sysv", "detached", prefix=OWN_IPC) as running:
        top = dumped(running, tmp_path, *by_criu(criu), *(["-R"] if goes_on else []))
        if goes_on:
            running.step()
            end(list(descendants()))
        reap_all()
        found = running.kinds(top)
        whole = [flags for flags in found if set(flags.values()) == {PE_PRESENT}]
        assert (len(found), len(whole)) == (5, 2)  # those of System V are CRIU's
        criu.restore(top, work=tmp_path, lazy=False)
        running.is_right()


@pytest.mark.slow
def test_restored_lazily(tmp_path: Path) -> None:
    """Shared memory is there from the start, the rest comes from the stopped tree."""
    criu, work = Criu("4.2"), tmp_path / "work"
    work.mkdir()
    with sharing(tmp_path, "anon", "memfd") as running:
        check("pre-dump", "-t", running.pid, "-D", tmp_path / "1")
        running.step()
        top = tmp_path / "2"
        with lazy_dump(running.pid, top, "--prev-images-dir", "../1", *by_criu(criu)) as source:
            source.wait_ready()
            assert all(PE_PARENT in flags.values() for flags in running.kinds(top))
            with ours(source.port).start(top, work) as server:
                server.wait_ready()
                command = [criu.path, "restore", "-D", top, "-W", work, "--lazy-pages", "-o", "restore.log"]
                start([*NAMESPACE, *command], cwd=tmp_path)
                wait_for("the end of the daemon", lambda: server.process.poll() is not None)
                assert server.wait() == 0
                assert source.wait() == 0
                running.is_right()


@pytest.mark.slow
def test_by_dumptool_alone(tmp_path: Path) -> None:
    """Pages behind the end of what is mapped are nowhere: CRIU's restore would leave out what is before them."""
    with sharing(tmp_path, "anon", "cut") as running:
        top = dumped(running, tmp_path, "--backend", "own")
        reap_all()
        in_parents(running, top, 2)
        Criu("4.2").restore(top, work=tmp_path, lazy=False)
        running.is_right()
        end(list(descendants()))
        for name in ("check", "verdict"):
            (tmp_path / name).unlink()
        start([sys.executable, "-m", "lazypages", "restore", "-D", top], cwd=tmp_path)
        running.is_right()


def test_what_only_criu_finds(tmp_path: Path) -> None:
    """A memfd on its way through a socket: the tree is dumped once more, with CRIU's own copy, and what was tracked."""
    criu, top = Criu("4.2"), tmp_path / "top"
    with nothing_left():
        process = start([sys.executable, "-c", IN_FLIGHT], cwd=tmp_path)
        wait_for("the descriptor to be sent", (tmp_path / "ready").exists)
        tracked = ["--dirty-tracking", "uffd-wp"]
        check("pre-dump", "-t", process.pid, "-D", tmp_path / "1", *tracked)
        parents = ["--prev-images-dir", "../1"]
        said = check("dump", "-t", process.pid, "-D", top, *parents, *tracked, *by_criu(criu))
        assert re.search(
            r"no process has shared memory \d+ mapped or open; the tree goes on, and is dumped once", said
        )
        counted = stats(top)
        assert counted.pages_skipped_parent > counted.pages_written
        reap_all()
        criu.restore(top, work=tmp_path, lazy=False)
        Sharing(process.pid, tmp_path).is_right()
