"""Operations on a served task for tests only: production delivers through channels (csrc/serve/channel_tasks.c)."""

from __future__ import annotations

from typing import Any

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.errors import check
from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.task import ServedTask


def claim_remote(served: ServedTask, cursor: int, max_pages: int) -> tuple[int, int, int]:
    """Claims the next run of pages of a remote source, from the current address `cursor` on.

    Returns (address at dump time in bytes, number of pages, next cursor); 0 pages if there is none.
    """
    dump_addr, following = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    nr_pages = lib.lp_task_claim_remote(served.handle, cursor, max_pages, dump_addr, following)
    return int(dump_addr[0]), int(nr_pages), int(following[0])


def deliver(served: ServedTask, dump_addr: int, data: Any) -> int:
    """Places pages from a remote source: `data` (a buffer of whole pages) was at `dump_addr` at dump time.

    Returns the number of pages placed; present pages are skipped. Raises BusyError (repeat the call with the same
    arguments), TaskGoneError.
    """
    buffer = ffi.from_buffer(data)
    return check(int(lib.lp_task_deliver(served.handle, dump_addr, len(buffer) // PAGE_SIZE, buffer)))


def retry_lost(served: ServedTask) -> None:
    """Makes lost pages pending again, since a source has recovered."""
    lib.lp_task_retry_lost(served.handle)
