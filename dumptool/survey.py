"""The state of a tree of processes, and what keeps its memory from being read or tracked.

It is examined twice: before the tree is stopped, so that a refusal does not disturb the tasks, and again when it
is frozen, because it may have changed. What beside memory can't be saved is the matter of ``dumptool.saveable``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from dumptool import proc, trackers
from dumptool.errors import DumpError, Refusal, TaskGoneError, UnsupportedError
from dumptool.freeze import Process, members
from dumptool.holders import Holders, Tracker
from dumptool.identity import one_process
from dumptool.tracee import Same, dispatches_syscalls, same

NR_RESTART_SYSCALL = "219"

VFORK_PATIENCE = 2.0
"""Seconds for the child of a vfork to call execve or to exit."""
LOOK_PAUSE = 0.005
"""Seconds between two looks at a tree that seems to have something that can't be saved."""


@dataclass(frozen=True, slots=True)
class Asleep:
    """A sleeping thread. ``registers``: rdi, rsi, rdx, r10, rsp, rip. ``kernel_function``: proc_pid_wchan(5)."""

    registers: tuple[int, ...]
    kernel_function: str


@dataclass(frozen=True, slots=True)
class Task:
    """The /proc files of one live process. ``files``: without ``leftovers``, descriptors of ours in the process.

    ``tracker``: of its writes, if there is one.
    ``asleep``: by thread id, the threads that were in restart_syscall(2) at the first look, before the freeze.
    """

    process: Process
    stat: proc.Stat
    status: dict[str, str]
    layout: proc.Layout
    files: tuple[proc.OpenFile, ...]
    tracker: Tracker | None
    leftovers: tuple[int, ...]
    asleep: dict[int, Asleep]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def image_pid(self) -> int:
        """The pid in the process's own PID namespace, by which CRIU names its images (images_spec/README.md)."""
        return int(self.status["NSpid"].split()[-1])


Check = Callable[[Sequence[Process], dict[int, Task]], None]
"""Raises ``UnsupportedError`` for a tree that has to be refused."""


def look_at(
    process: Process, before: Task | None = None, *, holders: Holders | None = None, files: bool = True
) -> Task:
    """Reads the state of a process. Raises ``DumpError``.

    ``holders``: have looked for trackers.
    ``before``: an earlier look, which can save work. ``files``: read all its descriptors, which takes a while if
    there are many; without, only our trackers among them.
    """
    with one_process(process.pid):
        now = proc.stat(process.pid)
        if before is not None and before.stat.start_time != now.start_time:
            before = None  # of another process with the same pid
        tracker = None if holders is None else holders.tracker(process.pid, now.start_time)
        return _look_at(process, before, tracker, files)


def _look_at(process: Process, before: Task | None, tracker: Tracker | None, all_files: bool) -> Task:
    pid = process.pid
    files = list(proc.open_files(pid, None if all_files else trackers.LINKS))
    ours = trackers.leftovers(files, None if tracker is None else tracker.record)
    if before is not None and (before.tracker is None) != (tracker is None):
        before = replace(before, layout=replace(before.layout, maps=""))  # VmFlags have changed
    return Task(
        process=process,
        stat=proc.stat(pid),
        status=proc.status(pid),
        layout=proc.layout(pid, before.layout if before else None),
        files=tuple(file for file in files if file.fd not in ours),
        tracker=tracker,
        leftovers=ours,
        asleep=_asleep(process) if before is None else before.asleep,
    )


def _asleep(process: Process) -> dict[int, Asleep]:
    found = {}
    for tid in process.threads:
        with suppress(DumpError):  # the thread has exited, or the kernel does not let us read this
            words = proc.read_text(process.pid, f"task/{tid}/syscall").split()
            if words[0] == NR_RESTART_SYSCALL:
                registers = tuple(int(words[place], 16) for place in (1, 2, 3, 4, 7, 8))
                found[tid] = Asleep(registers, proc.read_text(process.pid, f"task/{tid}/wchan"))
    return found


def look_at_all(
    processes: Iterable[Process],
    before: dict[int, Task] | None = None,
    *,
    holders: Holders | None = None,
    files: bool = True,
) -> dict[int, Task]:
    """The state of all processes but zombies, by pid. Leaves out those that exit meanwhile, except the root.

    ``before``, ``holders``, ``files``: as in ``look_at``.

    Raises ``TaskGoneError`` if the root exits.
    """
    tasks = {}
    for process in processes:
        if not process.zombie:
            try:
                tasks[process.pid] = look_at(
                    process, (before or {}).get(process.pid), holders=holders, files=files
                )
            except TaskGoneError:
                if process.ppid == 0:
                    raise
    return tasks


def look_until_settled(root: int, check: Check, holders: Holders, *, files: bool = True) -> dict[int, Task]:
    """The running processes of the tree, when ``check`` finds nothing in them that has to be refused.

    ``holders``, ``files``: as in ``look_at``.
    Raises ``UnsupportedError`` when two looks in a row find the same refusals. While a process exits or
    calls execve, /proc may show a state that is neither the old nor the new one; the child of a vfork shares its
    parent's memory until it calls execve or exits, which may take ``VFORK_PATIENCE``.
    """
    deadline = time.monotonic() + VFORK_PATIENCE
    refused = ""
    while True:
        processes = members(root)
        in_vfork = any_in_vfork(processes)  # before the look: the vfork may be over after it
        holders.look()
        tasks = look_at_all(processes, holders=holders, files=files)
        try:
            check(processes, tasks)
        except UnsupportedError as error:
            settled = str(error) == refused and not (in_vfork or any_in_vfork(processes))
            if settled or time.monotonic() > deadline:
                raise
            refused = str(error)
            time.sleep(LOOK_PAUSE)
        else:
            return tasks


def check_memory(processes: Sequence[Process], tasks: dict[int, Task], *, frozen: bool = False) -> None:
    """Raises ``UnsupportedError`` with everything that ``memory_refusals`` finds."""
    refusals = memory_refusals(processes, tasks, frozen=frozen)
    if refusals:
        raise UnsupportedError(sorted(set(refusals)))


def check_filled(pid: int, layout: proc.Layout) -> None:
    """Raises ``UnsupportedError`` for memory that a userfaultfd fills: pages that are missing may have contents.

    CRIU takes them for pages that were never used, if the process does not have the descriptor (observed, 4.2.1).
    """
    if refusal := _foreign(pid, layout, {"um", "ui"}):
        raise UnsupportedError([refusal])


def memory_refusals(
    processes: Sequence[Process], tasks: dict[int, Task], *, frozen: bool = False
) -> list[Refusal]:
    """Everything for which the memory of the tree can't be read, or writes to it can't be tracked.

    ``frozen``: also what can be seen only of a thread in a ptrace stop. Processes that exit meanwhile are ignored,
    except the root: ``TaskGoneError``.
    """
    refusals: list[Refusal] = []
    for process in processes:
        try:
            if process.zombie and len(process.threads) > 1:
                refusals.append(Refusal(process.pid, "", "its first thread has exited, others have not"))
            if process.pid in tasks:
                refusals += _threads(tasks[process.pid])
                refusals += _registered(tasks[process.pid])
                if frozen:
                    refusals += _frozen(process)
        except TaskGoneError:
            if process.ppid == 0:
                raise
    refusals += _same_memory(tasks.values())
    refusals += _same_number(tasks.values())
    return refusals


def threads_of(task: Task) -> Iterator[tuple[int, dict[str, str]]]:
    """The threads of a process that have not exited meanwhile: thread id, and /proc/PID/task/TID/status."""
    for tid in task.process.threads:
        try:
            fields = proc.status(task.pid, tid)
        except TaskGoneError:
            continue
        yield tid, fields


def _threads(task: Task) -> Iterator[Refusal]:
    pid = task.pid
    for tid, fields in threads_of(task):
        tracer = int(fields.get("TracerPid", "0"))
        if tracer not in (0, os.getpid()):
            yield Refusal(pid, "", f"thread {tid} is traced by pid {tracer} (a debugger or strace): end that")
        if fields.get("x86_Thread_features", ""):
            yield Refusal(
                pid,
                "",
                f"thread {tid} has a shadow stack, which is not saved: no call can be run in it safely",
            )
    if int(task.status.get("CoreDumping", "0")):
        yield Refusal(pid, "", "is dumping core")


def _registered(task: Task) -> Iterator[Refusal]:
    """Memory that another userfaultfd handles: it may miss pages, and can't be registered with ours."""
    ours = task.tracker is not None or task.leftovers
    refusal = _foreign(task.pid, task.layout, {"um", "ui"} if ours else {"um", "ui", "uw"})
    if refusal is not None:
        yield refusal  # one of them is enough


def _foreign(pid: int, layout: proc.Layout, flags: Collection[str]) -> Refusal | None:
    """The first mapping with one of these VmFlags of userfaultfds (proc_pid_smaps(5))."""
    for vma in layout.vmas:
        if not layout.flags[vma.start].isdisjoint(flags):
            where = f"mapping {vma.start:x}-{vma.end:x}"
            return Refusal(pid, where, "has a userfaultfd that is not ours, which is not saved")
    return None


def _frozen(process: Process) -> Iterator[Refusal]:
    for tid in process.threads:
        if dispatches_syscalls(tid):
            yield Refusal(
                process.pid,
                "",
                f"thread {tid} has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH), "
                "which is not saved",
            )


def _same_memory(tasks: Iterable[Task]) -> Iterator[Refusal]:
    """Processes that share their memory (CLONE_VM): they have the same mappings, too."""
    alike: dict[str, list[Task]] = {}
    for task in tasks:
        alike.setdefault(task.layout.maps, []).append(task)
    for group in alike.values():
        for place, task in enumerate(group):
            for other in group[:place]:
                with suppress(TaskGoneError):
                    if same(task.pid, other.pid, Same.VM):
                        yield Refusal(
                            task.pid, "", f"shares its memory with pid {other.pid}, which is not saved"
                        )


def _same_number(tasks: Iterable[Task]) -> Iterator[Refusal]:
    """Processes that have the same pid, each in a PID namespace of its own: images are named by it."""
    known: dict[int, int] = {}
    for task in tasks:
        other = known.setdefault(task.image_pid, task.pid)
        if other != task.pid:
            yield Refusal(
                task.pid,
                "",
                f"is pid {task.image_pid} in its PID namespace, as pid {other} is in another one: "
                "dump the namespaces one by one",
            )


def is_shared_anonymous(vma: proc.Vma) -> bool:
    """Whether it is MAP_SHARED | MAP_ANONYMOUS, which the kernel shows as a deleted /dev/zero."""
    return vma.shared and vma.name == "/dev/zero (deleted)"


def any_in_vfork(processes: Iterable[Process]) -> bool:
    """Whether a thread sleeps uninterruptibly, as a parent in vfork does (vfork(2))."""
    for process in processes:
        for tid in process.threads:
            with suppress(TaskGoneError):
                if proc.stat(tid).state == "D":
                    return True
    return False


def check_permission(pid: int) -> None:
    """Raises ``DumpError`` unless the process exists and can be examined."""
    if not proc.exists(pid):
        raise DumpError(f"pid {pid}: no such process")
    if pid == os.getpid():
        raise DumpError("can't dump dumptool itself")
    if re.fullmatch(r"0*", proc.status(pid).get("VmSize", "").removesuffix(" kB")):
        raise DumpError(f"pid {pid}: is a kernel thread or zombie, which has no memory to save")
