"""Restored tasks as processes of this machine: only needed to end one that can't be given its memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio


class Process:
    """A process that can be killed without mistaking another for it; owns a pidfd."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    @classmethod
    def of_task(cls, real_pid: int, image_pid: int) -> Process | None:
        """The process `real_pid` if it is, in its own PID namespace, the task `image_pid`; None if not."""
        try:
            pidfd = os.pidfd_open(real_pid)
        except OSError:
            return None
        if _innermost_pid(real_pid) == image_pid:
            return cls(real_pid, pidfd)
        os.close(pidfd)
        return None

    def kill(self, *, descendants: bool = False) -> None:
        """Sends SIGKILL; to all that it has forked as well, on demand."""
        family = _descendants(self.pid) if descendants else []
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return  # then the family found under its number was not its either
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def holds_anonymous_memory(self, addr: int) -> bool:
        """Whether private anonymous memory is mapped at `addr`; True too when that can't be read."""
        try:
            with Path(f"/proc/{self.pid}/maps").open(errors="replace") as maps:
                for line in maps:
                    span, permissions, _offset, _device, inode, *_name = line.split()
                    start, end = (int(part, 16) for part in span.split("-"))
                    if start <= addr < end:
                        return inode == "0" and permissions.endswith("p")
        except OSError:
            return True
        return False

    async def wait_exit(self) -> None:
        """Until it has exited, all its threads included (pidfd_open(2))."""
        await anyio.wait_readable(self._pidfd)

    def close(self) -> None:
        os.close(self._pidfd)


def _innermost_pid(real_pid: int) -> int | None:
    try:
        with Path(f"/proc/{real_pid}/status").open(errors="replace") as status:
            for line in status:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
    except (OSError, ValueError):
        pass
    return None


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    queue = [pid]
    while queue:
        for children in Path(f"/proc/{queue.pop()}/task").glob("*/children"):
            try:
                pids = [int(word) for word in children.read_text().split()]
            except OSError:
                continue
            found += pids
            queue += pids
    return found
