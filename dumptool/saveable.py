"""What of a tree of processes dumptool's own images can't hold. Memory is checked by ``dumptool.survey``."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from dumptool import proc, survey
from dumptool.errors import Refusal, TaskGoneError, UnsupportedError
from dumptool.freeze import Process
from dumptool.survey import Task
from dumptool.tracee import Same, same

NAMESPACES = (
    "cgroup",
    "ipc",
    "mnt",
    "net",
    "pid",
    "pid_for_children",
    "time",
    "time_for_children",
    "user",
    "uts",
)

MEMORY_DEVICES = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9))
"""/dev/null, zero, full, random, urandom: devices without state, restored by name."""
TTY_MAJORS = frozenset({4, 5, *range(136, 144)})
"""Consoles, /dev/tty and /dev/console, pseudo-terminals (Documentation/admin-guide/devices.txt)."""
PTS_MAJORS = range(136, 144)

CRIU_SAVES = frozenset(
    {
        *(f"anon_inode:[{name}]" for name in ("eventfd", "eventpoll", "fanotify", "signalfd", "timerfd")),
        "anon_inode:inotify",
    }
)
"""Descriptors that dumptool does not save, but CRIU 4.1 and 4.2 do."""

SCHED_DEADLINE = 6
THREAD_CLOCKS = (3, -2)
"""CLOCK_THREAD_CPUTIME_ID, and its number in /proc/<pid>/timers, which does not show the thread."""

OWN_LOCKS = ("POSIX", "FLOCK", "OFDLCK")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user allows: ``shell_job``, session and terminal of processes outside of the tree; ``file_locks``."""

    shell_job: bool = False
    file_locks: bool = False


def check(
    processes: Sequence[Process], tasks: dict[int, Task], options: Options, *, frozen: bool = False
) -> None:
    """Raises ``UnsupportedError`` with everything that can't be saved, memory (``survey.memory_refusals``) included.

    ``frozen``: also checks what can be seen only of a thread in a ptrace stop. Processes that exit meanwhile are
    ignored, except the root: ``TaskGoneError``.
    """
    refusals = survey.memory_refusals(processes, tasks, frozen=frozen)
    pids = {one.pid for one in processes}
    for process in processes:
        try:
            refusals += _family(process, pids, options)
            if process.pid in tasks:
                refusals += _own(tasks[process.pid], options)
        except TaskGoneError:
            if process.ppid == 0:
                raise
    refusals += _pipes(tasks)
    refusals += _shared(list(tasks.values()))
    if refusals:
        raise UnsupportedError(sorted(set(refusals)))


def _own(task: Task, options: Options) -> list[Refusal]:
    return [*_process(task), *_files(task, options), *_mappings(task)]


def _family(process: Process, pids: Collection[int], options: Options) -> Iterator[Refusal]:
    if options.shell_job:
        return
    own = proc.stat(process.pid)
    for kind, leader in (("session", own.session), ("process group", own.pgrp)):
        if leader not in pids:
            yield Refusal(
                process.pid,
                "",
                f"is in {kind} {leader}, whose leader is not dumped with it: start it with `setsid`, "
                "or dump and restore it with --shell-job",
            )


def _process(task: Task) -> Iterator[Refusal]:
    pid = task.pid
    for tid, fields in survey.threads_of(task):
        if fields.get("Seccomp", "0") != "0":
            yield Refusal(pid, "", f"thread {tid} is under seccomp, which is not saved")
        if proc.stat(pid, tid).policy == SCHED_DEADLINE:
            yield Refusal(pid, "", f"thread {tid} has a deadline (SCHED_DEADLINE), which is not saved")
    if len(task.process.threads) > 1:
        for timer in proc.parse_timers(proc.read_text(pid, "timers")):
            if timer.clock in THREAD_CLOCKS:
                yield Refusal(
                    pid,
                    "",
                    f"timer {timer.ident} uses the CPU time of one of the threads, which is not saved",
                )
    for name in NAMESPACES:
        try:
            theirs, ours = proc.readlink(pid, f"ns/{name}"), os.readlink(f"/proc/self/ns/{name}")
        except FileNotFoundError:
            continue  # not a namespace of this kernel
        if theirs != ours:
            yield Refusal(pid, "", f"is in a namespace of its own ({theirs}): run dumptool inside of it")
    root = proc.stat_through(pid, "root")
    if not os.path.samestat(root, os.stat("/")):
        yield Refusal(pid, "", f"has another root directory (chroot): {proc.readlink(pid, 'root')}")
    for name in ("cwd", "exe"):
        link = proc.readlink(pid, name)
        if not _has_name(link, proc.stat_through(pid, name)):
            yield Refusal(pid, name, f"{link} can't be found under this name")


def _has_name(link: str, status: os.stat_result) -> bool:
    """Whether the name leads to this file."""
    try:
        return os.path.samestat(os.stat(link), status)
    except OSError:
        return False


def _files(task: Task, options: Options) -> Iterator[Refusal]:
    for file in task.files:
        where = f"fd {file.fd}"
        what = _unsupported(file, options)
        if what:
            yield Refusal(task.pid, where, what)
        for lock in file.info.locks:
            if lock.kind not in OWN_LOCKS or lock.mandatory:
                yield Refusal(task.pid, where, f"{lock.kind.lower()} lock on {file.link} is not saved")
            elif not options.file_locks:
                yield Refusal(task.pid, where, f"a lock is held on {file.link}: allow it with --file-locks")


def _unsupported(file: proc.OpenFile, options: Options) -> str | None:
    """The reason why a descriptor can't be saved; None if it can."""
    mode, link = file.status.st_mode, file.link
    if stat.S_ISSOCK(mode):
        return f"{link} is a socket; dumptool saves none, use `criu dump`"
    if link.startswith("/memfd:"):
        return f"{link} is a memfd, which is not saved; use `criu dump`"
    if link in CRIU_SAVES:
        return f"{link} is not saved; use `criu dump`"
    if not link.startswith("/") and not stat.S_ISFIFO(mode):
        return f"{link} is not saved"
    if stat.S_ISFIFO(mode):
        return None if link.startswith("pipe:") else f"{link} is a named pipe, which is not saved"
    if stat.S_ISCHR(mode):
        if os.major(file.status.st_rdev) in PTS_MAJORS:
            return None if options.shell_job else f"{link} is a terminal: allow it with --shell-job"
        if file.status.st_rdev not in MEMORY_DEVICES:
            return f"{link} is a device, which is not saved"
    elif stat.S_ISBLK(mode):
        return f"{link} is a block device, which is not saved"
    if not _has_name(link, file.status):
        return f"{link} can't be found under this name (deleted, renamed, or below a mount)"
    return None


def _mappings(task: Task) -> Iterator[Refusal]:
    reported = set()
    for vma in task.layout.vmas:
        what = unsupported_mapping(task.pid, vma, task.layout.flags[vma.start])
        if what and what not in reported:  # one mapping of each kind
            reported.add(what)
            yield Refusal(task.pid, f"mapping {vma.start:x}-{vma.end:x}", what)


def unsupported_mapping(pid: int, vma: proc.Vma, flags: frozenset[str]) -> str | None:
    """The reason why a mapping can't be saved; None if it can. ``flags``: VmFlags (proc_pid_smaps(5))."""
    if vma.name in ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"):
        return None
    for flag, what in (
        ("ht", "huge pages (hugetlb)"),
        ("ss", "a shadow stack"),
    ):
        if flag in flags:
            return f"has {what}, which is not saved"
    for prefix, what in (
        ("/memfd:", "a memfd"),
        ("/SYSV", "System V shared memory"),
        ("/[aio]", "an asynchronous-I/O ring"),
        ("anon_inode:", "a special mapping"),
        ("socket:", "a socket's mapping"),
        ("[uprobes]", "a uprobe's mapping"),
    ):
        if vma.name.startswith(prefix):
            return f"is {what} ({vma.name}), which is not saved"
    if {"io", "pf"} & flags or (vma.name.startswith("[") and "mm" in flags):
        return f"is a device's or special mapping ({vma.name or 'no name'}), which is not saved"
    if vma.inode and not survey.is_shared_anonymous(vma):
        status = proc.stat_through(pid, vma.link)
        if not (stat.S_ISREG(status.st_mode) or status.st_rdev in MEMORY_DEVICES):
            return f"maps {vma.name}, which is not a regular file"
        if not _has_name(mapped_name(pid, vma), status):
            return f"{vma.name} can't be found under this name (deleted, renamed, or below a mount)"
    return None


def mapped_name(pid: int, vma: proc.Vma) -> str:
    """The name of a mapped file. In maps it has escapes that can't be undone."""
    return proc.readlink(pid, vma.link)


def _pipes(tasks: dict[int, Task]) -> Iterator[Refusal]:
    """Pipes that processes outside of the tree have open, too."""
    held: dict[str, tuple[int, int]] = {}
    for task in tasks.values():
        for file in task.files:
            if file.link.startswith("pipe:"):
                held.setdefault(file.link, (task.pid, file.fd))
    if not held:
        return
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in tasks or int(entry) == os.getpid():
            continue
        try:
            links = {os.readlink(f"/proc/{entry}/fd/{fd}") for fd in os.listdir(f"/proc/{entry}/fd")}
        except OSError:
            continue
        shared = links & held.keys()
        if shared and _descends(int(entry), tasks):
            continue  # a child that was forked after the look
        for link in shared:
            pid, fd = held.pop(link)  # one descriptor of each pipe
            yield Refusal(
                pid, f"fd {fd}", f"{link} leads out of the tree, to pid {entry}; that end is not saved"
            )


def _descends(pid: int, tasks: Collection[int]) -> bool:
    """Whether a process descends from one of these."""
    try:
        while pid > 1 and pid not in tasks:
            pid = proc.stat(pid).ppid
    except TaskGoneError:
        return True  # exited: its descriptors are closed
    return pid in tasks


def _shared(tasks: Sequence[Task]) -> Iterator[Refusal]:
    """Resources that only threads should share but processes do, or that threads should share but do not."""
    for place, task in enumerate(tasks):
        for kind, what in ((Same.FILES, "descriptors"), (Same.FS, "working directory")):
            for tid in task.process.threads[1:]:
                try:
                    shared = same(task.pid, tid, kind)
                except TaskGoneError:
                    continue
                if not shared:
                    yield Refusal(task.pid, "", f"thread {tid} has {what} of its own, which is not saved")
        for other in tasks[:place]:
            for kind, what in (
                (Same.FILES, "descriptors"),
                (Same.FS, "working directory"),
                (Same.SIGHAND, "signal handlers"),
            ):
                try:
                    shared = same(task.pid, other.pid, kind)
                except TaskGoneError:
                    continue
                if shared:
                    yield Refusal(task.pid, "", f"shares its {what} with pid {other.pid}, which is not saved")
