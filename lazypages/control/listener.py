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
from collections.abc import Sequence
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

#: Room for all that a message can bring beside its bytes.
_ANCILLARY = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(_MAX_FDS * 4)


class ControlError(LazyPagesError):
    """The socket can't be had, or the restorer broke the protocol."""


class Received(NamedTuple):
    """Bytes, none at the end; descriptors that came with them; pid of the sender, 0 if not told."""

    data: bytes
    fds: list[int]
    sender: int


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

    def fileno(self) -> int:
        """Readable when a restorer waits."""
        return self._listener.fileno()

    def has_caller(self) -> bool:
        """Whether somebody has connected whom `take` has not returned yet."""
        if self._listener.fileno() < 0:
            return False  # closed
        waiting = select.poll()
        waiting.register(self._listener, select.POLLIN)
        return bool(waiting.poll(0))

    def take(self) -> tuple[socket.socket, int] | None:
        """The restorer that waits, and its pid; None if there is none.

        Peers that are neither root nor ourselves are turned away. Raises NoDescriptorError.
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
            if uid in {0, os.geteuid()}:
                peer.setblocking(False)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                return peer, pid
            peer.close()

    def close(self) -> None:
        """Stops listening and removes the socket, if it is still ours."""
        try:
            while True:
                hang_up(self._listener.accept()[0])
        except OSError as error:
            if error.errno in NONE_LEFT:
                # Who waits may have sent uffds, so nothing is closed here: the guard takes them out when we have ended.
                self._listener.shutdown(socket.SHUT_RD)
                self._listener.detach()
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


def receive(peer: socket.socket, size: int) -> Received:
    """What comes next, at most `size` bytes, together with all the descriptors that came with it.

    It is looked at before it is taken (MSG_PEEK), which gives us its descriptors once more: if there is no number for
    one of them it stays where it is. Taken, it would be closed (net/core/scm.c, scm_detach_fds; recvmsg(2),
    MSG_CTRUNC), and a task whose uffd that is would run on zeros.

    Raises NoDescriptorError, BlockingIOError, OSError.
    """
    # What is seen may have the descriptors of the message behind it, too (net/unix/af_unix.c,
    # unix_stream_read_generic).
    _data, seen, _sender, whole = _receive(peer, size, socket.MSG_PEEK)
    if not whole:
        _close(seen)
        raise NoDescriptorError("no file descriptor is free for one that has been sent")
    data, fds, sender, whole = _receive(peer, size, 0)
    if not whole:  # there was no number for it twice
        fds, seen = seen, fds
    _close(seen)
    return Received(data, fds, sender)


def _receive(peer: socket.socket, size: int, flags: int) -> tuple[bytes, list[int], int, bool]:
    """As Received; and whether there was a number for every descriptor."""
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


def discard(fds: Sequence[int]) -> None:
    """Closes what nobody wants. But uffds stay open to the end: closed, they would let their tasks run on zeros."""
    for fd in fds:
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[userfaultfd]":
            os.close(fd)


def hang_up(peer: socket.socket) -> None:
    """Closes a connection, and nothing with it: what was sent and nobody has read may be uffds.

    If there is no descriptor for one of them, the connection stays open to the end: the guard takes it out then.
    """
    with suppress(OSError):
        peer.setblocking(False)
        peer.shutdown(socket.SHUT_RD)
        data = b"?"
        while data:
            try:
                data, fds, _sender = receive(peer, 4096)
            except NoDescriptorError:
                peer.detach()
                return
            discard(fds)
    peer.close()
