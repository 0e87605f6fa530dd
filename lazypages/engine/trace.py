"""Binding of csrc/serve/trace.h: the ring buffer of the engine's trace records."""

from __future__ import annotations

import os
import time

from lazypages.engine._uffd import ffi, lib

#: Capacity of the ring: 1 MiB, enough for some 10 ms at full speed.
RING_RECORDS = 1 << 14


class Ring:
    """A ring of `records` (a power of two) trace records. Records that do not fit are dropped, and counted.

    The constructor raises OSError.
    """

    def __init__(self, records: int = RING_RECORDS) -> None:
        handle = lib.lp_trace_new(records)
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.handle = ffi.gc(handle, lib.lp_trace_free)

    def restore_finished(self) -> None:
        """Put a record that the restore has finished."""
        record = {
            "time": time.monotonic_ns(),
            "kind": lib.LP_TRACE_RESTORED,
            "source": lib.LP_TRACE_NO_SOURCE,
        }
        lib.lp_trace_put(self.handle, ffi.new("struct lp_trace_record *", record))

    @property
    def written(self) -> int:
        """Number of records written to the ring."""
        return int(lib.lp_trace_written(self.handle))

    @property
    def dropped(self) -> int:
        """Number of records dropped."""
        return int(lib.lp_trace_dropped(self.handle))
