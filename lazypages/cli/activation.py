"""The socket that systemd has opened for this process (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from lazypages.errors import LazyPagesError

#: The first descriptor that is passed: SD_LISTEN_FDS_START.
FIRST = 3


class ActivationError(LazyPagesError):
    """What systemd has passed is not what this command needs."""


class Passed(NamedTuple):
    """A descriptor, and its name: FileDescriptorName= of the .socket unit."""

    fd: int
    name: str


def take_passed(environ: MutableMapping[str, str], pid: int) -> Sequence[Passed]:
    """The descriptors for process `pid`. What `environ` says of them is removed: it is not for other processes.

    Raises ActivationError if LISTEN_FDS is not a number.
    """
    owner = environ.pop("LISTEN_PID", None)
    nr = environ.pop("LISTEN_FDS", "0")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if owner != str(pid):
        return ()
    if not (nr.isascii() and nr.isdecimal()):
        raise ActivationError(f"LISTEN_FDS={nr}: not a number of descriptors")
    return [
        Passed(FIRST + number, names[number] if number < len(names) and names[number] else "unknown")
        for number in range(int(nr))
    ]


def listener_of(passed: Sequence[Passed]) -> socket.socket | None:
    """The listening unix stream socket that was passed, owned by the caller; None if nothing was.

    Raises ActivationError if something else was passed, or more.
    """
    if not passed:
        return None
    if len(passed) > 1:
        names = ", ".join(one.name for one in passed)
        raise ActivationError(
            f"systemd has passed {len(passed)} descriptors ({names}): one ListenStream= is needed, and no other socket"
        )
    fd, name = passed[0]
    try:
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise ActivationError(
            f"descriptor {fd} ({name}), passed by systemd, is not a socket: {error.strerror}"
        ) from None
    if wrong := _wrong(listener):
        listener.close()
        raise ActivationError(
            f"the socket that systemd has passed ({name}) {wrong}: its .socket unit needs ListenStream= with "
            "a path, and Accept=no"
        )
    return listener


def _wrong(listener: socket.socket) -> str | None:
    """Why clients can't be accepted there."""
    if listener.family != socket.AF_UNIX:
        return "is not a unix socket"
    if listener.type != socket.SOCK_STREAM:
        return "is not a stream socket"
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen"
    return None


def name_of(listener: socket.socket) -> str:
    """The address of a unix socket for messages; of an abstract one with @."""
    name = listener.getsockname()
    return f"@{os.fsdecode(name[1:])}" if isinstance(name, bytes) else str(name)
