"""Ends the tracking of a tree's writes."""

from __future__ import annotations

import os

from dumptool import survey, tracking
from dumptool.freeze import freeze, members
from dumptool.holders import Holder, Holders
from dumptool.survey import Task
from dumptool.tracee import Gadgets


def untrack(root: int, timeout: float = 10) -> int:
    """Ends tracking of all processes of the tree under ``root``, and returns how many were tracked.

    The tree is stopped (for at most ``timeout`` seconds) only if earlier versions of dumptool have left descriptors in
    it. Raises ``DumpError``, also if another dumptool works on the tree.
    """
    survey.check_permission(root)
    with Holders() as holders:
        holders.look()
        tasks = survey.look_at_all(members(root), holders=holders, files=False)
        pids = {task.pid for task in tasks.values() if task.tracker is not None}
        for holder in {_drop(task) for task in tasks.values()}:
            if holder is not None:
                holder.sync()
        if any(task.leftovers for task in tasks.values()):
            pids |= _close_leftovers(root, holders, timeout)
    return len(pids)


def _drop(task: Task) -> Holder | None:
    """The holder that has been told."""
    held = tracking.hold(task)
    if held is None:
        return None
    try:
        held.drop()
    finally:
        held.close()
    return held.holder


def _close_leftovers(root: int, holders: Holders, timeout: float) -> set[int]:
    """The processes that had some."""
    with freeze(root, timeout) as tree:
        tasks = survey.look_at_all(tree.processes, holders=holders, files=False).values()
        found = [task for task in tasks if task.leftovers]
        fds = [
            fd
            for task in found
            for fd in tracking.close_in(task, Gadgets(task.pid, task.layout.vmas), task.leftovers)
        ]
    for fd in fds:  # the tree runs again: the kernel walks all tracked memory
        os.close(fd)
    return {task.pid for task in found}
