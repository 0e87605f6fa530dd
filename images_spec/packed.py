"""A packed checkpoint: one file with all images of a dump, pages compressed and stored once (images_spec/packed.md).

Every read is checked against a digest: damage is an ``ImageError``, never other bytes. Compression is that of the
package zstandard, which is imported on first use.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from images_spec._files import MAX_SIZE, OutputFile
from images_spec.errors import ImageError
from images_spec.flags import PAGE_SIZE

MAGIC: Final = b"\x89LZPACK\n"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sI4x")
TRAILER: Final = struct.Struct("<QQQ32s8s")
DIGEST: Final = 16
"""Bytes of a block's digest (BLAKE2b)."""

FRAME_PAGES: Final = 16
"""Pages of a frame: what one fault reads and decompresses is at most 64 KiB."""
PIECE: Final = 1 << 22
"""Most bytes of a file that lie in one block."""
ZERO: Final = (1 << 64) - 1
"""Reference of a run of zero pages."""
LEVEL: Final = 3
"""Level of zstd."""

_ZERO_PAGE: Final = bytes(PAGE_SIZE)
_PLAIN: Final = frozenset({"name", "mode", "size", "blocks"})


class PackedFile(NamedTuple):
    """An image that is not of pages. ``size``: bytes. ``blocks``: where its contents are, in order."""

    name: str
    mode: int
    size: int
    blocks: Sequence[int]


class Run(NamedTuple):
    """``length`` pages whose numbers in the pack begin at ``first``, or ``ZERO``: all are zero."""

    first: int
    length: int


class Reading(NamedTuple):
    """``size`` bytes of the pack from ``offset`` on: these blocks, one after the other."""

    offset: int
    size: int
    blocks: Sequence[int]


class Area(NamedTuple):
    """A pages image. ``starts``: of each run, the number of pages before it in the image."""

    name: str
    pages: int
    runs: Sequence[Run]
    starts: Sequence[int]


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


class PackWriter:
    """Writes a packed checkpoint; a context manager. The file is complete, and on disk, at the end of the block.

    If the block fails, the file is emptied. Raises ``ImageError``. Compresses in threads, one for each CPU.
    """

    def __init__(self, path: Path, level: int = LEVEL) -> None:
        self._out = OutputFile(path, lambda _path, fd: os.fsync(fd))
        self._level = level
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self._waiting: deque[tuple[Future[bytes], int, list[int]]] = deque()
        self._at = 0
        self._frames: list[int] = []
        self._pieces: list[int] = []
        self._nr_pieces = 0
        self._blocks: list[tuple[int, int, int, bytes]] = []
        self._numbers: dict[bytes, int] = {}
        self._frame = bytearray()
        self._files: list[PackedFile] = []
        self._names: set[str] = set()
        self._areas: list[tuple[str, int, list[Run]]] = []
        self.zero_pages = 0
        self.pages = 0
        self._write(HEADER.pack(MAGIC, VERSION))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._out.discard()
            raise
        else:
            if kind is None:
                self._out.close()
            else:
                self._out.discard()
        finally:
            self._pool.shutdown(cancel_futures=True)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._at

    @property
    def stored_pages(self) -> int:
        """Pages that are neither zero nor equal to another one."""
        return len(self._numbers)

    def add_file(self, name: str, mode: int, contents: Iterable[bytes]) -> None:
        """``contents``: in pieces of any size up to ``PIECE`` bytes."""
        self._new(name)
        first, size = self._nr_pieces, 0
        for data in contents:
            self._submit(data, self._pieces)
            self._nr_pieces += 1
            size += len(data)
        self._files.append(PackedFile(name, mode, size, range(first, self._nr_pieces)))

    def add_pages(self, name: str, contents: Iterable[bytes]) -> None:
        """A pages image: ``contents`` are whole pages, any number at a time."""
        self._new(name)
        runs: list[Run] = []
        total = 0
        for data in contents:
            for at in range(0, len(data), PAGE_SIZE):
                page = data[at : at + PAGE_SIZE]
                number = ZERO if page == _ZERO_PAGE else self._number(page)
                last = runs[-1] if runs else Run(0, 0)
                if last.length and (
                    number == last.first == ZERO
                    or (last.first != ZERO and number == last.first + last.length)
                ):
                    runs[-1] = Run(last.first, last.length + 1)
                else:
                    runs.append(Run(number, 1))
                self.zero_pages += number == ZERO
            total += len(data) // PAGE_SIZE
        self.pages += total
        self._areas.append((name, total, runs))

    def _new(self, name: str) -> None:
        if name in self._names:
            raise ImageError(name, "belongs to two pagemaps")
        self._names.add(name)

    def _number(self, page: bytes) -> int:
        known = digest(page)
        number = self._numbers.get(known)
        if number is None:
            number = self._numbers[known] = len(self._numbers)
            self._frame += page
            if len(self._frame) == FRAME_PAGES * PAGE_SIZE:
                self._end_frame()
        return number

    def _end_frame(self) -> None:
        self._submit(bytes(self._frame), self._frames)
        self._frame.clear()

    def _submit(self, data: bytes, table: list[int]) -> None:
        self._waiting.append((self._pool.submit(self._compress, data), len(data), table))
        while len(self._waiting) > 4 * (os.cpu_count() or 1):
            self._take()

    def _compress(self, data: bytes) -> bytes:
        import zstandard  # noqa: PLC0415 - slow to import, and rarely needed

        if not hasattr(self._local, "compressor"):
            self._local.compressor = zstandard.ZstdCompressor(level=self._level)
        compressed: bytes = self._local.compressor.compress(data)
        return compressed

    def _take(self) -> None:
        """Write the oldest block."""
        future, raw, table = self._waiting.popleft()
        data = future.result()
        table.append(len(self._blocks))
        self._blocks.append((self._at, len(data), raw, digest(data)))
        self._write(data)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._at += len(data)

    def _finish(self) -> None:
        if self._frame:
            self._end_frame()
        while self._waiting:
            self._take()
        order = [*self._frames, *self._pieces]
        blocks = [self._blocks[number] for number in order]
        described = {
            "page_size": PAGE_SIZE,
            "frame_pages": FRAME_PAGES,
            "pages": len(self._numbers),
            "blocks": len(blocks),
            "files": [
                {
                    "name": file.name,
                    "mode": file.mode,
                    "size": file.size,
                    "blocks": [len(self._frames) + number for number in file.blocks],
                }
                for file in self._files
            ],
            "areas": [{"name": name, "pages": pages, "runs": len(runs)} for name, pages, runs in self._areas],
        }
        text = json.dumps(described).encode()
        index = b"".join(
            (
                struct.pack("<I", len(text)),
                text,
                *(struct.pack("<QII16s", *block) for block in blocks),
                *(struct.pack("<QQ", *run) for _, _, runs in self._areas for run in runs),
            )
        )
        compressed = self._compress(index)
        where = self._at
        known = hashlib.blake2b(compressed, digest_size=32).digest()
        self._write(compressed)
        self._write(TRAILER.pack(where, len(compressed), len(index), known, MAGIC))


class PackReader:
    """Reads a packed checkpoint. ``read_at(offset, size)`` returns that many bytes of it; ``name`` is for messages.

    Raises ``ImageError`` for everything that is not exactly what was written. Several threads may read at once.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], size: int, name: Path | str) -> None:
        self._read_at, self.name = read_at, name
        self._local = threading.local()
        if size < HEADER.size + TRAILER.size:
            raise ImageError(name, "is no packed checkpoint: it is too short")
        magic, version = HEADER.unpack(self._read(0, HEADER.size))
        if magic != MAGIC:
            raise ImageError(name, "is no packed checkpoint")
        if version != VERSION:
            raise ImageError(
                name, f"is a packed checkpoint of version {version}, this program knows {VERSION}"
            )
        where, length, raw, known, magic = TRAILER.unpack(self._read(size - TRAILER.size, TRAILER.size))
        if magic != MAGIC or where + length != size - TRAILER.size or raw > MAX_SIZE:
            raise ImageError(name, "is cut off, or its end is damaged")
        compressed = self._read(where, length)
        if hashlib.blake2b(compressed, digest_size=32).digest() != known:
            raise ImageError(name, "its index is damaged")
        self.identity = known
        """Of all that is in the pack: 32 bytes."""
        try:
            self._load(self._decompress(compressed, raw), where)
        except (KeyError, TypeError, ValueError, struct.error) as error:
            raise ImageError(name, f"its index is wrong: {error}") from None

    def _load(self, index: bytes, end: int) -> None:
        (length,) = struct.unpack_from("<I", index)
        described: dict[str, Any] = json.loads(index[4 : 4 + length])
        if described["page_size"] != PAGE_SIZE:
            raise ValueError(f"pages of {described['page_size']} bytes")
        self.frame_pages = int(described["frame_pages"])
        self.stored_pages = int(described["pages"])
        nr_blocks = int(described["blocks"])
        at = 4 + length
        rows = struct.Struct("<QII16s")
        self._blocks = list(rows.iter_unpack(index[at : at + nr_blocks * rows.size]))
        at += nr_blocks * rows.size
        if not 0 < self.frame_pages <= PIECE // PAGE_SIZE:
            raise ValueError(f"frames of {self.frame_pages} pages")
        nr_frames = -(-self.stored_pages // self.frame_pages)
        self.nr_frames = nr_frames
        if not nr_frames <= len(self._blocks) == nr_blocks:
            raise ValueError("the table of blocks")
        for offset, size, raw, _ in self._blocks:
            if offset < HEADER.size or offset + size > end or raw > PIECE:
                raise ValueError(f"a block at {offset}")
        self.files = tuple(PackedFile(**{key: file[key] for key in _PLAIN}) for file in described["files"])
        areas = []
        for area in described["areas"]:
            size = int(area["runs"]) * 16
            runs = [Run(*run) for run in struct.Struct("<QQ").iter_unpack(index[at : at + size])]
            at += size
            starts = [0, *accumulate(run.length for run in runs)]
            if starts.pop() != area["pages"] or len(runs) != area["runs"]:
                raise ValueError(f"the runs of {area['name']}")
            if any(run.first != ZERO and run.first + run.length > self.stored_pages for run in runs):
                raise ValueError(f"pages of {area['name']}")
            areas.append(Area(area["name"], int(area["pages"]), runs, starts))
        self.areas = tuple(areas)
        names = [file.name for file in self.files] + [area.name for area in areas]
        if len(set(names)) != len(names) or not all(map(_is_plain, names)):
            raise ValueError("names of files")
        for file in self.files:
            if any(not nr_frames <= block < nr_blocks for block in file.blocks):
                raise ValueError(f"blocks of {file.name}")

    def _read(self, offset: int, size: int) -> bytes:
        data = self._read_some(offset, size)
        if len(data) != size:
            raise ImageError(self.name, "is cut off", offset=offset)
        return data

    def _read_some(self, offset: int, size: int) -> bytes:
        try:
            return self._read_at(offset, size)
        except OSError as error:
            raise ImageError(self.name, f"can't be read: {error.strerror}", offset=offset) from None

    def _decompress(self, data: bytes, raw: int) -> bytes:
        import zstandard  # noqa: PLC0415 - slow to import, and rarely needed

        try:
            if zstandard.frame_content_size(data) != raw:
                raise ImageError(self.name, "a block has another size than its index says")
            if not hasattr(self._local, "decompressor"):
                self._local.decompressor = zstandard.ZstdDecompressor()
            result: bytes = self._local.decompressor.decompress(data, max_output_size=raw or 1)
        except zstandard.ZstdError as error:
            raise ImageError(self.name, f"a block can't be decompressed: {error}") from None
        return result

    def block(self, number: int) -> bytes:
        """The contents of a block, checked. The first blocks are the frames of pages."""
        return self.decode(number, self._read(*self.place(number)))

    def place(self, number: int) -> tuple[int, int]:
        """Where a block is in the pack: offset and size, bytes."""
        offset, size, _, _ = self._blocks[number]
        return offset, size

    def is_intact(self, number: int, data: bytes) -> bool:
        """Whether these are the bytes of a block."""
        _, _, _, known = self._blocks[number]
        return bool(digest(data) == known)

    def decode(self, number: int, data: bytes) -> bytes:
        """The contents of a block whose bytes were read from its place, checked."""
        offset, size, raw, _ = self._blocks[number]
        if len(data) != size:
            raise ImageError(self.name, "is cut off", offset=offset)
        if not self.is_intact(number, data):
            frame = f"frame {number}" if number < self.nr_frames else f"block {number}"
            raise ImageError(self.name, f"{frame} is damaged", offset=offset)
        return self._decompress(data, raw)

    def readings(self, numbers: Iterable[int]) -> Iterator[Reading]:
        """What must be read for these blocks: those that adjoin in the pack, in this order, are one reading."""
        offset = size = 0
        blocks: list[int] = []
        for number in numbers:
            start, length = self.place(number)
            if blocks and (start != offset + size or size + length > PIECE):
                yield Reading(offset, size, blocks)
                blocks = []
            if not blocks:
                offset, size = start, 0
            blocks.append(number)
            size += length
        if blocks:
            yield Reading(offset, size, blocks)

    def split(self, reading: Reading, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The blocks of a reading, each with its bytes for ``decode``."""
        for number in reading.blocks:
            start, size = self.place(number)
            yield number, data[start - reading.offset : start - reading.offset + size]

    def read(self, reading: Reading) -> bytes:
        """The bytes of a reading, unchecked; fewer where the pack is cut off."""
        return self._read_some(reading.offset, reading.size)

    def blocks(self, numbers: Iterable[int]) -> Iterator[bytes]:
        """The contents of these blocks, in this order, with few reads."""
        for reading in self.readings(numbers):
            for number, data in self.split(reading, self.read(reading)):
                yield self.decode(number, data)

    def contents(self, file: PackedFile) -> Iterator[bytes]:
        """A file's contents, in pieces of at most ``PIECE`` bytes."""
        ((_, contents),) = self.each(file)
        return contents

    def each(self, *files: PackedFile) -> Iterator[tuple[PackedFile, Iterator[bytes]]]:
        """Files with their contents, as of ``contents``; read with few reads. Use up each before the next one."""
        blocks = self.blocks(number for file in files for number in file.blocks)
        for file in files:
            yield file, self._contents(file, islice(blocks, len(file.blocks)))

    def _contents(self, file: PackedFile, blocks: Iterator[bytes]) -> Iterator[bytes]:
        size = 0
        for data in blocks:
            size += len(data)
            yield data
        if size != file.size:
            raise ImageError(self.name, f"{file.name} has {size} bytes, its index says {file.size}")

    def runs(self, area: Area, first: int, count: int) -> Iterator[Run]:
        """Where pages ``first`` to ``first + count`` of a pages image are."""
        if first < 0 or count < 0 or first + count > area.pages:
            raise ValueError(f"{area.name} has {area.pages} pages")
        at = bisect_right(area.starts, first) - 1
        while count:
            run, skip = area.runs[at], first - area.starts[at]
            take = min(run.length - skip, count)
            yield Run(run.first if run.first == ZERO else run.first + skip, take)
            first, count, at = first + take, count - take, at + 1

    def pages(self, area: Area, first: int, count: int) -> Iterator[tuple[int, bytes | None]]:
        """Pages ``first`` to ``first + count`` of a pages image: how many, and their bytes, None for zeros."""
        for run in self.runs(area, first, count):
            if run.first == ZERO:
                yield run.length, None
            else:
                yield from self._stored(run.first, run.length)

    def _stored(self, number: int, count: int) -> Iterator[tuple[int, bytes]]:
        frame, within = divmod(number, self.frame_pages)
        frames = range(frame, -(-(number + count) // self.frame_pages))
        for frame, contents in zip(frames, self.blocks(frames), strict=True):
            take = min(self.frame_pages - within, count)
            yield take, self.cut(frame, contents, within, take)
            count, within = count - take, 0

    def cut(self, frame: int, contents: bytes, within: int, count: int) -> bytes:
        """``count`` pages of a frame from page ``within`` on. Raises ``ImageError`` if it has fewer."""
        data = contents[within * PAGE_SIZE : (within + count) * PAGE_SIZE]
        if len(data) != count * PAGE_SIZE:
            raise ImageError(self.name, f"frame {frame} is too short")
        return data


def _is_plain(name: object) -> bool:
    """Whether it is the name of a file in the image directory itself."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in {".", ".."}
        and not {"/", "\0"} & set(name)
    )
