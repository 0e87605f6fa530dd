"""Stopped threads: a typed interface to the ptrace calls of csrc/common/inject.c, dump_session.c and dump_task.c.

Call all functions from the same thread of dumptool: for the kernel the tracer is a thread. All raise ``DumpError``
with the thread's id, or ``TaskGoneError`` if the thread has been killed in the meantime.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

from dumptool import proc
from dumptool._ptrace import ffi, lib
from dumptool.errors import DumpError, TaskGoneError, system_error
from dumptool.proc import Vma

SIGINFO_SIZE = 128
MAX_PENDING = 4096
XSTATE_ROOM = 32768

ENDED = os.WEXITED | os.WNOHANG | 0x40000000  # __WALL
ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
SUSPEND_SECCOMP = 1 << 21
"""PTRACE_O_SUSPEND_SECCOMP of linux/ptrace.h."""
PATIENCE = 1.0
"""Seconds for a killed thread to exit."""
SEIZE_TRIES = 5
"""A process that calls execve all the time may do so between each of our calls and the look at what it has found."""
STACK_RESERVE = 1 << 16
"""Bytes kept free below stack pointers: a thread that runs on after dumptool was killed does not use more at once."""


class Same(IntEnum):
    """Resources that two processes may share, kcmp(2)."""

    FILE = lib.LP_SAME_FILE
    VM = lib.LP_SAME_VM
    FILES = lib.LP_SAME_FILES
    FS = lib.LP_SAME_FS
    SIGHAND = lib.LP_SAME_SIGHAND


def _check(outcome: int, tid: int, what: str) -> None:
    if outcome:
        raise system_error(-outcome, f"thread {tid}: {what}")


def seize(tid: int) -> None:
    """Attaches without stopping, unless the thread is already traced by us.

    Raises ``DumpError`` if another process traces it or tracing is not permitted, ``TaskGoneError`` if it has exited.
    """
    for _ in range(SEIZE_TRIES):
        outcome = lib.lp_seize(tid)
        if outcome != -errno.EPERM:
            break
        status = proc.status(tid)
        if status["State"][0] in "ZX":
            raise TaskGoneError(f"thread {tid}: has ended")
        if int(status["TracerPid"]) == threading.get_native_id():
            return
        if int(status["TracerPid"]):
            break
        # EPERM without a tracer: execve may have replaced a dead thread in between.
    _check(outcome, tid, "can't be traced")


def interrupt(tid: int) -> None:
    """Asks a seized thread to stop."""
    _check(lib.lp_interrupt(tid), tid, "can't be stopped")


def poll_stop(tid: int) -> int | None:
    """The signal of the job-control stop that the thread was in, 0 for none; None: it has not stopped yet."""
    group_stop = ffi.new("int *")
    outcome = lib.lp_poll_stop(tid, group_stop)
    if outcome == -errno.EAGAIN:
        return None
    _check(outcome, tid, "did not stop")
    return int(group_stop[0])


def drop_sigstop(tid: int) -> None:
    """Removes a pending SIGSTOP of the process without stopping it. The thread stays traced."""
    _check(lib.lp_drop_sigstop(tid), tid, "does not take its signals")


def is_stopped(tid: int) -> bool:
    """Whether the thread is in a ptrace stop of ours: it may have been killed, or replaced by execve, meanwhile."""
    return bool(lib.lp_get_sigmask(tid, ffi.new("uint64_t *")) == 0)


def reap(tid: int) -> bool:
    """Reaps a traced thread that has exited; False if it has not exited yet.

    Until it is reaped, its process can neither end nor call execve (ptrace(2)). Any thread of dumptool may call this.
    """
    with suppress(ChildProcessError, TaskGoneError):
        # For traced threads waitid also reports stops, whatever its options (wait_task_stopped() in kernel/exit.c):
        # ignore those.
        seen = os.waitid(os.P_PID, tid, ENDED | os.WNOWAIT)
        if seen is None or seen.si_code not in ENDS:
            return False
        is_own_child = proc.stat(tid).ppid == os.getpid() and int(proc.status(tid)["Tgid"]) == tid
        if not is_own_child:
            os.waitid(os.P_PID, tid, ENDED)
    return True


def detach(tid: int) -> None:
    """Lets the thread go on. If it has been killed, reaps it."""
    outcome = lib.lp_detach(tid)
    if outcome != -errno.ESRCH:
        _check(outcome, tid, "can't be let go")
        return
    deadline = time.monotonic() + PATIENCE
    while not reap(tid) and time.monotonic() < deadline:
        time.sleep(0.0005)


@dataclass(frozen=True, slots=True)
class Registers:
    """General registers, in the order and with the names of struct user_regs_struct (sys/user.h)."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int


def registers(tid: int) -> Registers:
    """The registers, after leaving a restartable sequence; those of an interrupted system call are not changed."""
    regs = ffi.new("struct user_regs_struct *")
    _check(lib.lp_settled_regs(tid, regs), tid, "no registers")
    return Registers(*(getattr(regs, name) for name in Registers.__slots__))


def set_registers(tid: int, regs: Registers) -> None:
    """Sets all registers."""
    raw = ffi.new("struct user_regs_struct *", asdict(regs))
    _check(lib.lp_set_regs(tid, raw), tid, "can't set its registers")


def xstate(tid: int) -> bytes:
    """The XSAVE area in the standard layout; XCR0 is at byte 464."""
    buffer, size = ffi.new("unsigned char[]", XSTATE_ROOM), ffi.new("size_t *", XSTATE_ROOM)
    _check(lib.lp_get_xstate(tid, buffer, size), tid, "no floating-point registers")
    return bytes(ffi.buffer(buffer, size[0]))


def xstate_components() -> dict[int, tuple[int, int]]:
    """Component number: (offset, size) in bytes, of the XSAVE components that this CPU has."""
    found = {}
    for number in range(2, 20):
        offset, size = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        lib.lp_xstate_component(number, offset, size)
        if size[0]:
            found[number] = (int(offset[0]), int(size[0]))
    return found


def signal_mask(tid: int) -> int:
    """Blocked signals: bit n-1 for signal n."""
    mask = ffi.new("uint64_t *")
    _check(lib.lp_get_sigmask(tid, mask), tid, "no signal mask")
    return int(mask[0])


def pending_signals(tid: int, *, shared: bool) -> list[bytes]:
    """siginfo_t of each pending signal, oldest first. ``shared``: of the process, else of the thread."""
    buffer, count = ffi.new("unsigned char[]", MAX_PENDING * SIGINFO_SIZE), ffi.new("size_t *")
    _check(lib.lp_pending_signals(tid, shared, buffer, MAX_PENDING, count), tid, "no list of pending signals")
    raw = bytes(ffi.buffer(buffer, count[0] * SIGINFO_SIZE))
    return [raw[at : at + SIGINFO_SIZE] for at in range(0, len(raw), SIGINFO_SIZE)]


def robust_list(tid: int) -> tuple[int, int]:
    """Address and size of the head of the robust futex list."""
    head, size = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _check(lib.lp_robust_list(tid, head, size), tid, "no robust futex list")
    return int(head[0]), int(size[0])


@dataclass(frozen=True, slots=True)
class Rseq:
    """The registration of restartable sequences; address 0: none."""

    address: int
    size: int
    signature: int


def rseq(tid: int) -> Rseq:
    """The registration of a stopped thread."""
    found = ffi.new("struct lp_rseq *")
    _check(lib.lp_rseq(tid, found), tid, "no rseq configuration")
    return Rseq(found.address, found.size, found.signature)


def dispatches_syscalls(tid: int) -> bool:
    """Whether a stopped thread has Syscall User Dispatch on, prctl(2)."""
    on = ffi.new("int *")
    _check(lib.lp_dispatches_syscalls(tid, on), tid, "can't be asked for Syscall User Dispatch")
    return bool(on[0])


def same(pid: int, other: int, kind: Same, fd: int = 0, other_fd: int = 0) -> bool:
    """Whether two processes share a resource (kcmp(2)). ``fd``, ``other_fd``: for ``Same.FILE``."""
    answer = ffi.new("int *")
    _check(lib.lp_same(pid, other, int(kind), fd, other_fd, answer), pid, f"kcmp with {other}")
    return bool(answer[0])


def take_fd(pid: int, fd: int) -> int:
    """Duplicates a descriptor of the process into dumptool, close-on-exec (pidfd_getfd(2))."""
    here = ffi.new("int *")
    _check(lib.lp_take_fd(pid, fd, here), pid, f"fd {fd} can't be taken")
    return int(here[0])


def take_fd_by(pidfd: int, fd: int, whose: str) -> int:
    """As ``take_fd``, of the process of a pidfd. ``whose``: names it in errors."""
    here = ffi.new("int *")
    outcome = lib.lp_take_fd_by(pidfd, fd, here)
    if outcome:
        raise system_error(-outcome, f"{whose}: fd {fd} can't be taken")
    return int(here[0])


@contextmanager
def seccomp_suspended(tid: int) -> Iterator[bool]:
    """The seccomp filter of a stopped thread does not apply in the block (PTRACE_O_SUSPEND_SECCOMP, ptrace(2)).

    Yields False if that is impossible: it needs CAP_SYS_ADMIN, a kernel with CONFIG_CHECKPOINT_RESTORE, and a dumptool
    that is not under seccomp itself.
    """
    if proc.status(tid).get("Seccomp", "0") == "0":
        yield True
        return
    if lib.lp_set_options(tid, SUSPEND_SECCOMP):
        yield False
        return
    try:
        yield True
    finally:
        _check(lib.lp_set_options(tid, 0), tid, "can't be put under its seccomp filter again")


def peek_pipe(fd: int, size: int) -> bytes:
    """Copies the contents of a pipe without consuming them. ``fd``: ours; ``size``: the pipe's capacity in bytes."""
    buffer, count = ffi.new("unsigned char[]", size), ffi.new("size_t *")
    outcome = lib.lp_peek_pipe(fd, buffer, size, count)
    if outcome:
        raise system_error(-outcome, "the contents of a pipe can't be copied (see fs.pipe-max-size)")
    return bytes(ffi.buffer(buffer, count[0]))


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Bytes of the process's memory. Raises ``DumpError`` unless all can be read."""
    buffer = ffi.new("unsigned char[]", size)
    _check(lib.lp_read_memory(pid, address, buffer, size), pid, f"can't read {size} bytes at {address:#x}")
    return bytes(ffi.buffer(buffer))


def write_memory(pid: int, address: int, data: bytes) -> None:
    """Writes to the process's memory."""
    outcome = lib.lp_write_memory(pid, address, ffi.from_buffer(data), len(data))
    _check(outcome, pid, f"can't write {len(data)} bytes at {address:#x}")


SYSCALL_RETURN = b"\x0f\x05\xc3"
SIGRETURN = b"\xb8\x0f\0\0\0\x0f\x05"
OWN_CODE = SYSCALL_RETURN + SIGRETURN
"""``syscall; ret`` and ``mov $15, %eax; syscall`` (rt_sigreturn)."""
PADDING = 128
"""Zeros at the end of the vdso that mark it as unused: more than an ELF section header (64 bytes) may end in."""


class Gadgets:
    """The location of the two pieces of code, and of memory, that a ``Session`` needs (csrc/dump/dump_session.h).

    A program without signal handlers may lack rt_sigreturn (static ones with musl do). Then both pieces are written
    to the unused end of the vdso for the time of a session (``in_place``).

    ``room``: see ``find_room``.
    """

    def __init__(self, pid: int, vmas: Sequence[Vma]) -> None:
        """Searches executable mappings. The process may run meanwhile. Raises ``DumpError``."""
        self._lent = 0
        self.pointer = ffi.new("struct lp_gadgets *")
        self.room = 0
        for vma in sorted(
            vmas, key=lambda vma: "libc" not in vma.name
        ):  # which has both; a server's own code is long
            readable_code = vma.prot & 5 == 5
            outcome = lib.lp_find_gadgets(pid, vma.start, vma.end, self.pointer) if readable_code else -1
            if outcome == 0:
                call, back = int(self.pointer.syscall_ip), int(self.pointer.sigreturn_ip)
                size = 9 if read_memory(pid, back, 1) == b"\x48" else 7
                self._code = [(call, read_memory(pid, call, 3)), (back, read_memory(pid, back, size))]
                return
            if outcome == -errno.ESRCH:
                raise TaskGoneError(f"pid {pid}: no such process (any more)")
        for vma in vmas:
            if vma.name == "[vdso]" and not any(read_memory(pid, vma.end - PADDING, PADDING)):
                self._lent = vma.end - len(OWN_CODE)
                self.pointer.syscall_ip = self._lent
                self.pointer.sigreturn_ip = self._lent + len(SYSCALL_RETURN)
                self._code = [(self._lent, bytes(len(OWN_CODE)))]
                return
        raise DumpError(
            f"pid {pid}: no system call can be run in it safely: its code has no `syscall; ret` or no return from "
            "signal handlers, and its vdso has no room for them"
        )

    @contextmanager
    def in_place(self, pid: int) -> Iterator[None]:
        """The code is in place for the block. If dumptool is killed meanwhile it stays there, unused."""
        if not self._lent:
            yield
            return
        _overwrite(pid, self._lent, OWN_CODE)
        try:
            yield
        finally:
            _overwrite(pid, self._lent, bytes(len(OWN_CODE)))

    def are_there(self, pid: int, vmas: Sequence[Vma]) -> bool:
        """Whether the same code is still in place: the process may have called execve or munmap."""
        return all(
            any(vma.prot & 5 == 5 and vma.start <= place and place + len(code) <= vma.end for vma in vmas)
            and read_memory(pid, place, len(code)) == code
            for place, code in self._code
        )


def _overwrite(pid: int, address: int, data: bytes) -> None:
    """Writes to memory that the process itself can't write, as a debugger does for a breakpoint."""
    try:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, address)
    except OSError as error:
        number = errno.ESRCH if error.errno in (None, errno.ENOENT) else error.errno
        raise system_error(number, f"pid {pid}: can't write at {address:#x}") from None


def find_room(pid: int, vmas: Sequence[Vma], tids: Sequence[int]) -> int:
    """The end address of unused memory in a frozen process, for a ``Session``; 0 if there is none.

    It is at the end of the main stack, which only a thread that has reached it uses: either pages that were never
    written, or the range below the stack into which it has not grown yet.
    """
    for before, stack in pairwise(vmas):
        if stack.name != "[stack]" or stack.prot & 3 != 3:
            continue
        end: int = stack.start + lib.LP_SESSION_ROOM
        pointers = [registers(tid).rsp for tid in tids]
        used = range(stack.start, end + STACK_RESERVE)
        if (
            used.stop <= stack.end
            and not any(pointer in used for pointer in pointers)
            and not any(read_memory(pid, stack.start, lib.LP_SESSION_ROOM))
        ):
            return end
        below: int = stack.start
        if any(pointer in range(below, below + STACK_RESERVE) for pointer in pointers):
            below -= STACK_RESERVE  # the thread may use this range after dumptool is killed
        if before.end <= below - lib.LP_SESSION_ROOM:
            return below
    return 0


class Session:
    """System calls run by a stopped thread, which is not harmed if dumptool is killed (``session``)."""

    def __init__(self, tid: int, raw: Any) -> None:
        self._tid, self._raw = tid, raw

    @property
    def scratch(self) -> int:
        """Address of ``LP_SCRATCH_SIZE`` bytes for the arguments and results of calls."""
        return int(self._raw.scratch)

    def call(self, number: int, *args: int) -> int:
        """Runs a system call. Returns its result, -errno for a failure."""
        values = ffi.new("uint64_t[6]", [arg & (1 << 64) - 1 for arg in args])
        result = ffi.new("long *")
        _check(lib.lp_session_call(self._raw, number, values, result), self._tid, f"system call {number}")
        return int(result[0])

    def checked(self, number: int, *args: int) -> int:
        """Runs a system call. Raises ``DumpError`` if it fails."""
        result = self.call(number, *args)
        if -4096 < result < 0:
            raise DumpError(f"thread {self._tid}: system call {number} in it: {os.strerror(-result)}")
        return result

    def put(self, data: bytes) -> int:
        """Writes ``data`` to the scratch memory and returns its address."""
        if len(data) > lib.LP_SCRATCH_SIZE:
            raise ValueError("too much for the scratch memory")
        write_memory(self._tid, self.scratch, data)
        return self.scratch

    def filled(self, layout: str, number: int, arguments: Callable[[int], Sequence[int]]) -> tuple[int, ...]:
        """Runs a system call that fills a struct, and returns its fields.

        ``layout``: for ``struct``. ``arguments``: of the call, given the struct's address.
        """
        shape = struct.Struct(layout)
        address = self.put(bytes(shape.size))
        self.checked(number, *arguments(address))
        return shape.unpack(read_memory(self._tid, address, shape.size))


@contextmanager
def session(tid: int, gadgets: Gadgets) -> Iterator[Session]:
    """Runs system calls in a stopped thread. At the end of the block the thread is unchanged."""
    with gadgets.in_place(tid):
        yield from _session(tid, gadgets)


def _session(tid: int, gadgets: Gadgets) -> Iterator[Session]:
    raw = ffi.new("struct lp_session *")
    outcome = lib.lp_session_begin(raw, tid, gadgets.pointer, gadgets.room)
    if outcome == -errno.EFAULT and gadgets.room:  # the stack can't grow (RLIMIT_STACK)
        outcome = lib.lp_session_begin(raw, tid, gadgets.pointer, 0)
    if outcome == -errno.EFAULT:
        raise DumpError(f"thread {tid}: no room for a signal frame below its stack pointer")
    if outcome == -errno.ENOTSUP:
        raise DumpError(f"thread {tid}: runs 32-bit code or has registers that dumptool does not support")
    _check(outcome, tid, "can't run system calls in it")
    try:
        yield Session(tid, raw)
    finally:
        _check(lib.lp_session_end(raw), tid, "can't be restored to its state")
