"""How a restorer hands its tasks to the daemon.

On one connection to the socket of :mod:`lazypages.control_socket`, from the restorer to the daemon (reference:
criu-interfaces, section 1): for each task of the pstree, in any order, an int32 pid as in the images, then one byte
that carries the task's uffd; for a dead task (zombie) only the pid, negated. When all tasks have their memory under
uffd and are about to go on: the uint32 :data:`FINISH`. The daemon never writes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import NamedTuple, Self

import anyio

from lazypages.control_socket import CREDENTIALS, ControlError, ControlSocket, discard, hang_up

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


async def accept(control: ControlSocket) -> Connection:
    """Waits for a restorer."""
    while (caller := control.take()) is None:
        await anyio.wait_readable(control)
    return Connection(*caller)


class Connection:
    """One restorer's connection. ``peer_pid``: who connected."""

    def __init__(self, peer: socket.socket, peer_pid: int) -> None:
        self._peer = peer
        self.peer_pid = peer_pid

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

    async def _receive(self, size: int) -> tuple[bytes, list[int], int]:
        """Some bytes, at most `size`; fds that came with them; pid of the sender, 0 if not told."""
        space = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(4 * 4)
        while True:
            try:
                data, ancillary, _flags, _address = self._peer.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                await anyio.wait_readable(self._peer)
            except ConnectionError:
                return b"", [], 0
        fds: list[int] = []
        sender = 0
        for level, kind, payload in ancillary:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_RIGHTS:
                whole = payload[: len(payload) - len(payload) % 4]
                fds.extend(struct.unpack(f"={len(whole) // 4}i", whole))
            elif kind == socket.SCM_CREDENTIALS:
                sender = CREDENTIALS.unpack(payload[: CREDENTIALS.size])[0]
        return data, fds, sender

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
