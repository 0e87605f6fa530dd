"""When a server that gives pages to one client has done its work. Pure.

As `criu page-server --lazy-pages`, it ends with its client. One of CRIU's has one connection in its life. One of ours
has two or more, and comes back when it has lost them, for its tasks wait for their pages: only its CLOSE is the end.
Who has not sent a whole message, such as whoever only looks whether the port is open, is no client.
"""

from __future__ import annotations

import enum
import threading
from typing import Protocol


class Client(Protocol):
    """A connection; a ``serve.PageConnection``."""

    closed: bool  # has said that it needs no more
    spoke: bool
    ours: bool


class Verdict(enum.Enum):
    """What the end of a connection means for the server."""

    GO_ON = enum.auto()
    WAIT = enum.auto()  # the client is gone, and will be back
    DONE = enum.auto()
    FAILED = enum.auto()


class Ending:
    """Of all connections, each in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: list[Client] = []
        self._closed = False
        self.verdict = Verdict.GO_ON  # the latest

    def connected(self, client: Client) -> None:
        """It may speak now."""
        with self._lock:
            self._clients.append(client)

    def gone(self, client: Client, *, clean: bool) -> Verdict:
        """`clean`: it ended between two messages."""
        with self._lock:
            self._clients.remove(client)
            if self.verdict in {Verdict.DONE, Verdict.FAILED}:
                return Verdict.GO_ON
            self._closed = self._closed or client.closed
            if not client.spoke or any(other.spoke for other in self._clients):
                return Verdict.GO_ON
            if self._closed:
                self.verdict = Verdict.DONE
            elif client.ours:
                self.verdict = Verdict.WAIT
            else:
                self.verdict = Verdict.DONE if clean else Verdict.FAILED
            return self.verdict
