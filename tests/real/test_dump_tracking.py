"""Tracking of writes where the bits of the pages alone would mislead: every byte of each process is right.

With each method that this kernel has.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from dumptool import trackers, tracking
from images_spec.flags import PE_PRESENT
from tests.real.test_restore import OurRestore
from tests.support.compiling import compiled
from tests.support.criu import Criu, newest_on_every_kernel
from tests.support.dumptool import check, pages, reap_all, stats, task, tracker_of
from tests.support.processes import end, wait_for

SOURCE = Path(__file__).parent.parent / "support" / "programs" / "moves.c"
KERNEL = tuple(int(word) for word in re.findall(r"\d+", os.uname().release)[:2])


def methods() -> list[str]:
    """Those of --dirty-tracking that this kernel has."""
    found = ["auto", "compare"]
    if KERNEL >= (6, 7):
        found.append("uffd-wp")
    if tracking.soft_dirty_works():
        found.append("soft-dirty")
    return found


def cases(found: Sequence[str]) -> list[ParameterSet]:
    """Comparing pages asks nothing of the kernel that the other methods do not."""
    return [pytest.param(method, marks=[pytest.mark.own_kernel] * (method == "compare")) for method in found]


@pytest.fixture(scope="module")
def moves() -> Path:
    return compiled(SOURCE, "-O1")


@dataclass
class Mover:
    """The running program. ``pids``: its own, and from step 1 on that of its child."""

    pid: int
    output: Path

    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()

    @property
    def pids(self) -> list[int]:
        found = [int(line.split()[2]) for line in self.lines() if line.startswith("step ")]
        return sorted({self.pid, *found})

    def next_step(self) -> None:
        """All processes change their memory."""
        for pid in self.pids:
            before = len(self.lines())
            os.kill(pid, signal.SIGUSR1)
            wanted = before + (2 if before == 1 else 1)
            wait_for("a step", lambda wanted=wanted: len(self.lines()) == wanted)
        assert "failed" not in self.output.read_text()

    def is_right(self) -> None:
        """Every process finds every byte as it should be."""
        for pid in self.pids:
            begin = len(self.lines())
            os.kill(pid, signal.SIGUSR2)
            wait_for(
                "the check", lambda begin=begin: any("checked" in line for line in self.lines()[begin:]), 60
            )
            assert self.lines()[begin:] == [f"checked {pid} 0 wrong"]


@contextmanager
def moving(program: Path, folder: Path) -> Iterator[Mover]:
    """The program with its areas, before its first step."""
    output, file = folder / "output", folder / "file"
    file.write_bytes(bytes(16 * 4096))
    with task(program, output, file) as pid:
        wait_for("the areas", lambda: output.exists() and output.read_text() == f"ready {pid}\n")
        yield Mover(pid, output)


@pytest.fixture
def mover(moves: Path, tmp_path: Path) -> Iterator[Mover]:
    with moving(moves, tmp_path) as mover:
        yield mover


def level(mover: Mover, folder: Path, number: int, action: str, *options: str) -> Path:
    parent = ["--prev-images-dir", f"../{number - 1}"] if number else []
    check(action, "-t", mover.pid, "-D", folder / str(number), *parent, *options)
    return folder / str(number)


def tracked_by(pid: int) -> str:
    """The method of the tracker of a process."""
    tracker = tracker_of(pid)
    assert tracker is not None
    return tracker.record.method


@pytest.mark.slow
@pytest.mark.parametrize("method", cases(methods()))
@pytest.mark.parametrize("restorer", [*newest_on_every_kernel(), pytest.param(OurRestore("4.1"), id="ours")])
def test_every_byte(restorer: Criu, method: str, mover: Mover, tmp_path: Path) -> None:
    options = ["--dirty-tracking", method]
    level(mover, tmp_path, 0, "pre-dump", *options)
    mover.next_step()
    level(mover, tmp_path, 1, "pre-dump", *options)
    mover.next_step()
    top = level(mover, tmp_path, 2, "dump", *options)
    reap_all()
    restorer.restore(top, work=tmp_path, lazy=False)
    mover.is_right()
    end(mover.pids)


@pytest.mark.loop("auto")
@pytest.mark.parametrize("method", methods())
def test_somebody_else_clears_the_soft_dirty_bits(method: str, mover: Mover, tmp_path: Path) -> None:
    """As CRIU's pre-dump does: what was written before that is not taken for unchanged."""
    options = ["--dirty-tracking", method]
    level(mover, tmp_path, 0, "pre-dump", *options)
    mover.next_step()
    for pid in mover.pids:
        Path(f"/proc/{pid}/clear_refs").write_text("4")
    top = level(mover, tmp_path, 1, "dump", *options)
    reap_all()
    Criu("4.2").restore(top, work=tmp_path, lazy=False)
    mover.is_right()
    end(mover.pids)


@pytest.mark.every_kernel
def test_which_method_auto_is(mover: Mover, tmp_path: Path) -> None:
    """uffd-wp from Linux 6.7 on, else soft-dirty; and what has not changed is not written again."""
    level(mover, tmp_path, 0, "pre-dump")
    assert tracked_by(mover.pid) == (trackers.UFFD_WP if KERNEL >= (6, 7) else trackers.SOFT_DIRTY)
    top = level(mover, tmp_path, 1, "pre-dump")
    counted = stats(top)
    assert counted.pages_written < 100, "the program sleeps"
    assert counted.pages_skipped_parent > 4000
    mover.next_step()
    top = level(mover, tmp_path, 2, "dump")
    written = {page for page, flags in pages(top, mover.pid).items() if flags & PE_PRESENT}
    assert 2 * 1024 < len(written) < 4 * 1024, "the areas that were moved, and little else"
