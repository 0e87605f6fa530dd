"""Memory of a task that other processes read: arguments, environment, auxiliary vector, and tops of stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from images_spec.flags import PAGE_SIZE
from images_spec.placement import Span

if TYPE_CHECKING:
    from images_spec.messages import CoreEntry, MmEntry

#: Limit of each range, bytes: arguments and environment of a program may have 6 MiB (execve(2)).
MOST = 1 << 20

#: Bytes of a stack from its pointer on: the frames in use.
TOP = 4 * PAGE_SIZE


def of_task(mm: MmEntry, leader: CoreEntry) -> tuple[Span, ...]:
    """Page-aligned ranges, not necessarily mapped. The kernel has put argc, pointers and the auxiliary vector
    at start_stack (proc_pid_stat(5))."""
    ranges = (
        (mm.arg_start, mm.arg_end),
        (mm.env_start, mm.env_end),
        (mm.start_stack, mm.start_stack and mm.start_stack + TOP),
    )
    return (
        *(_pages(start, min(end, start + MOST)) for start, end in ranges if start < end),
        *of_thread(leader),
    )


def of_thread(core: CoreEntry) -> tuple[Span, ...]:
    """The top of a thread's stack; empty for a zombie."""
    info = core.ti_aarch64 if core.HasField("ti_aarch64") else core.thread_info
    pointer = info.gpregs.sp
    return (_pages(pointer, pointer + TOP),) if pointer else ()


def _pages(start: int, end: int) -> Span:
    return Span(start // PAGE_SIZE * PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE)
