"""`dumptool dump --lazy-pages` and a tree that must not run here while it may run elsewhere.

Not even when dumptool is killed; and whoever lets it go on by the ordinary ways leaves no trace of the precaution.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from dumptool.dump import Settings, Watcher, dump
from dumptool.freeze import FrozenTree
from images_spec.flags import PE_LAZY
from lazypages.net.url import TcpServer
from tests.real.test_dump_lazy import LazyDump, lazy_dump
from tests.support.compiling import compiled
from tests.support.dumptool import is_unharmed, pages, task
from tests.support.pages import fetch
from tests.support.processes import wait_for

PROGRAMS = Path(__file__).parent.parent / "support" / "programs"
PROCESSES = 3
WORDS = 7  # of struct counters in spinners.c
KILLS = 8


@pytest.fixture(scope="module")
def spinners() -> Path:
    return compiled(PROGRAMS / "spinners.c", "-O1")


@dataclass(frozen=True)
class Counters:
    """What spinners.c counts in one process."""

    continued: int
    children: int
    naps: int
    counts: tuple[int, int]
    triples: tuple[int, int]

    def check(self) -> None:
        """No instruction of a thread was lost or came twice; to be asked while it is stopped."""
        for count, triple in zip(self.counts, self.triples, strict=True):
            assert 3 * count - triple in (0, 3)


@dataclass(frozen=True)
class Tree:
    address: int
    pids: tuple[int, ...]

    def counters(self) -> list[Counters]:
        """Of each process, as they are now: of running threads, not all of one instant."""
        found = []
        for pid in self.pids:
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                raw = os.pread(memory.fileno(), WORDS * 8, self.address)
            words = memoryview(raw).cast("Q")
            found.append(Counters(words[0], words[1], words[2], (words[3], words[5]), (words[4], words[6])))
        return found

    def threads(self) -> list[dict[str, str]]:
        """/proc/<pid>/status of all threads."""
        found = []
        for pid in self.pids:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                lines = (thread / "status").read_text().splitlines()
                found.append(dict(line.split(":\t", 1) for line in lines if ":\t" in line))
        return found

    def is_stopped(self) -> bool:
        """All of it, and nobody traces it."""
        return all(one["State"][0] == "T" and one["TracerPid"] == "0" for one in self.threads())

    def goes_on(self) -> None:
        """All threads run, untraced."""
        for pid in self.pids:
            is_unharmed(pid)
        before = self.counters()

        def moved() -> bool:
            return all(
                old.naps < new.naps and old.counts[0] < new.counts[0] and old.counts[1] < new.counts[1]
                for old, new in zip(before, self.counters(), strict=True)
            )

        wait_for("all threads to go on", moved)


@pytest.fixture
def tree(spinners: Path, tmp_path: Path) -> Iterator[Tree]:
    output = tmp_path / "output"
    with task(spinners, output=output) as pid:
        wait_for("the tree", lambda: len(output.read_text().splitlines()) == 1 + PROCESSES)
        address, *pids = output.read_text().splitlines()
        found = Tree(int(address, 16), tuple(map(int, pids)))
        assert found.pids[0] == pid
        wait_for("all threads", lambda: len(found.threads()) == PROCESSES * 4)
        found.goes_on()
        yield found


def parent_was_told(pid: int) -> bool:
    """Whether we, its parent, could learn of a stop or a continuation."""
    with suppress(ChildProcessError):
        options = os.WSTOPPED | os.WCONTINUED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, pid, options) is not None
    return False


def fetch_some(source: LazyDump, images: Path, tree: Tree) -> None:
    """A client that never has enough; the server is killed under it."""
    pid = tree.pids[1]
    places = [(pid, at) for at, flags in pages(images, pid).items() if flags == PE_LAZY]
    with suppress(TimeoutError):
        fetch([TcpServer("127.0.0.1", source.port)], [*places, (1, 0)], timeout=0.3)


@pytest.mark.slow
def test_killed_while_it_serves(tree: Tree, tmp_path: Path) -> None:
    """At random moments: from then on not one instruction of any thread is executed, until somebody says SIGCONT."""
    chance = random.Random(20_261_123)
    for number in range(KILLS):
        images = tmp_path / f"images-{number % 2}"
        with lazy_dump(tree.pids[0], images) as source:
            source.wait_ready()
            frozen = tree.counters()
            client = threading.Thread(target=fetch_some, args=(source, images, tree))
            if number % 2:
                client.start()
            time.sleep(chance.random() * 0.03)
            source.signal(signal.SIGKILL)
            source.process.wait(30)
            if number % 2:
                client.join(30)
        wait_for("the stop of all threads", tree.is_stopped)
        assert tree.counters() == frozen
        for counters in frozen:
            counters.check()
        for pid in tree.pids:
            os.kill(pid, signal.SIGCONT)
        tree.goes_on()
        for counters in tree.counters():
            assert counters.continued == number + 1  # ours


@pytest.mark.slow
def test_killed_at_any_moment(tree: Tree, tmp_path: Path) -> None:
    """From its start on: before anybody could be served all goes on, afterwards nothing does."""
    chance = random.Random(7)
    until_ready, outcomes = 0.0, []
    for number in range(KILLS):
        began = time.monotonic()
        with lazy_dump(tree.pids[0], tmp_path / f"images-{number % 2}") as source:
            if number % 2:
                time.sleep(chance.uniform(0.2, 1.2) * until_ready)
            else:
                source.wait_ready()
                until_ready = time.monotonic() - began
                time.sleep(chance.random() * 0.03)
            source.signal(signal.SIGKILL)
            source.process.wait(30)
            ready = not number % 2 or source.ready_bytes() != b""
            outcomes.append(ready)
        if ready:
            wait_for("the stop of all threads", tree.is_stopped)
        for pid in tree.pids:
            os.kill(pid, signal.SIGCONT)
        tree.goes_on()
    assert outcomes.count(False) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["signal", "leave-running"])
def test_nobody_notices(way: str, tree: Tree, tmp_path: Path) -> None:
    """When it goes on here by the ordinary ways: no stop, no SIGCONT, no SIGCHLD for anybody."""
    for number in range(3):
        images = tmp_path / f"images-{number % 2}"
        options = ["--leave-running"] if way == "leave-running" else []
        with lazy_dump(tree.pids[0], images, *options) as source:
            source.wait_ready()
            for counters in tree.counters():
                counters.check()
            if way == "signal":
                source.signal(signal.SIGHUP)  # a terminal that goes away is nobody's decision
                source.signal(signal.SIGTERM)
                assert source.wait() == 1
            else:
                places = [
                    (pid, at)
                    for pid in tree.pids
                    for at, flags in pages(images, pid).items()
                    if flags == PE_LAZY
                ]
                assert fetch([TcpServer("127.0.0.1", source.port)], places).lost == {}
                assert source.wait() == 0
        tree.goes_on()
        assert not parent_was_told(tree.pids[0])
        for counters in tree.counters():
            assert (counters.continued, counters.children) == (0, 0)


def test_signals_that_came_meanwhile(tree: Tree, tmp_path: Path) -> None:
    """SIGCONT and others are taken when the tree goes on; one SIGCONT each, and what comes after it."""
    with lazy_dump(tree.pids[0], tmp_path / "images") as source:
        source.wait_ready()
        for pid in tree.pids[:2]:
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGCHLD)
        os.kill(tree.pids[2], signal.SIGCHLD)
        source.signal(signal.SIGTERM)
        assert source.wait() == 1
    tree.goes_on()
    assert [(one.continued, one.children) for one in tree.counters()] == [(1, 1), (1, 1), (0, 1)]


def test_interrupted_when_all_is_served(tree: Tree, tmp_path: Path) -> None:
    """It runs elsewhere by then: Ctrl-C does not let it go on here."""

    def served(_tree: FrozenTree, _settings: Settings) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    dump(Settings(tree.pids[0], tmp_path / "images", lazy_pages=True), Watcher(), served)
    assert not Path(f"/proc/{tree.pids[0]}").exists()
    assert signal.getsignal(signal.SIGINT) is before
