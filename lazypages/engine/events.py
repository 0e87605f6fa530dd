"""Events that the engine reports about tasks, for the caller to decide."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lazypages.engine.task import ServedTask


class TaskEventKind(enum.IntEnum):
    """``enum lp_event_kind`` of csrc/serve/engine.h."""

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
    """An event of `task`. For FORKED, `task` is the child.

    ``dump_addr``, ``addr``, ``nr_pages``: the pages concerned, by address at dump time and by current address, in
    bytes. ``error``: an errno or 0; LOST with ESTALE: the task may have read zeros there. ``since``: CLOCK_MONOTONIC in
    ns of the waiting fault, or 0.
    """

    kind: TaskEventKind
    task: ServedTask
    error: int
    dump_addr: int
    addr: int
    nr_pages: int
    since: int
