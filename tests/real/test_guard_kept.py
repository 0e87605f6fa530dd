"""The guard is not taken for the daemon, and when it is killed there is another one at once."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.support.fake import serve_held, served_tasks, write_at_once
from tests.support.guard_processes import KILLED, check_that_tasks_wait, guards, wait_for_their_end
from tests.support.processes import Server, name_of, wait_for

pytestmark = pytest.mark.timeout(120)

PAGES = 2000


def other_guard(server: Server, before: int) -> int:
    """The one that has been started after `before` was killed."""
    said = rf"guard \(pid {before}\) was killed(?s:.)*started another guard \(pid (\d+)\)"
    wait_for("another guard", lambda: re.search(said, server.story()))
    found = re.search(said, server.story())
    assert found
    return int(found[1])


def test_it_has_a_name_of_its_own(restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 1, PAGES, finish=False) as (_, server):
        for _ in range(2):
            (guard,) = guards()
            assert name_of(guard) == "uffd-guard"
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


@pytest.mark.slow
def test_pkill_by_command_line(restored_program: Path, tmp_path: Path) -> None:
    """Whoever kills all that looks like the daemon does not kill the guard."""
    for number in range(10):
        images = tmp_path / f"only-here-{number}"
        images.mkdir()
        with served_tasks(restored_program, images, 1, PAGES, "--no-background") as (tasks, server):
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
            wait_for_their_end()


@pytest.mark.slow
def test_another_guard_knows_what_the_first_one_knew(restored_program: Path, tmp_path: Path) -> None:
    """It is killed again and again while tasks fault; then the daemon is. Each task ends well or is killed."""
    chance = random.Random(20_261_129)
    ended: Counter[int] = Counter()
    for number in range(4):
        images = tmp_path / str(number)
        images.mkdir()
        with served_tasks(restored_program, images, 3, 4 * PAGES, "--no-background") as (tasks, server):
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
            ended.update(tasks.statuses())
            wait_for_their_end()
    assert ended.keys() <= {0, KILLED}
    assert ended[KILLED] >= 6, ended


@pytest.mark.slow
def test_killed_before_the_daemon_looks(restored_program: Path, tmp_path: Path) -> None:
    """Before there is an event loop; and that never comes, so the daemon ends with what it has been sent."""
    go = tmp_path / "go"
    with served_tasks(restored_program, tmp_path, 2, PAGES, start=partial(serve_held, go=go)) as (
        tasks,
        server,
    ):
        os.kill(guards()[0], signal.SIGKILL)
        write_at_once(go, "fail")
        assert server.wait() == 1
        tasks.say("check")
        wait_for("the message", lambda: "will not come: 2;" in server.story())
        check_that_tasks_wait(tasks)
