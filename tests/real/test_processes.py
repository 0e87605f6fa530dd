"""Killing a task together with what it has forked."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from lazypages.control.descriptors import Reserve
from lazypages.loop.processes import Process
from tests.support.processes import descendants, nothing_left, wait_for

pytestmark = pytest.mark.timeout(60)

#: Three generations, and a child that ends before.
TREE = "sleep 300 & (sleep 300 & sleep 300 & wait) & true & wait"


@pytest.mark.parametrize("short", [False, True], ids=["", "no descriptor is free"])
def test_descendants(short: bool) -> None:
    with nothing_left():
        root = subprocess.Popen(["sh", "-c", TREE])
        other = subprocess.Popen(["sleep", "300"])
        wait_for("the tree", lambda: list(descendants(root.pid).values()).count("S") == 4)
        family = descendants(root.pid)
        process = Process(root.pid, os.pidfd_open(root.pid), Reserve(8))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            if short:
                free = os.dup(0)
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
            process.kill(descendants=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert root.wait(30) == -9
        wait_for("their end", lambda: all(descendants().get(pid, "Z") == "Z" for pid in family))
        assert other.poll() is None
        process.kill(descendants=True)  # it is gone: nobody else is meant
        process.close()
        status = Path(f"/proc/{other.pid}/status").read_text()
        assert re.findall(r"(?:State|SigPnd|ShdPnd):\t(\w+)", status) == ["S", *["0" * 16] * 2], (
            "a signal was sent"
        )
        other.kill()
        other.wait()
