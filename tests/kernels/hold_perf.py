"""Run a command with a performance event open: hold_perf.py COMMAND...

Breakpoints, which CRIU uses, are such events. The first one of a machine and the end of the last one have the kernel
change an instruction of its scheduler (perf_sched_events). If another emulated processor executes that at this moment,
it may see half of the change: the machine panics. As long as an event is open, nothing is changed.
"""

import ctypes
import os
import struct
import sys

PERF_EVENT_OPEN = 298  # of x86-64, as all of tests/kernels
SOFTWARE, DUMMY = 1, 9
SIZE = 64  # PERF_ATTR_SIZE_VER0

attributes = struct.pack("<IIQ48x", SOFTWARE, SIZE, DUMMY)
libc = ctypes.CDLL(None, use_errno=True)
event = libc.syscall(PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)  # of this thread, which becomes the command
if event < 0:
    raise OSError(ctypes.get_errno(), "perf_event_open")
os.set_inheritable(event, True)
os.execvp(sys.argv[1], sys.argv[1:])
