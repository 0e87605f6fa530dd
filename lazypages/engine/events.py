"""What the engine reports about tasks, and does not decide."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lazypages.engine.task import ServedTask


class TaskEventKind(enum.IntEnum):
    """Why the engine asks for a decision (``enum lp_event_kind``)."""

    FORKED = 1
    NEED = 2
    ESCALATE = 3
    LOST = 4
    COMPLETE = 5
    GONE = 6
    FAILED = 7
    BROKEN = 8
    UNSEEN = 9


class TaskEvent(NamedTuple):
    """Something about `task` that the engine does not decide. For FORKED, `task` is the child.

    ``dump_addr``, ``addr``, ``nr_pages``: the pages it is about, by address at dump time and by address now.
    ``error``: an errno or 0; LOST with ESTALE: the pages may have come as zeros. ``since``: CLOCK_MONOTONIC in ns of
    the fault that waits, or 0.
    """

    kind: TaskEventKind
    task: ServedTask
    error: int
    dump_addr: int
    addr: int
    nr_pages: int
    since: int
