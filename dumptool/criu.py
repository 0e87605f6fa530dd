"""Real CRIU, for what `dumptool` can't save itself: it stops a tree and writes all images but the lazy pages.

`criu dump --lazy-pages` leaves the tree stopped, with its memory in place, when all other images are written. Then it
calls our action script (criu_hook.sh), and the status of that decides what follows: the end that was asked for, or
the undoing of everything, network locks included. The script reads a pipe of ours, which the kernel closes if we are
killed. So CRIU never waits for ever, and nothing of a run is left behind. It serves no pages: the only other end of its
socket is its own, with a client's last message in it.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dumptool.errors import DumpError
from lazypages.net.wire import Command

HOOK = Path(__file__).with_name("criu_hook.sh")
LOG_NAME = "criu-dump.log"
PRE_DUMP, POST_DUMP = "pre-dump", "post-dump"
NO_PAGES = int(Command.FORCE_CLOSE).to_bytes(4, "little") + bytes(28)
"""A client's FORCE_CLOSE in the 32 bytes of a header of CRIU 4.2. Up to 4.1.1 it has 24: 8 zeros stay unread."""
PATIENCE = 60.0  # s for CRIU to end when it has been told to
MOST_REASONS = 3

_REASON = re.compile(r"^(?:\([\d.]+\)\s+)?(?:\d+: )?Error \([^)]*\): (.*)$")
_NO_REASONS = (
    "rlimit: Can't setup RLIMIT_NOFILE",  # it goes on with fewer
    "Dumping FAILED",
    "exited, status=",
    "One of more action scripts failed",
    "Script ",
)


@dataclass(frozen=True, slots=True)
class Criu:
    """An installed CRIU. ``version``: as it prints it."""

    path: Path
    version: str


def find_criu(path: Path | None) -> Criu | None:
    """CRIU at ``path``, or the first ``criu`` in PATH; None if there is none. Raises ``DumpError``."""
    found = shutil.which("criu") if path is None else str(path)
    if found is None:
        return None
    try:
        done = subprocess.run(
            [found, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except OSError as error:
        raise DumpError(f"{found} can't be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise DumpError(f"{found} --version does not end") from None
    version = re.search(r"^Version: (\S+)", done.stdout, re.MULTILINE)
    if version is None:
        raise DumpError(f"{found} is no CRIU: --version prints {(done.stdout or done.stderr).strip()[:80]!r}")
    return Criu(Path(found), version[1])


class CriuError(DumpError):
    """CRIU could not dump the tree, which goes on as before."""


def reasons(text: str) -> list[str]:
    """What CRIU's log says went wrong, in its order, without what follows from that or is harmless."""
    found: list[str] = []
    for line in text.splitlines():
        match = _REASON.match(line)
        if match and not match[1].startswith(_NO_REASONS) and match[1] not in found:
            found.append(match[1].strip())
    return found


class CriuDump:
    """One run of `criu dump`; a context manager. At the end of the block CRIU has ended.

    Unless ``finish`` was called before, it has undone everything, and the tree goes on. ``frozen_since``,
    ``ready_since``: time.monotonic() when CRIU began to stop the tree, and when it stood still with its images written.
    """

    def __init__(
        self, criu: Criu, arguments: Sequence[str], *, log: Path, commit: Path | None, kills: bool
    ) -> None:
        """``arguments``: options of `criu dump`. ``log``: CRIU's. ``commit``: once this file exists, the end that was
        asked for takes place even if we are killed; None: only by ``finish``. ``kills``: that end is the tree's."""
        self._criu, self._arguments, self._log, self._kills = criu, arguments, log, kills
        self._commit = commit
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._verdict, self._say = os.pipe()
        self._events, self._tell = os.pipe()
        self._output = os.memfd_create("criu-output", os.MFD_CLOEXEC)
        self._heard = b""  # calls of the hook: several may come at once
        self.frozen_since = self.ready_since = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.undo()
        finally:
            self._stop_listening()
            for fd in (self._events, self._tell, self._output, self._pidfd):
                if fd >= 0:
                    os.close(fd)

    def start(self) -> None:
        """Returns when the tree stands still and the images are written. Raises ``CriuError``, ``DumpError``."""
        client, server = socket.socketpair()
        with client, server:
            client.sendall(NO_PAGES)
            command = [
                *(str(self._criu.path), "dump", *self._arguments),
                *("--lazy-pages", "--ps-socket", str(server.fileno()), "-o", str(self._log)),
                *("--action-script", str(HOOK)),  # the last one is called first
            ]
            # Not as descriptors of CRIU, which closes those that it does not know (observed, 4.1.1 and 4.2.1).
            ours = f"/proc/{os.getpid()}/fd"
            names = {
                "DUMPTOOL_EVENTS": f"{ours}/{self._tell}",
                "DUMPTOOL_VERDICT": f"{ours}/{self._verdict}",
                "DUMPTOOL_COMMIT": str(self._commit or ""),
            }
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=os.environ | names,
                # Both ends, so that its answer to FORCE_CLOSE never meets a closed socket.
                pass_fds=(client.fileno(), server.fileno()),
                start_new_session=True,  # no Ctrl-C for it: we decide
                umask=0o077,  # as for our own images
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        self._wait_for(PRE_DUMP)
        self.frozen_since = time.monotonic()
        self._wait_for(POST_DUMP)
        self.ready_since = time.monotonic()
        self._stop_listening()  # now the script does, alone

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def check_alive(self) -> None:
        """Raises ``CriuError`` if CRIU has ended: then the tree has gone on, and what was read of it may be wrong."""
        if self._process is None or self._process.poll() is not None:
            raise self.failure()

    def will_kill(self, pids: Sequence[int]) -> None:
        """Names the processes that are killed at the commit."""
        if self._kills:
            self._tell_script(f"kill {' '.join(map(str, pids))}")

    def finish(self) -> None:
        """The end that was asked for takes place. Returns at once; call ``wait`` and see what CRIU has done."""
        if self._commit is None:
            self._tell_script("finish")
        else:
            assert self._commit.exists()
        self._release()

    def undo(self) -> None:
        """CRIU undoes everything, unless ``finish`` was called. Returns when it has ended. Idempotent."""
        self._release()
        if self._process is not None:
            self.wait()

    def failure(self) -> CriuError:
        """Why CRIU has failed: its own words."""
        status = None if self._process is None else self._process.poll()
        found = reasons(_text(self._log)) or self._printed()
        told = "; ".join(line.strip() for line in found[:MOST_REASONS] if line.strip())
        if status is not None and status < 0:
            told = f"it was killed by signal {-status}" + (f"; {told}" if told else "")
        return CriuError(f"criu {self._criu.version}: {told or f'exit status {status}'} (log: {self._log})")

    def _wait_for(self, event: str) -> None:
        """Waits for a call of the hook. Raises ``CriuError`` if CRIU ends before."""
        while event.encode() not in self._heard.split(b"\n"):
            ready, _, _ = select.select([self._events, self._pidfd], [], [])
            if self._events not in ready:
                self.wait()
                raise self.failure()
            self._heard += os.read(self._events, 4096)

    def _printed(self) -> list[str]:
        text = os.pread(self._output, os.fstat(self._output).st_size, 0).decode(errors="replace")
        return text.split("\n")[-MOST_REASONS:]

    def _tell_script(self, line: str) -> None:
        """It reads while the tree stands still."""
        with suppress(BrokenPipeError):  # CRIU has been killed, and the script with it
            os.write(self._say, f"{line}\n".encode())

    def _stop_listening(self) -> None:
        if self._verdict >= 0:
            os.close(self._verdict)
            self._verdict = -1

    def _release(self) -> None:
        if self._say >= 0:
            os.close(self._say)
            self._say = -1

    def ends_within(self, seconds: float) -> bool:
        """Waits for it; whether it has ended."""
        return bool(select.select([self._pidfd], [], [], seconds)[0])

    def wait(self) -> None:
        """Raises ``CriuError`` if it does not end; it is not killed, because that could harm the tree."""
        assert self._process is not None
        if not self.ends_within(PATIENCE):
            raise CriuError(
                f"criu (pid {self._process.pid}) does not end; see its log {self._log}. It may still keep the tree "
                "stopped"
            )
        self._process.wait()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
