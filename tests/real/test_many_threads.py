"""Very many threads that real CRIU restores, each of which needs memory at once (tests/support/programs/threads.c).

What is counted is work, not time: each page is asked for a few times at most, whatever the layout does meanwhile.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.compiling import compiled
from tests.support.criu import Criu
from tests.support.processes import Server, nothing_left, start, tail, wait_for

SOURCE = Path(__file__).parents[1] / "support/programs/threads.c"
THREADS = 1000
#: Pages that each thread reads, and those of its stack and of glibc's that it touches besides.
PAGES, BESIDES = 16, 4
#: Pages that nobody reads, for the background: 128 MiB.
BALLAST = 32768
TIMEOUT = 240


class Dumped(NamedTuple):
    images: Path
    results: Path


@pytest.fixture(scope="module")
def program() -> Path:
    return compiled(SOURCE)


def dump(program: Path, kind: str, folder: Path) -> Dumped:
    """Threads that go on as soon as they are restored."""
    images, results = folder / "images", folder / "results"
    images.mkdir(parents=True)
    with nothing_left():
        counts = [str(THREADS), str(PAGES), str(BALLAST)]
        task = start([program, kind, *counts, folder / "ready", folder / "go", results], cwd="/", env={})
        wait_for("the threads to stand", (folder / "ready").exists, TIMEOUT)
        Criu("4.2").dump(task.pid, images)
        task.wait(30)
    (folder / "go").touch()
    return Dumped(images, results)


@pytest.fixture(scope="module")
def heap(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    return dump(program, "heap", tmp_path_factory.mktemp("heap"))


@pytest.fixture(scope="module")
def stacks(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    return dump(program, "stacks", tmp_path_factory.mktemp("stacks"))


def restore(dumped: Dumped, work: Path, *options: str) -> dict[str, Any]:
    """Until the task has ended with all bytes right. What the daemon counted."""
    dumped.results.unlink(missing_ok=True)
    where = ["-D", str(dumped.images), "-W", str(work)]
    command = [
        sys.executable,
        "-m",
        "lazypages",
        "serve",
        *where,
        "--stats-json",
        str(work / "stats.json"),
        *options,
    ]
    # a PID namespace: thousands of numbers are free in it
    restorer = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        str(Criu("4.2").path),
        "restore",
    ]
    restorer += ["--lazy-pages", *where, "-o", "restore.log", "-v1"]
    with nothing_left(), Server(command, output=work / "serve.out", logs=[work / "restore.log"]) as server:
        server.wait_ready()
        restored = start(restorer)
        wait_for("the threads to end", lambda: restored.poll() is not None, TIMEOUT)
        assert restored.returncode == 0, tail(work / "restore.log")
        assert server.wait(TIMEOUT) == 0
    assert dumped.results.read_text().split()[3] == "0"  # pages with a wrong byte
    (task,) = json.loads((work / "stats.json").read_text())["tasks"]
    return dict(task)


def check_counts(task: dict[str, Any]) -> None:
    faults, calls = task["faults"], task["calls"]
    changes = sum(task["events"].values())
    pages = THREADS * (PAGES + BESIDES)
    assert faults["total"] <= 3 * pages, task
    assert faults["put_off"] <= faults["total"], task  # once each, however often they were tried
    assert calls["wake"] <= 2 * changes + pages, task
    assert calls["copy"] <= 2 * pages + 4 * changes + BALLAST, task


@pytest.mark.slow
def test_threads_that_fault_at_once(heap: Dumped, tmp_path: Path) -> None:
    check_counts(restore(heap, tmp_path))


def test_threads_that_fault_at_once_without_background(heap: Dumped, tmp_path: Path) -> None:
    check_counts(restore(heap, tmp_path, "--no-background"))


@pytest.mark.slow
def test_threads_that_need_their_stacks_and_end(stacks: Dumped, tmp_path: Path) -> None:
    task = restore(stacks, tmp_path, "--no-background")
    assert task["events"]["unmap"] + task["events"]["remove"] >= THREADS
    check_counts(task)
