"""The control socket: how a restorer hands its tasks to the daemon.

On one connection, from the restorer to the daemon (reference: criu-interfaces, section 1): for each task of the
pstree, in any order, an int32 pid as in the images, then one byte that carries the task's uffd; for a dead task
(zombie) only the pid, negated. When all tasks have their memory under uffd and are about to go on: the uint32
:data:`FINISH`. The daemon never writes.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import anyio

from lazypages.errors import LazyPagesError

SOCKET_NAME = "lazy-pages.socket"

#: "Restore finished".
FINISH = 0x52535446

_WORD = struct.Struct("=i")
_CREDENTIALS = struct.Struct("=iII")
_FINISH_AS_PID = FINISH  # positive as an int32 too: no task has such a pid (PID_MAX_LIMIT is 1 << 22)


class ControlError(LazyPagesError):
    """The socket can't be had, or the restorer broke the protocol."""


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


class ControlSocket:
    """The listening socket; a context manager that removes what it made.

    A socket that nobody serves any more is replaced. Raises ControlError when another daemon serves this
    directory, or when the socket can't be made.
    """

    def __init__(self, work_dir: Path) -> None:
        self.path = work_dir / SOCKET_NAME
        try:
            self._dir = os.open(work_dir, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise ControlError(f"can't make {self.path}: {error.strerror}") from error
        self._identity: tuple[int, int] | None = None
        # A short name that reaches the directory, whatever the length of its path (sun_path holds 107 bytes).
        self._address = f"/proc/self/fd/{self._dir}/{SOCKET_NAME}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._replace_stale()
            self._bind()
        except OSError as error:
            self.close()
            raise ControlError(f"can't make {self.path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _replace_stale(self) -> None:
        try:
            mode = os.stat(SOCKET_NAME, dir_fd=self._dir, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        if (mode & 0o170000) != 0o140000:
            raise ControlError(f"{self.path} exists and is not a socket; remove it or choose another -W")
        # Asking with another type of socket tells whether somebody is bound there (EPROTOTYPE) or nobody
        # (ECONNREFUSED) without taking the one connection that CRIU's daemon accepts (net/unix/af_unix.c,
        # unix_find_bsd).
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            outcome = probe.connect_ex(self._address)
        if outcome != errno.ECONNREFUSED:
            raise ControlError(
                f"{self.path} is served by another daemon; end that one first, or choose another work "
                "directory with -W (the same for the restore)"
            )
        os.unlink(SOCKET_NAME, dir_fd=self._dir)

    def _bind(self) -> None:
        umask = os.umask(0o177)
        try:
            self._listener.bind(self._address)
        finally:
            os.umask(umask)
        made = os.stat(SOCKET_NAME, dir_fd=self._dir, follow_symlinks=False)
        self._identity = (made.st_dev, made.st_ino)
        # Every message then says which process sent it.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._listener.listen(10)

    async def accept(self) -> Connection:
        """Waits for a restorer. Peers that are neither root nor ourselves are turned away."""
        while True:
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(self._listener)
                continue
            raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, uid, _gid = _CREDENTIALS.unpack(raw)
            if uid in {0, os.geteuid()}:
                peer.setblocking(False)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                return Connection(peer, pid)
            peer.close()

    def close(self) -> None:
        """Stops listening and removes the socket, if it is still ours."""
        self._listener.close()
        if self._dir < 0:
            return
        if self._identity is not None:
            try:
                found = os.stat(SOCKET_NAME, dir_fd=self._dir, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == self._identity:
                    os.unlink(SOCKET_NAME, dir_fd=self._dir)
            except FileNotFoundError:
                pass
        os.close(self._dir)
        self._dir = -1


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
        self._peer.close()

    async def events(self) -> AsyncGenerator[Event]:
        """Yields what arrives until the peer closes. Raises ControlError for what the protocol does not know.

        The receiver of a TaskArrived owns its uffd; one that is not yielded is closed.
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
        space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * 4)
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
                sender = _CREDENTIALS.unpack(payload[: _CREDENTIALS.size])[0]
        return data, fds, sender

    async def _word(self) -> tuple[int, int] | None:
        data, sender = b"", 0
        while len(data) < _WORD.size:
            more, fds, sender = await self._receive(_WORD.size - len(data))
            for fd in fds:
                os.close(fd)
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
        for fd in fds:
            os.close(fd)
        raise ControlError(
            f"the restorer sent {len(fds)} file descriptors for task {pid}, not its userfaultfd"
        )
