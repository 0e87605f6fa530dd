"""Our page server with real CRIU on the other side: restores that take pages, dumps that send images."""

from __future__ import annotations

import filecmp
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from lazypages.bench.pipes import raised_pipe_limit
from lazypages.net.url import TcpServer
from lazypages.net.wire import PAGE_SIZE, Command, Header, ImageType, Layout, encode_dst_id
from lazypages.sources.page_server import RemoteOptions
from tests.real.test_remote_criu import free_port, layout_of, lazy_pages, read_memory
from tests.support.certificates import Authority
from tests.support.criu import Criu, all_criu
from tests.support.pages import BASE, PageServer, fetch, page_at, page_server
from tests.support.processes import Server, nothing_left, start, wait_for
from tests.support.restore import Checkpoints, Daemon, Program, lazy_restore

both = pytest.mark.parametrize("criu", all_criu())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


def remote_daemon(criu: Criu, port: int, *options: str) -> Daemon:
    """`criu lazy-pages --page-server`."""
    command = (str(criu.path), "lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", str(port))
    return Daemon("criu", (*command, *options), ours=False)


@pytest.mark.slow
@both
@pytest.mark.parametrize("scenario", ["single", "tree", "fragments", "heap"])
def test_restore(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """criu restore and criu lazy-pages take all lazy memory from us; the task finds every byte right."""
    checkpoint = checkpoints.get(criu, scenario)
    with page_server(checkpoint.images, "--lazy-pages", output=tmp_path / "server.out") as server:
        server.wait_ready()
        with lazy_restore(checkpoint, remote_daemon(criu, server.port), tmp_path) as restored:
            restored.check_all()
        assert server.wait() == 0  # with its client, as CRIU's


@pytest.mark.slow
@both
def test_restore_with_tls(criu: Criu, checkpoints: Checkpoints, authority: Authority, tmp_path: Path) -> None:
    """Certificates that name one host each: CRIU checks our name, and we need none in CRIU's."""
    ours = authority.issue(f"server-{criu.release}")
    theirs = authority.issue(f"client-{criu.release}", "DNS:desk")
    checkpoint = checkpoints.get(criu, "single")
    options = ["--lazy-pages", "--address", "127.0.0.1", *authority.options(ours)]
    with page_server(checkpoint.images, *options, output=tmp_path / "server.out") as server:
        server.wait_ready()
        daemon = remote_daemon(criu, server.port, *authority.options(theirs))
        with lazy_restore(checkpoint, daemon, tmp_path) as restored:
            restored.check_all()
        assert "disconnected after" in (tmp_path / "server.out").read_text()


@pytest.mark.slow
@both
def test_fetch_with_tls(criu: Criu, checkpoints: Checkpoints, authority: Authority, tmp_path: Path) -> None:
    """The other way round: our client, CRIU's server."""
    theirs, ours = authority.issue(f"theirs-{criu.release}"), authority.issue(f"ours-{criu.release}")
    checkpoint = checkpoints.get(criu, "single")
    contents = lazy_pages(checkpoint.images)
    port = free_port()
    options = ["--lazy-pages", "--address", "127.0.0.1", "--port", str(port), *authority.options(theirs)]
    with (
        raised_pipe_limit(),
        nothing_left(),
        criu.page_server(checkpoint.images, *options, work=tmp_path) as server,
    ):
        server.wait_ready()
        address = TcpServer("127.0.0.1", port, tls=True)
        told = RemoteOptions(written_by=layout_of(criu), tls=authority.files(ours))
        fetched = fetch([address], list(contents), options=told)
        assert server.wait() == 0
    fetched.check(contents)


@pytest.mark.slow
def test_tls_and_a_protocol_that_nobody_has_named(
    checkpoints: Checkpoints, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CRIU 4.2's server can't be asked which it is; who has not said it, nor has images that do, is told to."""
    criu = Criu("4.2")
    theirs, ours = authority.issue("theirs-unnamed"), authority.issue("ours-unnamed")
    checkpoint = checkpoints.get(criu, "single")
    port = free_port()
    options = ["--lazy-pages", "--address", "127.0.0.1", "--port", str(port), *authority.options(theirs)]
    with raised_pipe_limit(), criu.page_server(checkpoint.images, *options, work=tmp_path) as server:
        server.wait_ready()
        told = RemoteOptions(tls=authority.files(ours), deadline=1)
        wanted = list(lazy_pages(checkpoint.images))[:1]
        fetched = fetch([TcpServer("127.0.0.1", port, tls=True)], wanted, options=told, faults=1)
        assert server.wait() == 1
    assert set(fetched.lost) == set(wanted)
    assert "and criu-4.1 was a guess: name it with --page-server-protocol" in caplog.text


# -- receive mode --------------------------------------------------------------------------------------------


def same_images(ours: Path, theirs: Path) -> list[str]:
    """The same images by the same names, byte for byte; their names."""
    names = sorted(path.name for path in theirs.glob("*.img"))
    assert sorted(path.name for path in ours.glob("*.img")) == names
    assert filecmp.cmpfiles(ours, theirs, names, shallow=False) == (names, [], [])
    return names


class Recorder:
    """Stands between a client and a page server, and keeps what the client says."""

    def __init__(self, port: int) -> None:
        self.said = bytearray()
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._listener.settimeout(60)
        client, _ = self._listener.accept()
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            back = threading.Thread(target=self._back, args=(client, server))
            back.start()
            while data := client.recv(1 << 16):
                self.said += data
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
            back.join()

    @staticmethod
    def _back(client: socket.socket, server: socket.socket) -> None:
        while data := server.recv(1 << 16):
            client.sendall(data)


def replay(said: bytes | bytearray, port: int) -> bytes:
    """Say it again to another server; its answers, as far as they come."""
    answers = bytearray()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(said)  # the answers are few and small: they find room on their way
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(1 << 16):
            answers += data
    return bytes(answers)


@pytest.mark.slow
@both
@pytest.mark.parametrize("scenario", ["single", "tree", "fragments"])
def test_dump(criu: Criu, scenario: str, program: Program, tmp_path: Path) -> None:
    """What a real dump sends becomes the same images with us as with CRIU's own server."""
    ours, theirs, again, results = (tmp_path / name for name in ("ours", "theirs", "again", "results"))
    for directory in (ours, theirs, again, results):
        directory.mkdir()
    with nothing_left(), our_receiver(ours, tmp_path) as server:
        server.wait_ready()
        victim = start(program.command(scenario, results), cwd="/")
        wait_for("the victim to fill its memory", (results / "ready").exists)
        with Recorder(server.port) as recorder:
            to = ["--page-server", "--address", "127.0.0.1", "--port", str(recorder.port)]
            criu.dump(victim.pid, again, *to)
        victim.wait(30)
        assert server.wait() == 0
    with receiver(criu, theirs, tmp_path) as (other, port):
        replay(recorder.said, port)
        assert other.wait() == 0
    names = same_images(ours, theirs)
    assert "pages-65537.img" in names


@pytest.mark.slow
@both
def test_dump_with_tls(criu: Criu, program: Program, authority: Authority, tmp_path: Path) -> None:
    """The same task, stopped, is dumped twice: to us, and to CRIU's own server."""
    ours, theirs, results = (tmp_path / name for name in ("ours", "theirs", "results"))
    for directory in (ours, theirs, results):
        directory.mkdir()
    at_server, at_client = (authority.issue(f"{name}-{criu.release}") for name in ("receiver", "sender"))
    to = ["-R", "--page-server", "--address", "127.0.0.1", *authority.options(at_client)]
    with nothing_left():
        victim = start(program.command("single", results), cwd="/")
        wait_for("the victim to fill its memory", (results / "ready").exists)
        os.sched_setaffinity(
            victim.pid, {min(os.sched_getaffinity(0))}
        )  # its number is in the memory: rseq(2)
        os.kill(victim.pid, signal.SIGSTOP)
        options = ["--address", "127.0.0.1", *authority.options(at_server)]
        with our_receiver(ours, tmp_path, *options) as server:
            server.wait_ready()
            (tmp_path / "first").mkdir()
            criu.dump(victim.pid, tmp_path / "first", *to, "--port", str(server.port))
            assert server.wait() == 0
        with receiver(criu, theirs, tmp_path, *authority.options(at_server)) as (other, port):
            (tmp_path / "second").mkdir()
            criu.dump(victim.pid, tmp_path / "second", *to, "--port", str(port))
            assert other.wait() == 0
        victim.kill()
        victim.wait(30)
    assert "pages-65537.img" in same_images(ours, theirs)


@pytest.mark.slow
@both
def test_fetch_from_a_frozen_task_with_tls(
    criu: Criu, program: Program, authority: Authority, tmp_path: Path
) -> None:
    """Our client and `criu dump --lazy-pages --tls`."""
    lazy, results = tmp_path / "lazy", tmp_path / "results"
    for directory in (lazy, results):
        directory.mkdir()
    theirs, ours = (authority.issue(f"{name}-{criu.release}") for name in ("frozen", "client-of-frozen"))
    port = free_port()
    with nothing_left(), raised_pipe_limit():
        victim = start(program.command("single", results), cwd="/")
        wait_for("the victim to fill its memory", (results / "ready").exists)
        options = ["--address", "127.0.0.1", "--port", str(port), *authority.options(theirs)]
        with criu.lazy_dump(victim.pid, lazy, *options) as server:
            server.wait_ready()
            contents = read_memory(victim.pid, list(lazy_pages(lazy)))
            assert len(contents) > 1000
            told = RemoteOptions(written_by=layout_of(criu), tls=authority.files(ours))
            fetched = fetch([TcpServer("127.0.0.1", port, tls=True)], list(contents), options=told)
            assert server.wait() == 0
        victim.wait(30)
    fetched.check(contents)


def dst_id(pid: int) -> int:
    return encode_dst_id(ImageType.TASK, pid)


@dataclass(frozen=True)
class Dump:
    """A made-up dump, as messages; `pages` are appended to those that bring some."""

    layout: Layout
    messages: list[Header]

    def said(self) -> bytes:
        said = b""
        for number, message in enumerate(self.messages):
            pages = message.payload // PAGE_SIZE
            said += self.layout.pack(message)
            said += b"".join(page_at(number, message.vaddr + i * PAGE_SIZE) for i in range(pages))
        return said + self.layout.pack(Header(Command.CLOSE))


def first_level(layout: Layout) -> Dump:
    add = partial(Header, Command.ADD_F, dst_id=dst_id(77))
    return Dump(
        layout,
        [
            Header(Command.PARENT, dst_id=dst_id(77)),
            Header(Command.OPEN2, dst_id=dst_id(77)),
            add(8, BASE, flags=6),
            add(4, BASE + 8 * PAGE_SIZE, flags=4),
            add(3, BASE + 40 * PAGE_SIZE, flags=2),
            add(5, BASE + 50 * PAGE_SIZE, flags=6),
            Header(Command.OPEN2, dst_id=encode_dst_id(ImageType.SHMEM, 12345)),
            Header(Command.ADD_F, 2, 0, encode_dst_id(ImageType.SHMEM, 12345), 4),
            Header(Command.OPEN2, dst_id=dst_id(78)),
        ],
    )


def second_level(layout: Layout, *, hole: int = 12) -> Dump:
    add = partial(Header, Command.ADD_F, dst_id=dst_id(77))
    return Dump(
        layout,
        [
            Header(Command.PARENT, dst_id=dst_id(77)),
            Header(Command.PARENT, dst_id=dst_id(99)),
            Header(Command.OPEN2, dst_id=dst_id(77)),
            add(hole - 2, BASE, flags=1),
            add(2, BASE + (hole - 2) * PAGE_SIZE, flags=1),
            add(3, BASE + 51 * PAGE_SIZE, flags=6),
        ],
    )


def receive_both(
    criu: Criu, dump: Dump, ours: Path, theirs: Path, work: Path, *options: str
) -> tuple[int, int, bytes, bytes]:
    """Send the same to both servers: their exit codes and answers."""
    for directory in (ours, theirs):
        directory.mkdir()
    with our_receiver(ours, work, *options) as server:
        server.wait_ready()
        our_answers = replay(dump.said(), server.port)
        our_code = server.wait()
    with receiver(criu, theirs, work, *options) as (other, port):
        their_answers = replay(dump.said(), port)
        their_code = other.wait()
    return our_code, their_code, our_answers, their_answers


@pytest.mark.loop("criu-4.2")
@both
def test_chain(criu: Criu, tmp_path: Path) -> None:
    """Two levels, with lazy entries without data, holes, shared memory, an empty image, and --auto-dedup."""
    layout = layout_of(criu)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
    codes = receive_both(criu, first_level(layout), ours / "1", theirs / "1", tmp_path)
    assert codes[:2] == (0, 0)
    assert codes[2] == codes[3]
    same_images(ours / "1", theirs / "1")
    options = ["--prev-images-dir", "../1", "--auto-dedup"]
    codes = receive_both(criu, second_level(layout), ours / "2", theirs / "2", tmp_path, *options)
    assert codes[:2] == (0, 0)
    assert codes[2] == codes[3] == b"\1\0\0\0" + bytes(4) + b"\1" + bytes(4)
    same_images(ours / "2", theirs / "2")
    assert os.readlink(ours / "2" / "parent") == "../1"
    same_images(ours / "1", theirs / "1")  # with the holes of --auto-dedup
    data = (ours / "1" / "pages-65537.img").read_bytes()
    assert data[13 * PAGE_SIZE : 16 * PAGE_SIZE] == bytes(3 * PAGE_SIZE)
    assert data[16 * PAGE_SIZE :] == page_at(5, BASE + 54 * PAGE_SIZE)


@pytest.mark.loop("criu-4.2")
@both
def test_hole_that_the_parent_has_not(criu: Criu, tmp_path: Path) -> None:
    layout = layout_of(criu)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
    receive_both(criu, first_level(layout), ours / "1", theirs / "1", tmp_path)
    options = ["--prev-images-dir", "../1"]
    codes = receive_both(criu, second_level(layout, hole=13), ours / "2", theirs / "2", tmp_path, *options)
    assert codes[:2] == (1, 1)
    assert "is in its parent" in (tmp_path / "ours.out").read_text()


@pytest.mark.loop("100-criu-4.2")
@both
@pytest.mark.parametrize("cut", [1, 30, 100, 5000])
def test_dump_that_is_cut_off(criu: Criu, cut: int, tmp_path: Path) -> None:
    """Without CLOSE the dump has failed, for CRIU's server as for ours."""
    said = first_level(layout_of(criu)).said()[:cut]
    with our_receiver(tmp_path, tmp_path) as server:
        server.wait_ready()
        replay(said, server.port)
        assert server.wait() == 1
    assert "has failed" in (tmp_path / "ours.out").read_text()


def our_receiver(directory: Path, work: Path, *options: str) -> PageServer:
    return page_server(directory, *options, output=work / "ours.out")


@contextmanager
def receiver(criu: Criu, directory: Path, work: Path, *options: str) -> Iterator[tuple[Server, int]]:
    port = free_port()
    options = ("--address", "127.0.0.1", "--port", str(port), *options)
    with criu.page_server(directory, *options, work=work) as server:
        server.wait_ready()
        yield server, port
