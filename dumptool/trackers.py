"""Trackers: what dirty tracking keeps of a process between two runs.

A tracker is a userfaultfd that write-protects the process's private memory asynchronously (the kernel records a write
and lets it through), and a memfd with the record about it. A holder has both (``dumptool.holders``). If they are lost,
tracking ends and the next dump writes all pages. The memory of a forked child is not tracked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dumptool.proc import OpenFile

MEMFD_NAME = "lazypages-tracker"
MEMFD_LINK = f"/memfd:{MEMFD_NAME} (deleted)"
UFFD_LINK = "anon_inode:[userfaultfd]"
LINKS = (MEMFD_LINK, UFFD_LINK)
RECORD_SIZE = 512

UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_WP_ASYNC = 1 << 15
FEATURES = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED
"""linux/userfaultfd.h. PAGEMAP_SCAN write-protects only memory of a userfaultfd with these (fs/proc/task_mmu.c)."""
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
OLD_FEATURES = UFFD_FEATURE_EXACT_ADDRESS | UFFD_FEATURE_THREAD_ID
"""Before Linux 6.7: our userfaultfd protects nothing and receives no events. These features only mark it as ours."""
UFFD_FEATURE_INITIALIZED = 1 << 31
"""In fdinfo: UFFDIO_API has been called."""
UFFD_WP, SOFT_DIRTY = "uffd-wp", "soft-dirty"
"""Tracking methods."""


@dataclass(frozen=True, slots=True)
class Record:
    """The contents of the memfd.

    ``pid``, ``start_time``, ``program``: the owner, and what execve has started in it (``tracking.program``).
    ``arming``: a new value each time the tracker is armed. ``level``: run id (inventory image) of the dump that
    has everything written before the last arming; empty until that dump is complete.
    ``method``: UFFD_WP or SOFT_DIRTY; empty while the tracker is being made.
    ``witness``: address of a page that was made soft-dirty right after all bits were cleared, 0 for none: if it is
    clean, another program has cleared the bits since.
    """

    pid: int
    start_time: int
    program: str = ""
    arming: str = ""
    level: str = ""
    method: str = ""
    witness: int = 0

    def encode(self) -> bytes:
        """Always ``RECORD_SIZE`` bytes, so that one write replaces the whole record."""
        return json.dumps(asdict(self)).encode().ljust(RECORD_SIZE)

    @classmethod
    def decode(cls, data: bytes) -> Record | None:
        """None for data that this version of dumptool has not written."""
        try:
            fields: Any = json.loads(data)
            record = cls(**fields)
        except (ValueError, TypeError):
            return None
        numbers = (record.pid, record.start_time, record.witness)
        texts = (record.program, record.arming, record.level, record.method)
        right = all(isinstance(one, int) for one in numbers) and all(isinstance(one, str) for one in texts)
        return record if right else None


def store(memfd: int, record: Record) -> None:
    """Writes a record. ``memfd``: our own descriptor of the memfd."""
    os.pwrite(memfd, record.encode(), 0)


def load(memfd: int) -> Record | None:
    """Reads a record."""
    return Record.decode(os.pread(memfd, RECORD_SIZE, 0))


def leftovers(files: Sequence[OpenFile], record: Record | None) -> tuple[int, ...]:
    """The descriptors of a process that are ours, in the order of closing.

    Earlier versions of dumptool had their trackers in the process: a memfd and a userfaultfd. A run that is killed
    while it makes a tracker can leave a userfaultfd there. ``record``: of the process's tracker.
    """
    memfds = [file.fd for file in files if file.link == MEMFD_LINK]
    if not memfds and (record is None or record.method):
        return ()
    known = (0, FEATURES, OLD_FEATURES) if memfds else (0,)
    uffds = [file.fd for file in files if file.link == UFFD_LINK and _features(file) in known]
    return (*uffds, *memfds)  # a memfd tells that the others are ours


def _features(file: OpenFile) -> int:
    """The features of a userfaultfd: the second number of "API:" in its fdinfo. 0: UFFDIO_API has not been called."""
    features = int(file.info.other.get("API", "0:0").split(":")[1], 16)
    return features ^ UFFD_FEATURE_INITIALIZED if features else 0
