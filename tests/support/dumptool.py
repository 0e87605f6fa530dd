"""`dumptool`, as the tests run it; and as a stand-in for `criu dump` in the harness."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from dumptool import proc
from dumptool.holders import Holders, Tracker
from images_spec.images import Kind, read_one
from images_spec.messages import DumpStatsEntry
from images_spec.pagemap import Pagemap
from tests.support.criu import Criu
from tests.support.processes import descendants, describe, nothing_left, start, wait_for

COMMAND = (sys.executable, "-m", "dumptool")


def run(*arguments: str | Path | int, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `dumptool ARGUMENTS…`, whatever comes of it."""
    command = [*COMMAND, *map(str, arguments)]
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{' '.join(command)}: still not done after {timeout:g} s")


def check(*arguments: str | Path | int, timeout: float = 60) -> str:
    """Run `dumptool ARGUMENTS…`, which must succeed: what it said."""
    result = run(*arguments, timeout=timeout)
    if result.returncode:
        pytest.fail(f"dumptool {arguments}: exit {result.returncode}\n{result.stderr}", pytrace=False)
    return result.stderr


@dataclass(frozen=True)
class DumpedByUs(Criu):
    """Restores with a release of CRIU what dumptool has dumped, after some pre-dumps.

    `parent_pages`: see `dumptool dump --help`.
    """

    pre_dumps: int = 0
    parent_pages: str = "lazy"

    def dump(self, pid: int, images: Path, *arguments: str | Path, work: Path | None = None) -> None:
        parent: list[str] = []
        for number in range(self.pre_dumps):
            level = images.parent / f"pre-dump-{number}"
            check("pre-dump", "-t", pid, "-D", level, *parent)
            parent = ["--prev-images-dir", f"../{level.name}"]
        check("dump", "-t", pid, "-D", images, "--parent-pages", self.parent_pages, *parent, *arguments)


def stats(images: Path) -> DumpStatsEntry:
    """What dumptool counted."""
    return read_one(images / Kind.STATS.file_name("dump"), Kind.STATS).dump


def pages(images: Path, pid: int) -> dict[int, int]:
    """Address of each page of a pagemap -> its flags."""
    return {
        entry.vaddr + index * 4096: entry.flags
        for entry in Pagemap.load(images / Kind.PAGEMAP.file_name(pid))
        for index in range(entry.nr_pages)
    }


def tracker_of(pid: int) -> Tracker | None:
    """The tracker of the writes of a process, found as dumptool finds it."""
    with Holders() as holders:
        holders.look()
        return holders.tracker(pid, proc.stat(pid).start_time)


@contextmanager
def task(*command: str | Path, cwd: Path | None = None, output: Path | None = None) -> Iterator[int]:
    """A program in a session of its own, its pid; ended on the way out. Standard output goes to a file."""
    with nothing_left():
        yield start(command, output=output, cwd=cwd or "/").pid


def reap_all() -> None:
    """Free the pids of the dead that have become ours."""
    for pid, state in descendants().items():
        if state == "Z":
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def is_unharmed(pid: int) -> None:
    """Fail unless all its threads are there, untraced, not stopped, and soon with no signal blocked.

    A thread whose tracer has died in the middle of a system call needs a moment to come back.
    """
    wait_for(
        f"{describe(pid)} to be as before", lambda: all(map(_is_free, Path(f"/proc/{pid}/task").iterdir()))
    )


def _is_free(thread: Path) -> bool:
    fields = dict(
        line.split(":\t", 1) for line in (thread / "status").read_text().splitlines() if ":\t" in line
    )
    assert fields["State"][0] != "Z", describe(int(thread.name))
    return fields["TracerPid"] == "0" and fields["State"][0] in "RSD" and int(fields["SigBlk"], 16) == 0
