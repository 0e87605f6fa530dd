"""Reading a pagemap image into a C array, and writing one (images_spec/pagemap.md).

An entry takes 24 bytes; Python objects are made only on access. A million entries are a normal size.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from images_spec._files import OutputFile, read_file
from images_spec._pagemap import ffi, lib
from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE
from images_spec.images import Kind, encode
from images_spec.pagemap_pb2 import PagemapHead


class Entry(NamedTuple):
    """A run of pages: address of the first page, number of pages, ``PE_*`` bits."""

    vaddr: int
    nr_pages: int
    flags: int


def pages_name(pages_id: int) -> str:
    """The name of a file of pages, which is in the directory of the pagemap that names it."""
    return f"pages-{pages_id}.img"


class Pagemap:
    """The entries of one pagemap image: sorted, disjoint, page aligned, with known flags only.

    ``path``: of the image. ``pages_id``: the data is in ``pages_name(pages_id)`` in the same directory.
    ``present_pages``: number of pages in that file.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        """Parses an image. ``path``: for error messages. Raises ``ImageError`` with the offset."""
        self.path = path
        pagemap, error = ffi.new("struct lp_pagemap *"), ffi.new("struct lp_image_error *")
        if lib.lp_pagemap_parse(ffi.from_buffer(data), len(data), pagemap, error):
            raise _image_error(path, error, error.offset)
        self._pagemap = ffi.gc(
            pagemap, lib.lp_pagemap_free, pagemap.count * ffi.sizeof("struct lp_pagemap_entry")
        )
        self.pages_id: int = pagemap.pages_id
        self.present_pages: int = pagemap.present_pages

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads an image. Raises ``ImageError``; ``ImageMissingError`` if it does not exist."""
        path = Path(path)
        return cls(read_file(path), path)

    @property
    def entries_pointer(self) -> Any:
        """``struct lp_pagemap_entry *`` (csrc/images/pagemap.h), valid while this object lives."""
        return self._pagemap.entries

    def __len__(self) -> int:
        count: int = self._pagemap.count
        return count

    def __getitem__(self, index: int) -> Entry:
        index = range(len(self))[operator.index(index)]
        entry = self._pagemap.entries[index]
        return Entry(entry.vaddr, entry.nr_pages, entry.flags)

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def check_pages_size(self, size: int, path: Path) -> None:
        """Raises ``ImageError`` if the pages file ``path`` of ``size`` bytes is shorter than the pagemap says."""
        wanted = self.present_pages * PAGE_SIZE
        if size < wanted:
            promised = f"{self.present_pages} page{'' if self.present_pages == 1 else 's'}"
            promise = f"{self.path.name} promises {promised} ({wanted} bytes)"
            raise ImageError(path, f"holds {size} bytes, but {promise}")


class PagemapWriter:
    """Writes a pagemap image entry by entry, in bounded memory; a context manager.

    The image is complete at the end of the block; if the block fails, the file is emptied. Numbers of pages are written
    to both fields (``nr_pages``, and ``compat_nr_pages`` if they fit 32 bits), so that CRIU before and from 4.2
    can read them. Raises ``ImageError``, also for entries that a reader rejects. ``keep``: see ``OutputFile``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        pages_id: int,
        keep: Callable[[Path, int], None] | None = None,
    ) -> None:
        self._path = Path(path)
        self._file = OutputFile(self._path, keep)
        self._pending = b"".join(encode(Kind.PAGEMAP, [(PagemapHead(pages_id=pages_id), b"")], self._path))
        self._writer = ffi.new("struct lp_pagemap_writer *")
        self._bytes = ffi.buffer(self._writer.buffer)
        self._error = ffi.new("struct lp_image_error *")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.discard()

    def add(self, vaddr: int, nr_pages: int, flags: int) -> None:
        """Appends an entry, which must start at or behind the end of the last one."""
        outcome = lib.lp_pagemap_add(self._writer, vaddr, nr_pages, flags, self._error)
        if outcome < 0:
            raise _image_error(self._path, self._error, None)
        if outcome:
            self._flush()

    def close(self) -> None:
        """Writes the remaining entries. The image is complete only after this."""
        try:
            self._flush()
        except ImageError:
            self._file.discard()
            raise
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._pending + self._bytes[: self._writer.used])
        self._pending = b""
        self._writer.used = 0


def write(path: str | os.PathLike[str], pages_id: int, entries: Iterable[tuple[int, int, int]]) -> None:
    """Writes a whole pagemap image of ``(vaddr, nr_pages, flags)``. Raises ``ImageError``."""
    with PagemapWriter(path, pages_id) as writer:
        for entry in entries:
            writer.add(*entry)


def _image_error(path: Path, error: Any, offset: int | None) -> ImageError:
    return ImageError(path, ffi.string(error.what).decode(), offset=offset)
