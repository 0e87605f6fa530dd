"""A debugger, as far as the tests need one. PID: attaches to that process, and reads all of its private memory.

Prints how many bytes could not be read, then those of the memory that `onlooked` fills which are wrong.
"""

import ctypes
import os
import struct
import sys
import time
from pathlib import Path

PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
PAGE = 4096
PATIENCE = 500
FILLED = 1 << 45  # programs/onlooked.c


def read(memory: int, at: int) -> bytes:
    """A page. Who attaches may be faster than who makes it wait, and tries again."""
    for _ in range(PATIENCE):
        try:
            return os.pread(memory, PAGE, at)
        except OSError:
            time.sleep(0.01)
    return b""


def main() -> None:
    pid = int(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if libc.ptrace(request, pid, 0, 0):
            sys.exit(os.strerror(ctypes.get_errno()))
    os.waitpid(pid, WALL)
    unread = wrong = 0
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, access, _offset, _device, inode, *_name = line.split()
        start, end = (int(word, 16) for word in span.split("-"))
        if access[:2] != "rw" or inode != "0":
            continue
        for at in range(start, end, PAGE):
            data = read(memory, at)
            if not data:
                print(f"{at:#x} in {line.strip()} can't be read", file=sys.stderr)
                unread += PAGE
                continue
            if start == FILLED:
                first = at - start + 1
                wrong += data != struct.pack("<512Q", *range(first, first + PAGE, 8))
    print(unread, wrong * PAGE)


main()
