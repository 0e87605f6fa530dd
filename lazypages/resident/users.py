"""Users of the resident daemon: who has connected, and what that user may open (docs/daemon.md, "Who may connect")."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

from lazypages.control.listener import CREDENTIALS

#: asm-generic/socket.h
_SO_PEERGROUPS = 59

#: NGROUPS_MAX: credentials(7)
_MAX_GROUPS = 65536

#: asm/unistd_64.h
_SYS_SETGROUPS, _SYS_OPENAT2 = 116, 437

#: linux/openat2.h: fail at links of /proc (/proc/PID/fd/N, root, cwd): they lead past directories.
_RESOLVE_NO_MAGICLINKS = 0x02

_AT_FDCWD = -100

#: linux/capability.h: _LINUX_CAPABILITY_VERSION_3; each of the two halves has three masks, the first is "effective".
_CAPABILITY_VERSION = 0x20080522
_MASKS = 6

_OUR_FD = re.compile(r"/proc/self/fd/(\d+)(?:/(.*))?", re.DOTALL)

_libc = ctypes.CDLL(None, use_errno=True)


class User(NamedTuple):
    """``groups``: the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, peer: socket.socket) -> Self:
        """Who has connected, at that time (SO_PEERCRED, SO_PEERGROUPS: unix(7)). Raises OSError."""
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        _pid, uid, gid = CREDENTIALS.unpack(raw)
        # not by socket.getsockopt: it takes 1024 bytes at most
        groups = (ctypes.c_uint32 * _MAX_GROUPS)()
        size = ctypes.c_uint32(ctypes.sizeof(groups))
        _check(_libc.getsockopt(peer.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(size)))
        return cls(uid, gid, tuple(groups[: size.value // 4]))

    @property
    def is_privileged(self) -> bool:
        """Root, or the daemon's own user."""
        return self.uid in {0, os.geteuid()}


class _Capabilities:
    """Of the calling thread."""

    def __init__(self) -> None:
        self._header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        self._masks = (ctypes.c_uint32 * _MASKS)()
        _check(_libc.capget(self._header, self._masks))

    def drop(self) -> None:
        none = (ctypes.c_uint32 * _MASKS)(*self._masks)
        none[0] = none[3] = 0
        _check(_libc.capset(self._header, none))

    def take_back(self) -> None:
        _check(_libc.capset(self._header, self._masks))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _set_groups(groups: tuple[int, ...]) -> None:
    """Of this thread; setgroups(3) would change those of all threads."""
    _check(_libc.syscall(_SYS_SETGROUPS, len(groups), (ctypes.c_uint32 * len(groups))(*groups)))


def _set_ids(uid: int, gid: int) -> bool:
    """For files, of this thread (setfsuid(2)): whether they are set. The user can't send signals to the thread."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    return bool(_libc.setfsgid(-1) == gid and _libc.setfsuid(-1) == uid)


@contextmanager
def acting_as(user: User) -> Iterator[None]:
    """This thread opens files as the user may, without a capability. Don't await meanwhile. Raises OSError."""
    if user.is_privileged:
        yield
        return
    capabilities, groups = _Capabilities(), tuple(os.getgroups())
    _set_groups(user.groups)  # if it fails, nothing has changed
    try:
        if not _set_ids(user.uid, user.gid):
            raise PermissionError(1, "the daemon can't act as another user")
        capabilities.drop()
        yield
    finally:
        try:
            capabilities.take_back()
            _set_groups(groups)
            ours = _set_ids(os.geteuid(), os.getegid())
            capabilities.take_back()
        except OSError:
            ours = False
        if not ours:
            os.abort()  # this thread would go on with the rights of a user


def open_as(
    user: User,
    path: str | os.PathLike[str],
    directories: Collection[int] = (),
    flags: int = os.O_RDONLY | os.O_NONBLOCK,
) -> int:
    """Open a file as the user may, for reading and without waiting. The caller owns the descriptor. Raises OSError.

    Links of /proc are not followed: by that of a descriptor of the daemon a user would reach what other users have
    handed to it. The path may begin with one (/proc/self/fd/N) of `directories`, which the user has handed over.
    """
    name = os.fspath(path)
    ours = _OUR_FD.fullmatch(name)
    if ours and int(ours[1]) in directories:
        directory, name = int(ours[1]), ours[2] or "."
    else:
        directory = _AT_FDCWD
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_NO_MAGICLINKS)
    with acting_as(user):
        fd = int(_libc.syscall(_SYS_OPENAT2, directory, os.fsencode(name), how, len(how)))
        error = ctypes.get_errno()
    if fd < 0:
        raise OSError(error, os.strerror(error), os.fspath(path))
    return fd
