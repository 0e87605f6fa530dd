"""Failures on our side of a connection: they end neither the other connections nor the daemon."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from lazypages.engine.channel import Channel
from lazypages.engine.engine import Engine
from lazypages.net.link import Link
from lazypages.net.relay import Direct
from lazypages.net.wire import Features
from lazypages.sources.base import Connected
from lazypages.sources.remote import RemotePages
from tests.support.pages import LOOP_NAMES, LOOPS

every_loop = pytest.mark.parametrize("loop", LOOPS, ids=LOOP_NAMES)


class Source:
    """Raises `failures`, one at each attempt; then it is connected, once."""

    name, once = "a test", False

    def __init__(self, *failures: Exception) -> None:
        self._failures = list(failures)
        self.end, self._theirs = socket.socketpair()
        self.end.settimeout(30)
        self.attempts = 0
        self.carrier = Direct(Link(self._theirs))

    async def connect(self, *, reached: Callable[[], None], **_: object) -> Connected:
        self.attempts += 1
        reached()
        if self._failures:
            raise self._failures.pop(0)
        if self.attempts > 8:
            await anyio.sleep_forever()
        return Connected(self.carrier, features=Features.MISSING, answered=True)


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


async def connected(source: Source, engine: Short, then: Callable[[], bool] | None = None) -> None:
    """Waits until the source is connected, and then until `then` is true."""
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            remote = RemotePages([source], lost, group=group, engine=engine)
            group.start_soon(remote.run)
            while not remote.pool.servers[0].connected:
                await anyio.sleep(0.001)
            while then and not then():
                await anyio.sleep(0.001)
            group.cancel_scope.cancel()


@every_loop
def test_what_nobody_expects(loop: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """It fails this attempt to connect, is logged, and the next attempt succeeds."""
    source = Source(RuntimeError("can't start new thread"), OSError("something"), MemoryError())
    with running() as engine, source.end:
        anyio.run(connected, source, Short(engine), **loop)
    assert source.attempts == 4
    assert "can't start new thread" in caplog.text
