"""Writing and reading traces. docs/trace.md describes the file.

The engine puts records into a ring in memory (``csrc/serve/trace.h``). A thread writes them to the file; it runs in C
with the GIL released.
"""

from __future__ import annotations

import enum
import errno
import json
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lazypages.engine._uffd import lib
from lazypages.engine.trace import Ring
from lazypages.errors import LazyPagesError
from lazypages.wording import count

log = logging.getLogger("lazypages")

MAGIC = b"LPTRACE\n"
VERSION = 1

#: Magic, version, length in bytes of the JSON that follows.
_PREFIX = struct.Struct("<8sII")
RECORD = struct.Struct("<QQQQIIHHI")

#: Longest JSON header in bytes that is read.
_MAX_HEADER = 1 << 28


class TraceError(LazyPagesError):
    """The file is not a trace, is damaged, or can't be written."""


class Kind(enum.IntEnum):
    """What happened (``enum lp_trace_kind``)."""

    MEMORY = 1
    FAULT = 2
    ANSWERED = 3
    LEFT = 4
    PUT_OFF = 5
    BROUGHT = 6
    WANTED = 7
    FETCHED = 8
    ARRIVED = 9
    LOST = 10
    POISONED = 11
    FORKED = 12
    REMOVED = 13
    UNMAPPED = 14
    REMAPPED = 15
    COMPLETE = 16
    GONE = 17
    DROPPED = 18
    END = 19
    RESTORED = 20


#: Sources other than the levels of the chain of images, which are 0, 1, ...
ZERO, NOWHERE, REMOTE, NO_SOURCE = 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF
SOURCE_NAMES = {ZERO: "zero", NOWHERE: "lost", REMOTE: "remote"}


class Record(NamedTuple):
    """``struct lp_trace_record``: addresses in bytes, times in ns of CLOCK_MONOTONIC."""

    time: int
    addr: int
    pages: int
    detail: int
    task: int
    memory: int
    kind: int
    source: int
    times: int


class Tracer:
    """Writes a trace into `path` while its block runs. The file is created by the constructor.

    ``tasks``: the names of the levels of the images, by pid. ``programs``: the names of their programs. Raises
    TraceError.
    """

    def __init__(
        self,
        path: Path,
        images: Path,
        tasks: Mapping[int, tuple[str, ...]],
        programs: Mapping[int, str] | None = None,
    ) -> None:
        self._path = path
        self.ring = Ring()
        try:
            self._fd = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            os.write(self._fd, _header(images, tasks, programs or {}))
        except OSError as error:
            raise TraceError(f"--trace {path}: {error.strerror}") from error
        self._error = 0
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.lp_trace_stop(self.ring.handle)
        self._thread.join()
        os.close(self._fd)
        if self._error:
            log.error("--trace %s is incomplete: %s", self._path, os.strerror(self._error))
        elif dropped := self.ring.dropped:
            log.warning(
                "--trace %s lacks %s: they came faster than they could be written",
                self._path,
                count(dropped, "record"),
            )

    def _run(self) -> None:
        self._error = -int(lib.lp_trace_run(self.ring.handle, self._fd))


def _header(images: Path, tasks: Mapping[int, tuple[str, ...]], programs: Mapping[int, str]) -> bytes:
    text = json.dumps(
        {
            "clock": "CLOCK_MONOTONIC",
            "unit": "ns",
            "started": {"monotonic_ns": time.monotonic_ns(), "realtime_ns": time.time_ns()},
            "images": str(images),
            "record_bytes": RECORD.size,
            "page_bytes": mmap.PAGESIZE,
            "kinds": {kind.value: kind.name.lower() for kind in Kind},
            "sources": SOURCE_NAMES,
            "tasks": [
                {"pid": pid, "program": programs.get(pid, ""), "levels": list(levels)}
                for pid, levels in tasks.items()
            ],
        }
    ).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % RECORD.size)
    return _PREFIX.pack(MAGIC, VERSION, len(text)) + text


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that was read. ``data``: complete records, in the order in which they were written."""

    path: Path
    header: dict[str, Any]
    data: memoryview

    def __len__(self) -> int:
        return len(self.data) // RECORD.size

    def __iter__(self) -> Iterator[Record]:
        return (Record(*fields) for fields in RECORD.iter_unpack(self.data))

    @property
    def complete(self) -> bool:
        """Whether the daemon has ended in order. If not, it was killed or still runs."""
        return len(self) > 0 and self._at(len(self) - 1).kind == Kind.END

    @property
    def dropped(self) -> int:
        """Number of records that are missing because they came faster than they could be written."""
        if self.complete:
            return self._at(len(self) - 1).pages
        return max((record.pages for record in self if record.kind == Kind.DROPPED), default=0)

    def _at(self, index: int) -> Record:
        return Record(*RECORD.unpack_from(self.data, index * RECORD.size))

    def program(self, task: int) -> str:
        """The name of the program of a task; empty in traces of older versions."""
        return next(
            (str(known.get("program", "")) for known in self.header["tasks"] if known["pid"] == task), ""
        )

    def source_name(self, task: int, source: int) -> str:
        """The name of a source as in summaries: local, parent-1, ..., remote, zero, lost."""
        if source in SOURCE_NAMES:
            return SOURCE_NAMES[source]
        for known in self.header["tasks"]:
            if known["pid"] == task and source < len(known["levels"]):
                return str(known["levels"][source])
        return f"level {source}"


def read_trace(path: Path) -> Trace:
    """Read a trace up to its last complete record. Raises TraceError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    except OSError as error:
        reason = "not a file" if error.errno == errno.ENODEV else error.strerror
        raise TraceError(f"{path}: {reason}") from error
    if len(whole) < len(MAGIC) or whole[: len(MAGIC)] != MAGIC:
        raise TraceError(f"{path} is not a trace of lazypages serve --trace")
    if len(whole) < _PREFIX.size:
        raise TraceError(f"{path} is cut short: it ends within its header")
    _magic, version, length = _PREFIX.unpack_from(whole)
    if version != VERSION:
        raise TraceError(f"{path} is a trace of format {version}; this lazypages reads format {VERSION} only")
    start = _PREFIX.size + length
    if length > _MAX_HEADER or len(whole) < start:
        raise TraceError(f"{path} is cut short: it ends within its header")
    try:
        header = json.loads(bytes(whole[_PREFIX.size : start]))
        fits = header["record_bytes"] == RECORD.size and all(
            {"pid", "levels"} <= task.keys() for task in header["tasks"]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise TraceError(f"{path} is damaged: its header can't be read")
    records = (len(whole) - start) // RECORD.size
    return Trace(path, header, whole[start : start + records * RECORD.size])
