"""A program on a terminal of its own: a pseudo-terminal with a size, what is on it, and its keyboard."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import pytest


class OnTerminal:
    """Runs the command in a session of its own, with the terminal as its controlling one."""

    def __init__(self, command: Sequence[str], *, rows: int = 40, columns: int = 160) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # With a session leader's first open of a terminal that becomes its controlling terminal. CI may run as a
        # background job, in which a shell ignores these signals.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "env", "--default-signal=INT,QUIT", *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": str(rows)},
        )
        os.close(slave)
        self._said = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.hang_up()
        if error is not None:
            error.add_note(f"--- on the terminal\n{self.text()}")

    def hang_up(self) -> None:
        """The terminal goes away."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def text(self) -> str:
        """All that was ever on it, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._said.decode(errors="replace"))

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until that is on it; fails the test otherwise."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            if not self._read(max(0.0, deadline - time.monotonic())):
                pytest.fail(f"{text!r} was never on the terminal")

    def wait(self, timeout: float = 60) -> int:
        """Its exit code; what it says until then is read."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                pytest.fail(f"{self.process.args!r} still runs")
            self._read(0.05)
        while self._read(0):
            pass
        return self.process.returncode

    def _read(self, timeout: float) -> bool:
        if self._master < 0 or not select.select([self._master], [], [], timeout)[0]:
            return False
        try:
            more = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other side open any more
            return False
        self._said += more
        return bool(more)
