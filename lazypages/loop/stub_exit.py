"""Stub until summaries tell killed tasks from such as exited by themselves: how the process of a task ended."""

from __future__ import annotations

import fcntl
import os
import select
import struct
from pathlib import Path

from lazypages.processes import Process

_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 8
PATIENCE = 2000  # ms


def was_killed(process: Process) -> bool:
    """By a signal, or it is not known."""
    pidfd = process.fileno()
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    if not waiting.poll(PATIENCE):
        return True
    try:
        status = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(maxsplit=1)[1])
        return bool(status & 0x7F)
    except (OSError, ValueError):
        pass
    try:
        info = fcntl.ioctl(pidfd, _PIDFD_GET_INFO, struct.pack("=Q56x", _PIDFD_INFO_EXIT))
    except OSError:
        return True
    mask, status = struct.unpack("=Q52xi", info)
    return not mask & _PIDFD_INFO_EXIT or not os.WIFEXITED(status)
