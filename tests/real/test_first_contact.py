"""`lazypages serve` and page servers that can't be used: what is known, and said, before a restore can be started."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from images_spec import images as image_files
from images_spec.images import Kind
from images_spec.messages import PagemapEntry
from lazypages.net.names import PROTOCOLS
from lazypages.net.url import TcpServer
from lazypages.net.wire import Layout
from lazypages.sources.page_server import RemoteOptions
from tests.real.test_remote_criu import lazy_pages
from tests.support.certificates import Authority
from tests.support.criu import Criu, all_criu, raised_pipe_limit
from tests.support.pages import fetch, page_server
from tests.support.processes import Server, nothing_left, wait_for
from tests.support.remote import criu_page_server, free_port, leave_at_source
from tests.support.restore import Checkpoint, Checkpoints, lazy_restore, our_daemon

LOOPBACK = "127.0.0.1"


class Given(NamedTuple):
    """A checkpoint, another one, a copy of the first without its lazy pages, and certificates."""

    checkpoint: Checkpoint
    other: Path
    images: Path
    authority: Authority
    work: Path

    def serve(self, *options: str | Path) -> Server:
        command = [sys.executable, "-m", "lazypages", "serve", "-D", self.images, "-W", self.work, *options]
        return Server(list(map(str, command)), output=self.work / "serve.out")

    def certificate(self, name: str, alternative: str) -> list[str]:
        return self.authority.options(self.authority.issue(name, alternative))

    @property
    def ours(self) -> list[str]:
        """Options with a certificate for another host than the server's."""
        return self.certificate("desk", "DNS:desk")


@pytest.fixture
def given(checkpoints: Checkpoints, tmp_path: Path) -> Given:
    checkpoint = checkpoints.get(Criu("4.2"), "single")
    images, work = tmp_path / "lazy", tmp_path / "work"
    leave_at_source(checkpoint.images, images)
    work.mkdir()
    other = checkpoints.get(Criu("4.1"), "single").images
    return Given(checkpoint, other, images, Authority(tmp_path / "pki"), work)


def at(port: int) -> list[str]:
    return ["--page-server", "--address", LOOPBACK, "--port", str(port)]


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """Something else than a page server, which answers every first message like that; its port."""
    with socket.create_server((LOOPBACK, 0)) as listener:

        def run() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(1 << 16)
                    peer.sendall(answer)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def ours(given: Given, *options: str, images: Path | None = None) -> Iterator[int]:
    """`lazypages page-server`; its port."""
    command = ["--lazy-pages", "--keep-serving", "--address", LOOPBACK, *options]
    with page_server(images or given.checkpoint.images, *command, output=given.work / "server.out") as server:
        server.wait_ready()
        yield server.port


@contextmanager
def criu_with_tls(given: Given, alternative: str) -> Iterator[int]:
    port = free_port()
    options = [
        "--lazy-pages",
        "--address",
        LOOPBACK,
        "--port",
        str(port),
        *given.certificate("criu", alternative),
    ]
    with (
        raised_pipe_limit(),
        given.checkpoint.criu.page_server(given.checkpoint.images, *options, work=given.work) as server,
    ):
        server.wait_ready()
        yield port


@contextmanager
def not_a_page_server(_: Given) -> Iterator[int]:
    with answering(b"SSH-2.0-OpenSSH_10.0\r\n") as port:
        yield port


@contextmanager
def no_server(_: Given) -> Iterator[int]:
    yield free_port()


class Case(NamedTuple):
    """A server, the options after its port, what is said, and whether that is known for sure before readiness."""

    server: Callable[[Given], AbstractContextManager[int]]
    options: Callable[[Given], list[str]]
    said: str
    before_ready: bool = True


def plain(_: Given) -> list[str]:
    return []


def with_tls(given: Given) -> list[str]:
    return given.ours


HOPELESS = {
    "no host name": Case(no_server, lambda _: ["--address", "node." + "a" * 64], "cannot resolve node.a"),
    "not a page server": Case(not_a_page_server, plain, "this is not a page server", before_ready=False),
    "no TLS there": Case(not_a_page_server, with_tls, "the server does not use TLS: it needs --tls"),
    "no TLS there, ours": Case(ours, with_tls, "the server does not use TLS: it needs --tls"),
    "no TLS here": Case(
        lambda given: ours(given, *given.certificate("server", "IP:127.0.0.1")),
        plain,
        "the page server uses TLS: connect with --tls",
        before_ready=False,
    ),
    "no TLS here, CRIU's there": Case(
        lambda given: criu_with_tls(given, "IP:127.0.0.1"),
        plain,
        "the page server uses TLS: connect with --tls",
        before_ready=False,
    ),
    "name": Case(
        lambda given: ours(given, *given.certificate("server", "DNS:other")),
        with_tls,
        "the server's certificate is for other, not for 127.0.0.1: connect to one of these names",
    ),
    "authority": Case(
        lambda given: ours(given, *given.certificate("server", "IP:127.0.0.1")),
        lambda given: Authority(given.work, "stranger").options(given.authority.issue("desk")),
        "--tls-cacert must have the authority that signed it",
    ),
    "another dump": Case(
        lambda given: ours(given, images=given.other),
        plain,
        "has the pages of another dump",
        before_ready=False,
    ),
    "the client's name at CRIU's": Case(
        lambda given: criu_with_tls(given, "IP:127.0.0.1"),
        with_tls,
        "accepts only a certificate that names its --address (127.0.0.1), and ours is for desk",
        before_ready=False,
    ),
    "the protocol of CRIU's over TLS": Case(
        lambda given: criu_with_tls(given, "IP:127.0.0.1"),
        lambda given: [*given.certificate("same", "IP:127.0.0.1"), "--page-server-protocol", "criu-4.1"],
        "or not speak criu-4.1 (--page-server-protocol)",
        before_ready=False,
    ),
}


@pytest.mark.loop("name")
@pytest.mark.parametrize("case", HOPELESS)
def test_what_can_never_work(case: str, given: Given) -> None:
    """One line, exit status 1, and no socket for a restore to wait at."""
    server, options, said, before_ready = HOPELESS[case]
    with (
        nothing_left(),
        server(given) as port,
        given.serve(*at(port), *options(given)) as daemon,
    ):
        assert daemon.wait(30) == 1
        if before_ready:
            assert daemon.ready_bytes() == b""
        line = (given.work / "serve.out").read_text().splitlines()[-1]
        assert line.startswith("lazypages: page server ")
        assert said in line
    assert not (given.work / "lazy-pages.socket").exists()


def test_a_server_that_is_not_there_yet(given: Given) -> None:
    """It is said on the caller's standard error, wherever the log is; and the restore works when it comes."""
    port = free_port()
    command = [sys.executable, "-m", "lazypages", "serve", "-D", given.images, "-W", given.work, "-d"]
    command += ["--pidfile", "pid", "-o", "serve.log", "--stats-json", "stats.json", *at(port)]
    with nothing_left():
        with (given.work / "said").open("w+") as said:  # the daemon keeps standard error open, as CRIU's does
            subprocess.run(
                list(map(str, command)), stdin=subprocess.DEVNULL, stderr=said, timeout=60, check=True
            )
        (line,) = (given.work / "said").read_text().splitlines()
        assert line.startswith(
            f"lazypages: page server tcp://{LOOPBACK}:{port}: Connection refused; trying again"
        )
        assert line.removeprefix("lazypages: ") in (given.work / "serve.log").read_text()
        restore = threading.Thread(target=given.checkpoint.restore, args=(given.work, given.images))
        restore.start()  # it touches a page itself
        options = ["--lazy-pages", "--port", str(port)]
        with page_server(given.checkpoint.images, *options, output=given.work / "server.out") as server:
            server.wait_ready()
            assert server.wait() == 0
        restore.join()
        wait_for("the end of the daemon", (given.work / "stats.json").exists)
        (task,) = json.loads((given.work / "stats.json").read_text())["tasks"]
        assert task["state"] == "complete"


def test_in_the_background_it_can_never_work(given: Given) -> None:
    """The pidfile is gone: it would be in the way of the next try."""
    command = [sys.executable, "-m", "lazypages", "serve", "-D", given.images, "-W", given.work, "-d"]
    command += ["--pidfile", "pid", "--address", "node." + "a" * 64, "--page-server", "--port", "27000"]
    with nothing_left():
        done = subprocess.run(
            list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert b"cannot resolve node.a" in done.stderr
        assert not (given.work / "pid").exists()


def test_a_certificate_that_is_away_for_a_moment(given: Given) -> None:
    """As when it is replaced: the files were right at the start, so it is waited for, and not the end."""
    port = free_port()
    options = given.ours
    key = Path(options[options.index("--tls-key") + 1])
    with nothing_left(), given.serve("-v3", *at(port), *options) as daemon:
        daemon.wait_ready()
        key.rename(key.with_suffix(".old"))
        with ours(given, "--port", str(port), *given.certificate("server", "IP:127.0.0.1")):
            wait_for("the complaint", lambda: f"{key}: No such file" in daemon.story())
            key.with_suffix(".old").rename(key)
            wait_for("the connection", lambda: "connected (lazypages)" in daemon.story())
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.wait(30)


def test_one_of_two_can_never_work(given: Given, tmp_path: Path) -> None:
    """The restore works, with the other."""
    with nothing_left(), ours(given) as good, not_a_page_server(given) as bad:
        daemon = our_daemon("--source", f"tcp://{LOOPBACK}:{bad}", "--source", f"tcp://{LOOPBACK}:{good}")
        with lazy_restore(given.checkpoint, daemon, tmp_path, given.images) as restored:
            assert re.search(
                rf"^lazypages: page server tcp://{LOOPBACK}:{bad}: this is not", restored.server.story(), re.M
            )
            restored.check_all()


def counted_as_by(criu: Criu, images: Path) -> None:
    """Has the pagemaps count their pages in the field that this release uses."""
    for path in images.glob("pagemap-*.img"):
        messages = image_files.read(path, Kind.PAGEMAP)
        for entry in messages[1:]:
            assert isinstance(entry, PagemapEntry)
            if criu.release == "4.1":
                entry.ClearField("nr_pages")
            else:
                entry.compat_nr_pages = 0
        image_files.write(path, Kind.PAGEMAP, messages)


@pytest.mark.slow
@pytest.mark.parametrize("criu", all_criu())
def test_the_wrong_protocol_is_named(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The server is asked, because the images say otherwise; the restore goes on in the right one."""
    checkpoint = checkpoints.get(criu, "single")
    images, work = tmp_path / "lazy", tmp_path / "work"
    leave_at_source(checkpoint.images, images)
    counted_as_by(criu, images)
    work.mkdir()
    right, wrong = sorted(PROTOCOLS, reverse=criu.release == "4.2")
    with nothing_left(), ExitStack() as stack:
        port, _ = stack.enter_context(criu_page_server(criu, checkpoint.images, work))
        daemon = our_daemon(*at(port), "--page-server-protocol", wrong)
        restored = stack.enter_context(lazy_restore(checkpoint, daemon, tmp_path, images))
        restored.check_all()
        assert f"speaks {right}, not {wrong} as --page-server-protocol says" in restored.server.story()


@pytest.mark.slow
def test_a_wrong_protocol_that_nothing_contradicts(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that waits for the rest of a request: the silence is explained."""
    criu = Criu("4.2")
    checkpoint = checkpoints.get(criu, "single")
    wanted = list(lazy_pages(checkpoint.images))[:1]
    with nothing_left(), criu_page_server(criu, checkpoint.images, tmp_path) as (port, _):
        told = RemoteOptions(layout=Layout.CRIU_4_1, deadline=4)
        fetched = fetch([TcpServer(LOOPBACK, port)], wanted, options=told, faults=1)
    assert set(fetched.lost) == set(wanted)
    assert "it has answered nothing so far" in caplog.text
    assert "--page-server-protocol" in caplog.text


def test_nobody_reads_what_is_said(given: Given) -> None:
    """Standard error is a closed pipe: the daemon waits for the server all the same, and signals readiness."""
    readable, writable = os.pipe()
    os.close(readable)
    status, status_writable = os.pipe()
    command = [sys.executable, "-m", "lazypages", "serve", "-D", given.images, "-W", given.work]
    command += ["-o", "serve.log", "--status-fd", str(status_writable), *at(free_port())]
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stderr=writable, pass_fds=[status_writable]
    ) as daemon:
        os.close(writable)
        os.close(status_writable)
        with open(status, "rb") as ready:
            assert ready.read(1) == b"\0"
        daemon.terminate()
    assert "ended before a restore connected" in (given.work / "serve.log").read_text()


def test_an_inherited_socket_that_is_closed(given: Given) -> None:
    """It can't be connected again: that is known, and is not said to be tried again."""
    ours_end, other = socket.socketpair()
    other.close()
    command = [sys.executable, "-m", "lazypages", "serve", "-D", given.images, "-W", given.work]
    command += ["--source", f"fd:{ours_end.fileno()}"]
    with nothing_left(), ours_end:
        done = subprocess.run(
            list(map(str, command)),
            pass_fds=[ours_end.fileno()],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 1
    assert "trying again" not in done.stderr
    assert not (given.work / "lazy-pages.socket").exists()


def test_a_failure_after_readiness_is_logged(given: Given) -> None:
    """A server that closes when readiness was signalled already, as one that answers as late as CRIU's."""
    closing = threading.Event()
    with socket.create_server((LOOPBACK, 0)) as listener:

        def run() -> None:
            with suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.recv(1 << 16)
                        closing.wait()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            with nothing_left(), given.serve(*at(listener.getsockname()[1])) as daemon:
                daemon.wait_ready()
                closing.set()
                wait_for(
                    "a warning", lambda: "closed by the server" in (given.work / "serve.out").read_text()
                )
                daemon.signal(signal.SIGTERM)
                daemon.wait()
        finally:
            closing.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.slow
def test_the_right_protocol_at_a_slow_server(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The images say otherwise, and CRIU 4.1's server answers late: the rest of the probe would end it."""
    criu = Criu("4.1")
    checkpoint = checkpoints.get(criu, "single")
    contents = lazy_pages(checkpoint.images)
    wanted = dict(list(contents.items())[:8])
    with nothing_left(), criu_page_server(criu, checkpoint.images, tmp_path) as (port, server):
        server.signal(signal.SIGSTOP)
        timer = threading.Timer(3.0, server.signal, [signal.SIGCONT])
        timer.start()
        told = RemoteOptions(layout=Layout.CRIU_4_1, written_by=Layout.CRIU_4_2, deadline=8)
        fetched = fetch([TcpServer(LOOPBACK, port)], list(wanted), options=told)
        timer.join()
    fetched.check(wanted)
