"""Stop a whole tree of processes, and let it go on again.

Threads are seized (PTRACE_SEIZE): when we die, however we die, the kernel lets them all go on (ptrace(2)). Where
that must not be, because what they are goes on elsewhere (``FrozenTree.hold``), SIGSTOP is sent to each process:
nobody takes it while all threads are in ptrace stops, but a thread that comes out of one does before it is back
in user mode, and stops its whole process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from dumptool import identity, proc, tracee
from dumptool.errors import DumpError, TaskGoneError


@dataclass(slots=True)
class Process:
    """A process of the tree. ``threads``: the leader's id first. ``ppid``: 0 for the root of the tree.

    ``stop_signal``: of the job-control stop that it is in, else 0. A zombie has no threads to trace.
    """

    pid: int
    ppid: int
    threads: list[int]
    zombie: bool = False
    stop_signal: int = 0


def members(root: int) -> list[Process]:
    """The tree as it is now, parents before children; it may change under our eyes unless it is frozen."""
    found: list[Process] = []
    todo = [(root, 0)]
    while todo:
        pid, ppid = todo.pop(0)
        try:
            # In this order: one that alone is left, and dead, won't be replaced by another in execve.
            threads = proc.threads(pid)
            zombie = proc.stat(pid).state in "ZX"
            below = [] if zombie else [child for tid in threads for child in proc.children(pid, tid)]
        except TaskGoneError:
            if pid == root:
                raise
            continue
        found.append(Process(pid, ppid, threads, zombie))
        todo += [(child, pid) for child in below]
    return found


@dataclass
class FrozenTree:
    """All threads of a tree, stopped and traced by the calling thread; see ``freeze``.

    ``freezing_time``: seconds that stopping took. ``frozen_since``: time.monotonic() when all were stopped. ``pidfds``:
    of the processes that are alive, opened when they stood still and traced by us: no other process is meant.
    """

    processes: list[Process]
    freezing_time: float
    frozen_since: float
    pidfds: dict[int, int]
    _stopped: set[int] = field(repr=False, default_factory=set)
    _held: dict[int, bool] = field(repr=False, default_factory=dict)  # pid: did SIGCONT wait for it?

    @property
    def root(self) -> Process:
        return self.processes[0]

    @property
    def alive(self) -> list[Process]:
        """Without the zombies."""
        return [process for process in self.processes if not process.zombie]

    def hold(self) -> None:
        """From now on the tree stays stopped, as by SIGSTOP, should we be killed."""
        for process in self.alive:
            if not process.stop_signal:  # else it stays stopped anyway
                with suppress(TaskGoneError, ProcessLookupError):
                    self._held[process.pid] = proc.is_pending(process.pid, signal.SIGCONT)
                    self._send(process.pid, signal.SIGSTOP)

    def release(self) -> None:
        """Undo ``hold``: neither the tree nor its parent sees anything of it.

        A SIGSTOP that somebody else has sent meanwhile is no other than ours: it is lost.
        """
        threads = {process.pid: process.threads for process in self.processes}
        while self._held:
            pid = next(iter(self._held))
            tid = next(tid for tid in threads[pid] if tid in self._stopped)
            with suppress(TaskGoneError, ProcessLookupError):
                while proc.is_pending(pid, signal.SIGSTOP):  # else somebody's SIGCONT has taken it away
                    tracee.drop_sigstop(tid)
                if self._held[pid]:  # SIGSTOP has thrown it out (signal(7))
                    self._send(pid, signal.SIGCONT)
            del self._held[pid]

    def thaw(self) -> float:
        """Let all go on; seconds that they were frozen. Calling it again does nothing."""
        try:
            self.release()
        finally:
            for tid in self._leaders_last():
                tracee.detach(tid)
            self._stopped.clear()
        return time.monotonic() - self.frozen_since

    def kill(self) -> None:
        """End all processes; when this returns none of them exists, but perhaps as a zombie of its parent."""
        for process in self.alive:
            with suppress(ProcessLookupError):
                self._send(process.pid, signal.SIGKILL)
        for tid in self._leaders_last():
            if tid in self.pidfds and not identity.is_there(self.pidfds[tid]):
                continue  # waited for already: whoever has its pid now is no business of ours
            with suppress(ChildProcessError):
                while not _has_ended(os.waitpid(tid, 0x40000000)[1]):  # __WALL
                    pass
        self._stopped.clear()
        self._held.clear()

    def _send(self, pid: int, number: int) -> None:
        """To the process that was frozen, not to one that has got its pid since."""
        if pid not in self.pidfds:
            raise ProcessLookupError
        signal.pidfd_send_signal(self.pidfds[pid], number)

    def _leaders_last(self) -> list[int]:
        """The threads: the end of a leader can be waited for only after that of its other threads (ptrace(2))."""
        leaders = {process.pid for process in self.processes}
        return sorted(self._stopped, key=lambda tid: (tid in leaders, tid))


def _has_ended(status: int) -> bool:
    return os.WIFEXITED(status) or os.WIFSIGNALED(status)


#: Seconds that a thread may take to stop before the others are let go on for it.
PATIENCE = 0.1
#: Seconds for an execve to replace a dead first thread: on a busy machine it may have to wait for a CPU.
EXEC_PATIENCE = 2.0
#: Seconds for those that have been told to stop to do so, when they are to be let go on after all.
LAST_PATIENCE = 1.0
#: Seconds between two looks for threads that have ended.
ROUND = 0.02


class _Undertaker:
    """Waits for threads that end while we trace them, in a thread of its own.

    A thread in execve is held up until that has been done for all others of its process, and meanwhile it holds up who
    calls PTRACE_SEIZE for it (ptrace(2), "Bugs"): that can be us.
    """

    def __init__(self) -> None:
        self._traced: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def add(self, tid: int) -> None:
        """A thread that is not its process's first one, which others wait for."""
        self._traced.add(tid)

    def stop(self) -> None:
        """Nothing is being frozen any more."""
        self._over.set()

    def join(self) -> None:
        """Stop, and see to its end."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(ROUND):
            for tid in tuple(self._traced):
                tracee.bury(tid)


class _Freezer:
    def __init__(self, root: int, timeout: float, undertaker: _Undertaker) -> None:
        self._root, self._timeout, self._undertaker = root, timeout, undertaker
        self._deadline = time.monotonic() + timeout
        self._seized: set[int] = set()
        self.stopped: dict[int, int] = {}

    def run(self) -> list[Process]:
        """Seize and stop what is there, until a look round finds nothing new."""
        while True:
            tree = self._look()
            new = [
                (tid, process.pid)
                for process in tree
                if not process.zombie
                for tid in process.threads
                if not self._stands(tid)
            ]
            if tree[0].zombie:
                raise DumpError(f"pid {self._root} is a zombie: it has nothing to save but its exit code")
            if not new:
                return tree
            if time.monotonic() > self._deadline:
                raise DumpError(f"the tree of pid {self._root} does not come to rest in {self._timeout:g} s")
            self._stop(new)

    def _look(self) -> list[Process]:
        """The tree, not in the middle of an execve that replaces a dead first thread, if it can be helped."""
        deadline = min(time.monotonic() + EXEC_PATIENCE, self._deadline)
        while True:
            late = time.monotonic() > deadline
            try:
                tree = members(self._root)
                if late or not any(process.zombie and len(process.threads) > 1 for process in tree):
                    return tree
            except TaskGoneError:
                if late or not proc.exists(self._root):
                    raise
            time.sleep(0.0005)

    def _stands(self, tid: int) -> bool:
        """Whether it has been stopped, and is what has been stopped."""
        if tid in self.stopped and not tracee.is_stopped(tid):
            del self.stopped[tid]
        return tid in self.stopped

    def _stop(self, new: list[tuple[int, int]]) -> None:
        begin = time.monotonic()
        waiting = []
        for tid, pid in new:
            # A thread that ends just now is not there in the next look round.
            with suppress(TaskGoneError):
                tracee.seize(tid)
                self._seized.add(tid)
                if tid != pid:
                    self._undertaker.add(tid)
                if _interrupted(tid):
                    waiting.append(tid)
        pause = 0.00002
        while waiting:
            still = []
            for tid in waiting:
                with suppress(TaskGoneError):
                    group_stop = tracee.poll_stop(tid)
                    if group_stop is None:
                        still.append(tid)
                    else:
                        self.stopped[tid] = group_stop
            waiting = still
            if waiting:
                now = time.monotonic()
                if now > self._deadline:
                    raise DumpError(f"thread {waiting[0]} does not stop ({_why(waiting[0])})")
                if now > begin + PATIENCE:
                    # Again: one may have replaced another that was told to (execve).
                    waiting = [tid for tid in waiting if _interrupted(tid)]
                    if any(map(_is_uninterruptible, waiting)):
                        self._release()
                time.sleep(pause)
                pause = min(pause * 1.5, 0.005)

    def _release(self) -> None:
        """Let those go on that have stopped; the next look round finds them again.

        A parent in vfork stops only when its child has called execve or exited (vfork(2)), which one that we have
        stopped never does. (One that merely waits for a CPU would only wait longer.)
        """
        for tid in list(self.stopped):
            tracee.detach(tid)
            del self.stopped[tid]

    def give_up(self) -> None:
        """Let all go on that was seized."""
        for tid in self._seized:
            deadline = time.monotonic() + LAST_PATIENCE
            with suppress(TaskGoneError):
                while not tracee.is_stopped(tid) and tracee.poll_stop(tid) is None:
                    if time.monotonic() > deadline:
                        break  # it goes on when we end
                    time.sleep(0.001)
                tracee.detach(tid)


def _interrupted(tid: int) -> bool:
    """Whether it could be told to stop: it is there, and ours."""
    try:
        tracee.interrupt(tid)
    except TaskGoneError:
        return False
    return True


def _is_uninterruptible(tid: int) -> bool:
    with suppress(TaskGoneError):
        return proc.stat(tid).state == "D"
    return False


def _why(tid: int) -> str:
    try:
        state, place = proc.stat(tid).state, proc.read_text(tid, "wchan") or "running"
    except DumpError:
        return "it is ending"
    return f"state {state}, in {place}"


@contextmanager
def freeze(root: int, timeout: float = 10) -> Iterator[FrozenTree]:
    """Stop the tree under ``root``; it goes on at the end of the block, whatever happened, unless killed.

    Raises ``DumpError`` when something is traced already or does not stop within ``timeout`` seconds.
    """
    identity.allow_many_descriptors()
    undertaker = _Undertaker()
    try:
        begin = time.monotonic()
        freezer = _Freezer(root, timeout, undertaker)
        try:
            processes = freezer.run()
        except BaseException:
            freezer.give_up()
            raise
        now = time.monotonic()
        undertaker.stop()
        for process in processes:
            if not process.zombie:
                # One thread takes the signal that stops them all; the others may have been stopped by us before.
                process.stop_signal = max(freezer.stopped[tid] for tid in process.threads)
        pidfds: dict[int, int] = {}
        tree = FrozenTree(processes, now - begin, now, pidfds, set(freezer.stopped))
        try:
            for process in tree.alive:
                with suppress(TaskGoneError):
                    pidfd = identity.open_pidfd(process.pid)
                    if tracee.is_stopped(process.pid):
                        pidfds[process.pid] = pidfd
                    else:  # killed since
                        os.close(pidfd)
            yield tree
        finally:
            tree.thaw()
            for pidfd in pidfds.values():
                os.close(pidfd)
    finally:
        undertaker.join()
