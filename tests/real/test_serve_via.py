"""`lazypages serve --via`: exit status, files and messages are those of `lazypages serve` alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import schemas
from tests.support.criu import Criu
from tests.support.fake import restored_tasks, serve_command, served_tasks, write_images
from tests.support.processes import Server, nothing_left, reap, wait_for
from tests.support.remote import leave_at_source, our_page_server
from tests.support.resident import Daemon
from tests.support.restore import Checkpoints, lazy_restore, our_daemon
from tests.support.restore import Daemon as DaemonCommand

PAGES = 400


class How:
    """Alone, or through a resident daemon: the options of that, and what the daemon has said."""

    def __init__(self, resident: Daemon | None) -> None:
        self.resident = resident
        self.options = ["--via", str(resident.socket)] if resident else []


@pytest.fixture(params=["alone", "via"])
def how(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[How]:
    if request.param == "alone":
        yield How(None)
        return
    with nothing_left(), Daemon(tmp_path_factory.mktemp("resident")) as resident:
        resident.wait_ready()
        used = How(resident)
        yield used
        if used.resident:
            assert resident.process.poll() is None
            resident.signal(signal.SIGTERM)
            assert resident.wait() == 0


def stats(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stats.json").read_text())
    schemas.check("stats.json", found)
    return found


def said(text: str) -> list[str]:
    """The messages, without times, pids, and numbers that differ from run to run."""
    lines = [re.sub(r"^[-0-9]+ [0-9:,]+ ", "", line) for line in text.splitlines()]
    return [re.sub(r"[0-9][0-9.,]*", "N", re.sub(r"/[^ ]*", "PATH", line)) for line in lines]


def test_complete(how: How, restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background", *how.options) as (
        tasks,
        server,
    ):
        tasks.say("check")
        assert tasks.statuses() == [0, 0]
        assert server.wait() == 0
        assert not (tmp_path / "lazy-pages.socket").exists()
    assert stats(tmp_path)["ok"]
    assert stats(tmp_path)["pages_copied"] == 2 * PAGES
    lines = said((tmp_path / "serve.out").read_text())
    assert lines[0] == "MESSAGE serving N MiB for N tasks; waiting for: criu restore --lazy-pages -D PATH"
    assert [re.sub("us|ms", "T", line) for line in lines[-3:]] == [
        "MESSAGE N tasks in N T: N complete",
        "MESSAGE from local: N pages (N MiB), N faults",
        "MESSAGE fault latency: pN N T, pN N T, max N T",
    ]


def test_killed(how: How, restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background", *how.options) as (
        tasks,
        server,
    ):
        tasks.say("touch 10")
        for pid in tasks.pids:
            os.kill(pid, signal.SIGKILL)
        assert server.wait() == 1
        assert f"task {tasks.pids[0]}: killed by SIGKILL while it missed" in server.story()
    assert [task["state"] for task in stats(tmp_path)["tasks"]] == ["died"] * 2


def test_signal_before_a_restore(how: How, restored_program: Path, tmp_path: Path) -> None:
    with restored_tasks(restored_program, 1, 1) as tasks:
        write_images(tmp_path, tasks.pids, 1)
        with nothing_left(), our_daemon("--no-background", *how.options).start(tmp_path, tmp_path) as server:
            server.wait_ready()
            assert (tmp_path / "lazy-pages.socket").exists()
            server.signal(signal.SIGTERM)
            assert server.wait() == 1
            assert "ended before a restore connected" in server.story()
            assert not (tmp_path / "lazy-pages.socket").exists()
    assert not stats(tmp_path)["ok"]


def test_signal(how: How, restored_program: Path, tmp_path: Path) -> None:
    """The first completes the tasks."""
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background", *how.options) as (
        tasks,
        server,
    ):
        tasks.say("touch 10")
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert "completing them first; a second Ctrl-C" in server.story()
        tasks.say("check")
        assert tasks.statuses() == [0, 0]
    assert [task["state"] for task in stats(tmp_path)["tasks"]] == ["complete"] * 2


def test_two_signals(how: How, restored_program: Path, tmp_path: Path) -> None:
    """The second kills those that can't be completed, here because their restore never ends."""
    options = ["--no-background", *how.options]
    with served_tasks(restored_program, tmp_path, 2, PAGES, *options, finish=False) as (tasks, server):
        wait_for("the tasks", lambda: not (tmp_path / "lazy-pages.socket").exists())
        server.signal(signal.SIGTERM)
        wait_for("its answer", lambda: "a second Ctrl-C" in server.story())
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
        assert tasks.statuses() == [128 + signal.SIGKILL] * 2
    assert {task["state"] for task in stats(tmp_path)["tasks"]} <= {"killed"}


def test_refused(how: How, restored_program: Path, tmp_path: Path) -> None:
    """A damaged image; and a work directory that is served already."""
    with restored_tasks(restored_program, 1, 10) as tasks:
        write_images(tmp_path, tasks.pids, 10)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()

    def fails(*options: str) -> str:
        command = [*serve_command(tmp_path, *options), *how.options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        return done.stderr.splitlines()[-1]

    with our_daemon().start(tmp_path, first) as other:
        other.wait_ready()
        assert "is served by another daemon; end that one first" in fails("-W", str(first))
    [pagemap] = tmp_path.glob("pagemap-*.img")
    pagemap.write_bytes(pagemap.read_bytes()[:-1])
    assert fails("-W", str(second)).startswith(f"lazypages: {pagemap}")
    assert not list(second.iterdir())


def test_in_the_background(how: How, restored_program: Path, tmp_path: Path) -> None:
    """-d returns when a restore can be started; the pid in the pidfile is of a process that ends as `serve` does."""
    with nothing_left(), restored_tasks(restored_program, 1, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        command = [*serve_command(tmp_path), "-d", "--pidfile", "pid", "-o", "log", *how.options]
        subprocess.run(command, check=True, timeout=60)
        pid = int((tmp_path / "pid").read_text())
        tasks.say(f"connect {tmp_path}/lazy-pages.socket")
        tasks.say("finish")
        tasks.say("check")
        assert tasks.statuses() == [0]
        assert os.waitstatus_to_exitcode(reap(pid)) == 0
    assert stats(tmp_path)["ok"]
    assert "1 complete" in (tmp_path / "log").read_text()


only_via = pytest.mark.parametrize("how", ["via"], indirect=True)


@only_via
def test_criu(how: How, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """With real CRIU, and a trace."""
    checkpoint = checkpoints.get(Criu("4.2"), "tree")
    options = ["--trace", "trace", "--no-background", *how.options]
    with lazy_restore(checkpoint, our_daemon(*options), tmp_path) as restored:
        restored.check_all()
        assert restored.stats()["ok"]
    assert (tmp_path / "trace").read_bytes().startswith(b"LPTRACE\n")


@only_via
@pytest.mark.parametrize("source", ["tcp", "ps-socket"])
def test_page_server(how: How, source: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """All pages come from a page server, at an address or at a socket that we have connected."""
    checkpoint = checkpoints.get(Criu("4.2"), "single")
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images)
    with nothing_left(), our_page_server(checkpoint.images, tmp_path) as (port, server):
        options = ["--source", f"tcp://127.0.0.1:{port}"]
        fds = []
        if source == "ps-socket":
            connected = socket.create_connection(("127.0.0.1", port))
            fds.append(connected.detach())
            options = ["--page-server", "--ps-socket", str(fds[0])]
        resident = WithFds("lazypages", our_daemon(*options, *how.options).command, fds=tuple(fds))
        with lazy_restore(checkpoint, resident, tmp_path, images) as restored:
            for fd in fds:
                os.close(fd)
            restored.check_all()
            assert set(restored.stats()["copied_by_source"]) == {"remote"}
        assert server.wait() == 0


@dataclass(frozen=True)
class WithFds(DaemonCommand):
    """Inherits descriptors."""

    fds: tuple[int, ...] = ()

    def start(self, images: Path, work: Path) -> Server:
        command = [
            *self.command,
            "-D",
            str(images),
            "-W",
            str(work),
            "--stats-json",
            str(work / "stats.json"),
        ]
        return Server(command, output=work / "serve.out", pass_fds=self.fds)


@only_via
def test_killed_daemon(how: How, restored_program: Path, tmp_path: Path) -> None:
    """The resident daemon is killed: as if `serve` had been."""
    assert how.resident
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background", *how.options) as (
        tasks,
        server,
    ):
        tasks.say("touch 10")
        how.resident.process.kill()
        assert server.wait() == 1
        assert f"lazypages: the daemon at {how.resident.socket} has ended" in server.story()
        assert tasks.statuses() == [128 + signal.SIGKILL] * 2
        how.resident = None
    assert not (tmp_path / "stats.json").exists()


def test_two_daemons(tmp_path: Path) -> None:
    """At one socket: refused. A socket that a killed daemon has left is replaced."""
    with Daemon(tmp_path) as first:
        first.wait_ready()
        with Daemon(tmp_path) as second:
            assert second.wait() == 1
            assert f"lazypages: {first.socket} is served by another daemon" in second.story()
    assert first.socket.is_socket()
    with Daemon(tmp_path) as third:
        third.wait_ready()
        assert third.status() == {}
        third.signal(signal.SIGTERM)
        assert third.wait() == 0


def test_no_daemon(tmp_path: Path) -> None:
    command = [*serve_command(tmp_path), "--via", str(tmp_path / "none")]
    (tmp_path / "inventory.img").touch()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"lazypages: no daemon at {tmp_path}/none (No such file or directory): start it with `lazypages daemon`"
    )
