"""Open files: files.img, fdinfo, pipes with their contents, terminals, locks (images_spec/files.md).

An entry of files.img is an open file description; any number of descriptors of any number of processes
refer to it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import termios
from dataclasses import dataclass, field

from dumptool import proc
from dumptool.saveable import PTS_MAJORS, mapped_name
from dumptool.survey import Task
from dumptool.tracee import Same, peek_pipe, same, take_fd
from images_spec.messages import (
    FdinfoEntry,
    FdType,
    FileEntry,
    FileLockEntry,
    FownEntry,
    LockKind,
    PipeDataEntry,
    PipeEntry,
    RegFileEntry,
    TermiosEntry,
    TtyFileEntry,
    TtyInfoEntry,
    TtyPtyEntry,
    TtyType,
    WinsizeEntry,
)

FD_CLOEXEC = 1
F_GETSIG = 11
F_GETOWN_EX = 16
TERMIOS = struct.Struct("<IIIIB19s")
"""struct termios, asm-generic/termbits.h."""
WINSIZE = struct.Struct("<HHHH")
LOCK_KINDS = {"POSIX": LockKind.LOCK_POSIX, "FLOCK": LockKind.LOCK_FLOCK, "OFDLCK": LockKind.LOCK_OFD}
LOCK_ACCESS = {"READ": 0, "WRITE": 1}
"""F_RDLCK and F_WRLCK: the same numbers in the kernel and in images."""
NO_ONE = FownEntry(uid=0, euid=0, signum=0, pid_type=0, pid=0)


@dataclass
class FileTable:
    """Collects the open files of all processes while they are frozen."""

    entries: list[FileEntry] = field(default_factory=list)
    pipes: list[tuple[PipeDataEntry, bytes]] = field(default_factory=list)
    locks: list[FileLockEntry] = field(default_factory=list)
    _opened: dict[tuple[object, ...], list[tuple[int, int, FileEntry]]] = field(default_factory=dict)
    _named: dict[tuple[str, int], int] = field(default_factory=dict)
    _seen_locks: set[tuple[object, ...]] = field(default_factory=set)
    _seen_pipes: set[int] = field(default_factory=set)
    _terminals: dict[int, TtyInfoEntry] = field(default_factory=dict)

    @property
    def terminals(self) -> list[TtyInfoEntry]:
        """Entries of tty-info.img."""
        return list(self._terminals.values())

    def add_named(self, name: str, status: os.stat_result, flags: int = os.O_RDONLY) -> int:
        """The id of a file that is known by name only: a mapped file, an executable, a directory."""
        key = (name, flags)
        if key not in self._named:
            self._named[key] = self._add_regular(name, status, flags, 0, NO_ONE).id
        return self._named[key]

    def add_mapped(self, pid: int, vma: proc.Vma, vm_flags: frozenset[str]) -> tuple[int, int]:
        """The id of a mapped file, and the O_* flags that the restore opens it with."""
        flags = os.O_RDWR if vma.shared and "mw" in vm_flags else os.O_RDONLY
        return self.add_named(mapped_name(pid, vma), proc.stat_through(pid, vma.link), flags), flags

    def add_link(self, pid: int, name: str) -> int:
        """The id of the target of ``/proc/<pid>/<name>``: exe, cwd or root."""
        return self.add_named(proc.readlink(pid, name), proc.stat_through(pid, name))

    def add_descriptors(self, task: Task) -> list[FdinfoEntry]:
        """The fdinfo entries of a process; adds its descriptions, locks and terminals to the tables."""
        found = []
        for file in task.files:
            entry = self._description(task.pid, file)
            cloexec = FD_CLOEXEC if file.info.flags & os.O_CLOEXEC else 0
            found.append(FdinfoEntry(id=entry.id, flags=cloexec, type=entry.type, fd=file.fd))
            self._add_locks(task.pid, file, entry.id)
        terminal = self._terminals.get(task.stat.tty)
        if terminal is not None:
            terminal.sid, terminal.pgrp = task.stat.session, task.stat.tty_pgrp
        return found

    def _description(self, pid: int, file: proc.OpenFile) -> FileEntry:
        flags = file.info.flags & ~os.O_CLOEXEC
        key = (file.link, file.status.st_dev, file.status.st_ino, flags, file.info.pos, file.info.mnt_id)
        known = self._opened.setdefault(key, [])
        for other_pid, other_fd, entry in known:
            if same(pid, other_pid, Same.FILE, file.fd, other_fd):
                return entry
        entry = self._new(pid, file, flags)
        known.append((pid, file.fd, entry))
        return entry

    def _new(self, pid: int, file: proc.OpenFile, flags: int) -> FileEntry:
        here = take_fd(pid, file.fd)
        try:
            owner = _owner(here)
            if stat.S_ISFIFO(file.status.st_mode):
                return self._add_pipe(here, file, flags, owner)
            if stat.S_ISCHR(file.status.st_mode) and os.major(file.status.st_rdev) in PTS_MAJORS:
                return self._add_terminal(here, file, flags, owner)
            return self._add_regular(file.link, file.status, flags, file.info.pos, owner)
        finally:
            os.close(here)

    def _append(self, entry: FileEntry) -> FileEntry:
        self.entries.append(entry)
        return entry

    def _next_id(self) -> int:
        return len(self.entries) + 1

    def _add_regular(
        self, name: str, status: os.stat_result, flags: int, pos: int, owner: FownEntry
    ) -> FileEntry:
        number = self._next_id()
        entry = RegFileEntry(
            id=number, flags=flags, pos=pos, fown=owner, name=os.fsencode(name), mode=status.st_mode
        )
        if stat.S_ISREG(status.st_mode):
            entry.size = status.st_size
        return self._append(FileEntry(type=FdType.FD_REG, id=number, reg=entry))

    def _add_pipe(self, here: int, file: proc.OpenFile, flags: int, owner: FownEntry) -> FileEntry:
        number, pipe_id = self._next_id(), file.status.st_ino
        if pipe_id not in self._seen_pipes:
            self._seen_pipes.add(pipe_id)
            self.pipes.append(_pipe_contents(pipe_id, here))
        entry = PipeEntry(id=number, pipe_id=pipe_id, flags=flags, fown=owner)
        return self._append(FileEntry(type=FdType.FD_PIPE, id=number, pipe=entry))

    def _add_terminal(self, here: int, file: proc.OpenFile, flags: int, owner: FownEntry) -> FileEntry:
        device = file.status.st_rdev
        if device not in self._terminals:
            self._terminals[device] = _terminal(len(self._terminals) + 1, here, file.status)
        regular = self._add_regular(file.link, file.status, flags, 0, NO_ONE)
        number = self._next_id()
        entry = TtyFileEntry(
            id=number, tty_info_id=self._terminals[device].id, flags=flags, fown=owner, regf_id=regular.id
        )
        return self._append(FileEntry(type=FdType.FD_TTY, id=number, tty=entry))

    def _add_locks(self, pid: int, file: proc.OpenFile, file_id: int) -> None:
        """Adds each lock once. POSIX locks belong to a process, all others to an open file description."""
        for lock in file.info.locks:
            if lock.kind == "POSIX" and lock.pid != pid:
                continue
            holder = (pid, lock.inode) if lock.kind == "POSIX" else (file_id,)
            key = (lock.kind, lock.access, lock.start, lock.end, *holder)
            if key not in self._seen_locks:
                self._seen_locks.add(key)
                self.locks.append(
                    FileLockEntry(
                        flag=LOCK_KINDS[lock.kind],
                        type=LOCK_ACCESS[lock.access],
                        pid=pid,
                        fd=file.fd,
                        start=lock.start,
                        len=0 if lock.end is None else lock.end - lock.start + 1,
                    )
                )


def _owner(here: int) -> FownEntry:
    """The receiver of SIGIO (fcntl(2), F_GETOWN_EX). The uids of the process that set it can't be read: root's."""
    kind, pid = struct.unpack("ii", fcntl.fcntl(here, F_GETOWN_EX, struct.pack("ii", 0, 0)))
    pid_types = {0: 0, 1: 1, 2: 2}  # F_OWNER_TID, _PID, _PGRP: PIDTYPE_PID, _TGID, _PGID
    if not pid:
        return NO_ONE
    return FownEntry(uid=0, euid=0, signum=fcntl.fcntl(here, F_GETSIG), pid_type=pid_types[kind], pid=pid)


def _pipe_contents(pipe_id: int, here: int) -> tuple[PipeDataEntry, bytes]:
    size = fcntl.fcntl(here, fcntl.F_GETPIPE_SZ)
    data = peek_pipe(here, size)
    return PipeDataEntry(pipe_id=pipe_id, bytes=len(data), size=size), data


def _terminal(number: int, here: int, status: os.stat_result) -> TtyInfoEntry:
    """The settings of a pseudo-terminal; ``add_descriptors`` fills in its session and process group."""
    iflag, oflag, cflag, lflag, line, chars = TERMIOS.unpack(
        fcntl.ioctl(here, termios.TCGETS, bytes(TERMIOS.size))
    )
    rows, columns, xpixel, ypixel = WINSIZE.unpack(fcntl.ioctl(here, termios.TIOCGWINSZ, bytes(WINSIZE.size)))
    return TtyInfoEntry(
        id=number,
        type=TtyType.TTY_PTY,
        locked=False,
        exclusive=False,
        packet_mode=False,
        sid=0,
        pgrp=0,
        rdev=status.st_rdev,
        termios=TermiosEntry(
            c_iflag=iflag,
            c_oflag=oflag,
            c_cflag=cflag,
            c_lflag=lflag,
            c_line=line,
            c_ispeed=0,
            c_ospeed=0,
            c_cc=_words(chars),
        ),
        termios_locked=TermiosEntry(
            c_iflag=0, c_oflag=0, c_cflag=0, c_lflag=0, c_line=0, c_ispeed=0, c_ospeed=0, c_cc=_words(b"")
        ),
        winsize=WinsizeEntry(ws_row=rows, ws_col=columns, ws_xpixel=xpixel, ws_ypixel=ypixel),
        pty=TtyPtyEntry(index=os.minor(status.st_rdev)),
        dev=status.st_dev,
        uid=status.st_uid,
        gid=status.st_gid,
    )


def _words(chars: bytes) -> tuple[int, ...]:
    """Control characters in CRIU's layout (observed): 19 words, each with one character in its lowest byte."""
    return struct.unpack("<19I", chars.ljust(19 * 4, b"\0"))
