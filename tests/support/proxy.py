"""A proxy between a client and a page server that does to their connections what bad networks do."""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.support.listener import Listener, Work


@dataclass(frozen=True)
class Fault:
    """What befalls one connection once `after` bytes have come from the server.

    `how`: "close" (both ends), "reset", "stall" (nothing moves any more), or "garbage" (what follows is noise).
    """

    after: int
    how: str = "close"


Plan = Callable[[int], Fault | None]  # by the number of the connection, from 0 on


class Proxy(Listener):
    """Connects each client to `target`; `plan` says what goes wrong.

    `pause`: seconds, by the number of the connection, that each piece from the server takes longer.
    """

    def __init__(
        self, target: tuple[str, int], plan: Plan, pause: Callable[[int], float] = lambda _: 0.0
    ) -> None:
        super().__init__()
        self._target, self._plan, self._pause = target, plan, pause
        self.connections = 0

    def accepted(self, client: socket.socket) -> list[Work]:
        fault, pause = self._plan(self.connections), self._pause(self.connections)
        self.connections += 1
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return []
        self.connected(server)
        return [partial(self._pump, client, server, fault, pause)]

    def _pump(self, client: socket.socket, server: socket.socket, fault: Fault | None, pause: float) -> None:
        passed = 0
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while not self.stopping.is_set():
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
                            self.stopping.wait()
                        elif fault.how == "reset":
                            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self._end(client, server)
                        return

    @staticmethod
    def _end(client: socket.socket, server: socket.socket) -> None:
        client.close()
        server.close()
