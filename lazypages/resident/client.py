"""A client of the resident daemon. Blocking, without an event loop: for commands and scripts."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from lazypages.errors import LazyPagesError
from lazypages.resident.protocol import Lines, encode

#: Longest line in bytes that a client reads: the summary of a restore of very many tasks.
_MAX_LINE = 1 << 30


class ClientError(LazyPagesError):
    """There is no daemon, or it has ended."""


class RefusedError(LazyPagesError):
    """The daemon has refused a request. ``code``: docs/daemon.md."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """A connection to the daemon at a socket. A context manager. ``on_log``: called with level and text of log lines.

    The constructor raises ClientError.
    """

    def __init__(self, path: Path, on_log: Callable[[str, str], None] | None = None) -> None:
        self._path = path
        self._on_log = on_log
        self._lines = Lines(_MAX_LINE)
        self._received: list[bytes] = []
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._peer.connect(os.fspath(path))
        except OSError as error:
            self._peer.close()
            raise ClientError(
                f"no daemon at {path} ({error.strerror or error}): start it with `lazypages daemon`"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._peer.close()

    def send(self, do: str, fds: Sequence[int] = (), **fields: Any) -> None:
        """Send a request with its descriptors, without waiting for the answer. Its id is `do`. Raises ClientError."""
        line = encode({"id": do, "do": do, **fields})
        try:
            sent = socket.send_fds(self._peer, [line], fds) if fds else 0
            self._peer.sendall(line[sent:])
        except OSError as error:
            # It may have refused us, and have closed the connection: then the answer is there.
            if not self._peer_has_answered():
                raise self._ended(error.strerror) from None

    def request(self, do: str, fds: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Send a request, and return its answer. Raises RefusedError, ClientError."""
        self.send(do, fds, **fields)
        return self.answer(do)

    def answer(self, do: str) -> dict[str, Any]:
        """Wait for the answer to a request with this id. Raises RefusedError, ClientError."""
        for message in self._messages():
            if "log" in message:
                if self._on_log:
                    self._on_log(message["log"]["level"], message["log"]["text"])
            elif not message["ok"] and message["id"] in {do, None}:
                raise RefusedError(message["error"]["code"], message["error"]["message"])
            elif message["id"] == do:
                return message
        raise self._ended("it has closed the connection")

    def closed(self) -> None:
        """Wait until the daemon has closed the connection, which it does when it ends."""
        for _ in self._messages():
            pass

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Until the daemon closes the connection."""
        while True:
            while self._received:
                yield json.loads(self._received.pop(0))
            try:
                data = self._peer.recv(1 << 16)
            except ConnectionError:
                return
            if not data:
                return
            self._received += self._lines.feed(data)

    def _peer_has_answered(self) -> bool:
        try:
            return bool(self._received) or bool(self._peer.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _ended(self, why: str | None) -> ClientError:
        return ClientError(
            f"the daemon at {self._path} has ended ({why}); if it was killed, its guard has killed the tasks that "
            "missed pages"
        )
