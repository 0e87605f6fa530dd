"""Decides when a page server for one client is done. Pure.

Like `criu page-server --lazy-pages` it ends with its client. CRIU's client has one connection in its life. `lazypages
serve` has two or more, and connects again after a loss, because its tasks wait for their pages: only its CLOSE is the
end. A peer that has not sent a whole message, as a port scanner, is not a client.
"""

from __future__ import annotations

import enum
import threading
from typing import Protocol


class Client(Protocol):
    """A connection; a ``lazypages.net.page_connection.PageConnection``."""

    closed: bool  # has sent CLOSE
    spoke: bool
    ours: bool


class Verdict(enum.Enum):
    """What the end of a connection means for the server."""

    GO_ON = enum.auto()
    WAIT = enum.auto()  # the client has disconnected and will connect again
    DONE = enum.auto()
    FAILED = enum.auto()


class Ending:
    """The state of all connections, each in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: list[Client] = []
        self._closed = False
        self.verdict = Verdict.GO_ON  # of the last connection that ended

    def connected(self, client: Client) -> None:
        """Call when a connection is accepted."""
        with self._lock:
            self._clients.append(client)

    def gone(self, client: Client, *, clean: bool) -> Verdict:
        """Call when a connection has ended. `clean`: it ended between two messages."""
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
