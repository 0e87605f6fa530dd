"""What the kernel under the tests can do: asked of it, not told from its version.

Tests that need more than a kernel has assert what is right there instead; they do not skip.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest

from lazypages.engine._uffd import ffi, lib

if TYPE_CHECKING:
    from lazypages.engine.task import ServedTask

UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFD_FEATURE_POISON = 1 << 14


def _features() -> int:
    """As UFFDIO_API reports them (userfaultfd(2))."""
    fd = int(lib.syscall(lib.SYS_userfaultfd, ffi.cast("int", os.O_CLOEXEC | os.O_NONBLOCK)))
    assert fd >= 0, os.strerror(ffi.errno)
    try:
        request = bytearray(struct.pack("<QQQ", UFFD_API, 0, 0))
        fcntl.ioctl(fd, UFFDIO_API, request)
        return int(struct.unpack("<QQQ", request)[1])
    finally:
        os.close(fd)


FEATURES = _features()

#: UFFDIO_POISON, since Linux 6.6.
CAN_POISON = bool(FEATURES & UFFD_FEATURE_POISON)


def cannot_poison(served: ServedTask, *, everything: bool) -> bool:
    """False where the kernel has UFFDIO_POISON; else True, when poisoning fails as it should and changes nothing."""
    if CAN_POISON:
        return False
    before = served.pending, served.lost
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        served.poison(everything=everything)
    assert (served.pending, served.lost) == before
    assert served.stats().poisoned == 0
    return True
