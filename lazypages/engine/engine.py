"""The engine: tasks under userfaultfd, served with the GIL released.

An :class:`Engine` is driven by one thread (:meth:`Engine.run`); everything else may be called from any thread. What
needs a decision is reported as :class:`TaskEvent`. See ``csrc/serve/engine.h`` for how faults, layout events and copies
are kept in order.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.channel import Channel
from lazypages.engine.errors import check
from lazypages.engine.events import TaskEvent, TaskEventKind
from lazypages.engine.memory import MappedFile, PreparedMemory, TaskMemory
from lazypages.engine.task import ServedTask

if TYPE_CHECKING:
    from lazypages.engine.guard import Guard
    from lazypages.engine.trace import Ring


class Engine:
    """Watches the uffds of many tasks. Use as a context manager; :meth:`run` must have returned before it ends.

    ``trace``: gets a record of everything; it must outlive the engine.
    """

    _BATCH = 256

    def __init__(self, trace: Ring | None = None, guard: Guard | None = None) -> None:
        self._handle = lib.lp_engine_new(guard.handle if guard else ffi.NULL)
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        if trace:
            lib.lp_engine_trace(self._handle, trace.handle)
        self._tasks: dict[Any, ServedTask] = {}
        self._keep: list[MappedFile] = []
        self._events = ffi.new("struct lp_event[]", self._BATCH)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.lp_engine_free(self._handle)
        self._handle = None
        self._tasks.clear()
        self._keep.clear()

    @property
    def event_fd(self) -> int:
        """Readable when :meth:`events` has something to say. The engine owns it."""
        return int(lib.lp_engine_event_fd(self._handle))

    def run(self) -> None:
        """Serves until :meth:`stop`; for one thread of its own. Raises OSError if epoll fails."""
        check(int(lib.lp_engine_run(self._handle)))

    def stop(self) -> None:
        lib.lp_engine_stop(self._handle)

    def add(
        self,
        uffd: int,
        memory: TaskMemory | PreparedMemory,
        *,
        pid: int = 0,
        pidfd: int = -1,
        tag: int = 0,
    ) -> ServedTask:
        """Serves a task from now on. Owns uffd from here, also if it fails.

        ``pid``, ``pidfd``: the process, where known; pidfd stays the caller's, and open as long as the task is.

        Raises OSError, as PreparedMemory does; and when the uffd can't be watched. Then it stays open to the end, for
        closed it would let the task run on zeros.
        """
        if isinstance(memory, TaskMemory):
            memory = PreparedMemory(memory)
        self._keep += memory.files
        handle = lib.lp_task_new(self._handle, uffd, memory.take(), memory.max_readahead, pid, pidfd, tag)
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        return self._adopt(handle)

    def channel(
        self,
        fd: int,
        *,
        header_size: int,
        max_pages: int,
        zeros: bool,
        background: bool,
        floor: int = 0,
        compress: bool = False,
    ) -> Channel:
        """A channel on the connected stream socket `fd`, which it duplicates.

        The options are those of ``struct lp_channel_options``.

        Raises OSError.
        """
        return Channel(
            lib.lp_engine_channels(self._handle),
            fd,
            header_size=header_size,
            max_pages=max_pages,
            zeros=zeros,
            background=background,
            floor=floor,
            compress=compress,
        )

    @property
    def has_tasks(self) -> bool:
        """Whether any task is not closed, those that no event has told of yet among them."""
        return bool(lib.lp_engine_has_tasks(self._handle))

    def leftovers(self) -> list[ServedTask]:
        """All tasks that are not closed. Takes the events that there are."""
        while self.events():
            pass
        return list(self._tasks.values())

    def events(self) -> list[TaskEvent]:
        """Takes what has happened since the last call, in order; does not block. Never about a closed task."""
        nr = lib.lp_engine_events(self._handle, self._events, self._BATCH)
        result = []
        for raw in self._events[0:nr]:
            kind = TaskEventKind(raw.kind)
            if kind is TaskEventKind.FORKED:
                self._adopt(raw.task)
            elif raw.task not in self._tasks:
                continue  # closed since
            result.append(
                TaskEvent(
                    kind,
                    self._tasks[raw.task],
                    raw.error,
                    raw.dump_addr,
                    raw.addr,
                    raw.nr_pages,
                    raw.since,
                )
            )
        return result

    def _adopt(self, handle: Any) -> ServedTask:
        task = self._tasks[handle] = ServedTask(handle, self._forget)
        return task

    def _forget(self, handle: Any) -> None:
        self._tasks.pop(handle, None)
