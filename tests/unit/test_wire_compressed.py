"""Compressed answers, as bytes: what is agreed on, every way to cut them, and every lie about them."""

from __future__ import annotations

import os
import struct
from contextlib import suppress

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from lazypages.net import wire
from lazypages.net.compression import CompressionError, Compressor, decompress
from lazypages.net.wire import (
    PAGE_SIZE,
    Answered,
    ClientCodec,
    Command,
    Eof,
    Features,
    Get,
    Header,
    Layout,
    PageFlags,
    Pages,
    RemoteProtocolError,
    ServerCodec,
)
from tests.unit.test_wire import feed, joined, pages

NEW = Layout.CRIU_4_2
BASE = 0x7F0000000000


def client(*counts: int, size: int = wire.BUFFER_SIZE) -> ClientCodec:
    """That has asked for so many pages each, compressed."""
    codec = ClientCodec(NEW, Features.COMPRESSED, size=size)
    for count in counts:
        codec.get(7, BASE, count, compress=True)
    return codec


def answer(count: int, frame: bytes, size: int | None = None) -> bytes:
    header = NEW.pack(Header(Command.ADD_F, count, BASE, 7, PageFlags.ZSTD))
    return header + struct.pack("=I", len(frame) if size is None else size) + frame


def zstd(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


# -- the codec -------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200).map(lambda seed: (seed or b"\0") * 64))
@example(b"")
@example(bytes(1 << 20))
def test_compress(data: bytes) -> None:
    frame = Compressor().compress(data)
    if frame is not None:
        assert len(frame) <= 0.9 * len(data)
        assert decompress(frame, len(data)) == data


def test_incompressible() -> None:
    compressor = Compressor()
    assert compressor.compress(os.urandom(16 * PAGE_SIZE)) is None
    assert compressor.compress(os.urandom(15 * PAGE_SIZE) + bytes(PAGE_SIZE)) is None  # by 6 % only
    assert compressor.compress(os.urandom(14 * PAGE_SIZE) + bytes(2 * PAGE_SIZE)) is not None


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(zstd(bytes(1 << 30)), id="bomb"),
        pytest.param(zstd(bytes(2 * PAGE_SIZE - 1)), id="too short"),
        pytest.param(zstd(bytes(2 * PAGE_SIZE + 1)), id="too long"),
        pytest.param(zstd(bytes(2 * PAGE_SIZE), write_content_size=False), id="does not say how long"),
        pytest.param(zstd(bytes(2 * PAGE_SIZE)) + b"x", id="something after it"),
        pytest.param(zstd(bytes(2 * PAGE_SIZE)) * 2, id="two"),
        pytest.param(zstd(bytes(2 * PAGE_SIZE))[:-1], id="cut short"),
        pytest.param(zstd(b""), id="empty"),
        pytest.param(b"\x50\x2a\x4d\x18\x00\x20\x00\x00" + bytes(0x2000), id="skippable"),
        pytest.param(b"garbage", id="garbage"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_bad_frames(frame: bytes) -> None:
    with pytest.raises(CompressionError):
        decompress(frame, 2 * PAGE_SIZE)


@given(st.data())
def test_flipped_bits(data: st.DataObject) -> None:
    """A frame that was damaged is never taken for another one: there is a checksum in it."""
    content = pages(BASE, 4)
    frame = bytearray(Compressor().compress(content) or b"")
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with suppress(CompressionError):
        assert decompress(frame, len(content)) == content


# -- answers ---------------------------------------------------------------------------------------------------


def test_agreed() -> None:
    """Asked for and granted, from the client's bytes to its pages."""
    server = ServerCodec()
    feed(server, wire.PROBE_FIRST)
    features = wire.probe_answer(server.answer_probe(wire.ALL_FEATURES))
    assert features is not None
    ours = ClientCodec(NEW, features)
    (request,) = feed(server, ours.get(7, BASE, 32, compress=True))
    assert request == Header(Command.GET, 32, BASE, 7, PageFlags.ZSTD)
    assert isinstance(request, Header)
    assert server.may_compress(request)
    assert not server.may_compress(request._replace(flags=0))
    frame = Compressor().compress(pages(BASE, 32)) or b""
    said = server.answer_compressed(request, 32, frame)
    asked = Get(7, BASE, 32, compress=True)
    assert feed(ours, said) == [Pages(7, BASE, pages(BASE, 32)), Answered(asked, 32, len(frame))]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has requested"):
        server.answer_compressed(request, 33, frame)
    with pytest.raises(ValueError, match="has requested"):
        server.answer_compressed(request._replace(flags=0), 32, frame)


def test_not_agreed() -> None:
    """Neither side does it unless the other one has said that it can."""
    assert not ServerCodec(NEW).may_compress(Header(Command.GET, 32, BASE, 7, PageFlags.ZSTD))
    with pytest.raises(ValueError, match="can't compress"):
        ClientCodec(NEW, wire.ALL_FEATURES & ~Features.COMPRESSED).get(7, BASE, 32, compress=True)
    for codec in (ClientCodec(NEW), ClientCodec(NEW, Features.COMPRESSED)):
        codec.get(7, BASE, 32)
        with pytest.raises(RemoteProtocolError, match="requested 32 pages"):
            feed(codec, answer(32, zstd(pages(BASE, 32))))


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans()).map(
            lambda one: (one[0], min(one[0], one[1]), one[2])
        ),
        max_size=6,
    ),
    st.lists(st.integers(0, 1 << 16), max_size=12),
    st.sampled_from([2 * PAGE_SIZE, 1 << 20]),
)
def test_in_any_pieces(answers: list[tuple[int, int, bool]], cuts: list[int], size: int) -> None:
    """Compressed and plain answers in turns, whole, short and empty, cut anywhere."""
    codec = client(*(asked for asked, _, _ in answers), size=size)
    stream, expected = b"", []
    for asked, count, compressed in answers:
        data = pages(BASE, count)
        frame = zstd(data) if compressed and count else b""
        if frame:
            stream += answer(count, frame)
        else:
            stream += NEW.pack(Header(Command.ADD_F, count, BASE, 7, PageFlags.PRESENT)) + data
        expected += [Pages(7, BASE, data)] if count else []  # type: ignore[arg-type]
        expected.append(Answered(Get(7, BASE, asked, compress=True), count, len(frame)))  # type: ignore[arg-type]
    events = feed(codec, stream, [cut for cut in cuts if cut <= len(stream)], eof=True)
    assert joined(events) == [*expected, Eof(complete=True)]


def test_cut_off_anywhere() -> None:
    """No page at all of an answer that is not whole, and that is not an end between answers."""
    stream = answer(4, zstd(pages(BASE, 4)))
    for length in range(len(stream)):
        codec = client(4)
        assert feed(codec, stream[:length], range(1, length), eof=True) == [Eof(complete=length == 0)]
        assert codec.at_boundary == (length == 0)


@pytest.mark.parametrize(
    ("count", "frame", "size"),
    [
        pytest.param(5, zstd(pages(BASE, 5)), None, id="more than asked"),
        pytest.param(4, zstd(pages(BASE, 3)), None, id="fewer than said"),
        pytest.param(4, zstd(pages(BASE, 5)), None, id="more than said"),
        pytest.param(4, b"", 0, id="size 0"),
        pytest.param(4, b"", 4 * PAGE_SIZE, id="as long as the pages"),
        pytest.param(4, b"", 0xFFFFFFFF, id="absurd size"),
        pytest.param(4, b"x" * 100, None, id="garbage"),
        pytest.param(4, zstd(pages(BASE, 4))[:-5], None, id="cut short"),
        pytest.param(4, zstd(pages(BASE, 4)) + b"x", None, id="too long"),
    ],
)
def test_wrong_answers(count: int, frame: bytes, size: int | None) -> None:
    with pytest.raises(RemoteProtocolError, match="page server"):
        feed(client(4), answer(count, frame, size))


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_survives_garbage(garbage: bytes, cuts: list[int]) -> None:
    """Not one page of it."""
    start = NEW.pack(Header(Command.ADD_F, 3, BASE, 7, PageFlags.ZSTD))
    for stream in (garbage, start + garbage, start + struct.pack("=I", len(garbage)) + garbage):
        try:
            events = feed(client(3), stream, [cut for cut in cuts if cut <= len(stream)], eof=True)
        except RemoteProtocolError:
            continue
        assert all(isinstance(event, Eof | Answered) for event in events)
