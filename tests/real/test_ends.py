"""How a task ended that missed pages: by itself, or killed. The exit status and the summary tell."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake import restored_tasks, serve_command, served_tasks, serving
from tests.support.memory_cgroup import memory_cgroup
from tests.support.processes import Server, nothing_left, wait_for

pytestmark = pytest.mark.timeout(120)

PAGES = 600


def tasks_of(directory: Path) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = json.loads((directory / "stats.json").read_text())["tasks"]
    return tasks


@pytest.mark.loop("37-reaped at once")
@pytest.mark.parametrize("waited_for", [False, True], ids=["zombie", "reaped at once"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN + 3])
def test_killed(number: int, waited_for: bool, restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background") as (tasks, server):
        tasks.say("touch 10")
        if waited_for:
            tasks.tell("wait")
        for pid in tasks.pids:
            os.kill(pid, number)
        assert server.wait() == 1
        if waited_for:
            assert tasks.told_statuses() == [128 + number] * 2
        name = "signal 37" if number == 37 else signal.Signals(number).name
        assert f"task {tasks.pids[0]}: killed by {name} while it missed 5" in server.story()
        assert "2 killed by a signal" in server.story()
        assert f"task {tasks.pids[1]} (restored): killed by {name}, 5" in server.story()
    assert [(task["state"], task["signal"]) for task in tasks_of(tmp_path)] == [("died", name)] * 2


def test_killed_by_the_oom_killer(restored_program: Path, tmp_path: Path) -> None:
    """Copies are charged to the task's memory cgroup, in which there is not enough room for either."""
    pages = 16 << 8
    with (
        memory_cgroup(12 << 20) as group,
        nothing_left(),
        restored_tasks(restored_program, 2, pages) as tasks,
    ):
        for pid in tasks.pids:
            group.write_text(str(pid))
        with serving(tmp_path, tasks, pages) as server:
            tasks.say("finish")
            assert server.wait() == 1
            assert tasks.statuses() == [128 + signal.SIGKILL] * 2
            assert f"task {tasks.pids[0]}: killed by SIGKILL while it missed" in server.story()
            assert "2 killed by a signal" in server.story()
    assert [(task["state"], task["signal"]) for task in tasks_of(tmp_path)] == [("died", "SIGKILL")] * 2


@pytest.mark.slow
@pytest.mark.every_kernel
@pytest.mark.parametrize("how", ["exit", "exec"])
@pytest.mark.parametrize("waited_for", [False, True], ids=["zombie", "reaped at once"])
def test_by_itself(how: str, waited_for: bool, restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background") as (tasks, server):
        tasks.say("touch 10")
        tasks.say(how)
        if waited_for:
            tasks.tell("wait")
        assert server.wait() == 0
        assert "2 exited before completion" in server.story()
    assert [(task["state"], task["signal"]) for task in tasks_of(tmp_path)] == [("gone", None)] * 2


def test_killed_when_complete(restored_program: Path, tmp_path: Path) -> None:
    """It had all its memory: what became of it then is not the daemon's business."""
    with served_tasks(restored_program, tmp_path, 2, PAGES) as (tasks, server):
        wait_for("the end", lambda: server.process.poll() is not None)
        os.kill(tasks.pids[0], signal.SIGKILL)
        assert server.wait() == 0
    assert [task["state"] for task in tasks_of(tmp_path)] == ["complete"] * 2


def serve_patched(script: str, images: Path, *options: str) -> Server:
    """`serve` as that Python script starts it."""
    command = [sys.executable, "-c", script, *serve_command(images, *options)[3:]]
    return Server(command, output=images / "serve.out")


#: `serve` on a kernel that says to nobody but a parent how a process has ended.
OLD_KERNEL = """
import lazypages.loop.exit_events, lazypages.loop.processes, sys
from lazypages.__main__ import main
class Lib:
    def lp_exit_status(self, pidfd): return -1
    def lp_exit_status_works(self): return False
lazypages.loop.exit_events.lib = lazypages.loop.processes.lib = Lib()
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "exit", "exec"])
def test_on_kernels_before_6_15(how: str, restored_program: Path, tmp_path: Path) -> None:
    """Its parent waits for it at once, and so nothing is left of it."""
    start = partial(serve_patched, OLD_KERNEL)
    with served_tasks(restored_program, tmp_path, 4, PAGES, "--no-background", start=start) as (
        tasks,
        server,
    ):
        tasks.say("touch 10")  # it has them
        if how != "kill":
            tasks.say(how)
        tasks.tell("wait")
        for pid in tasks.pids:
            if how == "kill":
                os.kill(pid, signal.SIGKILL)
        assert server.wait() == (how == "kill")
    ends = [(task["state"], task["signal"]) for task in tasks_of(tmp_path)]
    assert ends == [("died", "SIGKILL") if how == "kill" else ("gone", None)] * 4


UNKNOWN = """
import lazypages.loop.processes, sys
from lazypages.__main__ import main
lazypages.loop.processes.Process.exit_status = lambda self: None
main()
"""


def test_nobody_knows(restored_program: Path, tmp_path: Path) -> None:
    """As where the kernel does not tell, and its parent has waited for it: not a success."""
    start = partial(serve_patched, UNKNOWN)
    with served_tasks(restored_program, tmp_path, 1, PAGES, "--no-background", start=start) as (
        tasks,
        server,
    ):
        tasks.say("exit")
        assert server.wait() == 1
        assert "600 pages, cause unknown" in server.story()
        assert "1 ended before completion, cause unknown" in server.story()
    assert [task["state"] for task in tasks_of(tmp_path)] == ["ended"]
