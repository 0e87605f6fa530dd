"""Clients that keep a server busy and know its right answers: in the test, or in the tree that is dumped.

As a program, `python -m tests.support.clients SOCKET MODULE HOST COMMAND...` starts a server and the clients of it that
MODULE has, and does what is asked for at the Unix socket (``Inside``).
"""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tests.support.processes import wait_for

MORE = 20
"""Requests of each worker that must be answered after the restore."""
PAUSE = 0.01
"""Seconds between two requests of a worker: not all of the CPUs are for them."""


class Clients(Protocol):
    """They keep their connections all the time."""

    def open(self) -> None:
        """Connects, when the server answers, in the network namespace of this thread."""

    def load(self) -> None:
        """Begins to ask, and leaves something half done."""

    def answered(self) -> int:
        """Requests so far that were answered."""

    def go_on(self) -> None:
        """Returns when each of them has got some more answers."""

    def check(self) -> None:
        """Goes on, and ends the load. Fails unless every connection has lived on, and all answers were right."""

    def close(self) -> None: ...


class Workers:
    """A thread for each of some functions, which calls it again and again, with the number of calls before."""

    def __init__(self, steps: Sequence[Callable[[int], None]]) -> None:
        self.counts = [0] * len(steps)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(steps))
        self._futures: list[Future[None]] = [
            self._pool.submit(self._work, number, step) for number, step in enumerate(steps)
        ]

    def _work(self, number: int, step: Callable[[int], None]) -> None:
        while not self._stop.is_set():
            step(self.counts[number])
            self.counts[number] += 1
            self._stop.wait(PAUSE)

    def go_on(self) -> None:
        """Waits until each has been called some more times. Raises what one of them has raised."""
        wanted = [count + MORE for count in self.counts]
        wait_for(
            "more answers",
            lambda: (
                all(now >= then for now, then in zip(self.counts, wanted, strict=True))
                or any(future.done() for future in self._futures)
            ),
        )
        for future in self._futures:
            if future.done():
                future.result()

    def end(self) -> None:
        """Returns when all have ended. Raises what one of them has raised."""
        self._stop.set()
        for future in self._futures:
            future.result(60)

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown()


class Working:
    """Of ``Clients`` with workers: those parts that are the same for each server."""

    #: How many of the workers count in ``answered``, the first ones; None: all.
    counted: int | None = None

    def __init__(self) -> None:
        self._workers: Workers | None = None

    def work(self, steps: Sequence[Callable[[int], None]]) -> None:
        """Begins the load."""
        self._workers = Workers(steps)

    def answered(self) -> int:
        return sum(self._workers.counts[: self.counted]) if self._workers else 0

    def go_on(self) -> None:
        assert self._workers is not None
        self._workers.go_on()

    def end_work(self) -> None:
        """Goes on, and ends the load. Raises what a worker has raised."""
        self.go_on()
        assert self._workers is not None
        self._workers.end()

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


class Inside:
    """``Clients`` that are in the tree that is dumped: in the program that this module is."""

    def __init__(self, address: Path, module: str, host: str, command: Sequence[str | Path]) -> None:
        self._address = address
        self.command = [sys.executable, "-m", __name__, address, module, host, *command]

    def open(self) -> None:
        wait_for("the clients", self._answers)

    def load(self) -> None:
        self._ask("load")

    def answered(self) -> int:
        return int(self._ask("answered"))

    def go_on(self) -> None:
        self._ask("go_on")

    def check(self) -> None:
        self._ask("check")

    def close(self) -> None:
        """They end with their tree."""

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self._ask("answered"))
        return False

    def _ask(self, request: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self._address))
            connection.sendall(request.encode() + b"\n")
            with connection.makefile() as answers:
                status, _, text = answers.read().partition("\n")
        assert status == "done", text
        return text


def _main(address: str, module: str, host: str, *command: str) -> None:
    subprocess.Popen(command)
    clients: Clients = importlib.import_module(module).Clients(host)
    clients.open()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream:
                try:
                    answer = f"done\n{getattr(clients, stream.readline().strip())() or 0}"
                except BaseException:
                    answer = f"failed\n{traceback.format_exc()}"
                stream.write(answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
