"""docs/migrate.md: every command of it, executed as it stands, between two network namespaces.

Not real: `scp`, for which the hosts would need sshd. A stand-in copies to the other host's directory.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lazypages.bench.pipes import raised_pipe_limit
from tests.real.test_criu_namespace import NAMESPACE
from tests.real.test_dump_precopy import SOURCE as WRITER
from tests.real.test_dump_precopy import Writer
from tests.support import docs
from tests.support.compiling import compiled
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import task
from tests.support.hosts import Host, Link, two_hosts
from tests.support.processes import descendants, nothing_left, reap, tail, wait_for

PROGRAM = "my-program"
CERTIFICATES, MOVE, BACK = "Certificates", "Move the process", "If it fails: go back"
WITH_CRIU = "With CRIU at the source"
SCP = """#!/bin/sh
# scp [-r] FILE... HOST:DIRECTORY
for last; do :; done
[ "$1" = -r ] || set -- -r "$@"
files=$(echo "$@" | sed "s| $last\\$||")
case $last in root@10.77.0.2:*) exec cp $files "$THERE/${last#*:}" ;; esac
exit 1
"""


def blocks(section: str) -> list[tuple[str, str]]:
    """The commands of a section: on which host, and what."""
    parts = [text.split("\n", 1) for text in docs.blocks("docs/migrate.md", section)]
    assert all(where.startswith("# ") for where, _ in parts)
    return [(where.removeprefix("# "), commands) for where, commands in parts]


class Shell:
    """One shell on a host, in which the commands of the page run one after the other."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir()
        self.folder, self._log = folder, folder / "shell.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=os.environ | environment,
            )
        self._done = folder / "done"
        os.mkfifo(self._done)
        self._end = os.open(self._done, os.O_RDWR)
        self._send("trap 'failed=1' ERR")

    def _send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def run(self, commands: str) -> None:
        """Fails the test if any of the commands fails, outside of a condition."""
        self._send(f"failed=0\n{commands}\necho $failed >{self._done}")
        deadline = time.monotonic() + 60
        while not select.select([self._end], [], [], 0.2)[0]:
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"not done: {commands}\n{tail(self._log)}")
        if os.read(self._end, 100) != b"0\n":
            pytest.fail(f"failed: {commands}\n{tail(self._log)}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.close(self._end)


class Hosts:
    """Both hosts, with a shell on each. The destination has a PID namespace: the source's pids are free there."""

    def __init__(self, source: Shell, destination: Shell, writer: Writer) -> None:
        self.source, self.destination, self.writer = source, destination, writer

    def run(self, section: str, *, on: str = "") -> None:
        """All blocks of a section, or those of one host."""
        for where, commands in blocks(section):
            shells = {"source": [self.source], "destination": [self.destination]}.get(
                where, [self.source, self.destination]
            )
            if on in {"", where}:
                for shell in shells:
                    shell.run(commands)

    def restored(self, program: Path) -> list[int]:
        """The process at the destination, by its pid here."""
        return [pid for pid in descendants(self.destination.process.pid) if _executable(pid) == str(program)]


def _executable(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


@contextmanager
def hosts(criu: Criu, program: Path, folder: Path, link: Link) -> Iterator[Hosts]:
    """Two hosts; the program runs on the first one."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "scp").write_text(SCP)
    (tools / "scp").chmod(0o755)
    path = ":".join(map(str, (tools, criu.path.parent, Path(sys.executable).parent, os.environ["PATH"])))
    environment = {"PATH": path, "THERE": str(folder / "there")}
    with nothing_left(), raised_pipe_limit(), two_hosts(link) as (source, destination), ExitStack() as stack:

        def shell(host: Host, name: str, *before: str) -> Shell:
            made = Shell(host.command(*before, "bash", "--norc"), folder / name, environment)
            stack.callback(made.close)
            return made

        output = folder / "output"
        pid = stack.enter_context(task(*source.command(program), output=output))
        wait_for("the table", lambda: output.exists() and output.read_text().endswith("\n"))
        writer = Writer(pid, output)
        writer.next_step()
        yield Hosts(shell(source, "here"), shell(destination, "there", *NAMESPACE), writer)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    copy = tmp_path / PROGRAM
    shutil.copy(compiled(WRITER), copy)
    return copy


def ends_right(writer: Writer, pid: int) -> None:
    """It finds each byte of its memory as it should be."""
    os.kill(pid, signal.SIGUSR2)
    wait_for("its verdict", lambda: writer.lines()[-1].startswith(("right", "wrong")))
    assert writer.lines()[-1] == "right right"


@pytest.mark.loop("criu-4.2")
@pytest.mark.parametrize("criu", all_criu())
def test_it_moves(criu: Criu, program: Path, tmp_path: Path) -> None:
    with hosts(criu, program, tmp_path, Link()) as both:
        both.run(CERTIFICATES)
        both.run(MOVE)
        assert reap(both.writer.pid) == signal.SIGKILL
        (pid,) = both.restored(program)
        ends_right(both.writer, pid)


@pytest.mark.slow
def test_it_goes_back(program: Path, tmp_path: Path) -> None:
    """The process is killed at the destination while its memory arrives, and runs on at the source."""
    with hosts(Criu("4.2"), program, tmp_path, Link(rate=5e5)) as both:
        both.run(CERTIFICATES)
        freeze, copy, restore, _wait = blocks(MOVE)
        both.source.run(freeze[1])
        both.source.run(copy[1])
        both.destination.run(restore[1])
        assert len(both.restored(program)) == 1
        both.run(BACK)
        assert both.restored(program) == []
        ends_right(both.writer, both.writer.pid)


@pytest.mark.slow
@pytest.mark.parametrize("criu", all_criu())
def test_with_criu_at_the_source(criu: Criu, program: Path, tmp_path: Path) -> None:
    with hosts(criu, program, tmp_path, Link()) as both:
        both.run(CERTIFICATES)
        both.run(WITH_CRIU)
        _freeze, copy, restore, wait = blocks(MOVE)
        both.source.run(copy[1])
        both.destination.run(restore[1])
        both.source.run(wait[1])
        (pid,) = both.restored(program)
        ends_right(both.writer, pid)
