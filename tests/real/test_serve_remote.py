"""Real `criu restore --lazy-pages` whose pages come from page servers, CRIU's and ours."""

from __future__ import annotations

import random
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from images_spec.flags import PAGE_SIZE
from tests.support.blocked import wait_for_faults
from tests.support.criu import Criu, all_criu
from tests.support.hosts import Host, Link, two_hosts
from tests.support.processes import Server, nothing_left, wait_for
from tests.support.proxy import Fault, Proxy
from tests.support.remote import criu_page_server, free_port, leave_at_source, our_page_server
from tests.support.restore import Checkpoints, Daemon, lazy_restore, our_daemon

both = pytest.mark.parametrize("criu", all_criu())
OURS = Criu("4.1")
CUTS = 500


def page_server(
    kind: str, criu: Criu, images: Path, work: Path
) -> AbstractContextManager[tuple[int, Server]]:
    work.mkdir()
    return criu_page_server(criu, images, work) if kind == "criu" else our_page_server(images, work)


@contextmanager
def page_server_at(
    address: str, *options: str, images: Path, work: Path, host: Host | None = None
) -> Iterator[Server]:
    """Ours, at that address."""
    work.mkdir()
    command = [sys.executable, "-m", "lazypages", "page-server", "--lazy-pages", "-D", str(images)]
    command += ["-W", str(work), "--address", address, *options, "-v4", "-o", "page-server.log"]
    command = (host or Host()).command(*command)
    with Server(command, output=work / "out", logs=[work / "page-server.log"]) as server:
        server.wait_ready()
        yield server


def remote_options(port: int) -> list[str]:
    return ["--page-server", "--address", "127.0.0.1", "--port", str(port)]


@pytest.mark.loop("tree-ours-criu-4.2")
@both
@pytest.mark.parametrize("server", ["criu", "ours"])
@pytest.mark.parametrize("scenario", ["single", "tree", "interpreter", "fragments"])
def test_all_from_a_server(
    criu: Criu, server: str, scenario: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """In the background: each page is placed once, and the server hears the end."""
    checkpoint = checkpoints.get(criu, scenario)
    images = tmp_path / "images"
    left = leave_at_source(checkpoint.images, images)
    with nothing_left(), page_server(server, criu, checkpoint.images, tmp_path / "server") as (port, process):
        with lazy_restore(checkpoint, our_daemon(*remote_options(port)), tmp_path, images) as restored:
            assert restored.server.wait() == 0
            stats = restored.stats()
            assert {task["pid"]: task["pages"]["copied_by_source"] for task in stats["tasks"]} == {
                pid: {"remote": pages} for pid, pages in left.items()
            }
            # a fault may ask once more for a page that is on its way behind others
            crossed = stats["page_servers"][0]["pages"]
            assert sum(left.values()) <= crossed <= sum(left.values()) + stats["faults"]
            restored.go()
            assert restored.wait_tasks() == 0
            restored.check_verdict()
        assert process.wait() == 0


@pytest.mark.loop("threads-ours-criu-4.2", "moves-criu-criu-4.2")
@both
@pytest.mark.parametrize("server", ["criu", "ours"])
@pytest.mark.parametrize("scenario", ["single", "threads", "family", "moves", "unmaps", "forks_under_load"])
def test_faults_over_the_network(
    criu: Criu, server: str, scenario: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """By faults alone, half of the pages here and half there, while the tasks fork and change their layout."""
    checkpoint = checkpoints.get(criu, scenario)
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images, share=0.5)
    with (
        nothing_left(),
        page_server(server, criu, checkpoint.images, tmp_path / "server") as (port, _process),
        lazy_restore(
            checkpoint, our_daemon("--no-background", *remote_options(port)), tmp_path, images
        ) as restored,
    ):
        restored.check_all()


@pytest.mark.loop("trio")
@pytest.mark.parametrize("loop", ["asyncio", "trio", "uvloop"])
def test_loops(loop: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get(OURS, "tree")
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images, share=0.8)
    with (
        nothing_left(),
        page_server("ours", OURS, checkpoint.images, tmp_path / "server") as (port, _process),
        lazy_restore(
            checkpoint, our_daemon("--loop", loop, *remote_options(port)), tmp_path, images
        ) as restored,
    ):
        restored.check_all()


def test_a_directory_stands_in(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """--source local:DIR: what the images lack is taken from there, and nothing needs a network."""
    checkpoint = checkpoints.get(OURS, "tree")
    images = tmp_path / "images"
    left = leave_at_source(checkpoint.images, images, share=0.5)
    daemon = our_daemon("--source", f"local:{checkpoint.images}")
    with lazy_restore(checkpoint, daemon, tmp_path, images) as restored:
        assert restored.server.wait() == 0
        for task in restored.stats()["tasks"]:
            assert task["pages"]["copied_by_source"][f"local:{checkpoint.images}"] == left[task["pid"]]
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


@pytest.mark.loop("unix")
@pytest.mark.parametrize("how", ["::1", "localhost", "tcp://[::1]", "unix"])
def test_addresses(how: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """IPv6, names and unix sockets, as options and as URLs."""
    checkpoint = checkpoints.get(OURS, "single")
    images, sock = tmp_path / "images", tmp_path / "pages.sock"
    leave_at_source(checkpoint.images, images)
    with nothing_left(), ExitStack() as stack:
        if how == "unix":
            stack.enter_context(
                page_server_at(f"unix:{sock}", images=checkpoint.images, work=tmp_path / "server")
            )
            options = ["--source", f"unix:{sock}"]
        else:
            port = free_port()
            address = "::1" if "::1" in how else how
            where = (address, "--port", str(port))
            stack.enter_context(page_server_at(*where, images=checkpoint.images, work=tmp_path / "server"))
            if how.startswith("tcp:"):
                options = ["--source", f"{how}:{port}"]
            else:
                options = ["--page-server", "--address", how, "--port", str(port)]
        with lazy_restore(checkpoint, our_daemon(*options), tmp_path, images) as restored:
            restored.check_all()


@dataclass(frozen=True)
class DaemonWithSocket(Daemon):
    """Gets a socket of ours."""

    sock: socket.socket | None = None

    def start(self, images: Path, work: Path) -> Server:
        assert self.sock is not None
        number = self.sock.fileno()
        command = [
            *self.command,
            "-D",
            str(images),
            "-W",
            str(work),
            "--page-server",
            "--ps-socket",
            str(number),
        ]
        return Server(command, output=work / "serve.out", pass_fds=[number])


def test_ps_socket(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """On both sides: a socket that somebody else has connected is all there is."""
    checkpoint = checkpoints.get(OURS, "single")
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images)
    here, there = socket.socketpair()
    command = [sys.executable, "-m", "lazypages", "page-server", "--lazy-pages", "-D", str(checkpoint.images)]
    command += ["-W", str(tmp_path), "--ps-socket", str(there.fileno()), "-v4"]
    with nothing_left(), here, Server(command, output=tmp_path / "out", pass_fds=[there.fileno()]) as server:
        there.close()
        server.wait_ready()
        daemon = DaemonWithSocket("lazypages", our_daemon().command, sock=here)
        with lazy_restore(checkpoint, daemon, tmp_path, images) as restored:
            restored.check_all()
        here.close()
        assert server.wait() == 0


def test_nobody_has_them(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Images without their pages and no server: refused before a restore can begin."""
    images = tmp_path / "images"
    leave_at_source(checkpoints.get(OURS, "single").images, images)
    with our_daemon().start(images, tmp_path) as server:
        assert server.wait() == 1
        assert "--page-server" in server.story()
    assert not (tmp_path / "lazy-pages.socket").exists()


def test_a_server_that_goes_away(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Tasks wait for their pages; a server that is killed and started anew is gone on with."""
    checkpoint = checkpoints.get(OURS, "single")
    images, sock = tmp_path / "images", tmp_path / "pages.sock"
    leave_at_source(checkpoint.images, images)
    daemon = our_daemon("--no-background", "--source", f"unix:{sock}")
    with nothing_left(), ExitStack() as stack:
        first = stack.enter_context(
            page_server_at(f"unix:{sock}", images=checkpoint.images, work=tmp_path / "first")
        )
        restored = stack.enter_context(lazy_restore(checkpoint, daemon, tmp_path, images))
        first.signal(signal.SIGKILL)
        first.process.wait()
        restored.go()
        wait_for_faults(checkpoint.pid)
        assert restored.reports() == []
        sock.unlink(missing_ok=True)
        stack.enter_context(
            page_server_at(f"unix:{sock}", images=checkpoint.images, work=tmp_path / "second")
        )
        restored.check_end()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", [[], ["--no-background"]], ids=["background", "no-background"])
def test_500_random_cuts_while_a_task_runs(mode: list[str], checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Every connection is cut somewhere, some are slow: every byte is right at the end, and no task has ended."""
    checkpoint = checkpoints.get(OURS, "threads")
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images)
    chance, cuts = random.Random(4), 0
    pauses = [chance.choice([0.0, 0.0, 0.002]) for _ in range(100)]

    def plan(_: int) -> Fault | None:
        nonlocal cuts
        cuts += 1
        if cuts > CUTS:
            return None
        return Fault(chance.randrange(4, 24 * PAGE_SIZE), chance.choice(["close", "reset"]))

    with ExitStack() as stack:
        stack.enter_context(nothing_left())
        work = tmp_path / "server"
        work.mkdir()
        port, _ = stack.enter_context(our_page_server(checkpoint.images, work, "--keep-serving"))
        daemon_options = []
        for _ in range(4):
            proxy = Proxy(("127.0.0.1", port), plan, lambda number: pauses[number % 100])
            daemon_options += ["--source", f"tcp://127.0.0.1:{stack.enter_context(proxy).port}"]
        rounds = 0
        while cuts < CUTS:
            work = tmp_path / f"work-{rounds}"
            work.mkdir()
            rounds += 1
            checkpoint.forget_results()
            with lazy_restore(checkpoint, our_daemon(*mode, *daemon_options), work, images) as restored:
                restored.check_all()


@pytest.mark.slow
@pytest.mark.parametrize("server_dies", [False, True], ids=["server stays", "server dies"])
def test_a_network_that_goes_away(server_dies: bool, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Nothing arrives any more, and nobody is told: the task waits, and goes on when the network is back.

    A server that has died meanwhile never said good-bye; there is a new one then.
    """
    checkpoint = checkpoints.get(OURS, "single")
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images)
    with nothing_left(), two_hosts(Link()) as (source, destination), ExitStack() as stack:
        options = [source.address, "--port", "27000", "--insecure"]
        there = partial(page_server_at, *options, images=checkpoint.images, host=source)
        first = stack.enter_context(there(work=tmp_path / "first"))
        ours = our_daemon("--no-background", "--source", f"tcp://{source.address}:27000").command
        daemon = Daemon("lazypages", tuple(destination.command(*ours)))
        restored = stack.enter_context(lazy_restore(checkpoint, daemon, tmp_path, images))
        source.run("ip", "route", "add", "blackhole", f"{destination.address}/32")
        restored.go()
        wait_for("word of the silence", lambda: "silent for" in restored.server.story(), 60)
        wait_for_faults(checkpoint.pid)
        assert restored.reports() == []
        if server_dies:
            first.signal(signal.SIGKILL)
            first.process.wait()
            stack.enter_context(there(work=tmp_path / "second"))
        source.run("ip", "route", "del", "blackhole", f"{destination.address}/32")
        restored.check_end()


@pytest.mark.slow
def test_deadline(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Nobody gives the pages in time: the task gets SIGBUS, never zeros, and the status says so."""
    checkpoint = checkpoints.get(OURS, "single")
    images = tmp_path / "images"
    leave_at_source(checkpoint.images, images)
    with nothing_left(), page_server("ours", OURS, checkpoint.images, tmp_path / "server") as (port, process):
        daemon = our_daemon("--no-background", "--source-deadline", "1", *remote_options(port))
        with lazy_restore(checkpoint, daemon, tmp_path, images) as restored:
            process.signal(signal.SIGKILL)
            process.process.wait()
            restored.go()
            assert restored.wait_tasks() == -signal.SIGBUS
            assert restored.server.wait() == 1
            assert "no page server gave it within 1 s" in restored.server.story()
            assert restored.stats()["tasks"][0]["state"] == "lost"
