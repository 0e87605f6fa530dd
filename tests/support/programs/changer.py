"""Changes itself as each line of the file "do" in its working directory says, and answers with a line.

Its memory has known contents, so that a level can be compared with it (tests/support/memory.py).
"""

import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path

DO, DONE = Path("do"), Path("done")
PAGES = 1024
memory = mmap.mmap(-1, PAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = os.urandom(PAGES * 4096)
goes = threading.Event()


def fork():
    child = os.fork()
    if not child:
        memory[0:6] = b"forked"
        print("child", os.getpid(), flush=True)
        while True:
            time.sleep(1000)


def execve():
    DONE.write_text(str(done))  # what is below that line is the next program's
    os.execv(sys.executable, [sys.executable, __file__])


def threads():
    """Some that stay, and some that have ended."""
    for target in (goes.wait, memory.find):
        for _ in range(3):
            thread = threading.Thread(
                target=target, args=() if target == goes.wait else (b"nothing",), daemon=True
            )
            thread.start()
            if target != goes.wait:
                thread.join()
    memory[4096:4103] = b"threads"
    print("threads", flush=True)


def replaced():
    """Other memory at the place of what was there."""
    where = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    assert libc.mmap(ctypes.c_void_p(where), PAGES * 2048, 3, 0x32, -1, 0) == where
    ctypes.memset(where + 4096, 5, 4096)
    print("replaced", flush=True)


def reap():
    print("reaped", os.wait()[0], flush=True)


done = int(DONE.read_text()) if DONE.exists() else 0
print("ready", flush=True)
while True:
    lines = DO.read_text().splitlines() if DO.exists() else []
    for line in lines[done:]:
        done += 1
        globals()[line]()
    time.sleep(0.005)
