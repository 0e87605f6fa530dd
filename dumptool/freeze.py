"""Stop a whole tree of processes, and let it go on again.

Threads are seized (PTRACE_SEIZE): if dumptool dies, the kernel detaches them and they go on (ptrace(2)). A tree that
may be running elsewhere must not go on then, so each process is also sent SIGSTOP (``FrozenTree.hold``). No thread
takes that signal while all threads are in ptrace stops; a thread that leaves its ptrace stop takes it before it
returns to user mode, and the signal stops the whole process.
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
    """A process of the tree. ``threads``: thread ids, the leader's first. ``ppid``: 0 for the root of the tree.

    ``stop_signal``: the signal of the job-control stop that the process is in, else 0. A zombie has no threads to
    trace.
    """

    pid: int
    ppid: int
    threads: list[int]
    zombie: bool = False
    stop_signal: int = 0


def members(root: int) -> list[Process]:
    """The tree at this moment, parents before children. Unless it is frozen it may change while it is read."""
    found: list[Process] = []
    todo = [(root, 0)]
    while todo:
        pid, ppid = todo.pop(0)
        try:
            # Threads before state: if the only thread is a zombie, no other thread can replace it by execve.
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

    ``freezing_time``: seconds until all were stopped. ``frozen_since``: time.monotonic() at that moment. ``pidfds``:
    of the live processes, opened while they were stopped and traced, so that each refers to the frozen process.
    ``stays``: the tree may be running elsewhere; ``thaw`` leaves it stopped.
    """

    processes: list[Process]
    freezing_time: float
    frozen_since: float
    pidfds: dict[int, int]
    _stopped: set[int] = field(repr=False, default_factory=set)
    _held: dict[int, bool] = field(repr=False, default_factory=dict)  # pid: was a SIGCONT pending?
    stays: bool = False

    @property
    def root(self) -> Process:
        return self.processes[0]

    @property
    def alive(self) -> list[Process]:
        """All processes but the zombies."""
        return [process for process in self.processes if not process.zombie]

    def image_pid(self, pid: int) -> int:
        """The pid of a process in the images."""
        return pid

    def hold(self) -> None:
        """From now on the tree stays stopped, as by SIGSTOP, if dumptool is killed."""
        for process in self.alive:
            if not process.stop_signal:  # a process in a job-control stop stays stopped anyway
                with suppress(TaskGoneError, ProcessLookupError):
                    self._held[process.pid] = proc.is_pending(process.pid, signal.SIGCONT)
                    self._send(process.pid, signal.SIGSTOP)

    def release(self) -> None:
        """Undoes ``hold``, invisibly for the tree and its parent.

        A SIGSTOP from another process in the meantime can't be told apart from ours, and is lost.
        """
        threads = {process.pid: process.threads for process in self.processes}
        while self._held:
            pid = next(iter(self._held))
            tid = next(tid for tid in threads[pid] if tid in self._stopped)
            with suppress(TaskGoneError, ProcessLookupError):
                while proc.is_pending(pid, signal.SIGSTOP):  # not pending if a SIGCONT has removed it
                    tracee.drop_sigstop(tid)
                if self._held[pid]:  # SIGSTOP removed the pending SIGCONT (signal(7))
                    self._send(pid, signal.SIGCONT)
            del self._held[pid]

    def thaw(self) -> float:
        """Lets all threads go on, or leaves them stopped if ``stays``. Idempotent.

        Returns the seconds that they were frozen.
        """
        try:
            if self.stays:
                self._stop_again()
            else:
                self.release()
        finally:
            for tid in self._leaders_last():
                tracee.detach(tid)
            self._stopped.clear()
        return time.monotonic() - self.frozen_since

    def _stop_again(self) -> None:
        """Sends SIGSTOP again: a SIGCONT may have removed the first one, or may end a job-control stop."""
        for process in self.alive if self._stopped else ():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """Kills all processes. On return none of them exists, except as a zombie of its parent."""
        for process in self.alive:
            with suppress(ProcessLookupError):
                self._send(process.pid, signal.SIGKILL)
        for tid in self._leaders_last():
            if tid in self.pidfds and not identity.is_there(self.pidfds[tid]):
                continue  # reaped already; its pid may belong to another process
            with suppress(ChildProcessError):
                while not _has_ended(os.waitpid(tid, 0x40000000)[1]):  # __WALL
                    pass
        self._stopped.clear()
        self._held.clear()

    def _send(self, pid: int, number: int) -> None:
        """Signals the frozen process, never a process that reuses its pid."""
        if pid not in self.pidfds:
            raise ProcessLookupError
        signal.pidfd_send_signal(self.pidfds[pid], number)

    def _leaders_last(self) -> list[int]:
        """The threads in an order to wait for them: a leader can be reaped only after its other threads (ptrace(2))."""
        leaders = {process.pid for process in self.processes}
        return sorted(self._stopped, key=lambda tid: (tid in leaders, tid))


def _has_ended(status: int) -> bool:
    return os.WIFEXITED(status) or os.WIFSIGNALED(status)


#: Seconds for a thread to stop before the stopped threads are released, because it may be waiting for one of them.
PATIENCE = 0.1
#: Seconds for an execve to replace a dead leader: on a busy machine it may have to wait for a CPU.
EXEC_PATIENCE = 2.0
#: Seconds for an interrupted thread to stop, so that it can be detached, when the freeze has failed.
LAST_PATIENCE = 1.0
#: Seconds between two attempts to reap traced threads.
ROUND = 0.02


class _Reaper:
    """Reaps threads that exit while they are traced, in a Python thread of its own.

    execve waits until all other threads of its process are reaped. Until then PTRACE_SEIZE of that process blocks
    (ptrace(2), "Bugs"), which would deadlock if the caller of PTRACE_SEIZE had to reap.
    """

    def __init__(self) -> None:
        self._traced: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def add(self, tid: int) -> None:
        """Reap this thread from now on. Not for leaders: other code waits for those."""
        self._traced.add(tid)

    def stop(self) -> None:
        """Call when the freeze has ended."""
        self._over.set()

    def join(self) -> None:
        """Stop and wait for the Python thread."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(ROUND):
            for tid in tuple(self._traced):
                tracee.reap(tid)


class _Freezer:
    def __init__(self, root: int, timeout: float, reaper: _Reaper) -> None:
        self._root, self._timeout, self._reaper = root, timeout, reaper
        self._deadline = time.monotonic() + timeout
        self._seized: set[int] = set()
        self.stopped: dict[int, int] = {}

    def run(self) -> list[Process]:
        """Seizes and stops threads until a look at the tree finds no new one."""
        while True:
            tree = self._look()
            # A thread may be listed twice: in an execve it takes the place of the leader while that is read.
            new = {
                tid: process.pid
                for process in tree
                if not process.zombie
                for tid in process.threads
                if not self._stands(tid)
            }
            if tree[0].zombie:
                raise DumpError(f"pid {self._root} is a zombie: it has nothing to save but its exit code")
            if not new:
                return tree
            if time.monotonic() > self._deadline:
                raise DumpError(f"the tree of pid {self._root} does not come to rest in {self._timeout:g} s")
            self._stop(list(new.items()))

    def _look(self) -> list[Process]:
        """The tree; for up to ``EXEC_PATIENCE`` not one in which an execve is about to replace a dead leader."""
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
        """Whether the thread is stopped, and is still the thread that was stopped (execve reuses the leader's id)."""
        if tid in self.stopped and not tracee.is_stopped(tid):
            del self.stopped[tid]
        return tid in self.stopped

    def _stop(self, new: list[tuple[int, int]]) -> None:
        begin = time.monotonic()
        waiting = []
        for tid, pid in new:
            # The next look does not find a thread that exits now.
            with suppress(TaskGoneError):
                tracee.seize(tid)
                self._seized.add(tid)
                if tid != pid:
                    self._reaper.add(tid)
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
                    # Interrupt again: execve may have replaced an interrupted thread by another one.
                    waiting = [tid for tid in waiting if _interrupted(tid)]
                    if any(map(_is_uninterruptible, waiting)):
                        self._release()
                time.sleep(pause)
                pause = min(pause * 1.5, 0.005)

    def _release(self) -> None:
        """Lets the stopped threads go on; the next look finds them again.

        A parent in vfork stops only after its child has called execve or exited (vfork(2)), which a stopped child
        never does. (A thread that only waits for a CPU would wait longer.)
        """
        for tid in list(self.stopped):
            tracee.detach(tid)
            del self.stopped[tid]

    def give_up(self) -> None:
        """Lets all seized threads go on."""
        for tid in self._seized:
            deadline = time.monotonic() + LAST_PATIENCE
            with suppress(TaskGoneError):
                while not tracee.is_stopped(tid) and tracee.poll_stop(tid) is None:
                    if time.monotonic() > deadline:
                        break  # the kernel detaches it when dumptool ends
                    time.sleep(0.001)
                tracee.detach(tid)


def _interrupted(tid: int) -> bool:
    """Interrupts a thread. False if it has exited or is not traced by us."""
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
    """Stops the tree under ``root``. At the end of the block it goes on, also after an exception, unless killed.

    Raises ``DumpError`` if a thread is already traced or does not stop within ``timeout`` seconds.
    """
    identity.allow_many_descriptors()
    reaper = _Reaper()
    try:
        begin = time.monotonic()
        freezer = _Freezer(root, timeout, reaper)
        try:
            processes = freezer.run()
        except BaseException:
            freezer.give_up()
            raise
        now = time.monotonic()
        reaper.stop()
        for process in processes:
            if not process.zombie:
                # Only one thread reports the stop signal: others may have been stopped by us before it arrived.
                process.stop_signal = max(freezer.stopped[tid] for tid in process.threads)
        pidfds: dict[int, int] = {}
        tree = FrozenTree(processes, now - begin, now, pidfds, set(freezer.stopped))
        try:
            for process in tree.alive:
                with suppress(TaskGoneError):
                    pidfd = identity.open_pidfd(process.pid)
                    if tracee.is_stopped(process.pid):
                        pidfds[process.pid] = pidfd
                    else:  # killed in the meantime
                        os.close(pidfd)
            yield tree
        finally:
            tree.thaw()
            for pidfd in pidfds.values():
                os.close(pidfd)
    finally:
        reaper.join()
