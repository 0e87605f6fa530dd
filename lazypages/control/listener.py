"""The socket in the work directory by which a restore finds the daemon (docs/criu.md, "Control socket").

:mod:`lazypages.control.handover` has the messages. Nothing here needs an event loop: a restore can start as soon as
this socket listens, while the event loop is still being imported.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from lazypages.control.descriptors import NONE_LEFT, NoDescriptorError
from lazypages.errors import LazyPagesError

SOCKET_NAME = "lazy-pages.socket"

#: struct ucred: pid, uid, gid (unix(7)).
CREDENTIALS = struct.Struct("=iII")

#: Of one message: SCM_MAX_FD, unix(7).
_MAX_FDS = 253

#: Size of the largest ancillary data of one message: credentials and descriptors.
_ANCILLARY = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(_MAX_FDS * 4)


class ControlError(LazyPagesError):
    """The control socket can't be created, or the restorer broke the protocol."""


class Received(NamedTuple):
    """``data``: empty at the end of the connection. ``fds``: its descriptors. ``sender``: a pid; 0: unknown."""

    data: bytes
    fds: list[int]
    sender: int


class ControlSocket:
    """The listening socket. A context manager; on exit it removes the socket that it created.

    ``users``: whose restorers are accepted, by uid, beside those of root and our own user.

    A stale socket, at which no daemon listens, is replaced. Raises ControlError if another daemon serves this
    directory, or if the socket can't be created.
    """

    def __init__(self, work_dir: Path, users: Collection[int] = ()) -> None:
        self.path = work_dir / SOCKET_NAME
        self._users = {0, os.geteuid(), *users}
        try:
            self._dir = os.open(work_dir, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise ControlError(f"cannot create {self.path}: {error.strerror}") from error
        self._identity: tuple[int, int] | None = None
        # A short path to the directory: sun_path has room for 107 bytes only (unix(7)).
        self._address = f"/proc/self/fd/{self._dir}/{SOCKET_NAME}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._replace_stale()
            self._bind()
        except OSError as error:
            self.close()
            raise ControlError(f"cannot create {self.path}: {error.strerror}") from error
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
        # Probe with another socket type: EPROTOTYPE if a process listens there, ECONNREFUSED if not. A stream socket
        # would use up the one connection that CRIU's daemon accepts (net/unix/af_unix.c, unix_find_bsd).
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
        # Adds the sender's pid to every message.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._listener.listen(10)

    def fileno(self) -> int:
        """The descriptor of the listening socket. Readable when a restorer waits to be accepted."""
        return self._listener.fileno()

    def has_caller(self) -> bool:
        """Whether a connection waits that `take` has not returned yet."""
        if self._listener.fileno() < 0:
            return False  # close() was called
        waiting = select.poll()
        waiting.register(self._listener, select.POLLIN)
        return bool(waiting.poll(0))

    def take(self) -> tuple[socket.socket, int] | None:
        """Accept the connection that waits: socket and pid of the peer; None if none waits.

        Connections of other users are closed. Raises NoDescriptorError.
        """
        while True:
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in NONE_LEFT:
                    raise NoDescriptorError(
                        "no file descriptor is free for the restorer that connects"
                    ) from None
                raise
            raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            pid, uid, _gid = CREDENTIALS.unpack(raw)
            if uid in self._users:
                peer.setblocking(False)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                return peer, pid
            hang_up(peer)

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still the one that we created."""
        _stop_listening(self._listener)
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


def receive(peer: socket.socket, size: int) -> Received:
    """Receive at most `size` bytes with all descriptors that belong to them.

    The message is first received with MSG_PEEK, which installs its descriptors but leaves the message in the queue. If
    no number is free for one of them, the message stays there. A read without MSG_PEEK would close that
    descriptor (net/core/scm.c, scm_detach_fds; recvmsg(2), MSG_CTRUNC); if it is a uffd, its task would read zeros.

    Raises NoDescriptorError, BlockingIOError, OSError.
    """
    # A peek may also return the descriptors of the next message (net/unix/af_unix.c, unix_stream_read_generic).
    _data, seen, _sender, whole = _receive(peer, size, socket.MSG_PEEK)
    if not whole:
        _close(seen)
        raise NoDescriptorError("no file descriptor is free for the userfaultfd of a task")
    try:
        data, fds, sender, whole = _receive(peer, size, 0)
    except BaseException:
        discard(seen)
        raise
    if not whole:  # there was no number for both copies: keep the peeked one
        fds, seen = seen, fds
    _close(seen)
    return Received(data, fds, sender)


def _receive(peer: socket.socket, size: int, flags: int) -> tuple[bytes, list[int], int, bool]:
    """The fields of Received, and whether every descriptor got a number."""
    data, ancillary, found, _address = peer.recvmsg(size, _ANCILLARY, flags | socket.MSG_CMSG_CLOEXEC)
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
    return data, fds, sender, not found & socket.MSG_CTRUNC


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


#: The uffds that :func:`discard` has left open, for a process that outlives its restores (Guard.leave).
left_open: deque[int] = deque()


def discard(fds: Sequence[int]) -> None:
    """Close unexpected descriptors, except uffds: closing the uffd of a task would let it read zeros."""
    for fd in fds:
        if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]":
            left_open.append(fd)
        else:
            os.close(fd)


#: Sockets that could not be closed, because uffds in their queue have no number yet. No objects: those would be closed
#: when the interpreter ends.
_unread: list[int] = []


def hang_up(peer: socket.socket) -> None:
    """Close a connection without closing uffds that are still in its queue.

    If no descriptor is free to receive one of them, the connection stays open until :func:`close_unread`, or until we
    end; then the guard closes it.
    """
    with suppress(OSError):
        peer.setblocking(False)
        peer.shutdown(socket.SHUT_RD)
        data = b"?"
        while data:
            try:
                data, fds, _sender = receive(peer, 4096)
            except NoDescriptorError:
                _unread.append(peer.detach())
                return
            discard(fds)
    peer.close()


def _stop_listening(listener: socket.socket) -> None:
    """As hang_up, for a listening socket: connections that were not accepted may hold uffds, too."""
    try:
        while True:
            hang_up(listener.accept()[0])
    except OSError as error:
        if error.errno in NONE_LEFT:
            listener.shutdown(socket.SHUT_RD)
            _unread.append(listener.detach())
            return
    listener.close()


def close_unread() -> None:
    """Try again to close the sockets that had to stay open for want of a descriptor. For a process that outlives its
    restores."""
    numbers = _unread[:]
    _unread.clear()
    for number in numbers:
        found = socket.socket(fileno=number)
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _stop_listening(found)
        else:
            hang_up(found)
