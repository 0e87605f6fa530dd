"""`lazypages serve --wait`: the daemon is there before the images."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.criu import Criu
from tests.support.fake import restored_tasks, write_images
from tests.support.processes import Server, nothing_left, wait_for
from tests.support.restore import Checkpoints, lazy_restore, our_daemon

PAGES = 300


def command(images: Path, work: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lazypages",
        "serve",
        "--wait",
        "-D",
        str(images),
        "-W",
        str(work),
        *options,
    ]


def test_a_restorer_that_connects_before_the_images_are_there(restored_program: Path, tmp_path: Path) -> None:
    """It waits; the inventory is the last file, as dumps write it, and half of it is none."""
    images, work = tmp_path / "images", tmp_path / "work"
    work.mkdir()
    with (
        restored_tasks(restored_program, 2, PAGES) as tasks,
        Server(command(images, work, "--trace", "trace"), output=tmp_path / "out") as daemon,
    ):
        wait_for("the message", lambda: "waiting for the images" in (tmp_path / "out").read_text())
        tasks.tell(f"connect {work / 'lazy-pages.socket'}")
        images.mkdir()
        write_images(tmp_path, tasks.pids, PAGES)
        inventory = (tmp_path / "inventory.img").read_bytes()
        for path in tmp_path.glob("*.img"):
            if path.name != "inventory.img":
                path.rename(images / path.name)
        for size in (0, len(inventory) // 2):
            (images / "inventory.img").write_bytes(inventory[:size])
            with pytest.raises(subprocess.TimeoutExpired):
                daemon.process.wait(0.1)
        assert not (work / "trace").exists()
        (images / "inventory.img").write_bytes(inventory)
        daemon.wait_ready()
        tasks.answered()
        tasks.say("finish")
        tasks.say("check")
        assert set(tasks.statuses()) == {0}
        assert daemon.wait() == 0


@pytest.mark.slow
def test_images_that_get_their_name_when_they_are_whole(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """With CRIU: readiness is signalled when a restore can be started."""
    checkpoint = checkpoints.get(Criu("4.2"), "single")
    images, part = tmp_path / "images", tmp_path / "images.part"

    def arrive() -> None:
        shutil.copytree(checkpoint.images, part)
        part.rename(images)

    arrival = threading.Timer(0.5, arrive)
    arrival.start()
    with nothing_left(), lazy_restore(checkpoint, our_daemon("--wait"), tmp_path, images) as restored:
        restored.check_all()
    arrival.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_ended_while_it_waits(number: signal.Signals, tmp_path: Path) -> None:
    with Server(command(tmp_path / "images", tmp_path), output=tmp_path / "out") as daemon:
        wait_for("the message", lambda: "waiting for the images" in (tmp_path / "out").read_text())
        daemon.signal(number)
        assert daemon.wait(30) == 1
        assert daemon.ready_bytes() == b""
    assert (tmp_path / "out").read_text().endswith("\nlazypages: ended before the images were there\n")
    assert not (tmp_path / "lazy-pages.socket").exists()


def test_damaged_images_end_it_and_the_restorer(tmp_path: Path) -> None:
    """As without --wait: one line, and the restore fails at once."""
    images = tmp_path / "images"
    with Server(command(images, tmp_path), output=tmp_path / "out") as daemon:
        wait_for("the message", lambda: "waiting for the images" in (tmp_path / "out").read_text())
        with socket.socket(socket.AF_UNIX) as restorer:
            restorer.connect(str(tmp_path / "lazy-pages.socket"))
            restorer.settimeout(30)
            write_images(tmp_path, [os.getpid()], 8)
            images.mkdir()
            (tmp_path / "inventory.img").rename(images / "inventory.img")
            assert restorer.recv(1) == b""
        assert daemon.wait(30) == 1
    assert "pstree.img" in (tmp_path / "out").read_text().splitlines()[-1]


def test_a_place_for_the_socket_is_needed(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lazypages", "serve", "--wait", "-D", str(tmp_path / "images")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "with --wait, name a work directory with -W" in done.stderr
