"""Guard regions (MADV_GUARD_INSTALL, Linux 6.13): whether this kernel has them, and where they are."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from functools import cache

MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 102, 103
EINVAL = 22
PAGE = 4096
GUARD_BIT = 1 << 58
"""Of an entry of /proc/PID/pagemap, Linux 6.15."""


@cache
def has_guards() -> bool:
    """Whether madvise(2) installs guards here; an older kernel says EINVAL, and nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = ctypes.c_char.from_buffer(memory)
        failed = libc.madvise(ctypes.c_void_p(ctypes.addressof(view)), PAGE, MADV_GUARD_INSTALL)
        del view
    assert not failed or ctypes.get_errno() == EINVAL
    return not failed


def guards_of(pid: int, start: int, pages: int) -> list[int]:
    """Which of the pages at `start` are guards."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        entries = struct.unpack(f"<{pages}Q", os.pread(fd, 8 * pages, start // PAGE * 8))
    finally:
        os.close(fd)
    return [page for page, entry in enumerate(entries) if entry & GUARD_BIT]
