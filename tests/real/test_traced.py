"""Tasks that others look at while they miss pages: `criu dump`, debuggers, `ps` (docs/criu.md)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.processes import Server, nothing_left, reap, start, wait_for
from tests.support.remote import leave_at_source, our_page_server
from tests.support.restore import Checkpoint, Checkpoints, Daemon, LazyRestore, lazy_restore, our_daemon

both = pytest.mark.parametrize("criu", all_criu())
newer = pytest.mark.parametrize("criu", all_criu()[1:])
LAZY = our_daemon("--no-background")
PROGRAMS = Path(__file__).parents[1] / "support" / "programs"
TRACER = Path(__file__).parents[1] / "support" / "tracer.py"
MEGABYTES = 24
ATTEMPTS = 5

WAITED = re.compile(r"WARNING .*: .* traces it and has to wait for [\d,]+ pages")
TOO_LATE = "Discard that dump, and dump again when this daemon has ended"


def log_of(restored: LazyRestore) -> str:
    return (restored.work / "serve.log").read_text()


def dump_while_served(restored: LazyRestore, images: Path, *options: str) -> bool:
    """`criu dump`: whether it can be used. If not, the daemon has said so."""
    checkpoint = restored.checkpoint
    images.mkdir()
    checkpoint.criu.dump(checkpoint.pid, images, *options)
    if not options:
        reap(checkpoint.pid)
    assert restored.server.wait() == 0
    log = log_of(restored)
    assert WAITED.search(log) or TOO_LATE in log, log
    return TOO_LATE not in log


def check_images(checkpoint: Checkpoint, images: Path, work: Path) -> None:
    """The task that was dumped is complete."""
    work.mkdir()
    checkpoint.forget_results()
    again = Checkpoint(checkpoint.criu, checkpoint.scenario, checkpoint.pid, images, checkpoint.results)
    with lazy_restore(again, our_daemon(), work) as restored:
        restored.check_all()


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    ("scenario", "told"),
    [
        pytest.param("single", True, id="single"),
        pytest.param("tree", True, id="tree"),
        pytest.param("single", False, id="single-inotify"),
    ],
)
def test_a_dump_finds_all_memory(
    criu: Criu, scenario: str, told: bool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """CRIU attaches to each task first, and waits there. In another network namespace the kernel tells otherwise."""
    checkpoint = checkpoints.get(criu, scenario)
    daemon = LAZY if told else Daemon(LAZY.name, ("unshare", "--net", *LAZY.command))
    for attempt in range(ATTEMPTS):  # on a busy machine CRIU may be faster; then that is said
        work = tmp_path / str(attempt)
        work.mkdir()
        with lazy_restore(checkpoint, daemon, work) as restored:
            usable = dump_while_served(restored, work / "images")
            assert told == ("polling the tasks" not in log_of(restored))
        if usable:
            check_images(checkpoint, work / "images", tmp_path / "again")
            return
    pytest.fail(f"CRIU was faster {ATTEMPTS} times")


@pytest.mark.slow
@newer
def test_who_goes_on_is_complete_too(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """--leave-running; and the memory comes from a page server."""
    checkpoint = checkpoints.get(criu, "single")
    for attempt in range(ATTEMPTS):
        work = tmp_path / str(attempt)
        (work / "server").mkdir(parents=True)
        leave_at_source(checkpoint.images, work / "left")
        with nothing_left(), our_page_server(checkpoint.images, work / "server") as (port, _server):
            daemon = our_daemon(
                "--no-background", "--page-server", "--address", "127.0.0.1", "--port", str(port)
            )
            with lazy_restore(checkpoint, daemon, work, work / "left") as restored:
                usable = dump_while_served(restored, work / "images", "--leave-running")
                restored.go()
                assert restored.wait_tasks() == 0
                restored.check_verdict()
        if usable:
            check_images(checkpoint, work / "images", tmp_path / "again")
            return
    pytest.fail(f"CRIU was faster {ATTEMPTS} times")


@dataclass
class Onlooked:
    """The program, brought back by CRIU."""

    pid: int
    out: Path
    work: Path
    server: Server
    before: dict[str, bytes]

    def ask(self, signo: int) -> int:
        """Its answer."""
        lines = len(self.out.read_text().splitlines())
        os.kill(self.pid, signo)
        wait_for("an answer", lambda: len(self.out.read_text().splitlines()) > lines)
        return int(self.out.read_text().splitlines()[-1])

    def trace(self, pid: int) -> str:
        done = subprocess.run(
            [sys.executable, str(TRACER), str(pid)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done
        return (done.stdout + done.stderr).strip()

    @property
    def log(self) -> str:
        return (self.work / "serve.log").read_text()


def shown(pid: int) -> dict[str, bytes]:
    return {name: Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ", "auxv")}


@contextmanager
def onlooked(criu: Criu, folder: Path, daemon: Daemon, prefix: Sequence[str] = ()) -> Iterator[Onlooked]:
    """It has a large environment, so that its arguments are pages away from where it runs."""
    program, out, images = folder / "onlooked", folder / "out", folder / "images"
    images.mkdir()
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", program, PROGRAMS / "onlooked.c"], check=True, timeout=60)
    with nothing_left():
        environment = {"PATH": "/bin", **{f"LARGE{i}": "x" * 4000 for i in range(20)}}
        process = start([program, out, str(MEGABYTES)], cwd=folder, env=environment)
        wait_for("its memory", lambda: out.exists() and out.read_text())
        before = shown(process.pid)
        criu.dump(process.pid, images)
        process.wait(30)
        daemon = Daemon(daemon.name, (*prefix, *daemon.command))
        with daemon.start(images, folder) as server:
            server.wait_ready()
            criu.restore(images, work=folder)
            yield Onlooked(process.pid, out, folder, server, before)


@pytest.mark.loop("criu-4.2")
@both
def test_what_ps_shows(criu: Criu, tmp_path: Path) -> None:
    with onlooked(criu, tmp_path, LAZY) as task:
        wait_for("its command line", lambda: shown(task.pid) == task.before)
        assert "traces it" not in task.log


@pytest.mark.loop("criu-4.2")
@both
def test_a_debugger_sees_all(criu: Criu, tmp_path: Path) -> None:
    with onlooked(criu, tmp_path, LAZY) as task:
        assert task.trace(task.pid) == "0 0"
        assert WAITED.search(task.log)
        assert "no page is missing any more; python" in task.log
        assert task.server.wait() == 0


@newer
def test_a_debugger_sees_all_of_a_forked_child(criu: Criu, tmp_path: Path) -> None:
    """Its process is not known to us, only that it misses pages."""
    with onlooked(criu, tmp_path, LAZY) as task:
        child = task.ask(signal.SIGUSR2)
        assert task.trace(child) == "0 0"
        assert re.search(rf"process {child}, forked by a task: .* traces it", task.log)


@newer
def test_where_the_kernel_does_not_tell(criu: Criu, tmp_path: Path) -> None:
    """In another network namespace there is no process connector: it is found out, though later."""
    with onlooked(criu, tmp_path, LAZY, ["unshare", "--net"]) as task:
        wait_for("the look at its tracer", lambda: "polling the tasks" in task.log)
        tracer = start([sys.executable, TRACER, str(task.pid)])
        wait_for("the daemon to notice", lambda: "traces it" in task.log)
        tracer.wait(60)
        assert task.server.wait() == 0
        assert "polling the tasks" in task.log


@newer
def test_a_tracer_that_is_traced_itself(criu: Criu, tmp_path: Path) -> None:
    """It can't be stopped: then it is said what that means."""
    with onlooked(criu, tmp_path, LAZY) as task:
        outer = f"""
import os, ctypes, signal, subprocess, sys
libc = ctypes.CDLL(None)
child = subprocess.Popen([sys.executable, "-c", "import sys, runpy; sys.stdin.readline(); "
    "sys.argv[1:] = ['{task.pid}']; runpy.run_path('{TRACER}')"], stdin=subprocess.PIPE)
libc.ptrace(0x4206, child.pid, 0, 0)
child.stdin.write(b"\\n")
child.stdin.close()
while True:
    pid, status = os.waitpid(child.pid, 0x40000000)
    if not os.WIFSTOPPED(status):
        break
    libc.ptrace(7, pid, 0, 0)
"""
        subprocess.run([sys.executable, "-c", outer], timeout=60, check=False, capture_output=True)
        assert "and could not be stopped (Operation not permitted) while it misses" in task.log
        assert TOO_LATE in task.log
        assert task.server.wait() == 0


@newer
def test_a_userfaultfd_of_its_own(criu: Criu, tmp_path: Path) -> None:
    """EBUSY (16) while the memory is ours, as the README says; then it is the program's again."""
    with onlooked(criu, tmp_path, LAZY) as task:
        assert task.ask(signal.SIGUSR1) == 16
        task.server.signal(signal.SIGTERM)  # completes
        assert task.server.wait() == 0
        assert task.ask(signal.SIGUSR1) == 0


def test_who_held_a_tracer_dies(tmp_path: Path) -> None:
    """The tracer goes on."""
    holder_code = """
import sys, threading
from lazypages.engine.tracers import Tracers
tracers = Tracers()
tracers.watch(int(sys.argv[1]), watched=True)
threading.Thread(target=tracers.run).start()
print("ready", flush=True)
"""
    with nothing_left():
        target = start(["sleep", "infinity"])
        said = tmp_path / "said"
        holder = start([sys.executable, "-c", holder_code, str(target.pid)], output=said)
        wait_for("the holder", lambda: said.read_text() == "ready\n")
        tracer = start([sys.executable, TRACER, str(target.pid)])
        wait_for("the tracer to stand still", lambda: state_of(tracer.pid) == "t")
        holder.kill()
        assert tracer.wait(30) == 0


#: A daemon's watch for tracers of all processes. Says what it is told, and releases a tracer for each line of input.
WATCHES = """
import select, sys, threading
from lazypages.engine.tracers import Tracers
with Tracers() as tracers:
    tracers.watch(0, watched=True)
    thread = threading.Thread(target=tracers.run)
    thread.start()
    print("ready", flush=True)
    while True:
        readable = select.select([sys.stdin, tracers.event_fd], [], [])[0]
        if tracers.event_fd in readable:
            for attach in tracers.take():
                if attach.pid == int(sys.argv[1]):
                    print("attach", attach.pid, attach.tracer, attach.owner, attach.error, flush=True)
                elif not attach.error:
                    tracers.release(attach.tracer)  # of another test on this machine
        if sys.stdin in readable:
            line = sys.stdin.readline()
            if not line:
                break
            tracers.release(int(line))
    tracers.stop()
    thread.join()
"""


@pytest.mark.parametrize("first", [0, 1])
def test_two_daemons_hold_one_tracer(first: int, tmp_path: Path) -> None:
    """It goes on when both have released it; and they do not hold each other."""
    with nothing_left():
        target = start(["sleep", "infinity"])
        said = [tmp_path / "0", tmp_path / "1"]
        daemons = []
        for path in said:
            with path.open("wb") as output:
                command = [sys.executable, "-c", WATCHES, str(target.pid)]
                daemons.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, text=True))
            wait_for("a daemon", lambda path=path: path.read_text() == "ready\n")
        tracer = start([sys.executable, TRACER, str(target.pid)])
        attach = f"ready\nattach {target.pid} {tracer.pid} {tracer.pid} 0\n"
        for path in said:
            wait_for("it to be held", lambda path=path: path.read_text() == attach)
        assert state_of(tracer.pid) == "t"

        def release(number: int) -> None:
            stdin = daemons[number].stdin
            assert stdin
            stdin.write(f"{tracer.pid}\n")
            stdin.flush()

        release(first)
        time.sleep(0.3)
        assert state_of(tracer.pid) == "t"
        release(1 - first)
        assert tracer.wait(30) == 0
        assert [path.read_text() for path in said] == [attach] * 2
        for daemon in daemons:
            assert daemon.stdin
            daemon.stdin.close()
            assert daemon.wait(30) == 0


@newer
def test_two_daemons_with_forked_children(criu: Criu, tmp_path: Path) -> None:
    """Each makes every tracer on the machine wait for a moment, and would make the other wait."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with onlooked(criu, folders[0], LAZY) as one:
        child = one.ask(signal.SIGUSR2)
        with onlooked(criu, folders[1], LAZY) as two:
            two.ask(signal.SIGUSR2)
            assert one.trace(child) == "0 0"
            assert two.trace(two.pid) == "0 0"
            for task in (one, two):
                assert task.server.wait() == 0
                assert "could not be stopped" not in task.log


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
