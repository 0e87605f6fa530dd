"""Tells the service manager, as long as a server runs, what is missing and that it makes progress (docs/systemd.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import anyio

from lazypages.engine.memory import PAGE_SIZE
from lazypages.notify import Notifier
from lazypages.observe.metrics import Summary
from lazypages.wording import count, size

#: Seconds between two looks, and how many times as long as a look: with a thousand tasks one takes a while.
PAUSE = 2.0
PAUSE_LOOKS = 50

#: Looks at the progress while the service manager waits for one WATCHDOG=1: one may find that there was none.
LOOKS = 3


class Told(NamedTuple):
    """``ending``: no restore is admitted any more."""

    status: str
    ending: bool


def restore_status(numbers: Summary, *, connected: bool, ending: bool) -> str:
    """Of a process that serves one restore. ``connected``: a restorer has."""
    if not connected:
        return "waiting for the restore"
    doing = "ending" if ending else "serving" if numbers.finished else "restoring"
    return (
        f"{doing} {count(len(numbers.tasks), 'task')}: {_to_go(sum(task.pending for task in numbers.tasks))}"
    )


def restores_status(states: Sequence[str], numbers: Sequence[Summary], *, ending: bool) -> str:
    """Of the resident daemon. ``states``: of the restores that have not ended (docs/daemon.md)."""
    prefix = "ending; " if ending else ""
    if not states:
        return f"{prefix}no restore"
    early = sum(state in {"preparing", "waiting"} for state in states)
    waiting = f" ({early:,} not begun)" if early else ""
    tasks = [task for one in numbers for task in one.tasks]
    pending = sum(task.pending for task in tasks)
    return f"{prefix}{count(len(states), 'restore')}{waiting}, {count(len(tasks), 'task')}: {_to_go(pending)}"


def _to_go(pages: int) -> str:
    return f"{count(pages, 'page')} ({size(pages * PAGE_SIZE)}) to go" if pages else "no page is missing"


class Progress:
    """Whether all engines make progress: each has made a round since the last look."""

    def __init__(self) -> None:
        self._seen: Mapping[int, int] = {}

    def made(self, rounds: Mapping[int, int]) -> bool:
        """``rounds``: how many each engine has made, by a number that names the engine."""
        before, self._seen = self._seen, dict(rounds)
        return all(before.get(engine) != nr for engine, nr in rounds.items())


async def tell(notifier: Notifier, look: Callable[[], Told], rounds: Callable[[], Mapping[int, int]]) -> None:
    """Tell `notifier` the status when it has changed, and that the process is alive. Returns if nobody listens.

    ``rounds`` counts the rounds of each engine, and makes each engine make another one.
    """
    if notifier:
        async with anyio.create_task_group() as group:
            group.start_soon(_tell_status, notifier, look)
            if notifier.watchdog is not None:
                group.start_soon(_tell_alive, notifier, notifier.watchdog / LOOKS, rounds)


async def _tell_status(notifier: Notifier, look: Callable[[], Told]) -> None:
    while True:
        begun = time.monotonic()
        told = look()
        notifier.status(told.status)
        if told.ending:
            notifier.stopping()
        await anyio.sleep(max(PAUSE, PAUSE_LOOKS * (time.monotonic() - begun)))


async def _tell_alive(notifier: Notifier, pause: float, rounds: Callable[[], Mapping[int, int]]) -> None:
    """The event loop makes progress if this runs."""
    progress = Progress()
    while True:
        if progress.made(rounds()):
            notifier.alive()
        await anyio.sleep(pause)
