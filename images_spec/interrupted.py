"""How a system call that a dump has interrupted goes on in the restored thread. Pure.

A wait for a time-out that signal(7) says goes on by itself does so by restart_syscall(2) from what the kernel keeps of
the thread. No image has that: the call has to be made again with its arguments.
"""

from __future__ import annotations

from typing import Final

SYSCALL_INSN_SIZE: Final = 2

NR_POLL: Final = 7
NR_NANOSLEEP: Final = 35
NR_FUTEX: Final = 202
NR_CLOCK_NANOSLEEP: Final = 230
TIMER_ABSTIME: Final = 1

TIMED_WAITS: Final = frozenset({NR_POLL, NR_NANOSLEEP, NR_FUTEX, NR_CLOCK_NANOSLEEP})
"""Calls that restart_syscall(2) goes on with. In a thread that is in one of these no handler has run, so that EINTR as
their result is the dump tool's work (kernel/time/hrtimer.c, fs/select.c, kernel/futex; observed with CRIU 4.1.1)."""

ALWAYS_EINTR: Final = frozenset({65, 69, 70, 128, 208, 220, 232, 281, 333, 441})
"""semop, msgsnd, msgrcv, rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents and
epoll_pwait2: they fail with EINTR also when no handler has run, after a stop (signal(7))."""


def again(number: int, arguments: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The first four arguments (rdi, rsi, rdx, r10) with which the call ``number`` is to be made again.

    A sleep that was interrupted has written the time that was left where its caller wanted to know it
    (nanosleep(2)), and sleeps for that time. For other durations nobody knows it: they begin again.
    """
    first, second, third, fourth = arguments
    if number == NR_NANOSLEEP and second:
        return second, second, third, fourth
    if number == NR_CLOCK_NANOSLEEP and fourth and not second & TIMER_ABSTIME:
        return first, second, fourth, fourth
    return arguments
