"""A client's connection to the resident daemon: its requests come in order, its answers leave when they are there."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel

from lazypages.control.descriptors import NoDescriptorError
from lazypages.control.listener import discard, receive
from lazypages.resident import protocol
from lazypages.resident.protocol import Lines, Request, RequestError
from lazypages.resident.users import User

log = logging.getLogger("lazypages")

#: Lines that wait for a client before log lines are dropped, and before none of its requests is read.
MAX_WAITING = 1000

#: Descriptors that a client has sent and no request has named yet.
MAX_FDS = 32

#: Seconds between two attempts to receive while no descriptor is free, and between two checks whether a client that
#: sends nothing any more still reads.
PAUSE = 0.2

_CHUNK = 1 << 16


class Outbox:
    """Lines that leave for a client. Any thread may put one there; nobody waits for the client."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._lines: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._ending = False
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __len__(self) -> int:
        return len(self._lines)

    def put(self, message: dict[str, Any], *, droppable: bool = False) -> None:
        if self._closed or (droppable and len(self._lines) >= MAX_WAITING):
            return
        self._lines.append(protocol.encode(message))
        self._wake()

    def end(self) -> None:
        """Let `send` return when all lines have left."""
        self._ending = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wakeup, 1)

    async def send(self, peer: socket.socket) -> None:
        """Send lines until the end. Raises OSError when the client is gone."""
        while True:
            while self._lines:
                await _send(peer, self._lines.popleft())
            if self._ending:
                return
            await anyio.wait_readable(self._wakeup)
            with suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self._wakeup)


async def _send(peer: socket.socket, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        try:
            rest = rest[peer.send(rest, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            await anyio.wait_writable(peer)


class Connection:
    """One client. ``execute`` carries out a request and returns the fields of its answer; it may raise RequestError."""

    def __init__(
        self,
        peer: socket.socket,
        user: User,
        execute: Callable[[Request, Connection], Awaitable[dict[str, Any]]],
    ) -> None:
        """Takes ownership of the socket, also on failure. Raises OSError."""
        self.user = user
        self._peer = peer
        self._execute = execute
        self._fds: deque[int] = deque()
        self._open = 0  # answers that are still to come
        self._done = anyio.Event()
        try:
            self.outbox = Outbox()
        except OSError:
            peer.close()
            raise

    def take_fd(self) -> int:
        """The next descriptor that the client has sent; the caller owns it. Raises RequestError."""
        if not self._fds:
            raise RequestError(
                "bad-request", 'a value is {"fd": true}, but no descriptor came with the request'
            )
        return self._fds.popleft()

    async def run(self) -> None:
        """Until the client has gone, or `finish`. Raises nothing that the client can cause."""
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._send, group.cancel_scope)
                if await self._read(group):
                    await self._await_answers()
                self.outbox.end()
        finally:
            discard(self._fds)
            self._fds.clear()
            self.outbox.close()
            self._peer.close()
            self._done.set()

    async def finish(self) -> None:
        """Send the answers to all requests that were received, then end."""
        while self._open and not self._done.is_set():
            await anyio.sleep(PAUSE / 10)
        self.outbox.end()
        await self._done.wait()

    async def _send(self, scope: anyio.CancelScope) -> None:
        with suppress(OSError):
            await self.outbox.send(self._peer)
        scope.cancel()

    async def _read(self, group: anyio.abc.TaskGroup) -> bool:
        """Until the client sends no more, True; or has broken the protocol, False."""
        lines = Lines()
        while True:
            while len(self.outbox) > MAX_WAITING:  # it sends, and does not read
                await anyio.sleep(PAUSE)
            try:
                received = receive(self._peer, _CHUNK)
            except BlockingIOError:
                await anyio.wait_readable(self._peer)
                continue
            except NoDescriptorError:
                log.warning("no file descriptor is free for a client's")
                await anyio.sleep(PAUSE)
                continue
            except OSError:
                return True
            self._fds.extend(received.fds)
            if not received.data:
                return True
            try:
                complete = lines.feed(received.data)
            except RequestError as error:
                self.outbox.put(protocol.refusal(None, error))
                return False
            await (
                anyio.lowlevel.checkpoint()
            )  # one that never stops sending must not keep the loop from others
            for line in complete:
                await self._handle(line, group)
                await anyio.lowlevel.checkpoint()
            if len(self._fds) > MAX_FDS:
                surplus = f"more than {MAX_FDS} descriptors that no request has named"
                self.outbox.put(protocol.refusal(None, RequestError("bad-request", surplus)))
                return False

    async def _handle(self, line: bytes, group: anyio.abc.TaskGroup) -> None:
        try:
            request = protocol.parse(line)
        except RequestError as error:
            self.outbox.put(protocol.refusal(protocol.id_of(line), error))
            return
        if isinstance(request.command, protocol.Wait):
            self._open += 1
            group.start_soon(self._answer, request)
        else:
            self._open += 1
            await self._answer(request)

    async def _answer(self, request: Request) -> None:
        try:
            fields = await self._execute(request, self)
        except RequestError as error:
            self.outbox.put(protocol.refusal(request.id, error))
        else:
            self.outbox.put(protocol.answer(request.id, **fields))
        finally:
            self._open -= 1

    async def _await_answers(self) -> None:
        """A client may close its sending side and still wait for answers, as ``socat`` does."""
        polled = select.poll()
        polled.register(self._peer, 0)
        while self._open and not polled.poll(0):  # POLLHUP: it has closed the other side, too
            await anyio.sleep(PAUSE)
