"""State of a task besides memory, files and registers: signals, credentials, limits, timers, names."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final

from images_spec.errors import ImageError
from images_spec.images import Kind
from images_spec.messages import (
    CoreEntry,
    CredsEntry,
    ItimerEntry,
    SeccompMode,
    SignalQueueEntry,
    TaskCoreEntry,
    ThreadCoreEntry,
)
from lazypages.restore.dump import Alive, Dump, Process
from lazypages.restore.errors import RestoreError
from lazypages.restore.machine import NR_RLIMITS, Machine
from lazypages.restore.plan import Plan
from lazypages.restore.syscalls import (
    CAP_AMBIENT_RAISE,
    CAPABILITY_VERSION_3,
    SECBIT_NO_SETUID_FIXUP,
    SS_AUTODISARM,
    SS_DISABLE,
    TIMER_CREATE_RESTORE_IDS_OFF,
    TIMER_CREATE_RESTORE_IDS_ON,
    Nr,
    Prctl,
)

SIGNALS: Final = [number for number in range(1, 65) if number not in (9, 19)]
"""Signals whose action can be changed, in the order of TaskCoreEntry.sigactions."""

SIGEV_THREAD_ID: Final = 4
SIGEV_NONE: Final = 1
SIGEVENT_SIZE: Final = 64
CLOCK_MONOTONIC: Final = 1
THREAD_CLOCKS: Final = (3, 0xFFFFFFFE)
"""CLOCK_THREAD_CPUTIME_ID, and its number in images: the clock of the creating thread, which they do not name."""
MAX_SKIPPED_TIMERS: Final = 10_000
"""Where ids can't be chosen, timers are created and deleted until one gets the right id: at most this many."""

SIGINFO_SIZE: Final = 128
CAP_SYS_RESOURCE: Final = 24
UNLIMITED: Final = (1 << 64) - 1
MASK: Final = (1 << 64) - 1

RLIMIT_NAMES = (
    *("CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS"),
    *("SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"),
)


def check_process(process: Process, alive: Alive, machine: Machine, dump: Dump) -> None:
    """Raises ``RestoreError`` for state that can't be restored, ``ImageError`` for invalid images."""
    tc, pid = process.core.tc, process.pid
    path = dump.path(Kind.CORE, pid)
    if tc.sigactions and len(tc.sigactions) != len(SIGNALS):
        raise ImageError(path, f"has {len(tc.sigactions)} signal actions, not {len(SIGNALS)}")
    if not tc.sigactions or not tc.HasField("rlimits") or not tc.HasField("timers"):
        raise RestoreError(f"{path}: signal actions, limits or timers are missing: the format is too old")
    _check_posix_timers(process, alive, machine)
    for number, limit in enumerate(tc.rlimits.rlimits[:NR_RLIMITS]):
        hard = machine.rlimits[number][1] & UNLIMITED
        if limit.max > hard and not machine.capabilities["CapEff"] >> CAP_SYS_RESOURCE & 1:
            raise RestoreError(
                f"task {pid}: hard limit RLIMIT_{RLIMIT_NAMES[number]} was {_limit(limit.max)}, here it is "
                f"{_limit(hard)}, and raising it needs CAP_SYS_RESOURCE"
            )
    for tid, core in alive.threads.items():
        _check_thread(pid, tid, core, machine, dump)


def _check_posix_timers(process: Process, alive: Alive, machine: Machine) -> None:
    timers, subject = process.core.tc.timers.posix, f"task {process.pid}"
    idents = [timer.it_id for timer in timers]
    if len(set(idents)) != len(idents):
        raise RestoreError(f"{subject}: has two POSIX timers with the same id")
    if idents and max(idents) >= MAX_SKIPPED_TIMERS and not machine.chooses_timer_ids:
        raise RestoreError(
            f"{subject}: has a POSIX timer with id {max(idents)}, which this kernel can't give "
            "(PR_TIMER_CREATE_RESTORE_IDS)"
        )
    for timer in timers:
        to_thread = timer.it_sigev_notify == SIGEV_THREAD_ID
        if to_thread and timer.HasField("notify_thread_id") and timer.notify_thread_id not in alive.threads:
            raise RestoreError(
                f"{subject}: POSIX timer {timer.it_id} is for thread {timer.notify_thread_id}, which it has not"
            )
        if timer.clock_id in THREAD_CLOCKS and len(alive.threads) > 1:
            raise RestoreError(
                f"{subject}: POSIX timer {timer.it_id} uses the CPU time of one thread, which can't be restored"
            )


def _limit(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def _check_thread(pid: int, tid: int, core: CoreEntry, machine: Machine, dump: Dump) -> None:
    subject = f"task {pid}" if tid == pid else f"task {pid}, thread {tid}"
    thread = core.thread_core
    if thread.seccomp_mode != SeccompMode.SECCOMP_DISABLED:
        raise RestoreError(f"{subject}: is under seccomp, which can't be restored")
    if thread.sched_policy == 6:
        raise RestoreError(f"{subject}: has a deadline (SCHED_DEADLINE), which can't be restored")
    if any(not entry.seg_not_present for entry in core.thread_info.tls):
        raise RestoreError(f"{subject}: uses segments (set_thread_area), which can't be restored")
    if not thread.HasField("creds"):
        raise ImageError(dump.path(Kind.CORE, tid), "holds no credentials")
    creds = thread.creds
    for name, words in _capability_sets(creds).items():
        if name not in ("CapBnd", "CapInh") and words & ~machine.capabilities["CapPrm"]:
            lacking = words & ~machine.capabilities["CapPrm"]
            raise RestoreError(
                f"{subject}: had capabilities {lacking:#x} ({name}), which this process does not have to give"
            )
    for queue in (thread.signals_p, core.tc.signals_s):
        if any(len(signal.siginfo) != SIGINFO_SIZE for signal in queue.signals):
            raise ImageError(dump.path(Kind.CORE, tid), "a pending signal is not complete")


def _capability_sets(creds: CredsEntry) -> dict[str, int]:
    sets = (creds.cap_inh, creds.cap_prm, creds.cap_eff, creds.cap_bnd, creds.cap_amb)
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    return {
        name: sum(word << 32 * place for place, word in enumerate(words))
        for name, words in zip(names, sets, strict=True)
    }


class State:
    """Plans the state of tasks and threads. Data of calls is at ``plan.data``."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self._plan, self._machine = plan, machine

    def process(self, thread: int, pid: int, alive: Alive) -> None:
        """Plans the state of a process, except what must follow the credentials."""
        plan, data = self._plan, self._plan.data
        tc = alive.threads[pid].tc
        for signo, action in zip(SIGNALS, tc.sigactions, strict=True):
            if action.sigaction or action.flags or action.restorer or action.mask:
                record = struct.pack("<4Q", action.sigaction, action.flags, action.restorer, action.mask)
                label = f"set the action of signal {signo}"
                plan.call(thread, label, Nr.RT_SIGACTION, signo, data, 0, 8, data=record)
        plan.call(thread, "set the personality", Nr.PERSONALITY, tc.personality)
        if tc.child_subreaper:
            plan.call(thread, "become a subreaper", Nr.PRCTL, Prctl.SET_CHILD_SUBREAPER, 1)
        for bit in range(32):
            if tc.membarrier_registration_mask >> bit & 1:
                plan.call(thread, f"register membarrier {1 << bit}", Nr.MEMBARRIER, 1 << bit, 0, 0)
        if tc.HasField("oom_score_adj") and tc.oom_score_adj != self._machine.oom_score_adj:
            plan.write(
                f"/proc/{pid}/oom_score_adj",
                os.O_WRONLY,
                str(tc.oom_score_adj),
                f"set oom_score_adj of task {pid} (lowering it needs CAP_SYS_RESOURCE)",
            )
        for number, limit in enumerate(tc.rlimits.rlimits[:NR_RLIMITS]):
            record = struct.pack("<QQ", limit.cur, limit.max)
            label = f"set RLIMIT_{RLIMIT_NAMES[number]} to {_limit(limit.cur)} and {_limit(limit.max)}"
            plan.call(thread, label, Nr.PRLIMIT64, 0, number, data, 0, data=record)

    def thread(self, thread: int, core: CoreEntry, *, leader: bool) -> None:
        """Plans the state of a thread, including credentials. Blocked signals stay blocked."""
        plan, data, own = self._plan, self._plan.data, core.thread_core
        comm = (own.comm or core.tc.comm) if leader else own.comm
        plan.call(thread, "set the name", Nr.PRCTL, Prctl.SET_NAME, data, data=comm[:15] + b"\0")
        plan.call(
            thread,
            "set the address of the thread id",
            Nr.SET_TID_ADDRESS,
            core.thread_info.clear_tid_addr,
        )
        if own.futex_rla:
            label = "set the robust list"
            plan.call(thread, label, Nr.SET_ROBUST_LIST, own.futex_rla, own.futex_rla_len)
        if own.HasField("sas") and not own.sas.ss_flags & SS_DISABLE:
            record = struct.pack("<QIxxxxQ", own.sas.ss_sp, own.sas.ss_flags & SS_AUTODISARM, own.sas.ss_size)
            plan.call(thread, "set the alternate signal stack", Nr.SIGALTSTACK, data, 0, data=record)
        self._schedule(thread, own)
        self._credentials(thread, own.creds)
        plan.call(thread, "set the parent's death signal", Nr.PRCTL, Prctl.SET_PDEATHSIG, own.pdeath_sig)

    def _schedule(self, thread: int, own: ThreadCoreEntry) -> None:
        policy, priority = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
        if (own.sched_policy, own.sched_prio) != (policy, priority):
            self._plan.call(
                thread,
                "set the scheduling policy",
                Nr.SCHED_SETSCHEDULER,
                0,
                own.sched_policy,
                self._plan.data,
                data=struct.pack("<I", own.sched_prio),
            )
        if own.sched_nice != os.getpriority(os.PRIO_PROCESS, 0):
            self._plan.call(thread, "set the niceness", Nr.SETPRIORITY, 0, 0, own.sched_nice)

    def _credentials(self, thread: int, creds: CredsEntry) -> None:
        """With SECBIT_NO_SETUID_FIXUP, changes of user ids do not clear capabilities (capabilities(7))."""
        plan, data = self._plan, self._plan.data
        sets = _capability_sets(creds)
        groups = struct.pack(f"<{len(creds.groups)}I", *creds.groups)
        plan.call(thread, "set the groups", Nr.SETGROUPS, len(creds.groups), data, data=groups)
        label = "keep capabilities for a while"
        plan.call(thread, label, Nr.PRCTL, Prctl.SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)
        plan.call(thread, "set the group ids", Nr.SETRESGID, creds.gid, creds.egid, creds.sgid)
        plan.call(thread, "set the user ids", Nr.SETRESUID, creds.uid, creds.euid, creds.suid)
        plan.call(thread, "set the file system's group id", Nr.SETFSGID, creds.fsgid)
        plan.call(thread, "set the file system's user id", Nr.SETFSUID, creds.fsuid)
        for number in _bits(self._machine.capabilities["CapBnd"] & ~sets["CapBnd"]):
            plan.call(thread, f"drop capability {number}", Nr.PRCTL, Prctl.CAPBSET_DROP, number)
        plan.call(thread, "set the secure bits", Nr.PRCTL, Prctl.SET_SECUREBITS, creds.secbits)
        words = [
            sets[name] >> shift & 0xFFFFFFFF for shift in (0, 32) for name in ("CapEff", "CapPrm", "CapInh")
        ]
        record = struct.pack("<II6I", CAPABILITY_VERSION_3, 0, *words)
        plan.call(thread, "set the capabilities", Nr.CAPSET, data, data + 8, data=record)
        for number in _bits(sets["CapAmb"]):
            label = f"make capability {number} ambient"
            plan.call(thread, label, Nr.PRCTL, Prctl.CAP_AMBIENT, CAP_AMBIENT_RAISE, number)
        if creds.no_new_privs:
            plan.call(thread, "allow no new privileges", Nr.PRCTL, Prctl.SET_NO_NEW_PRIVS, 1)

    def late(self, threads: Sequence[tuple[int, int, CoreEntry]], pid: int, alive: Alive) -> None:
        """Plans what follows the credentials of all threads. ``threads``: (plan's thread, tid, core)."""
        plan, data = self._plan, self._plan.data
        leader, _, core = threads[0]
        if alive.mm.HasField("dumpable"):
            value = int(alive.mm.dumpable == 1)
            plan.call(leader, "set whether a core may be dumped", Nr.PRCTL, Prctl.SET_DUMPABLE, value)
        plan.drain(leader)
        self._timers(leader, core.tc)
        self._posix_timers(leader, core.tc)
        for signal in core.tc.signals_s.signals:
            signo = int.from_bytes(signal.siginfo[:4], "little")
            label = f"make signal {signo} pending"
            plan.call(leader, label, Nr.RT_SIGQUEUEINFO, pid, signo, data, data=signal.siginfo)
        for thread, tid, own in threads:
            self._pending(thread, pid, tid, own.thread_core.signals_p)

    def _pending(self, thread: int, pid: int, tid: int, queue: SignalQueueEntry) -> None:
        for signal in queue.signals:
            signo = int.from_bytes(signal.siginfo[:4], "little")
            label = f"make signal {signo} pending for the thread"
            args = (pid, tid, signo, self._plan.data)
            self._plan.call(thread, label, Nr.RT_TGSIGQUEUEINFO, *args, data=signal.siginfo)

    def _timers(self, thread: int, tc: TaskCoreEntry) -> None:
        for which, timer in enumerate((tc.timers.real, tc.timers.virt, tc.timers.prof)):
            if not _is_armed(timer):
                continue
            record = struct.pack("<4Q", timer.isec, timer.iusec, timer.vsec, timer.vusec)
            label = f"set interval timer {which}"
            self._plan.call(thread, label, Nr.SETITIMER, which, self._plan.data, 0, data=record)

    def _posix_timers(self, thread: int, tc: TaskCoreEntry) -> None:
        """Creates each timer with its id. Ids can't be chosen on all kernels: they count up from 0."""
        timers = sorted(tc.timers.posix, key=lambda timer: timer.it_id)
        if not timers:
            return
        plan, prctl = self._plan, Prctl.TIMER_CREATE_RESTORE_IDS
        if self._machine.chooses_timer_ids:
            plan.call(thread, "choose the ids of timers", Nr.PRCTL, prctl, TIMER_CREATE_RESTORE_IDS_ON)
        following = 0
        for timer in timers:
            while not self._machine.chooses_timer_ids and following < timer.it_id:
                self._make_posix_timer(
                    thread, following, CLOCK_MONOTONIC, struct.pack("<QiiI", 0, 0, SIGEV_NONE, 0)
                )
                plan.call(thread, f"delete timer {following} again", Nr.TIMER_DELETE, following)
                following += 1
            event = struct.pack(
                "<QiiI", timer.sival_ptr, timer.si_signo, timer.it_sigev_notify, timer.notify_thread_id
            )
            self._make_posix_timer(thread, timer.it_id, timer.clock_id, event)
            following = timer.it_id + 1
        if self._machine.chooses_timer_ids:
            plan.call(thread, "choose no ids of timers", Nr.PRCTL, prctl, TIMER_CREATE_RESTORE_IDS_OFF)
        for timer in timers:
            record = struct.pack("<4Q", timer.isec, timer.insec, timer.vsec, timer.vnsec)
            label = f"set timer {timer.it_id} (timer_create)"
            plan.call(thread, label, Nr.TIMER_SETTIME, timer.it_id, 0, plan.data, 0, data=record)

    def _make_posix_timer(self, thread: int, ident: int, clock: int, event: bytes) -> None:
        """``event``: struct sigevent, without trailing zeros."""
        data = event.ljust(SIGEVENT_SIZE, b"\0") + struct.pack("<i", ident)
        label = f"make timer {ident} of clock {clock} (timer_create)"
        address = self._plan.data
        self._plan.call(thread, label, Nr.TIMER_CREATE, clock, address, address + SIGEVENT_SIZE, data=data)

    def rseq(self, thread: int, own: ThreadCoreEntry) -> None:
        """Afterwards the kernel writes to the task's memory whenever it returns to the task."""
        entry = own.rseq_entry
        if own.HasField("rseq_entry") and entry.rseq_abi_pointer:
            args = (entry.rseq_abi_pointer, entry.rseq_abi_size, 0, entry.signature)
            self._plan.call(thread, "register restartable sequences", Nr.RSEQ, *args)


def _is_armed(timer: ItimerEntry) -> bool:
    return bool(timer.isec or timer.iusec or timer.vsec or timer.vusec)


def _bits(value: int) -> list[int]:
    return [number for number in range(64) if value >> number & 1]


def blocked(tc: TaskCoreEntry, own: ThreadCoreEntry, *, leader: bool) -> int:
    """The signal mask of a thread, bit n-1 for signal n."""
    if own.HasField("blk_sigset"):
        return own.blk_sigset
    return tc.blk_sigset if leader else 0
