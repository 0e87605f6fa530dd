"""Registers of a core image in the form that the restorer sets by ptrace."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from images_spec.errors import ImageError
from images_spec.interrupted import ALWAYS_EINTR, SYSCALL_INSN_SIZE, TIMED_WAITS, again
from images_spec.messages import ThreadInfoX86, UserX86FpregsEntry
from lazypages.restore.errors import RestoreError
from lazypages.restore.machine import Machine

_FXSAVE_HEAD = struct.Struct("<HHHHQQII")
_FXSAVE_SIZE: Final = 512

LEGACY_BITS: Final = 3
"""x87 and SSE, which are in the fxsave area."""

COMPONENTS: Mapping[int, tuple[str, str, int, str]] = {
    2: ("ymmh_space", "I", 64, "avx"),
    3: ("bndreg_state", "Q", 8, "mpx"),
    4: ("bndcsr_state", "Q", 8, "mpx"),
    5: ("opmask_reg", "Q", 8, "avx512f"),
    6: ("zmm_upper", "Q", 64, "avx512f"),
    7: ("hi16_zmm", "Q", 128, "avx512f"),
    9: ("pkru", "I", 2, "ospke"),
}
"""Component number (Intel SDM volume 1, 13.1): field of UserX86XsaveEntry, type and number of its values, CPU flag."""

_INTERNAL_ERRORS = (512, 513, 514, 516)
"""Internal to the kernel (include/linux/errno.h): results of interrupted system calls that no task ever sees."""
_WORD = (1 << 64) - 1
_EINTR = 4


def general(info: ThreadInfoX86, *, signalled: bool) -> bytes:
    """struct user_regs_struct. ``signalled``: a signal is pending, so that a call may have to fail with EINTR.

    A dump tool normally adjusts the registers of an interrupted system call (docs/criu.md, "Image files"). If not,
    the call is made again here; so are waits with a time-out, which CRIU makes fail with EINTR.
    """
    regs = info.gpregs
    ax, ip, orig = regs.ax, regs.ip, regs.orig_ax
    di, si, dx, r10 = regs.di, regs.si, regs.dx, regs.r10
    if not orig >> 63:
        error = -ax & _WORD
        if error in _INTERNAL_ERRORS or (
            error == _EINTR and orig in TIMED_WAITS | ALWAYS_EINTR and not signalled
        ):
            if error in (_EINTR, _INTERNAL_ERRORS[-1]):
                di, si, dx, r10 = again(orig, (di, si, dx, r10))
            ax, ip, orig = orig, ip - SYSCALL_INSN_SIZE, _WORD
    return struct.pack(
        "<27Q",
        *(regs.r15, regs.r14, regs.r13, regs.r12, regs.bp, regs.bx, regs.r11, r10, regs.r9, regs.r8),
        *(ax, regs.cx, dx, si, di, orig, ip, regs.cs, regs.flags, regs.sp, regs.ss),
        *(regs.fs_base, regs.gs_base, regs.ds, regs.es, regs.fs, regs.gs),
    )


def fxsave(fpregs: UserX86FpregsEntry, path: Path) -> bytes:
    """The legacy part of the xsave area. Raises ``ImageError`` for the core image at ``path``."""
    if len(fpregs.st_space) != 32 or len(fpregs.xmm_space) != 64:
        raise ImageError(path, "floating-point registers are incomplete")
    head = _FXSAVE_HEAD.pack(
        fpregs.cwd & 0xFFFF,
        fpregs.swd & 0xFFFF,
        fpregs.twd & 0xFFFF,
        fpregs.fop & 0xFFFF,
        fpregs.rip,
        fpregs.rdp,
        fpregs.mxcsr,
        fpregs.mxcsr_mask,
    )
    body = struct.pack("<96I", *fpregs.st_space, *fpregs.xmm_space)
    return (head + body).ljust(_FXSAVE_SIZE, b"\0")


def extended(fpregs: UserX86FpregsEntry, machine: Machine, path: Path) -> tuple[int, list[tuple[int, bytes]]]:
    """xstate_bv, and the components beyond the legacy part: (number, contents).

    Raises ``ImageError`` for the core image at ``path``, ``RestoreError`` if this CPU lacks a component in use.
    """
    if not fpregs.HasField("xsave"):
        return LEGACY_BITS, []
    xsave = fpregs.xsave
    if xsave.HasField("cet") and (xsave.cet.cet or xsave.cet.ssp):
        raise RestoreError(f"{path.name}: a thread with a shadow stack (CET) can't be restored")
    components = []
    for number in range(2, 64):
        if not xsave.xstate_bv >> number & 1:
            continue
        if number not in COMPONENTS:
            raise RestoreError(f"{path.name}: register state component {number} can't be restored")
        field, code, count, flag = COMPONENTS[number]
        if flag not in machine.cpu_flags:
            raise RestoreError(f"{path.name}: the task uses registers ({flag}) that this CPU does not have")
        values = list(getattr(xsave, field))
        if number == 9:  # CRIU does not store the padding
            values = [*values, 0][:count]
        if len(values) != count:
            raise ImageError(path, f"{field} has {len(values)} values, not {count}")
        components.append((number, struct.pack(f"<{count}{code}", *values)))
    return xsave.xstate_bv, components
