"""Registers in the form of core images (images_spec/core.md)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace

from dumptool.errors import DumpError
from dumptool.tracee import Registers
from images_spec.interrupted import (
    ALWAYS_EINTR,
    NR_CLOCK_NANOSLEEP,
    NR_FUTEX,
    NR_NANOSLEEP,
    NR_POLL,
    SYSCALL_INSN_SIZE,
    TIMED_WAITS,
    again,
)
from images_spec.messages import (
    ThreadInfoX86,
    UserDesc,
    UserX86FpregsEntry,
    UserX86RegsEntry,
    UserX86XsaveEntry,
    X86Mode,
)

EINTR = 4
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
"""Internal to the kernel (include/linux/errno.h): in rax of a thread that is stopped in an interrupted system call."""
NR_RESTART_SYSCALL = 219
SA_RESTART = 0x10000000

FIRST_TLS_ENTRY = 12
"""GDT_ENTRY_TLS_MIN of x86_64. 64-bit code does not use these three entries."""

XCR0 = 464
XSTATE_BV = 512
COMPONENTS: Mapping[int, tuple[str, str]] = {
    2: ("ymmh_space", "I"),
    3: ("bndreg_state", "Q"),
    4: ("bndcsr_state", "Q"),
    5: ("opmask_reg", "Q"),
    6: ("zmm_upper", "Q"),
    7: ("hi16_zmm", "Q"),
    9: ("pkru", "I"),
}
"""Component number (Intel SDM volume 1, 13.1): field of UserX86XsaveEntry, struct type of its values."""


def resumable(regs: Registers, *, waits_in: int | None = None, handler_flags: int | None = None) -> Registers:
    """The registers with which the thread can go on in user mode, in another process, too.

    An interrupted system call is made again. ``waits_in``: the original call of a thread in restart_syscall(2), which
    hides it; if None, that call fails with EINTR. ``handler_flags``: SA_* flags of the handler that runs
    next, if a signal is about to be delivered; then signal(7) defines whether the call is made again or fails.
    """
    number = regs.orig_rax
    if number >> 63:
        return regs
    error = (1 << 64) - regs.rax
    if error == ERESTART_RESTARTBLOCK and number == NR_RESTART_SYSCALL and waits_in is not None:
        number = waits_in
    if error not in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK):
        return regs
    fails = error == ERESTART_RESTARTBLOCK and number == NR_RESTART_SYSCALL
    if handler_flags is not None and error != ERESTARTNOINTR:
        fails = error != ERESTARTSYS or not handler_flags & SA_RESTART
    return replace(regs, rax=(1 << 64) - EINTR) if fails else _again(regs, number)


def called_again_after_a_stop(regs: Registers) -> Registers | None:
    """For a call that fails with EINTR after every stop: the registers with which the kernel makes it again.

    The kernel makes it fail anyway if a signal handler runs first when the thread goes on.
    """
    if (1 << 64) - regs.rax == EINTR and regs.orig_rax in ALWAYS_EINTR:
        return replace(regs, rax=(1 << 64) - ERESTARTNOHAND)
    return None


def _again(regs: Registers, number: int) -> Registers:
    rdi, rsi, rdx, r10 = regs.rdi, regs.rsi, regs.rdx, regs.r10
    if (1 << 64) - regs.rax == ERESTART_RESTARTBLOCK:
        rdi, rsi, rdx, r10 = again(number, (rdi, rsi, rdx, r10))
    rip = regs.rip - SYSCALL_INSN_SIZE
    return replace(regs, rax=number, orig_rax=number, rip=rip, rdi=rdi, rsi=rsi, rdx=rdx, r10=r10)


def hidden_call(code: bytes, kernel_function: str, rdi: int) -> int | None:
    """The number of the call that a thread in restart_syscall(2) originally made; None if unknown.

    ``code``: the bytes before the thread's instruction pointer. Compilers and C libraries usually load the number
    right before `syscall`. Else it is derived from ``kernel_function``, in which the thread sleeps
    (proc_pid_wchan(5)), and from its first argument.
    """
    load = code[-7:]
    if len(load) == 7 and load[0] == 0xB8 and load[5:] == b"\x0f\x05":  # mov eax, number; syscall
        number = int.from_bytes(load[1:5], "little")
        if number in TIMED_WAITS:
            return number
    if kernel_function.startswith("futex"):
        return NR_FUTEX
    if "poll" in kernel_function:
        return NR_POLL
    if "sleep" in kernel_function or kernel_function in ("do_syscall_64", "__x64_sys_restart_syscall"):
        return NR_CLOCK_NANOSLEEP if _is_clock(rdi) else NR_NANOSLEEP  # else: a pointer
    return None


def _is_clock(value: int) -> bool:
    """Whether a value may be a clockid_t: a small number, or a negative int made of a pid (clock_getres(2))."""
    return value < 16 or (value >> 32 in (0, 0xFFFFFFFF) and value & 0xFFFFFFFF >= 0xFC000000)


def gpregs(regs: Registers) -> UserX86RegsEntry:
    """General-purpose registers."""
    return UserX86RegsEntry(
        **{
            name.removeprefix("r") if name in _LEGACY else name: getattr(regs, name)
            for name in Registers.__slots__
            if name not in ("orig_rax", "eflags")
        },
        orig_ax=regs.orig_rax,
        flags=regs.eflags,
        mode=X86Mode.X86_NATIVE,
    )


_LEGACY = frozenset({"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rip"})


def fpregs(xstate: bytes, components: Mapping[int, tuple[int, int]]) -> UserX86FpregsEntry:
    """Floating-point and vector registers of an XSAVE area in the standard layout.

    ``components``: component number of this CPU: (offset, size) in bytes. Raises ``DumpError`` for components in use
    that images have no field for (AMX tiles).
    """
    cwd, swd, twd, fop, rip, rdp, mxcsr, mxcsr_mask = struct.unpack_from("<HHHHQQII", xstate)
    enabled, used = (struct.unpack_from("<Q", xstate, at)[0] for at in (XCR0, XSTATE_BV))
    unknown = used & ~sum(1 << number for number in (0, 1, *COMPONENTS))
    if unknown:
        raise DumpError(f"registers in use that images can't hold (xsave components {unknown:#x})")
    xsave = UserX86XsaveEntry(xstate_bv=used)
    for number, (name, kind) in COMPONENTS.items():
        if enabled >> number & 1:
            offset, size = components[number]
            count = size // struct.calcsize(kind)
            getattr(xsave, name).extend(struct.unpack_from(f"<{count}{kind}", xstate, offset))
    return UserX86FpregsEntry(
        cwd=cwd,
        swd=swd,
        twd=twd,
        fop=fop,
        rip=rip,
        rdp=rdp,
        mxcsr=mxcsr,
        mxcsr_mask=mxcsr_mask,
        st_space=struct.unpack_from("<32I", xstate, 32),
        xmm_space=struct.unpack_from("<64I", xstate, 160),
        xsave=xsave,
    )


def thread_info(
    regs: Registers, xstate: bytes, components: Mapping[int, tuple[int, int]], clear_tid_address: int
) -> ThreadInfoX86:
    """All registers of a thread. ``regs``: as from ``resumable``; ``xstate``, ``components``: as for ``fpregs``."""
    return ThreadInfoX86(
        clear_tid_addr=clear_tid_address,
        gpregs=gpregs(regs),
        fpregs=fpregs(xstate, components),
        tls=[
            UserDesc(
                entry_number=entry,
                base_addr=0,
                limit=0,
                seg_32bit=False,
                contents_h=False,
                contents_l=False,
                read_exec_only=True,
                limit_in_pages=False,
                seg_not_present=True,
                usable=False,
            )
            for entry in range(FIRST_TLS_ENTRY, FIRST_TLS_ENTRY + 3)
        ],
    )
