"""The C part of the page server: any conversation, cut anywhere, gets the bytes that the images say."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images_spec import pagemap
from images_spec.flags import PE_LAZY, PE_PARENT, PE_PRESENT
from lazypages.errors import UnreadableError
from lazypages.net.answerer import MAX_ANSWER
from lazypages.net.page_connection import PageConnection
from lazypages.net.wire import NO_FEATURES, PAGE_SIZE, Command, Features, Header, Layout, PageFlags
from lazypages.pageserver.images import MAX_PIECES, ServedImages
from tests.support.pages import BASE, page_at

SPAN = 80  # pages of the address space that are asked for
ZEROS = range(20, 24)
Model = dict[tuple[int, int], bytes]


class Chain:
    """No dataclass: hypothesis would print all of it."""

    def __init__(self, images: ServedImages, model: Model) -> None:
        self.images, self.model = images, model


def write_chain(directory: Path) -> Model:
    """Two tasks, three levels, holes, lost pages, neighbours in different files, zeros; what each page holds."""
    model: Model = {}
    for level in (2, 1, 0):
        (directory / str(level)).mkdir()
        if level < 2:
            (directory / str(level) / "parent").symlink_to(f"../{level + 1}")
        for number, pid in enumerate((77, 4_000_000), 1):
            entries, data = [], b""
            for page in range(SPAN):
                if page % 11 == 10 or (pid == 77 and page % 13 == 12):
                    continue  # never touched
                address = BASE + page * PAGE_SIZE
                here = level == 2 or (page + pid) % 3 == level
                lost = page in {31, 47}
                entries.append((address, 1, PE_LAZY | (PE_PRESENT if here and not lost else PE_PARENT)))
                if here and not lost:
                    content = bytes(PAGE_SIZE) if page in ZEROS else page_at(pid, address, level)
                    model[pid, address] = content
                    data += content
            pagemap.write(directory / str(level) / f"pagemap-{pid}.img", number, entries)
            (directory / str(level) / f"pages-{number}.img").write_bytes(data)
    return model


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    directory = tmp_path_factory.mktemp("chain")
    model = write_chain(directory)
    return Chain(ServedImages(directory / "0"), model)


def expected(model: Model, layout: Layout, asked: Header, features: Features) -> bytes | None:
    """The answer; None if the first page is not there."""
    data: list[bytes] = []
    for number in range(min(asked.nr_pages, MAX_ANSWER)):
        page = model.get((asked.dst_id, asked.vaddr + number * PAGE_SIZE))
        if page is None:
            break
        data.append(page)
    zero = bool(features & Features.ZERO) and not any(map(any, data))
    flags = PageFlags.ZERO if zero else PageFlags.PRESENT
    answer = layout.pack(Header(Command.ADD_F, len(data), asked.vaddr, asked.dst_id, flags))
    return answer + (b"" if zero else b"".join(data)) if data else None


gets = st.builds(
    Header,
    st.just(Command.GET),
    st.integers(1, 40) | st.just(1 << 31),
    st.integers(-1, SPAN).map(lambda page: BASE + page * PAGE_SIZE),
    st.sampled_from([77, 4_000_000, 78]),
    st.just(0),
)


@given(
    st.lists(gets, max_size=12),
    st.binary(max_size=70),
    st.lists(st.integers(1, 200), max_size=20),
    st.sampled_from(Layout),
    st.sampled_from([NO_FEATURES, Features.ZERO]),
)
@settings(deadline=None)
def test_any_conversation(  # noqa: PLR0917 - hypothesis gives them
    chain: Chain,
    asked: list[Header],
    garbage: bytes,
    cuts: list[int],
    layout: Layout,
    features: Features,
) -> None:
    """Answers until the first request that is not to be answered; that one and all after it are given back."""
    images, model = chain.images, chain.model
    said = b"".join(layout.pack(get) for get in asked) + garbage
    answers, left = b"", said
    for get in asked:
        answer = expected(model, layout, get, features)
        if answer is None:
            break
        answers += answer
        left = left[layout.header_size :]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        received = bytearray()
        reader = threading.Thread(target=read_all, args=(theirs, received))
        writer = threading.Thread(target=write_pieces, args=(theirs, said, cuts))
        reader.start()
        writer.start()
        answerer = images.answerer(ours.fileno())
        rest, closed = answerer.run(layout, features, b"")
        writer.join()
        while data := ours.recv(1 << 16):
            rest += data
        ours.shutdown(socket.SHUT_WR)
        reader.join()
    head = layout.header_size
    if not closed and len(received) > len(answers):  # by chance the garbage was a good request
        pytest.fail("answered what was not asked for")
    assert bytes(received) == answers
    assert rest == left
    assert closed == (len(left) < head)
    assert answerer.pages == (len(answers) and count_pages(answers, layout))


def count_pages(answers: bytes, layout: Layout) -> int:
    """Pages in whole answers."""
    count = 0
    while answers:
        word, old = int.from_bytes(answers[:4], "little"), layout is Layout.CRIU_4_1
        pages = int.from_bytes(answers[4:8] if old else answers[8:16], "little")
        count += pages
        answers = answers[
            layout.header_size + (pages * PAGE_SIZE if word >> 16 == PageFlags.PRESENT else 0) :
        ]
    return count


def read_all(sock: socket.socket, into: bytearray) -> None:
    while data := sock.recv(1 << 16):
        into += data


def write_pieces(sock: socket.socket, said: bytes, cuts: Sequence[int]) -> None:
    for size in cuts:
        sock.sendall(said[:size])
        said = said[size:]
    sock.sendall(said)
    sock.shutdown(socket.SHUT_WR)


def test_find(chain: Chain) -> None:
    """What TLS clients get comes from the same look-up."""
    images, model = chain.images, chain.model
    assert images.pids == [77, 4_000_000]
    for pid in (77, 4_000_000, 5):
        for page in range(-1, SPAN + 1):
            address = BASE + page * PAGE_SIZE
            found = b"".join(piece.read() for piece in images.find(pid, address, 9))
            wanted = expected(model, Layout.CRIU_4_2, Header(Command.GET, 9, address, pid), NO_FEATURES)
            assert found == (b"" if wanted is None else wanted[32:])
            assert found == b"".join(piece.read() for piece in images.find(pid, address, 9))
    assert images.find(77, BASE + 1, 1) == []
    assert images.find(77, (1 << 64) - PAGE_SIZE, 1) == []


def test_more_pieces_than_fit(tmp_path: Path) -> None:
    """An answer may be short: of pages that lie in turns in two files no more than so many go at once."""
    for level in (1, 0):
        (tmp_path / str(level)).mkdir()
        entries = [
            (BASE + page * PAGE_SIZE, 1, PE_LAZY | (PE_PRESENT if level or page % 2 else PE_PARENT))
            for page in range(MAX_PIECES + 50)
        ]
        pagemap.write(tmp_path / str(level) / "pagemap-77.img", 1, entries)
        with (tmp_path / str(level) / "pages-1.img").open("wb") as file:
            for address, _, flags in entries:
                file.write(page_at(77, address, level) if flags & PE_PRESENT else b"")
    (tmp_path / "0" / "parent").symlink_to("../1")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        request = Layout.CRIU_4_2.pack(Header(Command.GET, 1000, BASE, 77))
        received = bytearray()
        reader = threading.Thread(target=read_all, args=(theirs, received))
        reader.start()
        theirs.shutdown(socket.SHUT_WR)
        answerer = ServedImages(tmp_path / "0").answerer(ours.fileno())
        assert answerer.run(Layout.CRIU_4_2, NO_FEATURES, request) == (b"", True)
        ours.shutdown(socket.SHUT_WR)
        reader.join()
    header = Layout.CRIU_4_2.pack(Header(Command.ADD_F, MAX_PIECES, BASE, 77, PageFlags.PRESENT))
    data = (page_at(77, BASE + page * PAGE_SIZE, (page + 1) % 2) for page in range(MAX_PIECES))
    assert received == header + b"".join(data)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[ServedImages, Path, socket.socket, socket.socket]]:
    pagemap.write(tmp_path / "pagemap-77.img", 1, [(BASE, 64, 6)])
    (tmp_path / "pages-1.img").write_bytes(bytes(64 * PAGE_SIZE))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ServedImages(tmp_path), tmp_path / "pages-1.img", ours, theirs


@pytest.mark.parametrize("more", [0, 100, PAGE_SIZE - 1])
@pytest.mark.parametrize("features", [NO_FEATURES, Features.ZERO])
def test_file_cut_short(
    features: Features, more: int, pair: tuple[ServedImages, Path, socket.socket, socket.socket]
) -> None:
    """No answer, never zeros; also when only the question is whether it is all zeros, and when a part is there."""
    images, path, ours, theirs = pair
    os.truncate(path, 5 * PAGE_SIZE + more)
    (piece,) = images.find(77, BASE + 4 * PAGE_SIZE, 2)
    assert piece.read() == bytes(PAGE_SIZE)
    (piece,) = images.find(77, BASE + 5 * PAGE_SIZE, 2)
    with pytest.raises(UnreadableError, match="was truncated"):
        piece.read()
    request = Layout.CRIU_4_2.pack(Header(Command.GET, 1, BASE + 5 * PAGE_SIZE, 77))
    theirs.sendall(request)
    assert images.answerer(ours.fileno()).run(Layout.CRIU_4_2, features, b"") == (request, False)
    ours.close()
    assert theirs.recv(1 << 16) == b""


def test_client_hangs_up_in_the_middle(
    pair: tuple[ServedImages, Path, socket.socket, socket.socket],
) -> None:
    """EPIPE is an error of this connection, and no SIGPIPE."""
    images, _, ours, theirs = pair
    request = Layout.CRIU_4_2.pack(Header(Command.GET, 64, BASE, 77))
    theirs.close()
    with pytest.raises(OSError, match="Broken pipe"):
        images.answerer(ours.fileno()).run(Layout.CRIU_4_2, NO_FEATURES, request * 10)


def test_to_and_fro(chain: Chain) -> None:
    """Requests that C leaves to Python, between others that it does not; MISSING was negotiated."""
    from lazypages.net import wire

    images, model = chain.images, chain.model
    layout = Layout.CRIU_4_2
    asked = [Header(Command.GET, 3, BASE + page * PAGE_SIZE, 77) for page in (0, 31, 1, 47, 47, 2, 100, 3)]
    said = wire.PROBE_FIRST + b"".join(layout.pack(get) for get in asked)
    said += layout.pack(Header(Command.PARENT, 0, 0, 77 << 8 | 1)) + layout.pack(asked[0])
    said += layout.pack(Header(Command.CLOSE))
    answers = b""
    for get in asked:
        none = layout.pack(Header(Command.ADD_F, 0, get.vaddr, 77, PageFlags.PRESENT))
        answers += expected(model, layout, get, Features.ZERO) or none
    answers += bytes(4) + (expected(model, layout, asked[0], Features.ZERO) or b"") + bytes(4)
    for cuts in ([], [1] * len(said), [24, 50, 100]):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            received = bytearray()
            threads = [
                threading.Thread(target=read_all, args=(theirs, received)),
                threading.Thread(target=write_pieces, args=(theirs, said, cuts)),
            ]
            for thread in threads:
                thread.start()
            connection = PageConnection(ours, images, "the client", images.answerer(ours.fileno()))
            assert connection.run()
            ours.shutdown(socket.SHUT_WR)
            for thread in threads:
                thread.join()
        assert received[4:] == answers
        assert connection.closed
        assert connection.pages == count_pages(answers[: -8 - 32 - 3 * PAGE_SIZE], layout) + 3
