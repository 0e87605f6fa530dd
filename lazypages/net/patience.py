"""Time-outs for incomplete messages of a client.

There is no time-out between messages: a lazy restore may need nothing for hours, and TCP keepalive detects a
peer that has vanished. A client that does not finish a message occupies a thread and, in receive mode, the whole
server; so it has limited time for the rest of a message.
"""

from __future__ import annotations

import socket
import time
from typing import Final, Protocol

from lazypages.errors import LazyPagesError
from lazypages.net.wire import PAGE_SIZE

MESSAGE_TIMEOUT: float = 30.0  # s for the rest of a message; of one with pages, for each page
PROGRESS: Final = PAGE_SIZE  # bytes received after which MESSAGE_TIMEOUT starts again


class SlowPeerError(LazyPagesError):
    """The rest of a message has not arrived in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the rest of a message did not arrive within {seconds:g} s; closing")


class Codec(Protocol):
    """A parser of received bytes, such as wire.ServerCodec."""

    @property
    def midway(self) -> bool:
        """Whether part of a message has been received."""

    def writable(self) -> memoryview:
        """The buffer to receive into."""

    def received(self, count: int) -> None:
        """`count` bytes were received into that buffer; 0: end of the connection."""


class PatientReader:
    """Receives from a blocking socket, plain or TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._deadline: float | None = None
        self._progress = 0  # bytes since the deadline was set

    def message(self) -> None:
        """A message is complete: the next one gets the whole MESSAGE_TIMEOUT."""
        self._deadline = None

    def receive(self, codec: Codec) -> None:
        """Receive some bytes, or the end of the connection, into `codec`. Raises SlowPeerError, OSError."""
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
