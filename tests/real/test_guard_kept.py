"""The guard is not taken for the daemon, and when it is killed there is another one at once."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.real.test_guard import KILLED, PAGES, guards, write_at_once
from tests.support.fake import compile_restored, restored_tasks, serve_held, serving, write_images
from tests.support.processes import Server, nothing_left, wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def restored() -> Iterator[Path]:
    with TemporaryDirectory(prefix="lazypages-restored-") as folder:
        yield compile_restored(Path(folder))


def other_guard(server: Server, before: int) -> int:
    """The one that has been started after `before` was killed."""
    said = rf"guard \(pid {before}\) was killed(?s:.)*started another guard \(pid (\d+)\)"
    wait_for("another guard", lambda: re.search(said, server.story()))
    found = re.search(said, server.story())
    assert found
    return int(found[1])


def test_it_has_a_name_of_its_own(restored: Path, tmp_path: Path) -> None:
    with (
        nothing_left(),
        restored_tasks(restored, 1, PAGES) as tasks,
        serving(tmp_path, tasks, PAGES) as server,
    ):
        for _ in range(2):
            (guard,) = guards()
            assert Path(f"/proc/{guard}/comm").read_text() == "uffd-guard\n"
            assert Path(f"/proc/{guard}/cmdline").read_bytes().rstrip(b"\0") == b"uffd-guard"
            assert str(tmp_path).encode() in Path(f"/proc/{server.pid}/cmdline").read_bytes()
            os.kill(guard, signal.SIGKILL)
            other_guard(server, guard)


def is_stopped(pid: int) -> bool:
    """Till then a thread of it may answer faults."""
    states = [
        path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


def test_pkill_by_command_line(restored: Path, tmp_path: Path) -> None:
    """Whoever kills all that looks like the daemon does not kill the guard."""
    for number in range(10):
        images = tmp_path / f"only-here-{number}"
        images.mkdir()
        with nothing_left(), restored_tasks(restored, 1, PAGES) as tasks:
            with serving(images, tasks, PAGES, "--no-background") as server:
                tasks.say("finish")
                tasks.say("touch 10")
                if number % 2:
                    before = guards()[0]
                    os.kill(before, signal.SIGKILL)
                    other_guard(server, before)
                os.kill(server.pid, signal.SIGSTOP)
                wait_for("the stop of all its threads", lambda: is_stopped(server.pid))
                tasks.say("check")
                subprocess.run(["pkill", "-9", "-f", f"lazypages serve -D {images}"], check=True, timeout=30)
                assert server.wait() == -signal.SIGKILL
                assert tasks.statuses() == [KILLED]
                assert "misses pages and is killed, too" in server.story()
            wait_for("the guard's end", lambda: not guards())


def test_another_guard_knows_what_the_first_one_knew(restored: Path, tmp_path: Path) -> None:
    """It is killed again and again while tasks fault; then the daemon is. Each task ends well or is killed."""
    chance = random.Random(20_261_129)
    ended: set[int] = set()
    for number in range(4):
        images = tmp_path / str(number)
        images.mkdir()
        with nothing_left(), restored_tasks(restored, 3, 4 * PAGES) as tasks:
            with serving(images, tasks, 4 * PAGES, "--no-background") as server:
                tasks.say("finish")
                for _ in range(5):
                    (guard,) = guards()
                    os.kill(guard, signal.SIGKILL)
                    if chance.random() < 0.5:
                        tasks.say("touch 50")
                    other_guard(server, guard)
                tasks.say("check")
                time.sleep(chance.random() * 0.02)
                os.kill(server.pid, signal.SIGKILL)
                server.wait()
                statuses = tasks.statuses()
                assert set(statuses) <= {0, KILLED}
                ended.update(statuses)
            wait_for("the guard's end", lambda: not guards())
    assert KILLED in ended


def test_killed_before_the_daemon_looks(restored: Path, tmp_path: Path) -> None:
    """Before there is an event loop; and that never comes, so the daemon ends with what it has been sent."""
    go = tmp_path / "go"
    with nothing_left(), restored_tasks(restored, 2, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        with serve_held(tmp_path, go) as server:
            server.wait_ready()
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            tasks.say("finish")
            os.kill(guards()[0], signal.SIGKILL)
            write_at_once(go, "fail")
            assert server.wait() == 1
            tasks.tell("check")
            wait_for("the message", lambda: "will not come: 2;" in server.story())
            assert len(guards()) == 1
            for pid in tasks.pids:
                os.kill(pid, signal.SIGKILL)
            tasks.answered()
            assert tasks.statuses() == [KILLED, KILLED]
            wait_for("the guard's end", lambda: not guards())
