"""A redis under load, and a client that knows what has to be in it."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.processes import start, wait_for

REDIS = shutil.which("redis-server") or "/usr/bin/redis-server"
VALUE = 512
BATCH = 1000
TIMEOUT = 30.0
IMPATIENT = 0.5
"""Seconds until the load gives up a connection: of a server that stands still it gets no answer."""


class Client:
    """A connection to the server: by its Unix socket, or its port of this machine."""

    def __init__(self, address: Path | int, timeout: float = TIMEOUT) -> None:
        family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
        self._socket = socket.socket(family)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(("127.0.0.1", address) if isinstance(address, int) else str(address))
        except BaseException:
            self._socket.close()
            raise
        self._answers = self._socket.makefile("rb")

    def close(self) -> None:
        self._answers.close()
        self._socket.close()

    def ask(self, *requests: bytes) -> list[bytes]:
        """The answers, without the text that precedes a value."""
        self._socket.sendall(b"".join(request + b"\r\n" for request in requests))
        return [self._answer() for _ in requests]

    def _answer(self) -> bytes:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError
        if line[:1] == b"$" and line != b"$-1\r\n":
            size = int(line[1:])
            return self._answers.read(size + 2)[:size]
        return line.strip()


def value(number: int) -> bytes:
    """What belongs to a key: no two are alike."""
    return (b"%d-" % (number * 7919)).ljust(VALUE, b"x")


@dataclass
class Redis:
    """A running server. ``written``: keys 0 ... written - 1 have been acknowledged."""

    pid: int
    address: Path
    port: int
    written: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def fill(self, keys: int) -> None:
        """Writes the next keys."""
        client = Client(self.address)
        try:
            for first in range(self.written, self.written + keys, BATCH):
                self._write(client, first, BATCH)
        finally:
            client.close()

    def _write(self, client: Client, first: int, count: int) -> None:
        requests = [b"SET key:%d %s" % (number, value(number)) for number in range(first, first + count)]
        assert set(client.ask(*requests)) == {b"+OK"}
        self.written = first + count

    def load(self) -> None:
        """Writes on over TCP until ``stop``, with a new connection when one is lost."""

        def work() -> None:
            while not self._stop.is_set():
                with suppress(OSError):
                    client = Client(self.port, IMPATIENT)
                    try:
                        while not self._stop.is_set():
                            self._write(client, self.written, 10)
                    finally:
                        client.close()
                time.sleep(0.01)

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def stop(self) -> None:
        """Ends the load."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """It saves all to its disk, from now on; every key that was ever acknowledged is there, and right.

        A second server finds the same in the file.
        """
        client = Client(self.address)
        try:
            assert client.ask(b"BGSAVE") == [b"+Background saving started"]
            for first in range(0, self.written, BATCH):
                numbers = range(first, min(first + BATCH, self.written))
                answers = client.ask(*(b"GET key:%d" % number for number in numbers))
                assert answers == [value(number) for number in numbers], f"keys from {first} on"
            wait_for("the save", lambda: b"rdb_bgsave_in_progress:0" in client.ask(b"INFO persistence")[0])
            assert b"rdb_last_bgsave_status:ok" in client.ask(b"INFO persistence")[0]
            digest = client.ask(b"DEBUG DIGEST")
        finally:
            client.close()
        folder = self.address.parent / "second"
        folder.mkdir()
        shutil.copy(self.address.parent / "dump.rdb", folder)
        with redis(folder) as second, closing(Client(second.address)) as reader:
            assert reader.ask(b"DEBUG DIGEST") == digest


@contextmanager
def redis(folder: Path, prefix: Sequence[str] = (), *, tcp: bool = False) -> Iterator[Redis]:
    """A server with a Unix socket in ``folder``, and with ``tcp`` a port. Use it in a block of `nothing_left`."""
    address, config = folder / "redis.sock", folder / "redis.conf"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if not tcp:
        port = 0
    config.write_text(
        f"bind 127.0.0.1\nport {port}\nunixsocket {address}\ndir {folder}\n"
        'save ""\ndaemonize no\nenable-debug-command local\n'
    )
    server = start([*prefix, REDIS, config], cwd=folder, output=folder / "redis.out")
    wait_for("redis to answer", lambda: _answers(address))
    running = Redis(server.pid, address, port)
    try:
        yield running
    finally:
        running.stop()


def _answers(address: Path) -> bool:
    with suppress(OSError):
        client = Client(address)
        try:
            return client.ask(b"PING") == [b"+PONG"]
        finally:
            client.close()
    return False
