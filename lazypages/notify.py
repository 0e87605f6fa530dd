"""What a service manager is told of this process, by the protocol of sd_notify(3).

systemd names its socket in NOTIFY_SOCKET. Without one, nothing is sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Self

from lazypages.errors import LazyPagesError

#: Seconds to wait until the service manager has room for READY=1, without which it would end this process. All else is
#: dropped if there is no room: the event loop must not wait.
READY_PATIENCE = 10.0


class NotifyError(LazyPagesError):
    """The service manager can't be told that this process is ready."""


def address_of(text: str) -> bytes:
    """NOTIFY_SOCKET as an address of unix(7). Raises NotifyError if it is neither a path nor an abstract name (@)."""
    if text.startswith("@") and len(text) > 1:
        return b"\0" + os.fsencode(text[1:])
    if not text.startswith("/"):
        raise NotifyError(f"NOTIFY_SOCKET={text}: neither a path nor an abstract unix socket (@)")
    return os.fsencode(text)


def watchdog_seconds(environ: Mapping[str, str], pid: int) -> float | None:
    """Within how many seconds WATCHDOG=1 must come each time (sd_watchdog_enabled(3)); None: nobody waits for it."""
    period = environ.get("WATCHDOG_USEC", "")
    if not period.isascii() or not period.isdecimal() or int(period) == 0:
        return None
    return int(period) / 1e6 if environ.get("WATCHDOG_PID", str(pid)) == str(pid) else None


def message(**fields: str) -> bytes:
    """Fields of sd_notify(3). A value is one line: control characters are replaced by spaces."""
    lines = [
        f"{name}={''.join(letter if letter.isprintable() else ' ' for letter in value)}"
        for name, value in fields.items()
    ]
    return "\n".join(lines).encode(errors="replace")


class Notifier:
    """Sends to the service manager. Opens its socket for each message: it holds no descriptor."""

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        """``address``: NOTIFY_SOCKET; None: nothing is sent. ``watchdog``: as watchdog_seconds."""
        self._address = address
        self._status = ""
        self._stopping = False
        #: Within how many seconds :meth:`alive` must be called each time; None: it need not be.
        self.watchdog = watchdog if address else None

    @classmethod
    def take(cls, environ: MutableMapping[str, str] = os.environ) -> Self:
        """As the environment says. What it says is removed: it is not for the processes that this one starts."""
        watchdog = watchdog_seconds(environ, os.getpid())
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            environ.pop(name, None)
        return cls(environ.pop("NOTIFY_SOCKET", None) or None, watchdog)

    def __bool__(self) -> bool:
        """Whether a service manager listens."""
        return self._address is not None

    def ready(self) -> None:
        """Raises NotifyError if the service manager can't be told."""
        if self._address is None:
            return
        try:
            self._send(message(READY="1"), READY_PATIENCE)
        except OSError as error:
            raise NotifyError(f"NOTIFY_SOCKET={self._address}: {error.strerror or error}") from None

    def status(self, text: str) -> None:
        """What it does now, in one line for people."""
        if text != self._status and self._try(message(STATUS=text)):
            self._status = text

    def stopping(self) -> None:
        """This process begins to end."""
        self._stopping = self._stopping or self._try(message(STOPPING="1"))

    def alive(self) -> None:
        """All parts of this process have made progress since the last time."""
        self._try(message(WATCHDOG="1"))

    def _try(self, data: bytes) -> bool:
        """Whether it was sent."""
        try:
            self._send(data, 0.0)
        except (OSError, NotifyError):
            return False
        return True

    def _send(self, data: bytes, patience: float) -> None:
        """Raises OSError, NotifyError."""
        if self._address is not None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(patience)
                sock.sendto(data, address_of(self._address))
