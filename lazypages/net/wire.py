"""Codec of CRIU's page server protocol, without I/O: bytes in; events, and bytes to send, out.

Both layouts of the header (docs/criu.md, "Page server protocol"), native-endian:

=========  =====  ===  =========  ========  =====  ======  =================
layout     bytes  cmd  (padding)  nr_pages  vaddr  dst_id  spoken by
=========  =====  ===  =========  ========  =====  ======  =================
criu-4.1   24     u32  -          u32       u64    u64     CRIU up to 4.1.1
criu-4.2   32     u32  u32        u64       u64    u64     CRIU from 4.2
=========  =====  ===  =========  ========  =====  ======  =================

A codec owns its receive buffer, so that the reader gets pages without a copy::

    n = sock.recv_into(codec.writable())
    codec.received(n)  # 0: the peer has closed
    while (event := codec.next_event()) is not None:
        ...  # a memoryview in an event is valid until writable() is called again

**Detection of the layout.** CRIU does not negotiate, and a server of CRIU's accepts one connection in its life, so a
second connection can't be used for trials. A *server* detects the layout from the first 24 bytes (`detect_layout`).
A *client* sends a query without side effects, PARENT ("does your parent directory have this image?"), that is valid in
both layouts, in two pieces (`PROBE_FIRST`, `PROBE_REST`). Its first 24 bytes are a whole message in the old layout, so
a server of the old layout answers them; a server of the new layout answers after the other 8 (observed with
`dump --lazy-pages` and `page-server --lazy-pages` of CRIU 4.1.1 and 4.2.1). Our own server recognises the probe by its
`vaddr`, which CRIU ignores in this command. It answers at once with its extensions (`Features`); from then on both
sides use the criu-4.2 layout with these, on this connection only. docs/protocol.md describes the extensions.

Over TLS the two pieces are two records, which a server of CRIU's does not join (docs/criu.md). There the layout is a
guess, unless the user names it (`GUESSED`).
"""

from __future__ import annotations

import enum
import mmap
import struct
from collections import deque
from typing import NamedTuple

from lazypages.errors import LazyPagesError
from lazypages.extras import have
from lazypages.net.compression import CompressionError, decompress

PAGE_SIZE = mmap.PAGESIZE
ADDRESS_SPACE = 1 << 64  # bytes; no range may reach past it
BUFFER_SIZE = 512 << 10  # bytes of a receive buffer


class RemoteProtocolError(LazyPagesError):
    """The peer broke the page server's protocol. The connection is unusable."""


class ClientUsesTlsError(RemoteProtocolError):
    """The first bytes of the client are those of TLS, which this server does not use."""


class Command(enum.IntEnum):
    """The low 16 bits of a header's cmd."""

    ADD = 1  # old: pages follow
    HOLE = 2  # old: pages are in the parent
    OPEN = 3  # old: OPEN2 without an answer
    OPEN2 = 4  # begin an image; answered with one byte: whether it has a parent
    PARENT = 5  # does the parent directory have this image; answered with an int32
    ADD_F = 6  # pages with pagemap flags; they follow if the flags say PRESENT
    GET = 7  # answered with ADD_F and the pages
    CLOSE = 0x1023  # answered with an int32 status
    FORCE_CLOSE = 0x1024
    CHECKPOINT = 0x4C01  # ours: the client identifies its checkpoint; no answer
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


#: An unknown flag may mean another encoding of the pages, so it is refused (images_spec/unknown.md). In all other
#: commands CRIU sends no flags, and they have no meaning.
_KNOWN_FLAGS = {
    Command.ADD_F: PageFlags.PARENT | PageFlags.LAZY | PageFlags.PRESENT,
    Command.GET: PageFlags.ZSTD,
}


class Features(enum.IntFlag):
    """Extensions of our own server and client; requested and granted in the probe."""

    MISSING = 1  # the answer for a page that the server lacks has nr_pages 0; CRIU's server closes instead
    CONNECTIONS = 2  # any number of connections at once
    ZERO = 4  # the answer for pages of zeros has flags ZERO, and no bytes
    # The answer to a GET with flags ZSTD may have flags ZSTD: then a u32 follows, and so many bytes of a zstd frame,
    # fewer than the size of the pages.
    COMPRESSED = 8
    # Both sides identify their checkpoint before any page: the server's identity follows its answer to the probe, and
    # the client's first message is CHECKPOINT with its own. CLOSE reports the outcome (CloseFlags), the server may send
    # COMPLETED. Only between a client that has images and a server that has an identity.
    CHECKPOINT = 0x80


NO_FEATURES = Features(0)
ALL_FEATURES = Features.MISSING | Features.CONNECTIONS | Features.ZERO | Features.COMPRESSED
"""The features that need no configuration: all but CHECKPOINT."""


def own_features() -> Features:
    """Those of ALL_FEATURES that this installation has: compression needs zstandard."""
    return ALL_FEATURES if have("zstandard") else ALL_FEATURES & ~Features.COMPRESSED


class CloseFlags(enum.IntFlag):
    """In the high 16 bits of CLOSE's cmd, after Features.CHECKPOINT was granted. No flag: the outcome is not known."""

    COMPLETE = 1  # every task has all its memory, or has exited by itself
    UNUSED = 2  # no restore has come: no task runs at this destination


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
    """The image that a dst_id names, in all commands but GET. The value is the type byte in use since CRIU 3.3."""

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
    """The kind and the number (pid or shmid) of an image; accepts the type bytes of old releases, too.

    Raises RemoteProtocolError.
    """
    kind = _IMAGE_TYPES.get(dst_id & 0xFF)
    if kind is None:
        raise RemoteProtocolError(f"the peer names an image of unknown type {dst_id & 0xFF}")
    return kind, dst_id >> 8


# The probe. No task can have its pid, and the low 16 bits of PROBE_REST are no command, so that neither an old server
# nor ours mistakes them for a message.
_PROBE_MAGIC = 0x6C617A7970616765  # in vaddr; an impossible nr_pages in the other layout
_PROBE_DST_ID = encode_dst_id(ImageType.TASK, 0x7FFFFFFF)
_PROBE_ANSWER = 0x4C50 << 16  # plus Features


def probe_first(features: Features = ALL_FEATURES) -> bytes:
    """The first piece of a probe that requests `features`."""
    return _STRUCTS[Layout.CRIU_4_1].pack(Command.PARENT, features, _PROBE_MAGIC, _PROBE_DST_ID)


PROBE_FIRST = probe_first()
PROBE_REST = struct.pack("=Q", _PROBE_DST_ID)
PROBE_ANSWER_SIZE = _STATUS.size

#: First bytes of a TLS record with a handshake, and of one with an alert (RFC 8446, 5.1): of a peer that uses TLS where
#: we do not. No command begins like the first, and no answer to the probe like the second.
TLS_HANDSHAKE = b"\x16\x03"
TLS_ALERT = b"\x15\x03"

GUESSED = (
    "a page server's protocol can't be detected over TLS, and {layout.value} was a guess: "
    "name it with --page-server-protocol"
)
"""Added to the error when a server has closed the connection after a guess; for ``str.format``."""


def probe_answer(data: bytes) -> Features | None:
    """The features in the server's answer to the probe (PROBE_ANSWER_SIZE bytes); None for a server of CRIU's.

    Raises RemoteProtocolError.
    """
    if data.startswith(TLS_ALERT):
        raise RemoteProtocolError(
            "the page server uses TLS: connect with --tls (as a source: tls://HOST:PORT)"
        )
    (value,) = _STATUS.unpack(data)
    if value & ~0xFFFF == _PROBE_ANSWER:
        return Features(value & 0xFFFF)
    if value in {0, 1}:
        return None
    raise RemoteProtocolError(
        f"this is not a page server: it answered PARENT with {bytes(data)!r} instead of 0 or 1"
    )


def checkpoint_message(identity: bytes, client: int) -> bytes:
    """The client's first message once Features.CHECKPOINT is granted. `identity`: IDENTITY_SIZE bytes. `client`: a
    number of 64 bits that identifies this destination, the same on all its connections."""
    first, second = struct.unpack("=QQ", identity)
    return Layout.CRIU_4_2.pack(Header(Command.CHECKPOINT, client, first, second))


def completed_message() -> bytes:
    """COMPLETED: sent by a server before it closes, instead of an answer or without a request."""
    return Layout.CRIU_4_2.pack(Header(Command.COMPLETED))


def detect_layout(first: bytes | bytearray | memoryview) -> Layout:
    """The layout that a client uses, from the first 24 bytes that it sends.

    The word at byte 16 is the dst_id in the old layout, the vaddr in the new one. A dst_id has a type in its low byte,
    which is 0 in every page-aligned vaddr. In a GET the dst_id is a plain pid, at most 4194304 (PID_MAX_LIMIT,
    proc_sys_kernel(5)), and the word at byte 8 is the old layout's vaddr or the new one's nr_pages. A vaddr below 4 MiB
    is rare; there the alignment of the word at byte 8 decides.
    """
    command, _, second, third = _STRUCTS[Layout.CRIU_4_1].unpack_from(first)
    if command & 0xFFFF != Command.GET:
        return Layout.CRIU_4_2 if third % PAGE_SIZE == 0 else Layout.CRIU_4_1
    if third > 1 << 22 or second % PAGE_SIZE:
        return Layout.CRIU_4_2
    return Layout.CRIU_4_1


class Eof(NamedTuple):
    """The peer has closed; `complete` is false if a message was incomplete."""

    complete: bool


class _ReceiveBuffer:
    """Bytes received and not yet consumed, in one buffer that is reused."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(bytearray(size))
        self._start = self._end = 0
        self._eof = self._eof_reported = False

    def __len__(self) -> int:
        return self._end - self._start

    def writable(self) -> memoryview:
        """The free part of the buffer. Invalidates the views in all earlier events."""
        length = self._end - self._start
        if self._start:
            self._memory[:length] = self._memory[self._start : self._end]
            self._start, self._end = 0, length
        if length == len(self._memory):
            raise RuntimeError("the buffer is full: call next_event() before receiving more")
        return self._memory[length:]

    def received(self, count: int) -> None:
        """`count` bytes were written to the beginning of writable(); 0: the end of the stream."""
        self._end += count
        self._eof = self._eof or not count

    def receive(self, data: bytes | bytearray | memoryview) -> int:
        """Copy as much of `data` as there is room for. Returns the number of bytes."""
        room = self.writable()
        count = min(len(room), len(data))
        room[:count] = data[:count]
        self._end += count
        return count

    def _end_of_file(self, *, complete: bool) -> Eof | None:
        if self._eof and not self._eof_reported:
            self._eof_reported = True
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
    """A request for pages. `vaddr`: address at dump time. `compress`: the answer may be compressed."""

    pid: int
    vaddr: int
    nr_pages: int
    compress: bool = False


class Pages(NamedTuple):
    """Whole pages of an answer, as they arrive. The view is valid until writable() is called again."""

    pid: int
    vaddr: int
    data: memoryview


class ZeroPages(NamedTuple):
    """Pages of zeros, as reported by the server (only after Features.ZERO was granted)."""

    pid: int
    vaddr: int
    nr_pages: int


class Answered(NamedTuple):
    """The answer to the oldest request is complete. It has the first `nr_pages`; the others must be requested again.

    0: the server lacks the first page; a server of CRIU's closes the connection instead. `frame`: size in bytes of the
    zstd frame of the answer; 0: not compressed.
    """

    request: Get
    nr_pages: int
    frame: int = 0


class Closed(NamedTuple):
    """The server's answer to close(): 0 on success."""

    status: int


class Completed(NamedTuple):
    """Another destination has all of the dump and runs its tasks; the server gives us no more pages."""


class ClientCodec(_ReceiveBuffer):
    """The client's side of a connection to a server that answers GETs, such as `page-server --lazy-pages`.

    Answers come in the order of the requests and are checked against them: an answer without a request, with another
    address or pid, or with more pages than requested raises RemoteProtocolError.
    """

    def __init__(self, layout: Layout, features: Features = NO_FEATURES, *, size: int = BUFFER_SIZE) -> None:
        super().__init__(max(size, 2 * PAGE_SIZE))
        self.layout = layout
        self.features = features
        self._struct = _STRUCTS[layout]
        self._asked: deque[Get] = deque()
        self._answer: Answered | None = None  # being received
        self._next = 0  # address of the next page of the answer
        self._missing = 0  # bytes of the answer that have not arrived
        self._compressed = False  # the answer is compressed: the next two apply instead of _missing
        self._frame_size = 0  # 0: not known yet
        self._frame = bytearray()
        self._closing = self._closed = False

    @property
    def outstanding(self) -> int:
        """Number of requests without a complete answer."""
        return len(self._asked)

    @property
    def answering(self) -> Answered | None:
        """The answer that is being received."""
        return self._answer

    @property
    def at_boundary(self) -> bool:
        """Whether the received bytes end with a complete answer."""
        return not len(self) and not self._missing and not self._compressed

    def get(self, pid: int, vaddr: int, nr_pages: int, *, compress: bool = False) -> bytes:
        """The bytes that request `nr_pages` (> 0) pages from `vaddr` on. `compress` needs Features.COMPRESSED.

        Raises ValueError for an invalid request, RuntimeError after close().
        """
        if self._closing:
            raise RuntimeError("no request can follow close()")
        if not 0 < nr_pages <= self.layout.max_pages or vaddr % PAGE_SIZE:
            raise ValueError(f"{nr_pages} pages at {vaddr:#x} can't be requested")
        if compress and not self.features & Features.COMPRESSED:
            raise ValueError("the server can't compress")
        self._asked.append(Get(pid, vaddr, nr_pages, compress))
        return self._struct.pack(
            Command.GET | (PageFlags.ZSTD << 16 if compress else 0), nr_pages, vaddr, pid
        )

    def close(self, *, force: bool = False, flags: CloseFlags = NO_CLOSE_FLAGS) -> bytes:
        """The bytes that end the session; Closed is the last event, after all answers. `flags` need CHECKPOINT.

        Raises ValueError.
        """
        if flags and not self.features & Features.CHECKPOINT:
            raise ValueError("flags need Features.CHECKPOINT")
        self._closing = True
        command = Command.FORCE_CLOSE if force else Command.CLOSE
        return self._struct.pack(command | flags << 16, 0, 0, 0)

    def next_event(self) -> Pages | ZeroPages | Answered | Closed | Completed | Eof | None:
        """The next event in the bytes received so far; None: receive more. Raises RemoteProtocolError."""
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
            return self._unrequested()
        return self._end_of_file(complete=self.at_boundary)

    def _unrequested(self) -> Completed | None:
        """Handles bytes that arrive while no request is outstanding."""
        size = self._struct.size
        if self.features & Features.CHECKPOINT and len(self) < size and not self._eof:
            return None
        if len(self) >= size and self._says_completed(self._struct.unpack(self._peek(size))[0]):
            self._take(len(self))
            return Completed()
        raise RemoteProtocolError(
            f"the page server sent data without a request: {bytes(self._peek(min(len(self), 32))).hex()}"
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
                f"requested {asked.nr_pages} pages of task {asked.pid} at {asked.vaddr:#x},"
                f" the page server answered command {word:#x}, {nr_pages} pages of {dst_id} at {vaddr:#x}"
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
                    f"the page server sent {nr_pages} pages compressed to {self._frame_size} bytes"
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
    """A client of ours requests extensions; answer with ServerCodec.answer_probe()."""

    features: Features


class Agreement(NamedTuple):
    """A client identifies its checkpoint, in its first message (only after Features.CHECKPOINT was granted).

    `client`: the same number on all connections of one destination.
    """

    client: int
    identity: bytes


class Payload(NamedTuple):
    """Some bytes of the pages that follow a Header, as they arrive; `missing` bytes have not arrived.

    The view is valid until writable() is called again.
    """

    data: memoryview
    missing: int


class ServerCodec(_ReceiveBuffer):
    """The server's side of a connection: the commands that write a dump, and those that read pages.

    Without a `layout`, it is detected from the first message.
    """

    def __init__(self, layout: Layout | None = None, *, size: int = BUFFER_SIZE) -> None:
        super().__init__(max(size, 64))
        self.layout = layout
        self.features = NO_FEATURES
        self._missing = 0  # bytes of pages that have not arrived
        self._after_probe = False
        self._unagreed = False  # the next message must be CHECKPOINT
        self._closed = False

    @property
    def settled(self) -> bool:
        """Whether the next bytes begin a message in `layout`."""
        return self.layout is not None and not (
            self._after_probe or self._unagreed or self._missing or self._closed
        )

    @property
    def midway(self) -> bool:
        """Whether a message is incomplete, or the client has sent CLOSE and not yet closed the connection."""
        return bool(len(self) or self._missing or self._closed)

    def take_rest(self) -> bytes:
        """Takes the bytes of an incomplete message; return them with receive()."""
        return bytes(self._take(len(self)))

    def next_event(self) -> Header | Payload | Probed | Agreement | Eof | None:
        """The next event in the bytes received so far; None: receive more. Raises RemoteProtocolError."""
        if self._missing:
            count = min(len(self), self._missing)
            if count:
                self._missing -= count
                return Payload(self._take(count), self._missing)
        elif self._closed:
            self._take(len(self))  # the tail of a CLOSE whose layout was not known
        elif self._after_probe and len(self) >= len(PROBE_REST):
            self._after_probe = False
            if self._peek(len(PROBE_REST)) == PROBE_REST:  # sent before our answer arrived
                self._take(len(PROBE_REST))
            return self.next_event()
        elif len(self) >= (self.layout.header_size if self.layout else _SHORTEST):
            return self._message()
        return self._end_of_file(complete=not len(self) and not self._missing)

    def _message(self) -> Header | Payload | Probed | Agreement | Eof | None:
        layout = self.layout
        if layout is None:
            first = self._peek(_SHORTEST)
            if first[: len(TLS_HANDSHAKE)] == TLS_HANDSHAKE:
                raise ClientUsesTlsError("the client uses TLS, but this server was started without --tls")
            word, features, vaddr, dst_id = _STRUCTS[Layout.CRIU_4_1].unpack(first)
            if (word, vaddr, dst_id) == (Command.PARENT, _PROBE_MAGIC, _PROBE_DST_ID):
                self._take(_SHORTEST)
                self.layout = Layout.CRIU_4_2
                self._after_probe = True
                return Probed(Features(features & (own_features() | Features.CHECKPOINT)))
            if word & 0xFFFF in {Command.CLOSE, Command.FORCE_CLOSE}:
                layout = Layout.CRIU_4_1  # the other fields are zero in both layouts: take the shorter
            else:
                self.layout = layout = detect_layout(first)
                if len(self) < layout.header_size:
                    return self.next_event()
        word, nr_pages, vaddr, dst_id = _STRUCTS[layout].unpack(self._take(layout.header_size))
        command = _COMMANDS.get(word & 0xFFFF)
        if self._unagreed:
            if command is not Command.CHECKPOINT:
                raise RemoteProtocolError("the client did not identify its checkpoint")
            self._unagreed = False
            return Agreement(nr_pages, struct.pack("=QQ", vaddr, dst_id))
        if command in {None, Command.CHECKPOINT, Command.COMPLETED}:
            raise RemoteProtocolError(f"the client sent the unknown command {word & 0xFFFF:#x}")
        header = Header(command, nr_pages, vaddr, dst_id, word >> 16)
        if unknown := header.flags & ~_KNOWN_FLAGS.get(command, 0xFFFF):
            raise RemoteProtocolError(f"the client's {command.name} has flags {unknown:#x}, {_UNKNOWN}")
        if command in {Command.ADD, Command.ADD_F, Command.HOLE, Command.GET}:
            _check_range(f"the client's {command.name} is of", vaddr, nr_pages)
        self._missing = header.payload
        self._closed = command in {Command.CLOSE, Command.FORCE_CLOSE}
        return header

    def answer_get(self, request: Header, nr_pages: int, *, zero: bool = False) -> bytes:
        """The header before `nr_pages` pages, at most as many as requested; `zero`: no pages follow.

        Raises ValueError.
        """
        if nr_pages > request.nr_pages or (zero and not self.features & Features.ZERO):
            raise ValueError("more than the client has requested")
        assert self.layout is not None
        flags = PageFlags.ZERO if zero else PageFlags.PRESENT
        return self.layout.pack(request._replace(command=Command.ADD_F, nr_pages=nr_pages, flags=flags))

    def answer_compressed(self, request: Header, nr_pages: int, frame: bytes) -> bytes:
        """A whole answer: `frame` (compression.Compressor) contains `nr_pages` pages. Only if may_compress().

        Raises ValueError.
        """
        if nr_pages > request.nr_pages or not self.may_compress(request):
            raise ValueError("not what the client has requested")
        assert self.layout is not None
        header = request._replace(command=Command.ADD_F, nr_pages=nr_pages, flags=PageFlags.ZSTD)
        return self.layout.pack(header) + _FRAME_SIZE.pack(len(frame)) + frame

    def may_compress(self, request: Header) -> bool:
        """Whether the client allows a compressed answer, and Features.COMPRESSED was granted."""
        return bool(self.features & Features.COMPRESSED and request.flags & PageFlags.ZSTD)

    def answer_probe(self, features: Features, identity: bytes = b"") -> bytes:
        """The answer that grants `features`. `identity`: of the checkpoint, with CHECKPOINT. Raises ValueError."""
        if len(identity) != (IDENTITY_SIZE if features & Features.CHECKPOINT else 0):
            raise ValueError("CHECKPOINT needs an identity, and nothing else does")
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
