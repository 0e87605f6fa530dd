"""What goes wrong around a real restore, and what `lazypages serve` makes of it."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.processes import Server, nothing_left, reap
from tests.support.restore import CHILD_ENDED, SOCKET, Checkpoints, Daemon, lazy_restore, our_daemon

one = pytest.mark.parametrize("criu", all_criu()[1:])
LAZY = our_daemon("--no-background")


def said(server: Server, work: Path) -> str:
    """All that the daemon printed and logged; never a traceback."""
    text = "".join(path.read_text() for path in (work / "serve.out", work / "serve.log") if path.exists())
    assert "Traceback" not in text
    return text


def copy_of(images: Path, target: Path) -> Path:
    """Images that a test may damage."""
    return Path(shutil.copytree(images, target))


def refuse(daemon: Daemon, images: Path, work: Path) -> str:
    """The daemon must end with 1 before it is ready, leaving no socket; what it said."""
    with daemon.start(images, work) as server:
        assert server.wait(30) == 1
        assert server.ready_bytes() == b""
        assert not (work / SOCKET).exists()
        return said(server, work)


def rip_pages(images: Path) -> str:
    path = max(images.glob("pages-*.img"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    return path.name


def rip_pagemap(images: Path) -> str:
    path = max(images.glob("pagemap-*.img"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 3)
    return path.name


def lose_pagemap(images: Path) -> str:
    path = max(images.glob("pagemap-*.img"), key=lambda path: path.stat().st_size)
    path.unlink()
    return path.name


def lose_mm(images: Path) -> str:
    path = next(images.glob("mm-*.img"))
    path.unlink()
    return path.name


def garble_pstree(images: Path) -> str:
    path = images / "pstree.img"
    path.write_bytes(b"\0" * 64)
    return path.name


def lose_inventory(images: Path) -> str:
    (images / "inventory.img").unlink()
    return "inventory.img"


def break_parent(images: Path) -> str:
    (images / "parent").symlink_to("nowhere")
    return "nowhere"


@pytest.mark.loop("break_parent-criu-4.2")
@one
@pytest.mark.parametrize(
    "damage", [rip_pages, rip_pagemap, lose_pagemap, lose_mm, garble_pstree, lose_inventory, break_parent]
)
def test_damaged_images_are_refused_at_once(
    criu: Criu, damage: Callable[[Path], str], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Before any restore can connect, naming the file."""
    images = copy_of(checkpoints.get(criu, "plain").images, tmp_path / "images")
    name = damage(images)
    assert name in refuse(our_daemon(), images, tmp_path)


@one
def test_task_killed_while_pages_are_missing(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """It needs none any more, but that is no success: exit 1."""
    checkpoint = checkpoints.get(criu, "forever")
    with lazy_restore(checkpoint, LAZY, tmp_path) as restored:
        os.kill(checkpoint.pid, signal.SIGKILL)
        assert restored.wait_tasks() == -signal.SIGKILL
        assert restored.server.wait() == 1
        (task,) = restored.stats()["tasks"]
        assert (task["state"], task["signal"]) == ("died", "SIGKILL")


@pytest.mark.slow
@one
@pytest.mark.parametrize("background", [True, False])
def test_one_task_of_a_tree_killed(
    criu: Criu, background: bool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The others are served on as if nothing had happened. What was killed is told, unless it had all its memory."""
    checkpoint = checkpoints.get(criu, "crowd")
    with lazy_restore(checkpoint, our_daemon() if background else LAZY, tmp_path) as restored:
        os.kill(max(checkpoint.pids), signal.SIGKILL)
        restored.go()
        assert restored.wait_tasks() == 0
        *others, root = restored.reports()
        assert len(others) == 39
        assert [report for report in others if report.bad] == []
        assert (root.bad, root.what) == (1, CHILD_ENDED)
        exit_status = restored.server.wait()
        states = Counter(task["state"] for task in restored.stats()["tasks"])
        assert states["complete"] + states["gone"] + states["died"] == 41
        assert (states["died"], exit_status) in {(1, 1), (0, 0)}


@one
def test_restore_that_never_comes(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The daemon waits, and can be told to stop: nothing was served, so the exit code says so."""
    with LAZY.start(checkpoints.get(criu, "plain").images, tmp_path) as server:
        server.wait_ready()
        assert (tmp_path / SOCKET).stat().st_mode & 0o777 == 0o600
        assert server.process.poll() is None
        server.signal(signal.SIGINT)
        assert server.wait() == 1
        assert not (tmp_path / SOCKET).exists()
        said(server, tmp_path)


@one
def test_restore_that_fails(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A restore connects and fails before it has a task, as the pids are taken by another one's tasks.

    These must not notice, and the daemon ends as CRIU's does.
    """
    checkpoint = checkpoints.get(criu, "plain")
    work = tmp_path / "work"
    work.mkdir()
    with nothing_left(), LAZY.start(checkpoint.images, work) as server:
        server.wait_ready()
        with lazy_restore(checkpoint, LAZY, tmp_path) as other:
            assert criu.restore(checkpoint.images, work=work, check=False) != 0
            assert server.wait() == 1
            assert "the restore failed" in server.story()
            other.check_all()


@one
def test_live_socket_is_respected(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A second daemon in the same directory gives up; the first one serves its restore."""
    checkpoint = checkpoints.get(criu, "plain")
    with nothing_left(), LAZY.start(checkpoint.images, tmp_path) as first:
        first.wait_ready()
        second_log = tmp_path / "second"
        second = Server([*LAZY.command, "-D", str(checkpoint.images), "-W", str(tmp_path)], output=second_log)
        with second:
            assert second.wait() == 1
        assert SOCKET in second_log.read_text()
        checkpoint.restore(tmp_path)
        (checkpoint.results / "go").write_text("random")
        assert reap(checkpoint.pid) == 0
        assert first.wait() == 0


@one
def test_stale_socket_is_replaced(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get(criu, "plain")
    with LAZY.start(checkpoint.images, tmp_path) as server:
        server.wait_ready()
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    assert (tmp_path / SOCKET).is_socket()
    with lazy_restore(checkpoint, LAZY, tmp_path) as restored:
        restored.check_all()


@one
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_once(criu: Criu, number: int, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The tasks get all that they miss, even without a background, and then it ends."""
    checkpoint = checkpoints.get(criu, "plain")
    with lazy_restore(checkpoint, LAZY, tmp_path) as restored:
        restored.server.signal(number)
        assert restored.server.wait() == 0
        (task,) = restored.stats()["tasks"]
        assert (task["state"], task["pages"]["pending"]) == ("complete", 0)
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


@one
def test_interrupted_twice(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """No time for more: tasks that still miss pages are killed rather than left with zeros."""
    checkpoint = checkpoints.get(criu, "forever")
    with lazy_restore(checkpoint, LAZY, tmp_path) as restored:
        restored.server.signal(signal.SIGSTOP)  # so that both wait for it when it goes on
        restored.server.signal(signal.SIGINT)
        restored.server.signal(signal.SIGTERM)
        restored.server.signal(signal.SIGCONT)
        assert restored.server.wait() == 1
        assert restored.wait_tasks() == -signal.SIGKILL
        assert str(checkpoint.pid) in said(restored.server, tmp_path)
        assert [task["state"] for task in restored.stats()["tasks"]] == ["killed"]


@one
def test_in_the_background(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """-d and --pidfile: the command returns when the daemon is ready, which serves and ends by itself."""
    checkpoint = checkpoints.get(criu, "plain")
    pidfile = tmp_path / "pid"
    daemon = Daemon("daemon", (*LAZY.command, "-d", "--pidfile", str(pidfile)))
    with nothing_left():
        with daemon.start(checkpoint.images, tmp_path) as server:
            assert server.wait() == 0
            assert server.ready_bytes() == b"\0"
        pid = int(pidfile.read_text())
        checkpoint.restore(tmp_path)
        (checkpoint.results / "go").write_text("random")
        assert reap(checkpoint.pid) == 0
        assert reap(pid) == 0  # an orphan of its starter, so our child
        assert not (tmp_path / SOCKET).exists()
