"""Many small restores through a resident daemon, one after the other, of memory of this process.

``python -m tests.support.small_restores SOCKET IMAGES SEED`` makes as many as each line of standard input says, and
answers with a line when they have ended. This process is the task and its restorer: a restore costs no other process.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import socket
import struct
import sys
from pathlib import Path

from lazypages.control.handover import FINISH
from lazypages.resident.client import Client, RefusedError
from tests.support.fake import BASE, PAGE, page_bytes, write_images

PAGES = 8

#: asm/unistd_64.h; linux/userfaultfd.h
SYS_USERFAULTFD, UFFDIO_API, UFFDIO_REGISTER = 323, 0xC018AA3F, 0xC020AA00
FORK, REMAP, REMOVE, UNMAP = 1 << 1, 1 << 2, 1 << 3, 1 << 6
MAP_FIXED_NOREPLACE = 0x100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_memory() -> int:
    """A uffd with memory registered at BASE."""
    uffd = int(_libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    assert uffd >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, FORK | REMAP | REMOVE | UNMAP, 0)))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    assert _libc.mmap(BASE, PAGES * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == BASE
    fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", BASE, PAGES * PAGE, 1, 0)))
    return uffd


def hand_over(path: Path) -> None:
    uffd = map_memory()
    with socket.socket(socket.AF_UNIX) as restorer:
        restorer.connect(str(path))
        restorer.sendall(struct.pack("=i", os.getpid()))
        socket.send_fds(restorer, [b"\0"], [uffd])
        os.close(uffd)
        restorer.sendall(struct.pack("=I", FINISH))


def check(pages: int) -> None:
    for page in range(pages):
        assert ctypes.string_at(BASE + page * PAGE, PAGE) == page_bytes(0, page), page


def one(daemon: Path, images: Path, choose: random.Random) -> None:
    with Client(daemon) as client:
        number = client.request("serve", images=str(images), background=choose.random() < 0.5)["restore"]
        if choose.random() < 0.1:  # nobody connects
            client.request("stop", restore=number)
            assert client.request("wait", restore=number)["exit"] == 1
            return
        if choose.random() < 0.1:
            try:
                client.request("serve", images=str(images))
            except RefusedError as error:
                assert "another daemon" in str(error)  # noqa: PT017 - no test
        if choose.random() < 0.3:
            client.send("wait", restore=number)
            client.__exit__()  # the client vanishes
    hand_over(images / "lazy-pages.socket")
    check(PAGES if choose.random() < 0.7 else PAGES // 2)
    assert _libc.munmap(BASE, PAGES * PAGE) == 0
    with Client(daemon) as client:
        assert client.request("wait", restore=number)["exit"] == 0


def main() -> None:
    daemon, images = map(Path, sys.argv[1:3])
    choose = random.Random(int(sys.argv[3]))
    write_images(images, [os.getpid()], PAGES)
    for line in sys.stdin:
        for _ in range(int(line)):
            one(daemon, images, choose)
        print("done", flush=True)


if __name__ == "__main__":
    main()
