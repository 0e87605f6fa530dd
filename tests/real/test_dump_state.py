"""All that a task has beside its memory: set up, dumped, restored by real CRIU, and found by the task itself.

Also what a dump leaves as it was, and terminals.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.compiling import compiled
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import check, is_unharmed, reap_all, run, task
from tests.support.processes import nothing_left, reap, wait_for

SOURCE = Path(__file__).parent.parent / "support" / "programs" / "state.c"


@pytest.fixture(scope="module")
def program() -> Path:
    return compiled(SOURCE)


def verdict(pid: int, output: Path) -> str:
    os.kill(pid, signal.SIGUSR2)
    assert reap(pid) == 0
    return output.read_text()


@pytest.mark.loop("criu-4.2")
@pytest.mark.parametrize("criu", all_criu())
def test_restored_as_it_was(criu: Criu, program: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with task(program, cwd=tmp_path, output=output) as pid:
        wait_for("the set-up", lambda: output.read_text() == "ready\n")
        check("dump", "-t", pid, "-D", tmp_path / "images")
        reap_all()
        criu.restore(tmp_path / "images", lazy=False)
        assert verdict(pid, output) == "ready\nall as before\n"


@pytest.mark.slow
def test_left_running_as_it_was(program: Path, tmp_path: Path) -> None:
    """After pre-dumps and a dump too nothing about it has changed, and no system call was disturbed."""
    output = tmp_path / "output"
    with task(program, cwd=tmp_path, output=output) as pid:
        wait_for("the set-up", lambda: output.read_text() == "ready\n")
        check("pre-dump", "-t", pid, "-D", tmp_path / "0")
        check("pre-dump", "-t", pid, "-D", tmp_path / "1", "--prev-images-dir", "../0")
        check("dump", "-t", pid, "-D", tmp_path / "2", "--prev-images-dir", "../1", "-R")
        assert verdict(pid, output) == "ready\nall as before\n"


@pytest.mark.loop("criu-4.2")
@pytest.mark.parametrize("criu", all_criu())
def test_a_terminal(criu: Criu, tmp_path: Path) -> None:
    """A job of a shell on a pseudo-terminal, restored on another one by --shell-job."""
    script = 'stty -echo; echo ready; while read x; do echo "got $x"; done'
    with nothing_left():
        pid, master = pty.fork()
        if pid == 0:
            os.closerange(3, 1000)
            os.execv("/bin/sh", ["sh", "-c", script])
        said = bytearray()

        def hears(what: bytes) -> bool:
            with suppress(BlockingIOError):
                said.extend(os.read(master, 1000))
            return what in said

        os.set_blocking(master, False)
        wait_for("the shell", lambda: hears(b"ready"))
        refused = run("dump", "-t", pid, "-D", tmp_path / "images")
        assert refused.returncode == 1
        assert "is a terminal: allow it with --shell-job" in refused.stderr
        is_unharmed(pid)
        check("dump", "-t", pid, "-D", tmp_path / "images", "--shell-job")
        reap_all()
        os.close(master)

        again, master = pty.fork()
        if again == 0:
            os.closerange(3, 1000)
            arguments = ["restore", "-D", str(tmp_path / "images"), "--shell-job", "-o", "restore.log"]
            os.execv(criu.path, ["criu", *arguments])
        os.set_blocking(master, False)
        said.clear()
        wait_for("the restored shell", lambda: Path(f"/proc/{pid}").exists())
        os.write(master, b"hello\n")
        wait_for("its answer", lambda: hears(b"got hello"))
        attributes = termios.tcgetattr(master)
        assert not attributes[3] & termios.ECHO
        assert fcntl.fcntl(master, fcntl.F_GETFD) >= 0
        os.close(master)
