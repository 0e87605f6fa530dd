"""The images of a packed checkpoint without its lazy pages: what a lazy restore reads itself.

As after ``criu dump --lazy-pages``: a lazy page is only in the pagemap, and the daemon brings it from the pack.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from images_spec._files import OutputFile
from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PRESENT
from images_spec.images import Kind
from images_spec.packed import Area, PackReader
from images_spec.pagemap import Pagemap, PagemapWriter, pages_name
from images_spec.placement import SOURCE_LOST, SOURCE_REMOTE, ExtentTable, resolve

#: The pack from which the images in a directory are: its identity. Without this file, nothing is written over.
MARK: Final = "from-pack"
_MEMORY: Final = re.compile(r"pagemap-(shmem-)?(\d+)\.img")


class LazyPages(NamedTuple):
    """The pages of a task in a pack. ``Extent.offset`` is the place in ``area``, bytes."""

    extents: ExtentTable
    area: Area


class Placed(NamedTuple):
    """``tasks``: by pid. ``elsewhere``: lazy pages that are not in the pack either, but at a page server."""

    tasks: dict[int, LazyPages]
    elsewhere: int


def check_place(reader: PackReader, directory: Path) -> None:
    """Raises ``ImageError`` if ``directory`` has images that are not from this pack: they are not written over."""
    try:
        known = (directory / MARK).read_text()
    except OSError:
        known = ""
    if known != reader.identity.hex() and (directory / Kind.INVENTORY.file_name()).exists():
        raise ImageError(
            directory, f"has the images of another checkpoint than {reader.name}: name another directory"
        )


def place(reader: PackReader, directory: Path) -> Placed:
    """Writes into ``directory`` what a lazy restore reads, the inventory last. May be repeated, also during a restore.

    Raises ``ImageError``.
    """
    check_place(reader, directory)
    _put(directory, MARK, 0o600, [reader.identity.hex().encode()])
    last = Kind.INVENTORY.file_name()
    areas = {area.name: area for area in reader.areas}
    placed: dict[int, LazyPages] = {}
    elsewhere = 0
    for file, contents in reader.each(*sorted(reader.files, key=lambda file: file.name == last)):
        memory = _MEMORY.fullmatch(file.name)
        if memory:
            pagemap = Pagemap(b"".join(contents), Path(file.name))
            task = _place_memory(
                reader, areas.get(pages_name(pagemap.pages_id)), pagemap, directory, lazy=not memory[1]
            )
            if not memory[1]:
                placed[int(memory[2])] = task
                elsewhere += task.extents.counts().remote.total
        elif file.name != MARK and (file.name.endswith(".img") or not (directory / file.name).exists()):
            _put(directory, file.name, file.mode & 0o777, contents)
        else:  # what is there may be the log of this run; the pack's may be that of an earlier one
            deque(contents, maxlen=0)
    return Placed(placed, elsewhere)


def _place_memory(
    reader: PackReader, area: Area | None, pagemap: Pagemap, directory: Path, *, lazy: bool
) -> LazyPages:
    """A pagemap, and its pages that are not lazy; all, unless ``lazy``."""
    if area is None or area.pages != pagemap.present_pages:
        raise ImageError(reader.name, f"{pagemap.path} and its pages do not match")
    extents = resolve([pagemap], remote=True)
    with (
        _replacing(directory / pagemap.path) as new_pagemap,
        PagemapWriter(new_pagemap, pagemap.pages_id) as writer,
        _replacing(directory / area.name) as new_pages,
        OutputFile(new_pages) as pages,
    ):
        for extent in extents:
            flags = PE_LAZY if extent.lazy else 0
            if extent.source not in {SOURCE_REMOTE, SOURCE_LOST} and not (lazy and extent.lazy):
                flags |= PE_PRESENT
                for count, data in reader.pages(area, extent.offset // PAGE_SIZE, extent.nr_pages):
                    if data is None:
                        pages.skip(count * PAGE_SIZE)
                    else:
                        pages.write(data)
            writer.add(extent.start, extent.nr_pages, flags)
    return LazyPages(extents, area)


def _put(directory: Path, name: str, mode: int, contents: Iterable[bytes]) -> None:
    with _replacing(directory / name) as new:
        with OutputFile(new) as out:
            for data in contents:
                out.write(data)
        new.chmod(mode)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new file, which gets the name ``path`` when it is complete: a restore may be reading the old one."""
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        os.replace(new, path)
    except OSError as error:
        raise ImageError(path, f"can't be written: {error.strerror}") from None
    finally:
        new.unlink(missing_ok=True)
