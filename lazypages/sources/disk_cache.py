"""Frames of packs in stores, kept on the disk for all restores of this machine.

One sparse file for each pack, named by the pack's identity; a frame is at the same place as in the pack. A hole, a
frame that a crash has cut off, and one that somebody has changed are the same: their digest is wrong, and the frame is
read from the store. So nothing needs to be locked, synced or trusted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from lazypages.errors import LazyPagesError

log = logging.getLogger("lazypages")

SUFFIX: Final = ".frames"
BLOCK: Final = 512  # bytes: unit of st_blocks (stat(2))
STEP: Final = 16 << 20  # bytes that are written between two looks at the size of all files


class DiskCache:
    """The file of one pack in ``folder``, whose files take ``limit`` bytes in all, and what is written meanwhile.

    Where they take more, those that were not used for the longest time are removed; a pack that is larger by itself is
    kept in part. Raises LazyPagesError. A disk that fails or is full later is logged: then there is no cache.
    """

    def __init__(self, folder: Path, identity: bytes, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._path = folder / f"{identity.hex()}{SUFFIX}"
        self._unchecked = 0
        self._writes = True
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise LazyPagesError(f"--pack-cache {folder}: {error.strerror}") from None
        with suppress(OSError):
            os.utime(self._fd)  # it is in use
        self._shrink()

    def close(self) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """What is there, which may be anything."""
        try:
            return os.pread(self._fd, size, offset)
        except OSError:
            return b""

    def write(self, offset: int, data: bytes) -> None:
        if not self._writes:
            return
        try:
            os.pwrite(self._fd, data, offset)
        except OSError as error:
            log.warning("--pack-cache %s: %s; keeping no more in it", self._folder, error.strerror)
            self._writes = False
        self._unchecked += len(data)
        if self._unchecked >= STEP:
            self._unchecked = 0
            self._shrink()

    def _shrink(self) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total > self._limit and path != self._path:
                with suppress(OSError):
                    path.unlink()
                total -= size
        # another process may have removed ours: what is written then would count nowhere
        if total > self._limit or not os.fstat(self._fd).st_nlink:
            self._writes = False

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Time of the last use, bytes on the disk, path."""
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # removed by another process
                status = path.lstat()
                yield status.st_mtime_ns, status.st_blocks * BLOCK, path
