"""Programs that answer at a Unix socket whether all that they have is right (tests/support/programs)."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.compiling import PROGRAMS
from tests.support.processes import start, wait_for

SERVICE = (sys.executable, PROGRAMS / "service.py")
FAMILY = (sys.executable, PROGRAMS / "family.py")
NODE = (shutil.which("node") or "/usr/bin/node", PROGRAMS / "heap.js")
JAVA = (shutil.which("java") or "/usr/bin/java", "-Xmx96m", PROGRAMS / "Heap.java")


@dataclass
class Service:
    """A running one."""

    pid: int
    address: Path

    def ask(self, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self.address))
            connection.sendall(request + b"\n")
            return connection.recv(100).strip()


@contextmanager
def service(
    folder: Path,
    size: int,
    prefix: Sequence[str] = (),
    *,
    program: Sequence[str | Path] = SERVICE,
    tcp: bool = False,
) -> Iterator[Service]:
    """Use it in a block of `nothing_left`. ``size``: of its memory, as the program counts it."""
    address = folder / "service.sock"
    command = [*prefix, *program, address, str(size), *(["tcp"] if tcp else [])]
    process = start(command, cwd=folder)
    running = Service(process.pid, address)

    def answers() -> bool:
        with suppress(OSError):
            return running.ask(b"check") == b"right"
        return False

    wait_for("the service", answers)
    yield running
