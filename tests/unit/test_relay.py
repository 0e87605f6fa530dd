"""What a relay makes of a server's answers: a canonical stream, on a real socket pair."""

from __future__ import annotations

import errno
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import anyio
import pytest

from lazypages.net import wire
from lazypages.net.compression import Compressor
from lazypages.net.link import Link, LinkError
from lazypages.net.relay import COMPRESSED_MIN_PAGES, Relay
from lazypages.net.trial import Trial
from lazypages.net.wire import (
    PAGE_SIZE,
    ClientCodec,
    Command,
    Features,
    Header,
    Layout,
    PageFlags,
    RemoteProtocolError,
    ServerCodec,
)
from tests.support.certificates import Authority

PID, BASE = 77, 0x7F00_0000_0000
FEATURES = wire.ALL_FEATURES | Features.CHECKPOINT
LARGE = COMPRESSED_MIN_PAGES
TEXT = b"compressible " * (PAGE_SIZE // 13 + 1)


def page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE_SIZE)


class Ends:
    """A relay between the engine's end and the server's."""

    def __init__(self, layout: Layout, features: Features, trial: Trial, link: type[Link]) -> None:
        self.server, theirs = socket.socketpair()
        self.link = link(theirs)
        self.relay = Relay(self.link, ClientCodec(layout, features), trial)
        self.engine = socket.socket(fileno=socket.dup(self.relay.fileno()))
        self.layout = layout
        self.codec = ServerCodec(layout)
        self.codec.features = features
        for end in (self.engine, self.server):
            end.settimeout(30)

    def close(self) -> None:
        self.engine.close()
        self.server.close()
        anyio.run(self.relay.aclose)
        assert not self.relay.alive

    def ask(self, number: int, count: int = 1, *, background: bool = False) -> Header:
        """What the server hears when the engine asks for pages."""
        flags = PageFlags.ZSTD if background else 0
        header = Header(Command.GET, count, BASE + number * PAGE_SIZE, PID, flags)
        self.engine.sendall(Layout.CRIU_4_2.pack(header))
        return self.hear()

    def hear(self) -> Header:
        while not isinstance(event := self.codec.next_event(), Header):
            assert event is None
            self.codec.received(self.server.recv_into(self.codec.writable()[: self.layout.header_size]))
        return event

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.engine.recv(size - len(data))
            assert more, "the stream has ended"
            data += more
        return data

    def answer(self, asked: Header, count: int, flags: PageFlags = PageFlags.PRESENT) -> bytes:
        """The canonical header of an answer."""
        header = asked._replace(command=Command.ADD_F, nr_pages=count, flags=flags)
        return Layout.CRIU_4_2.pack(header)


@contextmanager
def relay(
    layout: Layout = Layout.CRIU_4_2,
    features: Features = FEATURES,
    trial: Trial | None = None,
    link: type[Link] = Link,
) -> Iterator[Ends]:
    ends = Ends(layout, features, trial or Trial(), link)
    try:
        yield ends
    finally:
        ends.close()


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_pages(layout: Layout, piece: int) -> None:
    """However they come: all of one request, fewer than it asked for, none; and in the order of the requests."""
    features = FEATURES if layout is Layout.CRIU_4_2 else wire.NO_FEATURES
    with relay(layout, features) as ends:
        whole, short, none = (ends.ask(number, 2) for number in (0, 10, 20))
        data = ends.codec.answer_get(whole, 2) + page(0) + page(1)
        data += ends.codec.answer_get(short, 1) + page(10) + ends.codec.answer_get(none, 0)
        for start in range(0, len(data), piece):
            ends.server.sendall(data[start : start + piece])
        expected = ends.answer(whole, 2) + page(0) + page(1) + ends.answer(short, 1) + page(10)
        expected += ends.answer(none, 0, PageFlags(0))
        assert ends.read(len(expected)) == expected


def test_much_at_once() -> None:
    """More than sockets hold, with requests that wait on the other side."""
    with relay() as ends:
        asked = [ends.ask(number * 256, 256) for number in range(8)]
        sender = b"".join(ends.codec.answer_get(one, 256) + TEXT[:PAGE_SIZE] * 256 for one in asked)
        ends.server.setblocking(False)
        sent = got = 0
        while got < len(sender):
            if sent < len(sender):
                try:
                    sent += ends.server.send(sender[sent : sent + (1 << 20)])
                except BlockingIOError:
                    pass
                else:
                    continue
            got += len(ends.engine.recv(1 << 20))
        assert ends.relay.failure is None


@pytest.mark.parametrize("layout", Layout)
def test_no_header_is_in_two_records(layout: Layout, tmp_path: Path) -> None:
    """CRIU's servers do not put it together, however much is asked for at once."""
    authority = Authority(tmp_path)
    files = authority.files(authority.issue("both"))
    ours, theirs = socket.socketpair()

    def shake_hands(end: socket.socket, made: list[ssl.SSLSocket]) -> None:
        made.append(files.server_context().wrap_socket(end, server_side=True))

    made: list[ssl.SSLSocket] = []
    thread = threading.Thread(target=shake_hands, args=(ours, made))
    thread.start()
    client = files.client_context().wrap_socket(theirs, server_hostname="localhost")
    thread.join()
    relay = Relay(Link(client), ClientCodec(layout), Trial())
    with made[0] as server, socket.socket(fileno=socket.dup(relay.fileno())) as engine:
        server.settimeout(30)
        asked = [Header(Command.GET, 1, BASE + number * PAGE_SIZE, PID) for number in range(3000)]
        engine.sendall(b"".join(map(Layout.CRIU_4_2.pack, asked)))
        for header in asked:
            assert server.recv(layout.header_size) == layout.pack(header)
    anyio.run(relay.aclose)


def test_zeros() -> None:
    with relay() as ends:
        asked = ends.ask(0, 200)
        ends.server.sendall(ends.codec.answer_get(asked, 200, zero=True))
        assert ends.read(32) == ends.answer(asked, 200, PageFlags.ZERO)


def test_compressed_pages() -> None:
    """Only what the background asks for is ever asked for compressed; the engine gets it plain."""
    trial = Trial()
    trial.compress = True
    with relay(trial=trial) as ends:
        asked, pages = ends.ask(0, LARGE, background=True), TEXT[:PAGE_SIZE] * LARGE
        frame = Compressor().compress(pages)
        assert frame
        ends.server.sendall(ends.codec.answer_compressed(asked, LARGE, frame))
        assert ends.read(32 + len(pages)) == ends.answer(asked, LARGE) + pages
        assert (ends.relay.compressed_pages, ends.relay.compressed_bytes) == (LARGE, len(frame))
        assert not ends.ask(1000, 256).flags
        assert not ends.ask(2000, LARGE - 1, background=True).flags


def test_the_end() -> None:
    """CLOSE and its flags go to the server, its answer to the engine; then nothing is asked any more."""
    with relay() as ends:
        close = Header(Command.FORCE_CLOSE, flags=wire.CloseFlags.COMPLETE)
        ends.engine.sendall(Layout.CRIU_4_2.pack(close))
        assert ends.hear() == close
        ends.engine.sendall(Layout.CRIU_4_2.pack(Header(Command.GET, 1, BASE, PID)))
        ends.server.sendall(wire.answer_close(7))
        assert ends.read(4) == struct.pack("=i", 7)
        ends.server.shutdown(socket.SHUT_WR)
        assert ends.engine.recv(1) == b""
        assert ends.relay.failure is None


def test_another_destination_has_completed() -> None:
    with relay() as ends:
        ends.ask(0)
        ends.server.sendall(wire.completed_message())
        assert ends.read(32) == wire.completed_message()
        assert ends.engine.recv(1) == b""


@pytest.mark.parametrize(
    ("cut", "at_boundary"), [(0, True), (1, False), (32, False), (32 + 100, False), (32 + PAGE_SIZE, True)]
)
def test_cut(cut: int, at_boundary: bool) -> None:
    """What is whole arrives; and it is known whether an answer was cut."""
    with relay() as ends:
        asked = ends.ask(0)
        data = ends.codec.answer_get(asked, 1) + page(0)
        ends.server.sendall(data[:cut])
        ends.server.close()
        got = b""
        while more := ends.engine.recv(1 << 20):
            got += more
        assert data.startswith(got)
        assert ends.relay.at_boundary is at_boundary


def test_cut_in_a_frame() -> None:
    """The engine has got nothing of it, and would take it for the end between two answers."""
    with relay() as ends:
        ends.relay.codec.get(PID, BASE, LARGE, compress=True)  # as if the engine had asked, and it were tried
        asked = Header(Command.GET, LARGE, BASE, PID, PageFlags.ZSTD)
        frame = Compressor().compress(TEXT[:PAGE_SIZE] * LARGE)
        assert frame
        ends.server.sendall(ends.codec.answer_compressed(asked, LARGE, frame)[:-1])
        ends.server.close()
        assert ends.engine.recv(1) == b""
        assert not ends.relay.at_boundary


def test_garbage() -> None:
    with relay() as ends:
        ends.ask(0)
        ends.server.sendall(random.Random(1).randbytes(32))
        assert ends.engine.recv(1) == b""
        assert isinstance(ends.relay.failure, RemoteProtocolError)


def test_a_connection_that_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    relay = Relay(Link(client), ClientCodec(Layout.CRIU_4_2, FEATURES), Trial())
    with socket.socket(fileno=socket.dup(relay.fileno())) as engine:
        engine.settimeout(30)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()
        assert engine.recv(1) == b""
        assert isinstance(relay.failure, LinkError)
        assert "reset" in str(relay.failure)
    anyio.run(relay.aclose)


class Failing(Link):
    """Fails as the test says: after all that has come by then, or when it sends for the second time."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.failed = threading.Event()
        self.resets = False
        self.sends = 0

    def recv_into(self, room: memoryview) -> int | None:
        if self.resets:
            assert self.failed.wait(30)
        count = super().recv_into(room)
        if count is None and self.resets:
            raise LinkError("reset")
        return count

    def send(self, data: bytes | bytearray | memoryview) -> int:
        self.sends += 1
        if self.sends == 2:
            assert self.failed.wait(30)
            raise LinkError("Broken pipe")
        return super().send(data)


def test_answers_before_a_reset() -> None:
    """The engine gets all that came before."""
    with relay(link=Failing) as ends:
        link = ends.link
        assert isinstance(link, Failing)
        link.resets = True
        asked = ends.ask(0, 16)
        ends.server.sendall(ends.codec.answer_get(asked, 16) + TEXT[:PAGE_SIZE] * 16)
        link.failed.set()
        assert ends.read(32 + 16 * PAGE_SIZE) == ends.answer(asked, 16) + TEXT[:PAGE_SIZE] * 16
        assert ends.engine.recv(1) == b""
        assert str(ends.relay.failure) == "reset"
        assert ends.relay.at_boundary


@pytest.mark.parametrize("closed", [True, False])
def test_answers_before_a_failure_to_send(closed: bool) -> None:
    with relay(link=Failing) as ends:
        link = ends.link
        assert isinstance(link, Failing)
        asked = ends.ask(0)
        second = Header(Command.GET, 1, BASE + PAGE_SIZE, PID)
        ends.engine.sendall(Layout.CRIU_4_2.pack(second))
        while link.sends < 2:
            time.sleep(0.001)
        ends.server.sendall(ends.codec.answer_get(asked, 1) + page(0))
        if closed:
            ends.server.close()
        link.failed.set()
        assert ends.read(32 + PAGE_SIZE) == ends.answer(asked, 1) + page(0)
        assert ends.engine.recv(1) == b""
        assert ends.relay.at_boundary
        # As on a plain connection, the end counts more than the failure to send.
        assert (ends.relay.failure is None) is closed


def test_an_engine_that_hangs_up() -> None:
    """In the middle of an answer that it does not read."""
    with relay() as ends:
        asked = ends.ask(0, 256)
        ends.server.sendall(ends.codec.answer_get(asked, 256) + TEXT[:PAGE_SIZE] * 16)
        ends.engine.shutdown(socket.SHUT_RDWR)
        with suppress(ConnectionResetError):  # what it had not read of ours is lost
            while ends.server.recv(1 << 16):
                pass


def test_a_failure_that_nobody_expects(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is known, and in the log, before the engine sees the end."""

    def fail(_: object) -> NoReturn:
        raise MemoryError("no room")

    with relay() as ends:
        asked = ends.ask(0)
        monkeypatch.setattr(ends.relay.codec, "next_event", partial(fail, None))
        ends.server.sendall(ends.codec.answer_get(asked, 1))
        assert ends.engine.recv(1) == b""
        assert "no room" in str(ends.relay.failure)
        assert "no room" in caplog.text


@pytest.mark.parametrize("lacking", ["socket.socketpair", "threading.Thread.start"])
def test_no_relay(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short of descriptors or threads: another one can be made for the same connection."""

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "no") if "socketpair" in lacking else RuntimeError("no")

    server, theirs = socket.socketpair()
    link, codec = Link(theirs), ClientCodec(Layout.CRIU_4_2)
    with monkeypatch.context() as patch:
        patch.setattr(f"lazypages.net.translator.{lacking}", fail)
        with pytest.raises(OSError, match="no"):
            Relay(link, codec, Trial())
    second = Relay(link, codec, Trial())
    server.close()
    anyio.run(second.aclose)
