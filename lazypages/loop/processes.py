"""Restored tasks as processes: whether they run, how they ended, and killing one that can't get its memory."""

from __future__ import annotations

import logging
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import anyio

from lazypages.control.descriptors import NONE_LEFT, NoDescriptorError, Reserve
from lazypages.engine._uffd import lib

if TYPE_CHECKING:
    from lazypages.loop.exit_events import ExitEvents

#: Bytes to read of /proc/PID/status so that NSpid is among them: up to 65536 groups (NGROUPS_MAX) come before it.
_STATUS_SIZE = 1 << 20

log = logging.getLogger("lazypages")


class Process:
    """A process, identified by a pidfd that this object owns, so that no other process is killed in its place.

    ``reserve``: descriptors to release for a moment when no other is free. ``events``: on kernels that need them.
    """

    def __init__(
        self, pid: int, pidfd: int, reserve: Reserve | None = None, events: ExitEvents | None = None
    ) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._reserve = reserve or Reserve(0)
        self._events = events
        self._status: int | None = None
        if events:
            events.watch(pid)

    @classmethod
    def of_task(
        cls, real_pid: int, image_pid: int, reserve: Reserve, events: ExitEvents | None = None
    ) -> Process | None:
        """The process `real_pid`, if it has the pid `image_pid` in its own PID namespace; else None.

        Raises NoDescriptorError.
        """
        try:
            pidfd = os.pidfd_open(real_pid)
        except OSError as error:
            if error.errno in NONE_LEFT:
                raise NoDescriptorError(
                    f"task {image_pid}: no file descriptor is free for its pidfd"
                ) from None
            return None
        try:
            found = reserve.attempt(lambda: _innermost_pid(real_pid))
        except OSError:
            os.close(pidfd)
            raise NoDescriptorError(f"task {image_pid}: no file descriptor is free to read /proc") from None
        if found == image_pid:
            return cls(real_pid, pidfd, reserve, events)
        os.close(pidfd)
        return None

    def kill(self, *, descendants: bool = False) -> bool:
        """Send SIGKILL, with `descendants` first to all descendants. False if the process does not exist any more.

        If descendants can't be found, the log reports it.
        """
        try:
            if descendants:
                # Stopped, it forks no more. A zombie accepts signals, too: while this succeeds, its pid is not reused.
                signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
                try:
                    self._reserve.attempt(lambda: _kill_children(self.pid))
                except OSError as error:
                    log.error("pid %d: cannot kill its descendants (%s): kill them", self.pid, error.strerror)
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def holds_anonymous_memory(self, addr: int) -> bool:
        """Whether private anonymous memory is mapped at `addr`; also True if /proc can't be read."""
        try:
            return self._reserve.attempt(lambda: _is_anonymous(self.pid, addr))
        except OSError:
            return True

    @property
    def has_exited(self) -> bool:
        """Whether the process has exited, with all its threads."""
        polled = select.poll()
        polled.register(self._pidfd, select.POLLIN)
        return bool(polled.poll(0))

    @property
    def has_memory(self) -> bool:
        """Whether the process has an address space; not while it is exiting. Also False if /proc can't be read."""
        try:
            return self._reserve.attempt(lambda: Path(f"/proc/{self.pid}/statm").read_bytes())[:2] != b"0 "
        except OSError:
            return False

    def exit_status(self) -> int | None:
        """The wait(2) status of a process that has exited; None if it is unknown.

        Before Linux 6.15 the status can be read from a zombie only, before its parent has waited for it. `events`
        remove that limit, but report 0 for every exit without a signal (docs/kernel.md, "How a task ended").
        """
        if self._status is None and self._events:
            self._status = self._events.signal_of(self.pid)
        if self._status is None:
            self._status = self._status_of_zombie()
        if self._status is None:
            status = int(lib.lp_exit_status(self._pidfd))
            self._status = status if status >= 0 else None
        return self._status

    def _status_of_zombie(self) -> int | None:
        try:
            stat = self._reserve.attempt(lambda: Path(f"/proc/{self.pid}/stat").read_bytes())
            signal.pidfd_send_signal(
                self._pidfd, 0
            )  # succeeds only if the pid was not reused before the read
        except OSError:
            return None
        fields = stat[stat.rindex(b")") + 2 :].split()  # from the third one on: proc_pid_stat(5)
        return int(fields[52 - 3]) if fields[0] == b"Z" else None

    def fileno(self) -> int:
        """The pidfd. Readable when the process has exited, all its threads included (pidfd_open(2))."""
        return self._pidfd

    def close(self) -> None:
        os.close(self._pidfd)


class Exits:
    """Reports the exits of many processes, with one task and one file descriptor for all.

    A context manager; leave it before the processes are closed.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._epoll.close()

    def watch(self, process: Process, exited: Callable[[], None]) -> None:
        """Let :meth:`run` call `exited` once when the process exits."""
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
    """The thread that traces the leader of a process, in this PID namespace; 0: no tracer, or no such process."""
    try:
        return int(_status(pid, b"TracerPid")[0])
    except (OSError, ValueError, IndexError):
        return 0


def process_of(thread: int) -> int:
    """The process that a thread belongs to; the thread itself if that is unknown."""
    try:
        return int(_status(thread, b"Tgid")[0])
    except (OSError, ValueError, IndexError):
        return thread


def _innermost_pid(real_pid: int) -> int | None:
    try:
        return int(_status(real_pid, b"NSpid")[-1])
    except (ValueError, IndexError):
        return None
    except OSError as error:
        if error.errno in NONE_LEFT:
            raise
        return None


def _status(pid: int, field: bytes) -> list[bytes]:
    # Without pathlib and decoding, since a thousand tasks may arrive at once: takes a third of the time.
    fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.read(fd, _STATUS_SIZE)
    finally:
        os.close(fd)
    return status.partition(b"\n" + field + b":")[2].partition(b"\n")[0].split()


def _is_anonymous(pid: int, addr: int) -> bool:
    with Path(f"/proc/{pid}/maps").open(errors="replace") as maps:
        for line in maps:
            span, permissions, _offset, _device, inode, *_name = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= addr < end:
                return inode == "0" and permissions.endswith("p")
    return False


def _kill_children(parent: int) -> None:
    """Kill all descendants of a process whose pid can't be reused meanwhile. Raises OSError; leaks no descriptor."""
    for child in _children(parent):
        try:
            pidfd = os.pidfd_open(child)
        except ProcessLookupError:
            continue
        try:
            # If the pid was reused since it was read, the new process has another parent, or is a child, too.
            if _parent(child) == parent:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                try:
                    _kill_children(child)
                finally:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            os.close(pidfd)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return []
    for thread in threads:
        try:
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _parent(pid: int) -> int:
    """The parent's pid; 0 if the process does not exist any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[1])
