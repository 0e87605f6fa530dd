"""Failures on our side of a connection: they end neither the other connections nor the daemon."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import anyio
import pytest

from lazypages.engine.channel import Channel
from lazypages.engine.engine import Engine
from lazypages.net import wire
from lazypages.net.link import HopelessError, Link, LinkError
from lazypages.net.relay import Direct
from lazypages.net.tls import TlsError
from lazypages.net.url import UnixServer
from lazypages.net.wire import Features, Layout
from lazypages.sources.base import Connected
from lazypages.sources.page_server import PageServerSource, RemoteOptions
from lazypages.sources.remote import RemotePages
from lazypages.sources.shortage import SHORTAGE
from tests.support.pages import LOOP_NAMES, LOOPS

every_loop = pytest.mark.parametrize("loop", LOOPS, ids=LOOP_NAMES)


class Source:
    """Raises `failures`, one at each attempt; then it is connected."""

    name, kind, once = "a test", "page server", False

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.ends: list[socket.socket] = []
        self.carriers: list[Direct] = []
        self.attempts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends:
            end.close()

    async def connect(self, *, reached: Callable[[], None], **_: object) -> Connected:
        self.attempts += 1
        reached()
        if self._failures:
            raise self._failures.pop(0)
        end, theirs = socket.socketpair()
        self.ends.append(end)
        self.carriers.append(Direct(Link(theirs)))
        return Connected(self.carriers[-1], features=Features.MISSING, answered=True)


class Short:
    """An engine that raises `failures`, one for each channel, before it makes one."""

    def __init__(self, engine: Engine, *failures: Exception) -> None:
        self._engine = engine
        self.failures = list(failures)

    def channel(self, fd: int, **options: Any) -> Channel:
        if self.failures:
            raise self.failures.pop(0)
        return self._engine.channel(fd, **options)


@contextmanager
def running() -> Iterator[Engine]:
    with Engine() as engine:
        thread = threading.Thread(target=engine.run)
        thread.start()
        try:
            yield engine
        finally:
            engine.stop()
            thread.join()


def lost(*_: object) -> None:
    pytest.fail("nothing is lost")


async def connected(source: Source, engine: Short) -> None:
    """Waits until the source is connected."""
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            remote = RemotePages([source], lost, group=group, engine=engine)
            group.start_soon(remote.run)
            while not remote.pool.servers[0].connected:
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()


@every_loop
def test_what_nobody_expects(loop: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """It fails this attempt to connect, is logged, and the next attempt succeeds."""
    failures = RuntimeError("can't start new thread"), OSError("something"), MemoryError()
    with running() as engine, Source(*failures) as source:
        anyio.run(connected, source, Short(engine), **loop)
    assert source.attempts == 4
    assert "can't start new thread" in caplog.text


@every_loop
def test_no_descriptor_for_the_channel(loop: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The connection is kept meanwhile, and silence is no reason for a second one: CRIU's server accepts one."""
    with running() as engine, Source() as source:
        short = Short(engine, *(OSError(number, os.strerror(number)) for number in SHORTAGE))
        anyio.run(connected, source, short, **loop)
        assert not short.failures
    assert source.attempts == 1
    assert caplog.text.count("cannot make a channel") == 1


def test_no_channel_for_another_reason() -> None:
    """Then it is an attempt that has failed."""
    with running() as engine, Source() as source:
        anyio.run(connected, source, Short(engine, OSError(errno.EBADF, "bad")))
    assert source.attempts == 2


def test_no_descriptor_for_a_translator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same for one that needs a relay: TLS, for example."""
    failures = [OSError(number, os.strerror(number)) for number in SHORTAGE]
    path = tmp_path / "socket"

    def relay(link: Link, *_: object) -> Direct:
        if failures:
            raise failures.pop(0)
        return Direct(link)

    async def main() -> None:
        reached: list[bool] = []
        source = PageServerSource(UnixServer(path), RemoteOptions(layout=Layout.CRIU_4_2), 1)
        found = await source.connect(spare=False, urgent_only=False, reached=lambda: reached.append(True))
        assert len(reached) == 1 + len(SHORTAGE)
        await found.carrier.aclose()

    monkeypatch.setattr(Link, "encrypted", True)
    monkeypatch.setattr("lazypages.sources.page_server.Relay", relay)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def answer() -> None:
            """The probe, as CRIU's server does."""
            peer, _ = listener.accept()
            with peer:
                peer.sendall(wire.answer_parent(has_parent=False))
                peer.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        anyio.run(main)
        thread.join()


@pytest.mark.parametrize("failure", ["Connection timed out", ""])
def test_reason_of_a_relay(failure: str) -> None:
    """Its own failure, and not the reset of its socket pair because of unread requests: only a server that closes may
    lack the page."""
    suspects: list[bool] = []

    async def main(engine: Short, source: Source) -> None:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                remote = RemotePages([source], lost, group=group, engine=engine)
                group.start_soon(remote.run)
                while not remote.pool.servers[0].connected:
                    await anyio.sleep(0.001)
                remote.request([(1, 0x1000, 1)], urgent=True)
                await anyio.wait_readable(source.ends[0])
                source.carriers[0].failure = LinkError(failure) if failure else None
                source.ends[0].close()  # unread: the engine gets ECONNRESET
                while source.attempts < 2:
                    await anyio.sleep(0.001)
                suspects.extend(wanted.suspect for wanted in remote.pool.backlog)
                group.cancel_scope.cancel()

    with running() as engine, Source() as source:
        anyio.run(main, Short(engine), source)
    assert suspects == [not failure]


class Away(Source):
    """Never accepts a connection."""

    name = "away"

    async def connect(self, **_: object) -> Connected:
        self.attempts += 1
        await anyio.sleep_forever()
        raise AssertionError


@every_loop
@pytest.mark.parametrize(
    ("failures", "away", "said", "hopeless"),
    [
        ([], False, [], False),
        (
            [LinkError("Connection refused")],
            False,
            ["page server a test: Connection refused; trying again"],
            False,
        ),
        ([HopelessError("no such name")], False, ["page server a test: no such name"], True),
        (
            [TlsError("for other")],
            True,
            ["page server a test: for other", "page server away: no connection"],
            False,
        ),
    ],
    ids=["works", "later", "never", "never and away"],
)
def test_first_attempts(  # noqa: PLR0917 - a table
    loop: dict[str, Any],
    failures: list[Exception],
    away: bool,
    said: list[str],
    hopeless: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They end in time, and it is said what is wrong. Only if nothing can ever work is it hopeless."""
    monkeypatch.setattr("lazypages.sources.remote.FIRST_ATTEMPTS", 0.5 if away else 30)

    async def main(engine: Short, sources: list[Source]) -> None:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                remote = RemotePages(sources, lost, group=group, engine=engine)
                group.start_soon(remote.run)
                found = await remote.first_attempts()
                assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said
                assert remote.hopeless.is_set() is hopeless
                group.cancel_scope.cancel()

    with running() as engine, Source(*failures * 100) as source, Away() as other:
        anyio.run(main, Short(engine), [source, other] if away else [source], **loop)
