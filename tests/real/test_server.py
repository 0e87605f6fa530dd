"""The daemon as a process, with tasks that need no CRIU: what a restorer can do wrong, and many tasks at once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake import restored_tasks, serve, serve_command, serve_held, served_tasks, write_images
from tests.support.kernel import CAN_POISON
from tests.support.processes import Server, wait_for

PAGES = 600
LOOPS = ["uvloop", "asyncio", "trio"]


def stats_of(directory: Path) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads((directory / "stats.json").read_text())
    return stats


@pytest.mark.loop("True-uvloop")
@pytest.mark.every_kernel
@pytest.mark.parametrize(
    "loop", [pytest.param(loop, marks=[pytest.mark.own_kernel] * (loop != "uvloop")) for loop in LOOPS]
)
@pytest.mark.parametrize("background", [True, False])
def test_a_tree(loop: str, background: bool, restored_program: Path, tmp_path: Path) -> None:
    """Three tasks and a zombie; faults before the finish message are answered, each page is given once."""
    options = ["--loop", loop] + ([] if background else ["--no-background"])
    with restored_tasks(restored_program, 3, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES, dead=[999999])
        with serve(tmp_path, *options) as server:
            server.wait_ready()
            assert (tmp_path / "lazy-pages.socket").stat().st_mode & 0o777 == 0o600
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            tasks.say("dead 999999")
            tasks.say("touch 5")
            tasks.say("finish")
            tasks.say("check")
            assert tasks.statuses() == [0, 0, 0]
            assert server.wait() == 0
    assert not (tmp_path / "lazy-pages.socket").exists()
    stats = stats_of(tmp_path)
    assert stats["zombies"] == 1
    assert stats["pages_copied"] == 3 * PAGES
    for task in stats["tasks"]:
        assert task["state"] == "complete"
        assert task["pages"]["copied_by_source"] == {"local": PAGES}
        assert task["faults"]["total"] >= 3  # readahead brings some of the five


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_many_tasks(loop: str, restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 200, 64, "--loop", loop) as (tasks, server):
        tasks.say("check")
        assert tasks.statuses() == [0] * 200
        assert server.wait() == 0
    assert stats_of(tmp_path)["pages_copied"] == 200 * 64


@pytest.mark.slow
def test_background_is_fair(restored_program: Path, tmp_path: Path) -> None:
    """No task waits until another one is complete."""
    pages = 16384
    with served_tasks(restored_program, tmp_path, 3, pages) as (_, server):
        assert server.wait() == 0
    seconds = sorted(task["seconds"] for task in stats_of(tmp_path)["tasks"])
    # each is served in turns of 8 MiB of its 64: the last turns are all near the end
    assert seconds[0] > seconds[-1] * 0.5


@pytest.mark.loop("uvloop")
@pytest.mark.parametrize("loop", LOOPS)
def test_no_finish_message(loop: str, restored_program: Path, tmp_path: Path) -> None:
    """The restorer goes away: faults are answered on, nothing else is brought, and the status says it."""
    with served_tasks(restored_program, tmp_path, 1, PAGES, "--loop", loop, finish=False) as (tasks, server):
        tasks.say("close")
        tasks.say("touch 7")
        wait_for("the message", lambda: "the restore failed" in server.story())
        tasks.say("touch 8")
        assert server.process.poll() is None
        os.kill(tasks.pids[0], signal.SIGKILL)
        assert tasks.statuses() == [137]
        assert server.wait() == 1
    stats = stats_of(tmp_path)
    assert 8 <= stats["pages_copied"] < 20  # with readahead
    assert not stats["restore_finished"]


def test_killed_while_it_faults(restored_program: Path, tmp_path: Path) -> None:
    """One task dies, the others are served on; that it was killed is told."""
    with served_tasks(restored_program, tmp_path, 3, PAGES, "--no-background") as (tasks, server):
        tasks.say("touch 3")
        os.kill(server.pid, signal.SIGSTOP)
        tasks.say("check")  # all of them fault now, and wait
        os.kill(tasks.pids[1], signal.SIGKILL)
        os.kill(server.pid, signal.SIGCONT)
        assert tasks.statuses() == [0, 137, 0]
        assert server.wait() == 1
    assert sorted(task["state"] for task in stats_of(tmp_path)["tasks"]) == ["complete", "complete", "died"]


def test_killed_before_the_restore_is_finished(restored_program: Path, tmp_path: Path) -> None:
    """It is out of service when the news comes that all tasks go on."""
    with served_tasks(restored_program, tmp_path, 3, PAGES, "-v3", finish=False) as (tasks, server):
        os.kill(tasks.pids[1], signal.SIGKILL)
        wait_for("the end of its service", lambda: f"task {tasks.pids[1]}: died" in server.story())
        tasks.say("finish")
        assert server.wait() == 1
    assert sorted(task["state"] for task in stats_of(tmp_path)["tasks"]) == ["complete", "complete", "died"]


def test_interrupt_before_a_restore(tmp_path: Path) -> None:
    write_images(tmp_path, [4242], PAGES)
    with serve(tmp_path) as server:
        server.wait_ready()
        server.signal(signal.SIGINT)
        assert server.wait() == 1
    assert not (tmp_path / "lazy-pages.socket").exists()


@pytest.mark.loop("2-uvloop", "15-trio")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_completes_the_tasks(
    loop: str, number: int, restored_program: Path, tmp_path: Path
) -> None:
    """Even with --no-background: what nobody has touched is brought before the daemon ends."""
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background", "--loop", loop) as (
        tasks,
        server,
    ):
        tasks.say("touch 10")
        server.signal(number)
        assert server.wait() == 0
        assert re.search(r"2 tasks still miss 1,[01]\d\d pages", server.story())
        tasks.say("check")
        assert tasks.statuses() == [0, 0]


def test_interrupt_before_any_task(tmp_path: Path) -> None:
    """A restorer is there and has sent nothing: nobody misses anything, and the restore may still go on."""
    write_images(tmp_path, [4242], PAGES)
    with serve(tmp_path) as server, socket.socket(socket.AF_UNIX) as restorer:
        server.wait_ready()
        restorer.connect(str(tmp_path / "lazy-pages.socket"))
        wait_for("the connection", lambda: not (tmp_path / "lazy-pages.socket").exists())
        server.signal(signal.SIGINT)
        wait_for("the message", lambda: "waiting until it has finished" in server.story())
        assert "0 tasks" not in server.story()
        restorer.close()
        assert server.wait() == 1


#: What a restore from local images has no use for: other commands, page servers, terminals, other loops, other images.
UNUSED = (
    *(
        "lazypages.bench",
        "lazypages.cli.demo",
        "lazypages.pageserver",
        "lazypages.restore",
        "lazypages.cli.show",
        "dumptool",
    ),
    *("lazypages.net.wire", "lazypages.sources.remote", "lazypages.net.url"),
    *("rich", "matplotlib", "trio", "json", "ctypes"),
    *("images_spec.messages", "images_spec.files_pb2", "images_spec.environment_pb2", "images_spec.tty_pb2"),
)


#: What is imported when a restore may be started, and not before.
AFTER_READY = (
    "asyncio",
    "anyio",
    "ssl",
    "dataclasses",
    "uvloop",
    "lazypages.loop.server",
    "lazypages.observe.progress",
)


def test_start_imports_nothing_in_vain(restored_program: Path, tmp_path: Path) -> None:
    """A restore waits for it, and importing is most of what it does."""
    with restored_tasks(restored_program, 1, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        executable, *rest = serve_command(tmp_path, "--loop", "uvloop")
        with Server([executable, "-X", "importtime", *rest], output=tmp_path / "out") as server:
            server.wait_ready()
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            tasks.say("finish")
            wait_for("the event loop", lambda: "| uvloop\n" in (tmp_path / "out").read_text())
            text = (tmp_path / "out").read_text()
            tasks.say("check")
            assert server.wait() == 0
    before, after = map(imported, text.split("waiting for: criu restore"))
    # what import_module is called for is not told itself
    assert {"lazypages.sources.checkpoint", "lazypages.control.listener"} <= before
    assert before.isdisjoint(name for name in before if name.startswith(AFTER_READY))
    assert {"lazypages.loop.server", "asyncio", "ssl", "uvloop"} <= after
    assert (before | after).isdisjoint(UNUSED)


def imported(text: str) -> set[str]:
    """Of what `-X importtime` says."""
    return {line.rpartition("|")[2].strip() for line in text.splitlines() if line.startswith("import time:")}


# A restore may begin before the event loop is there.


def test_interrupted_before_its_event_loop_is_there(tmp_path: Path) -> None:
    write_images(tmp_path, [4242], PAGES)
    with serve_held(tmp_path, go=tmp_path / "go") as server:
        server.wait_ready()
        server.signal(signal.SIGTERM)
        (tmp_path / "go").touch()
        assert server.wait() == 1
        assert "ended before a restore connected" in server.story()
    assert not (tmp_path / "lazy-pages.socket").exists()


def test_interrupted_when_a_restore_has_begun_before_that(restored_program: Path, tmp_path: Path) -> None:
    """The tasks are completed first: what they have sent must not be closed."""
    start = partial(serve_held, go=tmp_path / "go")
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background", start=start) as (
        tasks,
        server,
    ):
        server.signal(signal.SIGTERM)
        (tmp_path / "go").touch()
        tasks.say("check")
        assert tasks.statuses() == [0, 0]
        assert server.wait() == 0
    assert stats_of(tmp_path)["pages_copied"] == 2 * PAGES


def test_a_loop_that_is_not_installed(tmp_path: Path) -> None:
    """Is told before a restore may be started."""
    write_images(tmp_path, [1], 1)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['trio'] = None")
    done = subprocess.run(
        serve_command(tmp_path, "--loop", "trio"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 1
    assert "--loop trio: not installed" in done.stderr
    assert "waiting for" not in done.stderr


@pytest.mark.loop("asyncio")
@pytest.mark.parametrize("loop", LOOPS)
def test_second_interrupt_kills(loop: str, restored_program: Path, tmp_path: Path) -> None:
    """Before the finish message nothing can be completed: the second signal ends all, and no task reads zeros."""
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--loop", loop, finish=False) as (tasks, server):
        tasks.say("touch 10")
        server.signal(signal.SIGINT)
        wait_for("the first signal", lambda: "still miss" in server.story())
        server.signal(signal.SIGINT)
        assert server.wait() == 1
        assert tasks.statuses() == [137, 137]
    assert {task["state"] for task in stats_of(tmp_path)["tasks"]} == {"killed"}


def test_unknown_task_is_killed(restored_program: Path, tmp_path: Path) -> None:
    """A task that the images do not know: its restore fails, and it does not go on with zeros."""
    with restored_tasks(restored_program, 2, PAGES) as tasks:
        write_images(tmp_path, tasks.pids[:1], PAGES)
        with serve(tmp_path, "--no-background") as server:
            server.wait_ready()
            tasks.tell(f"connect {tmp_path}/lazy-pages.socket")
            tasks.answered()
            wait_for("the message", lambda: "not in the images" in server.story())
            os.kill(tasks.pids[0], signal.SIGKILL)
            assert tasks.statuses() == [137, 137]
            assert server.wait() == 1


@pytest.mark.every_kernel
def test_truncated_pages_file_while_serving(restored_program: Path, tmp_path: Path) -> None:
    """Pages that can't be read any more are poisoned; the task dies of SIGBUS rather than read zeros."""
    with served_tasks(restored_program, tmp_path, 1, PAGES, "--no-background") as (tasks, server):
        tasks.say("touch 3")
        os.truncate(tmp_path / "pages-1.img", 100 * 4096 + 5)
        tasks.say("touch 90")
        tasks.say("check")
        wait_for("the message", lambda: "poisoned" in server.story())
        assert tasks.statuses() == [128 + (signal.SIGBUS if CAN_POISON else signal.SIGKILL)]
        assert server.wait() == 1
        assert "can't be read" in server.story()
    stats = stats_of(tmp_path)
    assert stats["tasks"][0]["state"] == ("lost" if CAN_POISON else "killed")
