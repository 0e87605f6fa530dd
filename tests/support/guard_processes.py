"""The daemon's guard process: whether it runs, and its end. And how tasks end whose daemon was killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

from tests.support.blocked import wait_for_faults
from tests.support.fake import Restored
from tests.support.processes import descendants, name_of, wait_for

#: Exit status of a killed task, as a shell says it.
KILLED = 128 + signal.SIGKILL


def guards() -> list[int]:
    """Those below us that run."""
    return [pid for pid, state in descendants().items() if state != "Z" and name_of(pid) == "uffd-guard"]


def wait_for_their_end() -> None:
    wait_for("the guard's end", lambda: not guards())


def kill(pids: Iterable[int]) -> None:
    """SIGKILL for each."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def check_that_tasks_wait(tasks: Restored) -> None:
    """All of them miss a page that nobody gives them, until they are killed; then the one guard ends, too."""
    wait_for_faults(*tasks.pids)
    assert len(guards()) == 1
    kill(tasks.pids)
    assert tasks.statuses() == [KILLED] * len(tasks.pids)
    wait_for_their_end()
