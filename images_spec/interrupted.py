"""How a restored thread continues a system call that the dump interrupted. Pure.

The kernel resumes some interrupted calls with a time-out by restart_syscall(2), from state that it keeps in the thread
(signal(7)). Images do not have that state, so the call has to be made again with its arguments.
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
"""Calls that the kernel resumes by restart_syscall(2). A thread that is still in one of them has run no handler, so its
result EINTR was set by the dump tool (kernel/time/hrtimer.c, fs/select.c, kernel/futex; observed with CRIU 4.1.1)."""

ALWAYS_EINTR: Final = frozenset({65, 69, 70, 128, 208, 220, 232, 281, 333, 441})
"""semop, msgsnd, msgrcv, rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents and
epoll_pwait2: after a stop they fail with EINTR even if no handler has run (signal(7))."""


def again(number: int, arguments: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The first four arguments (rdi, rsi, rdx, r10) for making the call ``number`` again.

    An interrupted sleep has written its remaining time to its fourth argument (clock_nanosleep) or second one
    (nanosleep(2)), if that is not null, and continues with that time. The remaining time of other calls is unknown:
    they start with their full time-out.
    """
    first, second, third, fourth = arguments
    if number == NR_NANOSLEEP and second:
        return second, second, third, fourth
    if number == NR_CLOCK_NANOSLEEP and fourth and not second & TIMER_ABSTIME:
        return first, second, fourth, fourth
    return arguments
