"""The page server's protocol as CRIU speaks it, without I/O: bytes in, events out, and bytes to send.

Both layouts of the header (docs/criu.md, "Page server protocol"), native-endian:

=========  =====  ===  =========  ========  =====  ======  =================
layout     bytes  cmd  (padding)  nr_pages  vaddr  dst_id  spoken by
=========  =====  ===  =========  ========  =====  ======  =================
criu-4.1   24     u32  -          u32       u64    u64     CRIU up to 4.1.1
criu-4.2   32     u32  u32        u64       u64    u64     CRIU from 4.2
=========  =====  ===  =========  ========  =====  ======  =================

A codec owns its receive buffer, so that pages go from the socket to their reader without a copy::

    n = sock.recv_into(codec.writable())
    codec.received(n)  # 0: the peer has closed
    while (event := codec.next_event()) is not None:
        ...  # a memoryview in an event is good until writable() is called again

**Which layout?** CRIU does not negotiate, and a server of CRIU's takes one connection in its life, so
nothing can be tried out on another one. A *server* can always tell from the first 24 bytes
(`detect_layout`). A *client* can ask a harmless question that can be put in both layouts at once, in two
pieces (`PROBE_FIRST`, `PROBE_REST`): PARENT ("has your parent directory this image?"), which only looks.
Its first 24 bytes are a whole message in the old layout and are answered; a server of the new layout waits
for the other 8 and then answers (observed with `dump --lazy-pages` and `page-server --lazy-pages` of CRIU
4.1.1 and 4.2.1). Our own server knows the probe by its `vaddr`, which CRIU does not look at in this
command, and answers at once with what it can do beyond CRIU (`Features`); from then on both sides use the
criu-4.2 layout with those extras, on this connection only. What the extras are is in docs/protocol.md.

In TLS a message in two pieces is two records, which a server of CRIU's does not put together (docs/criu.md). There the
layout is a guess, unless somebody says it (`GUESSED`).
"""

from __future__ import annotations

import enum
import mmap
import struct
from collections import deque
from typing import NamedTuple

from lazypages.errors import LazyPagesError
from lazypages.net.compression import CompressionError, decompress

PAGE_SIZE = mmap.PAGESIZE
ADDRESS_SPACE = 1 << 64  # bytes; no range may reach past it
BUFFER_SIZE = 512 << 10  # bytes that are received at once, at most


class RemoteProtocolError(LazyPagesError):
    """The peer broke the page server's protocol. The connection can't be used any more."""


class Command(enum.IntEnum):
    """The low 16 bits of a header's cmd."""

    ADD = 1  # old: pages follow
    HOLE = 2  # old: pages are in the parent
    OPEN = 3  # old: OPEN2 without an answer
    OPEN2 = 4  # begin an image; answered with one byte: has it a parent
    PARENT = 5  # has the parent directory this image; answered with an int32
    ADD_F = 6  # pages with pagemap flags; they follow if the flags say PRESENT
    GET = 7  # answered with ADD_F and the pages
    CLOSE = 0x1023  # answered with an int32 status
    FORCE_CLOSE = 0x1024
    CHECKPOINT = 0x4C01  # ours: the client says which checkpoint it means; no answer
    COMPLETED = 0x4C02  # ours, from the server: another destination has all of this dump


_COMMANDS = {int(command): command for command in Command}

_UNKNOWN = "which this lazypages does not know: a newer CRIU?"


class PageFlags(enum.IntFlag):
    """Pagemap flags, in the high 16 bits of a header's cmd. ZERO and ZSTD are ours: see Features."""

    PARENT = 1
    LAZY = 2
    PRESENT = 4
    ZERO = 0x100
    ZSTD = 0x200


#: Others may say that pages are not sent plainly, or not wanted so (images_spec/unknown.md). CRIU leaves them out of
#: all other commands, where they mean nothing.
_KNOWN_FLAGS = {
    Command.ADD_F: PageFlags.PARENT | PageFlags.LAZY | PageFlags.PRESENT,
    Command.GET: PageFlags.ZSTD,
}


class Features(enum.IntFlag):
    """What our own server and client can do beyond CRIU; asked for and granted in the probe."""

    MISSING = 1  # a page that the server hasn't got is answered with nr_pages 0; CRIU's closes instead
    CONNECTIONS = 2  # any number of connections at once
    ZERO = 4  # pages of nothing but zeros are answered with flags ZERO, and no bytes
    # A GET with flags ZSTD may be answered with flags ZSTD: then a u32 follows, and as many bytes of a zstd frame,
    # fewer than the pages have.
    COMPRESSED = 8
    # Both say which checkpoint they mean before any page: the server's identity follows its answer to the probe, and
    # the client's first message is CHECKPOINT with its own. CLOSE says how it went (CloseFlags), the server may say
    # COMPLETED. Only between a client that has images and a server that has an identity.
    CHECKPOINT = 0x80


NO_FEATURES = Features(0)
ALL_FEATURES = Features.MISSING | Features.CONNECTIONS | Features.ZERO | Features.COMPRESSED
"""All that need nothing but code."""


class CloseFlags(enum.IntFlag):
    """In the high 16 bits of CLOSE's cmd, after Features.CHECKPOINT was granted. None: nobody knows how it went."""

    COMPLETE = 1  # every task has all its memory, or has exited by itself
    UNUSED = 2  # no restore has come: nothing runs at this destination


NO_CLOSE_FLAGS = CloseFlags(0)
ALL_CLOSE_FLAGS = CloseFlags.COMPLETE | CloseFlags.UNUSED

IDENTITY_SIZE = 16
ELSEWHERE = int(Command.COMPLETED)
"""Status in the answer to CLOSE: another destination was complete before this one."""


class Layout(enum.Enum):
    """Layout of the header; the value is its name on the command line."""

    CRIU_4_1 = "criu-4.1"
    CRIU_4_2 = "criu-4.2"

    @property
    def header_size(self) -> int:
        """Bytes."""
        return _STRUCTS[self].size

    @property
    def max_pages(self) -> int:
        """The largest nr_pages that the layout can carry."""
        return 0xFFFFFFFF if self is Layout.CRIU_4_1 else 0xFFFFFFFF_FFFFFFFF

    def pack(self, header: Header) -> bytes:
        """`header` as bytes."""
        return _STRUCTS[self].pack(
            header.command | header.flags << 16, header.nr_pages, header.vaddr, header.dst_id
        )


_STRUCTS = {Layout.CRIU_4_1: struct.Struct("=IIQQ"), Layout.CRIU_4_2: struct.Struct("=I4xQQQ")}
_SHORTEST = min(layout.size for layout in _STRUCTS.values())
_STATUS = struct.Struct("=i")
_FRAME_SIZE = struct.Struct("=I")


class Header(NamedTuple):
    """One message, without the pages that may follow it."""

    command: Command
    nr_pages: int = 0
    vaddr: int = 0
    dst_id: int = 0
    flags: int = 0

    @property
    def payload(self) -> int:
        """Bytes of pages that follow, by the command and its flags."""
        if self.command is Command.ADD or (self.command is Command.ADD_F and self.flags & PageFlags.PRESENT):
            return self.nr_pages * PAGE_SIZE
        return 0


class ImageType(enum.Enum):
    """What a dst_id names, in all commands but GET. The value is the type byte in use since CRIU 3.3."""

    TASK = 1  # pagemap-<pid>.img
    SHMEM = 2  # pagemap-shmem-<shmid>.img


_IMAGE_TYPES = {
    **dict.fromkeys((1, 10, 11, 16, 17), ImageType.TASK),
    **dict.fromkeys((2, 27, 28, 29, 32, 33, 34), ImageType.SHMEM),
}


def encode_dst_id(kind: ImageType, number: int) -> int:
    """The dst_id of an image: `number` is a pid or a shmid."""
    return number << 8 | kind.value


def decode_dst_id(dst_id: int) -> tuple[ImageType, int]:
    """The kind and the number (pid or shmid) of an image; type bytes of old releases are known too."""
    kind = _IMAGE_TYPES.get(dst_id & 0xFF)
    if kind is None:
        raise RemoteProtocolError(f"the peer names an image of the unknown type {dst_id & 0xFF}")
    return kind, dst_id >> 8


# The probe. No task can have the pid it asks for, and the low 16 bits of PROBE_REST are no command, so that
# neither an old server nor ours can take them for a message.
_PROBE_MAGIC = 0x6C617A7970616765  # in vaddr; as nr_pages of the other layout it is out of all bounds
_PROBE_DST_ID = encode_dst_id(ImageType.TASK, 0x7FFFFFFF)
_PROBE_ANSWER = 0x4C50 << 16  # plus Features


def probe_first(features: Features = ALL_FEATURES) -> bytes:
    """The first piece of a probe that asks for `features`."""
    return _STRUCTS[Layout.CRIU_4_1].pack(Command.PARENT, features, _PROBE_MAGIC, _PROBE_DST_ID)


PROBE_FIRST = probe_first()
PROBE_REST = struct.pack("=Q", _PROBE_DST_ID)
PROBE_ANSWER_SIZE = _STATUS.size

GUESSED = (
    "with TLS it can't be found out which CRIU's protocol a page server speaks, and {layout.value} was a guess: "
    "say it with --page-server-protocol"
)
"""For whom a server has closed the connection; for ``str.format``."""


def probe_answer(data: bytes) -> Features | None:
    """What the server's answer to the probe (PROBE_ANSWER_SIZE bytes) says: None for a server of CRIU's."""
    (value,) = _STATUS.unpack(data)
    if value & ~0xFFFF == _PROBE_ANSWER:
        return Features(value & 0xFFFF)
    if value in {0, 1}:
        return None
    raise RemoteProtocolError(f"the page server answers {value:#x} when asked for a parent image, not 0 or 1")


def checkpoint_message(identity: bytes, client: int) -> bytes:
    """The client's first message once Features.CHECKPOINT is granted. `client`: a number of 64 bits, the same on all
    connections of this destination and no other's."""
    first, second = struct.unpack("=QQ", identity)
    return Layout.CRIU_4_2.pack(Header(Command.CHECKPOINT, client, first, second))


def completed_message() -> bytes:
    """What a server says, instead of an answer or of nothing, before it closes: COMPLETED."""
    return Layout.CRIU_4_2.pack(Header(Command.COMPLETED))


def detect_layout(first: bytes | bytearray | memoryview) -> Layout:
    """The layout that a client uses, from the first 24 bytes it sends.

    The word at byte 16 is the dst_id in the old layout, the vaddr in the new one. A dst_id has a type in its
    low byte, which no page-aligned vaddr has. In a GET it is a plain pid: at most 4194304 (PID_MAX_LIMIT,
    proc_sys_kernel(5)), and the word at byte 8 is the old layout's vaddr or the new one's nr_pages. Tasks
    have nothing to ask for in their lowest 4 MiB but by exotic arrangement; the alignment decides then.
    """
    command, _, second, third = _STRUCTS[Layout.CRIU_4_1].unpack_from(first)
    if command & 0xFFFF != Command.GET:
        return Layout.CRIU_4_2 if third % PAGE_SIZE == 0 else Layout.CRIU_4_1
    if third > 1 << 22 or second % PAGE_SIZE:
        return Layout.CRIU_4_2
    return Layout.CRIU_4_1


class Eof(NamedTuple):
    """The peer has closed; `complete` is false when that cut a message short."""

    complete: bool


class _ReceiveBuffer:
    """Bytes received and not yet consumed, in one piece of memory that is used over and over."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(bytearray(size))
        self._start = self._end = 0
        self._eof = self._eof_told = False

    def __len__(self) -> int:
        return self._end - self._start

    def writable(self) -> memoryview:
        """Where to receive into. Ends the life of all views that events have handed out."""
        length = self._end - self._start
        if self._start:
            self._memory[:length] = self._memory[self._start : self._end]
            self._start, self._end = 0, length
        if length == len(self._memory):
            raise RuntimeError("the buffer is full: take the events out before receiving more")
        return self._memory[length:]

    def received(self, count: int) -> None:
        """`count` bytes were put at the beginning of writable(); 0: there will be no more."""
        self._end += count
        self._eof = self._eof or not count

    def receive(self, data: bytes | bytearray | memoryview) -> int:
        """Copy as much of `data` in as there is room for; how much that was."""
        room = self.writable()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        self._end += count
        return count

    def _end_of_file(self, *, complete: bool) -> Eof | None:
        if self._eof and not self._eof_told:
            self._eof_told = True
            return Eof(complete)
        return None

    def _peek(self, count: int) -> memoryview:
        return self._memory[self._start : self._start + count]

    def _take(self, count: int) -> memoryview:
        view = self._memory[self._start : self._start + count]
        self._start += count
        return view


def _check_range(what: str, vaddr: int, nr_pages: int) -> None:
    if vaddr % PAGE_SIZE or vaddr + nr_pages * PAGE_SIZE > ADDRESS_SPACE:
        raise RemoteProtocolError(f"{what} {nr_pages} pages at {vaddr:#x}, which is no range of pages")


class Get(NamedTuple):
    """A request for pages: `vaddr` is the address at dump time. `compress`: they may come compressed."""

    pid: int
    vaddr: int
    nr_pages: int
    compress: bool = False


class Pages(NamedTuple):
    """Whole pages of an answer, as they arrive. The view is good until writable() is called again."""

    pid: int
    vaddr: int
    data: memoryview


class ZeroPages(NamedTuple):
    """Pages that the server says hold nothing but zeros (only after Features.ZERO was granted)."""

    pid: int
    vaddr: int
    nr_pages: int


class Answered(NamedTuple):
    """The oldest request has its whole answer: the first `nr_pages` of it, the rest is to be asked again.

    0 means that the server hasn't got the first page; a server of CRIU's closes the connection instead.
    `frame`: bytes of the zstd frame that they came in; 0: in none.
    """

    request: Get
    nr_pages: int
    frame: int = 0


class Closed(NamedTuple):
    """The server's answer to close(): 0 when all is well."""

    status: int


class Completed(NamedTuple):
    """Another destination has all of the dump, whose tasks run there; the server has no page for us any more."""


class ClientCodec(_ReceiveBuffer):
    """Our side of a connection to a server that answers GETs (`page-server --lazy-pages` and the like).

    Answers come in the order of the requests and are held against them: an answer that nobody asked for,
    to another address or pid, or with more pages than asked raises RemoteProtocolError.
    """

    def __init__(self, layout: Layout, features: Features = NO_FEATURES, *, size: int = BUFFER_SIZE) -> None:
        super().__init__(max(size, 2 * PAGE_SIZE))
        self.layout = layout
        self.features = features
        self._struct = _STRUCTS[layout]
        self._asked: deque[Get] = deque()
        self._answer: Answered | None = None  # being received
        self._next = 0  # address of the next page of the answer
        self._missing = 0  # bytes of the answer that are still to come
        self._compressed = False  # the answer is; then these count, and not _missing:
        self._frame_size = 0  # 0: not known yet
        self._frame = bytearray()
        self._closing = self._closed = False

    @property
    def outstanding(self) -> int:
        """Requests that have no complete answer yet."""
        return len(self._asked)

    @property
    def oldest(self) -> Get | None:
        """The request that is answered first."""
        return self._asked[0] if self._asked else None

    @property
    def answering(self) -> Answered | None:
        """The answer whose pages are coming."""
        return self._answer

    @property
    def at_boundary(self) -> bool:
        """Whether what was received ends with a whole answer."""
        return not len(self) and not self._missing and not self._compressed

    def get(self, pid: int, vaddr: int, nr_pages: int, *, compress: bool = False) -> bytes:
        """The bytes that ask for `nr_pages` (> 0) pages from `vaddr` on. `compress` needs Features.COMPRESSED."""
        if self._closing:
            raise RuntimeError("no request can follow close()")
        if not 0 < nr_pages <= self.layout.max_pages or vaddr % PAGE_SIZE:
            raise ValueError(f"{nr_pages} pages at {vaddr:#x} can't be asked for")
        if compress and not self.features & Features.COMPRESSED:
            raise ValueError("the server can't compress")
        self._asked.append(Get(pid, vaddr, nr_pages, compress))
        return self._struct.pack(
            Command.GET | (PageFlags.ZSTD << 16 if compress else 0), nr_pages, vaddr, pid
        )

    def close(self, *, force: bool = False, flags: CloseFlags = NO_CLOSE_FLAGS) -> bytes:
        """The bytes that end the session; Closed is the last event, after all answers. `flags` need CHECKPOINT."""
        if flags and not self.features & Features.CHECKPOINT:
            raise ValueError("the server would not know what that means")
        self._closing = True
        command = Command.FORCE_CLOSE if force else Command.CLOSE
        return self._struct.pack(command | flags << 16, 0, 0, 0)

    def next_event(self) -> Pages | ZeroPages | Answered | Closed | Completed | Eof | None:
        """What comes next in the bytes received so far; None: receive more. Raises RemoteProtocolError."""
        if self._missing:
            count = min(len(self), self._missing) // PAGE_SIZE * PAGE_SIZE
            if count:
                pages = Pages(self._asked[0].pid, self._next, self._take(count))
                self._next += count
                self._missing -= count
                return pages
        elif self._compressed:
            return self._decompressed()
        elif self._answer is not None:
            answer, self._answer = self._answer, None
            self._asked.popleft()
            return answer
        elif self._asked:
            if len(self) >= self._struct.size:
                return self._header()
        elif self._closing and not self._closed:
            if len(self) >= _STATUS.size:
                self._closed = True
                return Closed(*_STATUS.unpack(self._take(_STATUS.size)))
        elif len(self):
            return self._unasked()
        return self._end_of_file(complete=self.at_boundary)

    def _unasked(self) -> Completed | None:
        """Bytes that are no answer."""
        size = self._struct.size
        if self.features & Features.CHECKPOINT and len(self) < size and not self._eof:
            return None
        if len(self) >= size and self._says_completed(self._struct.unpack(self._peek(size))[0]):
            self._take(len(self))
            return Completed()
        raise RemoteProtocolError(
            f"the page server sends what nobody asked for: {bytes(self._peek(min(len(self), 32))).hex()}"
        )

    def _says_completed(self, word: int) -> bool:
        return word == Command.COMPLETED and bool(self.features & Features.CHECKPOINT)

    def _header(self) -> Pages | ZeroPages | Answered | Closed | Completed | Eof | None:
        word, nr_pages, vaddr, dst_id = self._struct.unpack(self._take(self._struct.size))
        if self._says_completed(word):
            return Completed()
        asked = self._asked[0]
        command, flags = word & 0xFFFF, word >> 16
        zero = flags == PageFlags.ZERO and bool(self.features & Features.ZERO)
        zstd = flags == PageFlags.ZSTD and asked.compress
        known = command == Command.ADD_F and (zero or zstd or flags == PageFlags.PRESENT)
        if (
            command not in {Command.ADD_F, Command.ADD}
            or (vaddr, dst_id) != (asked.vaddr, asked.pid)
            or nr_pages > asked.nr_pages
            or (nr_pages and not known)
        ):
            raise RemoteProtocolError(
                f"asked for {asked.nr_pages} pages of task {asked.pid} at {asked.vaddr:#x},"
                f" the page server answers command {word:#x}, {nr_pages} pages of {dst_id} at {vaddr:#x}"
            )
        self._answer = Answered(asked, nr_pages)
        if zero and nr_pages:
            return ZeroPages(asked.pid, vaddr, nr_pages)
        self._next, self._missing = vaddr, 0 if zstd else nr_pages * PAGE_SIZE
        self._compressed, self._frame_size = zstd and nr_pages > 0, 0
        return self.next_event()

    def _decompressed(self) -> Pages | Eof | None:
        """The pages of a compressed answer, when its frame is complete."""
        assert self._answer is not None
        asked, nr_pages, _ = self._answer
        if not self._frame_size and len(self) >= _FRAME_SIZE.size:
            (self._frame_size,) = _FRAME_SIZE.unpack(self._take(_FRAME_SIZE.size))
            if not 0 < self._frame_size < nr_pages * PAGE_SIZE:
                raise RemoteProtocolError(
                    f"the page server sends {nr_pages} pages compressed to {self._frame_size} bytes"
                )
        if self._frame_size:
            self._frame += self._take(min(len(self), self._frame_size - len(self._frame)))
        if not self._frame_size or len(self._frame) < self._frame_size:
            return self._end_of_file(complete=False)
        try:
            data = decompress(self._frame, nr_pages * PAGE_SIZE)
        except CompressionError as error:
            raise RemoteProtocolError(f"the page server's {error}") from None
        self._answer = Answered(asked, nr_pages, self._frame_size)
        self._compressed, self._frame = False, bytearray()
        return Pages(asked.pid, asked.vaddr, memoryview(data))


class Probed(NamedTuple):
    """A client of ours asks what we can do beyond CRIU; answer with ServerCodec.answer_probe()."""

    features: Features


class Agreement(NamedTuple):
    """A client says which checkpoint it means, before anything else (only after Features.CHECKPOINT was granted).

    `client`: the same number on all connections of one destination.
    """

    client: int
    identity: bytes


class Payload(NamedTuple):
    """Some bytes of the pages that belong to the Header before, as they arrive; `missing` are to come.

    The view is good until writable() is called again.
    """

    data: memoryview
    missing: int


class ServerCodec(_ReceiveBuffer):
    """A server's side of a connection: all commands, of dumps that are written and of pages that are read.

    Without a `layout`, it is taken from the first message.
    """

    def __init__(self, layout: Layout | None = None, *, size: int = BUFFER_SIZE) -> None:
        super().__init__(max(size, 64))
        self.layout = layout
        self.features = NO_FEATURES
        self._missing = 0  # bytes of pages that are still to come
        self._after_probe = False
        self._unagreed = False  # which checkpoint the client means must come next
        self._closed = False

    @property
    def settled(self) -> bool:
        """Whether all that comes next is a whole message in `layout`."""
        return self.layout is not None and not (
            self._after_probe or self._unagreed or self._missing or self._closed
        )

    @property
    def midway(self) -> bool:
        """Whether a message has begun and is not complete, or the client has said CLOSE and not yet closed."""
        return bool(len(self) or self._missing or self._closed)

    def take_rest(self) -> bytes:
        """What was received of a message that is not complete; give it back with receive()."""
        return bytes(self._take(len(self)))

    def next_event(self) -> Header | Payload | Probed | Agreement | Eof | None:
        """What comes next in the bytes received so far; None: receive more. Raises RemoteProtocolError."""
        if self._missing:
            count = min(len(self), self._missing)
            if count:
                self._missing -= count
                return Payload(self._take(count), self._missing)
        elif self._closed:
            self._take(
                len(self)
            )  # the rest of a CLOSE whose layout we could not know; nothing else counts now
        elif self._after_probe and len(self) >= len(PROBE_REST):
            self._after_probe = False
            if (
                self._peek(len(PROBE_REST)) == PROBE_REST
            ):  # the client grew impatient before our answer was there
                self._take(len(PROBE_REST))
            return self.next_event()
        elif len(self) >= (self.layout.header_size if self.layout else _SHORTEST):
            return self._message()
        return self._end_of_file(complete=not len(self) and not self._missing)

    def _message(self) -> Header | Payload | Probed | Agreement | Eof | None:
        layout = self.layout
        if layout is None:
            first = self._peek(_SHORTEST)
            word, features, vaddr, dst_id = _STRUCTS[Layout.CRIU_4_1].unpack(first)
            if (word, vaddr, dst_id) == (Command.PARENT, _PROBE_MAGIC, _PROBE_DST_ID):
                self._take(_SHORTEST)
                self.layout = Layout.CRIU_4_2
                self._after_probe = True
                return Probed(Features(features & (ALL_FEATURES | Features.CHECKPOINT)))
            if word & 0xFFFF in {Command.CLOSE, Command.FORCE_CLOSE}:
                layout = Layout.CRIU_4_1  # all zeros from here on in both: the shorter will do
            else:
                self.layout = layout = detect_layout(first)
                if len(self) < layout.header_size:
                    return self.next_event()
        word, nr_pages, vaddr, dst_id = _STRUCTS[layout].unpack(self._take(layout.header_size))
        command = _COMMANDS.get(word & 0xFFFF)
        if self._unagreed:
            if command is not Command.CHECKPOINT:
                raise RemoteProtocolError("the client does not say which checkpoint it means")
            self._unagreed = False
            return Agreement(nr_pages, struct.pack("=QQ", vaddr, dst_id))
        if command in {None, Command.CHECKPOINT, Command.COMPLETED}:
            raise RemoteProtocolError(f"the client sends the unknown command {word & 0xFFFF:#x}")
        header = Header(command, nr_pages, vaddr, dst_id, word >> 16)
        if unknown := header.flags & ~_KNOWN_FLAGS.get(command, 0xFFFF):
            raise RemoteProtocolError(f"the client's {command.name} has flags {unknown:#x}, {_UNKNOWN}")
        if command in {Command.ADD, Command.ADD_F, Command.HOLE, Command.GET}:
            _check_range(f"the client's {command.name} is of", vaddr, nr_pages)
        self._missing = header.payload
        self._closed = command in {Command.CLOSE, Command.FORCE_CLOSE}
        return header

    def answer_get(self, request: Header, nr_pages: int, *, zero: bool = False) -> bytes:
        """The header before `nr_pages` pages, at most as many as were asked for; `zero`: no pages follow."""
        if nr_pages > request.nr_pages or (zero and not self.features & Features.ZERO):
            raise ValueError("more than the client has asked for")
        assert self.layout is not None
        flags = PageFlags.ZERO if zero else PageFlags.PRESENT
        return self.layout.pack(request._replace(command=Command.ADD_F, nr_pages=nr_pages, flags=flags))

    def answer_compressed(self, request: Header, nr_pages: int, frame: bytes) -> bytes:
        """A whole answer: `frame` (compression.Compressor) holds `nr_pages` pages. Only where may_compress()."""
        if nr_pages > request.nr_pages or not self.may_compress(request):
            raise ValueError("not what the client has asked for")
        assert self.layout is not None
        header = request._replace(command=Command.ADD_F, nr_pages=nr_pages, flags=PageFlags.ZSTD)
        return self.layout.pack(header) + _FRAME_SIZE.pack(len(frame)) + frame

    def may_compress(self, request: Header) -> bool:
        """Whether the client has asked for that, and may."""
        return bool(self.features & Features.COMPRESSED and request.flags & PageFlags.ZSTD)

    def answer_probe(self, features: Features, identity: bytes = b"") -> bytes:
        """Grant `features` from here on; `identity`: of the checkpoint, with CHECKPOINT."""
        if len(identity) != (IDENTITY_SIZE if features & Features.CHECKPOINT else 0):
            raise ValueError("an identity goes with CHECKPOINT")
        self.features = features
        self._unagreed = bool(identity)
        return _STATUS.pack(_PROBE_ANSWER | features) + identity


def answer_open(*, has_parent: bool) -> bytes:
    """The answer to OPEN2: whether the parent directory has this image, so that holes may be sent."""
    return bytes([has_parent])


def answer_parent(*, has_parent: bool) -> bytes:
    """The answer to PARENT: whether the parent directory has this image."""
    return _STATUS.pack(has_parent)


def answer_close(status: int = 0) -> bytes:
    """The answer to CLOSE and FORCE_CLOSE."""
    return _STATUS.pack(status)
