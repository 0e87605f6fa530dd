"""Images as messages: magics and framing, reading and writing (images_spec/framing.md).

All integers are little-endian (docs/criu.md, "Image files"; observed with CRIU 4.1.1 and 4.2.1).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from images_spec._files import OutputFile, read_file
from images_spec.errors import ImageError

if TYPE_CHECKING:
    from images_spec.messages import (
        CgroupEntry,
        CoreEntry,
        FdinfoEntry,
        FileEntry,
        FileLockEntry,
        FsEntry,
        GhostChunkEntry,
        GhostFileEntry,
        InventoryEntry,
        MemfdInodeEntry,
        MmEntry,
        PagemapEntry,
        PagemapHead,
        PipeDataEntry,
        PstreeEntry,
        RemapFilePathEntry,
        SeccompEntry,
        StatsEntry,
        TaskKobjIdsEntry,
        TimensEntry,
        TtyDataEntry,
        TtyInfoEntry,
        UtsnsEntry,
    )

COMMON_MAGIC = 0x54564319
SERVICE_MAGIC = 0x55105940

_U32 = struct.Struct("<I")

M = TypeVar("M", bound=Message)


class Opening(Enum):
    """The magic numbers at the start of an image."""

    BARE = "the type's magic alone"
    COMMON = "the common magic, then the type's; version 1 lacks the common one"
    SERVICE = "the service magic, then the type's; version 1 lacks the service one"


class Kind(Generic[M]):
    """A type of image: its magic number, file name and messages.

    ``name``: the file name, with ``{}`` for an id. ``single``: it contains exactly one message.
    ``payload``: the number of raw bytes that follow a message, given the number of bytes left in the file.

    ``message_name``, ``head_name``: module and class of the messages, and of the first one if it differs. They
    are imported on first use: a restore waits until ``lazypages serve`` is ready, which reads few kinds.
    """

    INVENTORY: ClassVar[Kind[InventoryEntry]]
    PSTREE: ClassVar[Kind[PstreeEntry]]
    CORE: ClassVar[Kind[CoreEntry]]
    IDS: ClassVar[Kind[TaskKobjIdsEntry]]
    MM: ClassVar[Kind[MmEntry]]
    PAGEMAP: ClassVar[Kind[PagemapHead | PagemapEntry]]
    FS: ClassVar[Kind[FsEntry]]
    FILES: ClassVar[Kind[FileEntry]]
    FDINFO: ClassVar[Kind[FdinfoEntry]]
    STATS: ClassVar[Kind[StatsEntry]]
    PIPES_DATA: ClassVar[Kind[PipeDataEntry]]
    FIFO_DATA: ClassVar[Kind[PipeDataEntry]]
    FILE_LOCKS: ClassVar[Kind[FileLockEntry]]
    MEMFD: ClassVar[Kind[MemfdInodeEntry]]
    TTY_INFO: ClassVar[Kind[TtyInfoEntry]]
    TTY_DATA: ClassVar[Kind[TtyDataEntry]]
    REMAP_FPATH: ClassVar[Kind[RemapFilePathEntry]]
    GHOST_FILE: ClassVar[Kind[GhostFileEntry | GhostChunkEntry]]
    SECCOMP: ClassVar[Kind[SeccompEntry]]
    TIMENS: ClassVar[Kind[TimensEntry]]
    UTSNS: ClassVar[Kind[UtsnsEntry]]
    CGROUP: ClassVar[Kind[CgroupEntry]]

    def __init__(
        self,
        name: str,
        magic: int,
        message_name: str,
        *,
        head_name: str | None = None,
        single: bool = False,
        opening: Opening = Opening.COMMON,
        payload: Callable[[M, int], int] | None = None,
    ) -> None:
        self.name = name
        self.magic = magic
        self.message_name = message_name
        self.head_name = head_name
        self.single = single
        self.opening = opening
        self.payload = payload

    def file_name(self, ident: int | str | None = None) -> str:
        """``Kind.CORE.file_name(7)`` is ``core-7.img``; ``Kind.STATS.file_name("dump")``: ``stats-dump``."""
        return self.name.format(ident)

    @cached_property
    def message(self) -> type[M]:
        """The class of the messages."""
        return _message_class(self.message_name)

    @cached_property
    def head(self) -> type[M]:
        """The class of the first message."""
        return _message_class(self.head_name) if self.head_name else self.message


def _message_class(name: str) -> type[Any]:
    module, _, message = name.partition(".")
    found: type[Any] = getattr(import_module(f"images_spec.{module}"), message)
    return found


def _pipe_payload(message: PipeDataEntry, _left: int) -> int:
    return message.bytes


def _ghost_payload(message: GhostFileEntry | GhostChunkEntry, left: int) -> int:
    from images_spec.files_pb2 import GhostChunkEntry  # noqa: PLC0415 - see Kind

    if isinstance(message, GhostChunkEntry):
        return message.len
    return 0 if message.chunks else left


Kind.INVENTORY = Kind(
    "inventory.img", 0x58313116, "inventory_pb2.InventoryEntry", single=True, opening=Opening.BARE
)
Kind.PSTREE = Kind("pstree.img", 0x50273030, "pstree_pb2.PstreeEntry")
Kind.CORE = Kind("core-{}.img", 0x55053847, "core_pb2.CoreEntry", single=True)
Kind.IDS = Kind("ids-{}.img", 0x54432030, "ids_pb2.TaskKobjIdsEntry", single=True)
Kind.MM = Kind("mm-{}.img", 0x57492820, "mm_pb2.MmEntry", single=True)
Kind.PAGEMAP = Kind(
    "pagemap-{}.img", 0x56084025, "pagemap_pb2.PagemapEntry", head_name="pagemap_pb2.PagemapHead"
)
Kind.FS = Kind("fs-{}.img", 0x51403912, "fs_pb2.FsEntry", single=True)
Kind.FILES = Kind("files.img", 0x56303138, "files_pb2.FileEntry")
Kind.FDINFO = Kind("fdinfo-{}.img", 0x56213732, "files_pb2.FdinfoEntry")
Kind.STATS = Kind("stats-{}", 0x57093306, "stats_pb2.StatsEntry", single=True, opening=Opening.SERVICE)
Kind.PIPES_DATA = Kind("pipes-data.img", 0x56453709, "files_pb2.PipeDataEntry", payload=_pipe_payload)
Kind.FIFO_DATA = Kind("fifo-data.img", 0x59333054, "files_pb2.PipeDataEntry", payload=_pipe_payload)
Kind.FILE_LOCKS = Kind("filelocks.img", 0x54323616, "file_locks_pb2.FileLockEntry")
Kind.MEMFD = Kind("memfd.img", 0x48453499, "memfd_pb2.MemfdInodeEntry")
Kind.TTY_INFO = Kind("tty-info.img", 0x59453036, "tty_pb2.TtyInfoEntry")
Kind.TTY_DATA = Kind("tty-data.img", 0x59413026, "tty_pb2.TtyDataEntry")
Kind.REMAP_FPATH = Kind("remap-fpath.img", 0x59133954, "files_pb2.RemapFilePathEntry")
Kind.GHOST_FILE = Kind(
    "ghost-file-{:x}.img",
    0x52583605,
    "files_pb2.GhostChunkEntry",
    head_name="files_pb2.GhostFileEntry",
    payload=_ghost_payload,
)
Kind.SECCOMP = Kind("seccomp.img", 0x64413049, "environment_pb2.SeccompEntry", single=True)
Kind.TIMENS = Kind("timens-{}.img", 0x43114433, "environment_pb2.TimensEntry", single=True)
Kind.UTSNS = Kind("utsns-{}.img", 0x54473203, "environment_pb2.UtsnsEntry", single=True)
Kind.CGROUP = Kind("cgroup.img", 0x59383330, "environment_pb2.CgroupEntry", single=True)


def _missing(message: Message) -> str:
    """The names of required fields that are not set."""
    found: list[str] = message.FindInitializationErrors()  # type: ignore[attr-defined]
    return ", ".join(found)


def _skip_magics(data: bytes, kind: Kind[M], path: Path) -> int:
    """Checks the magic numbers and returns the offset of the first message."""
    place = 0
    if kind.opening is not Opening.BARE:
        family = COMMON_MAGIC if kind.opening is Opening.COMMON else SERVICE_MAGIC
        if len(data) >= 4 and _U32.unpack_from(data)[0] == family:
            place = 4
    if len(data) < place + 4:
        raise ImageError(path, "truncated in its magic", offset=len(data))
    (magic,) = _U32.unpack_from(data, place)
    if magic != kind.magic:
        pattern = re.sub(r"{.*}", "*", kind.name)
        raise ImageError(path, f"magic {magic:#010x}, but {pattern} has {kind.magic:#010x}", offset=place)
    return place + 4


def decode(data: bytes, kind: Kind[M], path: Path) -> Iterator[tuple[M, bytes]]:
    """The messages of an image, each with the raw bytes that follow it (usually none).

    ``data``: the whole image. ``path``: for error messages. Raises ``ImageError``, with the offset, at the first error.
    """
    place = _skip_magics(data, kind, path)
    count = 0
    while place < len(data):
        if kind.single and count == 1:
            raise ImageError(path, f"{len(data) - place} bytes after its only message", offset=place)
        if len(data) - place < 4:
            raise ImageError(path, "truncated in the length of a message", offset=place)
        (size,) = _U32.unpack_from(data, place)
        if size > len(data) - place - 4:
            left = len(data) - place - 4
            raise ImageError(path, f"message of {size} bytes, but {left} are left", offset=place)
        message = (kind.message if count else kind.head)()
        name = message.DESCRIPTOR.name
        try:
            message.ParseFromString(data[place + 4 : place + 4 + size])
        except DecodeError:
            raise ImageError(path, f"{name} can't be decoded", offset=place + 4) from None
        if not message.IsInitialized():
            raise ImageError(path, f"{name} lacks {_missing(message)}", offset=place + 4)
        place += 4 + size
        payload = kind.payload(message, len(data) - place) if kind.payload else 0
        if payload > len(data) - place:
            left = len(data) - place
            raise ImageError(
                path, f"{name} is followed by {payload} bytes, but {left} are left", offset=place
            )
        yield message, data[place : place + payload]
        place += payload
        count += 1
    if count == 0 and (kind.single or kind.head_name):
        raise ImageError(path, "holds no message", offset=place)


def encode(kind: Kind[M], items: Iterable[tuple[M, bytes]], path: Path) -> Iterator[bytes]:
    """The bytes of an image, piece by piece: the inverse of ``decode``.

    Raises ``ImageError`` for messages that ``decode`` would reject.
    """
    if kind.opening is not Opening.BARE:
        yield _U32.pack(COMMON_MAGIC if kind.opening is Opening.COMMON else SERVICE_MAGIC)
    yield _U32.pack(kind.magic)
    count = 0
    for message, payload in items:
        wanted = kind.message if count else kind.head
        name = message.DESCRIPTOR.name
        if not isinstance(message, wanted) or (kind.single and count == 1):
            raise ImageError(path, f"a {name} does not belong here")
        if not message.IsInitialized():
            raise ImageError(path, f"{name} lacks {_missing(message)}")
        if len(payload) != (kind.payload(message, len(payload)) if kind.payload else 0):
            raise ImageError(path, f"{name} does not announce the {len(payload)} bytes that follow it")
        body = message.SerializeToString()
        yield _U32.pack(len(body)) + body
        yield payload
        count += 1
    if count == 0 and (kind.single or kind.head_name):
        raise ImageError(path, "would hold no message")


def iter(path: str | os.PathLike[str], kind: Kind[M]) -> Iterator[M]:
    """The messages of an image, one by one. Raises ``ImageError``."""
    path = Path(path)
    for message, _ in decode(read_file(path), kind, path):
        yield message


def read(path: str | os.PathLike[str], kind: Kind[M]) -> list[M]:
    """All messages of an image. Raises ``ImageError``."""
    return list(iter(path, kind))


def read_one(path: str | os.PathLike[str], kind: Kind[M]) -> M:
    """The only message of an image (``kind.single``). Raises ``ImageError``."""
    (message,) = iter(path, kind)
    return message


def read_with_data(path: str | os.PathLike[str], kind: Kind[M]) -> list[tuple[M, bytes]]:
    """All messages of an image, each with the raw bytes that follow it. Raises ``ImageError``."""
    path = Path(path)
    return list(decode(read_file(path), kind, path))


def write(
    path: str | os.PathLike[str],
    kind: Kind[M],
    messages: Iterable[M],
    keep: Callable[[Path, int], None] | None = None,
) -> None:
    """Writes an image of messages without raw bytes, with mode 0600. Raises ``ImageError``.

    ``keep``: see ``OutputFile``.
    """
    write_with_data(path, kind, ((message, b"") for message in messages), keep)


def write_with_data(
    path: str | os.PathLike[str],
    kind: Kind[M],
    items: Iterable[tuple[M, bytes]],
    keep: Callable[[Path, int], None] | None = None,
) -> None:
    """Writes an image of messages, each followed by raw bytes, with mode 0600. Raises ``ImageError``.

    ``keep``: see ``OutputFile``.
    """
    path = Path(path)
    with OutputFile(path, keep) as file:
        for part in encode(kind, items, path):
            file.write(part)
