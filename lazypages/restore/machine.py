"""Properties of this machine and process that matter to restored tasks."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lazypages.restore.syscalls import MADV_GUARD_INSTALL, TIMER_CREATE_RESTORE_IDS_GET, Prctl

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
NR_RLIMITS = 16


@dataclass(frozen=True, slots=True)
class Special:
    """A mapping that the kernel creates in every process: ``[vvar]``, ``[vvar_vclock]``, ``[vdso]``."""

    name: str
    start: int
    size: int


class Machine:
    """Properties of this process; each is read once, on first use."""

    @cached_property
    def special(self) -> list[Special]:
        """vvar and vdso, in ascending order; their addresses differ from process to process."""
        found = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split()
            if len(fields) > 5 and (fields[5].startswith("[vvar") or fields[5] == "[vdso]"):
                start, end = (int(part, 16) for part in fields[0].split("-"))
                found.append(Special(fields[5], start, end - start))
        return found

    @cached_property
    def vdso(self) -> bytes:
        """The bytes of this kernel's vdso; empty if there is none."""
        for part in self.special:
            if part.name == "[vdso]":
                with open("/proc/self/mem", "rb", buffering=0) as memory:
                    return os.pread(memory.fileno(), part.size, part.start)
        return b""

    @cached_property
    def _status(self) -> dict[str, str]:
        lines = Path("/proc/self/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    @cached_property
    def capabilities(self) -> dict[str, int]:
        """Capability sets by their names in /proc/self/status."""
        return {name: int(self._status[name], 16) for name in CAPABILITY_SETS}

    @cached_property
    def cpu_flags(self) -> frozenset[str]:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
        return frozenset()

    @cached_property
    def rlimits(self) -> list[tuple[int, int]]:
        """(soft, hard); -1: no limit."""
        return [resource.getrlimit(number) for number in range(NR_RLIMITS)]

    @cached_property
    def oom_score_adj(self) -> int:
        return int(Path("/proc/self/oom_score_adj").read_text())

    @cached_property
    def terminal(self) -> int | None:
        """The first of our standard descriptors that is a terminal."""
        return next((fd for fd in range(3) if os.isatty(fd)), None)

    @cached_property
    def chooses_timer_ids(self) -> bool:
        """Whether timer_create can use a given id (PR_TIMER_CREATE_RESTORE_IDS; tested with Linux 6.18)."""
        answer = ctypes.CDLL(None).prctl(
            Prctl.TIMER_CREATE_RESTORE_IDS, TIMER_CREATE_RESTORE_IDS_GET, 0, 0, 0
        )
        return int(answer) >= 0

    @cached_property
    def has_guards(self) -> bool:
        """Whether madvise can install guard regions (Linux 6.13; EINVAL before)."""
        with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
            try:
                page.madvise(MADV_GUARD_INSTALL)
            except OSError:
                return False
        return True

    def in_use(self, pid: int) -> bool:
        """Whether a process or thread, or a zombie, has this id."""
        return Path(f"/proc/{pid}").exists()

    @cached_property
    def controls_terminal(self) -> bool:
        """Whether ``terminal`` is the controlling terminal of our session."""
        if self.terminal is None:
            return False
        try:
            os.tcgetpgrp(self.terminal)
        except OSError:
            return False
        return True
