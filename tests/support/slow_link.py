"""A link of limited bandwidth between a client and a server on this machine, which counts what crosses it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Self

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


class SlowLink:
    """Listens on loopback for clients of `target`. `crossed`: bytes that have come from the server.

    Not at 127.0.0.1, from where clients connect: so both ends have different addresses, as those of different hosts.
    """

    host = "127.0.0.2"

    def __init__(self, target: tuple[str, int], rate: float) -> None:
        self._target, self._bucket = target, TokenBucket(rate)
        self._listener = socket.create_server((self.host, 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # inherited
        self.port: int = self._listener.getsockname()[1]
        self.crossed = 0
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for end in (self._listener, *self._ends):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(30)
        for thread in self._threads[1:]:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads)
        for end in (self._listener, *self._ends):
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            server.connect(self._target)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._ends += [client, server]
            for source, sink in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pump, args=(source, sink, source is server))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                if limited:
                    self._bucket.take(len(data))
                    with self._lock:
                        self.crossed += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
