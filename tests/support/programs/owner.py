"""Owns what argv names, of which dumptool's own images can hold nothing, and memory.

SIGUSR1: writes to some pages of the memory, in a pattern that depends on how often it was asked. SIGUSR2: says the
digest of all of it.
"""

import asyncio
import ctypes
import hashlib
import itertools
import mmap
import os
import signal
import socket
import sys

PAGES, EACH = 2048, 100
libc = ctypes.CDLL(None, use_errno=True)
kept = []

memory = mmap.mmap(-1, PAGES * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(PAGES):
    memory[page * 4096 : page * 4096 + 32] = hashlib.sha256(page.to_bytes(4, "little")).digest()
steps = itertools.count(1)


def step(*_):
    count = next(steps)
    for number in range(EACH):
        memory[(number * 17 + count) % PAGES * 4096 + 100] = count
    print("step", count, flush=True)


def say(*_):
    print("digest", hashlib.sha256(memory).hexdigest(), flush=True)


def descriptors():
    name = f"owner-{os.getpid()}"
    kept.append(os.memfd_create(name))
    os.write(kept[-1], bytes(4096))
    kept.append(mmap.mmap(kept[-1], 4096, flags=mmap.MAP_PRIVATE))
    kept[-1][100] = 7
    kept.append(libc.inotify_init1(0))
    libc.inotify_add_watch(kept[-1], b"/", 0x100)
    kept.append(libc.timerfd_create(1, 0))
    mask = (ctypes.c_uint64 * 16)(1 << signal.SIGTERM - 1)
    kept.append(libc.signalfd(-1, mask, 0))
    kept.append(os.eventfd(3))
    assert all(fd >= 0 for fd in kept if isinstance(fd, int)), kept


def filter_calls():
    """userfaultfd(2) ends the process."""
    rules = ((0x20, 0, 0, 0), (0x15, 0, 1, 323), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000))
    code = b"".join(
        one.to_bytes(2, "little") + bytes([true, false]) + value.to_bytes(4, "little")
        for one, true, false, value in rules
    )
    block = ctypes.create_string_buffer(code)
    program = (ctypes.c_uint64 * 2)(len(rules), ctypes.addressof(block))
    kept.append(block)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0


async def serve():
    """A server at a free port of the loopback, with a client of its own: both ends of a connection."""
    server = await asyncio.start_server(lambda *_: asyncio.sleep(1000), "127.0.0.1", 0)
    kept.append(await asyncio.open_connection(*server.sockets[0].getsockname()))
    kept.append(socket.socketpair())
    kept.append(os.eventfd(1))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, step)
    loop.add_signal_handler(signal.SIGUSR2, say)
    print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
    await asyncio.sleep(1000)


signal.signal(signal.SIGUSR1, step)
signal.signal(signal.SIGUSR2, say)
if "descriptors" in sys.argv:
    descriptors()
if "seccomp" in sys.argv:
    filter_calls()
if "asyncio" in sys.argv:
    asyncio.run(serve())
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
while True:
    signal.pause()
