"""The pages of all tasks of an image directory and its parents, mapped, for many readers at once."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from images_spec.checkpoint import parent_chain
from images_spec.errors import ImageError, ImageMissingError
from images_spec.images import Kind
from images_spec.pagemap import Pagemap
from images_spec.placement import ExtentTable, resolve
from lazypages.wire import PAGE_SIZE

_PAGEMAP_NAME = re.compile(re.escape(Kind.PAGEMAP.file_name("PID")).replace("PID", r"([0-9]+)"))
_ZERO_PAGE = bytes(PAGE_SIZE)
_WORDS = 4  # of 8 bytes, in a struct lp_extent (csrc/extent.h)


@dataclass(frozen=True, slots=True)
class PagesFile:
    """A pages image, mapped for reading: `size` bytes, as promised by its pagemap or more."""

    path: Path
    fd: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes at `offset` of a pages file."""

    file: PagesFile
    offset: int
    size: int

    def view(self) -> memoryview:
        """The bytes, where they are mapped. Reading it in user space raises SIGBUS if the file was cut short."""
        return self.file.data[self.offset : self.offset + self.size]

    def read(self) -> bytes:
        """A copy of the bytes. Raises ImageError when the file was cut short."""
        data = os.pread(self.file.fd, self.size, self.offset)
        if len(data) != self.size:
            raise ImageError(
                self.file.path, "was cut short while it was served", offset=self.offset + len(data)
            )
        return data

    def is_zero(self) -> bool:
        """Whether there is nothing but zeros in it; quick when there is something else at the beginning."""
        if os.pread(self.file.fd, 16, self.offset) != _ZERO_PAGE[:16]:
            return False
        data = self.read()
        return data.count(0) == len(data)


class _Task:
    """Where each page of one task is."""

    def __init__(self, extents: ExtentTable, levels: list[PagesFile | None]) -> None:
        self._extents = extents  # keeps the memory of _words alive
        self._levels = levels
        size = len(extents) * _WORDS * 8
        memory = (ctypes.c_char * size).from_address(extents.address) if size else b""
        self._words = memoryview(memory).cast("B").cast("Q")
        self._indices = range(len(extents))

    def find(self, address: int, nr_pages: int) -> list[Piece]:
        pieces = []
        words = self._words
        index = bisect_right(self._indices, address, key=lambda index: words[index * _WORDS]) - 1
        while nr_pages and 0 <= index < len(self._indices):
            start, count, offset = words[index * _WORDS : index * _WORDS + 3]
            source = self._extents[index].source
            skip = (address - start) // PAGE_SIZE
            if not 0 <= skip < count or source >= len(self._levels) or (file := self._levels[source]) is None:
                break
            taken = min(nr_pages, count - skip)
            pieces.append(Piece(file, offset + skip * PAGE_SIZE, taken * PAGE_SIZE))
            address += taken * PAGE_SIZE
            nr_pages -= taken
            index += 1
        return pieces


class ServedImages:
    """All tasks of `directory`. Everything is read and checked at the start. Raises ImageError."""

    def __init__(self, directory: Path) -> None:
        chain = parent_chain(directory)
        self._files: dict[Path, PagesFile] = {}
        self._tasks: dict[int, _Task] = {}
        for name in sorted(os.listdir(directory)):
            if match := _PAGEMAP_NAME.fullmatch(name):
                pid = int(match[1])
                self._tasks[pid] = self._load(pid, chain)
        if not self._tasks:
            raise ImageError(directory, "holds no pagemap image of a task")

    @property
    def pids(self) -> list[int]:
        return list(self._tasks)

    def find(self, pid: int, address: int, nr_pages: int) -> list[Piece]:
        """Where the first pages of the range are, up to all of them; nothing if the first one is not here."""
        task = self._tasks.get(pid)
        return task.find(address, nr_pages) if task else []

    def _load(self, pid: int, chain: tuple[Path, ...]) -> _Task:
        pagemaps: list[Pagemap] = []
        levels: list[PagesFile | None] = []
        for directory in chain:
            try:
                pagemap = Pagemap.load(directory / Kind.PAGEMAP.file_name(pid))
            except ImageMissingError:
                break
            pagemaps.append(pagemap)
            levels.append(self._map(directory / f"pages-{pagemap.pages_id}.img", pagemap))
        return _Task(resolve(pagemaps, remote=False), levels)

    def _map(self, path: Path, pagemap: Pagemap) -> PagesFile | None:
        if not pagemap.present_pages:
            return None
        if path not in self._files:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                size = os.fstat(fd).st_size
                data = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) if size else b""
            except (OSError, ValueError) as error:
                raise ImageError(path, f"can't be mapped: {error}") from None
            self._files[path] = PagesFile(path, fd, memoryview(data))
        pagemap.check_pages_size(len(self._files[path].data), path)
        return self._files[path]
