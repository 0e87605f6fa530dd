"""The pages of all tasks of an image directory and its parents, for many readers at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from images_spec.checkpoint import check_inventory, parent_chain
from images_spec.errors import ImageError, ImageMissingError
from images_spec.images import Kind
from images_spec.pagemap import Pagemap, pages_name
from images_spec.placement import ExtentTable, resolve
from lazypages.errors import UnreadableError
from lazypages.net._pageserver import ffi, lib
from lazypages.net.answerer import GetAnswerer
from lazypages.net.wire import PAGE_SIZE

MAX_PIECES: Final = 256

_PAGEMAP_NAME = re.compile(re.escape(Kind.PAGEMAP.file_name("PID")).replace("PID", r"([0-9]+)"))


@dataclass(frozen=True, slots=True)
class PagesFile:
    """A pages file, opened for reading."""

    path: Path
    handle: Any  # struct lp_pages_file


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes at `offset` of a pages file."""

    file: PagesFile
    offset: int
    size: int

    def read(self) -> bytes | bytearray:
        """The bytes, up to the first page that can't be read. Raises UnreadableError if that is the first page."""
        data = bytearray(self.size)
        count = lib.lp_pages_read(
            self.file.handle.fd, ffi.from_buffer(data), self.offset, self.size // PAGE_SIZE
        )
        if count <= 0:
            why = os.strerror(-count) if count else "was truncated while it was served"
            raise UnreadableError(f"{self.file.path} at offset {self.offset}: {why}")
        del data[count * PAGE_SIZE :]
        return data


class ServedImages:
    """All tasks of `directory`, read and checked at the start. Raises ImageError."""

    def __init__(self, directory: Path) -> None:
        chain = parent_chain(directory)
        for level in chain:
            check_inventory(level)
        self._files: dict[Path, PagesFile] = {}
        names = (_PAGEMAP_NAME.fullmatch(name) for name in os.listdir(directory))
        self.pids = sorted(int(match[1]) for match in names if match)
        if not self.pids:
            raise ImageError(directory, "has no pagemap image of a task")
        self._tables: list[ExtentTable] = []  # keeps the memory alive that the structs below point to
        self._levels: list[Any] = []
        self._tasks = ffi.new("struct lp_task_pages[]", len(self.pids))
        for task, pid in zip(self._tasks, self.pids, strict=True):
            self._load(task, pid, chain)
        self._by_number = list(self._files.values())
        self._served = ffi.new("struct lp_served *", (self._tasks, len(self.pids)))

    def find(self, pid: int, address: int, nr_pages: int) -> list[Piece]:
        """The place of the first pages of the range, up to all of them; empty if the first page is not here."""
        pieces = ffi.new("struct lp_piece[]", MAX_PIECES)
        count = lib.lp_find_pages(self._served, pid, address, nr_pages, pieces, MAX_PIECES)
        return [Piece(self._by_number[p.file.number], p.offset, p.size) for p in pieces[0:count]]

    def answerer(self, fd: int) -> GetAnswerer:
        """Answers plain GETs of the client on the socket `fd`, which must be blocking."""
        return GetAnswerer(self, self._served, fd)

    def _load(self, task: Any, pid: int, chain: tuple[Path, ...]) -> None:
        pagemaps: list[Pagemap] = []
        levels: list[Any] = []
        for directory in chain:
            try:
                pagemap = Pagemap.load(directory / Kind.PAGEMAP.file_name(pid))
            except ImageMissingError:
                break
            pagemaps.append(pagemap)
            levels.append(self._map(directory / pages_name(pagemap.pages_id), pagemap))
        table = resolve(pagemaps, remote=False)
        array = ffi.new("struct lp_pages_file *[]", levels)
        self._tables.append(table)
        self._levels.append(array)
        task.pid, task.nr_extents, task.nr_levels = pid, len(table), len(levels)
        task.extents = ffi.cast("struct lp_extent *", table.address)
        task.levels = array

    def _map(self, path: Path, pagemap: Pagemap) -> Any:
        if not pagemap.present_pages:
            return ffi.NULL
        if path not in self._files:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                size = os.fstat(fd).st_size
            except OSError as error:
                raise ImageError(path, f"can't be opened: {error.strerror}") from None
            handle = ffi.new("struct lp_pages_file *", (size, fd, len(self._files)))
            self._files[path] = PagesFile(path, handle)
        handle = self._files[path].handle
        pagemap.check_pages_size(handle.size, path)
        return handle
