"""Open files: the restorer opens each once, then gives it to the tasks."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from images_spec.errors import ImageError
from images_spec.images import Kind
from images_spec.messages import FdType, FileEntry, FownEntry, PipeEntry, RegFileEntry, TtyFileEntry, TtyType
from lazypages.restore.dump import Alive, Dump
from lazypages.restore.errors import RestoreError
from lazypages.restore.machine import Machine
from lazypages.restore.plan import Plan
from lazypages.restore.syscalls import TCSETS, TIOCSPGRP, Nr

_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC | os.O_ASYNC
"""O_* flags with a meaning for open only. O_ASYNC is the opposite: it is set by F_SETFL only."""

NAMES: Mapping[int, str] = {
    FdType.FD_FIFO: "a named pipe",
    FdType.FD_INETSK: "an internet socket",
    FdType.FD_UNIXSK: "a unix socket",
    FdType.FD_EVENTFD: "an eventfd",
    FdType.FD_EVENTPOLL: "an epoll descriptor",
    FdType.FD_INOTIFY: "an inotify descriptor",
    FdType.FD_SIGNALFD: "a signalfd",
    FdType.FD_PACKETSK: "a packet socket",
    FdType.FD_FANOTIFY: "a fanotify descriptor",
    FdType.FD_NETLINKSK: "a netlink socket",
    FdType.FD_NS: "a namespace",
    FdType.FD_TUNF: "a tun device",
    FdType.FD_EXT: "an external file",
    FdType.FD_TIMERFD: "a timerfd",
    FdType.FD_MEMFD: "a memfd",
    FdType.FD_BPFMAP: "a BPF map",
    FdType.FD_PIDFD: "a pidfd",
}


def text(name: bytes) -> str:
    """A path as a string, for messages and system calls."""
    return os.fsdecode(name)


class Files:
    """Slots for the files of a dump, each created on first use.

    Raises ``RestoreError`` for a file that can't be opened as it was.
    """

    def __init__(self, dump: Dump, plan: Plan, machine: Machine, *, shell_job: bool) -> None:
        self._dump, self._plan, self._machine = dump, plan, machine
        self._shell_job = shell_job
        self._descriptions: dict[int, int] = {}
        self._mapped: dict[tuple[int, int], int] = {}
        self._pipes: dict[int, tuple[int, int]] = {}
        self._pages: dict[Path, int] = {}

    def description(self, ident: int, subject: str) -> int:
        """The slot of an open file description, shared by all its descriptors. ``subject``: for messages."""
        if ident not in self._descriptions:
            self._descriptions[ident] = self._open(self._dump.file(ident, subject), subject)
        return self._descriptions[ident]

    def mapped(self, ident: int, access: int, subject: str) -> int:
        """The slot of a mapped file or an executable. ``access``: O_RDONLY or O_RDWR."""
        key = (ident, access)
        if key not in self._mapped:
            entry = self._regular(ident, subject)
            name = text(entry.name)
            self._mapped[key] = self._plan.open(entry.name, access, 0, f"open {name} for mapping")
        return self._mapped[key]

    def path(self, ident: int, subject: str) -> str:
        """The name of a file or directory, which must exist."""
        return text(self._regular(ident, subject).name)

    def pages(self, path: Path) -> int:
        """The slot of a pages file."""
        if path not in self._pages:
            self._pages[path] = self._plan.open(os.fsencode(path), os.O_RDONLY, 0, f"open {path}")
        return self._pages[path]

    def close_pipes(self) -> None:
        """Closes both ends of each pipe in the restorer; the tasks have their own descriptors by then."""
        for ends in self._pipes.values():
            for slot in ends:
                self._plan.close(slot)

    def _regular(self, ident: int, subject: str) -> RegFileEntry:
        entry = self._dump.file(ident, subject)
        if entry.type != FdType.FD_REG or not entry.HasField("reg"):
            raise RestoreError(f"{subject}: is {_type_name(entry)}, which can't be restored")
        check_regular(entry.reg, ident in self._dump.deleted, subject)
        return entry.reg

    def _open(self, entry: FileEntry, subject: str) -> int:
        if entry.type == FdType.FD_REG:
            reg = self._regular(entry.id, subject)
            _check_owner(reg.fown, subject)
            position = reg.pos if not reg.flags & os.O_PATH else 0
            return self._plan.open(
                reg.name, reg.flags & ~_ONCE, position, f"open {text(reg.name)} ({subject})"
            )
        if entry.type == FdType.FD_PIPE and entry.HasField("pipe"):
            _check_owner(entry.pipe.fown, subject)
            return self._open_pipe(entry, subject)
        if entry.type == FdType.FD_TTY and entry.HasField("tty"):
            _check_owner(entry.tty.fown, subject)
            return self._open_terminal(entry, subject)
        raise RestoreError(f"{subject}: is {_type_name(entry)}, which can't be restored")

    def _open_pipe(self, entry: FileEntry, subject: str) -> int:
        ident, flags = entry.pipe.pipe_id, entry.pipe.flags
        if ident not in self._pipes:
            head, contents = self._dump.pipes.get(ident, (None, b""))
            capacity = head.size if head is not None and head.HasField("size") else 0
            label = f"make pipe {ident} ({subject}) of {capacity} bytes with {len(contents)} in it"
            self._pipes[ident] = self._plan.pipe(capacity, contents, label)
        reader, writer = self._pipes[ident]
        end = reader if flags & os.O_ACCMODE == os.O_RDONLY else writer
        return self._plan.reopen(end, flags & ~_ONCE, f"open an end of pipe {ident} ({subject})")

    def _open_terminal(self, entry: FileEntry, subject: str) -> int:
        if not self._shell_job:
            raise RestoreError(f"{subject}: is a terminal: restore it with --shell-job, from a terminal")
        if self._machine.terminal is None:
            raise RestoreError(
                f"{subject}: is a terminal, but none of standard input, output and error is one here"
            )
        path = f"/proc/self/fd/{self._machine.terminal}"
        info = self._dump.ttys.get(entry.tty.tty_info_id)
        if info is not None and info.type == TtyType.TTY_CTTY:
            path = "/dev/tty"
        return self._plan.open(path.encode(), entry.tty.flags & ~_ONCE, 0, f"open the terminal ({subject})")


def _type_name(entry: FileEntry) -> str:
    return NAMES.get(entry.type, f"of type {entry.type}")


def _check_owner(owner: FownEntry, subject: str) -> None:
    if owner.pid and (owner.uid, owner.euid) != (os.getuid(), os.geteuid()):
        raise RestoreError(
            f"{subject}: sends signals to task {owner.pid} in the name of user {owner.uid} (F_SETOWN), "
            "which can't be restored"
        )


def _description(file: FileEntry) -> PipeEntry | TtyFileEntry | RegFileEntry:
    if file.type == FdType.FD_PIPE:
        return file.pipe
    return file.tty if file.type == FdType.FD_TTY else file.reg


def set_owners(plan: Plan, dump: Dump, thread: int, alive: Alive) -> None:
    """Sets the receivers of SIGIO, or of another signal, of open files (fcntl(2)). All threads must exist."""
    for entry in alive.fds:
        description = _description(dump.files[entry.id])
        owner, flags = description.fown, description.flags
        if owner.pid:
            record = struct.pack("<ii", owner.pid_type, owner.pid)
            label = f"have fd {entry.fd} send signals to {owner.pid}"
            plan.call(thread, label, Nr.FCNTL, entry.fd, F_SETOWN_EX, plan.data, data=record)
        if owner.signum:
            label = f"have fd {entry.fd} send signal {owner.signum}"
            plan.call(thread, label, Nr.FCNTL, entry.fd, F_SETSIG, owner.signum)
        if flags & os.O_ASYNC:
            label = f"have fd {entry.fd} send signals"
            plan.call(thread, label, Nr.FCNTL, entry.fd, F_SETFL, flags)


def check_regular(entry: RegFileEntry, deleted: bool, subject: str) -> None:
    """Raises ``RestoreError`` if a file does not exist or has changed since the dump."""
    name = text(entry.name)
    if deleted:
        raise RestoreError(f"{subject}: {name} was deleted while it was in use, which can't be restored")
    try:
        status = os.stat(entry.name)
    except OSError as error:
        raise RestoreError(
            f"{subject}: {name}: {error.strerror}: restore the file as it was when dumped"
        ) from None
    if entry.HasField("mode") and status.st_mode != entry.mode:
        raise RestoreError(
            f"{subject}: {name}: mode is {status.st_mode:#o}, but was {entry.mode:#o} when dumped"
        )
    if entry.HasField("size") and stat.S_ISREG(status.st_mode) and status.st_size != entry.size:
        raise RestoreError(
            f"{subject}: {name}: has {status.st_size} bytes, but had {entry.size} when dumped: "
            "restore the file as it was"
        )


def give_files(plan: Plan, files: Files, thread: int, pid: int, alive: Alive, *, link_fd: int) -> None:
    """Sets up all descriptors of a task, in ascending order, and its working directory, root and umask."""
    for entry in sorted(alive.fds, key=lambda entry: entry.fd):
        subject = f"task {pid}, fd {entry.fd}"
        slot = files.description(entry.id, subject)
        plan.give(thread, slot, entry.fd, bool(entry.flags & 1), f"set up fd {entry.fd}")
    cwd = files.path(alive.fs.cwd_id, f"task {pid}, working directory")
    root = files.path(alive.fs.root_id, f"task {pid}, root directory")
    if root != "/":
        raise RestoreError(f"task {pid}: root directory {root} can't be restored, only /")
    plan.call(thread, f"change to {cwd}", Nr.CHDIR, plan.data, data=os.fsencode(cwd) + b"\0")
    plan.call(thread, "set the umask", Nr.UMASK, alive.fs.umask)
    plan.call(thread, "close the link to the restorer", Nr.CLOSE, link_fd)


def check_descriptors(dump: Dump, pid: int, alive: Alive) -> None:
    """Raises ``ImageError`` if a descriptor occurs twice."""
    fds = [entry.fd for entry in alive.fds]
    if len(set(fds)) != len(fds):
        raise ImageError(dump.path(Kind.FDINFO, alive.ids.files_id), f"task {pid} has a descriptor twice")


F_SETFL, F_SETSIG, F_SETOWN_EX = 4, 10, 15

FL_POSIX, FL_FLOCK, FL_OFD = 1, 2, 1024
"""Values of FileLockEntry.flag."""

LOCK_COMMANDS = {FL_POSIX: 6, FL_OFD: 37}
"""F_SETLK, F_OFD_SETLK."""

LOCK_SH, LOCK_EX, LOCK_NB = 1, 2, 4


def check_locks(dump: Dump, pid: int) -> None:
    """Raises ``RestoreError`` for locks of a task that can't be acquired again."""
    for lock in dump.locks:
        if lock.pid == pid and (lock.flag not in (FL_POSIX, FL_FLOCK, FL_OFD) or lock.type not in (0, 1)):
            raise RestoreError(f"task {pid}, fd {lock.fd}: a lock of kind {lock.flag} can't be restored")


def take_locks(plan: Plan, dump: Dump, thread: int, pid: int) -> None:
    """Acquires locks. Only when all descriptors are set up: closing a descriptor releases the task's locks on the file
    (fcntl(2))."""
    for lock in dump.locks:
        if lock.pid != pid:
            continue
        label = f"lock fd {lock.fd} again (does another process hold the lock now?)"
        if lock.flag == FL_FLOCK:
            how = LOCK_EX if lock.type else LOCK_SH
            plan.call(thread, label, Nr.FLOCK, lock.fd, how | LOCK_NB)
        else:
            record = struct.pack("<hhxxxxqqixxxx", lock.type, os.SEEK_SET, lock.start, lock.len, 0)
            plan.call(thread, label, Nr.FCNTL, lock.fd, LOCK_COMMANDS[lock.flag], plan.data, data=record)


def set_up_terminals(plan: Plan, dump: Dump, machine: Machine, threads: Mapping[int, int]) -> None:
    """Restores the settings of the terminals and their foreground process groups. ``threads``: leaders by pid.

    All signals are blocked, so that a process in the background is not stopped for this (tcsetattr(3)).
    """
    done: set[int] = set()
    for process in dump.processes:
        for entry in process.alive.fds if process.alive else ():
            file = dump.files[entry.id]
            if file.type != FdType.FD_TTY or file.tty.tty_info_id in done:
                continue
            done.add(file.tty.tty_info_id)
            info = dump.ttys.get(file.tty.tty_info_id)
            if info is None:
                continue
            thread = threads[process.pid]
            if info.HasField("termios"):
                term = info.termios
                characters = bytes(value & 0xFF for value in term.c_cc)[:19].ljust(19, b"\0")
                modes = (term.c_iflag, term.c_oflag, term.c_cflag, term.c_lflag, term.c_line & 0xFF)
                record = struct.pack("<4IB", *modes) + characters
                label = "set the terminal's modes"
                plan.call(thread, label, Nr.IOCTL, entry.fd, TCSETS, plan.data, data=record)
            if info.pgrp in threads and machine.controls_terminal:
                record = struct.pack("<i", info.pgrp)
                label = f"put process group {info.pgrp} into the terminal's foreground"
                plan.call(thread, label, Nr.IOCTL, entry.fd, TIOCSPGRP, plan.data, data=record)
