"""The page server's protocol, as bytes: golden vectors, every way to cut a stream, and fuzz."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.net import wire
from lazypages.net.wire import (
    PAGE_SIZE,
    Answered,
    ClientCodec,
    Closed,
    Command,
    Eof,
    Features,
    Get,
    Header,
    ImageType,
    Layout,
    PageFlags,
    Pages,
    Payload,
    Probed,
    RemoteProtocolError,
    ServerCodec,
    ZeroPages,
)

OLD, NEW = Layout.CRIU_4_1, Layout.CRIU_4_2
PRESENT_ADD = 0x00040006
# A GET of one page as CRIU 4.2 sent it, with garbage in the padding (docs/criu.md, "Page server protocol").
GOLDEN_GET = bytes.fromhex("07000000 deadbeef 0100000000000000 00a0c9fcce550000 0753000000000000")
GOLDEN_ANSWER = bytes.fromhex("06000400 deadbeef 0100000000000000 00a0c9fcce550000 0753000000000000")


def page(number: int) -> bytes:
    """The bytes of a page that no other page has."""
    return struct.pack("=Q", number) * (PAGE_SIZE // 8)


def pages(vaddr: int, count: int) -> bytes:
    return b"".join(page(vaddr + i * PAGE_SIZE) for i in range(count))


def lengths(layout: Layout, count: int) -> list[int]:
    """Every length of a header before `count` pages, of the pages those near the ends and a few more."""
    start, whole = layout.header_size, layout.header_size + count * PAGE_SIZE
    near = [start + i * PAGE_SIZE + off for i in range(count + 1) for off in range(-40, 40)]
    return sorted({*range(start), *near, *range(start, whole, 777)} & set(range(whole + 1)))


def add(layout: Layout, get: Get, count: int, flags: int = PageFlags.PRESENT) -> bytes:
    return layout.pack(Header(Command.ADD_F, count, get.vaddr, get.pid, flags))


def feed(
    codec: ClientCodec | ServerCodec, data: bytes, cuts: Sequence[int] = (), *, eof: bool = False
) -> list[object]:
    """All events of `data`, received in pieces that end at `cuts`; views are made bytes."""
    events: list[object] = []

    def drain() -> None:
        while (event := codec.next_event()) is not None:
            if isinstance(event, Pages | Payload):
                event = event._replace(data=bytes(event.data))  # type: ignore[assignment]
            events.append(event)

    places = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(places):
        place = start
        while place < end:
            place += codec.receive(data[place:end])
            drain()
    if eof:
        codec.received(0)
        drain()
    return events


def joined(events: Sequence[object]) -> list[object]:
    """Events with the pages of an answer, or the payload of an ADD, put together again."""
    whole: list[object] = []
    for event in events:
        last = whole[-1] if whole else None
        if (
            isinstance(event, Pages)
            and isinstance(last, Pages)
            and event.vaddr == last.vaddr + len(last.data)
        ):
            whole[-1] = last._replace(data=last.data + event.data)  # type: ignore[operator]
        elif isinstance(event, Payload) and isinstance(last, Payload) and last.missing:
            whole[-1] = Payload(last.data + event.data, event.missing)  # type: ignore[operator]
        else:
            whole.append(event)
    return whole


# -- client ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (OLD, "07000000 05000000 00a0c9fcce550000 0753000000000000"),
        (NEW, "07000000 00000000 0500000000000000 00a0c9fcce550000 0753000000000000"),
    ],
)
def test_get_bytes(layout: Layout, expected: str) -> None:
    assert ClientCodec(layout).get(0x5307, 0x55CEFCC9A000, 5) == bytes.fromhex(expected)
    assert len(bytes.fromhex(expected)) == layout.header_size


@pytest.mark.parametrize("layout", Layout)
def test_close_bytes(layout: Layout) -> None:
    assert ClientCodec(layout).close() == struct.pack("=I", 0x1023) + bytes(layout.header_size - 4)
    assert ClientCodec(layout).close(force=True)[:4] == struct.pack("=I", 0x1024)


def test_golden_answer() -> None:
    """Garbage in the padding of an answer is of no interest."""
    codec = ClientCodec(NEW)
    codec.get(0x5307, 0x55CEFCC9A000, 1)
    data = pages(0x55CEFCC9A000, 1)
    assert feed(codec, GOLDEN_ANSWER + data) == [
        Pages(0x5307, 0x55CEFCC9A000, data),  # type: ignore[arg-type]
        Answered(Get(0x5307, 0x55CEFCC9A000, 1), 1),
    ]
    assert codec.outstanding == 0


gets = st.builds(
    lambda pid, first, count: Get(pid, first * PAGE_SIZE, count),
    st.integers(1, 1 << 22),
    st.integers(1, (1 << 47) // PAGE_SIZE),
    st.integers(1, 9),
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Layout, list[tuple[Get, int]], list[int]]:
    """Requests and how many pages each gets, and where the answers are cut on their way."""
    layout = draw(st.sampled_from(Layout))
    asked = draw(st.lists(gets, max_size=8))
    answers = [(get, draw(st.integers(0, get.nr_pages))) for get in asked]
    length = sum(layout.header_size + count * PAGE_SIZE for _, count in answers)
    cuts = draw(st.lists(st.integers(0, length), max_size=12))
    return layout, answers, cuts


@given(conversations(), st.sampled_from([2 * PAGE_SIZE, 3 * PAGE_SIZE + 17, 1 << 20]))
def test_answers_in_any_pieces(
    conversation: tuple[Layout, list[tuple[Get, int]], list[int]], size: int
) -> None:
    """Full, short and empty answers, cut anywhere, give the same events and every byte of the pages."""
    layout, answers, cuts = conversation
    codec = ClientCodec(layout, size=size)
    stream, expected = b"", []
    for get, count in answers:
        codec.get(*get[:3])
        stream += add(layout, get, count) + pages(get.vaddr, count)
        if count:
            expected.append(Pages(get.pid, get.vaddr, pages(get.vaddr, count)))  # type: ignore[arg-type]
        expected.append(Answered(get, count))  # type: ignore[arg-type]
    codec.close()
    expected += [Closed(-5), Eof(complete=True)]  # type: ignore[list-item]
    assert joined(feed(codec, stream + struct.pack("=i", -5), cuts, eof=True)) == expected


@pytest.mark.parametrize("layout", Layout)
def test_cut_off_anywhere(layout: Layout) -> None:
    """At every possible length of what arrives: the whole pages in it, and no other byte."""
    get = Get(77, 0x7F0000000000, 2)
    stream = add(layout, get, 2) + pages(get.vaddr, 2)
    for length in lengths(layout, 2):
        codec = ClientCodec(layout, size=1)
        codec.get(*get[:3])
        events = feed(codec, stream[:length], [cut for cut in lengths(layout, 2) if cut < length], eof=True)
        whole = max(0, length - layout.header_size) // PAGE_SIZE
        expected: list[object] = [Pages(77, get.vaddr, pages(get.vaddr, whole))] if whole else []  # type: ignore[arg-type]
        if length == len(stream):
            expected.append(Answered(get, 2))
        assert joined(events) == [*expected, Eof(complete=length in {0, len(stream)})]
        assert codec.outstanding == (length < len(stream))


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    "header",
    [
        pytest.param(Header(Command.ADD_F, 4, 0x10000, 7, PageFlags.PRESENT), id="more than asked"),
        pytest.param(Header(Command.ADD_F, 1, 0x11000, 7, PageFlags.PRESENT), id="another address"),
        pytest.param(Header(Command.ADD_F, 1, 0x10000, 8, PageFlags.PRESENT), id="another task"),
        pytest.param(Header(Command.ADD_F, 1, 0x10000, 7, PageFlags.PARENT), id="a hole"),
        pytest.param(Header(Command.ADD_F, 1, 0x10000, 7), id="no flags"),
        pytest.param(Header(Command.ADD, 1, 0x10000, 7), id="an old ADD"),
        pytest.param(Header(Command.ADD_F, 1, 0x10000, 7, PageFlags.ZERO), id="zeros, not granted"),
        pytest.param(Header(Command.GET, 1, 0x10000, 7, PageFlags.PRESENT), id="another command"),
        pytest.param(Header(Command.ADD_F, 0xFFFFFFFF, 0x10000, 7, PageFlags.PRESENT), id="absurd"),
    ],
)
def test_wrong_answer(layout: Layout, header: Header) -> None:
    codec = ClientCodec(layout)
    codec.get(7, 0x10000, 3)
    with pytest.raises(RemoteProtocolError, match="requested 3 pages of task 7 at 0x10000"):
        feed(codec, layout.pack(header) + pages(0x10000, 4))


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("command", [Command.ADD_F, Command.ADD])
def test_missing_page(layout: Layout, command: Command) -> None:
    """An answer with no pages says so; CRIU's comments know it, its servers close instead."""
    codec = ClientCodec(layout)
    codec.get(7, 0x10000, 3)
    assert feed(codec, layout.pack(Header(command, 0, 0x10000, 7))) == [Answered(Get(7, 0x10000, 3), 0)]


def test_zero_pages() -> None:
    codec = ClientCodec(NEW, Features.ZERO)
    codec.get(7, 0x10000, 3)
    codec.get(7, 0x13000, 1)
    events = feed(codec, add(NEW, Get(7, 0x10000, 3), 2, PageFlags.ZERO) + add(NEW, Get(7, 0x13000, 1), 1))
    assert events == [ZeroPages(7, 0x10000, 2), Answered(Get(7, 0x10000, 3), 2)]


@pytest.mark.parametrize("layout", Layout)
def test_unsolicited_answer(layout: Layout) -> None:
    with pytest.raises(RemoteProtocolError, match="without a request"):
        feed(ClientCodec(layout), add(layout, Get(7, 0x10000, 1), 1))
    codec = ClientCodec(layout)
    codec.close()
    with pytest.raises(RemoteProtocolError, match="without a request"):
        feed(codec, struct.pack("=i", 0) + b"x")


@given(st.sampled_from(Layout), st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_client_survives_garbage(layout: Layout, garbage: bytes, cuts: list[int]) -> None:
    """Whatever arrives: no page that was not asked for, and no other error than the one."""
    codec = ClientCodec(layout)
    codec.get(7, 0x10000, 3)
    try:
        events = feed(codec, garbage, [cut for cut in cuts if cut <= len(garbage)], eof=True)
    except RemoteProtocolError:
        return
    assert all(isinstance(event, Eof | Answered) for event in events)


@pytest.mark.parametrize("nr_pages", [0, -1, 1 << 32])
def test_request_that_cannot_be_asked(nr_pages: int) -> None:
    with pytest.raises(ValueError, match="can't be requested"):
        ClientCodec(OLD).get(7, 0x10000, nr_pages)
    with pytest.raises(ValueError, match="can't be requested"):
        ClientCodec(NEW).get(7, 0x10001, 1)


def test_no_request_after_close() -> None:
    codec = ClientCodec(NEW)
    codec.close()
    with pytest.raises(RuntimeError, match=r"close\(\)"):
        codec.get(7, 0x10000, 1)


# -- server ------------------------------------------------------------------------------------------------


def test_golden_get() -> None:
    assert feed(ServerCodec(), GOLDEN_GET) == [Header(Command.GET, 1, 0x55CEFCC9A000, 0x5307)]


page_addresses = st.integers(0x400, (1 << 47) // PAGE_SIZE - 9).map(lambda number: number * PAGE_SIZE)
images = st.builds(wire.encode_dst_id, st.sampled_from(ImageType), st.integers(1, 1 << 32))


def _messages() -> st.SearchStrategy[Header]:
    count, none = st.integers(1, 9), st.just(0)
    return st.one_of(
        st.builds(Header, st.just(Command.GET), count, page_addresses, st.integers(1, 1 << 22), none),
        st.builds(
            Header,
            st.sampled_from([Command.OPEN, Command.OPEN2, Command.PARENT]),
            none,
            none,
            images,
            none,
        ),
        st.builds(Header, st.sampled_from([Command.ADD, Command.HOLE]), count, page_addresses, images, none),
        st.builds(
            Header, st.just(Command.ADD_F), count, page_addresses, images, st.sampled_from([1, 2, 4, 6])
        ),
    )


def _stream(layout: Layout, messages: Sequence[Header]) -> tuple[bytes, list[object]]:
    stream, expected = b"", []
    for message in messages:
        stream += layout.pack(message) + pages(message.vaddr, message.payload // PAGE_SIZE)
        expected.append(message)
        if message.payload:
            expected.append(Payload(pages(message.vaddr, message.nr_pages), 0))  # type: ignore[arg-type]
    return stream, expected


@given(st.data(), st.sampled_from(Layout), st.lists(_messages(), max_size=6))
def test_all_commands_in_any_pieces(data: st.DataObject, layout: Layout, messages: list[Header]) -> None:
    """The layout is found out from the first message, whatever it is and wherever it is cut."""
    stream, expected = _stream(layout, messages)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    codec = ServerCodec(size=data.draw(st.sampled_from([64, 5000, 1 << 20])))
    assert joined(feed(codec, stream, cuts, eof=True)) == [*expected, Eof(complete=True)]
    assert codec.layout is (layout if messages else None)


@pytest.mark.parametrize("layout", Layout)
def test_cut_off_client(layout: Layout) -> None:
    message = Header(Command.ADD_F, 1, 0x400000, wire.encode_dst_id(ImageType.TASK, 77), PageFlags.PRESENT)
    stream, expected = _stream(layout, [message])
    for length in lengths(layout, 1):
        cuts = [cut for cut in lengths(layout, 1) if cut < length]
        events = joined(feed(ServerCodec(size=1), stream[:length], cuts, eof=True))
        assert events[-1] == Eof(complete=length in {0, len(stream)})
        if length >= layout.header_size:
            assert events[0] == expected[0]
            received = b"".join(event.data for event in events if isinstance(event, Payload))
            assert received == stream[layout.header_size : length]


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("command", [Command.CLOSE, Command.FORCE_CLOSE])
@pytest.mark.parametrize("first", [True, False])
def test_close(layout: Layout, command: Command, first: bool) -> None:
    """CLOSE is known in either layout, as the first message too; what follows counts no more."""
    codec = ServerCodec(None if first else layout)
    events = feed(codec, layout.pack(Header(command)) + b"and more", range(1, 20), eof=True)
    assert [event.command for event in events if isinstance(event, Header)] == [command]
    assert events[-1] == Eof(complete=True)


@pytest.mark.parametrize(
    ("first", "layout"),
    [
        (struct.pack("=IIQQ", 7, 1, 0x400000, 1), OLD),
        (struct.pack("=IIQQ", 7, 1, 0x7FFFFFFFE000, 4096), OLD),
        (struct.pack("=IIQQ", 7, 0, 1, 0x10000), NEW),
        (struct.pack("=IIQQ", 7, 0xDEADBEEF, 1024, 0x55CEFCC9A000), NEW),
        (struct.pack("=IIQQ", 7, 0, 4096, 0x55CEFCC9A000), NEW),
        (struct.pack("=IIQQ", 7, 3, 0x10000, 77), OLD),
        (struct.pack("=IIQQ", 4, 0, 0, 77 << 8 | 1), OLD),
        (struct.pack("=IIQQ", 4, 0xDEADBEEF, 0, 0), NEW),
        (struct.pack("=IIQQ", 5, 0, 0, 1 << 8 | 2), OLD),
        (struct.pack("=IIQQ", PRESENT_ADD, 0, 3, 0x400000), NEW),
        (struct.pack("=IIQQ", PRESENT_ADD, 3, 0x400000, 77 << 8 | 16), OLD),
    ],
)
def test_detect_layout(first: bytes, layout: Layout) -> None:
    assert wire.detect_layout(first) is layout


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("command", [Command.GET, Command.ADD, Command.ADD_F, Command.HOLE])
def test_range_that_is_none(layout: Layout, command: Command) -> None:
    for vaddr, nr_pages in [(0x400001, 1), ((1 << 64) - PAGE_SIZE, 2), (0x400000, layout.max_pages)]:
        header = Header(command, nr_pages, vaddr, 7)
        if vaddr + nr_pages * PAGE_SIZE <= 1 << 64 and not vaddr % PAGE_SIZE:
            continue  # a 32-bit count can't reach the end of the address space from there
        with pytest.raises(RemoteProtocolError, match="no range of pages"):
            feed(ServerCodec(layout), layout.pack(header))


def test_unknown_command_and_type() -> None:
    with pytest.raises(RemoteProtocolError, match="unknown command 0x9"):
        feed(ServerCodec(NEW), struct.pack("=I4xQQQ", 9, 0, 0, 0))
    with pytest.raises(RemoteProtocolError, match="unknown type 3"):
        wire.decode_dst_id(77 << 8 | 3)


@pytest.mark.parametrize(
    ("byte", "kind"),
    [(1, ImageType.TASK), (11, ImageType.TASK), (2, ImageType.SHMEM), (34, ImageType.SHMEM)],
)
def test_dst_id(byte: int, kind: ImageType) -> None:
    assert wire.decode_dst_id(0x1234 << 8 | byte) == (kind, 0x1234)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.sampled_from([None, OLD, NEW]))
def test_server_survives_garbage(garbage: bytes, cuts: list[int], layout: Layout | None) -> None:
    try:
        events = feed(ServerCodec(layout), garbage, [cut for cut in cuts if cut <= len(garbage)], eof=True)
    except RemoteProtocolError:
        return
    assert isinstance(events[-1], Eof)


def test_answers() -> None:
    codec = ServerCodec()
    request = feed(codec, GOLDEN_GET)[0]
    assert isinstance(request, Header)
    assert codec.answer_get(request, 1) == GOLDEN_ANSWER[:4] + bytes(4) + GOLDEN_ANSWER[8:]
    with pytest.raises(ValueError, match="more than"):
        codec.answer_get(request, 2)
    with pytest.raises(ValueError, match="more than"):
        codec.answer_get(request, 1, zero=True)
    assert wire.answer_open(has_parent=True) == b"\1"
    assert wire.answer_parent(has_parent=True) == b"\1\0\0\0"
    assert wire.answer_close(-1) == b"\xff\xff\xff\xff"


# -- probe -------------------------------------------------------------------------------------------------


def _server_events(data: bytes) -> Iterator[tuple[ServerCodec, list[object]]]:
    for cuts in ((), range(1, len(data))):
        codec = ServerCodec()
        yield codec, feed(codec, data, cuts)


def test_probe_of_our_own_server() -> None:
    for impatient in (b"", wire.PROBE_REST):
        data = wire.PROBE_FIRST + impatient + NEW.pack(Header(Command.GET, 1, 0x400000, 7))
        for codec, events in _server_events(data):
            assert events == [Probed(wire.ALL_FEATURES), Header(Command.GET, 1, 0x400000, 7)]
            answer = codec.answer_probe(Features.MISSING | Features.ZERO)
            assert wire.probe_answer(answer) == Features.MISSING | Features.ZERO
            assert codec.layout is NEW


def test_probe_of_an_old_server() -> None:
    """24 bytes are a whole PARENT to it, whose dst_id it understands."""
    codec = ServerCodec(OLD)
    (message,) = feed(codec, wire.PROBE_FIRST)
    assert isinstance(message, Header)
    assert message.command is Command.PARENT
    assert wire.decode_dst_id(message.dst_id)[0] is ImageType.TASK
    assert wire.probe_answer(wire.answer_parent(has_parent=False)) is None
    assert wire.probe_answer(wire.answer_parent(has_parent=True)) is None


def test_probe_of_a_new_server() -> None:
    codec = ServerCodec(NEW)
    assert feed(codec, wire.PROBE_FIRST) == []
    (message,) = feed(codec, wire.PROBE_REST)
    assert isinstance(message, Header)
    assert message.command is Command.PARENT
    assert wire.decode_dst_id(message.dst_id)[0] is ImageType.TASK


def test_probe_answered_with_nonsense() -> None:
    with pytest.raises(RemoteProtocolError, match="instead of 0 or 1"):
        wire.probe_answer(b"\2\0\0\0")
