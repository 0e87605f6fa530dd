"""Registers made ready for going on: interrupted system calls, floating point."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from dumptool.errors import DumpError
from dumptool.registers import fpregs, gpregs, resumable, thread_info
from dumptool.tracee import Registers

NONE = (1 << 64) - 1
REGS = Registers(*range(100, 127))
NR_READ, NR_POLL, NR_NANOSLEEP, NR_FUTEX, NR_RESTART = 0, 7, 35, 202, 219


def stopped(number: int, result: int, **others: int) -> Registers:
    return replace(REGS, orig_rax=number & NONE, rax=result & NONE, rip=0x1000, **others)


@pytest.mark.parametrize("error", [512, 513, 514])
def test_called_again(error: int) -> None:
    assert resumable(stopped(NR_READ, -error)) == replace(stopped(NR_READ, NR_READ), rip=0xFFE)


@pytest.mark.parametrize("number", [NR_NANOSLEEP, NR_POLL, NR_RESTART])
def test_waits_whose_rest_only_the_kernel_knows(number: int) -> None:
    assert resumable(stopped(number, -516)) == stopped(number, -4)


@pytest.mark.parametrize(("operation", "again"), [(9, True), (9 | 128 | 256, True), (0, False), (128, False)])
def test_futex_with_a_point_in_time(operation: int, again: bool) -> None:
    regs = resumable(stopped(NR_FUTEX, -516, rsi=operation))
    assert (regs.rax, regs.rip) == ((NR_FUTEX, 0xFFE) if again else (-4 & NONE, 0x1000))


@pytest.mark.parametrize(("number", "result"), [(NR_READ, 5), (NR_READ, -4), (-1, -512), (-1, 512)])
def test_left_alone(number: int, result: int) -> None:
    assert resumable(stopped(number, result)) == stopped(number, result)


def test_general_registers() -> None:
    entry = gpregs(REGS)
    assert (entry.r15, entry.bp, entry.ax, entry.orig_ax, entry.ip) == (100, 104, 110, 115, 116)
    assert (entry.flags, entry.sp, entry.fs_base, entry.gs, entry.mode) == (118, 119, 121, 126, 1)


COMPONENTS = {2: (576, 256), 5: (832, 64), 6: (896, 512), 7: (1408, 1024), 9: (2432, 8)}
"""As AMD's processors lay them out: not where Intel's have them."""


def area(used: int, enabled: int = 0x2E7) -> bytes:
    raw = bytearray(2440)
    struct.pack_into("<HHHHQQII", raw, 0, 0x37F, 1, 2, 3, 4, 5, 0x1F80, 0xFFFF)
    struct.pack_into("<Q", raw, 464, enabled)
    struct.pack_into("<Q", raw, 512, used)
    for number, (offset, size) in COMPONENTS.items():
        raw[offset : offset + size] = bytes([number]) * size
    return bytes(raw)


def test_vector_registers() -> None:
    entry = fpregs(area(0xE7), COMPONENTS)
    assert (entry.cwd, entry.mxcsr, len(entry.st_space), len(entry.xmm_space)) == (0x37F, 0x1F80, 32, 64)
    xsave = entry.xsave
    assert xsave.xstate_bv == 0xE7
    assert list(xsave.ymmh_space) == [0x02020202] * 64
    assert list(xsave.opmask_reg) == [0x0505050505050505] * 8
    assert list(xsave.zmm_upper) == [0x0606060606060606] * 64
    assert list(xsave.hi16_zmm) == [0x0707070707070707] * 128
    assert list(xsave.pkru) == [0x09090909] * 2


def test_components_that_are_not_enabled_are_left_out() -> None:
    assert list(fpregs(area(3, enabled=7), COMPONENTS).xsave.opmask_reg) == []


def test_tiles_are_refused() -> None:
    with pytest.raises(DumpError, match="0x40000"):
        fpregs(area(0x40007), COMPONENTS)


def test_thread_info() -> None:
    info = thread_info(stopped(NR_NANOSLEEP, -516), area(7), COMPONENTS, 77)
    assert info.clear_tid_addr == 77
    assert info.gpregs.ax == -4 & NONE
    assert [entry.entry_number for entry in info.tls] == [12, 13, 14]
