"""Registers as core images have them (images_spec/core.md)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace

from dumptool.errors import DumpError
from dumptool.tracee import Registers
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
"""linux/errno.h, for the kernel's own use: what an interrupted system call has in rax while it waits."""
SYSCALL_INSN_SIZE = 2
NR_FUTEX = 202
FUTEX_WAIT_BITSET = 9
FUTEX_FLAGS = 128 | 256

FIRST_TLS_ENTRY = 12
"""GDT_ENTRY_TLS_MIN of x86_64; three entries, which 64-bit code does not use."""

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
"""Component number (Intel SDM 1, 13.1) -> field of UserX86XsaveEntry and the type of its values."""


def resumable(regs: Registers) -> Registers:
    """The registers with which a thread can go on from user mode, in another process too.

    A system call that the stop has interrupted is called again. Where the kernel keeps the remaining time
    of a wait to itself (restart_syscall(2)), it fails with EINTR instead, as CRIU has it, unless the
    time-out was a point in time and not a duration.
    """
    if regs.orig_rax >> 63:
        return regs
    error = (1 << 64) - regs.rax
    absolute = regs.orig_rax == NR_FUTEX and regs.rsi & 0xFFFFFFFF & ~FUTEX_FLAGS == FUTEX_WAIT_BITSET
    if error in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND) or (
        error == ERESTART_RESTARTBLOCK and absolute
    ):
        return replace(regs, rax=regs.orig_rax, rip=regs.rip - SYSCALL_INSN_SIZE)
    if error == ERESTART_RESTARTBLOCK:
        return replace(regs, rax=(1 << 64) - EINTR)
    return regs


def gpregs(regs: Registers) -> UserX86RegsEntry:
    """General registers."""
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

    ``components``: the CPU's number -> (offset, size) in bytes. Raises ``DumpError`` for state that images
    have no place for (AMX tiles).
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
    """All registers of a thread, made ready for going on; ``xstate`` and ``components`` as for ``fpregs``."""
    return ThreadInfoX86(
        clear_tid_addr=clear_tid_address,
        gpregs=gpregs(resumable(regs)),
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
