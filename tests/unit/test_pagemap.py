"""Pagemap images: the parser in C against protobuf's own decoder, what is refused and where, the writer."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images_spec import images, pagemap
from images_spec._pagemap import ffi
from images_spec.errors import ImageError, ImageMissingError
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT
from images_spec.images import COMMON_MAGIC, Kind
from images_spec.messages import PagemapEntry, PagemapHead
from images_spec.pagemap import Entry, Pagemap, PagemapWriter
from tests.support.examples import examples

PATH = Path("pagemap-1.img")
ADDRESS_END = 1 << 56
HEAD = PagemapHead(pages_id=1).SerializeToString()


def framed(*bodies: bytes) -> bytes:
    parts = [struct.pack("<II", COMMON_MAGIC, Kind.PAGEMAP.magic)]
    return b"".join(parts + [struct.pack("<I", len(body)) + body for body in bodies])


def entry(vaddr: int, nr_pages: int, flags: int = PE_PRESENT) -> bytes:
    """As CRIU 4.2 writes it."""
    return PagemapEntry(vaddr=vaddr, compat_nr_pages=0, flags=flags, nr_pages=nr_pages).SerializeToString()


def by_the_rule(message: PagemapEntry) -> Entry:
    """The reading rule (images_spec/pagemap.md) on what protobuf's own decoder gives."""
    flags = message.flags
    if message.in_parent:
        flags |= PE_PARENT
    elif not message.HasField("flags"):
        flags = PE_PRESENT
    count = message.nr_pages if message.HasField("nr_pages") else message.compat_nr_pages
    return Entry(message.vaddr, count, flags)


def is_sound(entries: list[Entry]) -> bool:
    """What the parser asks of entries, written once more."""
    end = 0
    for vaddr, nr_pages, flags in entries:
        if vaddr % PAGE_SIZE or vaddr < end or nr_pages == 0 or flags > 7:
            return False
        end = vaddr + nr_pages * PAGE_SIZE
        if end > ADDRESS_END:
            return False
    return True


def refusal(data: bytes) -> tuple[str, int | None]:
    with pytest.raises(ImageError) as caught:
        Pagemap(data, PATH)
    assert caught.value.path == str(PATH)
    return caught.value.what, caught.value.offset


# Parsing


@st.composite
def messages(draw: st.DrawFn) -> PagemapEntry:
    """Any entry that can be encoded, mostly a sound one; some of its fields absent."""
    page = draw(st.integers(0, 40) | st.integers(0, ADDRESS_END // PAGE_SIZE))
    message = PagemapEntry(
        vaddr=draw(st.just(page * PAGE_SIZE) | st.integers(0, 2**64 - 1)),
        compat_nr_pages=draw(st.integers(0, 3) | st.integers(0, 2**32 - 1)),
    )
    if draw(st.booleans()):
        message.in_parent = draw(st.booleans())
    if draw(st.booleans()):
        message.flags = draw(st.integers(0, 7) | st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        message.nr_pages = draw(st.integers(0, 3) | st.integers(0, 2**64 - 1))
    return message


# A field that we do not know may say that the pages are not stored plainly: refused, not skipped.
unknown_parts = st.just(b"") | st.sampled_from(
    [
        b"\x30\x05",  # field 6, varint
        b"\x31" + b"f" * 8,  # field 6, fixed 64
        b"\x35" + b"f" * 4,  # field 6, fixed 32
        b"\x3a\x03abc",  # field 7, bytes
        b"\xfa\xff\xff\xff\x0f\x00",  # field 2**29 - 1, no bytes
    ]
)


@settings(max_examples=examples(400))
@given(st.lists(st.tuples(unknown_parts, messages(), unknown_parts), max_size=6))
def test_agrees_with_protobuf_on_whole_messages(parts: list[tuple[bytes, PagemapEntry, bytes]]) -> None:
    bodies = [before + message.SerializeToString() + after for before, message, after in parts]
    data = framed(HEAD, *bodies)
    wanted = [by_the_rule(message) for _, message, _ in parts]
    if is_sound(wanted) and not any(before or after for before, _, after in parts):
        parsed = Pagemap(data, PATH)
        assert list(parsed) == wanted
        assert parsed.present_pages == sum(part.nr_pages for part in wanted if part.flags & PE_PRESENT)
    else:
        refusal(data)


@st.composite
def broken_images(draw: st.DrawFn) -> bytes:
    """A sound image with some bytes changed, left out or added; or no image at all."""
    pages = draw(st.lists(st.integers(0, 1 << 30), max_size=5, unique=True).map(sorted))
    bodies = [entry(page * PAGE_SIZE, 1, draw(st.integers(0, 7))) for page in pages]
    data = bytearray(framed(HEAD, *bodies))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[place:]
            case 2:
                data[place:place] = draw(st.binary(max_size=12))
            case 3:
                data[place : place + 1] = bytes(byte | 0x80 for byte in data[place : place + 1])
    return bytes(data)


garbage = st.binary(max_size=100)


@pytest.mark.slow
@settings(max_examples=examples(1500))
@given(broken_images() | garbage | garbage.map(framed) | garbage.map(lambda body: framed(HEAD, body)))
def test_never_takes_what_protobuf_refuses_and_never_reads_it_differently(data: bytes) -> None:
    offset: int | None = 0
    try:
        parsed = list(Pagemap(data, PATH))
    except ImageError as error:
        offset = error.offset
    else:
        _, *decoded = (message for message, _ in images.decode(data, Kind.PAGEMAP, PATH))
        assert parsed == [by_the_rule(message) for message in decoded]  # type: ignore[arg-type]
        assert is_sound(parsed)
    assert offset is not None
    assert 0 <= offset <= len(data)


def test_a_head_alone_is_a_pagemap() -> None:
    parsed = Pagemap(framed(PagemapHead(pages_id=0xFFFFFFFF).SerializeToString()), PATH)
    assert (len(parsed), list(parsed), parsed.pages_id, parsed.present_pages) == (0, [], 0xFFFFFFFF, 0)


def test_version_1_lacks_the_common_magic() -> None:
    assert list(Pagemap(framed(HEAD, entry(0, 1))[4:], PATH)) == [(0, 1, PE_PRESENT)]


def test_the_last_of_a_repeated_field_counts() -> None:
    assert list(Pagemap(framed(HEAD, entry(4096, 1) + entry(8192, 2)), PATH)) == [(8192, 2, PE_PRESENT)]


def test_is_a_sequence() -> None:
    parsed = Pagemap(framed(HEAD, entry(0, 1), entry(4096, 2), entry(1 << 40, 3)), PATH)
    assert len(parsed) == 3
    assert parsed[0] == parsed[-3] == Entry(vaddr=0, nr_pages=1, flags=PE_PRESENT)
    assert parsed[2] == parsed[-1] == (1 << 40, 3, PE_PRESENT)
    assert parsed.entries_pointer[1].nr_pages == 2
    for index in (3, -4):
        with pytest.raises(IndexError):
            parsed[index]


def test_the_largest_that_fits() -> None:
    everything = ADDRESS_END // PAGE_SIZE
    parsed = Pagemap(framed(HEAD, entry(0, everything)), PATH)
    assert parsed.present_pages == everything
    assert refusal(framed(HEAD, entry(0, everything + 1)))[0].endswith("do not fit an address space")


UNKNOWN = "which this lazypages does not know: written by a newer CRIU?"

FIRST = 8 + 4 + len(HEAD) + 4
"""Where the body of the first entry begins."""


@pytest.mark.parametrize(
    ("data", "what", "offset"),
    [
        (b"", "truncated in its magic", 0),
        (framed()[:7], "truncated in its magic", 7),
        (b"\x7fELF" * 4, "magic 0x464c457f, but pagemap-*.img has 0x56084025", 0),
        (framed()[:4] * 2, "magic 0x54564319, but pagemap-*.img has 0x56084025", 4),
        (framed(), "holds no message", 8),
        (framed()[4:], "holds no message", 4),
        (framed(b""), "PagemapHead lacks pages_id", 12),
        (framed(b"\x0a\x00"), "PagemapHead can't be decoded", 12),
        (framed(b"\xff"), "PagemapHead can't be decoded", 12),
        (framed(HEAD) + b"\1\2\3", "truncated in the length of a message", 8 + 4 + len(HEAD)),
        (framed(HEAD) + b"\5\0\0\0abcd", "message of 5 bytes, but 4 are left", 8 + 4 + len(HEAD)),
        (
            framed(HEAD) + b"\xff\xff\xff\xff",
            "message of 4294967295 bytes, but 0 are left",
            8 + 4 + len(HEAD),
        ),
        (framed(HEAD, b"\x10\x01"), "PagemapEntry lacks vaddr", FIRST),
        (framed(HEAD, b"\x08\x00"), "PagemapEntry lacks compat_nr_pages", FIRST),
        (framed(HEAD, b"\x08\x00\x28\x01"), "PagemapEntry lacks compat_nr_pages", FIRST),
        (framed(HEAD, b"\x08\x00\x12\x01\x01"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08\x00\x10"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x01\x00\x00"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08" + b"\x80" * 10 + b"\x10\x01"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08" + b"\xff" * 9 + b"\x02\x10\x01"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x01\x33\x34"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x88\x80\x80\x80\x80\x01\x00\x10\x01"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x88\x80\x80\x80\x80\x00\x00\x10\x01"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x88\x80\x80\x80\x10\x00\x10\x01"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x01\x2a\x00"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x01\x37"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x01\x3a\x02a"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x01\x31abc"), "PagemapEntry can't be decoded", FIRST),
        (framed(HEAD, entry(4097, 1)), "address 0x1001 is not page aligned", FIRST),
        (framed(HEAD, entry(4096, 0)), "entry at 0x1000 has no pages", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x01\x28\x00"), "entry at 0 has no pages", FIRST),
        (framed(HEAD, b"\x08\x00\x10\x00"), "entry at 0 has no pages", FIRST),
        (
            framed(HEAD, entry(4096, 2**63)),
            "9223372036854775808 pages at 0x1000 do not fit an address space",
            FIRST,
        ),
        (
            framed(HEAD, entry(2**64 - PAGE_SIZE, 1)),
            "1 pages at 0xfffffffffffff000 do not fit an address space",
            FIRST,
        ),
        (framed(HEAD, entry(4096, 1, 8 | PE_LAZY)), f"entry 1 has flags 0xa, of them 0x8, {UNKNOWN}", FIRST),
        (
            framed(HEAD, b"\x08\x00\x10\x01\x20\x86\x80\x80\x80\x10"),
            f"entry 1 has flags 0x100000006, of them 0x100000000, {UNKNOWN}",
            FIRST,
        ),
        (
            framed(HEAD, entry(4096, 1), entry(8192, 1) + b"\x38\x05"),
            f"entry 2 has field 7, {UNKNOWN}",
            FIRST + len(entry(4096, 1)) + 4,
        ),
        (framed(HEAD + b"\x12\x00", entry(4096, 1)), f"the head has field 2, {UNKNOWN}", 12),
        (
            framed(HEAD, entry(8192, 1), entry(4096, 1)),
            "entry at 0x1000 is not sorted or overlaps the one before it, which ends at 0x3000",
            FIRST + len(entry(8192, 1)) + 4,
        ),
        (
            framed(HEAD, entry(4096, 3), entry(8192, 1)),
            "entry at 0x2000 is not sorted or overlaps the one before it, which ends at 0x4000",
            FIRST + len(entry(4096, 3)) + 4,
        ),
    ],
)
def test_broken_pagemaps_are_refused_by_place(data: bytes, what: str, offset: int) -> None:
    assert refusal(data) == (what, offset)


def test_every_truncation_is_refused_or_ends_between_messages() -> None:
    bodies = [HEAD, entry(4096, 1), entry(1 << 40, 300)]
    data = framed(*bodies)
    between = [len(framed(*bodies[:count])) for count in (1, 2, 3)]
    for length in range(len(data) + 1):
        if length in between:
            assert len(Pagemap(data[:length], PATH)) == between.index(length)
        else:
            refusal(data[:length])


# Files


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-1.img"
    path.write_bytes(framed(HEAD, entry(4096, 1)))
    parsed = Pagemap.load(path)
    assert (list(parsed), parsed.path) == ([(4096, 1, PE_PRESENT)], path)
    with pytest.raises(ImageMissingError, match=r"pagemap-2\.img: no such image"):
        Pagemap.load(tmp_path / "pagemap-2.img")


def test_pages_file_must_hold_what_is_promised(tmp_path: Path) -> None:
    bodies = [entry(0, 3, PE_PRESENT), entry(1 << 20, 5, PE_LAZY), entry(1 << 30, 2, PE_LAZY | PE_PRESENT)]
    parsed = Pagemap(framed(HEAD, *bodies), PATH)
    parsed.check_pages_size(5 * PAGE_SIZE, tmp_path / "pages-1.img")
    parsed.check_pages_size(6 * PAGE_SIZE, tmp_path / "pages-1.img")
    with pytest.raises(ImageError) as caught:
        parsed.check_pages_size(5 * PAGE_SIZE - 1, tmp_path / "pages-1.img")
    assert str(caught.value) == (
        f"{tmp_path}/pages-1.img: holds 20479 bytes, but pagemap-1.img promises 5 pages (20480 bytes)"
    )


# Writing


def sound_entries() -> st.SearchStrategy[list[Entry]]:
    """Gaps and lengths in pages, and flags, made into entries."""
    gaps = st.integers(0, 3) | st.integers(0, 1 << 32)
    lengths = st.integers(1, 3) | st.integers(1, 1 << 34)
    parts = st.lists(st.tuples(gaps, lengths, st.integers(0, 7)), max_size=20)

    def build(found: list[tuple[int, int, int]]) -> list[Entry]:
        place, entries = 0, []
        for gap, length, flags in found:
            place += gap * PAGE_SIZE
            entries.append(Entry(place, length, flags))
            place += length * PAGE_SIZE
        return entries

    return parts.map(build)


@given(entries=sound_entries(), pages_id=st.integers(0, 2**32 - 1))
def test_written_is_read_back_by_both_decoders(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], pages_id: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "pagemap-written.img"
    pagemap.write(path, pages_id, entries)
    parsed = Pagemap.load(path)
    assert (list(parsed), parsed.pages_id) == (entries, pages_id)
    head, *decoded = images.read(path, Kind.PAGEMAP)
    assert head == PagemapHead(pages_id=pages_id)
    for message, wanted in zip(decoded, entries, strict=True):
        assert isinstance(message, PagemapEntry)
        assert by_the_rule(message) == wanted
        # The old count is for CRIU up to 4.1.1, which knows no other.
        assert message.compat_nr_pages == (wanted.nr_pages if wanted.nr_pages < 1 << 32 else 0)


def scattered(count: int) -> Iterator[tuple[int, int, int]]:
    return ((0x7F00_0000_0000 + 2 * index * PAGE_SIZE, 1, PE_LAZY | PE_PRESENT) for index in range(count))


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """How many bytes Python has allocated at most since the block began."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_is_written_in_bounded_memory(tmp_path: Path) -> None:
    with peak_memory() as peak:
        pagemap.write(tmp_path / "pagemap-1.img", 1, scattered(50_000))
        assert peak() < 1 << 19 < (tmp_path / "pagemap-1.img").stat().st_size


@pytest.mark.slow
def test_a_million_entries_stay_small(tmp_path: Path) -> None:
    """Under 64 bytes an entry, while it is loaded and after."""
    path, count = tmp_path / "pagemap-1.img", 1_000_000
    pagemap.write(path, 1, scattered(count))
    with peak_memory() as peak:
        parsed = Pagemap.load(path)
        assert ffi.sizeof("struct lp_pagemap_entry") + peak() / count < 64
    assert len(parsed) == count
    assert parsed[-1] == (0x7F00_0000_0000 + 2 * (count - 1) * PAGE_SIZE, 1, PE_LAZY | PE_PRESENT)


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([(1, 1, 4)], "address 0x1 is not page aligned"),
        ([(0, 0, 4)], "entry at 0 has no pages"),
        ([(0, 1, 8)], "entry at 0 has unknown flags 0x8"),
        ([(0, 1 << 45, 4)], "35184372088832 pages at 0 do not fit an address space"),
        (
            [(8192, 1, 4), (8192, 1, 4)],
            "entry at 0x2000 is not sorted or overlaps the one before it, which ends at 0x3000",
        ),
    ],
)
def test_nothing_is_written_that_would_not_be_read(
    entries: list[tuple[int, int, int]], what: str, tmp_path: Path
) -> None:
    path = tmp_path / "pagemap-1.img"
    with pytest.raises(ImageError) as caught:
        pagemap.write(path, 1, entries)
    assert (caught.value.what, caught.value.path) == (what, os.fspath(path))
    assert path.read_bytes() == b""


def fail_half_way(path: Path) -> None:
    with PagemapWriter(path, 1) as writer:
        for index in range(10_000):
            writer.add(index * PAGE_SIZE, 1, PE_PRESENT)
        assert path.stat().st_size > 1 << 16
        raise KeyboardInterrupt


def test_what_fails_half_way_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "pagemap-1.img"
    with pytest.raises(KeyboardInterrupt):
        fail_half_way(path)
    with pytest.raises(ImageError, match="truncated in its magic"):
        Pagemap.load(path)


def test_what_cannot_be_written_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="can't be written: No such file or directory"):
        PagemapWriter(tmp_path / "none" / "pagemap-1.img", 1)
    for entries in ([(0, 1, 4)], [(2 * index * PAGE_SIZE, 1, 4) for index in range(10_000)]):
        with pytest.raises(ImageError, match="can't be written: No space left on device"):
            pagemap.write("/dev/full", 1, entries)
