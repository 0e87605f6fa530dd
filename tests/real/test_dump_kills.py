"""dumptool is killed at any moment, or fails: the tasks live on, unharmed and untraced."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dumptool._ptrace import lib
from dumptool.dump import Settings, Watcher, dump, pre_dump
from dumptool.freeze import freeze
from dumptool.proc import Vma, layout
from dumptool.tracee import Gadgets, find_room, session
from images_spec.images import Kind
from images_spec.pagemap import Pagemap
from tests.support.blocked import wait_for_rest
from tests.support.compiling import PROGRAMS, compiled
from tests.support.dumptool import check, is_unharmed, run, task
from tests.support.processes import reap, wait_for

KILLS = 200
SYNCED = 40
"""The last ones come while dumptool waits for the disk as well, which takes most of the time then."""
ROUNDS, REST = "20000", "50000"  # the rest in us: the programs take 1,000 s, unless they are told to go on
NR_GETITIMER = 36
ROOM = lib.LP_SESSION_ROOM


@pytest.fixture(scope="module")
def workers() -> Path:
    return compiled(PROGRAMS / "workers.c")


def in_child(work: object) -> int:
    """Runs a function in a forked child; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        assert callable(work)
        work()
    finally:
        os._exit(1)


def kill_in_sessions(pid: int, gadgets: Gadgets, chance: random.Random, *, room: bool) -> None:
    """Kills one who has frozen `pid`, and has its threads make calls all the time, at a random moment of that.

    ``room``: in memory that is found for that; else below their stack pointers.
    """
    begun, begins = os.pipe()

    def work() -> None:
        with freeze(pid) as tree:
            if room:
                gadgets.room = find_room(pid, layout(pid).vmas, tree.root.threads)
            os.write(begins, b"!")
            while True:
                for tid in tree.root.threads:
                    with session(tid, gadgets) as inside:
                        inside.filled("<QQQQ", NR_GETITIMER, lambda at: (0, at))

    child = in_child(work)
    os.close(begins)
    assert os.read(begun, 1), "it ended before it called anything"
    os.close(begun)
    time.sleep(chance.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(reap(child)) == -signal.SIGKILL
    is_unharmed(pid)


def state(pid: int) -> str:
    """The letter in proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def expected_output(workers: Path) -> bytes:
    command = [workers, ROUNDS, "0", "/"]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_200_times_at_random(workers: Path, tmp_path: Path) -> None:
    """Half of the kills come in dumps, half in pre-dumps, which leave tracking behind at most.

    They are spread over the time that an undisturbed run takes on this machine just now.
    """
    output, go = tmp_path / "output", tmp_path / "go"
    chance = random.Random(20_261_123)
    with task(workers, ROUNDS, REST, go, output=output) as pid:
        wait_for("the threads", lambda: len(os.listdir(f"/proc/{pid}/task")) == 5)

        def begin(number: int) -> int:
            def work() -> None:
                settings = Settings(
                    pid, tmp_path / f"images-{number % 4}", leave_running=True, sync=number >= KILLS - SYNCED
                )
                (dump if number % 2 else pre_dump)(settings, Watcher())
                os._exit(0)

            return in_child(work)

        def undisturbed(number: int) -> float:
            """Seconds that such a run takes."""
            started = time.monotonic()
            _, status = os.waitpid(begin(number), 0)
            assert status == 0
            return time.monotonic() - started

        killed = 0
        while killed < KILLS:
            if killed % 20 == 0:
                durations = [undisturbed(killed), undisturbed(killed + 1)]
            child = begin(killed)
            time.sleep(chance.random() * durations[killed % 2])
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            is_unharmed(pid)
            images = tmp_path / f"images-{killed % 4}"
            if (images / "inventory.img").exists():
                pagemap = Pagemap.load(images / Kind.PAGEMAP.file_name(pid))
                pagemap.check_pages_size((images / "pages-1.img").stat().st_size, images)
                assert killed % 2 == 0 or all(
                    (images / name).exists() for name in ("pstree.img", "files.img")
                )
            if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                killed += 1
            else:
                assert status == 0
                durations[killed % 2] = undisturbed(killed)  # it had ended before: they are faster now
        check("pre-dump", "-t", pid, "-D", tmp_path / "last-0")
        check("dump", "-t", pid, "-D", tmp_path / "last-1", "--prev-images-dir", "../last-0", "-R")
        assert len(os.listdir(f"/proc/{pid}/fd")) == 3, "something of ours is left in it"
        is_unharmed(pid)
        go.touch()
        assert reap(pid) == 0
    assert output.read_bytes() == expected_output(workers)


@pytest.mark.slow
def test_killed_between_any_two_system_calls(workers: Path, tmp_path: Path) -> None:
    """All the time of these runs goes into injected system calls."""
    output, go = tmp_path / "output", tmp_path / "go"
    chance = random.Random(7)
    with task(workers, ROUNDS, REST, go, output=output) as pid:
        wait_for("the threads", lambda: len(os.listdir(f"/proc/{pid}/task")) == 5)
        gadgets = Gadgets(pid, layout(pid).vmas)

        for _ in range(100):
            kill_in_sessions(pid, gadgets, chance, room=False)
        go.touch()
        assert reap(pid) == 0
    assert output.read_bytes() == expected_output(workers)


def main_stack(pid: int) -> Vma:
    return next(vma for vma in layout(pid).vmas if vma.name == "[stack]")


@pytest.mark.slow
@pytest.mark.parametrize("used", [False, True])
def test_small_stacks(used: bool, tmp_path: Path) -> None:
    """Killed at any moment, dumptool leaves no byte changed below the stack pointer of a thread: it may be somebody's.

    ``used``: the end of the main stack is no place either; so it grows, once and for all.
    """
    output, go = tmp_path / "output", tmp_path / "go"
    chance = random.Random(11)
    with task(compiled(PROGRAMS / "small_stacks.c"), go, output=output) as pid:
        wait_for("the threads", lambda: output.read_text() == "ready\n")
        stack = main_stack(pid)
        if used:
            with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(stack.start)
                memory.write(b"used")
        gadgets = Gadgets(pid, layout(pid).vmas)

        for number in range(40):
            kill_in_sessions(pid, gadgets, chance, room=True)
            if number % 10 == 0:
                check("dump", "-t", pid, "-D", tmp_path / f"images-{number}", "-R")
        grown = stack.start - main_stack(pid).start
        assert grown % ROOM == 0
        assert used <= grown // ROOM <= 41 + used  # what a kill leaves there is never used again
        go.touch()
        assert reap(pid) == 0, output.read_text()


def test_signals_wait_until_a_session_is_over(workers: Path, tmp_path: Path) -> None:
    """One that arrives in the middle is taken by its handler afterwards; a stop signal stops it afterwards."""
    with task(workers, ROUNDS, REST, tmp_path / "go") as pid:
        wait_for("the threads", lambda: len(os.listdir(f"/proc/{pid}/task")) == 5)
        gadgets = Gadgets(pid, layout(pid).vmas)
        with freeze(pid) as tree, session(pid, gadgets) as inside:
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGSTOP)
            for _ in range(5):
                assert inside.call(39) == pid
            assert tree.root.threads
        wait_for("the stop", lambda: state(pid) == "T")
        os.kill(pid, signal.SIGCONT)
        wait_for("its going on", lambda: state(pid) in "SR")
        is_unharmed(pid)


def test_a_stopped_task_stays_stopped(workers: Path, tmp_path: Path) -> None:
    with task(workers, ROUNDS, REST, tmp_path / "go") as pid:
        wait_for("the threads", lambda: len(os.listdir(f"/proc/{pid}/task")) == 5)
        os.kill(pid, signal.SIGSTOP)
        wait_for("the stop", lambda: state(pid) == "T")
        assert run("dump", "-t", pid, "-D", tmp_path / "images", "-R").returncode == 0
        # A tracer that detaches sets it going only to be stopped again: dumptool has gone, so that is over.
        wait_for_rest(pid)
        assert state(pid) == "T"
        os.kill(pid, signal.SIGCONT)
        wait_for("its going on", lambda: state(pid) in "SR")


@pytest.mark.loop("pages-1.img")
@pytest.mark.parametrize("image", ["pages-1.img", "core-{pid}.img", "inventory.img", "pagemap-{pid}.img"])
def test_no_room_for_an_image(image: str, workers: Path, tmp_path: Path) -> None:
    with task(workers, ROUNDS, REST, tmp_path / "go") as pid:
        wait_for("the threads", lambda: len(os.listdir(f"/proc/{pid}/task")) == 5)
        images = tmp_path / "images"
        images.mkdir()
        name = images / image.format(pid=pid)
        if image == "inventory.img":
            name.mkdir()  # a link to /dev/full would be replaced
        else:
            name.symlink_to("/dev/full")
        result = run("dump", "-t", pid, "-D", images)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("dumptool: ")
        is_unharmed(pid)
