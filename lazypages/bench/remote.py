"""A remote source on this machine: a page server over complete images, optionally behind a link with a delay."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazypages.bench.daemons import Daemon
from lazypages.bench.errors import BenchError
from lazypages.bench.programs import Programs


@contextmanager
def page_server(
    command: Callable[[int], list[str]], work: Path, programs: Programs, round_trip: int
) -> Iterator[int]:
    """Run the page server `command(port)` on 127.0.0.1 while the block runs; yields the port for clients.

    ``round_trip``: round-trip time of the link in ms. Raises BenchError.
    """
    port = _free_port()
    with ExitStack() as stack:
        server = stack.enter_context(Daemon(command(port), work / "page-server.out"))
        server.wait_ready()
        where = port
        if round_trip:
            where = _free_port()
            link = [str(programs.delay), "--listen", str(where), "--to", str(port)]
            link += ["--ns", str(round_trip * 500_000)]
            stack.enter_context(Daemon(link, work / "delay.out")).wait_ready()
        try:
            yield where
        except BenchError as error:
            raise BenchError(f"{error}\npage server: {server.story()}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
