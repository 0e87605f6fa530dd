"""`dumptool dump --lazy-pages`: the frozen task's memory crosses on demand, and it runs here or there, never on both.

The restores run on the same machine, in PID namespaces of their own: the frozen task keeps its pid.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from images_spec.flags import PAGE_SIZE, PE_LAZY
from lazypages.net.url import PageServerAddress, TcpServer, UnixServer
from lazypages.net.wire import Command, Header, Layout
from lazypages.sources.page_server import RemoteOptions
from tests.real.test_criu_namespace import restore
from tests.real.test_pageserver_criu import remote_daemon
from tests.support.certificates import Authority
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import COMMAND, is_unharmed, pages
from tests.support.pages import Contents, fetch
from tests.support.processes import Server, nothing_left, reap, start, tail, wait_for
from tests.support.restore import SCENARIOS, Checkpoint, Daemon, Program, Restored, our_daemon

both = pytest.mark.parametrize("criu", all_criu())


class LazyDump(Server):
    """`dumptool dump --lazy-pages`; `port` is there once wait_ready() has returned."""

    port = 0

    def wait_ready(self, timeout: float = 30) -> None:
        super().wait_ready(timeout)
        found = re.search(r"serving .* of memory at \S+:(\d+)", self.output.read_text())
        assert found, self.story()
        self.port = int(found[1])

    @property
    def output(self) -> Path:
        return self._output

    def wait_said(self, words: str) -> None:
        wait_for(f"dumptool to say {words!r}", lambda: words in self.output.read_text())


def lazy_dump(pid: int, images: Path, *options: str | Path) -> LazyDump:
    """Started; the images are complete when it is ready."""
    command = [*COMMAND, "dump", "-t", str(pid), "-D", str(images), "--lazy-pages", "-v3", *map(str, options)]
    return LazyDump(command, output=images.parent / f"{images.name}.out")


@dataclass
class Victim:
    """A program that waits for its go; `checkpoint` is what the images will be."""

    checkpoint: Checkpoint

    @property
    def pid(self) -> int:
        return self.checkpoint.pid

    def is_frozen(self, tracer: int) -> bool:
        """Stopped under that tracer, and not ended."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return "State:\tt (tracing stop)" in status and f"TracerPid:\t{tracer}\n" in status

    def has_ended(self) -> bool:
        """Killed from outside, before it had anything to say."""
        return reap(self.pid) == signal.SIGKILL

    def goes_on_when_told(self, source: LazyDump, work: Path) -> None:
        """It may have run elsewhere: it stays stopped, untraced, until somebody does what the message says."""
        assert "may have started the tasks, so they stay stopped here" in source.output.read_text()
        self.stays_stopped()
        (command,) = re.findall(r"`(kill -CONT \d+)`", source.output.read_text())
        subprocess.run(command.split(), check=True, timeout=30)
        self.goes_on_here(work)

    def stays_stopped(self) -> None:
        """As by SIGSTOP, and nobody traces it."""

        def is_stopped() -> bool:
            status = Path(f"/proc/{self.pid}/status").read_text()
            return "State:\tT (stopped)" in status and "TracerPid:\t0\n" in status

        wait_for("the process to be stopped", is_stopped)

    def goes_on_here(self, work: Path) -> None:
        """It runs on, with every byte right."""
        is_unharmed(self.pid)
        here = Restored(self.checkpoint, work)
        here.go()
        assert here.wait_tasks() == 0
        here.check_verdict()


@contextmanager
def running(criu: Criu, scenario: str, program: Program, folder: Path) -> Iterator[Victim]:
    """A victim that has filled its memory."""
    results = folder / "results"
    results.mkdir()
    with nothing_left():
        victim = start(program.command(scenario, results), cwd="/")
        wait_for("the victim to fill its memory", (results / "ready").exists)
        checkpoint = Checkpoint(criu, SCENARIOS[scenario], victim.pid, folder / "images", results)
        yield Victim(checkpoint)


def ours(port: int, *options: str) -> Daemon:
    return our_daemon("--page-server", "--address", "127.0.0.1", "--port", str(port), *options)


def contents(victim: Victim) -> Contents:
    """The lazy pages of its images, from its memory."""
    places = [at for at, flags in pages(victim.checkpoint.images, victim.pid).items() if flags == PE_LAZY]
    with open(f"/proc/{victim.pid}/mem", "rb", buffering=0) as memory:
        return {(victim.pid, at): os.pread(memory.fileno(), PAGE_SIZE, at) for at in places}


@pytest.mark.loop("ours-threads-criu-4.2")
@both
@pytest.mark.parametrize(
    ("client", "scenario"),
    [("ours", "threads"), ("ours", "tree"), ("criu", "small_stacks"), ("criu", "tree")],
)
def test_migration(criu: Criu, client: str, scenario: str, program: Program, tmp_path: Path) -> None:
    """Every byte arrives; the source is ended when the client needs no more."""
    with (
        running(criu, scenario, program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        daemon = ours(source.port) if client == "ours" else remote_daemon(criu, source.port)
        work = tmp_path / "work"
        work.mkdir()
        with restore(victim.checkpoint, daemon, work) as (restored, restorer):
            assert victim.is_frozen(source.pid)
            if client == "criu":  # all that it says is what it has asked for: see test_one_destination.py
                assert restored.server.wait() == 0
            restored.go()
            assert restorer.wait(60) == 0
            restored.check_verdict()
            assert restored.server.wait() == 0
        assert source.wait() == 0
        assert victim.has_ended()


@pytest.mark.slow
@both
def test_both_layouts_and_the_bytes_of_the_frozen_task(criu: Criu, program: Program, tmp_path: Path) -> None:
    layout = Layout.CRIU_4_2 if criu.wire_header_size == 32 else Layout.CRIU_4_1
    with (
        running(criu, "protection", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        expected = contents(victim)
        assert len(expected) > 1000
        options = RemoteOptions(layout=layout)
        fetch([TcpServer("127.0.0.1", source.port)], list(expected), options=options).check(expected)
        assert source.wait() == 0
        assert victim.has_ended()


@pytest.mark.loop("ours")
@pytest.mark.parametrize("second", ["ours", "criu"])
def test_a_client_is_killed(second: str, program: Program, tmp_path: Path) -> None:
    """Midway: nothing happens to the source, and the next client completes."""
    criu = Criu("4.1")
    scenario = "threads" if second == "ours" else "small_stacks"
    with (
        running(criu, scenario, program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        works = tmp_path / "first", tmp_path / "second"
        for work in works:
            work.mkdir()
        with restore(victim.checkpoint, ours(source.port, "--no-background"), works[0]) as (restored, _):
            wait_for("the restore", lambda: "Restore finished" in tail(works[0] / "restore.log"))
            restored.server.process.kill()
            source.wait_said("disconnected before it had everything")
            assert victim.is_frozen(source.pid)
        daemon = ours(source.port) if second == "ours" else remote_daemon(criu, source.port)
        with restore(victim.checkpoint, daemon, works[1]) as (restored, restorer):
            if second == "criu":
                assert restored.server.wait() == 0
            restored.go()
            assert restorer.wait(60) == 0
            restored.check_verdict()
            assert restored.server.wait() == 0
        assert source.wait() == 0
        left = r"disconnected before it had everything, never requested: [1-9][\d,]* pages \("
        assert re.search(left, source.story())
        assert victim.has_ended()


@pytest.mark.slow
def test_a_client_gives_up(program: Program, tmp_path: Path) -> None:
    """Two interrupts kill the restored task; the source must not take that for an end, for it has the only one left."""
    criu = Criu("4.2")
    with (
        running(criu, "threads", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        work = tmp_path / "work"
        work.mkdir()
        with restore(victim.checkpoint, ours(source.port, "--no-background"), work) as (restored, _):
            wait_for("the restore", lambda: "Restore finished" in tail(work / "restore.log"))
            source.signal(signal.SIGSTOP)  # so that nothing more can be completed
            restored.server.signal(signal.SIGINT)
            wait_for("the first interrupt", lambda: "still miss" in restored.server.story())
            restored.server.signal(signal.SIGINT)
            assert restored.server.wait() == 1
            source.signal(signal.SIGCONT)
            source.wait_said("disconnected before it had everything")
            assert victim.is_frozen(source.pid)
        source.signal(signal.SIGTERM)
        assert source.wait() == 1
        victim.goes_on_when_told(source, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resumed_on_request(number: int, program: Program, tmp_path: Path) -> None:
    """A signal, while a client is in the middle: the tasks go on here, and nobody gets another page."""
    with (
        running(Criu("4.1"), "tree", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        assert (victim.checkpoint.images / "inventory.img").exists()
        with socket.create_connection(("127.0.0.1", source.port), timeout=30) as client:
            source.wait_said("connected")
            source.signal(number)
            assert source.wait() == 1
            assert client.recv(1) == b""
        assert "the tasks go on here" in source.story()
        assert "Traceback" not in source.story()
        assert "stay frozen" not in source.story()
        assert not (victim.checkpoint.images / "inventory.img").exists()
        victim.goes_on_here(tmp_path)


@pytest.mark.slow
def test_leave_running(program: Program, tmp_path: Path) -> None:
    with (
        running(Criu("4.1"), "threads", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images, "--leave-running") as source,
    ):
        source.wait_ready()
        expected = contents(victim)
        fetch([TcpServer("127.0.0.1", source.port)], list(expected)).check(expected)
        assert source.wait() == 0
        victim.goes_on_here(tmp_path)


@pytest.mark.parametrize("layout", Layout)
def test_a_client_that_never_asked(layout: Layout, program: Program, tmp_path: Path) -> None:
    """A daemon that is ended before anybody restored says CLOSE as well: it has got nothing, so nothing ends.

    What another one had got before, and lost, does not count.
    """
    with (
        running(Criu("4.1"), "single", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        (pid, address), page = next(iter(contents(victim).items()))
        with socket.create_connection(("127.0.0.1", source.port), timeout=30) as client:
            client.sendall(layout.pack(Header(Command.GET, 1, address, pid)))
            answer = client.recv(layout.header_size + PAGE_SIZE, socket.MSG_WAITALL)
            assert answer[layout.header_size :] == page
        source.wait_said("disconnected before it had everything")
        with socket.create_connection(("127.0.0.1", source.port), timeout=30) as client:
            client.sendall(layout.pack(Header(Command.CLOSE)))
            assert client.recv(4, socket.MSG_WAITALL) == bytes(4)
        source.wait_said("without requesting a page")
        assert victim.is_frozen(source.pid)
        source.signal(signal.SIGTERM)
        assert source.wait() == 1
        victim.goes_on_when_told(source, tmp_path)


@pytest.mark.slow
def test_tls(program: Program, tmp_path: Path) -> None:
    """Only who has a certificate gets pages."""
    authority = Authority(tmp_path / "pki")
    here, there = authority.issue("source"), authority.issue("destination")
    with (
        running(Criu("4.1"), "single", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images, *authority.options(here)) as source,
    ):
        source.wait_ready()
        expected = contents(victim)
        with socket.create_connection(("127.0.0.1", source.port), timeout=30) as client:
            client.sendall(Layout.CRIU_4_1.pack(Header(Command.GET, 1, min(expected)[1], victim.pid)))
            source.wait_said("ERROR")
        assert victim.is_frozen(source.pid)
        address = TcpServer("127.0.0.1", source.port, tls=True)
        options = RemoteOptions(tls=authority.files(there))
        fetch([address], list(expected), options=options).check(expected)
        assert source.wait() == 0
        assert victim.has_ended()


@pytest.mark.slow
@both
def test_migration_with_tls(criu: Criu, program: Program, tmp_path: Path) -> None:
    """To CRIU's own daemon."""
    authority = Authority(tmp_path / "pki")
    here, there = authority.issue("source"), authority.issue("destination")
    with (
        running(criu, "single", program, tmp_path) as victim,
        lazy_dump(
            victim.pid, victim.checkpoint.images, "--address", "127.0.0.1", *authority.options(here)
        ) as source,
    ):
        source.wait_ready()
        work = tmp_path / "work"
        work.mkdir()
        daemon = remote_daemon(criu, source.port, *authority.options(there))
        with restore(victim.checkpoint, daemon, work) as (restored, restorer):
            assert restored.server.wait() == 0
            restored.go()
            assert restorer.wait(60) == 0
            restored.check_verdict()
            assert restored.server.wait() == 0
        assert source.wait() == 0
        assert victim.has_ended()


@pytest.mark.loop("unix")
@pytest.mark.parametrize("how", ["::1", "localhost", "unix"])
def test_addresses(how: str, program: Program, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with (
        running(Criu("4.1"), "single", program, tmp_path) as victim,
        lazy_dump(
            victim.pid, victim.checkpoint.images, "--address", f"unix:{path}" if how == "unix" else how
        ) as source,
    ):
        if how == "unix":
            Server.wait_ready(source)
            assert path.stat().st_mode & 0o777 == 0o600
            address: PageServerAddress = UnixServer(path)
        else:
            source.wait_ready()
            address = TcpServer(how, source.port)
        expected = contents(victim)
        fetch([address], list(expected)).check(expected)
        assert source.wait() == 0
        assert victim.has_ended()
    assert not path.exists()


@pytest.mark.slow
def test_the_frozen_task_is_killed(program: Program, tmp_path: Path) -> None:
    """By somebody else: what was not fetched is lost, and never given as zeros."""
    with (
        running(Criu("4.1"), "single", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        places = list(contents(victim))
        os.kill(victim.pid, signal.SIGKILL)
        wait_for("its end", lambda: "State:\tZ" in Path(f"/proc/{victim.pid}/status").read_text())
        options = RemoteOptions(deadline=1)
        fetched = fetch([TcpServer("127.0.0.1", source.port)], places[:50], options=options, faults=1)
        assert fetched.pages == {}
        assert source.wait() == 1
        assert f"pid {victim.pid} was killed while its pages were being served" in source.story()


@pytest.mark.loop("options0---insecure")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lazy-pages", "--address", "0.0.0.0"], "--insecure"),
        (["--lazy-pages", "--tls", "--tls-cert", "/nowhere"], "/nowhere"),
        (["--port", "0"], "go with --page-server or --lazy-pages"),
    ],
)
def test_refused_before_anything_is_stopped(
    options: list[str], said: str, program: Program, tmp_path: Path
) -> None:
    with running(Criu("4.1"), "single", program, tmp_path) as victim:
        images = victim.checkpoint.images
        command = [*COMMAND, "dump", "-t", str(victim.pid), "-D", str(images), *options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode in {1, 2}
        assert said in result.stderr
        assert "Traceback" not in result.stderr
        assert not images.exists()
        victim.goes_on_here(tmp_path)
