"""Restored tasks as processes of this machine: only needed to end one that can't be given its memory."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Self

import anyio

#: Bytes of /proc/PID/status that hold NSpid at least: the groups before it may be 65536 (NGROUPS_MAX).
_STATUS_SIZE = 1 << 20


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

    def fileno(self) -> int:
        """The pidfd. Readable when the process has exited, all its threads included (pidfd_open(2))."""
        return self._pidfd

    def close(self) -> None:
        os.close(self._pidfd)


class Exits:
    """Tells of many processes when they have exited, with one task and one file descriptor for all.

    A context manager, to be left before the processes are closed.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._epoll.close()

    def watch(self, process: Process, exited: Callable[[], None]) -> None:
        """Has `exited` called by :meth:`run`, once."""
        self._watched[process.fileno()] = exited
        self._epoll.register(process.fileno(), select.EPOLLIN)

    async def run(self) -> None:
        """Never returns."""
        while True:
            await anyio.wait_readable(self._epoll.fileno())
            for fd, _events in self._epoll.poll(0):
                self._epoll.unregister(fd)
                self._watched.pop(fd)()


def tracer_of(pid: int) -> int:
    """The thread that traces a process (its leader), as this PID namespace sees it; 0: nobody, or no such process."""
    try:
        return int(_status(pid, b"TracerPid")[0])
    except (OSError, ValueError, IndexError):
        return 0


def _innermost_pid(real_pid: int) -> int | None:
    try:
        return int(_status(real_pid, b"NSpid")[-1])
    except (OSError, ValueError, IndexError):
        return None


def _status(pid: int, field: bytes) -> list[bytes]:
    # A thousand tasks may come at once: without pathlib and decoding it takes a third of the time.
    fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.read(fd, _STATUS_SIZE)
    finally:
        os.close(fd)
    return status.partition(b"\n" + field + b":")[2].partition(b"\n")[0].split()


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
