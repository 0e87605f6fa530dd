"""How long a client may take for the rest of a message.

Between messages it may be silent for as long as it likes: a lazy restore may need nothing for hours, and a peer that is
gone without a word is found by TCP keepalive. A message that has begun is another thing: whoever does not finish it
keeps a thread, and in receive mode the whole server.
"""

from __future__ import annotations

import socket
import time
from typing import Final, Protocol

from lazypages.errors import LazyPagesError
from lazypages.net.wire import PAGE_SIZE

MESSAGE_TIMEOUT: float = 30.0  # s for the rest of a message; of one with pages, for each page
PROGRESS: Final = PAGE_SIZE  # bytes that earn it anew


class SlowPeerError(LazyPagesError):
    """The rest of a message has not come in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the rest of a message did not come within {seconds:g} s; closing")


class Codec(Protocol):
    """What bytes go into."""

    @property
    def midway(self) -> bool:
        """Whether a message is complete in part."""

    def writable(self) -> memoryview:
        """Where to receive into."""

    def received(self, count: int) -> None:
        """So many bytes were; 0: there will be no more."""


class PatientReader:
    """Receives from a blocking socket, plain or TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._deadline: float | None = None
        self._progress = 0  # bytes since the deadline was set

    def message(self) -> None:
        """One has come: the next one has all its time."""
        self._deadline = None

    def receive(self, codec: Codec) -> None:
        """Some bytes, or the end. Raises SlowPeerError, OSError."""
        if not codec.midway:
            codec.received(self._sock.recv_into(codec.writable()))
            return
        now = time.monotonic()
        if self._deadline is None or self._progress >= PROGRESS:
            self._deadline, self._progress = now + MESSAGE_TIMEOUT, 0
        if now >= self._deadline:
            raise SlowPeerError(MESSAGE_TIMEOUT)
        try:
            self._sock.settimeout(self._deadline - now)
            count = self._sock.recv_into(codec.writable())
        except TimeoutError:
            raise SlowPeerError(MESSAGE_TIMEOUT) from None
        finally:
            self._sock.settimeout(None)
        self._progress += count
        codec.received(count)
