"""The processes that keep trackers while no dumptool runs: ``tracker_holder``, one for each tracked tree.

A tracker (``dumptool.trackers``) must not be in the tracked process: CRIU can't dump a process that has a userfaultfd.
A holder has descriptors and nothing else, and ends with the last process that it tracks (csrc/tracker_holder.c). It is
found by its name in /proc, among the processes of our own user; whoever may trace it can take its descriptors
(pidfd_getfd(2)), and one by which messages are sent to it. So there is no file or socket to be found, and none that
others could use. If a holder is killed, the kernel closes all it has, and record and userfaultfd of a tracker are lost
together: the next dump writes all pages.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dumptool import identity, proc, tracee, trackers
from dumptool.errors import DumpError, TaskGoneError
from dumptool.trackers import Record

PROGRAM = Path(__file__).parent / "tracker_holder"
NAME = PROGRAM.name
"""Not more than 15 characters: the kernel cuts it in /proc/<pid>/comm."""
SEND, FIRST, WIDTH = 4, 8, 3
"""Numbers of descriptors of a holder (csrc/tracker_holder.c)."""
HOLD, ADD_UFFD, DROP, SYNC, KEEP = 1, 2, 3, 4, 5
PATIENCE = 10
"""Seconds for a holder to take a message, or to start."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """A tracker and its holder. ``memfd``, ``uffd``: descriptor numbers there; ``uffd`` None: it has none."""

    holder: Holder
    memfd: int
    uffd: int | None
    record: Record


class Holder:
    """A running holder. ``trackers``: by the pid of the tracked process, at the last look. Raises ``DumpError``."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Owns ``pidfd``."""
        self.pid, self._pidfd = pid, pidfd
        self._control: socket.socket | None = None
        self.trackers: dict[int, Tracker] = {}

    def is_there(self) -> bool:
        """Whether it runs: all that was read by its pid so far was its own."""
        ended, _, _ = select.select([self._pidfd], [], [], 0)
        return not ended

    def look(self) -> None:
        """Reads which trackers it has. None if it has ended meanwhile."""
        found: dict[int, Tracker] = {}
        with suppress(TaskGoneError):
            links = {file.fd: file.link for file in proc.open_files(self.pid, trackers.LINKS)}
            for fd, link in links.items():
                if link == trackers.MEMFD_LINK and (record := self._read(fd)) is not None:
                    uffd = fd + 1 if links.get(fd + 1) == trackers.UFFD_LINK else None
                    found[record.pid] = Tracker(self, fd, uffd, record)
        self.trackers = found if self.is_there() else {}

    def _read(self, fd: int) -> Record | None:
        try:
            with open(f"/proc/{self.pid}/fd/{fd}", "rb") as file:
                return Record.decode(file.read(trackers.RECORD_SIZE))
        except OSError:
            return None

    def open(self, tracker: Tracker) -> int | None:
        """A description of our own of the file of a record. None if this holder has dropped it, or has ended."""
        path = f"/proc/{self.pid}/fd/{tracker.memfd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        if self._has(path, fd):
            return fd
        os.close(fd)
        return None

    def still_has(self, tracker: Tracker, fd: int) -> bool:
        """Whether it has not dropped the tracker whose record ``open`` has opened as ``fd``."""
        return self._has(f"/proc/{self.pid}/fd/{tracker.memfd}", fd)

    def _has(self, path: str, fd: int) -> bool:
        try:
            same = os.path.samestat(os.stat(path), os.fstat(fd))
        except OSError:
            return False
        return same and self.is_there()

    def take(self, fd: int) -> int:
        """Duplicates one of its descriptors. Raises ``TaskGoneError`` if it has ended."""
        return tracee.take_fd_by(self._pidfd, fd, f"pid {self.pid}")

    def hold(self, pid: int, pidfd: int, memfd: int) -> None:
        """Gives it the record of a new tracker, which lasts until the process has ended."""
        self._send(HOLD, pid, pidfd, memfd)

    def add_uffd(self, pid: int, uffd: int) -> None:
        """Gives it the userfaultfd of a tracker."""
        self._send(ADD_UFFD, pid, uffd)

    def keep(self) -> int:
        """Makes it run until the returned descriptor is closed, even if it has no tracker meanwhile."""
        theirs, ours = os.pipe()
        try:
            self._send(KEEP, 0, theirs)
        except DumpError:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours

    def drop(self, pid: int) -> None:
        """Makes it close what it has of a process."""
        self._send(DROP, pid)

    def sync(self) -> bool:
        """Returns when it has done what it was told: whether it runs, and so has all that it was given."""
        done, doing = os.pipe()
        try:
            try:
                self._send(SYNC, 0, doing)
            except DumpError:
                return False
            finally:
                os.close(doing)
            answered, _, _ = select.select([done], [], [], PATIENCE)
        finally:
            os.close(done)
        return bool(answered) and self.is_there()

    def _send(self, what: int, pid: int, *fds: int) -> None:
        try:
            if self._control is None:
                self._control = socket.socket(fileno=self.take(SEND))
                limit = struct.pack("ll", PATIENCE, 0)
                self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            socket.send_fds(self._control, [struct.pack("=Ii", what, pid)], fds)
        except (OSError, TaskGoneError) as error:
            raise DumpError(f"pid {self.pid} ({NAME}), which keeps what tracks writes: {error}") from None

    def close(self) -> None:
        """Closes our descriptors."""
        if self._control is not None:
            self._control.close()
            self._control = None
        os.close(self._pidfd)


class Holders:
    """All holders of our user (``found``); a context manager that closes our descriptors. They run on."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self.found: list[Holder] = []
        self._starters: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for holder in self.found:
            holder.close()
        for fd in self._starters:
            os.close(fd)

    def look(self) -> None:
        """Finds the holders, and reads what they have. Only processes that are new since the last look are examined."""
        there = {name for name in os.listdir("/proc") if name.isdigit()}
        for name in there - self._seen:
            if _is_holder(name):
                with suppress(TaskGoneError):
                    self._add(int(name))
        self._seen = there
        for holder in self.found:
            holder.look()

    def _add(self, pid: int) -> Holder:
        holder = Holder(pid, identity.open_pidfd(pid))
        self.found.append(holder)
        return holder

    def tracker(self, pid: int, start_time: int) -> Tracker | None:
        """The tracker of this very process at the last look."""
        for holder in self.found:
            tracker = holder.trackers.get(pid)
            if tracker is not None and tracker.record.start_time == start_time:
                return tracker
        return None

    def for_tree(self, pids: Collection[int]) -> Holder:
        """The holder of one of these processes; a new one if there is none. Raises ``DumpError``.

        It does not end before our descriptors are closed.
        """
        for holder in self.found:
            if not holder.trackers.keys().isdisjoint(pids):
                with suppress(DumpError):  # it has ended with its last process
                    self._starters.append(holder.keep())
                    return holder
        return self._start()

    def _start(self) -> Holder:
        """Starts a holder. It ends when we do, unless it has a tracker then."""
        receive, send = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        starter, ours = os.pipe()
        self._starters.append(ours)
        fds = (receive.fileno(), send.fileno(), starter)
        try:
            started = subprocess.run(
                [PROGRAM, *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=fds,
                cwd="/",
                env={},
                timeout=PATIENCE,
                check=True,
            )
            pid = int(started.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise DumpError(f"{PROGRAM}: can't be started, so writes can't be tracked: {error}") from None
        finally:
            receive.close()
            send.close()
            os.close(starter)
        self._seen.add(str(pid))
        return self._add(pid)


def _is_holder(name: str) -> bool:
    """Whether the process with this pid is a holder that our own user has started, and that we may trace."""
    try:
        with open(f"/proc/{name}/comm", "rb", buffering=0) as file:
            if file.read(64).rstrip(b"\n") != NAME.encode():
                return False
        with open(f"/proc/{name}/status") as file:
            users = proc.parse_fields(file.read())["Uid"].split()
        ours = os.readlink("/proc/self/ns/user")
        return set(users) == {str(os.geteuid())} and os.readlink(f"/proc/{name}/ns/user") == ours
    except OSError:
        return False
