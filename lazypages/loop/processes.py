"""Restored tasks as processes of this machine: only needed to end one that can't be given its memory."""

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

#: Bytes of /proc/PID/status that hold NSpid at least: the groups before it may be 65536 (NGROUPS_MAX).
_STATUS_SIZE = 1 << 20

log = logging.getLogger("lazypages")


class Process:
    """A process that can be killed without mistaking another for it; owns a pidfd.

    ``reserve``: descriptors that it may use for a moment when there are no others. ``events``: where they are needed.
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
        """The process `real_pid` if it is, in its own PID namespace, the task `image_pid`; None if not.

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
            raise NoDescriptorError(f"task {image_pid}: no file descriptor is free to look at it") from None
        if found == image_pid:
            return cls(real_pid, pidfd, reserve, events)
        os.close(pidfd)
        return None

    def kill(self, *, descendants: bool = False) -> bool:
        """Sends SIGKILL; to all that it has forked first, on demand. False if there is no such process any more.

        Descendants that can't be looked for are left, and the log says so.
        """
        try:
            if descendants:
                # So that it forks no more. (A zombie takes signals, too: as long as this works, its number is its own.)
                signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
                try:
                    self._reserve.attempt(lambda: _kill_children(self.pid))
                except OSError as error:
                    log.error(
                        "pid %d: what it has forked can't be killed (%s): end it", self.pid, error.strerror
                    )
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def holds_anonymous_memory(self, addr: int) -> bool:
        """Whether private anonymous memory is mapped at `addr`; True too when that can't be read."""
        try:
            return self._reserve.attempt(lambda: _is_anonymous(self.pid, addr))
        except OSError:
            return True

    @property
    def has_exited(self) -> bool:
        """All its threads."""
        polled = select.poll()
        polled.register(self._pidfd, select.POLLIN)
        return bool(polled.poll(0))

    @property
    def has_memory(self) -> bool:
        """Whether it runs a program: not while it is exiting. False too when that can't be read."""
        try:
            return self._reserve.attempt(lambda: Path(f"/proc/{self.pid}/statm").read_bytes())[:2] != b"0 "
        except OSError:
            return False

    def exit_status(self) -> int | None:
        """How it ended, as wait(2) tells, once it has exited; None if that is not known.

        On kernels before 6.15 it may be told from a zombie only: it should be asked for before the parent has waited
        for it. If there are `events`, nothing is sooner or later; but what status it exited with they do not say: 0.
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
            signal.pidfd_send_signal(self._pidfd, 0)  # its number was no other's yet
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
    except (ValueError, IndexError):
        return None
    except OSError as error:
        if error.errno in NONE_LEFT:
            raise
        return None


def _status(pid: int, field: bytes) -> list[bytes]:
    # A thousand tasks may come at once: without pathlib and decoding it takes a third of the time.
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
    """Kills all descendants of a process whose number stays its own meanwhile. Raises OSError: none is left open."""
    for child in _children(parent):
        try:
            pidfd = os.pidfd_open(child)
        except ProcessLookupError:
            continue
        try:
            # A number that has become another's since it was read: that one has another parent, or is a child, too.
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
    """0 if there is no such process any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[1])
