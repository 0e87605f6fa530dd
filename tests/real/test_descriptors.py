"""Too few file descriptors: refused at the start, or waited for. Nobody reads zeros."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import struct
import subprocess
from functools import partial
from pathlib import Path

import pytest

from lazypages.control.descriptors import FOR_FORKS
from tests.support.blocked import misses_a_page, wait_for_faults, wait_for_rest
from tests.support.fake import (
    restored_tasks,
    serve,
    serve_command,
    serve_held,
    served_tasks,
    write_images,
)
from tests.support.guard_processes import check_that_tasks_wait, guards
from tests.support.processes import Server, descendants, nothing_left, wait_for
from tests.support.uffd import BASE, PagesFile, Task

pytestmark = pytest.mark.timeout(120)

TASKS = 12
PAGES = 200
MADV_WIPEONFORK = 18


def none_free(pid: int, but: int = 0) -> None:
    """Lets a process have no more than `but` further descriptors. Lower numbers that it gives back it may use again."""
    in_use = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit = 0
    while limit in in_use or but:
        but -= limit not in in_use
        limit += 1
    _soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))


def all_free(pid: int) -> None:
    _soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


def test_refused_at_the_start(restored_program: Path, tmp_path: Path) -> None:
    """In one line that says how many are needed; and so many are enough."""
    with nothing_left(), restored_tasks(restored_program, TASKS, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        refused = subprocess.run(
            ["prlimit", "--nofile=40", *serve_command(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert refused.returncode == 1
        assert "waiting for" not in refused.stderr
        (line,) = (line for line in refused.stderr.splitlines() if line.startswith("lazypages: "))
        found = re.search(r"needs (\d+), the limit is 40 .*prlimit --nofile=(\d+)", line)
        assert found
        assert 0 <= int(found[2]) - int(found[1]) < 64
        command = [
            "prlimit",
            f"--nofile={int(found[1]) + 1}",
            *serve_command(tmp_path),
        ]  # one for --status-fd
        with Server(command, output=tmp_path / "serve.out") as server:
            server.wait_ready()
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            tasks.say("finish")
            tasks.say("check")
            assert tasks.statuses() == [0] * TASKS
            assert server.wait() == 0
        assert "descriptor" not in server.story()


def test_the_images_alone_are_too_many(tmp_path: Path) -> None:
    write_images(tmp_path, range(10_000, 10_040), 1)
    command = ["prlimit", "--nofile=40", *serve_command(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "the images alone need more than the limit of 40" in refused.stderr
    assert "Traceback" not in refused.stderr


def is_running(server: Server) -> bool:
    """Whether its event loop is there: SIGTERM is let in from then on."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    (blocked,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:"))
    return not blocked & 1 << (signal.SIGTERM - 1)


def waits_or_is_done(pid: int) -> bool:
    return misses_a_page(pid) or descendants().get(pid) == "Z"


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 1, 2, 5])
def test_tasks_that_arrive_wait_for_descriptors(free: int, restored_program: Path, tmp_path: Path) -> None:
    """The limit is lowered when the daemon runs. They have all sent what they have, finish message included."""
    with nothing_left(), restored_tasks(restored_program, 60, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        with serve(tmp_path) as server:
            server.wait_ready()
            wait_for("the event loop", lambda: is_running(server))
            none_free(server.pid, free)
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            tasks.say("finish")
            tasks.say("check")
            wait_for("the message", lambda: "no file descriptor is free" in server.story())
            assert f"`prlimit --pid {server.pid} --nofile=" in server.story()
            wait_for("each task to be done or to wait", lambda: all(map(waits_or_is_done, tasks.pids)))
            all_free(server.pid)
            assert tasks.statuses() == [0] * 60
            assert server.wait() == 0


def test_the_guard_waits_for_descriptors(restored_program: Path, tmp_path: Path) -> None:
    """It takes over while there is none free, and receives what the daemon has not."""
    start = partial(serve_held, go=tmp_path / "go")
    with served_tasks(restored_program, tmp_path, 40, PAGES, start=start) as (tasks, server):
        (guard,) = guards()
        none_free(guard, 1)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        tasks.say("check")
        wait_for("the message", lambda: "will not come: " in server.story())
        check_that_tasks_wait(tasks)


def test_forks_wait_for_descriptors(tmp_path: Path) -> None:
    """First the reserve is used; then who forks waits, and nobody else."""
    file = PagesFile(PAGES)
    task = Task.start()
    with nothing_left():
        try:
            uffd = task.open_uffd()
            task.map((BASE, PAGES))
            task.do("drop")
            write_images(tmp_path, [task.pid], PAGES)
            (tmp_path / "pages-1.img").write_bytes(file.page_bytes(0, PAGES))
            with serve(tmp_path, "--no-background", "-v4") as server:
                server.wait_ready()
                hand_over(tmp_path, task, uffd)
                wait_for("the restore to be finished", lambda: "restore finished" in server.story())
                wait_for_rest(server.pid)  # and has closed the restorer's connection
                none_free(server.pid)
                children = [task.fork(orphan=True)]
                message = "no file descriptor is free for a forked child"
                wait_for("the message", lambda: message in server.story())  # logged after the fork went on
                assert f"`prlimit --pid {server.pid} --nofile=" in server.story()
                children += [task.fork(orphan=True) for _ in range(FOR_FORKS - 2)]
                # What the last one finds zeroed is only to be seen in a file.
                assert task.do("madvise", BASE, 20, MADV_WIPEONFORK) == "0"
                children.append(task.fork(orphan=True))
                task.tell("fork", 1)
                wait_for_faults(task.pid)
                wait_for_rest(server.pid)
                assert task.busy()
                children[0].check(BASE, PAGES, file.first_id)
                children[-1].check(BASE, 20, 0)
                children[-1].check(BASE + 4096 * 20, PAGES - 20, file.first_id + 20)
                all_free(server.pid)
                children.append(task.forked())
                children[-1].check(BASE + 4096 * 20, PAGES - 20, file.first_id + 20)
                task.check(BASE, PAGES, file.first_id)
                for child in children:
                    child.close()
                os.kill(server.pid, signal.SIGINT)
                assert server.wait() == 0
        finally:
            task.close()


def hand_over(images: Path, task: Task, uffd: int) -> None:
    """As a restorer does; the daemon alone has the uffd then."""
    with socket.socket(socket.AF_UNIX) as restorer:
        restorer.connect(f"{images}/lazy-pages.socket")
        credentials = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("=3i", task.pid, 0, 0))
        restorer.sendmsg([struct.pack("=i", task.pid)], [credentials])
        socket.send_fds(restorer, [b"\0"], [uffd])
        os.close(uffd)
        restorer.sendall(struct.pack("=i", 0x52535446))
