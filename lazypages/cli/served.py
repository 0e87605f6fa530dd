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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Seconds between two looks at the tasks, at least.
PAUSE = 0.02

#: A look takes one of so many parts of the time: smaps counts all pages of a task.
LOOK_SHARE = 5

#: Seconds for which the tasks are traced, and then are not: a daemon that polls notices a new tracer only.
TURN = 0.5

UFFD_LINK = "anon_inode:[userfaultfd]"

#: linux/ptrace.h, linux/wait.h
PTRACE_CONT, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_LISTEN = 7, 17, 0x4206, 0x4207, 0x4208
PTRACE_EVENT_STOP = 128
WALL = 0x4000_0000


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
    Path("/proc/self/comm").write_text("criu-shim")  # the daemon's log names who traces a task
    while left:
        with _traced(left) as pass_signals_on:
            end = time.monotonic() + TURN
            while left and time.monotonic() < end:
                began = time.monotonic()
                left = incomplete(root)
                next_look = began + LOOK_SHARE * (time.monotonic() - began)
                while True:
                    time.sleep(PAUSE)
                    pass_signals_on()
                    if time.monotonic() >= next_look:
                        break
        if left:
            time.sleep(PAUSE)


@contextmanager
def _traced(pids: list[int]) -> Iterator[Callable[[], None]]:
    """Trace those of the processes that nobody traces. Call what it yields often: it passes their signals on."""
    traced = {pid for pid in pids if _ptrace(PTRACE_SEIZE, pid) == 0}

    def pass_signals_on() -> None:
        for pid in tuple(traced):
            try:
                found, status = os.waitpid(pid, os.WNOHANG | WALL)
            except ChildProcessError:
                found, status = pid, 0
            if found and not os.WIFSTOPPED(status):
                traced.remove(pid)
            elif found:
                _go_on(pid, status)

    try:
        yield pass_signals_on
    finally:
        for pid in traced:
            _let_go(pid)


def _go_on(pid: int, status: int) -> None:
    """Resume a thread from a stop that only its tracer sees; one that SIGSTOP or its like has stopped stays stopped."""
    number = os.WSTOPSIG(status)
    if status >> 16 != PTRACE_EVENT_STOP:
        _ptrace(PTRACE_CONT, pid, number)
    elif number in {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}:
        _ptrace(PTRACE_LISTEN, pid)
    else:
        _ptrace(PTRACE_CONT, pid)


def _let_go(pid: int) -> None:
    _ptrace(PTRACE_INTERRUPT, pid)
    with suppress(ChildProcessError):
        _, status = os.waitpid(pid, WALL)
        if os.WIFSTOPPED(status):
            on_its_way = status >> 16 != PTRACE_EVENT_STOP
            _ptrace(PTRACE_DETACH, pid, os.WSTOPSIG(status) if on_its_way else 0)


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


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in _threads(pid):
        with suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found
