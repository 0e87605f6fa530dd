"""Waits until the memory of restored tasks is complete, seen from outside: before ``criu dump`` (docs/criu-shim.md).

A task is incomplete while a mapping of it is registered for missing pages ("um" in its smaps, proc_pid_smaps(5)): the
daemon closes its userfaultfd, which unregisters all, when nothing is missing any more. This does not depend on which
daemon it is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: Seconds between two looks at the tasks, at least.
PAUSE = 0.02

#: A look takes one of so many parts of the time: smaps counts all pages of a task.
LOOK_SHARE = 5

#: Seconds for which one process traces the tasks; then another one does: a daemon that polls notices a new tracer only.
TURN = 0.5

#: Seconds for which the tracer may take to end when it is asked to, and between two looks whether it has.
PATIENCE, SHORT_PAUSE = 5, 0.002

UFFD_LINK = "anon_inode:[userfaultfd]"

#: linux/ptrace.h; linux/wait.h: __WALL
PTRACE_CONT, PTRACE_SEIZE, PTRACE_LISTEN = 7, 0x4206, 0x4208
PTRACE_EVENT_STOP = 128
WALL = 0x4000_0000

#: linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def incomplete(root: int) -> list[int]:
    """The processes of the tree of `root` that miss memory.

    A process that has a userfaultfd of its own is none: it may have registered the memory itself, and CRIU refuses it.
    """
    found = []
    todo = [root]
    while todo:
        pid = todo.pop()
        # In this order: a child that is forked by a complete process is complete.
        if _is_registered(pid) and not _has_userfaultfd(pid):
            found.append(pid)
        todo += _children(pid)
    return found


def wait_until_complete(root: int, say: Callable[[str], None]) -> None:
    """Return when no process of the tree misses memory.

    The daemon brings at once what a task misses that is traced (docs/criu.md), also with --no-background: so they are
    traced meanwhile, but not stopped.
    """
    left = incomplete(root)
    if not left:
        return
    say(
        f"waiting: process {', '.join(map(str, left))} was restored lazily and misses memory: "
        "a dump that is made now would lack it"
    )
    while left:
        tracer = _start(left)
        try:
            while left and not _has_ended(tracer):
                began = time.monotonic()
                left = incomplete(root)
                time.sleep(max(PAUSE, LOOK_SHARE * (time.monotonic() - began)))
        finally:
            _end(tracer)


def _start(pids: list[int]) -> int:
    """Trace the processes for one turn, in a child process: its pid.

    They are not stopped to detach them: that takes for ever while one can't stop, as after vfork(2) or in a frozen
    cgroup. When a tracer ends, the kernel detaches its tasks without a stop (docs/kernel.md). A signal would be lost
    if it ended between a stop and its continuation: so all signals are blocked there.
    """
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return child
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_NAME, b"criu-shim", 0, 0, 0)  # the daemon's log names who traces a task
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, no stop would be reported
        if os.getppid() == parent:
            _trace(pids)
    finally:
        os._exit(0)


def _has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == child
    except ChildProcessError:
        return True


def _end(child: int) -> None:
    """The daemon may have stopped it, or it waits for a task that executes a program: then it is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if _has_ended(child):
                return
            os.kill(child, number)
            time.sleep(SHORT_PAUSE)


def _trace(pids: list[int]) -> None:
    """Trace those of the processes that nobody traces, and pass their signals on, until SIGTERM or the turn is over."""
    end = time.monotonic() + TURN
    traced = {thread for pid in pids for thread in _living(pid)[:1] if _ptrace(PTRACE_SEIZE, thread) == 0}
    while (left := end - time.monotonic()) > 0:
        _pass_signals_on(traced)
        info = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, left)
        if info is not None and info.si_signo == signal.SIGTERM:
            return


def _pass_signals_on(traced: set[int]) -> None:
    """Until none is stopped: one SIGCHLD may stand for several stops."""
    stopped = True
    while stopped:
        stopped = False
        for thread in tuple(traced):
            try:
                found, status = os.waitpid(thread, os.WNOHANG | WALL)
            except ChildProcessError:
                found, status = thread, 0
            if found and not os.WIFSTOPPED(status):
                traced.remove(thread)
            elif found:
                stopped = True
                _go_on(thread, status)


def _go_on(pid: int, status: int) -> None:
    """Resume a thread from a stop that only its tracer sees; one that SIGSTOP or its like has stopped stays stopped."""
    number = os.WSTOPSIG(status)
    if status >> 16 != PTRACE_EVENT_STOP:
        _ptrace(PTRACE_CONT, pid, number)
    elif number in {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}:
        _ptrace(PTRACE_LISTEN, pid)
    else:
        _ptrace(PTRACE_CONT, pid)


def _ptrace(request: int, pid: int, data: int = 0) -> int:
    libc = ctypes.CDLL(None)
    libc.ptrace.restype = ctypes.c_long
    return int(libc.ptrace(request, pid, None, ctypes.c_void_p(data)))


def _is_registered(pid: int) -> bool:
    """Of any of its threads that has not exited: one that has exited has no memory to look at."""
    for thread in _threads(pid):
        try:
            smaps = Path(f"/proc/{pid}/task/{thread}/smaps").read_bytes()
        except OSError:
            continue
        if smaps:
            flags = (line.split() for line in smaps.splitlines() if line.startswith(b"VmFlags:"))
            return any(b"um" in line for line in flags)
    return False


def _has_userfaultfd(pid: int) -> bool:
    for thread in _threads(pid):
        with suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/task/{thread}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{pid}/task/{thread}/fd/{name}") == UFFD_LINK:
                        return True
    return False


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _living(pid: int) -> list[int]:
    """Its threads that have not exited, the first one first: one that has exited can't be traced."""
    found = []
    for thread in sorted(map(int, _threads(pid)), key=lambda thread: thread != pid):
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/task/{thread}/stat").read_bytes()
            if stat.rpartition(b")")[2].split()[0] not in {b"Z", b"X"}:
                found.append(thread)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in _threads(pid):
        with suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found
