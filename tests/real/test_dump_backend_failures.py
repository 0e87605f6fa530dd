"""`dumptool dump --backend criu` fails, or is ended, in every way: the tree goes on, and nothing passes for a dump."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from dumptool.criu import HOOK, CriuError, find_criu
from dumptool.criu_dump import ByCriu, dump_by_criu
from dumptool.output import Output
from dumptool.settings import Settings, Watcher
from dumptool.tracee import take_fd
from tests.real.test_dump_backend import by_criu
from tests.real.test_dump_durable import small_disk
from tests.real.test_dump_lazy import lazy_dump, running
from tests.real.test_dump_sent import bad_server, receiver, to
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import COMMAND, check, is_unharmed, reap_all, run, stats, task, tracker_of
from tests.support.memory_cgroup import memory_cgroup
from tests.support.processes import descendants, nothing_left, wait_for
from tests.support.redis import Client, redis
from tests.support.restore import Program, eager_restore
from tests.support.services import service

both = pytest.mark.parametrize("criu", all_criu())
NEWEST = Criu("4.2")


def no_dump(images: Path) -> None:
    """Nothing that could be taken for one is left, nor CRIU's draft of it."""
    assert not list(images.rglob("inventory.img"))
    assert not (images / ".criu-dump").exists()


@pytest.mark.loop("criu-4.2")
@both
def test_the_reason_is_that_of_criu(criu: Criu, tmp_path: Path) -> None:
    """A connected client is outside of the tree. The server answers it, in the same connection, afterwards."""
    images = tmp_path / "images"
    with nothing_left(), redis(tmp_path) as server, ExitStack() as connected:
        client = connected.enter_context(closing(Client(server.address)))
        assert client.ask(b"SET one 1") == [b"+OK"]
        check("pre-dump", "-t", server.pid, "-D", tmp_path / "1")
        result = run("dump", "-t", server.pid, "-D", images, *by_criu(criu))
        assert result.returncode == 1
        assert "External socket is used" in result.stderr.splitlines()[-1]
        assert "exit status" not in result.stderr
        no_dump(images)
        assert tracker_of(server.pid), "the next attempt needs it"
        assert tracer(server.pid) == 0
        assert client.ask(b"GET one") == [b"1"]


@pytest.mark.slow
def test_which_backend_and_why(tmp_path: Path) -> None:
    """auto: CRIU where our own code can't, said in one line; our own where it can."""
    with nothing_left(), redis(tmp_path) as server:
        said = check(
            *("dump", "-t", server.pid, "-D", tmp_path / "1", "-R", "--criu", NEWEST.path),
        )
        (line,) = [line for line in said.splitlines() if "saves everything but memory" in line]
        assert f"CRIU {'.'.join(map(str, NEWEST.version))}" in line
        assert "is not saved" in line or "is a socket" in line
        assert tracer(server.pid) == 0
        refused = run(
            "dump", "-t", server.pid, "-D", tmp_path / "2", "--backend", "own", "--criu", NEWEST.path
        )
        assert refused.returncode == 1
        assert "can't be dumped" in refused.stderr
        nowhere = run(
            "dump", "-t", server.pid, "-D", tmp_path / "2", "--backend", "criu", "--criu", "/nowhere"
        )
        assert nowhere.returncode == 1
        assert "/nowhere can't be started" in nowhere.stderr
    with task("sleep", "1000") as pid:
        assert "CRIU" not in check("dump", "-t", pid, "-D", tmp_path / "3", "-R", "--criu", NEWEST.path)
        assert "--tcp-close is an option of CRIU" in check(
            *("dump", "-t", pid, "-D", tmp_path / "4", "-R", "--criu", NEWEST.path, "--tcp-close")
        )


@pytest.mark.slow
def test_stopped_or_running_as_asked(tmp_path: Path) -> None:
    with task("sleep", "1000") as pid:
        check("dump", "-t", pid, "-D", tmp_path / "1", "-R", *by_criu(NEWEST))
        is_unharmed(pid)
        check("dump", "-t", pid, "-D", tmp_path / "2", "-s", *by_criu(NEWEST))
        assert "\nState:\tT (stopped)" in Path(f"/proc/{pid}/status").read_text()
        assert (tmp_path / "2" / "inventory.img").exists()


def test_full_disk(program: Program, tmp_path: Path) -> None:
    """While dumptool writes the pages: CRIU's part of the images still fits."""
    with (
        running(NEWEST, "threads", program, tmp_path) as victim,
        small_disk(tmp_path / "full", "size=2m") as full,
    ):
        images = full / "images"
        check("pre-dump", "-t", victim.pid, "-D", tmp_path / "1")
        result = run("dump", "-t", victim.pid, "-D", images, *by_criu(NEWEST))
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        no_dump(images)
        assert tracker_of(victim.pid) is None
        victim.goes_on_here(tmp_path)


@pytest.mark.slow
def test_sent_to_a_page_server(program: Program, tmp_path: Path) -> None:
    """The server's pages and the other images here are a dump together. If it is lost, the tree goes on."""
    with running(NEWEST, "tree", program, tmp_path) as victim:
        images = victim.checkpoint.images
        with bad_server("reset", 100) as port:
            result = run("dump", "-t", victim.pid, "-D", images, *to(port), *by_criu(NEWEST))
        assert result.returncode == 1
        assert "page server" in result.stderr
        no_dump(images)
        is_unharmed(victim.pid)
        with receiver("ours", tmp_path / "there") as (server, port):
            check("dump", "-t", victim.pid, "-D", images, *to(port), *by_criu(NEWEST))
            assert server.wait() == 0
        assert victim.has_ended()
        reap_all()
        for image in (tmp_path / "there").iterdir():
            image.rename(images / image.name)
        with eager_restore(victim.checkpoint, tmp_path, images) as restored:
            restored.go()
            assert restored.wait_tasks() == 0
            restored.check_verdict()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_while_it_serves(number: signal.Signals, program: Program, tmp_path: Path) -> None:
    """Nobody has come: the tree goes on after SIGTERM. Killed, dumptool can't tell: the tree stays, as by SIGSTOP."""
    with (
        running(NEWEST, "tree", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images, *by_criu(NEWEST)) as source,
    ):
        source.wait_ready()
        source.signal(number)
        source.process.wait(30)
        if number == signal.SIGKILL:
            wait_for("the end of CRIU", lambda: tracer(victim.pid) == 0)
            victim.stays_stopped()
            for pid in descendants(os.getpid()):
                if stopped(pid):
                    os.kill(pid, signal.SIGCONT)
        else:
            assert "the tasks go on here" in source.story()
            no_dump(victim.checkpoint.images)
        victim.goes_on_here(tmp_path)


class _KillsTheScript(Watcher):
    def __init__(self, pid: int) -> None:
        self.pid = pid

    def stage(self, name: str) -> None:
        if name == "copying":
            (script,) = [
                pid
                for pid in descendants()
                if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] == [str(HOOK).encode()]
            ]
            os.kill(script, signal.SIGKILL)
            wait_for("CRIU to let go of the tree", lambda: tracer(self.pid) == 0)


@both
def test_the_script_is_killed(criu: Criu, tmp_path: Path) -> None:
    """CRIU undoes everything then: the tree goes on."""
    images = tmp_path / "images"
    found = find_criu(criu.path)
    assert found is not None
    with task("sleep", "1000") as pid:
        with pytest.raises(CriuError):
            dump_by_criu(Settings(pid, images), ByCriu(found), _KillsTheScript(pid))
        no_dump(images)
        is_unharmed(pid)


def status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split("\t")[1] for line in lines if line.startswith(f"{name}:"))


def tracer(pid: int) -> int:
    return int(status(pid, "TracerPid"))


def stopped(pid: int) -> bool:
    return status(pid, "State").startswith("T")


def test_two_that_write_to_one_directory(tmp_path: Path) -> None:
    """The second would remove the inventory of the first, whose tree is killed then and in no images."""
    images = tmp_path / "images"
    with task("sleep", "1000") as pid:
        check("dump", "-t", pid, "-D", images, "-R")
        with Output(images).alone():
            for command in (["pre-dump"], ["dump"], ["dump", *by_criu(NEWEST)]):
                result = run(*command, "-t", pid, "-D", images)
                assert result.returncode == 1
                assert result.stderr.splitlines()[-1].endswith(
                    f"{images}: another dumptool writes there: wait for it to end"
                )
        assert (images / "inventory.img").exists()
        is_unharmed(pid)
        check("dump", "-t", pid, "-D", images, *by_criu(NEWEST))


FILLED = """
import ctypes, fcntl, mmap, os, struct, time
u = ctypes.CDLL(None).syscall(323, 0)
assert u >= 0
fcntl.ioctl(u, 0xC018AA3F, struct.pack("<QQQ", 0xAA, 0, 0))
memory = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(u, 0xC020AA00, struct.pack("<QQQQ", where, 1 << 20, 1, 0))
print(u, flush=True)
while not os.path.exists("taken"):
    time.sleep(0.01)
os.close(u)
print("ready", flush=True)
time.sleep(1000)
"""


def test_memory_that_a_daemon_fills(tmp_path: Path) -> None:
    """As after a lazy restore: CRIU alone takes pages that have not arrived yet for pages without contents."""
    output = tmp_path / "output"
    with task(sys.executable, "-c", FILLED, cwd=tmp_path, output=output) as pid:
        wait_for("the program", lambda: output.read_text().endswith("\n"))
        uffd = take_fd(pid, int(output.read_text()))
        try:
            (tmp_path / "taken").touch()
            wait_for("it to close its own", lambda: "ready" in output.read_text())
            for backend in ("criu", "auto"):
                images = tmp_path / backend
                result = run("dump", "-t", pid, "-D", images, "--backend", backend, "--criu", NEWEST.path)
                assert result.returncode == 1
                assert "has a userfaultfd that is not ours" in result.stderr.splitlines()[-1]
                assert not list(tmp_path.rglob("inventory.img"))
                is_unharmed(pid)
        finally:
            os.close(uffd)


@pytest.mark.slow
def test_no_more_memory_than_its_cgroup_has(tmp_path: Path) -> None:
    """Pages that do not fit there are written while the tree stands still; else the OOM killer ends dumptool."""
    images = tmp_path / "images"
    with (
        memory_cgroup(144 << 20) as procs,
        nothing_left(),
        service(tmp_path, 160) as running,
    ):
        enter = ["sh", "-c", f'echo $$ >{procs} && exec "$@"', "sh"]
        command = [*COMMAND, "dump", "-R", "-t", running.pid, "-D", images, *by_criu(NEWEST)]
        result = subprocess.run(
            [*enter, *map(str, command)], capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result
        assert running.ask(b"check") == b"right"
        assert stats(images).pages_written > 160 << 8
