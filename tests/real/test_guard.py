"""The daemon itself is killed (the OOM killer uses SIGKILL): its tasks end or wait, and none of them reads zeros."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.fake import compile_restored, restored_tasks, serve, write_images
from tests.support.processes import descendants, nothing_left, wait_for
from tests.support.restore import Checkpoints, lazy_restore, our_daemon

pytestmark = pytest.mark.timeout(120)

PAGES = 2000
KILLED = 128 + signal.SIGKILL


@pytest.fixture(scope="module")
def restored() -> Iterator[Path]:
    with TemporaryDirectory(prefix="lazypages-restored-") as folder:
        yield compile_restored(Path(folder))


def guards() -> list[int]:
    """Those below us that run."""
    names = {pid: Path(f"/proc/{pid}/comm") for pid, state in descendants().items() if state != "Z"}
    return [pid for pid, name in names.items() if name.exists() and name.read_text() == "lazypages-guard\n"]


def test_tasks_that_miss_pages_are_killed(restored: Path, tmp_path: Path) -> None:
    with nothing_left(), restored_tasks(restored, 2, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        with serve(tmp_path, "--no-background") as server:
            server.wait_ready()
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            tasks.say("finish")
            tasks.say("touch 10")
            assert len(guards()) == 1
            os.kill(server.pid, signal.SIGKILL)
            assert tasks.statuses() == [KILLED, KILLED]
            assert server.wait() == -signal.SIGKILL
            wait_for("the guard's end", lambda: not guards())
            for pid in tasks.pids:
                assert f"the daemon was killed; task {pid} misses pages and is killed, too" in server.story()


def test_at_any_moment(restored: Path, tmp_path: Path) -> None:
    """Tasks that compare all their pages all the time: each ends well or is killed, none finds anything wrong."""
    chance = random.Random(20_261_123)
    ended: set[int] = set()
    for number in range(25):
        images = tmp_path / str(number)
        images.mkdir()
        with nothing_left(), restored_tasks(restored, 2, PAGES) as tasks:
            write_images(images, tasks.pids, PAGES)
            with serve(images) as server:
                server.wait_ready()
                tasks.say(f"connect {images}/lazy-pages.socket")
                tasks.tell("finish")
                tasks.answered()
                tasks.say("check")
                time.sleep(chance.random() * 0.03)
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                wait_for(
                    "the guard to be done or to hold", lambda: not guards() or "whose pids" in server.story()
                )
                if guards():  # one had only just been sent
                    for pid in tasks.pids:
                        os.kill(pid, signal.SIGKILL)
                statuses = tasks.statuses()
                assert set(statuses) <= {0, KILLED}
                ended.update(statuses)
            wait_for("the guard's end", lambda: not guards())
    assert KILLED in ended


def test_what_was_not_received_is_held(restored: Path, tmp_path: Path) -> None:
    """uffds that a restorer had sent, and nobody had read: their tasks wait, and do not read zeros."""
    with nothing_left(), restored_tasks(restored, 2, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        with serve(tmp_path) as server:
            server.wait_ready()
            os.kill(server.pid, signal.SIGSTOP)
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
            tasks.say("check")
            wait_for("the message", lambda: "will not come: 2;" in server.story())
            time.sleep(0.2)
            assert len(guards()) == 1
            for pid in tasks.pids:
                os.kill(pid, signal.SIGKILL)
            assert tasks.statuses() == [KILLED, KILLED]
            wait_for("the guard's end", lambda: not guards())


@pytest.mark.parametrize("criu", all_criu()[1:])
@pytest.mark.parametrize("scenario", ["tree", "forks_under_load", "races"])
def test_with_real_criu(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Children whose pids the daemon does not know are among the tasks: they wait, and find nothing wrong."""
    chance = random.Random(20_261_123)
    checkpoint = checkpoints.get(criu, scenario)
    for number in range(5):
        work = tmp_path / str(number)
        work.mkdir()
        with lazy_restore(checkpoint, our_daemon("--no-background"), work) as lazily:
            lazily.go()
            time.sleep(chance.random() * 0.1)
            os.kill(lazily.server.pid, signal.SIGKILL)
            lazily.server.wait()
            time.sleep(0.2)  # time for whoever could go on
            assert [report for report in lazily.reports() if report.bad] == []
        checkpoint.forget_results()
