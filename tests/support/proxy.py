"""A proxy between a client and a page server that does to their connections what bad networks do."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Fault:
    """What befalls one connection once `after` bytes have come from the server.

    `how`: "close" (both ends), "reset", "stall" (nothing moves any more), or "garbage" (what follows is noise).
    """

    after: int
    how: str = "close"


Plan = Callable[[int], Fault | None]  # by the number of the connection, from 0 on


class Proxy:
    """Listens on loopback (`port`) and connects each client to `target`; `plan` says what goes wrong.

    `pause`: seconds, by the number of the connection, that each piece from the server takes longer.
    """

    def __init__(
        self, target: tuple[str, int], plan: Plan, pause: Callable[[int], float] = lambda _: 0.0
    ) -> None:
        self._target, self._plan, self._pause = target, plan, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._ends: list[socket.socket] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        for end in (self._listener, *self._ends):
            end.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            fault, pause = self._plan(self.connections), self._pause(self.connections)
            self.connections += 1
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._ends += [client, server]
            thread = threading.Thread(target=self._pump, args=(client, server, fault, pause))
            self._threads.append(thread)
            thread.start()

    def _pump(self, client: socket.socket, server: socket.socket, fault: Fault | None, pause: float) -> None:
        passed = 0
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while not self._stop.is_set():
                for key, _ in selector.select(0.05):
                    source, sink = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    limit = 1 << 16
                    if source is server and fault is not None and passed < fault.after:
                        limit = fault.after - passed
                    try:
                        data = source.recv(limit)
                        if not data:
                            raise ConnectionResetError
                        if source is server and fault is not None and passed >= fault.after:
                            data = bytes(
                                byte ^ 0x5A for byte in data
                            )  # "garbage": the others are over by now
                        if source is server:
                            time.sleep(pause)
                        sink.sendall(data)
                    except OSError:
                        self._end(client, server)
                        return
                    passed += len(data) if source is server else 0
                    if fault is not None and passed >= fault.after and fault.how != "garbage":
                        if fault.how == "stall":
                            self._stop.wait()
                        elif fault.how == "reset":
                            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self._end(client, server)
                        return

    @staticmethod
    def _end(client: socket.socket, server: socket.socket) -> None:
        client.close()
        server.close()
