"""A remote source on this machine: CRIU's page server, which answers GETs out of complete images."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazypages.bench.daemons import Daemon
from lazypages.bench.errors import BenchError

PIPE_MAX_SIZE = Path("/proc/sys/fs/pipe-max-size")


@contextmanager
def page_server(criu: Path, images: Path, work: Path) -> Iterator[int]:
    """Serves `images` to one client, for as long as the block lasts: its port on 127.0.0.1. Raises BenchError."""
    port = _free_port()
    command = [str(criu), "page-server", "--lazy-pages", "-D", str(images), "-W", str(work), "-v1"]
    command += ["--address", "127.0.0.1", "--port", str(port)]
    with Daemon(command, work / "page-server.out") as server:
        server.wait_ready()
        try:
            yield port
        except BenchError as error:
            raise BenchError(f"{error}\npage server: {server.story()}") from error


@contextmanager
def raised_pipe_limit(size: int = 16 << 20) -> Iterator[None]:
    """Raises fs.pipe-max-size (bytes) and puts it back.

    Without CAP_SYS_RESOURCE, CRIU's page server breaks on requests past 16 pages otherwise
    (reference/criu-interfaces §8, 9). Raises BenchError.
    """
    try:
        before = PIPE_MAX_SIZE.read_text()
        PIPE_MAX_SIZE.write_text(str(max(size, int(before))))
    except OSError as error:
        raise BenchError(f"{PIPE_MAX_SIZE}: {error.strerror}; CRIU's page server needs it raised") from None
    try:
        yield
    finally:
        PIPE_MAX_SIZE.write_text(before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
