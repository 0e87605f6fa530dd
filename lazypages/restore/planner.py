"""Makes a plan from a dump: checks first, then the order of all ops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from images_spec.images import Kind
from images_spec.messages import CoreEntry, TaskState, X86Mode
from images_spec.messages import Machine as MachineType
from lazypages.outputs import check_output
from lazypages.restore import memory, registers, state, tree
from lazypages.restore.dump import Alive, Dump, Process
from lazypages.restore.errors import RestoreError
from lazypages.restore.files import (
    Files,
    check_descriptors,
    check_locks,
    give_files,
    set_owners,
    set_up_terminals,
    take_locks,
)
from lazypages.restore.machine import Machine
from lazypages.restore.plan import NONE, SCRATCH_CODE, SCRATCH_DATA, Plan
from lazypages.restore.syscalls import (
    CLONE_CLEAR_SIGHAND,
    CLONE_FILES,
    CLONE_FS,
    CLONE_PARENT,
    CLONE_SIGHAND,
    CLONE_SYSVSEM,
    CLONE_THREAD,
    CLONE_VM,
    Nr,
    Prctl,
)

THREAD_FLAGS = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM

LINK_FD_LIMIT = 1024

NAMESPACES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time")


@dataclass(frozen=True, slots=True)
class Order:
    """The options of a restore. ``own_session``, ``own_group``: of the process that becomes the restorer."""

    lazy: bool
    shell_job: bool
    detached: bool
    own_session: int
    own_group: int
    pidfile: Path | None = None


def check(dump: Dump, order: Order, machine: Machine) -> None:
    """Raises ``RestoreError`` for everything that is known to fail; nothing has been created yet."""
    _check_ids(dump)
    for process in dump.processes:
        _check_pids(process, machine)
        if process.core.mtype != MachineType.MACHINE_X86_64:
            raise RestoreError(
                f"task {process.pid}: was dumped on another kind of machine ({process.core.mtype})"
            )
        if process.alive is None:
            continue
        alive, mm_path = process.alive, dump.path(Kind.MM, process.pid)
        if process.core.tc.task_state not in (TaskState.TASK_ALIVE, TaskState.TASK_STOPPED):
            raise RestoreError(f"task {process.pid}: is in the unknown state {process.core.tc.task_state}")
        check_descriptors(dump, process.pid, alive)
        check_locks(dump, process.pid)
        memory.check_mappings(
            dump, alive, machine, process.pid, dump.path(Kind.PAGEMAP, process.pid), lazy=order.lazy
        )
        memory.special_places(alive.mm, machine, mm_path)
        memory.check_vdso(alive, machine, process.pid, mm_path)
        state.check_process(process, alive, machine, dump)
        for tid, core in alive.threads.items():
            if core.thread_info.gpregs.mode != X86Mode.X86_NATIVE:
                raise RestoreError(f"task {process.pid}: is a 32-bit program, which can't be restored")
            registers.extended(core.thread_info.fpregs, machine, dump.path(Kind.CORE, tid))
            registers.fxsave(core.thread_info.fpregs, dump.path(Kind.CORE, tid))
    if order.pidfile is not None:
        check_output("--pidfile", order.pidfile, new=True)


def _check_pids(process: Process, machine: Machine) -> None:
    tids = process.alive.threads if process.alive else (process.pid,)
    for tid in tids:
        if machine.in_use(tid):
            what = f"task {process.pid}" if tid == process.pid else f"task {process.pid}: thread id {tid}"
            raise RestoreError(
                f"{what}: this pid is in use: end that process, or restore in a pid namespace of its own "
                "(unshare -p -f --mount-proc)"
            )


def _check_ids(dump: Dump) -> None:
    """Checks shared kernel objects: tasks share our namespaces, and nothing else."""
    root = dump.checkpoint.inventory.root_ids
    owners: dict[tuple[str, int], int] = {}
    for process in dump.processes:
        if process.alive is None:
            continue
        ids = process.alive.ids
        for name in NAMESPACES:
            field = f"{name}_ns_id"
            if ids.HasField(field) and root.HasField(field) and getattr(ids, field) != getattr(root, field):
                raise RestoreError(
                    f"task {process.pid}: is in a {name} namespace of its own, which can't be restored"
                )
        for field, what in (
            ("vm_id", "memory"),
            ("files_id", "file descriptors"),
            ("fs_id", "working directory"),
            ("sighand_id", "signal handlers"),
        ):
            other = owners.setdefault((field, getattr(ids, field)), process.pid)
            if other != process.pid:
                raise RestoreError(
                    f"tasks {other} and {process.pid} share their {what}, which can't be restored"
                )


def make_plan(dump: Dump, order: Order, machine: Machine) -> tuple[Plan, int]:
    """Returns the plan, and the descriptor number of the link to the restorer. Call ``check`` first.

    Raises ``RestoreError``.
    """
    return _Planner(dump, order, machine).plan()


@dataclass(slots=True)
class _Threads:
    """The plan's threads of a process: the leader, then (thread, tid, core) of all threads, the leader first."""

    leader: int
    all: list[tuple[int, int, CoreEntry]]


class _Planner:
    def __init__(self, dump: Dump, order: Order, machine: Machine) -> None:
        self._dump, self._order, self._machine = dump, order, machine
        spaces = [process.alive.mm for process in dump.processes if process.alive]
        self._plan = Plan(memory.find_scratch(spaces, machine))
        self._files = Files(dump, self._plan, machine, shell_job=order.shell_job)
        self._state = state.State(self._plan, machine)
        self._threads: dict[int, _Threads] = {}
        self._link_fd = _free_descriptor(dump)

    def plan(self) -> tuple[Plan, int]:
        plan, lazy = self._plan, self._order.lazy
        shared = memory.Shared(self._dump, plan, self._files)
        space = memory.Memory(plan, self._files, shared, self._machine, lazy=lazy)
        self._open_everything()
        self._make_tree()
        for process, alive, threads in self._alive():
            path = self._dump.path(Kind.MM, process.pid)
            space.build(threads.leader, process.pid, alive, path)
            give_files(plan, self._files, threads.leader, process.pid, alive, link_fd=self._link_fd)
            for tid, core in alive.threads.items():
                if tid != process.pid:
                    thread = plan.spawn(threads.leader, tid, THREAD_FLAGS, f"make thread {tid}")
                    threads.all.append((thread, tid, core))
        if lazy:
            for process in self._dump.processes:
                if process.alive is None:
                    plan.announce(process.pid)
                else:
                    space.put_under_userfaultfd(self._threads[process.pid].leader, process.pid, process.alive)
        self._end_zombies()
        for _, alive, threads in self._alive():
            set_owners(plan, self._dump, threads.leader, alive)
        for process, alive, threads in self._alive():
            self._state.process(threads.leader, process.pid, alive)
            for thread, tid, core in threads.all:
                self._state.thread(thread, core, leader=tid == process.pid)
        leaders = {pid: threads.leader for pid, threads in self._threads.items()}
        set_up_terminals(plan, self._dump, self._machine, leaders)
        for process, alive, threads in self._alive():
            take_locks(plan, self._dump, threads.leader, process.pid)
            self._state.late(threads.all, process.pid, alive)
        for process, _, threads in self._alive():
            self._set_registers(process, threads)
        self._let_go()
        return plan, self._link_fd

    def _alive(self) -> Iterator[tuple[Process, Alive, _Threads]]:
        for process in self._dump.processes:
            if process.alive is not None:
                yield process, process.alive, self._threads[process.pid]

    def _open_everything(self) -> None:
        """Opens all files before the first task is created, so that a failure comes early."""
        for process in self._dump.processes:
            if process.alive is None:
                continue
            for entry in process.alive.fds:
                self._files.description(entry.id, f"task {process.pid}, fd {entry.fd}")
        self._files.close_pipes()

    def _make_tree(self) -> None:
        plan = self._plan
        members = [tree.Member(p.pid, p.ppid, p.pgid, p.sid) for p in self._dump.processes]
        steps = tree.order(
            members,
            own_session=self._order.own_session,
            own_group=self._order.own_group,
            shell_job=self._order.shell_job,
        )
        made: dict[int, int] = {}
        for step in steps:
            match step:
                case tree.Make(pid, maker, sibling):
                    flags = CLONE_CLEAR_SIGHAND | (CLONE_PARENT if sibling else 0)
                    if pid not in {process.pid for process in self._dump.processes}:
                        _check_helper(pid, self._machine)
                    made[pid] = plan.spawn(made[maker] if maker else NONE, pid, flags, "make the process")
                    if not maker:
                        self._free_descriptors(made[pid])
                case tree.FoundSession(pid):
                    plan.call(made[pid], "found a session", Nr.SETSID)
                case tree.JoinGroup(pid, group):
                    plan.call(made[pid], f"join process group {group}", Nr.SETPGID, 0, group)
                case tree.EndHelper(pid, parent):
                    plan.reap(made[parent], made[pid])
        for process in self._dump.processes:
            self._threads[process.pid] = _Threads(
                made[process.pid], [(made[process.pid], process.pid, process.core)]
            )

    def _free_descriptors(self, root: int) -> None:
        """Closes all descriptors except the link to the restorer, which the other tasks inherit."""
        label = "close the restorer's files"
        self._plan.call(root, label, Nr.CLOSE_RANGE, 0, self._link_fd - 1, 0)
        self._plan.call(root, label, Nr.CLOSE_RANGE, self._link_fd + 1, (1 << 32) - 1, 0)

    def _end_zombies(self) -> None:
        """Children first: the children of a zombie would be adopted by another process."""
        plan = self._plan
        for process in reversed(self._dump.processes):
            if process.alive is None:
                thread, comm = self._threads[process.pid].leader, process.core.tc.comm
                plan.call(thread, "set the name", Nr.PRCTL, Prctl.SET_NAME, plan.data, data=comm[:15] + b"\0")
                plan.exit(thread, process.core.tc.exit_code)

    def _set_registers(self, process: Process, threads: _Threads) -> None:
        plan = self._plan
        for thread, _, core in threads.all:
            self._state.rseq(thread, core.thread_core)
        size = SCRATCH_CODE + SCRATCH_DATA + memory.parking_size(self._machine)
        plan.call(threads.leader, "give up the scratch area", Nr.MUNMAP, plan.scratch, size)
        shared = process.core.tc.signals_s.signals
        for thread, tid, core in threads.all:
            path = self._dump.path(Kind.CORE, tid)
            bits, components = registers.extended(core.thread_info.fpregs, self._machine, path)
            plan.regs(
                thread,
                registers.general(
                    core.thread_info, signalled=bool(shared or core.thread_core.signals_p.signals)
                ),
                blocked=state.blocked(process.core.tc, core.thread_core, leader=tid == process.pid),
                stop=process.core.tc.task_state == TaskState.TASK_STOPPED,
                xstate_bv=bits,
                fxsave=registers.fxsave(core.thread_info.fpregs, path),
                components=components,
            )

    def _let_go(self) -> None:
        plan, root = self._plan, self._dump.processes[0]
        if self._order.lazy:
            plan.finish()
        if self._order.pidfile is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            plan.write(str(self._order.pidfile), flags, str(root.pid), f"write {self._order.pidfile}")
        plan.go()
        if not self._order.detached:
            plan.wait(self._threads[root.pid].leader)


def _check_helper(pid: int, machine: Machine) -> None:
    if machine.in_use(pid):
        raise RestoreError(
            f"pid {pid}: led a session or process group of the dumped tasks; now another process has it"
        )


def _free_descriptor(dump: Dump) -> int:
    used = {entry.fd for process in dump.processes if process.alive for entry in process.alive.fds}
    return next(fd for fd in range(LINK_FD_LIMIT - 1, -1, -1) if fd not in used)
