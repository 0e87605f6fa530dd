"""One watch for tracers (lazypages.engine.tracers) for all restores.

A tracer can be stopped by one thread only. With a watch for each restore, one that must stop all tracers, because it
has a forked child, would stop those of other restores' tasks, too, and release them too early.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from contextlib import suppress
from typing import Self

import anyio
from anyio.abc import TaskStatus

from lazypages.engine.tracers import Attach, Tracers
from lazypages.loop.traced import drive

log = logging.getLogger("lazypages")


class SharedTracers:
    """Opens a :class:`View` for each restore, while :meth:`run` runs."""

    def __init__(self) -> None:
        self._tracers: Tracers | None = None
        self._error: OSError | None = None
        self._views: list[View] = []
        self._owners: dict[int, View] = {}  # by pid
        self._held: list[
            tuple[int, set[View]]
        ] = []  # a tracer that is stopped, once for each time, and who wants that

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Until it is cancelled."""
        try:
            tracers = Tracers()
        except OSError as error:
            self._error = error  # each restore reports it
            task_status.started()
            return
        with tracers:
            self._tracers = tracers
            task_status.started()
            try:
                await self._run(tracers)
            finally:
                self._tracers = None

    async def _run(self, tracers: Tracers) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(drive, tracers)
            try:
                while True:
                    await anyio.wait_readable(tracers.event_fd)
                    for attach in tracers.take():
                        self._dispatch(attach, tracers)
            finally:
                tracers.stop()

    def open(self) -> View:
        """A view for one restore. Raises OSError."""
        if self._tracers is None:
            raise self._error or OSError(0, "it has ended")
        view = View(self, told=self._tracers.told)
        self._views.append(view)
        return view

    def _dispatch(self, attach: Attach, tracers: Tracers) -> None:
        owner = self._owners.get(attach.pid)
        if owner:
            receivers = {owner}
        elif attach.pid:
            receivers = {view for view in self._views if view.watches_all}
        else:
            receivers = set(self._views)
        if attach.pid and not attach.error:
            if not receivers:
                tracers.release(attach.tracer)
                return
            self._held.append((attach.tracer, set(receivers)))
        for view in receivers:
            view.put(attach)

    # Called by views.

    def watch(self, view: View, pid: int, *, watched: bool) -> None:
        if pid and watched:
            self._owners[pid] = view
        elif pid:
            if self._owners.get(pid) is not view:
                return  # the pid is another's by now: that of a task of another restore
            del self._owners[pid]
        if self._tracers:
            any_view = any(other.watches_all for other in self._views)
            self._tracers.watch(pid, watched=watched if pid else any_view)

    def report(self, pid: int, tracer: int, owner: int) -> None:
        if self._tracers:
            self._tracers.report(pid, tracer, owner)

    def release(self, view: View, tracer: int) -> None:
        for index, (held, views) in enumerate(self._held):
            if held == tracer and view in views:
                views.discard(view)
                if not views:
                    del self._held[index]
                    if self._tracers:
                        self._tracers.release(tracer)
                return

    def close(self, view: View) -> None:
        self._views.remove(view)
        for pid in [pid for pid, owner in self._owners.items() if owner is view]:
            self.watch(view, pid, watched=False)
        self.watch(view, 0, watched=False)
        for tracer in [tracer for tracer, views in self._held if view in views]:
            self.release(view, tracer)


class View:
    """As Tracers, for one restore. A context manager: on exit all its tracers are released."""

    def __init__(self, shared: SharedTracers, *, told: bool) -> None:
        self._shared = shared
        self._attaches: deque[Attach] = deque()
        self.told = told
        self.watches_all = False
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._shared.close(self)
        os.close(self.event_fd)

    def run(self) -> None:
        """The thread is shared."""

    def stop(self) -> None:
        """The thread is shared."""

    def watch(self, pid: int, *, watched: bool) -> None:
        if not pid:
            self.watches_all = watched
        self._shared.watch(self, pid, watched=watched)

    def report(self, pid: int, tracer: int, owner: int) -> None:
        self._shared.report(pid, tracer, owner)

    def release(self, tracer: int) -> None:
        self._shared.release(self, tracer)

    def take(self) -> list[Attach]:
        with suppress(BlockingIOError):
            os.eventfd_read(self.event_fd)
        attaches = list(self._attaches)
        self._attaches.clear()
        return attaches

    def put(self, attach: Attach) -> None:
        self._attaches.append(attach)
        os.eventfd_write(self.event_fd, 1)
