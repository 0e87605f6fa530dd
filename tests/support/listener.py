"""A server in this process: listens on loopback, a thread for each thing to do, all of it over on the way out."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

Work = Callable[[], object]


class Listener(ABC):
    """Listens at `port` while its context lasts. Then all its connections are shut down and its threads joined."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self._listener = socket.create_server((self.host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    @abstractmethod
    def accepted(self, client: socket.socket) -> Sequence[Work]:
        """What is to be done for a client, each in a thread of its own. Called for one after the other."""

    def connected(self, *ends: socket.socket) -> None:
        """Has connections ended on the way out."""
        with self._lock:
            self._ends += ends

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(30)
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
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
            self.connected(client)
            for work in self.accepted(client):
                self._threads.append(threading.Thread(target=work))
                self._threads[-1].start()
