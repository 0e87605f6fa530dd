"""The daemon itself is killed (the OOM killer uses SIGKILL): its tasks end or wait, and none of them reads zeros."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from lazypages.control.handover import FINISH
from tests.support.blocked import wait_for_rest_of_all
from tests.support.criu import Criu, all_criu
from tests.support.fake import (
    restored_tasks,
    serve,
    serve_command,
    serve_held,
    served_tasks,
    write_at_once,
    write_images,
)
from tests.support.guard_processes import KILLED, check_that_tasks_wait, guards, kill, wait_for_their_end
from tests.support.kernel import CAN_POISON
from tests.support.processes import Server, descendants, nothing_left, start_as, wait_for
from tests.support.restore import CHILD_ENDED, Checkpoints, lazy_restore, our_daemon
from tests.support.uffd import BASE, PagesFile, Task

pytestmark = pytest.mark.timeout(120)

PAGES = 2000


@pytest.mark.every_kernel
def test_tasks_that_miss_pages_are_killed(restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 2, PAGES, "--no-background") as (tasks, server):
        tasks.say("touch 10")
        assert len(guards()) == 1
        os.kill(server.pid, signal.SIGKILL)
        assert tasks.statuses() == [KILLED, KILLED]
        assert server.wait() == -signal.SIGKILL
        wait_for_their_end()
        for pid in tasks.pids:
            assert f"the daemon was killed; task {pid} misses pages and is killed, too" in server.story()


@pytest.mark.slow
def test_at_any_moment(restored_program: Path, tmp_path: Path) -> None:
    """Tasks that compare all their pages all the time: each ends well or is killed, none finds anything wrong.

    In a third of the runs when the daemon has only just been sent the tasks, else while it serves them. When a kill
    came too late to meet any task, the next ones come earlier.
    """
    chance = random.Random(20_261_123)
    killed, longest = 0, 0.03
    for number in range(25):
        images = tmp_path / str(number)
        images.mkdir()
        options = ["--no-background"] if number % 3 == 2 else []
        with served_tasks(restored_program, images, 2, PAGES, *options) as (tasks, server):
            if number % 3:
                tasks.say("touch 1")
            tasks.say("check")
            time.sleep(chance.random() * longest)
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
            wait_for(
                "the guard to be done or to hold", lambda: not guards() or "whose pids" in server.story()
            )
            if guards():  # one had only just been sent
                kill(tasks.pids)
                statuses = tasks.statuses()
            else:
                statuses = tasks.statuses()
                killed += statuses.count(KILLED)
                longest *= 1 if KILLED in statuses else 0.7
            assert set(statuses) <= {0, KILLED}
            wait_for_their_end()
    assert killed >= 8


def test_what_was_not_received_is_held(restored_program: Path, tmp_path: Path) -> None:
    """uffds that a restorer had sent, and nobody had read: their tasks wait, and do not read zeros."""
    with nothing_left(), restored_tasks(restored_program, 2, PAGES) as tasks:
        write_images(tmp_path, tasks.pids, PAGES)
        with serve(tmp_path) as server:
            server.wait_ready()
            os.kill(server.pid, signal.SIGSTOP)
            tasks.say(f"connect {tmp_path}/lazy-pages.socket")
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
            tasks.say("check")
            wait_for("the message", lambda: "will not come: 2;" in server.story())
            check_that_tasks_wait(tasks)


@contextmanager
def handed_over(
    images: Path, file: PagesFile, command: list[str], first: bytes | signal.Signals = b""
) -> Iterator[tuple[Server, Task]]:
    """A daemon, and one task that does what it is told, whose restore is finished. The daemon alone has its uffd.

    ``first``: what the restorer says before anything else, if that is not right; or a signal for the daemon.
    """
    task = Task.start()
    try:
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        task.do("drop")
        write_images(images, [task.pid], PAGES)
        (images / "pages-1.img").write_bytes(file.page_bytes(0, PAGES))
        with Server(command, output=images / "serve.out") as server:
            server.wait_ready()
            with socket.socket(socket.AF_UNIX) as restorer:
                if first:
                    os.kill(server.pid, signal.SIGSTOP)  # when it goes on all is there
                restorer.connect(f"{images}/lazy-pages.socket")
                if first:
                    if isinstance(first, bytes):
                        restorer.sendall(first)
                    else:
                        os.kill(server.pid, first)
                credentials = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("=3i", task.pid, 0, 0))
                restorer.sendmsg([struct.pack("=i", task.pid)], [credentials])
                socket.send_fds(restorer, [b"\0"], [uffd])
                os.close(uffd)
                restorer.sendall(struct.pack("=I", FINISH))
                os.kill(server.pid, signal.SIGCONT)
                if not first:
                    task.check(BASE, 10, file.first_id)
                    wait_for("the restore to be finished", lambda: "restore finished" in server.story())
                yield server, task
    finally:
        task.close()


@pytest.fixture(scope="module")
def file() -> PagesFile:
    return PagesFile(PAGES)


def switches(pid: int) -> int:
    """How often threads of a process have gone to sleep."""
    lines = [
        line
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for line in (thread / "status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


@pytest.mark.slow
def test_who_got_the_pid_is_not_killed(file: PagesFile, tmp_path: Path) -> None:
    """The process has ended, but another one has its memory (CLONE_VM), and a third one its pid."""
    command = [*serve_command(tmp_path, "--no-background"), "-v4"]
    with nothing_left(), handed_over(tmp_path, file, command) as (server, task):
        pid = task.pid
        task.leave()
        start_as(pid)
        task.check(BASE + 4096 * 10, 10, file.first_id + 10)
        time.sleep(1)  # looks for the end of its memory become rare
        before = switches(server.pid)
        time.sleep(1)
        assert switches(server.pid) - before < 200
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        wait_for("the message", lambda: "will not come: 1;" in server.story())
        task.tell("peek", BASE + 4096 * 100)
        assert task.busy()
        assert len(guards()) == 1
        assert descendants()[pid] == "S"
        os.kill(task.pid, signal.SIGKILL)
        wait_for_their_end()


@pytest.mark.slow
def test_a_restorer_that_is_not_understood(file: PagesFile, tmp_path: Path) -> None:
    """The daemon reads no further, and ends; the uffd that it has not read goes on to the guard."""
    unknown = struct.pack("=i", -4711)
    with nothing_left(), handed_over(tmp_path, file, serve_command(tmp_path), unknown) as (server, task):
        assert server.wait() == 1
        assert "task 4711, which is not in the images" in server.story()
        wait_for("the message", lambda: "the daemon has ended; tasks whose pids" in server.story())
        task.tell("peek", BASE)
        assert task.busy()
        task.close()
        wait_for_their_end()


def test_interrupted_when_a_restore_has_just_connected(file: PagesFile, tmp_path: Path) -> None:
    """The daemon finds signal and restorer at the same time: it serves, or ends, and then the guard has the uffd."""
    with (
        nothing_left(),
        handed_over(tmp_path, file, serve_command(tmp_path), signal.SIGINT) as (server, task),
    ):
        ended = server.wait()
        if ended:
            assert "ended before a restore connected" in server.story()
            wait_for("the message", lambda: "the daemon has ended; tasks whose pids" in server.story())
            task.tell("peek", BASE)
            assert task.busy()
        else:
            task.check(BASE, PAGES, file.first_id)
        task.close()
        wait_for_their_end()


#: `serve` whose engine stops on SIGUSR1, and fails as if epoll_wait(2) did when there is a file named "fail".
FAILING = """
import os, signal, sys, time
from lazypages.__main__ import main
from lazypages.engine.engine import Engine
run, engines, folder = Engine.run, [], sys.argv.pop(1)
def failing(self):
    engines.append(self)
    run(self)
    print("stopped", flush=True)
    while not os.path.exists(folder + "/fail"):
        time.sleep(0.01)
    raise OSError(9, os.strerror(9))
Engine.run = failing
signal.signal(signal.SIGUSR1, lambda *_: engines[0].stop())
main()
"""


@pytest.mark.loop("task")
@pytest.mark.every_kernel
@pytest.mark.parametrize("who", ["task", "child"])
def test_the_engine_fails(who: str, file: PagesFile, tmp_path: Path) -> None:
    """While a task forks, of which nobody can hear any more. No zeros for it, nor for what it had forked before."""
    serving = serve_command(tmp_path, "--no-background")[3:]
    command = [sys.executable, "-c", FAILING, str(tmp_path), *serving, "-v4"]
    with nothing_left(), handed_over(tmp_path, file, command) as (server, task):
        child = task.fork(orphan=True)
        child.check(BASE + 4096 * 10, 10, file.first_id + 10)
        os.kill(server.pid, signal.SIGUSR1)
        wait_for("the engine to stop", lambda: "stopped" in (tmp_path / "serve.out").read_text())
        forking = task if who == "task" else child
        forking.tell("fork", 1)
        assert forking.busy()
        (tmp_path / "fail").touch()
        assert server.wait() == 1
        assert task.process
        assert task.process.wait(60) == -signal.SIGKILL
        story = server.story()
        assert "cannot read userfaultfds any more (Bad file descriptor)" in story
        assert f"the daemon failed; killed it (pid {task.pid})" in story
        assert "Traceback" not in story
        if who == "task" and CAN_POISON:
            assert child.do("peek", BASE + 4096 * 11) == str(file.first_id + 11)
            assert child.do("peek", BASE + 4096 * 100) == f"signal {signal.SIGBUS}"
        elif child.pid in descendants() and descendants()[child.pid] != "Z":
            wait_for("the message", lambda: "the daemon has ended; tasks whose pids" in server.story())
            if who == "task":  # the child has missed nothing yet
                child.tell("peek", BASE + 4096 * 100)
            assert child.busy()
            os.kill(child.pid, signal.SIGKILL)
        child.close()
        wait_for_their_end()


def test_oom_killer(tmp_path: Path) -> None:
    """The guard is no likelier to be taken than whatever is allowed to it, wherever the daemon stands."""
    command = ["sh", "-c", 'echo 700 > /proc/self/oom_score_adj && exec "$@"', "sh", *serve_command(tmp_path)]
    write_images(tmp_path, [4242], PAGES)
    with nothing_left(), Server(command, output=tmp_path / "serve.out") as server:
        server.wait_ready()
        (guard,) = guards()
        score = Path(f"/proc/{guard}/oom_score_adj")
        wait_for("the guard's score", lambda: score.read_text() in {"-1000\n", "0\n"})
        assert Path(f"/proc/{server.pid}/oom_score_adj").read_text() == "700\n"
        os.kill(server.pid, signal.SIGINT)
        server.wait()


@pytest.mark.slow
def test_what_was_sent_to_a_daemon_that_fails_to_start_is_held(
    restored_program: Path, tmp_path: Path
) -> None:
    """A restore may be started before all of the daemon has been imported: if that fails, nobody reads zeros."""
    go = tmp_path / "go"
    with served_tasks(restored_program, tmp_path, 2, PAGES, start=partial(serve_held, go=go)) as (
        tasks,
        server,
    ):
        write_at_once(go, "fail")
        assert server.wait() == 1
        assert not (tmp_path / "lazy-pages.socket").exists()
        tasks.say("check")
        wait_for("the message", lambda: "has ended; tasks whose pids" in server.story())
        check_that_tasks_wait(tasks)


@pytest.mark.loop("races-criu-4.2")
@pytest.mark.parametrize("criu", all_criu()[1:])
@pytest.mark.parametrize("scenario", ["tree", "forks_under_load", "races"])
def test_with_real_criu(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Children whose pids the daemon does not know are among the tasks: they wait, and find nothing wrong."""
    chance = random.Random(20_261_123)
    checkpoint = checkpoints.get(criu, scenario)
    cut_short, longest = 0, 0.1
    for number in range(5):
        work = tmp_path / str(number)
        work.mkdir()
        with lazy_restore(checkpoint, our_daemon("--no-background"), work) as lazily:
            lazily.go()
            time.sleep(chance.random() * longest)
            os.kill(lazily.server.pid, signal.SIGKILL)
            lazily.server.wait()
            wait_for_rest_of_all()
            # one of a tree may hear that a child was killed before it is itself
            reports = lazily.reports()
            assert [one for one in reports if one.bad and one.what != CHILD_ENDED] == []
            if len(reports) < checkpoint.scenario.reports or any(one.bad for one in reports):
                cut_short += 1
            else:
                longest *= 0.5
        checkpoint.forget_results()
    assert cut_short >= 3
