"""A pack as a source: what its thread answers, page by page."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from images_spec import pagemap as pagemaps
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PRESENT
from images_spec.packed import PackReader, PackWriter
from images_spec.pagemap import Pagemap
from images_spec.placement import resolve
from images_spec.without_lazy import LazyPages
from lazypages.net import wire
from lazypages.net.wire import ClientCodec, Layout
from lazypages.sources import packed
from lazypages.sources.packed import FEATURES, Answerer, PackedPages

PID = 7
BASE = 0x10000000


def page(number: int) -> bytes:
    return number.to_bytes(4, "little") * (PAGE_SIZE // 4)


@contextmanager
def answering(pages: PackedPages) -> Iterator[socket.socket]:
    """The engine's end."""
    answerer = Answerer(pages)
    with socket.socket(fileno=os.dup(answerer.fileno())) as end:
        end.settimeout(30)
        yield end
    anyio.run(answerer.aclose)
    assert answerer.failure is None


def ask(end: socket.socket, codec: ClientCodec, pid: int, address: int, count: int) -> list[bytes]:
    """The pages that are answered."""
    end.sendall(codec.get(pid, address, count))
    data = bytearray()
    while True:
        while (event := codec.next_event()) is not None:
            match event:
                case wire.Pages(_, _, part):
                    data += part
                case wire.ZeroPages(_, _, nr_pages):
                    data += bytes(nr_pages * PAGE_SIZE)
                case wire.Answered(_, nr_pages):
                    assert len(data) == nr_pages * PAGE_SIZE
                    return [bytes(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE)]
        codec.received(end.recv_into(codec.writable()))


@pytest.mark.parametrize("cache", [packed.CACHE, 1])
def test_every_page(cache: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, single and many; equal pages; runs that end; places that the pack does not know."""
    monkeypatch.setattr(packed, "CACHE", cache)
    chance = random.Random(3)
    numbers: list[int] = []
    while len(numbers) < 3000:
        kind = chance.random()
        if kind < 0.2:
            numbers += [0] * chance.choice((1, 3, 40, 300))
        elif kind < 0.4 and numbers:
            at = chance.randrange(len(numbers))
            numbers += numbers[at : at + 20]
        else:
            numbers += range(len(numbers) + 1, len(numbers) + chance.randint(2, 100))
    entries, expected, at, address = [], {}, 0, BASE
    while at < len(numbers):
        count = min(chance.randint(1, 200), len(numbers) - at)
        entries.append((address, count, PE_LAZY | PE_PRESENT))
        expected |= {address + i * PAGE_SIZE: page(numbers[at + i]) for i in range(count)}
        address += (count + chance.randint(1, 3)) * PAGE_SIZE
        at += count
    with PackWriter(tmp_path / "pack") as writer:
        writer.add_pages("pages-1.img", [b"".join(map(page, numbers))])
    pagemaps.write(tmp_path / "pagemap", 1, entries)
    data = (tmp_path / "pack").read_bytes()
    reader = PackReader(lambda offset, size: data[offset : offset + size], len(data), "pack")
    table = resolve([Pagemap.load(tmp_path / "pagemap")], remote=True)
    pages = PackedPages(reader, {PID: LazyPages(table, reader.areas[0])})
    with answering(pages) as end:
        codec = ClientCodec(Layout.CRIU_4_2, FEATURES)
        for _ in range(400):
            start = BASE + chance.randrange((address - BASE) // PAGE_SIZE) * PAGE_SIZE
            count = chance.choice((1, 4, 16, 256))
            got = ask(end, codec, PID, start, count)
            assert bool(got) == (start in expected)
            assert len(got) <= count
            for i, found in enumerate(got):
                assert found == expected[start + i * PAGE_SIZE]
        assert ask(end, codec, PID + 1, BASE, 1) == []
        assert ask(end, codec, PID, BASE - PAGE_SIZE, 1) == []


def test_a_damaged_frame(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The pages before it are answered, none of its own; it is logged once."""
    with PackWriter(tmp_path / "pack") as writer:
        writer.add_pages("pages-1.img", [b"".join(map(page, range(1, 65)))])
    data = bytearray((tmp_path / "pack").read_bytes())
    reader = PackReader(lambda offset, size: bytes(data[offset : offset + size]), len(data), "a pack")
    data[reader.place(1)[0]] ^= 1
    pagemaps.write(tmp_path / "pagemap", 1, [(BASE, 64, PE_LAZY | PE_PRESENT)])
    table = resolve([Pagemap.load(tmp_path / "pagemap")], remote=True)
    with answering(PackedPages(reader, {PID: LazyPages(table, reader.areas[0])})) as end:
        codec = ClientCodec(Layout.CRIU_4_2, FEATURES)
        for _ in range(3):
            assert ask(end, codec, PID, BASE, 64) == [page(number) for number in range(1, 17)]
            assert ask(end, codec, PID, BASE + 16 * PAGE_SIZE, 1) == []
            assert ask(end, codec, PID, BASE + 32 * PAGE_SIZE, 1) == [page(33)]
    (record,) = caplog.records
    assert "a pack: frame 1 is damaged (at byte " in record.getMessage()
