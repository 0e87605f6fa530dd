"""Shared memory of a tree (anonymous, memfd, System V): which there is, and which of its pages have changed.

Writes to it are not tracked, because most can't be (docs/backend.md, "Shared memory"): all of it is compared with the
bytes that the parent levels have. That is right whoever has written it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dumptool import proc
from dumptool._ptrace import ffi, lib
from dumptool.chain import ParentPages
from dumptool.errors import DumpError, TaskGoneError, system_error
from dumptool.memory import Runs
from images_spec.flags import PAGE_SIZE

SYSV = "/SYSV"
MEMFD = "/memfd:"
STEP_PAGES = 65536
"""Pages compared per call into C."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of shared memory. ``number``: in names of images, its inode number as in CRIU's. ``path``: opens it.

    ``mapped``: the end of what is mapped of it, in bytes.
    """

    number: int
    path: str
    mapped: int = 0
    sysv: bool = False


@lru_cache(maxsize=1)
def device() -> int:
    """``st_dev`` of the kernel's own tmpfs, on which all shared memory but huge pages is."""
    fd = os.memfd_create("dumptool-device", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def find(layouts: Iterable[tuple[int, Iterable[proc.Vma]]], *, descriptors: bool) -> dict[int, Piece]:
    """The shared memory that processes, given by pid and mappings, have mapped; by number.

    ``descriptors``: also what they only have open. Left out are numbers that are ambiguous: those of System V are
    identifiers (shmget(2)), the others come from a counter.
    """
    found: dict[int, Piece] = {}
    ambiguous: set[int] = set()
    for piece in _pieces(layouts, descriptors=descriptors):
        known = found.setdefault(piece.number, piece)
        if known.sysv != piece.sysv:
            ambiguous.add(piece.number)
        if known.mapped < piece.mapped:
            found[piece.number] = replace(known, mapped=piece.mapped)
    return {number: piece for number, piece in found.items() if number not in ambiguous}


def _pieces(layouts: Iterable[tuple[int, Iterable[proc.Vma]]], *, descriptors: bool) -> Iterator[Piece]:
    for pid, vmas in layouts:
        for vma in vmas:
            if vma.device == device():
                mapped = vma.pgoff + vma.end - vma.start
                yield Piece(vma.inode, f"/proc/{pid}/{vma.link}", mapped, vma.name.startswith(SYSV))
        if descriptors:
            yield from _open_ones(pid)


def _open_ones(pid: int) -> Iterator[Piece]:
    with suppress(OSError):  # the process may have ended
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            with suppress(OSError):
                if os.readlink(path).startswith(MEMFD):
                    status = os.stat(path)
                    if status.st_dev == device():
                        yield Piece(status.st_ino, path)


class Memory:
    """A piece of shared memory, mapped into this process until it is not referenced any more.

    ``address``: where; read it with process_vm_readv: it may be cut short at any time. ``size``: in bytes, whole
    pages. ``fd``: valid until ``close``.
    """

    def __init__(self, piece: Piece) -> None:
        """Raises ``TaskGoneError`` if it is not there any more, ``DumpError``."""
        self.fd = _opened(piece)
        self._bytes: Any = ffi.NULL
        try:
            size = os.fstat(self.fd).st_size
            if size:
                mapped = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
                self._bytes = ffi.from_buffer("unsigned char[]", mapped)
        except (OSError, ValueError) as error:
            self.close()
            raise DumpError(f"shared memory {piece.number} can't be mapped: {error}") from None
        self.size = -(-size // PAGE_SIZE) * PAGE_SIZE

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", self._bytes))

    def close(self) -> None:
        os.close(self.fd)

    def compared(self, runs: Runs, parent: ParentPages) -> Runs:
        """The same pages, those that the parent levels have with the same bytes as PARENT. Raises ``ImageError``.

        ``runs`` begin at 0 for the first page.
        """
        made, count, cursor = Runs(), ffi.new("size_t *"), ffi.new("struct lp_cursor *")
        with parent.mapped(self._bytes) as compared:
            while cursor.run < runs.count:
                made.reserve(STEP_PAGES)
                count[0] = made.count
                outcome = lib.lp_compare_pages(
                    compared, runs.array, runs.count, cursor, STEP_PAGES, made.array, made.room, count
                )
                if outcome:
                    raise system_error(-outcome, "comparing shared memory")
                made.count = count[0]
        return made


def _opened(piece: Piece) -> int:
    try:
        fd = os.open(piece.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TaskGoneError(f"shared memory {piece.number} can't be opened: {error.strerror}") from None
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (device(), piece.number):
        os.close(fd)
        raise TaskGoneError(f"shared memory {piece.number} is not there any more")
    return fd
