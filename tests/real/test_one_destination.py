"""The tasks of `dumptool dump --lazy-pages` live in one place: what ends the source, what does not, who hears of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.real.test_criu_namespace import NAMESPACE
from tests.real.test_dump_lazy import LazyDump, Victim, lazy_dump, ours, running
from tests.real.test_pageserver_criu import remote_daemon
from tests.support.criu import Criu
from tests.support.memory_cgroup import memory_cgroup
from tests.support.processes import descendants, nothing_left, wait_for
from tests.support.proxy import Proxy
from tests.support.restore import Daemon, LazyRestore, Program

OLD, NEW = Criu("4.1"), Criu("4.2")
SLOW = 0.05  # s that each 64 KiB from the source take longer: all of them take a quarter of a minute

RESTORERS = {
    "criu-4.1": [str(OLD.path), "restore"],
    "criu-4.2": [str(NEW.path), "restore"],
    "ours": [sys.executable, "-m", "lazypages", "restore"],
}


class Destination(LazyRestore):
    """A restore in a PID namespace of its own. `pid`: of its one task, as seen from here."""

    pid = 0
    restorer = 0

    def wait_restored(self, program: Program) -> None:
        log = self.work / ("serve.log" if self.daemon.ours else "restore.log")
        words = "restore finished" if self.daemon.ours else "Restore finished"
        wait_for("the restore", lambda: log.exists() and words in log.read_text(errors="replace"))
        (self.pid,) = [
            pid for pid in descendants(self.restorer) if os.readlink(f"/proc/{pid}/exe") == str(program.path)
        ]

    def give_up(self) -> None:
        """As with two interrupts."""
        self.server.signal(signal.SIGTERM)
        wait_for("the first signal", lambda: "a second Ctrl-C" in self.server.story())
        self.server.signal(signal.SIGTERM)
        assert self.server.wait() == 1

    def check_memory(self) -> None:
        """It finds every byte right."""
        self.go()
        wait_for("the verdict", lambda: len(self.reports()) == self.checkpoint.scenario.reports)
        self.check_verdict()


@contextmanager
def destination(
    victim: Victim,
    daemon: Daemon,
    program: Program,
    work: Path,
    restorer: str = "criu-4.1",
    *,
    wait: bool = True,
) -> Iterator[Destination]:
    """Its task runs, and waits for its go; or, unless `wait`, its restore is under way."""
    work.mkdir()
    images = victim.checkpoint.images
    with nothing_left(), daemon.start(images, work) as server:
        server.wait_ready()
        restored = Destination(victim.checkpoint, work, daemon, server)
        command = [*RESTORERS[restorer], "-D", str(images), "-W", str(work)]
        with (
            (work / "restore.out").open("wb") as stream,
            subprocess.Popen(
                [*NAMESPACE, *command, "--lazy-pages", "-v4", "-o", "restore.log"],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            ) as process,
        ):
            try:
                restored.restorer = process.pid
                if wait:
                    restored.wait_restored(program)
                elif daemon.ours:  # before a task has come, a server with another dump would end the daemon
                    wait_for("the first task", lambda: " lazy page" in server.story())
                yield restored
            except BaseException as error:
                error.add_note(restored.story())
                raise
            finally:
                process.kill()


@contextmanager
def source_of(victim: Victim) -> Iterator[LazyDump]:
    with lazy_dump(victim.pid, victim.checkpoint.images) as source:
        source.wait_ready()
        yield source


@contextmanager
def slow_way(source: LazyDump) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", source.port), plan=lambda _: None, pause=lambda _: SLOW) as proxy:
        yield proxy


def daemon_of(client: str, port: int) -> Daemon:
    """ "ours", "ours by faults", or the release of CRIU whose daemon it is."""
    match client:
        case "ours":
            return ours(port)
        case "ours by faults":
            return ours(port, "--no-background")
        case _:
            return remote_daemon(Criu(client), port)


def completes(victim: Victim, source: LazyDump, program: Program, work: Path) -> None:
    """Another destination gets everything, and every byte is right there; the source ends."""
    with destination(victim, ours(source.port), program, work) as restored:
        assert restored.server.wait() == 0
        assert source.wait() == 0
        assert victim.has_ended()
        restored.check_memory()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "restorer", "number"),
    [
        ("ours", "criu-4.1", signal.SIGKILL),
        ("ours", "ours", signal.SIGSEGV),
        ("ours by faults", "criu-4.2", signal.SIGSEGV),
        ("ours by faults", "ours", signal.SIGKILL),
        ("4.1", "criu-4.1", signal.SIGKILL),
        ("4.2", "criu-4.2", signal.SIGKILL),
    ],
)
def test_a_task_that_is_killed(
    client: str, restorer: str, number: int, program: Program, tmp_path: Path
) -> None:
    """At the destination, with most of its pages missing: the source keeps it for another try."""
    criu = NEW if client == "4.2" else OLD
    with running(criu, "small_stacks", program, tmp_path) as victim, source_of(victim) as source:
        with slow_way(source) as proxy:
            daemon = daemon_of(client, proxy.port)
            with destination(victim, daemon, program, tmp_path / "first", restorer) as restored:
                os.kill(restored.pid, number)
                code = restored.server.wait()
                assert code == 1 or not daemon.ours
                # CRIU's says CLOSE, as if all were well, and hangs up, which may be what arrives first.
                said = ("disconnected before it had everything", "have exited or were killed")
                wait_for("its leaving", lambda: any(words in source.output.read_text() for words in said))
                assert victim.is_frozen(source.pid)
        completes(victim, source, program, tmp_path / "second")


@pytest.mark.slow
def test_a_task_that_the_oom_killer_ends(program: Program, tmp_path: Path) -> None:
    """As above, by its memory cgroup, in which what comes has no room."""
    with running(OLD, "small_stacks", program, tmp_path) as victim, source_of(victim) as source:
        with (
            memory_cgroup(1 << 20) as group,
            slow_way(source) as proxy,
            destination(victim, ours(proxy.port), program, tmp_path / "first") as restored,
        ):
            group.write_text(str(restored.pid))
            assert restored.server.wait() == 1
            assert "killed by SIGKILL" in restored.server.story()
            assert victim.is_frozen(source.pid)
        completes(victim, source, program, tmp_path / "second")


@pytest.mark.slow
@pytest.mark.parametrize("client", ["ours", "ours by faults"])
def test_a_task_that_exits_by_itself(client: str, program: Program, tmp_path: Path) -> None:
    """It does not need the rest, wherever that is: the source ends."""
    with running(OLD, "small_stacks", program, tmp_path) as victim, source_of(victim) as source:
        with destination(victim, daemon_of(client, source.port), program, tmp_path / "work") as restored:
            restored.check_memory()
            assert restored.server.wait() == 0
        assert source.wait() == 0
        assert victim.has_ended()


@pytest.mark.slow
def test_the_others_hear_that_one_has_completed(program: Program, tmp_path: Path) -> None:
    """Three destinations of one dump, one of them faster: the other two end what would run twice, at once."""
    with (
        running(OLD, "single", program, tmp_path) as victim,
        source_of(victim) as source,
        slow_way(source) as proxy,
        destination(victim, ours(proxy.port), program, tmp_path / "second") as second,
        destination(victim, ours(proxy.port, "--no-background"), program, tmp_path / "third") as third,
        destination(victim, ours(source.port), program, tmp_path / "first") as first,
    ):
        assert first.server.wait() == 0
        assert source.wait() == 0
        assert victim.has_ended()
        for late in (second, third):
            assert late.server.wait(30) == 1
            assert "another destination has completed this dump" in late.server.story()
            assert [task["state"] for task in late.stats()["tasks"]] == ["killed"]
            wait_for("its end", lambda pid=late.pid: not is_there(pid))
        assert is_there(first.pid)
        first.check_memory()


@pytest.mark.slow
def test_two_that_complete_at_the_same_time(program: Program, tmp_path: Path) -> None:
    """One of them may go on."""
    with (
        running(OLD, "single", program, tmp_path) as victim,
        source_of(victim) as source,
        destination(victim, ours(source.port, "--no-background"), program, tmp_path / "1") as one,
        destination(victim, ours(source.port, "--no-background"), program, tmp_path / "2") as two,
    ):
        for each in (one, two):
            each.server.signal(signal.SIGTERM)  # completes, and ends
        assert sorted(each.server.wait() for each in (one, two)) == [0, 1]
        assert source.wait() == 0
        assert victim.has_ended()
        wait_for("the end of one", lambda: is_there(one.pid) != is_there(two.pid))
        one.check_memory()


def is_there(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("client", ["ours", "4.1", "4.2"])
def test_a_signal_while_the_destination_runs(client: str, program: Program, tmp_path: Path) -> None:
    """However often: it does not run on both sides."""
    criu = NEW if client == "4.2" else OLD
    with running(criu, "small_stacks", program, tmp_path) as victim, source_of(victim) as source:
        with (
            slow_way(source) as proxy,
            destination(victim, daemon_of(client, proxy.port), program, tmp_path / "work") as restored,
        ):
            os.kill(victim.pid, signal.SIGCONT)  # it takes our SIGSTOP away
            source.signal(signal.SIGTERM)
            source.signal(signal.SIGTERM)
            source.signal(signal.SIGINT)
            assert source.wait() == 1
            victim.stays_stopped()
            assert is_there(restored.pid) or client != "ours"  # CRIU's daemon ends, and with it its task
            restored.server.process.kill()
        victim.goes_on_when_told(source, tmp_path)


def test_the_other_way_out(program: Program, tmp_path: Path) -> None:
    """`kill -KILL`, as the message says."""
    with running(OLD, "single", program, tmp_path) as victim, source_of(victim) as source:
        with destination(victim, ours(source.port, "--no-background"), program, tmp_path / "work"):
            source.signal(signal.SIGINT)
            assert source.wait() == 1
            victim.stays_stopped()
        assert f"`kill -KILL {victim.pid}` ends" in source.story()
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.has_ended()


def test_no_restore_has_come(program: Program, tmp_path: Path) -> None:
    """A daemon that is ended before that says so, over all of its connections: then the tasks may go on here."""
    with running(OLD, "single", program, tmp_path) as victim, source_of(victim) as source:
        work = tmp_path / "work"
        work.mkdir()
        with ours(source.port).start(victim.checkpoint.images, work) as server:
            server.wait_ready()
            # As the daemon sees it: before that it can say nothing over the second one.
            wait_for("two connections", lambda: server.story().count(": connected (") == 2)
            server.signal(signal.SIGTERM)
            assert server.wait() == 1
        wait_for("its leaving", lambda: source.output.read_text().count("without requesting a page") == 2)
        assert victim.is_frozen(source.pid)
        source.signal(signal.SIGTERM)
        assert source.wait() == 1
        victim.goes_on_here(tmp_path)


def test_a_signal_while_a_destination_waits(program: Program, tmp_path: Path) -> None:
    """Its restore may be on its way: that it has not said so yet is no promise."""
    with running(OLD, "single", program, tmp_path) as victim, source_of(victim) as source:
        work = tmp_path / "work"
        work.mkdir()
        with ours(source.port).start(victim.checkpoint.images, work) as server:
            server.wait_ready()
            wait_for("a connection", lambda: ": connected" in source.output.read_text())
            wait_for("its side of it", lambda: "connected (lazypages)" in server.story())
            source.signal(signal.SIGTERM)
            assert source.wait() == 1
        victim.goes_on_when_told(source, tmp_path)
