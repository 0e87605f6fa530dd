"""The Python codecs against streams that are nearly right: one error, and the same events however they are cut.

``.ci/fuzz`` runs them for as long as it is told to, with other examples each time.
"""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path

import zstandard
from hypothesis import given
from hypothesis import strategies as st

import images_spec
from images_spec import images
from images_spec.errors import ImageError
from lazypages.net.wire import (
    PAGE_SIZE,
    Answered,
    Closed,
    Command,
    Completed,
    Eof,
    Features,
    Header,
    Layout,
    Pages,
    RemoteProtocolError,
    ServerCodec,
    ZeroPages,
    probe_first,
)
from lazypages.net.wire import ClientCodec as Client
from tests.unit.test_wire import feed, joined

BASE = 0x7F0000000000
PID = 7
MOST = 3  # pages of a request
FEATURES = Features.ZERO | Features.COMPRESSED | Features.CHECKPOINT

commands = st.one_of(st.sampled_from(list(Command)).map(int), st.integers(0, 0xFFFF))
flags = st.one_of(st.sampled_from([0, 1, 2, 4, 5, 0x100, 0x200]), st.integers(0, 0xFFFF))
counts = st.one_of(st.integers(0, MOST + 1), st.integers(0, 0xFFFFFFFF))
addresses = st.one_of(st.integers(0, 3).map(lambda n: BASE + n * PAGE_SIZE), st.integers(0, (1 << 64) - 1))
numbers = st.one_of(st.just(PID), st.integers(0, (1 << 64) - 1))
cuts = st.lists(st.integers(0, 1 << 15), max_size=8)


def header(layout: Layout) -> st.SearchStrategy[bytes]:
    made = st.builds(Header, st.integers(1, 8), counts, addresses, numbers, flags)
    return st.tuples(made, commands).map(
        lambda both: layout.pack(both[0]._replace(command=both[1]))  # type: ignore[arg-type]
    )


def frame(data: bytes) -> bytes:
    compressed = zstandard.compress(data)
    return len(compressed).to_bytes(4, "little") + compressed


#: What may follow a header.
payload = st.one_of(
    st.integers(0, MOST).map(lambda n: bytes(n * PAGE_SIZE)),
    st.integers(0, MOST).map(lambda n: b"\x01" * (n * PAGE_SIZE)),
    st.binary(max_size=64),
    st.integers(1, MOST).map(lambda n: frame(bytes(n * PAGE_SIZE))),
    st.binary(max_size=40).map(lambda data: len(data).to_bytes(4, "little") + data),
)


def streams(layout: Layout) -> st.SearchStrategy[bytes]:
    parts = st.lists(st.one_of(header(layout), payload, st.just(probe_first())), max_size=6)
    return parts.map(b"".join)


def told(codec: Client | ServerCodec, stream: bytes, places: list[int]) -> tuple[list[object], bool]:
    """All events, and whether it ends with the error: then those before it depend on where the stream is cut."""
    try:
        return joined(feed(codec, stream, [p for p in places if p <= len(stream)], eof=True)), False
    except RemoteProtocolError:
        return [], True


def asking(layout: Layout, size: int) -> Client:
    codec = Client(layout, FEATURES, size=size)
    for number in range(3):
        codec.get(PID, BASE + number * PAGE_SIZE, MOST, compress=number == 1)
    return codec


@given(st.data(), st.sampled_from(Layout), cuts, st.booleans())
def test_answers(data: st.DataObject, layout: Layout, places: list[int], closing: bool) -> None:
    """Pages that nobody asked for are none; answers come in order."""
    stream = data.draw(streams(layout))
    clients = [asking(layout, 1 << 20), asking(layout, 2 * PAGE_SIZE)]
    if closing:
        for client in clients:
            client.close()
    whole, wrong = told(clients[0], stream, [])
    assert (whole, wrong) == told(clients[1], stream, places)
    for event in whole:
        assert isinstance(event, Pages | ZeroPages | Answered | Closed | Completed | Eof)
        if isinstance(event, Pages | ZeroPages):
            size = len(event.data) // PAGE_SIZE if isinstance(event, Pages) else event.nr_pages
            assert event.pid == PID
            assert 0 < size <= MOST
            assert BASE <= event.vaddr < BASE + 3 * PAGE_SIZE
    answered = [event.request for event in whole if isinstance(event, Answered)]
    assert [get.vaddr for get in answered] == [BASE + n * PAGE_SIZE for n in range(len(answered))]


@given(st.data(), st.sampled_from(Layout), cuts, st.sampled_from([None, *Layout]))
def test_clients(data: st.DataObject, layout: Layout, places: list[int], known: Layout | None) -> None:
    stream = data.draw(streams(layout))
    assert told(ServerCodec(known), stream, []) == told(ServerCodec(known, size=64), stream, places)


def _golden() -> list[tuple[str, bytes]]:
    found = []
    for path in sorted((Path(images_spec.__file__).parent / "golden").glob("*.toml")):
        vector = tomllib.loads(path.read_text())
        parts = [vector["magics"], *(item["hex"] + item.get("data", "") for item in vector["message"])]
        found.append((vector["kind"], bytes.fromhex("".join(parts))))
    return found


@given(
    st.sampled_from(_golden()),
    st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 1 << 12), st.binary(max_size=8)), max_size=4),
)
def test_images(vector: tuple[str, bytes], changes: list[tuple[int, int, bytes]]) -> None:
    """A golden vector with pieces of it replaced."""
    kind, image = vector
    for start, length, bytes_ in changes:
        place = start % (len(image) + 1)
        image = image[:place] + bytes_ + image[place + length % 16 :]
    with suppress(ImageError):
        for _ in images.decode(image, getattr(images.Kind, kind), Path("image")):
            pass
