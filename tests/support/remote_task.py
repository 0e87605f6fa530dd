"""Operations of channels on a served task, without a channel (csrc/serve/channel_tasks.c)."""

from __future__ import annotations

from typing import Any

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.errors import BusyError, check
from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.task import ServedTask


def claim(served: ServedTask, max_pages: int) -> tuple[int, int]:
    """Claims the next run of pages of a remote source for the background, round again at the end.

    Returns (address at dump time in bytes, number of pages); 0 pages if there is none, or not at the moment.
    """
    dump_addr = ffi.new("uint64_t *")
    try:
        nr_pages = check(int(lib.lp_claim_background(served.handle, max_pages, dump_addr)))
    except BusyError:
        nr_pages = 0
    return int(dump_addr[0]), nr_pages


def deliver(served: ServedTask, dump_addr: int, data: Any) -> int:
    """Places pages from a remote source: `data` (a buffer of whole pages) was at `dump_addr` at dump time.

    Returns the number of pages placed; present pages are skipped. Raises BusyError (repeat the call with the same
    arguments), TaskGoneError.
    """
    buffer = ffi.from_buffer(data)
    return check(int(lib.lp_task_deliver(served.handle, dump_addr, len(buffer) // PAGE_SIZE, buffer)))
