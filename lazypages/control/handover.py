"""How a restorer hands its tasks to the daemon.

All messages go from the restorer to the daemon, on one connection to the socket of :mod:`lazypages.control.listener`
(docs/criu.md, "Control socket"). For each task of the pstree, in any order: an int32 pid as in the images, then one byte
with the task's uffd (SCM_RIGHTS). For a dead task (zombie): only the pid, negated. When all tasks have registered
their memory and are about to run: the uint32 :data:`FINISH`. The daemon never writes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import NamedTuple, Self

import anyio

from lazypages.control.descriptors import NoDescriptorError
from lazypages.control.listener import (
    ControlError,
    ControlSocket,
    Received,
    discard,
    hang_up,
    receive,
)

#: "Restore finished".
FINISH = 0x52535446

_WORD = struct.Struct("=i")
_FINISH_AS_PID = FINISH  # positive as an int32 too: no task has such a pid (PID_MAX_LIMIT is 1 << 22)


class TaskArrived(NamedTuple):
    """A task's uffd, which the receiver owns now. ``real_pid``: its pid where the daemon runs; 0: not known."""

    pid: int
    real_pid: int
    uffd: int


class ZombieArrived(NamedTuple):
    """A dead task of the pstree; it has no memory."""

    pid: int


class RestoreFinished(NamedTuple):
    """All tasks are registered and go on."""


Event = TaskArrived | ZombieArrived | RestoreFinished


#: Seconds between tries to receive what there is no file descriptor for.
SHORTAGE_PAUSE = 0.05


async def accept(
    control: ControlSocket, short: Callable[[NoDescriptorError], None] | None = None
) -> Connection:
    """Waits for a restorer. ``short`` is called again and again while there is no descriptor for what has come."""
    while True:
        try:
            if caller := control.take():
                return Connection(*caller, short)
        except NoDescriptorError as error:
            await _wait_for_descriptors(error, short)
        else:
            await anyio.wait_readable(control)


async def _wait_for_descriptors(
    error: NoDescriptorError, short: Callable[[NoDescriptorError], None] | None
) -> None:
    if short is None:
        raise error
    short(error)
    await anyio.sleep(SHORTAGE_PAUSE)


class Connection:
    """One restorer's connection. ``peer_pid``: who connected. ``short``: as for `accept`."""

    def __init__(
        self, peer: socket.socket, peer_pid: int, short: Callable[[NoDescriptorError], None] | None = None
    ) -> None:
        self._peer = peer
        self.peer_pid = peer_pid
        self._short = short

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hang_up(self._peer)

    async def events(self) -> AsyncGenerator[Event]:
        """Yields what arrives until the peer closes. Raises ControlError for what the protocol does not know.

        The receiver of a TaskArrived owns its uffd; one that is not yielded stays open to the end.
        """
        while (word := await self._word()) is not None:
            value, sender = word
            if value == _FINISH_AS_PID:
                yield RestoreFinished()
            elif value < 0:
                yield ZombieArrived(-value)
            elif value == 0:
                raise ControlError("the restorer sent pid 0")
            else:
                yield TaskArrived(value, sender, await self._uffd(value))

    async def _receive(self, size: int) -> Received:
        """Some bytes, at most `size`, and what came with them. Waits for a free file descriptor if need be."""
        while True:
            try:
                return receive(self._peer, size)
            except BlockingIOError:
                await anyio.wait_readable(self._peer)
            except NoDescriptorError as error:
                await _wait_for_descriptors(error, self._short)
            except ConnectionError:
                return Received(b"", [], 0)

    async def _word(self) -> tuple[int, int] | None:
        data, sender = b"", 0
        while len(data) < _WORD.size:
            more, fds, sender = await self._receive(_WORD.size - len(data))
            discard(fds)
            if fds:
                raise ControlError("the restorer sent a file descriptor where a pid belongs")
            if not more:
                if data:
                    raise ControlError("the restorer closed the connection in the middle of a pid")
                return None
            data += more
        return _WORD.unpack(data)[0], sender

    async def _uffd(self, pid: int) -> int:
        data, fds, _sender = await self._receive(1)
        if len(fds) == 1 and data:
            return fds[0]
        discard(fds)
        raise ControlError(
            f"the restorer sent {len(fds)} file descriptors for task {pid}, not its userfaultfd"
        )
