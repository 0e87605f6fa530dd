"""Core images: the state of each thread, and of each process except memory and files (images_spec/core.md).

State that /proc does not show is read by system calls that a stopped thread runs (``dumptool.tracee.session``).
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass

from dumptool import proc, tracee
from dumptool.errors import DumpError
from dumptool.freeze import Process
from dumptool.registers import (
    ERESTART_RESTARTBLOCK,
    NR_RESTART_SYSCALL,
    called_again_after_a_stop,
    hidden_call,
    resumable,
    thread_info,
)
from dumptool.survey import Task
from dumptool.tracee import Registers
from images_spec.messages import (
    CoreEntry,
    CredsEntry,
    ItimerEntry,
    Machine,
    PosixTimerEntry,
    RlimitEntry,
    RseqEntry,
    SaEntry,
    SiginfoEntry,
    SignalQueueEntry,
    TaskCoreEntry,
    TaskKobjIdsEntry,
    TaskRlimitsEntry,
    TaskState,
    TaskTimersEntry,
    ThreadCoreEntry,
    ThreadSasEntry,
)

NR_BRK = 12
NR_RT_SIGACTION = 13
NR_GETITIMER = 36
NR_TIMER_GETTIME = 224
NR_TIMER_GETOVERRUN = 225
NR_SIGALTSTACK = 131
NR_PRCTL = 157
NR_MEMBARRIER = 324

PR_GET_PDEATHSIG = 2
PR_GET_DUMPABLE = 3
PR_GET_SECUREBITS = 27
PR_GET_CHILD_SUBREAPER = 37
PR_GET_TID_ADDRESS = 40
PR_GET_THP_DISABLE = 42
MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9

CODE_BEFORE = 7
"""Bytes of code that ``hidden_call`` examines."""

SIGNALS = [signal for signal in range(1, 65) if signal not in (9, 19)]
SIGSET_SIZE = 8
SCHED_RT = (1, 2)


@dataclass(frozen=True, slots=True)
class Inside:
    """Memory settings that only system calls of the process return; part of the mm image."""

    brk: int
    dumpable: int
    thp_disabled: bool


@dataclass(frozen=True, slots=True)
class Captured:
    """The core images of a process by thread id, and what the mm image needs.

    ``stack_pointers``: of all threads.
    """

    cores: dict[int, CoreEntry]
    inside: Inside
    stack_pointers: tuple[int, ...]


def capture(
    task: Task, gadgets: tracee.Gadgets, components: dict[int, tuple[int, int]], ids: TaskKobjIdsEntry
) -> Captured:
    """Captures all threads of a frozen process, which is unchanged afterwards. Raises ``DumpError``."""
    cores, pointers = {}, []
    inside: Inside | None = None
    handlers = _Handlers(task.pid)
    for tid in task.process.threads:
        regs, xstate = tracee.registers(tid), tracee.xstate(tid)
        mask = tracee.signal_mask(tid)
        signal = handlers.about_to_run(tid, mask)
        pointers.append(regs.rsp)
        with tracee.session(tid, gadgets) as session:
            ready = resumable(
                regs,
                waits_in=_waits_in(task, tid, regs),
                handler_flags=_sigaction(session, signal).flags if signal else None,
            )
            info = thread_info(ready, xstate, components, _tid_address(session))
            core = CoreEntry(
                mtype=Machine.MACHINE_X86_64,
                thread_info=info,
                thread_core=_thread_core(task, tid, mask, session),
            )
            if tid == task.pid:
                core.tc.CopyFrom(_task_core(task, mask, session))
                core.ids.CopyFrom(ids)
                inside = Inside(
                    brk=session.checked(NR_BRK, 0),
                    dumpable=session.checked(NR_PRCTL, PR_GET_DUMPABLE),
                    thp_disabled=bool(session.checked(NR_PRCTL, PR_GET_THP_DISABLE, 0, 0, 0, 0)),
                )
        cores[tid] = core
    if inside is None:
        raise DumpError(f"pid {task.pid}: its first thread has exited")
    return Captured(cores, inside, tuple(pointers))


def _waits_in(task: Task, tid: int, regs: Registers) -> int | None:
    """The number of the call that a thread in restart_syscall(2) originally made; None if unknown."""
    if regs.orig_rax != NR_RESTART_SYSCALL or (1 << 64) - regs.rax != ERESTART_RESTARTBLOCK:
        return None
    code = b""
    with suppress(DumpError):  # the code may be executable only
        code = tracee.read_memory(task.pid, regs.rip - CODE_BEFORE, CODE_BEFORE)
    asleep = task.asleep.get(tid)
    # What was read before the freeze applies only if the thread still sleeps in the same call.
    known = asleep is not None and asleep.registers == (
        regs.rdi,
        regs.rsi,
        regs.rdx,
        regs.r10,
        regs.rsp,
        regs.rip,
    )
    return hidden_call(code, asleep.kernel_function if asleep is not None and known else "", regs.rdi)


class _Handlers:
    """Finds threads that were stopped after a signal was sent and before its handler runs."""

    def __init__(self, pid: int) -> None:
        self._pid, self._shared_taken = pid, 0

    def about_to_run(self, tid: int, mask: int) -> int:
        """The number of the signal whose handler the thread runs next; 0 for none.

        ``mask``: the thread's own signal mask. A call such as sigsuspend(2) replaces it temporarily; a signal that only
        the temporary mask lets through is delivered when that call is made again.
        """
        fields = proc.status(self._pid, tid)
        own, shared, blocked, caught = (
            int(fields[name], 16) for name in ("SigPnd", "ShdPnd", "SigBlk", "SigCgt")
        )
        blocked |= mask
        shared &= ~self._shared_taken & ~blocked & caught
        self._shared_taken |= shared  # only one thread takes a signal that was sent to the process
        taken = own & ~blocked & caught or shared
        return (taken & -taken).bit_length()


def settle(process: Process) -> None:
    """Hides the stop from threads of a just frozen process that are in a call which fails after a stop (signal(7))."""
    for tid in process.threads:
        again = called_again_after_a_stop(tracee.registers(tid))
        if again is not None:
            tracee.set_registers(tid, again)


def zombie(pid: int) -> CoreEntry:
    """The core image of a zombie."""
    stat = proc.stat(pid)
    task_core = TaskCoreEntry(
        task_state=TaskState.TASK_DEAD,
        exit_code=stat.exit_code,
        personality=0,
        flags=stat.flags,
        blk_sigset=0,
        comm=stat.comm,
    )
    return CoreEntry(mtype=Machine.MACHINE_X86_64, tc=task_core)


def _tid_address(session: tracee.Session) -> int:
    (address,) = session.filled("<Q", NR_PRCTL, lambda at: (PR_GET_TID_ADDRESS, at, 0, 0, 0))
    return address


def _thread_core(task: Task, tid: int, mask: int, session: tracee.Session) -> ThreadCoreEntry:
    stat = proc.stat(task.pid, tid)
    robust, robust_size = tracee.robust_list(tid)
    stack, flags, size = session.filled("<QixxxxQ", NR_SIGALTSTACK, lambda at: (0, at))
    (death_signal,) = session.filled("<i", NR_PRCTL, lambda at: (PR_GET_PDEATHSIG, at, 0, 0, 0))
    core = ThreadCoreEntry(
        futex_rla=robust,
        futex_rla_len=robust_size,
        sched_nice=stat.nice,
        sched_policy=stat.policy,
        blk_sigset=mask,
        sas=ThreadSasEntry(ss_sp=stack, ss_size=size, ss_flags=flags & 0xFFFFFFFF),
        signals_p=_queue(tracee.pending_signals(tid, shared=False)),
        creds=credentials(
            proc.status(task.pid, tid), session.checked(NR_PRCTL, PR_GET_SECUREBITS, 0, 0, 0, 0)
        ),
        comm=stat.comm,
    )
    if stat.policy in SCHED_RT:
        core.sched_prio = stat.rt_priority
    if death_signal:
        core.pdeath_sig = death_signal
    rseq = tracee.rseq(tid)
    if rseq.address:
        core.rseq_entry.CopyFrom(
            RseqEntry(rseq_abi_pointer=rseq.address, rseq_abi_size=rseq.size, signature=rseq.signature)
        )
    return core


def _task_core(task: Task, mask: int, session: tracee.Session) -> TaskCoreEntry:
    pid = task.pid
    stopped = task.process.stop_signal
    (subreaper,) = session.filled("<i", NR_PRCTL, lambda at: (PR_GET_CHILD_SUBREAPER, at, 0, 0, 0))
    core = TaskCoreEntry(
        task_state=TaskState.TASK_STOPPED if stopped else TaskState.TASK_ALIVE,
        exit_code=0,
        personality=int(proc.read_text(pid, "personality"), 16),
        flags=task.stat.flags,
        blk_sigset=mask,
        comm=task.stat.comm,
        timers=TaskTimersEntry(
            real=_itimer(session, 0),
            virt=_itimer(session, 1),
            prof=_itimer(session, 2),
            posix=[_posix_timer(session, timer) for timer in _posix_timers(pid)],
        ),
        rlimits=TaskRlimitsEntry(
            rlimits=[
                RlimitEntry(cur=soft, max=hard)
                for soft, hard in proc.parse_limits(proc.read_text(pid, "limits"))
            ]
        ),
        signals_s=_queue(tracee.pending_signals(pid, shared=True)),
        oom_score_adj=int(proc.read_text(pid, "oom_score_adj")),
        sigactions=[_sigaction(session, signal) for signal in SIGNALS],
        child_subreaper=bool(subreaper),
    )
    if stopped:
        core.stop_signo = stopped
    registrations = session.call(NR_MEMBARRIER, MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0)
    if registrations > 0:  # EINVAL before Linux 6.3
        core.membarrier_registration_mask = registrations
    return core


def _queue(signals: list[bytes]) -> SignalQueueEntry:
    return SignalQueueEntry(signals=[SiginfoEntry(siginfo=siginfo) for siginfo in signals])


def _itimer(session: tracee.Session, which: int) -> ItimerEntry:
    interval, micro, value, value_micro = session.filled("<QQQQ", NR_GETITIMER, lambda at: (which, at))
    return ItimerEntry(isec=interval, iusec=micro, vsec=value, vusec=value_micro)


def _posix_timers(pid: int) -> list[proc.PosixTimer]:
    return proc.parse_timers(proc.read_text(pid, "timers"))


def _posix_timer(session: tracee.Session, timer: proc.PosixTimer) -> PosixTimerEntry:
    interval, nano, value, value_nano = session.filled(
        "<QQQQ", NR_TIMER_GETTIME, lambda at: (timer.ident, at)
    )
    entry = PosixTimerEntry(
        it_id=timer.ident,
        clock_id=timer.clock & 0xFFFFFFFF,
        si_signo=timer.signal,
        it_sigev_notify=timer.notify,
        sival_ptr=timer.value,
        overrun=session.checked(NR_TIMER_GETOVERRUN, timer.ident),
        isec=interval,
        insec=nano,
        vsec=value,
        vnsec=value_nano,
    )
    if timer.thread is not None:
        entry.notify_thread_id = timer.thread
    return entry


def _sigaction(session: tracee.Session, signal: int) -> SaEntry:
    handler, flags, restorer, mask = session.filled(
        "<QQQQ", NR_RT_SIGACTION, lambda at: (signal, 0, at, SIGSET_SIZE)
    )
    return SaEntry(sigaction=handler, flags=flags, restorer=restorer, mask=mask, compat_sigaction=False)


def credentials(status: dict[str, str], securebits: int) -> CredsEntry:
    """Credentials of a thread, from its /proc status (proc_pid_status(5))."""
    uid, euid, suid, fsuid = map(int, status["Uid"].split())
    gid, egid, sgid, fsgid = map(int, status["Gid"].split())

    def capabilities(name: str) -> tuple[int, ...]:
        return struct.unpack("<II", int(status[name], 16).to_bytes(8, "little"))

    return CredsEntry(
        uid=uid,
        gid=gid,
        euid=euid,
        egid=egid,
        suid=suid,
        sgid=sgid,
        fsuid=fsuid,
        fsgid=fsgid,
        cap_inh=capabilities("CapInh"),
        cap_prm=capabilities("CapPrm"),
        cap_eff=capabilities("CapEff"),
        cap_bnd=capabilities("CapBnd"),
        secbits=securebits,
        groups=map(int, status["Groups"].split()),
        no_new_privs=int(status["NoNewPrivs"]),
        cap_amb=capabilities("CapAmb"),
    )
