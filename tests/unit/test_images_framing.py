"""Magics and framing: what is written is read back, and what is broken is refused by file and byte."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images_spec import _files, images
from images_spec.errors import ImageError, ImageMissingError
from images_spec.images import COMMON_MAGIC, SERVICE_MAGIC, Kind, Opening
from images_spec.messages import (
    FsEntry,
    GhostChunkEntry,
    GhostFileEntry,
    InventoryEntry,
    PagemapEntry,
    PagemapHead,
    PipeDataEntry,
    PstreeEntry,
    StatsEntry,
)

KINDS: list[Kind[Any]] = [kind for kind in vars(Kind).values() if isinstance(kind, Kind)]
PATH = Path("some.img")

GhostItems = list[tuple[GhostFileEntry | GhostChunkEntry, bytes]]

INIT = PstreeEntry(pid=1, ppid=0, pgid=1, sid=1, threads=[1])


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def framed(kind: Kind[Any], *bodies: bytes) -> bytes:
    magics = {Opening.BARE: [], Opening.COMMON: [COMMON_MAGIC], Opening.SERVICE: [SERVICE_MAGIC]}[
        kind.opening
    ]
    return words(*magics, kind.magic) + b"".join(words(len(body)) + body for body in bodies)


def decoded(data: bytes, kind: Kind[Any]) -> list[Any]:
    return [message for message, _ in images.decode(data, kind, PATH)]


def refusal(data: bytes, kind: Kind[Any]) -> tuple[str, int | None]:
    with pytest.raises(ImageError) as caught:
        decoded(data, kind)
    assert caught.value.path == str(PATH)
    return caught.value.what, caught.value.offset


def test_every_kind_has_its_own_magic_and_name() -> None:
    assert len({kind.magic for kind in KINDS}) == len(KINDS) == len({kind.name for kind in KINDS})


def test_names_of_files() -> None:
    assert Kind.INVENTORY.file_name() == "inventory.img"
    assert Kind.CORE.file_name(77) == "core-77.img"
    assert Kind.PAGEMAP.file_name("shmem-5") == "pagemap-shmem-5.img"
    assert Kind.STATS.file_name("dump") == "stats-dump"
    assert Kind.GHOST_FILE.file_name(0x1F) == "ghost-file-1f.img"


def test_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "pstree.img"
    messages = [INIT, PstreeEntry(pid=2, ppid=1, pgid=1, sid=1, threads=[2, 3])]
    images.write(path, Kind.PSTREE, messages)
    assert path.read_bytes()[:8] == words(COMMON_MAGIC, 0x50273030)
    assert images.read(path, Kind.PSTREE) == messages
    assert list(images.iter(path, Kind.PSTREE)) == messages
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_openings() -> None:
    inventory = InventoryEntry(img_version=2)
    stats = StatsEntry()
    assert b"".join(images.encode(Kind.INVENTORY, [(inventory, b"")], PATH))[:8] == words(0x58313116, 2)
    assert b"".join(images.encode(Kind.STATS, [(stats, b"")], PATH)) == words(SERVICE_MAGIC, 0x57093306, 0)


@pytest.mark.parametrize("kind", [Kind.PSTREE, Kind.STATS], ids=lambda kind: kind.name)
def test_version_1_lacks_the_first_magic(kind: Kind[Any]) -> None:
    data = framed(kind, INIT.SerializeToString() if kind is Kind.PSTREE else b"")
    assert decoded(data[4:], kind) == decoded(data, kind)


def test_raw_bytes_follow_messages(tmp_path: Path) -> None:
    path = tmp_path / "pipes-data.img"
    items = [(PipeDataEntry(pipe_id=1, bytes=3), b"abc"), (PipeDataEntry(pipe_id=2, bytes=0), b"")]
    images.write_with_data(path, Kind.PIPES_DATA, items)
    assert images.read_with_data(path, Kind.PIPES_DATA) == items
    assert images.read(path, Kind.PIPES_DATA) == [message for message, _ in items]


def test_contents_of_a_deleted_file() -> None:
    whole: GhostItems = [(GhostFileEntry(uid=0, gid=0, mode=0o100600), b"all that follows")]
    chunks: GhostItems = [
        (GhostFileEntry(uid=0, gid=0, mode=0o100600, chunks=True, size=9), b""),
        (GhostChunkEntry(len=2, off=0), b"ab"),
        (GhostChunkEntry(len=1, off=8), b"c"),
    ]
    for items in (whole, chunks):
        data = b"".join(images.encode(Kind.GHOST_FILE, items, PATH))
        assert list(images.decode(data, Kind.GHOST_FILE, PATH)) == items


def test_a_head_comes_first() -> None:
    head, entry = PagemapHead(pages_id=5), PagemapEntry(vaddr=4096, compat_nr_pages=1)
    data = framed(Kind.PAGEMAP, head.SerializeToString(), entry.SerializeToString())
    assert decoded(data, Kind.PAGEMAP) == [head, entry]


@pytest.mark.parametrize(
    ("data", "kind", "what", "offset"),
    [
        (b"", Kind.PSTREE, "truncated in its magic", 0),
        (words(COMMON_MAGIC), Kind.PSTREE, "truncated in its magic", 4),
        (b"\x16\x31\x31", Kind.INVENTORY, "truncated in its magic", 3),
        (
            words(COMMON_MAGIC, 0x55053847),
            Kind.PSTREE,
            "magic 0x55053847, but pstree.img has 0x50273030",
            4,
        ),
        (words(0x464C457F), Kind.CORE, "magic 0x464c457f, but core-*.img has 0x55053847", 0),
        (words(SERVICE_MAGIC, 0x50273030), Kind.PSTREE, "magic 0x55105940, but pstree.img has 0x50273030", 0),
        (words(1), Kind.GHOST_FILE, "magic 0x00000001, but ghost-file-*.img has 0x52583605", 0),
        (framed(Kind.PSTREE) + b"\1\0", Kind.PSTREE, "truncated in the length of a message", 8),
        (framed(Kind.PSTREE) + words(5, 0), Kind.PSTREE, "message of 5 bytes, but 4 are left", 8),
        (
            framed(Kind.PSTREE) + words(0xFFFFFFFF),
            Kind.PSTREE,
            "message of 4294967295 bytes, but 0 are left",
            8,
        ),
        (framed(Kind.PSTREE, b"\xff"), Kind.PSTREE, "PstreeEntry can't be decoded", 12),
        (framed(Kind.PSTREE, b"\x08\x01"), Kind.PSTREE, "PstreeEntry lacks ppid, pgid, sid", 12),
        (framed(Kind.FS), Kind.FS, "holds no message", 8),
        (framed(Kind.PAGEMAP), Kind.PAGEMAP, "holds no message", 8),
        (
            framed(Kind.FS, FsEntry(cwd_id=1, root_id=2).SerializeToString()) + b"x",
            Kind.FS,
            "1 bytes after its only message",
            16,
        ),
        (
            framed(Kind.PIPES_DATA, PipeDataEntry(pipe_id=1, bytes=4000000000).SerializeToString()) + b"abc",
            Kind.PIPES_DATA,
            "PipeDataEntry is followed by 4000000000 bytes, but 3 are left",
            20,
        ),
    ],
)
def test_broken_images_are_refused_by_place(data: bytes, kind: Kind[Any], what: str, offset: int) -> None:
    assert refusal(data, kind) == (what, offset)


def test_every_truncation_is_refused_or_ends_between_messages() -> None:
    items = [INIT, PstreeEntry(pid=300, ppid=1, pgid=1, sid=1, threads=[300])]
    data = framed(Kind.PSTREE, *(item.SerializeToString() for item in items))
    between = 8 + 4 + len(items[0].SerializeToString())
    for length in range(len(data)):
        if length in (8, between):
            assert len(decoded(data[:length], Kind.PSTREE)) == (length == between)
        else:
            refusal(data[:length], Kind.PSTREE)


@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_garbage_is_an_image_error_or_an_image(kind: Kind[Any], garbage: bytes) -> None:
    for data in (garbage, framed(kind) + garbage, framed(kind, garbage)):
        offset: int | None = 0
        try:
            assert all(message.IsInitialized() for message in decoded(data, kind))
        except ImageError as error:
            offset = error.offset
        assert offset is not None
        assert 0 <= offset <= len(data)


@pytest.mark.parametrize(
    ("kind", "items", "what"),
    [
        (Kind.FS, [], "would hold no message"),
        (Kind.FS, [(FsEntry(cwd_id=1, root_id=1), b"")] * 2, "a FsEntry does not belong here"),
        (Kind.FS, [(INIT, b"")], "a PstreeEntry does not belong here"),
        (Kind.FS, [(FsEntry(cwd_id=1), b"")], "FsEntry lacks root_id"),
        (
            Kind.FS,
            [(FsEntry(cwd_id=1, root_id=1), b"x")],
            "FsEntry does not announce the 1 bytes that follow it",
        ),
        (
            Kind.PIPES_DATA,
            [(PipeDataEntry(pipe_id=1, bytes=2), b"x")],
            "PipeDataEntry does not announce the 1 bytes that follow it",
        ),
        (
            Kind.PAGEMAP,
            [(PagemapEntry(vaddr=0, compat_nr_pages=1), b"")],
            "a PagemapEntry does not belong here",
        ),
    ],
)
def test_nothing_is_written_that_would_not_be_read(
    kind: Kind[Any], items: list[tuple[Any, bytes]], what: str, tmp_path: Path
) -> None:
    with pytest.raises(ImageError) as caught:
        images.write_with_data(tmp_path / "x.img", kind, items)
    assert caught.value.what == what
    assert (tmp_path / "x.img").read_bytes() == b""


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageMissingError, match=r"/fs-1\.img: no such image$"):
        images.read_one(tmp_path / "fs-1.img", Kind.FS)


def test_what_is_no_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="fifo: not a regular file"):
        images.read(tmp_path / "fifo", Kind.FILES)
    with pytest.raises(ImageError, match="not a regular file"):
        images.read(tmp_path, Kind.FILES)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ImageError, match="loop: can't be opened: Too many levels of symbolic links"):
        images.read(tmp_path / "loop", Kind.FILES)


def test_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "files.img"
    path.touch()
    os.truncate(path, _files.MAX_SIZE + 1)
    with pytest.raises(ImageError, match="is too large for such an image: 1073741825 bytes"):
        images.read(path, Kind.FILES)


def test_what_cannot_be_written_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none/fs-1\.img: can't be written: No such file or directory"):
        images.write(tmp_path / "none" / "fs-1.img", Kind.FS, [FsEntry(cwd_id=1, root_id=1)])
    with pytest.raises(ImageError, match="can't be written: No space left on device"):
        images.write("/dev/full", Kind.FS, [FsEntry(cwd_id=1, root_id=1)])


def test_an_error_tells_file_and_place() -> None:
    error = ImageError(PATH, "is odd", offset=12)
    assert str(error) == "some.img: is odd (at byte 12)"
    assert (error.path, error.what, error.offset) == ("some.img", "is odd", 12)
    assert str(ImageError("x.img", "is odd")) == "x.img: is odd"
