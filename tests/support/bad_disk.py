"""A disk that can't read some of its pages: a directory once more, read-only, through FUSE, which answers EIO there.

The kernel's side of the protocol is in its include/uapi/linux/fuse.h; what is needed here has not changed since 7.23.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PAGE = 4096
LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, INIT = 1, 2, 3, 14, 15, 18, 26
OPENDIR, READDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 27, 28, 29, 36, 42
ROOT = 1
DIRECT_IO = 1  # FOPEN_DIRECT_IO: requests come as the reader makes them, without the page cache
MNT_DETACH = 2
LONGEST = 1 << 20  # bytes of a request


class _Disk:
    def __init__(self, directory: Path, bad: set[int], *, direct: bool) -> None:
        self._directory, self._bad, self._direct = directory, bad, direct
        self._names = sorted(os.listdir(directory))
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self.over = os.eventfd(0, os.EFD_CLOEXEC)

    def run(self) -> None:
        """Answers until it is over, or the file system is unmounted."""
        while self.over not in select.select([self.fd, self.over], [], [])[0]:
            try:
                request = os.read(self.fd, LONGEST)
            except OSError as error:
                if error.errno in {
                    errno.EINTR,
                    errno.EAGAIN,
                    errno.ENOENT,
                }:  # ENOENT: the request is gone already
                    continue
                return
            _, opcode, unique, node = struct.unpack_from("=IIQQ", request)
            if opcode in {FORGET, BATCH_FORGET, INTERRUPT}:
                continue
            try:
                answer, status = self._answer(opcode, node, request[40:]), 0
            except OSError as error:
                answer, status = b"", -(error.errno or errno.EIO)
            with suppress(OSError):
                os.write(self.fd, struct.pack("=IiQ", 16 + len(answer), status, unique) + answer)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        match opcode:
            case 26:  # INIT
                read_ahead = struct.unpack_from("=I", body, 8)[0]
                return struct.pack("=IIIIHHIIHHI28x", 7, 31, read_ahead, 0, 0, 0, 1 << 17, 1, 0, 0, 0)
            case 1:  # LOOKUP
                name = body.rstrip(b"\0").decode()
                if name not in self._names:
                    raise OSError(errno.ENOENT, name)
                found = self._names.index(name) + 2
                return struct.pack("=QQQQII", found, 0, 60, 60, 0, 0) + self._attributes(found)
            case 3:  # GETATTR
                return struct.pack("=QII", 60, 0, 0) + self._attributes(node)
            case 14 | 27:  # OPEN, OPENDIR
                return struct.pack("=QIi", 0, DIRECT_IO if self._direct and opcode == OPEN else 0, 0)
            case 15:  # READ
                return self._read(node, *struct.unpack_from("=8xQI", body))
            case 28:  # READDIR
                return self._entries(*struct.unpack_from("=8xQI", body))
            case 18 | 29:  # RELEASE, RELEASEDIR
                return b""
        raise OSError(errno.ENOSYS, "not done here")

    def _path(self, node: int) -> Path:
        return self._directory if node == ROOT else self._directory / self._names[node - 2]

    def _attributes(self, node: int) -> bytes:
        found = self._path(node).stat()
        mode = (stat.S_IFDIR if node == ROOT else stat.S_IFREG) | 0o555
        times = (0, 0, 0, 0, 0, 0)
        return struct.pack("=QQQQQQIIIIIIIIII", node, found.st_size, 0, *times, mode, 1, 0, 0, 0, PAGE, 0)

    def _read(self, node: int, offset: int, size: int) -> bytes:
        path = self._path(node)
        with path.open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
        pages = range(offset // PAGE, (offset + len(data) + PAGE - 1) // PAGE)
        if path.name.startswith("pages-") and not self._bad.isdisjoint(pages):
            raise OSError(errno.EIO, "a bad page")
        return data

    def _entries(self, offset: int, size: int) -> bytes:
        entries = b""
        for number, name in list(enumerate(self._names, 1))[offset:]:
            encoded = name.encode()
            entry = struct.pack("=QQII", number + 1, number, len(encoded), stat.S_IFREG >> 12) + encoded
            entry += bytes(-len(entry) % 8)
            if len(entries) + len(entry) > size:
                break
            entries += entry
        return entries


@contextmanager
def bad_disk(directory: Path, mounted: Path, bad: set[int], *, direct: bool = False) -> Iterator[Path]:
    """`directory` once more at `mounted`, as it is now, where the `bad` pages of each pages image can't be read.

    A set that is changed meanwhile counts at once for pages that are not in the page cache.
    """
    mounted.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    disk = _Disk(directory, bad, direct=direct)
    thread = threading.Thread(target=disk.run, daemon=True)
    try:
        options = f"fd={disk.fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        if libc.mount(b"lazypages-test", bytes(mounted), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), f"mount {mounted}")
        thread.start()
        try:
            yield mounted
        finally:
            # Another mount namespace may have a copy of the mount; without its server it answers ENOTCONN.
            libc.umount2(bytes(mounted), MNT_DETACH)
            os.eventfd_write(disk.over, 1)
            thread.join()
    finally:
        os.close(disk.fd)
        os.close(disk.over)
