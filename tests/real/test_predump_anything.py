"""Programs that dumptool's own images can't hold are pre-dumped: memory is all that counts.

Each is pre-dumped twice. The second level has the pages that were written, and little else; what both have together is
the memory of the task, byte for byte. Afterwards CRIU dumps it as if nothing had been.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dumptool import proc
from dumptool.dump import Settings, Watcher, pre_dump
from dumptool.errors import UnsupportedError
from images_spec.flags import PE_PRESENT
from tests.real.test_dump_refusals import REDIS, REFUSED, SETUP, _answers, ask
from tests.support.compiling import PROGRAMS
from tests.support.criu import RELEASES, Criu
from tests.support.dumptool import COMMAND, is_unharmed, pages, reap_all, task, tracker_of
from tests.support.memory import check_memory
from tests.support.processes import descendants, end, name_of, wait_for

PAGE = 4096
EACH = 100
FEW = 400
"""Pages that a Python or Redis that is asked for something writes besides."""
OWNER = (sys.executable, PROGRAMS / "owner.py")
UNSHARE = ("unshare", "--pid", "--mount", "--net", "--fork", "--kill-child", "--mount-proc")
IN_NAMESPACES = (*UNSHARE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
IN_USER_NAMESPACE = (*UNSHARE, "--user", "--map-root-user", "--time")


@dataclass
class Owner:
    """The program, running."""

    pid: int
    output: Path
    steps: int = 0

    @property
    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()

    @property
    def address(self) -> int:
        return int(self.lines[0])

    def step(self) -> set[int]:
        """It writes: the addresses of the pages."""
        self.steps += 1
        os.kill(self.pid, signal.SIGUSR1)
        wait_for("a step", lambda: f"step {self.steps}" in self.lines)
        return {self.address + (number * 17 + self.steps) % 2048 * PAGE for number in range(EACH)}

    def digest(self) -> str:
        before = len(self.lines)
        os.kill(self.pid, signal.SIGUSR2)
        wait_for("the digest", lambda: len(self.lines) > before and self.output.read_text().endswith("\n"))
        return self.lines[before]


@contextmanager
def owner(folder: Path, *what: str, inside: Sequence[str] = ()) -> Iterator[Owner]:
    output = folder / "output"
    with task(*inside, *OWNER, *what, output=output) as pid:
        wait_for("the program", lambda: re.match(r"\d+\n", output.read_text()))
        yield Owner(proc.children(pid, pid)[0] if inside else pid, output)


def level(pid: int, folder: Path, number: int) -> Path:
    """A pre-dump with the one before as its parent."""
    images = folder / str(number)
    pre_dump(Settings(pid, images, parent=f"../{number - 1}" if number else None, sync=False), Watcher())
    return images


def image_pid(pid: int) -> int:
    return int(proc.status(pid)["NSpid"].split()[-1])


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    wait_for("it to stop", lambda: proc.stat(pid).state == "T")
    yield
    os.kill(pid, signal.SIGCONT)


def written(images: Path, pid: int) -> set[int]:
    return {page for page, flags in pages(images, image_pid(pid)).items() if flags & PE_PRESENT}


def nothing_of_ours(pid: int) -> bool:
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return not any("userfaultfd" in link or "lazypages" in link for link in links)


def check_twice(running: Owner, folder: Path) -> None:
    """Two pre-dumps, the second of which has what was written between them."""
    pid = running.pid
    level(pid, folder, 0)
    assert nothing_of_ours(pid)
    expected = running.step()
    with stopped(pid):
        images = level(pid, folder, 1)
        assert check_memory(images, image_pid(pid), pid) > 2048
    found = written(images, pid)
    assert found >= expected
    assert {page for page in found if 0 <= page - running.address < 2048 * PAGE} == expected
    assert len(found) < EACH + FEW
    assert nothing_of_ours(pid)
    is_unharmed(pid)
    running.step()


@pytest.mark.loop("asyncio", "namespaces")
@pytest.mark.parametrize(
    ("what", "inside"),
    [
        pytest.param(("asyncio",), (), id="asyncio"),
        pytest.param(("descriptors",), (), id="descriptors"),
        pytest.param(("seccomp", "descriptors"), (), id="seccomp"),
        pytest.param(("asyncio",), IN_NAMESPACES, id="namespaces"),
        pytest.param(("descriptors",), IN_USER_NAMESPACE, id="user-namespace"),
    ],
)
def test_only_what_was_written(what: Sequence[str], inside: Sequence[str], tmp_path: Path) -> None:
    with owner(tmp_path, *what, inside=inside) as running:
        check_twice(running, tmp_path)


@pytest.mark.slow
def test_under_seccomp_ourselves(tmp_path: Path) -> None:
    """Then the task's filter can't be suspended, and no call is run in it: it would end the task."""
    setup = SETUP + REFUSED["seccomp"][0] + "; os.execv(sys.argv[1], sys.argv[1:])"
    with owner(tmp_path, "seccomp") as running:
        command = [
            sys.executable,
            "-c",
            setup,
            *COMMAND,
            "pre-dump",
            "-t",
            str(running.pid),
            "-D",
            tmp_path / "0",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        assert f"pid {running.pid}: its seccomp filter can't be suspended" in result.stderr
        assert " uw" not in Path(f"/proc/{running.pid}/smaps").read_text()
        is_unharmed(running.pid)
        with stopped(running.pid):
            level(running.pid, tmp_path, 1)  # compared with the first one
            check_memory(tmp_path / "1", running.pid, running.pid)
        assert len(written(tmp_path / "1", running.pid)) < FEW


def test_the_same_pid_in_two_namespaces(tmp_path: Path) -> None:
    """Images are named by that."""
    inner = "unshare --pid --fork --kill-child sleep 1000"
    with task("sh", "-c", f"{inner} & {inner} & wait") as pid:
        wait_for("the tree", lambda: [name_of(child) for child in descendants(pid)].count("sleep") == 2)
        with pytest.raises(UnsupportedError, match="is pid 1 in its PID namespace, as pid "):
            level(pid, tmp_path, 0)


@pytest.mark.loop("4.2")
@pytest.mark.parametrize("release", RELEASES)
def test_criu_before_and_after(release: str, tmp_path: Path) -> None:
    """A task that CRIU has restored is pre-dumped; CRIU dumps it while it is tracked, and it goes on."""
    criu = Criu(release)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with owner(tmp_path) as running:
        expected = running.digest()
        criu.dump(running.pid, tmp_path / "first")
        reap_all()
        criu.restore(tmp_path / "first", lazy=False)
        check_twice(running, tmp_path)
        expected = running.digest()
        assert tracker_of(running.pid)
        criu.dump(running.pid, tmp_path / "second")
        reap_all()
        criu.restore(tmp_path / "second", lazy=False)
        assert tracker_of(running.pid) is None, "of the one that had its pid before"
        assert running.digest() == expected
        check_twice(running, tmp_path / "second")
        end([running.pid])


@pytest.mark.loop("4.2")
@pytest.mark.parametrize("release", RELEASES)
def test_redis(release: str, tmp_path: Path) -> None:
    address, config = tmp_path / "redis.sock", tmp_path / "redis.conf"
    config.write_text(f'port 0\nunixsocket {address}\ndir {tmp_path}\nsave ""\ndaemonize no\n')
    images = tmp_path / "images"
    images.mkdir()
    with task(REDIS, config, cwd=tmp_path, output=tmp_path / "output") as pid:
        wait_for("redis to listen", address.exists)
        wait_for("redis to answer", lambda: _answers(address))
        assert ask(address, b"SETRANGE big %d x" % (16 << 20)) == b":%d\r\n" % ((16 << 20) + 1)
        level(pid, tmp_path, 0)
        for number in range(EACH):
            ask(address, b"SETRANGE big %d changed" % (number * 10 * PAGE))
        with stopped(pid):
            assert check_memory(level(pid, tmp_path, 1), pid, pid) > EACH
        assert EACH <= len(written(tmp_path / "1", pid)) < EACH + FEW
        assert ask(address, b"GETRANGE big 40960 40966") == b"$7\r\n"
        assert nothing_of_ours(pid)
        Criu(release).dump(pid, images)
        reap_all()
        Criu(release).restore(images, lazy=False)
        wait_for("redis to answer", lambda: _answers(address))
        assert ask(address, b"STRLEN big") == b":%d\r\n" % ((16 << 20) + 1)
        end([pid])
