"""Pre-dumps of a program that writes known pages: exactly those are in each level, and what is restored is right."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from images_spec.flags import PE_LAZY, PE_PARENT, PE_PRESENT
from tests.real.test_dump_tracking import cases, methods
from tests.support.compiling import compiled
from tests.support.criu import RELEASES, Criu, newest_on_every_kernel
from tests.support.dumptool import COMMAND, check, pages, reap_all, run, stats, task, tracker_of
from tests.support.processes import Server, reap, wait_for
from tests.support.restore import our_daemon

SOURCE = Path(__file__).parent.parent / "support" / "programs" / "writer.c"
EXACT = [method for method in methods() if method in ("uffd-wp", "compare")]
"""Soft-dirty bits are those of a whole huge page."""
TRACKING = "uffd-wp" if "uffd-wp" in EXACT else "soft-dirty"
PAGES = 4096
PAGE = 4096


def written_in(step: int) -> set[int]:
    """The pages of the table that the writer writes in a step; see writer.c."""
    return set(range(0, min(PAGES, step * 500), step + 1)) if step else set(range(PAGES))


@pytest.fixture(scope="module")
def writer() -> Path:
    return compiled(SOURCE)


@dataclass
class Writer:
    pid: int
    output: Path
    step: int = 0

    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()

    @property
    def table(self) -> int:
        return int(self.lines()[0], 16)

    def next_step(self) -> None:
        self.step += 1
        os.kill(self.pid, signal.SIGUSR1)
        wait_for("a step", lambda: f"step {self.step}" in self.lines())

    def table_flags(self, images: Path) -> dict[int, int]:
        """Page number in the table -> flags in that level."""
        flags = pages(images, self.pid)
        return {i: flags[self.table + i * PAGE] for i in range(PAGES) if self.table + i * PAGE in flags}

    def ends_right(self) -> None:
        os.kill(self.pid, signal.SIGUSR2)
        assert reap(self.pid) == 0
        assert self.lines()[-1] == "right right"


@pytest.fixture
def running(writer: Path, tmp_path: Path) -> Iterator[Writer]:
    output = tmp_path / "output"
    with task(writer, output=output) as pid:
        wait_for("the table", lambda: output.read_text().endswith("\n"))
        yield Writer(pid, output)


def chain(running: Writer, folder: Path, *options: str) -> Path:
    """Three pre-dumps with a step after each, and the dump: its images."""
    parent: list[str] = []
    for number in range(3):
        check("pre-dump", "-t", running.pid, "-D", folder / str(number), *parent, *options)
        running.next_step()
        parent = ["--prev-images-dir", f"../{number}"]
    check("dump", "-t", running.pid, "-D", folder / "3", *parent, *options)
    reap_all()
    return folder / "3"


@pytest.mark.loop("criu-4.2-lazy-uffd-wp")
@pytest.mark.parametrize("method", cases(EXACT))
@pytest.mark.parametrize("parents", ["lazy", "eager"])
@pytest.mark.parametrize("criu", newest_on_every_kernel())
def test_exactly_what_was_written(
    criu: Criu, parents: str, method: str, running: Writer, tmp_path: Path
) -> None:
    top = chain(running, tmp_path, "--parent-pages", parents, "--dirty-tracking", method)
    unchanged = PE_PARENT | (PE_LAZY if parents == "lazy" else 0)
    for level in range(4):
        expected = {
            page: PE_PRESENT | PE_LAZY if page in written_in(level) else unchanged for page in range(PAGES)
        }
        assert running.table_flags(tmp_path / str(level)) == expected, f"level {level}"
    counted = stats(top)
    assert counted.pages_written < 1000 + len(written_in(3))
    assert counted.pages_skipped_parent >= PAGES - len(written_in(3))
    criu.restore(top, work=tmp_path, lazy=False)
    running.ends_right()


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_unchanged_pages_come_lazily_from_the_parents(release: str, running: Writer, tmp_path: Path) -> None:
    top = chain(running, tmp_path)
    with our_daemon().start(top, tmp_path) as server:
        server.wait_ready()
        Criu(release).restore(top, work=tmp_path)
        running.ends_right()
        assert server.wait() == 0


@pytest.mark.slow
def test_a_dump_that_is_left_running_can_be_the_parent(running: Writer, tmp_path: Path) -> None:
    """--track-mem --leave-running: a full dump, and then only what has changed since."""
    check("dump", "-t", running.pid, "-D", tmp_path / "0", "-R", "--track-mem")
    running.next_step()
    check("dump", "-t", running.pid, "-D", tmp_path / "1", "--prev-images-dir", "../0")
    reap_all()
    flags = running.table_flags(tmp_path / "1")
    assert {page for page, flag in flags.items() if flag & PE_PRESENT} == written_in(1)
    Criu("4.1").restore(tmp_path / "1", work=tmp_path, lazy=False)
    running.ends_right()


@pytest.mark.slow
def test_lazy_pages_are_left_out(running: Writer, tmp_path: Path) -> None:
    """`dump --lazy-pages`: LAZY without data for what has changed. A signal while it serves: the task goes on."""
    check("pre-dump", "-t", running.pid, "-D", tmp_path / "0")
    running.next_step()
    options = ["-t", str(running.pid), "-D", str(tmp_path / "1"), "--prev-images-dir", "../0", "--lazy-pages"]
    with Server([*COMMAND, "dump", *options], output=tmp_path / "dump.out") as serving:
        serving.wait_ready()
        serving.signal(signal.SIGTERM)
        assert serving.wait() == 1
    flags = running.table_flags(tmp_path / "1")
    assert flags == {page: PE_LAZY if page in written_in(1) else PE_PARENT | PE_LAZY for page in range(PAGES)}
    counted = stats(tmp_path / "1")
    assert counted.pages_lazy >= len(written_in(1))
    assert (tmp_path / "1" / "pages-1.img").stat().st_size == counted.pages_written * PAGE
    status = Path(f"/proc/{running.pid}/status").read_text()
    assert "TracerPid:\t0" in status
    running.ends_right()


def test_tracking_leaves_no_trace(running: Writer, tmp_path: Path) -> None:
    check("pre-dump", "-t", running.pid, "-D", tmp_path / "0")
    assert tracker_of(running.pid)
    check("dump", "-t", running.pid, "-D", tmp_path / "1", "--prev-images-dir", "../0", "-R")
    assert tracker_of(running.pid) is None
    assert " uw" not in Path(f"/proc/{running.pid}/smaps").read_text()
    running.next_step()
    running.ends_right()


@pytest.mark.slow
@pytest.mark.parametrize("skipped", ["another level since", "a level that was not finished", "closed"])
def test_a_parent_that_the_tracker_does_not_know(skipped: str, running: Writer, tmp_path: Path) -> None:
    """Nothing but the bytes themselves tells then what has changed."""
    check("pre-dump", "-t", running.pid, "-D", tmp_path / "0")
    running.next_step()
    match skipped:
        case "another level since":
            check("pre-dump", "-t", running.pid, "-D", tmp_path / "other")
        case "a level that was not finished":
            (tmp_path / "full").mkdir()
            (tmp_path / "full" / "pages-1.img").symlink_to("/dev/full")
            assert run("pre-dump", "-t", running.pid, "-D", tmp_path / "full").returncode == 1
        case _:
            check("pre-dump", "-t", running.pid, "-D", tmp_path / "other")
            check("dump", "-t", running.pid, "-D", tmp_path / "another", "-R")
    options = ["-t", running.pid, "-D", tmp_path / "1", "--prev-images-dir", "../0", "-R"]
    check("dump", *options, "--dirty-tracking", TRACKING)
    assert set(running.table_flags(tmp_path / "1").values()) == {PE_PRESENT | PE_LAZY}
    check("dump", *options)
    flags = running.table_flags(tmp_path / "1")
    assert {page for page, flag in flags.items() if flag & PE_PRESENT} == written_in(1)
    running.ends_right()
