"""A link of limited bandwidth between a client and a server on this machine, which counts what crosses it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from functools import partial

from tests.support.listener import Listener, Work

CHUNK = 16 << 10
BUFFER = 64 << 10  # bytes that wait in a socket: a slow link is no deep queue


class TokenBucket:
    """`rate` bytes a second, for all who take from it together."""

    def __init__(self, rate: float) -> None:
        self._rate, self._lock, self._free = rate, threading.Lock(), time.monotonic()

    def take(self, count: int) -> None:
        """Returns when `count` bytes may pass."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + count / self._rate
            wait = self._free - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class SlowLink(Listener):
    """For clients of `target`. `crossed`: bytes that have come from the server.

    Not at 127.0.0.1, from where clients connect: so both ends have different addresses, as those of different hosts.
    A link of hosts.py has a rate as well, but counts headers and what TCP sends again, too.
    """

    host = "127.0.0.2"

    def __init__(self, target: tuple[str, int], rate: float) -> None:
        super().__init__()
        self._target, self._bucket = target, TokenBucket(rate)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # inherited
        self._counting = threading.Lock()
        self.crossed = 0

    def accepted(self, client: socket.socket) -> list[Work]:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        server.connect(self._target)
        self.connected(server)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [partial(self._pump, client, server, False), partial(self._pump, server, client, True)]

    def _pump(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                if limited:
                    self._bucket.take(len(data))
                    with self._counting:
                        self.crossed += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
