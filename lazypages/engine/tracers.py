"""The typed face of csrc/serve/tracers.c: who begins to trace a process, and having that one wait."""

from __future__ import annotations

import os
from typing import NamedTuple

from lazypages.engine._uffd import ffi, lib


class Attach(NamedTuple):
    """A process ``pid`` is traced by the thread ``tracer`` of the process ``owner``.

    ``error``: 0 when that thread stands still, until :meth:`Tracers.release`; else the errno of why it does not
    (EAGAIN: the process is none of those that are watched). ``pid`` 0: some attaches are not known.
    """

    pid: int
    tracer: int
    owner: int
    error: int


class Tracers:
    """A context manager; :meth:`run` must have returned before it ends."""

    _BATCH = 64

    def __init__(self) -> None:
        """Raises OSError."""
        self._handle = lib.lp_tracers_new()
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._attaches = ffi.new("struct lp_attach[]", self._BATCH)

    def __enter__(self) -> Tracers:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.lp_tracers_free(self._handle)
        self._handle = None

    @property
    def told(self) -> bool:
        """Whether the kernel tells of every attach; if not, they are to be looked for, and reported."""
        return bool(lib.lp_tracers_reported(self._handle))

    @property
    def event_fd(self) -> int:
        """Readable when there is something to :meth:`take`."""
        return int(lib.lp_tracers_event_fd(self._handle))

    def run(self) -> None:
        """For one thread of its own, until :meth:`stop`; lets go whom it holds at the end. Raises OSError."""
        rc = int(lib.lp_tracers_run(self._handle))
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def stop(self) -> None:
        lib.lp_tracers_stop(self._handle)

    def watch(self, pid: int, *, watched: bool) -> None:
        """From now on whoever attaches to the process (0: to any) is held at once."""
        lib.lp_tracers_watch(self._handle, pid, watched)

    def report(self, pid: int, tracer: int, owner: int) -> None:
        """Holds a tracer that was found otherwise; :meth:`take` tells of it."""
        lib.lp_tracers_report(self._handle, pid, tracer, owner)

    def release(self, tracer: int) -> None:
        """Lets a tracer go on, once for each Attach that held it."""
        lib.lp_tracers_release(self._handle, tracer)

    def take(self) -> list[Attach]:
        """What has happened since the last call; does not block."""
        nr = lib.lp_tracers_take(self._handle, self._attaches, self._BATCH)
        return [Attach(raw.pid, raw.tracer, raw.owner, raw.error) for raw in self._attaches[0:nr]]
