"""A memory cgroup with little room: a process in it that needs more is killed by the kernel's OOM killer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import wait_for

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A new cgroup that may use `limit` bytes: its `cgroup.procs`. Its processes must have ended with the block."""
    if (V1 / "memory.limit_in_bytes").exists():
        parent, file = V1, "memory.limit_in_bytes"
    elif "memory" in (V2 / "cgroup.subtree_control").read_text().split():
        parent, file = V2, "memory.max"
    else:
        pytest.fail(f"no memory cgroups: neither version 1 at {V1}, nor version 2 at {V2}")
    group = parent / f"lazypages-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / file).write_text(str(limit))
        yield group / "cgroup.procs"
        wait_for("the cgroup to be empty", lambda: not (group / "cgroup.procs").read_text())
    finally:
        group.rmdir()
