"""The engine: serves tasks under userfaultfd, with the GIL released.

One thread calls :meth:`Engine.run`; all other methods may be called from any thread. The engine reports what needs a
decision as :class:`TaskEvent`. ``csrc/serve/engine.h`` describes how faults, layout events and copies are ordered.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Unpack

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.channel import Channel, ChannelOptions
from lazypages.engine.errors import check
from lazypages.engine.events import TaskEvent, TaskEventKind
from lazypages.engine.memory import MappedFile, PreparedMemory, TaskMemory
from lazypages.engine.task import ServedTask

if TYPE_CHECKING:
    from lazypages.engine.guard import Guard
    from lazypages.engine.trace import Ring


class Engine:
    """Serves the uffds of many tasks. A context manager; :meth:`run` must have returned before its exit.

    ``trace``: receives the engine's records, and must outlive it. The constructor raises OSError.
    """

    _BATCH = 256

    def __init__(self, trace: Ring | None = None, guard: Guard | None = None) -> None:
        self._handle = lib.lp_engine_new(guard.handle if guard else ffi.NULL)
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        if trace:
            lib.lp_engine_trace(self._handle, trace.handle)
        self._guard = guard
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
        """Readable when :meth:`events` has events to return. The engine owns it."""
        return int(lib.lp_engine_event_fd(self._handle))

    def run(self) -> None:
        """Serves until :meth:`stop`; blocks its thread. Raises OSError if epoll fails."""
        check(int(lib.lp_engine_run(self._handle)))

    def stop(self) -> None:
        """Makes :meth:`run` return."""
        lib.lp_engine_stop(self._handle)

    def rounds(self) -> int:
        """How many rounds :meth:`run` has made. Wakes it: if it is not stuck, it makes another one now."""
        return int(lib.lp_engine_rounds(self._handle))

    def add(
        self,
        uffd: int,
        memory: TaskMemory | PreparedMemory,
        *,
        pid: int = 0,
        pidfd: int = -1,
        tag: int = 0,
    ) -> ServedTask:
        """Begins to serve a task. Takes ownership of uffd, also on failure.

        ``pid``, ``pidfd``: the process, if known. The caller keeps pidfd, and must not close it before the task.

        Raises OSError, as PreparedMemory does, and if epoll can't watch the uffd. The uffd then stays open until this
        process exits: if it were closed, the kernel would serve zeros to the task.
        """
        if isinstance(memory, TaskMemory):
            try:
                memory = PreparedMemory(memory)
            except OSError:
                if self._guard:
                    self._guard.leave(uffd, pid, pidfd)
                raise
        self._keep += memory.files
        handle = lib.lp_task_new(self._handle, uffd, memory.take(), memory.max_readahead, pid, pidfd, tag)
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        return self._adopt(handle)

    def channel(self, fd: int, **options: Unpack[ChannelOptions]) -> Channel:
        """Makes a channel on a duplicate of the connected stream socket `fd`.

        Raises OSError.
        """
        return Channel(lib.lp_engine_channels(self._handle), fd, **options)

    @property
    def has_tasks(self) -> bool:
        """Whether any task is not closed, including forked tasks whose event has not been taken yet."""
        return bool(lib.lp_engine_has_tasks(self._handle))

    def leftovers(self) -> list[ServedTask]:
        """All tasks that are not closed. Takes the pending events, and adds the tasks of forks."""
        while self.events():
            pass
        return list(self._tasks.values())

    def events(self) -> list[TaskEvent]:
        """Takes up to 256 events, oldest first, none about a closed task; does not block."""
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
