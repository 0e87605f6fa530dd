"""Packs a checkpoint and its chain of parents into one file, and unpacks it again."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from images_spec._files import OutputFile
from images_spec.checkpoint import PARENT_LINK, open_checkpoint
from images_spec.errors import ImageError, ImageMissingError
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PRESENT
from images_spec.images import Kind
from images_spec.packed import PIECE, Area, PackReader, PackWriter
from images_spec.pagemap import Pagemap, PagemapWriter, pages_name
from images_spec.placement import SOURCE_LOST, SOURCE_REMOTE, Extent, ExtentTable, resolve

READ_PAGES: Final = 256
_PAGES: Final = re.compile(r"pages-\d+\.img")
_PAGEMAP: Final = re.compile(r"pagemap-(shmem-)?\d+\.img")

Progress = Callable[[int], None]
"""Is told a number of bytes of pages that are done."""


def pack(directory: Path, target: Path, progress: Progress = lambda _: None) -> PackWriter:
    """Writes the checkpoint in ``directory`` to the file ``target``, which must not exist. Returns its numbers.

    The chain is flattened: what is unpacked has no parent. Pages that are at a page server stay so. Other images are
    kept as they are, with whatever else is a regular file in the directory.

    Raises ``ImageError``; then there is no ``target``.
    """
    chain = open_checkpoint(directory).chain
    if os.path.lexists(target):
        raise ImageError(target, "exists already")
    try:
        with PackWriter(target) as writer, tempfile.TemporaryDirectory(prefix="lazypages-pack-") as folder:
            for name in sorted(os.listdir(directory)):
                path = directory / name
                if _PAGEMAP.fullmatch(name):
                    _add_memory(writer, chain, Path(folder, name), progress)
                elif _is_image(path) and path != target:
                    writer.add_file(name, stat.S_IMODE(path.stat().st_mode), _contents(path))
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return writer


def _is_image(path: Path) -> bool:
    """Whether a pack holds this file as it is. Raises ``ImageError`` for what it can't hold."""
    if path.is_symlink() and path.name != PARENT_LINK:
        raise ImageError(path, "is a symbolic link: a packed checkpoint can't hold it")
    return path.is_file() and not _PAGES.fullmatch(path.name)


def _add_memory(writer: PackWriter, chain: tuple[Path, ...], flat: Path, progress: Progress) -> None:
    """A pagemap and its pages. ``flat``: a new file, with its name."""
    name = flat.name
    levels = _levels(chain, name)
    number = levels[0][0].pages_id
    table = resolve([pagemap for pagemap, _ in levels], remote=True)
    _write_flat(flat, number, table, chain[0] / name)
    writer.add_file(name, 0o600, _contents(flat))
    writer.add_pages(pages_name(number), _pages(table, levels, progress))


def bytes_of_pages(directory: Path) -> int:
    """What ``pack`` will report as progress in all. Raises ``ImageError``."""
    chain = open_checkpoint(directory).chain
    names = (name for name in os.listdir(directory) if _PAGEMAP.fullmatch(name))
    tables = (resolve([pagemap for pagemap, _ in _levels(chain, name)], remote=True) for name in names)
    counts = [table.counts() for table in tables]
    return sum(level.total for count in counts for level in count.levels) * PAGE_SIZE


def _levels(chain: tuple[Path, ...], name: str) -> list[tuple[Pagemap, Path]]:
    """A pagemap in each level; the first level without one ends the chain, as for CRIU."""
    levels: list[tuple[Pagemap, Path]] = []
    for directory in chain:
        try:
            levels.append((Pagemap.load(directory / name), directory))
        except ImageMissingError:
            if not levels:
                raise
            break
    return levels


def _flags(extent: Extent) -> int:
    return PE_LAZY if extent.source == SOURCE_REMOTE else PE_PRESENT | (PE_LAZY if extent.lazy else 0)


def _write_flat(target: Path, pages_id: int, table: ExtentTable, path: Path) -> None:
    """The pagemap of all pages of a chain, as one level."""
    with PagemapWriter(target, pages_id) as writer:
        for extent in table:
            if extent.source == SOURCE_LOST:
                raise ImageError(path, f"the page {extent.start:#x} is in no level of the chain")
            writer.add(extent.start, extent.nr_pages, _flags(extent))


def _contents(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while data := file.read(PIECE):
                yield data
    except OSError as error:
        raise ImageError(path, f"can't be read: {error.strerror}") from None


def _pages(table: ExtentTable, levels: list[tuple[Pagemap, Path]], progress: Progress) -> Iterator[bytes]:
    """The bytes of all pages that the chain has, in the order of the flat pagemap."""
    paths = [directory / pages_name(pagemap.pages_id) for pagemap, directory in levels]
    files: dict[int, int] = {}
    try:
        for extent in table:
            if extent.source == SOURCE_REMOTE:
                continue
            path = paths[extent.source]
            try:
                if extent.source not in files:
                    files[extent.source] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                at, end = extent.offset, extent.offset + extent.nr_pages * PAGE_SIZE
                while at < end:
                    size = min(end - at, READ_PAGES * PAGE_SIZE)
                    data = os.pread(files[extent.source], size, at)
                    if len(data) != size:
                        raise ImageError(path, "is cut off", offset=at)
                    yield data
                    progress(size)
                    at += size
            except OSError as error:
                raise ImageError(path, f"can't be read: {error.strerror}") from None
    finally:
        for fd in files.values():
            os.close(fd)


@contextmanager
def open_pack(path: Path) -> Iterator[PackReader]:
    """A packed checkpoint in a file, open during the block. Raises ``ImageError``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(path, f"can't be opened: {error.strerror}") from None
    try:
        yield PackReader(lambda offset, count: os.pread(fd, count, offset), os.fstat(fd).st_size, path)
    finally:
        os.close(fd)


def unpack(reader: PackReader, directory: Path, progress: Progress = lambda _: None) -> None:
    """Writes all images into ``directory``, which is created or must be empty; zero pages become holes.

    The inventory comes last, when all other images are on disk. Raises ``ImageError``; the directory then has
    no inventory, and no program takes it for a checkpoint.
    """
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if any(directory.iterdir()):
            raise ImageError(directory, "is not empty: name a new directory")
    except OSError as error:
        raise ImageError(directory, f"can't be used: {error.strerror}") from None
    for area in reader.areas:
        with OutputFile(directory / area.name, _on_disk) as out:
            _unpack_pages(reader, area, out, progress)
    last = Kind.INVENTORY.file_name()
    for file in sorted(reader.files, key=lambda file: file.name == last):
        if file.name == last:
            _sync_directory(directory)
        with OutputFile(directory / file.name, _on_disk) as out:
            for data in reader.contents(file):
                out.write(data)
        (directory / file.name).chmod(file.mode & 0o777)
    _sync_directory(directory)


def unpack_without_pages(reader: PackReader, directory: Path) -> None:
    """The same, but the pages images are holes of the right size: enough to look at. Raises ``ImageError``."""
    for area in reader.areas:
        with OutputFile(directory / area.name) as out:
            out.skip(area.pages * PAGE_SIZE)
    for file in reader.files:
        with OutputFile(directory / file.name) as out:
            for data in reader.contents(file):
                out.write(data)


def _unpack_pages(reader: PackReader, area: Area, out: OutputFile, progress: Progress) -> None:
    for count, data in reader.pages(area, 0, area.pages):
        if data is None:
            out.skip(count * PAGE_SIZE)
        else:
            out.write(data)
        progress(count * PAGE_SIZE)


def _on_disk(_path: Path, fd: int) -> None:
    os.fsync(fd)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
