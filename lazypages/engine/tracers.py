"""Binding of csrc/serve/tracers.h: detects a ptrace attach to a process, and stops the tracer."""

from __future__ import annotations

import os
from typing import NamedTuple, Self

from lazypages.engine._uffd import ffi, lib


class Attach(NamedTuple):
    """The thread ``tracer`` of the process ``owner`` traces the process ``pid``.

    ``error``: 0: the tracer is stopped, until :meth:`Tracers.release`; else the errno of the failed stop (EAGAIN: the
    process is not watched). ``pid`` 0: some attaches were missed.
    """

    pid: int
    tracer: int
    owner: int
    error: int


class Tracers:
    """Detects ptrace attaches. A context manager; :meth:`run` must have returned before its exit."""

    _BATCH = 64

    def __init__(self) -> None:
        """Raises OSError."""
        self._handle = lib.lp_tracers_new()
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._attaches = ffi.new("struct lp_attach[]", self._BATCH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.lp_tracers_free(self._handle)
        self._handle = None

    @property
    def told(self) -> bool:
        """Whether the kernel reports every attach. If not, the caller must detect them, and :meth:`report` them."""
        return bool(lib.lp_tracers_reported(self._handle))

    @property
    def event_fd(self) -> int:
        """Readable when :meth:`take` has attaches to return."""
        return int(lib.lp_tracers_event_fd(self._handle))

    def run(self) -> None:
        """Runs until :meth:`stop`; blocks its thread. Releases the stopped tracers at the end. Raises OSError."""
        rc = int(lib.lp_tracers_run(self._handle))
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def stop(self) -> None:
        """Makes :meth:`run` return."""
        lib.lp_tracers_stop(self._handle)

    def watch(self, pid: int, *, watched: bool) -> None:
        """Sets whether a tracer that attaches to the process (0: to any process) is stopped at once."""
        lib.lp_tracers_watch(self._handle, pid, watched)

    def report(self, pid: int, tracer: int, owner: int) -> None:
        """Stops a tracer that the caller has detected; :meth:`take` reports it."""
        lib.lp_tracers_report(self._handle, pid, tracer, owner)

    def release(self, tracer: int) -> None:
        """Resumes a tracer; call it once for each Attach that stopped it."""
        lib.lp_tracers_release(self._handle, tracer)

    def take(self) -> list[Attach]:
        """Takes up to 64 attaches; does not block."""
        nr = lib.lp_tracers_take(self._handle, self._attaches, self._BATCH)
        return [Attach(raw.pid, raw.tracer, raw.owner, raw.error) for raw in self._attaches[0:nr]]
