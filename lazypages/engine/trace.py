"""The ring in memory into which the engine puts records of what it does (csrc/serve/trace.h)."""

from __future__ import annotations

import os

from lazypages.engine._uffd import ffi, lib

#: Records that wait to be written: 1 MiB of memory, some hundredths of a second at full speed.
RING_RECORDS = 1 << 14


class Ring:
    """Records on their way to a file. `records` is a power of two; what does not fit is dropped, and counted."""

    def __init__(self, records: int = RING_RECORDS) -> None:
        handle = lib.lp_trace_new(records)
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.handle = ffi.gc(handle, lib.lp_trace_free)

    @property
    def written(self) -> int:
        return int(lib.lp_trace_written(self.handle))

    @property
    def dropped(self) -> int:
        return int(lib.lp_trace_dropped(self.handle))
