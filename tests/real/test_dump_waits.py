"""System calls that a dump interrupts go on in the restored threads as signal(7) has it: no EINTR, no early return."""

from __future__ import annotations

import os
import signal
import struct
import sys
import textwrap
from pathlib import Path

import pytest

from dumptool.dump import Settings, Watcher, dump
from tests.real.test_restore import OurRestore
from tests.support.compiling import compiled
from tests.support.criu import Criu
from tests.support.dumptool import DumpedByUs, check, task
from tests.support.processes import reap, wait_for

SOURCE = Path(__file__).parent.parent / "support" / "programs" / "waits.c"

DUMPERS = {
    "dumptool": DumpedByUs("4.1"),
    "dumptool, chain": DumpedByUs("4.2", pre_dumps=1),
    "criu": Criu("4.1"),
}


@pytest.fixture(scope="module")
def program() -> Path:
    return compiled(SOURCE)


def calls(pid: int) -> dict[int, str]:
    """The system call that each thread is in (proc_pid_syscall(5)); "running" for none."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(path.name): (path / "syscall").read_text().split()[0] for path in tasks}


def sleeping(pid: int) -> list[float]:
    """Seconds for which threads sleep that want to know what is left of it; they now sleep for what was left."""
    found = []
    for path in Path(f"/proc/{pid}/task").iterdir():
        number, *arguments = (path / "syscall").read_text().split()
        flags, request, rest = (int(word, 16) for word in arguments[1:4])
        if number == "230" and not flags and rest:
            assert request == rest
            with open(path / "mem", "rb", buffering=0) as memory:
                seconds, nanoseconds = struct.unpack("<qq", os.pread(memory.fileno(), 16, request))
            found.append(seconds + nanoseconds / 1e9)
    assert len(found) == 2
    return found


# After a pre-dump, or any other stop, the kernel has waits for a time go on as restart_syscall. What of CRIU's dumps
# CRIU restores fails with EINTR.
@pytest.mark.loop("dumptool-lazypages")
@pytest.mark.parametrize(
    ("by", "restorer"),
    [
        *((by, restorer) for by in ("dumptool", "dumptool, chain") for restorer in ("criu", "lazypages")),
        ("criu", "lazypages"),
    ],
)
def test_every_call_goes_on(by: str, restorer: str, program: Path, tmp_path: Path) -> None:
    output, images = tmp_path / "output", tmp_path / "images"
    images.mkdir()
    criu = DUMPERS[by]
    with task(program, "1000000", output=output) as pid:
        wait_for("all threads to wait", lambda: output.read_text() == "ready\n")
        before = calls(pid)
        assert len(before) > 15
        criu.dump(pid, images)
        reap_tree(pid)
        (criu if restorer == "criu" else OurRestore(criu.release)).restore(images, lazy=False)
        wait_for("all threads to wait in the same calls", lambda: calls(pid) == before)
        for left in sleeping(pid):
            assert 0 < left < 1000
        os.kill(pid, signal.SIGUSR2)
        assert reap(pid) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == "ready"
    assert [line for line in lines[1:] if not line.endswith(": good")] == []
    assert len(lines) == 8


def test_left_running(program: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with task(program, "1000000", output=output) as pid:
        wait_for("all threads to wait", lambda: output.read_text() == "ready\n")
        before = calls(pid)
        check("pre-dump", "-t", pid, "-D", tmp_path / "0")
        check("dump", "-t", pid, "-D", tmp_path / "1", "--prev-images-dir", "../0", "-R")
        wait_for("all threads to be there", lambda: calls(pid).keys() == before.keys())
        os.kill(pid, signal.SIGUSR2)
        assert reap(pid) == 0
    assert [line for line in output.read_text().splitlines()[1:] if not line.endswith(": good")] == []


@pytest.mark.slow
@pytest.mark.parametrize("restorer", ["criu", "lazypages"])
def test_waits_for_a_time_end_when_it_is_up(restorer: str, program: Path, tmp_path: Path) -> None:
    output, images = tmp_path / "output", tmp_path / "images"
    images.mkdir()
    criu = DumpedByUs("4.1")
    with task(program, "2500", "join", output=output) as pid:
        wait_for("all threads to wait", lambda: output.read_text() == "ready\n")
        criu.dump(pid, images)
        reap_tree(pid)
        (criu if restorer == "criu" else OurRestore(criu.release)).restore(images, lazy=False)
        os.kill(pid, signal.SIGUSR2)
        assert reap(pid) == 0
    lines = output.read_text().splitlines()
    assert [line for line in lines[1:] if not line.endswith(": good")] == []
    assert len(lines) == 19


def reap_tree(pid: int) -> None:
    """The task and its child, which has become ours."""
    reap(pid)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


SIGNALLED = """
    import ctypes, os, signal, sys
    class Interrupted(Exception): pass
    def interrupt(*_): raise Interrupted
    signal.signal(signal.SIGUSR1, interrupt)
    signal.siginterrupt(signal.SIGUSR1, sys.argv[1] != "restarts")
    read, write = os.pipe()
    signal.signal(signal.SIGUSR2, lambda *_: os.write(write, b"x"))
    print("ready", flush=True)
    try:
        if sys.argv[1] == "pause": signal.pause()
        elif sys.argv[1] == "sigwaitinfo": signal.sigwaitinfo([signal.SIGALRM])
        elif sys.argv[1] == "sigsuspend":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            ctypes.CDLL(None).sigsuspend(bytes(128))
        else: os.read(read, 1)
    except Interrupted: print("interrupted")
"""


NUMBERS = {"pause": "34", "read": "0", "sigwaitinfo": "128", "sigsuspend": "130"}


@pytest.mark.loop("read-lazypages")
@pytest.mark.parametrize("restorer", ["criu", "lazypages"])
@pytest.mark.parametrize("call", NUMBERS)
def test_a_signal_on_its_way_interrupts(call: str, restorer: str, tmp_path: Path) -> None:
    """The handler runs in the restored task, and the call, which was interrupted before the dump, does not hang."""
    output, images = tmp_path / "output", tmp_path / "images"
    images.mkdir()
    criu = DumpedByUs("4.1")
    with task(sys.executable, "-c", textwrap.dedent(SIGNALLED), call, output=output) as pid:
        wait_for("the program", lambda: output.read_text() == "ready\n")
        wait_for("its call", lambda: calls(pid) == {pid: NUMBERS[call]})
        os.kill(pid, signal.SIGSTOP)
        wait_for("it to stop", lambda: "\nState:\tT" in Path(f"/proc/{pid}/status").read_text())
        os.kill(pid, signal.SIGUSR1)
        criu.dump(pid, images)
        reap(pid)
        (criu if restorer == "criu" else OurRestore(criu.release)).restore(images, lazy=False)
        os.kill(pid, signal.SIGCONT)
        assert reap(pid) == 0
    assert output.read_text() == "ready\ninterrupted\n"


@pytest.mark.loop("read")
@pytest.mark.parametrize("call", NUMBERS)
def test_a_signal_while_it_stands_still(call: str, tmp_path: Path) -> None:
    """The handler runs when the task goes on, and the call has been interrupted by that, not called again."""
    output = tmp_path / "output"
    with task(sys.executable, "-c", textwrap.dedent(SIGNALLED), call, output=output) as pid:
        wait_for("the program", lambda: output.read_text() == "ready\n")
        wait_for("its call", lambda: calls(pid) == {pid: NUMBERS[call]})

        class AtCopying(Watcher):
            def stage(self, name: str) -> None:
                if name == "copying":
                    os.kill(pid, signal.SIGUSR1)

        dump(Settings(pid, tmp_path / "images", leave_running=True), AtCopying())
        assert reap(pid) == 0
    assert output.read_text() == "ready\ninterrupted\n"
