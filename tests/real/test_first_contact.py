"""`lazypages serve` and page servers that can't be used: what is known, and said, before a restore can be started."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import anyio
import pytest

from images_spec import images as image_files
from images_spec.images import Kind
from images_spec.messages import PagemapEntry
from lazypages.bench.pipes import raised_pipe_limit
from lazypages.control.listener import ControlSocket
from lazypages.loop import server as loop_server
from lazypages.loop.options import ServeOptions
from lazypages.net.link import HopelessError, LinkError
from lazypages.net.url import TcpServer
from lazypages.net.wire import Layout
from lazypages.sources.checkpoint import expect
from lazypages.sources.page_server import PageServerSource, RemoteOptions
from lazypages.sources.remote import RemotePages
from tests.real.test_remote_criu import lazy_pages
from tests.support.certificates import Authority
from tests.support.criu import Criu
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
    "the server's purpose": Case(
        lambda given: ours(given, *given.certificate("server", "IP:127.0.0.1\nextendedKeyUsage=clientAuth")),
        with_tls,
        "its extendedKeyUsage lacks serverAuth",
    ),
    "the client's purpose": Case(
        lambda given: ours(given, *given.certificate("server", "IP:127.0.0.1")),
        lambda given: given.certificate("desk", "DNS:desk\nextendedKeyUsage=serverAuth"),
        "the server refuses our certificate: its extendedKeyUsage lacks clientAuth",
        before_ready=False,
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
    "the client's name at CRIU's, for clients only": Case(
        lambda given: criu_with_tls(given, "IP:127.0.0.1"),
        lambda given: given.certificate("desk", "DNS:desk\nextendedKeyUsage=clientAuth"),
        "accepts only a certificate that names its --address (127.0.0.1), and ours is for desk",
        before_ready=False,
    ),
    "the protocol of CRIU's over TLS": Case(
        lambda given: criu_with_tls(given, "IP:127.0.0.1"),
        lambda given: [*given.certificate("same", "IP:127.0.0.1"), "--page-server-protocol", "criu-4.1"],
        "not speak criu-4.1 (--page-server-protocol), or have ended just now",
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
def test_the_wrong_protocol_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The server is asked, because the images say otherwise; the restore goes on in the right one."""
    criu = Criu("4.1")
    checkpoint = checkpoints.get(criu, "single")
    images, work = tmp_path / "lazy", tmp_path / "work"
    leave_at_source(checkpoint.images, images)
    counted_as_by(criu, images)
    work.mkdir()
    with nothing_left(), ExitStack() as stack:
        port, _ = stack.enter_context(criu_page_server(criu, checkpoint.images, work))
        daemon = our_daemon(*at(port), "--page-server-protocol", "criu-4.2")
        restored = stack.enter_context(lazy_restore(checkpoint, daemon, tmp_path, images))
        restored.check_all()
        said = "speaks criu-4.1, not criu-4.2 as --page-server-protocol says"
        assert said in restored.server.story()


@pytest.mark.slow
def test_the_older_protocol_is_named_wrongly(given: Given) -> None:
    """A server of CRIU 4.2 never answers in it; one of CRIU 4.1 could be slow: it is explained, and nothing is done."""
    counted_as_by(Criu("4.2"), given.images)
    said = "no answer for 3 s. A page server of CRIU from 4.2 on, which wrote the images, never answers"
    with nothing_left(), ExitStack() as stack:
        server = criu_page_server(Criu("4.2"), given.checkpoint.images, given.work)
        port, _ = stack.enter_context(server)
        daemon = stack.enter_context(given.serve(*at(port), "--page-server-protocol", "criu-4.1"))
        daemon.wait_ready()
        wait_for("the explanation", lambda: said in daemon.story())
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 1


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
def test_the_right_protocol_at_a_slow_server(
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The images say otherwise, and CRIU 4.1's server answers late: the rest of the probe would end it."""
    monkeypatch.setattr("lazypages.sources.page_server.PROBE_PATIENCE", dict.fromkeys([*Layout, None], 0.2))
    monkeypatch.setattr("lazypages.sources.page_server.SILENCE_EXPLAINED", 0.5)
    criu = Criu("4.1")
    checkpoint = checkpoints.get(criu, "single")
    contents = lazy_pages(checkpoint.images)
    wanted = dict(list(contents.items())[:8])
    with nothing_left(), criu_page_server(criu, checkpoint.images, tmp_path) as (port, server):
        server.signal(signal.SIGSTOP)

        def go_on() -> None:
            wait_for("the explanation", lambda: "no answer for 0.5 s" in caplog.text)
            time.sleep(0.5)  # more than enough for the rest of the probe, if it were sent
            server.signal(signal.SIGCONT)

        later = threading.Thread(target=go_on)
        later.start()
        told = RemoteOptions(layout=Layout.CRIU_4_1, written_by=Layout.CRIU_4_2, deadline=30)
        fetched = fetch([TcpServer(LOOPBACK, port)], list(wanted), options=told)
        later.join()
    fetched.check(wanted)


@contextmanager
def closing_after_the_handshake(context: ssl.SSLContext) -> Iterator[int]:
    """A TLS server that closes each connection as soon as the handshake is over; its port."""
    with socket.create_server((LOOPBACK, 0)) as listener:

        def run() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with suppress(OSError), context.wrap_socket(peer, server_side=True):
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_only_a_refusal_at_the_first_contact_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that closes later may have ended, and a network that fails is no answer."""
    authority = Authority(tmp_path)
    files = authority.files(authority.issue("both"))
    kinds: list[type[Exception]] = []

    async def main() -> None:
        async def attempt(source: PageServerSource) -> None:
            try:
                await source.connect(spare=False, urgent_only=False, reached=lambda: None)
            except LinkError as error:
                kinds.append(type(error))

        with closing_after_the_handshake(files.server_context()) as port:
            address = TcpServer(LOOPBACK, port, tls=True)
            refused = PageServerSource(address, RemoteOptions(tls=files), 1)
            await attempt(refused)
            await attempt(refused)
            error = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
            monkeypatch.setattr(ssl.SSLSocket, "recv_into", Mock(side_effect=error))
            await attempt(PageServerSource(address, RemoteOptions(tls=files), 1))

    anyio.run(main)
    assert kinds == [HopelessError, LinkError, LinkError]


def test_a_signal_during_the_first_attempts(given: Given) -> None:
    """It ends at once, and never says that a restore can be started."""
    with (
        nothing_left(),
        socket.create_server((LOOPBACK, 0)) as silent,
        given.serve(*at(silent.getsockname()[1]), *given.ours) as daemon,
    ):
        silent.settimeout(30)
        peer, _ = silent.accept()
        with peer:
            peer.settimeout(30)
            assert peer.recv(1)  # the handshake has begun, and is never answered
            daemon.signal(signal.SIGTERM)
            assert daemon.wait(30) == 1
        assert daemon.ready_bytes() == b""
        assert "ended before a restore connected" in daemon.story()


def test_a_restorer_that_comes_while_it_ends(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """It connects after the servers were found hopeless, and before that ends the daemon: it is ready after all."""
    began: list[Sequence[str]] = []
    with ControlSocket(given.work) as control, socket.socket(socket.AF_UNIX) as restorer:
        found = RemotePages.is_hopeless.fget
        assert found is not None

        def is_hopeless(remote: RemotePages) -> bool:
            if (hopeless := found(remote)) and not began:
                restorer.connect(str(given.work / "lazy-pages.socket"))
            return bool(hopeless)

        def begin(problems: Sequence[str]) -> None:
            began.append(problems)
            restorer.close()

        monkeypatch.setattr(RemotePages, "is_hopeless", property(is_hopeless))
        options = ServeOptions(True, (TcpServer("node." + "a" * 64, 27000),), RemoteOptions())
        expected = expect(given.images, remote=True)
        server = loop_server.Server(expected, control, options, alone=False)
        summary = anyio.run(server.run, None, begin)
    assert not summary.finished
    ((problem,),) = began
    assert "cannot resolve node.a" in problem


def test_a_named_protocol_is_not_connected_before_an_answer(given: Given) -> None:
    """What is sent by itself is not an answer of a page server; and a connection that is just there says nothing."""
    with nothing_left(), socket.create_server((LOOPBACK, 0)) as listener:
        options = [*at(listener.getsockname()[1]), "--page-server-protocol", "criu-4.2", "-v3"]
        with given.serve(*options) as daemon:
            listener.settimeout(30)
            peer, _ = listener.accept()
            with peer:
                daemon.wait_ready()
                wait_for(
                    "the message", lambda: "connected (criu-4.2); it has not answered yet" in daemon.story()
                )
                peer.sendall(b"SSH-2.0-OpenSSH_10.0\r\n" + bytes(64))
                assert daemon.wait(30) == 1
            assert "the page server's answer does not match the request" in daemon.story()
