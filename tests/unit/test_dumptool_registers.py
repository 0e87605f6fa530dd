"""Registers made ready for going on: interrupted system calls, floating point."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from dumptool.errors import DumpError
from dumptool.registers import (
    called_again_after_a_stop,
    fpregs,
    gpregs,
    hidden_call,
    resumable,
    thread_info,
)
from dumptool.tracee import Registers

NONE = (1 << 64) - 1
REGS = Registers(*range(100, 127))
NR_READ, NR_POLL, NR_NANOSLEEP, NR_FUTEX, NR_RESTART = 0, 7, 35, 202, 219
NR_SIGTIMEDWAIT, NR_CLOCK_NANOSLEEP, NR_EPOLL_WAIT = 128, 230, 232
SA_RESTART = 0x10000000


def stopped(number: int, result: int, **others: int) -> Registers:
    return replace(REGS, orig_rax=number & NONE, rax=result & NONE, rip=0x1000, **others)


@pytest.mark.parametrize("error", [512, 513, 514])
def test_called_again(error: int) -> None:
    assert resumable(stopped(NR_READ, -error)) == replace(stopped(NR_READ, NR_READ), rip=0xFFE)


@pytest.mark.parametrize("number", [NR_NANOSLEEP, NR_POLL, NR_FUTEX])
def test_waits_for_a_time(number: int) -> None:
    assert resumable(stopped(number, -516, rsi=0)) == replace(stopped(number, number, rsi=0), rip=0xFFE)


def test_a_sleep_goes_on_with_the_time_that_was_left() -> None:
    sleep = resumable(stopped(NR_NANOSLEEP, -516, rdi=0x2000, rsi=0x3000))
    assert (sleep.rdi, sleep.rsi) == (0x3000, 0x3000)
    sleep = resumable(stopped(NR_CLOCK_NANOSLEEP, -516, rdi=1, rsi=0, rdx=0x2000, r10=0x3000))
    assert (sleep.rdi, sleep.rsi, sleep.rdx, sleep.r10) == (1, 0, 0x3000, 0x3000)
    until = stopped(NR_CLOCK_NANOSLEEP, -514, rsi=1, rdx=0x2000, r10=0x3000)
    assert resumable(until).rdx == 0x2000


def test_gone_on_with_once_before() -> None:
    """restart_syscall hides which call it is."""
    again = resumable(stopped(NR_RESTART, -516, rdx=0x2000, r10=0x3000, rsi=0), waits_in=NR_CLOCK_NANOSLEEP)
    assert (again.rax, again.orig_rax, again.rip, again.rdx) == (230, 230, 0xFFE, 0x3000)
    assert resumable(stopped(NR_RESTART, -516)) == stopped(NR_RESTART, -4)


@pytest.mark.parametrize("number", [NR_EPOLL_WAIT, NR_SIGTIMEDWAIT])
def test_calls_that_fail_after_every_stop(number: int) -> None:
    again = stopped(number, -514)  # the kernel makes EINTR of it where it has a handler to run
    assert called_again_after_a_stop(stopped(number, -4)) == again
    assert resumable(again) == replace(stopped(number, number), rip=0xFFE)
    assert resumable(again, handler_flags=SA_RESTART) == stopped(number, -4)
    assert called_again_after_a_stop(stopped(number, -512)) is None
    assert called_again_after_a_stop(stopped(NR_READ, -4)) is None


@pytest.mark.parametrize(
    ("error", "flags", "fails"),
    [
        *((-512, 0, True), (-512, SA_RESTART, False), (-513, 0, False)),
        *((-514, SA_RESTART, True), (-516, SA_RESTART, True)),
    ],
)
def test_a_handler_is_about_to_run(error: int, flags: int, fails: bool) -> None:
    """As signal(7) has it."""
    regs = resumable(stopped(NR_READ, error), handler_flags=flags)
    assert (regs.rax, regs.rip) == ((-4 & NONE, 0x1000) if fails else (NR_READ, 0xFFE))


@pytest.mark.parametrize(
    ("code", "function", "rdi", "number"),
    [
        ("48897424b8e60000000f05", "", 0, NR_CLOCK_NANOSLEEP),
        ("b8070000000f05", "do_syscall_64", 0, NR_POLL),
        ("b8010000000f05", "", 0, None),  # write does not go on in this way
        ("4c8b4c24080f05", "futex_do_wait", 0x7000, NR_FUTEX),
        ("4c8b4c24080f05", "poll_schedule_timeout.constprop.0", 0, NR_POLL),
        ("4c8b4c24080f05", "do_syscall_64", 0x7000, NR_NANOSLEEP),
        ("4c8b4c24080f05", "do_syscall_64", 1, NR_CLOCK_NANOSLEEP),
        ("4c8b4c24080f05", "do_cpu_nanosleep", 0xFFFFFFFE, NR_CLOCK_NANOSLEEP),
        ("4c8b4c24080f05", "0", 0x7000, None),
        ("", "", 0x7000, None),
    ],
)
def test_which_call_it_is(code: str, function: str, rdi: int, number: int | None) -> None:
    assert hidden_call(bytes.fromhex(code), function, rdi) == number


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
    info = thread_info(stopped(NR_NANOSLEEP, 3), area(7), COMPONENTS, 77)
    assert info.clear_tid_addr == 77
    assert info.gpregs.ax == 3
    assert [entry.entry_number for entry in info.tls] == [12, 13, 14]
