"""How a restorer hands its tasks to the daemon.

All messages go from the restorer to the daemon, on one connection to the socket of :mod:`lazypages.control.listener`
(docs/criu.md, "Control socket"). For each task of the pstree, in any order: an int32 pid as in the images, then one
byte with the task's uffd (SCM_RIGHTS). For a dead task (zombie): only the pid, negated. When all tasks have registered
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
    """A task's uffd; the receiver owns it. ``real_pid``: the pid in the daemon's PID namespace; 0: unknown."""

    pid: int
    real_pid: int
    uffd: int


class ZombieArrived(NamedTuple):
    """A dead task of the pstree; it has no memory."""

    pid: int


class RestoreFinished(NamedTuple):
    """All tasks have registered their memory and are about to run."""


Event = TaskArrived | ZombieArrived | RestoreFinished


#: Seconds between two attempts to receive while no file descriptor is free.
SHORTAGE_PAUSE = 0.05


async def accept(
    control: ControlSocket, short: Callable[[NoDescriptorError], None] | None = None
) -> Connection:
    """Wait for a restorer. ``short`` is called at each attempt that fails for want of a file descriptor.

    Raises ControlError; NoDescriptorError if ``short`` is None.
    """
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
    """One restorer's connection. ``peer_pid``: the process that connected. ``short``: as in `accept`."""

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
        """Yield events until the peer closes. Raises ControlError for a message that breaks the protocol.

        The receiver of a TaskArrived owns its uffd. A uffd that was not yielded stays open until the process ends.
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
        """At most `size` bytes and the descriptors that came with them. Waits until a file descriptor is free."""
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
