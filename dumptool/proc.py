"""Parsers for /proc files of a process, and thin readers around them.

Formats: proc_pid_stat(5), proc_pid_status(5), proc_pid_maps(5), proc_pid_smaps(5), proc_pid_fdinfo(5),
proc_pid_limits(5). Every reader raises ``TaskGoneError`` if the process does not exist any more.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from dumptool.errors import DumpError, TaskGoneError

T = TypeVar("T")

RLIMITS = (
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
)
"""The names in /proc/<pid>/limits, in the order of the RLIMIT_* numbers (getrlimit(2))."""
RLIM_INFINITY = (1 << 64) - 1


def _gone(pid: int) -> TaskGoneError:
    return TaskGoneError(f"pid {pid}: no such process (any more)")


def _attempt(pid: int, what: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except (FileNotFoundError, ProcessLookupError):
        raise _gone(pid) from None
    except OSError as error:
        raise DumpError(f"/proc/{pid}/{what}: {error.strerror}") from None


def read(pid: int, name: str) -> bytes:
    """The contents of ``/proc/<pid>/<name>``."""

    def action() -> bytes:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.readall()

    return _attempt(pid, name, action)


def read_text(pid: int, name: str) -> str:
    """As ``read``, decoded: ASCII except for names, whose undecodable bytes become surrogates."""
    return read(pid, name).decode("utf-8", "surrogateescape")


def readlink(pid: int, name: str) -> str:
    """The target of the link ``/proc/<pid>/<name>``."""
    return _attempt(pid, name, lambda: os.readlink(f"/proc/{pid}/{name}"))


def stat_through(pid: int, name: str) -> os.stat_result:
    """``stat`` of the file behind the magic link ``/proc/<pid>/<name>``, even if it was renamed or deleted."""
    return _attempt(pid, name, lambda: os.stat(f"/proc/{pid}/{name}"))


def threads(pid: int) -> list[int]:
    """Thread ids, the leader's first."""
    names = _attempt(pid, "task", lambda: os.listdir(f"/proc/{pid}/task"))
    return sorted(map(int, names), key=lambda tid: (tid != pid, tid))


def children(pid: int, tid: int) -> list[int]:
    """Processes whose parent is this thread, zombies included (CONFIG_PROC_CHILDREN)."""
    return [int(word) for word in read_text(pid, f"task/{tid}/children").split()]


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/<pid>/stat, with the addresses that only a tracer sees. ``exit_code``: in the format of wait(2)."""

    comm: bytes
    state: str
    ppid: int
    pgrp: int
    session: int
    tty: int
    tty_pgrp: int
    flags: int
    nice: int
    start_time: int
    start_code: int
    end_code: int
    start_stack: int
    rt_priority: int
    policy: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int


def parse_stat(data: bytes) -> Stat:
    """Parses /proc/<pid>/stat. The name in it may contain spaces and parentheses."""
    head, _, tail = data.rpartition(b")")
    words = tail.split()

    def number(field_number: int) -> int:
        return int(words[field_number - 3])

    return Stat(
        comm=head.partition(b"(")[2],
        state=words[0].decode(),
        ppid=number(4),
        pgrp=number(5),
        session=number(6),
        tty=number(7),
        tty_pgrp=number(8),
        flags=number(9),
        nice=number(19),
        start_time=number(22),
        start_code=number(26),
        end_code=number(27),
        start_stack=number(28),
        rt_priority=number(40),
        policy=number(41),
        start_data=number(45),
        end_data=number(46),
        start_brk=number(47),
        arg_start=number(48),
        arg_end=number(49),
        env_start=number(50),
        env_end=number(51),
        exit_code=number(52),
    )


def stat(pid: int, tid: int | None = None) -> Stat:
    """Of a process, or of one of its threads."""
    return parse_stat(read(pid, "stat" if tid is None else f"task/{tid}/stat"))


def parse_fields(text: str) -> dict[str, str]:
    """``Name:\tvalue`` lines, as in status and fdinfo. Of a repeated name the first value counts."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name, value.strip())
    return fields


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/<pid>/status of a process or of one of its threads."""
    return parse_fields(read_text(pid, "status" if tid is None else f"task/{tid}/status"))


def is_pending(pid: int, signal: int) -> bool:
    """Whether the signal is pending for the process, not for one thread (proc_pid_status(5), ShdPnd)."""
    return bool(int(status(pid)["ShdPnd"], 16) & 1 << signal - 1)


def parse_limits(text: str) -> list[tuple[int, int]]:
    """(soft, hard) limits, in the order of the RLIMIT_* numbers."""

    def value(word: str) -> int:
        return RLIM_INFINITY if word == "unlimited" else int(word)

    limits = []
    for name in RLIMITS:
        found = re.search(rf"^{name} +(\w+) +(\w+)", text, re.MULTILINE)
        if not found:
            raise DumpError(f"/proc/<pid>/limits lacks {name!r}")
        limits.append((value(found[1]), value(found[2])))
    return limits


@dataclass(frozen=True, slots=True)
class Vma:
    """A line of maps. ``name``: unescaped. ``device``: comparable with ``st_dev``. ``pgoff``: in bytes."""

    start: int
    end: int
    perms: str
    pgoff: int
    device: int
    inode: int
    name: str

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def prot(self) -> int:
        """PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4."""
        return sum(bit for bit, letter in ((1, "r"), (2, "w"), (4, "x")) if letter in self.perms)

    @property
    def link(self) -> str:
        """The magic link to the mapped file, below /proc/<pid>."""
        return f"map_files/{self.start:x}-{self.end:x}"


def parse_maps_line(line: str) -> Vma:
    """Parses a line of maps, or the first line of an entry of smaps."""
    span, perms, pgoff, device, inode, *name = line.split(None, 5)
    start, end = span.split("-")
    major, minor = device.split(":")
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        perms=perms,
        pgoff=int(pgoff, 16),
        device=os.makedev(int(major, 16), int(minor, 16)),
        inode=int(inode),
        name=name[0].rstrip("\n").replace("\\012", "\n") if name else "",
    )


def parse_maps(text: str) -> list[Vma]:
    """Parses /proc/<pid>/maps."""
    return [parse_maps_line(line) for line in text.split("\n") if line]


VM_FLAGS = "\nVmFlags:"


def parse_smaps_flags(text: str) -> dict[int, frozenset[str]]:
    """The VmFlags in /proc/<pid>/smaps, by start address. They are the last line of each entry (fs/proc/task_mmu.c)."""
    entry, *others = text.split(VM_FLAGS)  # not line by line: a server has thousands of mappings in all
    flags: dict[int, frozenset[str]] = {}
    for other in others:
        words, _, following = other.partition("\n")
        flags[int(entry[: entry.index("-")], 16)] = frozenset(words.split())
        entry = following
    return flags


@dataclass(frozen=True, slots=True)
class Layout:
    """The mappings of a process with their VmFlags, by start address.

    ``maps`` is the text that ``vmas`` was made from: an equal text later means an equal layout.
    """

    maps: str
    vmas: tuple[Vma, ...]
    flags: dict[int, frozenset[str]]
    locked: str


def layout(pid: int, before: Layout | None = None) -> Layout:
    """Reads the mappings. An unchanged ``before`` is returned: that saves smaps, for which the kernel walks all pages.

    mlock changes VmFlags without changing maps, but it changes VmLck in status.
    """
    maps, locked = read_text(pid, "maps"), status(pid).get("VmLck", "")
    if before is not None and (before.maps, before.locked) == (maps, locked):
        return before
    while True:
        flags = parse_smaps_flags(read_text(pid, "smaps"))
        vmas = tuple(parse_maps(maps))
        if all(vma.start in flags for vma in vmas):
            return Layout(maps, vmas, flags, locked)
        maps = read_text(pid, "maps")  # changed between the two reads


@dataclass(frozen=True, slots=True)
class Lock:
    """A file lock as fdinfo shows it. ``kind``: POSIX, FLOCK, OFDLCK, LEASE, ... ``end``: None for EOF."""

    kind: str
    mandatory: bool
    access: str
    pid: int
    inode: str
    start: int
    end: int | None


@dataclass(frozen=True, slots=True)
class FdInfo:
    """/proc/<pid>/fdinfo/<fd>. ``flags``: O_* with O_CLOEXEC. ``other``: fields of its kind of file."""

    pos: int
    flags: int
    mnt_id: int
    locks: tuple[Lock, ...] = ()
    other: dict[str, str] = field(default_factory=dict)


def parse_fdinfo(text: str) -> FdInfo:
    """Parses a file of /proc/<pid>/fdinfo."""
    fields = parse_fields(text)
    locks = []
    for line in text.splitlines():
        if line.startswith("lock:"):
            _, _, kind, mode, access, pid, inode, start, end = line.split()[:9]
            locks.append(
                Lock(
                    kind=kind,
                    mandatory=mode == "MANDATORY",
                    access=access,
                    pid=int(pid),
                    inode=inode,
                    start=int(start),
                    end=None if end == "EOF" else int(end),
                )
            )
    other = {name: value for name, value in fields.items() if name not in ("pos", "flags", "mnt_id", "lock")}
    return FdInfo(int(fields["pos"]), int(fields["flags"], 8), int(fields["mnt_id"]), tuple(locks), other)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor: the target of its link, the file's status, and its fdinfo."""

    fd: int
    link: str
    status: os.stat_result
    info: FdInfo


def open_files(pid: int, only: Collection[str] | None = None) -> Iterator[OpenFile]:
    """All descriptors in ascending order, except those that the process closes meanwhile.

    ``only``: those with one of these links; all others cost one call each.
    """
    names = _attempt(pid, "fd", lambda: os.listdir(f"/proc/{pid}/fd"))
    for fd in sorted(map(int, names)):
        try:
            link = readlink(pid, f"fd/{fd}")
            if only is None or link in only:
                status_ = stat_through(pid, f"fd/{fd}")
                yield OpenFile(fd, link, status_, parse_fdinfo(read_text(pid, f"fdinfo/{fd}")))
        except TaskGoneError:
            if not os.path.exists(f"/proc/{pid}"):
                raise


@dataclass(frozen=True, slots=True)
class PosixTimer:
    """A timer of timer_create, from /proc/<pid>/timers. ``notify``: SIGEV_*. ``value``: sival_ptr."""

    ident: int
    signal: int
    value: int
    notify: int
    thread: int | None
    clock: int


def parse_timers(text: str) -> list[PosixTimer]:
    """Parses /proc/<pid>/timers. ``PosixTimer.thread``: the target of SIGEV_THREAD_ID."""
    kinds = {"signal": 0, "none": 1, "thread": 2}
    timers = []
    for part in re.split(r"^(?=ID:)", text, flags=re.MULTILINE)[1:]:
        fields = parse_fields(part)
        signal, _, value = fields["signal"].partition("/")
        kind, _, target = fields["notify"].partition("/")
        target_kind, _, number = target.partition(".")
        notify = kinds[kind] | (4 if target_kind == "tid" else 0)
        timers.append(
            PosixTimer(
                ident=int(fields["ID"]),
                signal=int(signal),
                value=int(value, 16),
                notify=notify,
                thread=int(number) if target_kind == "tid" else None,
                clock=int(fields["ClockID"]),
            )
        )
    return timers


def exists(pid: int) -> bool:
    """Whether the process exists (a zombie does)."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True
