"""dumptool, its CRIU, or both are killed at any moment of a dump: the tree runs on, or is whole in the images.

CRIU only from when it has written its images: while it works inside of the tasks, its death can be theirs
(docs/backend.md). LAZYPAGES_KILLS=200 and LAZYPAGES_SEED=... change the number of kills and their moments.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dumptool.criu import find_criu
from dumptool.criu_dump import ByCriu, dump_by_criu
from dumptool.freeze import members
from dumptool.proc import children
from dumptool.settings import Settings, Watcher
from tests.real.test_dump_kills import REST, ROUNDS, expected_output, in_child
from tests.support.compiling import PROGRAMS, compiled
from tests.support.criu import RELEASES, Criu
from tests.support.dumptool import is_unharmed
from tests.support.processes import descendants, nothing_left, reap, start, wait_for

KILLS = int(os.environ.get("LAZYPAGES_KILLS", "30"))
VICTIMS = ("dumptool", "criu", "both")


class _Copying(Watcher):
    """Tells when the tree stands still and CRIU has written its images."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def stage(self, name: str) -> None:
        if name == "copying":
            os.write(self._fd, b"!")


class Tree:
    """A shell and two programs with threads that compute, through any number of dumps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.go = folder, folder / "go"
        self.workers = compiled(PROGRAMS / "workers.c")
        worker = f"{self.workers} {ROUNDS} {REST} {self.go}"
        script = f"{worker} >one & {worker} >two & wait"
        self.pid = start(["sh", "-c", script], cwd=folder).pid
        wait_for("the tree", lambda: len(members(self.pid)) == 3 and self._threads() == 11)
        self.pids = [process.pid for process in members(self.pid)]

    def _threads(self) -> int:
        return sum(len(process.threads) for process in members(self.pid))

    def others(self) -> list[int]:
        """Live processes below us that are not of the tree."""
        return [pid for pid, state in descendants().items() if pid not in self.pids and state != "Z"]

    def runs(self) -> None:
        """Fails unless all of it is there and unharmed."""
        for pid in self.pids:
            is_unharmed(pid)

    def is_gone(self) -> bool:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return not any(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def ends_right(self) -> None:
        self.go.touch()
        assert reap(self.pid) == 0
        for name in ("one", "two"):
            assert (self.folder / name).read_bytes() == expected_output(self.workers)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random(tmp_path: Path) -> None:
    seed = int(os.environ.get("LAZYPAGES_SEED", str(int(time.time()))))
    print(f"LAZYPAGES_SEED={seed}")
    chance = random.Random(seed)
    criu = Criu(RELEASES[-1])
    found = find_criu(criu.path)
    assert found is not None
    images, failure = tmp_path / "images", tmp_path / "failure"
    with nothing_left():
        tree = Tree(tmp_path)

        def begin() -> tuple[int, int, int]:
            """dumptool, its CRIU, and a descriptor that can be read when CRIU has written its images."""
            copying, copies = os.pipe()

            def work() -> None:
                try:
                    dump_by_criu(Settings(tree.pid, images), ByCriu(found), _Copying(copies))
                except BaseException as error:
                    failure.write_text(repr(error))
                    raise
                os._exit(0)

            shutil.rmtree(images, ignore_errors=True)
            dumptool = in_child(work)
            os.close(copies)
            wait_for("CRIU", lambda: children(dumptool, dumptool))
            return dumptool, children(dumptool, dumptool)[0], copying

        def settled() -> bool:
            """What is there when nothing of a dump runs any more. Returns whether there was a dump."""
            wait_for("the end of all but the tree", lambda: not tree.others())
            if not (images / "inventory.img").exists():
                tree.runs()
                return False
            wait_for("the end of the tree", tree.is_gone)
            criu.restore(images, work=tmp_path, lazy=False)
            tree.runs()
            return True

        def undisturbed() -> tuple[float, float]:
            """Seconds that a dump takes from the start of CRIU on, and from the end of its work on."""
            dumptool, _, copying = begin()
            started = time.monotonic()
            assert os.read(copying, 1)
            os.close(copying)
            copied = time.monotonic()
            assert reap(dumptool) == 0
            ended = time.monotonic()
            assert settled()
            return ended - started, ended - copied

        whole, rest = undisturbed()
        outcomes: dict[tuple[str, bool], int] = {}
        for number in range(KILLS):
            victim = VICTIMS[number % len(VICTIMS)]
            dumptool, its_criu, copying = begin()
            if victim != "dumptool":
                assert os.read(copying, 1), f"{failure.read_text()} after {outcomes}"
            time.sleep(chance.random() * 1.1 * (whole if victim == "dumptool" else rest))
            pids = {"dumptool": [dumptool], "criu": [its_criu], "both": [its_criu, dumptool]}[victim]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            reap(dumptool)
            os.close(copying)
            try:
                outcome = victim, settled()
            except BaseException as error:
                error.add_note(f"kill {number}, of {victim}, after {outcomes}")
                raise
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        print(outcomes)
        tree.ends_right()
