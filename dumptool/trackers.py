"""The state of dirty tracking between runs: two descriptors in the tracked process.

The *tracker* is a userfaultfd that write-protects the process's private memory asynchronously (the kernel
records a write and lets it through), and a memfd with the record about it. Both have high numbers and are
close-on-exec, so that they hardly disturb the process. If the process closes them, tracking ends and the next dump
writes all pages. A forked child inherits both, but its memory is not tracked: the record names its owner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dumptool.proc import OpenFile

MEMFD_NAME = "lazypages-tracker"
MEMFD_LINK = f"/memfd:{MEMFD_NAME} (deleted)"
UFFD_LINK = "anon_inode:[userfaultfd]"
RECORD_SIZE = 512
NO_UFFD = -1

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

    ``pid``, ``start_time``: the owner. ``uffd``: descriptor number in it, ``NO_UFFD`` if none could be created.
    ``arming``: a new value each time the tracker is armed. ``level``: run id (inventory image) of the dump that
    has everything written before the last arming; empty until that dump is complete.
    ``method``: UFFD_WP or SOFT_DIRTY. ``witness``: address of a page that was made soft-dirty right after all bits were
    cleared, 0 for none: if it is clean, another program has cleared the bits since.
    """

    pid: int
    start_time: int
    uffd: int
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
        shapes = ((record.pid, int), (record.start_time, int), (record.uffd, int), (record.witness, int))
        texts = ((record.arming, str), (record.level, str), (record.method, str))
        return record if all(isinstance(value, kind) for value, kind in (*shapes, *texts)) else None


@dataclass(frozen=True, slots=True)
class Tracker:
    """A tracker found in a process: its descriptor numbers, and the record.

    ``strays``: further userfaultfds of a run that was killed while it created the tracker.
    """

    memfd: int
    uffd: int | None
    record: Record | None
    strays: tuple[int, ...] = ()

    @property
    def uffds(self) -> tuple[int, ...]:
        return self.strays if self.uffd is None else (self.uffd, *self.strays)

    @property
    def fds(self) -> tuple[int, ...]:
        """In the order of closing: the memfd last, because it identifies the others."""
        return (*self.uffds, self.memfd)

    def owned_by(self, pid: int, start_time: int) -> bool:
        """Whether it tracks this very process, not an ancestor from which it was inherited."""
        record = self.record
        if record is None or (record.pid, record.start_time) != (pid, start_time):
            return False
        return record.uffd == NO_UFFD or self.uffd is not None


def find(pid: int, files: Sequence[OpenFile]) -> list[Tracker]:
    """The trackers among the descriptors of a process, including incomplete ones of a run that was killed."""
    uffds = {file.fd for file in files if file.link == UFFD_LINK and _is_ours(file)}
    found = []
    for file in files:
        if file.link == MEMFD_LINK:
            record = _read(pid, file.fd)
            uffd = record.uffd if record is not None and record.uffd in uffds else None
            found.append(Tracker(file.fd, uffd, record))
    strays = tuple(sorted(uffds - {tracker.uffd for tracker in found}))
    if found and strays:
        found[0] = replace(found[0], strays=strays)
    return found


def _read(pid: int, memfd: int) -> Record | None:
    try:
        with open(f"/proc/{pid}/fd/{memfd}", "rb") as file:
            return Record.decode(file.read(RECORD_SIZE))
    except OSError:
        return None


def _is_ours(file: OpenFile) -> bool:
    """Whether a userfaultfd has our features, or none yet: the second number of "API:" in its fdinfo."""
    features = int(file.info.other.get("API", "0:0").split(":")[1], 16)
    return features == 0 or features ^ UFFD_FEATURE_INITIALIZED in (FEATURES, OLD_FEATURES)


def store(memfd: int, record: Record) -> None:
    """Writes a record. ``memfd``: our own descriptor of the memfd."""
    os.pwrite(memfd, record.encode(), 0)
