"""What keeps the trackers between two runs: it is small, ends with what it tracks, and its loss costs no byte."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dumptool import proc, survey, tracking
from dumptool.dump import Settings, Watcher, pre_dump
from dumptool.freeze import members
from dumptool.holders import FIRST, NAME, Holders
from images_spec.flags import PE_PARENT, PE_PRESENT
from tests.support.compiling import PROGRAMS
from tests.support.dumptool import COMMAND, check, is_unharmed, pages, run, task, tracker_of
from tests.support.memory import check_memory
from tests.support.processes import descendants, end, name_of, start_as, wait_for

PAGES = 1024


@dataclass
class Changer:
    """The program, running. Its levels are 0, 1, ... in its folder."""

    pid: int
    folder: Path
    done: int = 0
    levels: int = 0

    def do(self, what: str) -> list[str]:
        """Its answer: the words of a line."""
        before = len(self.lines())
        with (self.folder / "do").open("a") as file:
            file.write(what + "\n")
        wait_for(what, lambda: len(self.lines()) > before)
        return self.lines()[before].split()

    def lines(self) -> list[str]:
        text = (self.folder / "output").read_text()
        return text[: text.rfind("\n") + 1].splitlines()

    def level(self) -> Path:
        """The next pre-dump of all processes, which are stopped: what it has is what they have."""
        parent = f"../{self.levels - 1}" if self.levels else None
        images = self.folder / str(self.levels)
        processes = [one.pid for one in members(self.pid)]
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
            wait_for("it to stop", lambda pid=pid: proc.stat(pid).state == "T")
        pre_dump(Settings(self.pid, images, parent=parent, sync=False), Watcher())
        for pid in processes:
            assert check_memory(images, pid, pid) > PAGES
            os.kill(pid, signal.SIGCONT)
        self.levels += 1
        return images


@contextmanager
def changing(folder: Path) -> Iterator[Changer]:
    with task(sys.executable, PROGRAMS / "changer.py", cwd=folder, output=folder / "output") as pid:
        wait_for("the program", lambda: "ready" in (folder / "output").read_text())
        yield Changer(pid, folder)


@pytest.fixture
def changer(tmp_path: Path) -> Iterator[Changer]:
    with changing(tmp_path) as running:
        yield running


def count(images: Path, pid: int, flag: int) -> int:
    return sum(bool(flags & flag) for flags in pages(images, pid).values())


def is_written_whole(images: Path, pid: int) -> bool:
    """Whether nothing comes from the parent by tracking; what is equal to the byte may (``--dirty-tracking auto``)."""
    return count(images, pid, PE_PRESENT) > PAGES


def holder_of(pid: int) -> int:
    tracker = tracker_of(pid)
    assert tracker
    return tracker.holder.pid


def test_what_it_has(changer: Changer) -> None:
    """Nothing of the one that started it; and it ends with the last process that it tracks."""
    _, child = changer.do("fork")
    check("pre-dump", "-t", changer.pid, "-D", changer.folder / "0")
    holder = holder_of(changer.pid)
    assert holder_of(int(child)) == holder, "one for the tree"
    links = {int(fd): os.readlink(f"/proc/{holder}/fd/{fd}") for fd in os.listdir(f"/proc/{holder}/fd")}
    assert {link for fd, link in links.items() if fd < FIRST and fd not in (3, 4)} == {"/dev/null"}
    assert all(links[fd].startswith("socket:") for fd in (3, 4))
    assert sorted(link for fd, link in links.items() if fd >= FIRST) == sorted(
        2 * ["/memfd:lazypages-tracker (deleted)", "anon_inode:[pidfd]", "anon_inode:[userfaultfd]"]
    )
    assert os.readlink(f"/proc/{holder}/cwd") == "/"
    stat = proc.stat(holder)
    assert (stat.session, stat.tty) == (holder, 0)
    assert Path(f"/proc/{holder}/environ").read_bytes() == b""
    status = proc.status(holder)
    assert int(status["VmRSS"].split()[0]) < 1024
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(holder, number)
    os.kill(int(child), signal.SIGKILL)
    wait_for("the child's tracker to go", lambda: tracker_of_gone(holder, 3))
    assert holder_of(changer.pid) == holder
    end([changer.pid])
    wait_for("its end", lambda: descendants().get(holder, "Z") == "Z")


def test_more_processes_than_the_soft_limit_of_descriptors(tmp_path: Path) -> None:
    """64 descriptors are room for 18 of them."""
    with task("sh", "-c", "for one in $(seq 24); do sleep 1000 & done; wait") as pid:
        wait_for("all of them", lambda: [name_of(child) for child in descendants(pid)].count("sleep") == 24)
        command = [
            "prlimit",
            "--nofile=64:4096",
            *COMMAND,
            "pre-dump",
            "-t",
            str(pid),
            "-D",
            str(tmp_path / "0"),
        ]
        subprocess.run(command, timeout=60, check=True)
        found = [tracker_of(one.pid) for one in members(pid)]
        assert all(
            one is not None and (one.uffd is None) == (one.record.method != "uffd-wp") for one in found
        )


def tracker_of_gone(holder: int, left: int) -> bool:
    return sum(int(fd) >= FIRST for fd in os.listdir(f"/proc/{holder}/fd")) == left


def test_it_is_killed(changer: Changer) -> None:
    """Then nothing is known any more: all pages are compared or written, and the next level is a small one again."""
    changer.level()
    os.kill(holder_of(changer.pid), signal.SIGKILL)
    wait_for("tracking to end", lambda: " uw" not in Path(f"/proc/{changer.pid}/smaps").read_text())
    assert tracker_of(changer.pid) is None
    changer.do("threads")
    method = Settings(
        changer.pid, changer.folder / "whole", parent="../0", sync=False, method=tracking.Method.UFFD_WP
    )
    pre_dump(method, Watcher())
    assert is_written_whole(changer.folder / "whole", changer.pid)
    changer.level()
    assert count(changer.level(), changer.pid, PE_PARENT) > PAGES


@pytest.mark.slow
def test_fork_exec_and_threads(changer: Changer) -> None:
    """A child is not tracked, and neither is what execve has started: written whole once, and tracked from then on."""
    changer.level()
    _, child = changer.do("fork")
    assert tracker_of(int(child)) is None
    assert is_written_whole(changer.level(), int(child))
    changer.do("threads")
    images = changer.level()
    for pid in (changer.pid, int(child)):
        assert not is_written_whole(images, pid)
        assert count(images, pid, PE_PARENT) > PAGES
    os.kill(int(child), signal.SIGKILL)
    changer.do("reap")
    changer.do("replaced")
    assert not is_written_whole(changer.level(), changer.pid)
    changer.do("execve")
    wait_for("the program", lambda: changer.lines()[-1] == "ready")
    assert is_written_whole(changer.level(), changer.pid)
    changer.do("threads")
    assert not is_written_whole(changer.level(), changer.pid)


def test_another_process_with_the_pid(changer: Changer) -> None:
    _, child = changer.do("fork")
    changer.level()
    first = tracker_of(int(child))
    assert first
    holder = holder_of(changer.pid)
    os.kill(holder, signal.SIGSTOP)  # it does not see the end of the child
    os.kill(int(child), signal.SIGKILL)
    assert changer.do("reap") == ["reaped", child]
    time.sleep(0.02)  # a tick: start times are counted in 10 ms
    start_as(int(child))
    assert tracker_of(int(child)) is None
    end([int(child)])
    os.kill(holder, signal.SIGCONT)
    assert tracker_of(changer.pid)


def test_a_tracker_in_the_place_of_one_without_a_userfaultfd() -> None:
    """What is received first has the free place of that userfaultfd, and must not be closed with the old tracker."""
    with task("sleep", "1000") as pid, Holders() as holders:
        holder = holders.for_tree([pid])
        for size in (1, 2):
            pidfd, memfd = os.pidfd_open(pid), os.memfd_create("record")
            os.ftruncate(memfd, size)
            holder.hold(pid, pidfd, memfd)
            os.close(pidfd)
            os.close(memfd)
            assert holder.sync()
            places = {int(fd) for fd in os.listdir(f"/proc/{holder.pid}/fd") if int(fd) >= FIRST}
            assert places == {FIRST, FIRST + 1}
            assert os.stat(f"/proc/{holder.pid}/fd/{FIRST + 1}").st_size == size


def test_two_at_once(changer: Changer, tmp_path: Path) -> None:
    changer.level()
    with Holders() as holders:
        holders.look()
        held = tracking.hold(survey.look_at(members(changer.pid)[0], holders=holders))
        assert held
        for command in (["pre-dump", "-D", tmp_path / "other"], ["untrack"]):
            result = run(*command, "-t", changer.pid)
            assert result.returncode == 1
            assert result.stderr == (
                f"dumptool: pid {changer.pid}: another dumptool is working on it; wait for it to end\n"
            )
        held.close()
    assert count(changer.level(), changer.pid, PE_PARENT) > PAGES
    is_unharmed(changer.pid)


@pytest.mark.slow
def test_untrack(changer: Changer, tmp_path: Path) -> None:
    _, child = changer.do("fork")
    changer.level()
    assert "writes of 2 processes are not tracked any more" in check("untrack", "-t", changer.pid)
    for pid in (changer.pid, int(child)):
        assert tracker_of(pid) is None
        assert " uw" not in Path(f"/proc/{pid}/smaps").read_text()
    assert "nothing was tracked" in check("untrack", "-t", changer.pid)
    result = run("untrack", "-t", 4194300)
    assert (result.returncode, result.stderr) == (1, "dumptool: pid 4194300: no such process\n")
    is_unharmed(changer.pid)
    changer.level()


def test_a_failed_dump(changer: Changer, tmp_path: Path) -> None:
    changer.level()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "pages-1.img").symlink_to("/dev/full")
    result = run("dump", "-t", changer.pid, "-D", tmp_path / "full", "--prev-images-dir", "../0")
    assert result.returncode == 1
    assert result.stderr == "dumptool: /dev/full: can't be written: No space left on device\n"
    assert tracker_of(changer.pid) is None
    assert " uw" not in Path(f"/proc/{changer.pid}/smaps").read_text()
    is_unharmed(changer.pid)
    changer.level()


OLD = """
import ctypes, fcntl, mmap, os, struct, time
libc = ctypes.CDLL(None)
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = bytes([7]) * (1 << 20)
record = os.memfd_create("lazypages-tracker")
os.write(record, b'{"pid": %d, "start_time": 1, "uffd": 9, "level": "x"}' % os.getpid())
uffd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("<QQQ", 0xAA, 1 << 13 | 1 << 15, 0))
where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(uffd, 0xC020AA00, struct.pack("<QQQQ", where, 1 << 20, 2, 0))
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("command", ["pre-dump", "untrack"])
def test_trackers_of_earlier_versions(command: str, tmp_path: Path) -> None:
    """They are in the process, which CRIU does not dump then."""
    output = tmp_path / "output"
    with task(sys.executable, "-c", OLD, output=output) as pid:
        wait_for("the program", lambda: output.read_text() == "ready\n")
        check(command, "-t", pid, *(["-D", tmp_path / "0"] if command == "pre-dump" else []))
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not any("userfaultfd" in link or "memfd" in link for link in links)
        assert bool(tracker_of(pid)) == (command == "pre-dump")
        is_unharmed(pid)


def test_memory_with_a_userfaultfd_of_others(tmp_path: Path) -> None:
    """It can't be tracked: refused, in one line."""
    output = tmp_path / "output"
    code = OLD.replace("lazypages-tracker", "of-its-own")
    with task(sys.executable, "-c", code, output=output) as pid:
        wait_for("the program", lambda: output.read_text() == "ready\n")
        result = run("pre-dump", "-t", pid, "-D", tmp_path / "0")
        assert result.returncode == 1
        assert re.fullmatch(
            rf"dumptool: can't be dumped: pid {pid} mapping [0-9a-f]+-[0-9a-f]+: has a userfaultfd that is not ours, "
            r"which is not saved\n",
            result.stderr,
        )
        is_unharmed(pid)


def test_a_process_with_its_name_is_no_holder(tmp_path: Path) -> None:
    """Of another user: it is not asked for anything."""
    program = tmp_path / NAME
    program.symlink_to("/bin/sleep")
    program.chmod(0o755)
    tmp_path.chmod(0o755)
    with task("setpriv", "--reuid=65534", "--clear-groups", program, "1000") as pid, Holders() as holders:
        wait_for("it", lambda: proc.stat(pid).comm == NAME.encode())
        holders.look()
        assert pid not in [holder.pid for holder in holders.found]
