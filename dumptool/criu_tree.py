"""A tree that real CRIU keeps stopped, with the methods of ``dumptool.freeze.FrozenTree``."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dumptool import identity, proc
from dumptool.criu import CriuDump
from dumptool.errors import DumpError, TaskGoneError
from dumptool.freeze import FrozenTree, members
from images_spec import images
from images_spec.images import Kind
from images_spec.messages import TaskState

DEATH = 30.0  # s for killed processes to be gone
POLL = 0.001  # s: nothing tells when a tracer lets go


@dataclass
class CriuTree(FrozenTree):
    """``criu`` traces it, and not we, so its threads can't be examined; its memory and /proc can.

    ``image_pids``: pid of a process here -> in the images, where it is that of the innermost PID namespace.
    """

    criu: CriuDump = field(kw_only=True, repr=False)
    image_pids: dict[int, int] = field(kw_only=True)

    def image_pid(self, pid: int) -> int:
        return self.image_pids[pid]

    def release(self) -> None:
        """Undoes ``hold``. A process with a handler of SIGCONT may notice: only a tracer could hide that."""
        while self._held:
            pid, _ = self._held.popitem()
            with suppress(TaskGoneError, ProcessLookupError):
                if proc.is_pending(pid, signal.SIGSTOP) or proc.stat(pid).state == "T":
                    self._send(pid, signal.SIGCONT)

    def thaw(self) -> float:
        """Has CRIU undo the dump: the tree goes on, or is left stopped if ``stays``. Idempotent."""
        if self._stopped:
            self._stopped.clear()
            for process in self.alive if self.stays else ():
                with suppress(ProcessLookupError):
                    self._send(process.pid, signal.SIGSTOP)
            if not self.stays:
                self.release()
            self.criu.undo()
        return time.monotonic() - self.frozen_since

    def finish(self, *, kill: bool) -> float:
        """The end that CRIU was asked for takes place. Returns how long the tree was stopped, in seconds.

        Raises ``DumpError`` if a process that was to end has not.
        """
        self._stopped.clear()
        self._held.clear()
        self.criu.finish()
        for process in self.alive:
            while _is_traced(process.pid) and not self.criu.ends_within(POLL):
                pass
        stopped = time.monotonic() - self.frozen_since
        self.criu.wait()  # it still frees what it had of the memory
        if kill:
            self.kill()
        return stopped

    def kill(self) -> None:
        """Kills what is left of the tree. On return none of its processes exists, except as a zombie of its parent."""
        for process in self.alive:
            with suppress(ProcessLookupError):
                self._send(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + DEATH
        for process in self.alive:
            pidfd = self.pidfds.get(process.pid)
            if (
                pidfd is not None
                and not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]
            ):
                raise DumpError(f"pid {process.pid} was killed, but does not end; its images are complete")


def _is_traced(pid: int) -> bool:
    with suppress(TaskGoneError):
        return proc.status(pid)["TracerPid"] != "0"
    return False


def open_tree(root: int, criu: CriuDump, written: Path) -> CriuTree:
    """The tree that CRIU has just stopped. ``written``: directory of its images. Close the ``pidfds``.

    Raises ``DumpError``, ``ImageError``; then the tree goes on when the block of ``criu`` ends.
    """
    identity.allow_many_descriptors()
    processes = members(root)
    pidfds: dict[int, int] = {}
    tree = CriuTree(
        processes,
        criu.ready_since - criu.frozen_since,
        criu.frozen_since,
        pidfds,
        {process.pid for process in processes},
        criu=criu,
        image_pids={process.pid: image_pid(process.pid) for process in processes},
    )
    try:
        _compare(tree, written)
        for process in tree.alive:
            pidfds[process.pid] = identity.open_pidfd(process.pid)
        criu.check_alive()
    except BaseException:
        for pidfd in pidfds.values():
            os.close(pidfd)
        raise
    return tree


def _compare(tree: CriuTree, written: Path) -> None:
    """Finds out which processes were in a job-control stop. Raises ``DumpError`` if CRIU has dumped others."""
    known = {entry.pid for entry in images.read(written / Kind.PSTREE.file_name(), Kind.PSTREE)}
    if known != set(tree.image_pids.values()):
        raise DumpError(
            "CRIU sees other processes in the tree than dumptool: run both in the same PID namespace"
        )
    for process in tree.alive:
        core = images.read_one(written / Kind.CORE.file_name(tree.image_pid(process.pid)), Kind.CORE)
        if core.tc.task_state == TaskState.TASK_STOPPED:
            process.stop_signal = signal.SIGSTOP


def image_pid(pid: int) -> int:
    """The pid of a process in images: in the innermost of its PID namespaces (proc_pid_status(5), NSpid)."""
    return int(proc.status(pid)["NSpid"].split()[-1])
