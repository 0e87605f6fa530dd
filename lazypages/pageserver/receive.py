"""Receive mode: writes the images that `criu dump --page-server` and `dumptool --page-server` send, byte for byte like
CRIU's own server (the tests compare with 4.1.1 and 4.2.1)."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import struct
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from images_spec.checkpoint import PARENT_LINK, parent_chain
from images_spec.errors import ImageMissingError
from images_spec.flags import PE_PARENT, PE_PRESENT
from images_spec.images import COMMON_MAGIC, Kind
from images_spec.messages import PagemapEntry, PagemapHead
from images_spec.pagemap import Pagemap, pages_name
from lazypages.errors import LazyPagesError
from lazypages.net import wire
from lazypages.net.patience import PatientReader, SlowPeerError
from lazypages.net.refused import why_left
from lazypages.net.tls import TlsFiles
from lazypages.net.tls_errors import NO_TLS_ALERT, explain
from lazypages.net.wire import PAGE_SIZE, Command, Header, ImageType, Layout, RemoteProtocolError, ServerCodec

log = logging.getLogger("lazypages")

FIRST_PAGES_ID: Final = 0x10001  # above the ids of the dump itself (docs/criu.md, "Page server protocol")
BUFFER_SIZE: Final = 1 << 20
_FALLOC_PUNCH_HOLE: Final = 0x02 | 0x01  # with FALLOC_FL_KEEP_SIZE (fallocate(2))


class ReceiveError(LazyPagesError):
    """The images can't be written, or the dump contradicts its parent."""


@dataclass(slots=True)
class _Image:
    """The pagemap and pages images that are being written."""

    dst_id: int
    name: str
    pagemap: BinaryIO
    pages: BinaryIO
    parents: list[_ParentLevel]


@dataclass(slots=True)
class _ParentLevel:
    """One level of the chain below: its pagemap, and the offset of each entry in its pages file."""

    pagemap: Pagemap
    pages: Path
    offsets: list[int] = field(default_factory=list)
    fd: int | None = None

    @classmethod
    def load(cls, directory: Path, name: str) -> _ParentLevel:
        pagemap = Pagemap.load(directory / name)
        level = cls(pagemap, directory / pages_name(pagemap.pages_id))
        offset = 0
        for entry in pagemap:
            level.offsets.append(offset)
            if entry.flags & PE_PRESENT:
                offset += entry.nr_pages * PAGE_SIZE
        return level

    def overlapping(self, start: int, end: int) -> list[tuple[int, int, int, int]]:
        """(start, end, flags, offset of start in the pages file) of the level's entries within [start, end)."""
        found = []
        pagemap = self.pagemap
        index = bisect_right(range(len(pagemap)), start, key=lambda index: pagemap[index].vaddr) - 1
        for place in range(max(index, 0), len(pagemap)):
            entry = pagemap[place]
            if entry.vaddr >= end:
                break
            first, last = max(start, entry.vaddr), min(end, entry.vaddr + entry.nr_pages * PAGE_SIZE)
            if first < last:
                found.append((first, last, entry.flags, self.offsets[place] + first - entry.vaddr))
        return found


class ImageReceiver:
    """Writes to `directory`. If it has a parent, the link `parent` must exist already."""

    def __init__(self, directory: Path, *, auto_dedup: bool) -> None:
        self._directory = directory
        self._auto_dedup = auto_dedup
        self._image: _Image | None = None
        self._next_id = FIRST_PAGES_ID
        self.pages = 0

    def has_parent(self, dst_id: int) -> bool:
        """Whether the parent directory has this image."""
        return os.path.lexists(self._directory / PARENT_LINK / _pagemap_name(dst_id))

    def open(self, dst_id: int) -> bool:
        """Begins an image; the one before is complete. Returns whether it has a parent."""
        self.close()
        name = _pagemap_name(dst_id)
        parents = self._parents(name)
        pages_id, self._next_id = self._next_id, self._next_id + 1
        pagemap, pages = self._directory / name, self._directory / pages_name(pages_id)
        self._image = _Image(dst_id, name, _create(pagemap), _create(pages), parents)
        self._image.pagemap.write(
            struct.pack("<II", COMMON_MAGIC, Kind.PAGEMAP.magic) + _framed(PagemapHead(pages_id=pages_id))
        )
        return bool(parents)

    def add(self, header: Header, layout: Layout | None) -> None:
        """Adds an entry of the pagemap. If it has pages, they follow in write().

        ``layout``: CRIU's server with this layout would write an image that only its own release reads; None: for all
        releases.
        """
        image = self._image
        if image is None or image.dst_id != header.dst_id:
            self.open(header.dst_id)
            image = self._image
        assert image is not None
        flags = {Command.ADD: PE_PRESENT, Command.HOLE: PE_PARENT}.get(header.command, header.flags)
        start, end = header.vaddr, header.vaddr + header.nr_pages * PAGE_SIZE
        if image.parents:
            if flags & PE_PRESENT:
                if self._auto_dedup:
                    _punch(image.parents, start, end)
            elif flags & PE_PARENT:
                _check_covered(image.parents[0], start, end)
        entry = PagemapEntry(vaddr=start, flags=flags)
        fits = header.nr_pages <= Layout.CRIU_4_1.max_pages
        entry.compat_nr_pages = header.nr_pages if fits and layout is not Layout.CRIU_4_2 else 0
        if layout is not Layout.CRIU_4_1:
            entry.nr_pages = header.nr_pages
        image.pagemap.write(_framed(entry))

    def write(self, data: memoryview) -> None:
        """Writes some bytes of the pages of the last entry."""
        assert self._image is not None
        self._image.pages.write(data)
        self.pages += len(data)

    def close(self) -> None:
        """Completes the open image."""
        if self._image is not None:
            image, self._image = self._image, None
            image.pagemap.close()
            image.pages.close()
            for level in image.parents:
                if level.fd is not None:
                    os.close(level.fd)

    def _parents(self, name: str) -> list[_ParentLevel]:
        levels = []
        for directory in parent_chain(self._directory)[1:]:
            try:
                levels.append(_ParentLevel.load(directory, name))
            except ImageMissingError:
                break
        return levels


class ReceiveConnection:
    """The only client of receive mode. `tls`: our certificate, if `sock` uses TLS."""

    def __init__(self, sock: socket.socket, receiver: ImageReceiver, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._spoke = False
        self._sock = sock
        self._reader = PatientReader(sock)
        self._receiver = receiver
        self._codec = ServerCodec(size=BUFFER_SIZE)
        self._ours = False  # the client is dumptool, not CRIU

    def run(self) -> None:
        """Runs until the client has sent CLOSE and disconnected, or FORCE_CLOSE (other processes may have its socket).

        Raises LazyPagesError, ImageError otherwise.
        """
        try:
            self._run()
        except wire.ClientUsesTlsError:
            with suppress(OSError):
                self._sock.sendall(NO_TLS_ALERT)
            raise

    def _run(self) -> None:
        closed = forced = False
        while not forced:
            try:
                self._reader.receive(self._codec)
            except SlowPeerError as error:
                if closed:
                    return
                raise ReceiveError(f"{error}: the dump has failed, the images are not complete") from None
            except OSError as error:
                if closed:
                    return
                raise ReceiveError(f"the dump's connection is lost: {explain(error, 'client')}") from None
            while (event := self._codec.next_event()) is not None:
                self._spoke = self._spoke or not isinstance(event, wire.Eof)
                match event:
                    case Header():
                        self._reader.message()
                        closed = self._handle(event) or closed
                        forced = event.command is Command.FORCE_CLOSE
                    case wire.Payload(data):
                        try:
                            self._receiver.write(data)
                        except OSError as error:
                            raise ReceiveError(f"the images can't be written: {error.strerror}") from None
                    case wire.Probed():
                        self._reader.message()
                        self._ours = True
                        self._sock.sendall(self._codec.answer_probe(wire.NO_FEATURES))
                    case wire.Eof():
                        if not closed and self._tls and not self._spoke:
                            raise ReceiveError(f"no dump has come: {why_left(self._tls)}")
                        if not closed:
                            raise ReceiveError(
                                "no CLOSE from the client: the dump has failed, the images are not complete"
                            )
                        return

    def _handle(self, header: Header) -> bool:
        layout, receiver = self._codec.layout, self._receiver
        try:
            match header.command:
                case Command.OPEN2:
                    self._sock.sendall(wire.answer_open(has_parent=receiver.open(header.dst_id)))
                case Command.OPEN:
                    receiver.open(header.dst_id)
                case Command.PARENT:
                    self._sock.sendall(wire.answer_parent(has_parent=receiver.has_parent(header.dst_id)))
                case Command.ADD | Command.ADD_F | Command.HOLE:
                    receiver.add(header, None if self._ours else layout)
                case Command.GET:
                    raise RemoteProtocolError(
                        "the client requests pages; serve them with page-server --lazy-pages"
                    )
                case Command.CLOSE | Command.FORCE_CLOSE:
                    receiver.close()
                    self._sock.sendall(wire.answer_close())
                    return True
        except OSError as error:
            raise ReceiveError(f"the images can't be written: {error.strerror or error}") from None
        return False


def _pagemap_name(dst_id: int) -> str:
    kind, number = wire.decode_dst_id(dst_id)
    return Kind.PAGEMAP.file_name(number if kind is ImageType.TASK else f"shmem-{number}")


def _create(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    return os.fdopen(fd, "wb", buffering=1 << 16)


def _framed(message: PagemapHead | PagemapEntry) -> bytes:
    data = message.SerializeToString()
    return struct.pack("<I", len(data)) + data


def _check_covered(parent: _ParentLevel, start: int, end: int) -> None:
    """Checks that pages which are PARENT are in the parent. Raises ReceiveError."""
    place = start
    for first, last, _, _ in parent.overlapping(start, end):
        if first > place:
            break
        place = last
    if place < end:
        raise ReceiveError(
            f"the dump says that page {place:#x} is in its parent, but {parent.pagemap.path} does not have it"
        )


def _punch(levels: list[_ParentLevel], start: int, end: int) -> None:
    """Frees the space of pages that have been received again, in all levels (--auto-dedup). Raises ReceiveError."""
    if not levels:
        return
    level = levels[0]
    for first, last, flags, offset in level.overlapping(start, end):
        if flags & PE_PRESENT:
            try:
                if level.fd is None:
                    level.fd = os.open(level.pages, os.O_RDWR | os.O_CLOEXEC)
                _punch_hole(level.fd, offset, last - first)
            except OSError as error:
                raise ReceiveError(f"--auto-dedup: {level.pages}: {error.strerror}") from None
        elif flags & PE_PARENT:
            _punch(levels[1:], first, last)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _punch_hole(fd: int, offset: int, size: int) -> None:
    while _libc.fallocate(fd, _FALLOC_PUNCH_HOLE, offset, size):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
