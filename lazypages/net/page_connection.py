"""`--lazy-pages`: answers the GETs of any number of clients, each in a thread of its own, for as long as it runs.

Threads, because a page that is not in the page cache keeps its reader waiting for the disk; the others go on. The
pages of images go from the file to a plain socket without Python (`csrc/pageserver/pageserver.c`). What is here is for
all else: the first message, TLS, pages that are missing, CLOSE, garbage.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Sequence
from typing import Final, Protocol

from images_spec.errors import ImageError
from lazypages.errors import LazyPagesError, UnreadableError
from lazypages.net import wire
from lazypages.net._pageserver import lib
from lazypages.net.answerer import MAX_ANSWER, GetAnswerer
from lazypages.net.compression import Compressor
from lazypages.net.patience import PatientReader, SlowPeerError
from lazypages.net.wire import PAGE_SIZE, Command, Features, Header, RemoteProtocolError, ServerCodec

log = logging.getLogger("lazypages")

BUFFER_SIZE: Final = lib.LP_REQUESTS_SIZE  # bytes of requests that are received at once


class Piece(Protocol):
    """`size` bytes of pages that go into an answer."""

    @property
    def size(self) -> int: ...

    def read(self) -> bytes | bytearray:
        """The bytes, up to the first page that can't be read. Raises UnreadableError if that is the first of all."""


class Pages(Protocol):
    """What is served: images, or the memory of tasks."""

    def find(self, pid: int, address: int, nr_pages: int) -> Sequence[Piece]:
        """The first pages of the range, up to all of them; nothing if the first one is not here.

        Raises UnreadableError when the first one is but can't be read; any other LazyPagesError or ImageError closes
        the connection.
        """


class Gate:
    """Which checkpoint is served, and what comes of that: for one connection.

    `identity`: of wire.IDENTITY_SIZE bytes. None: it is not known, and no client is told; those of ours then take no
    page.
    """

    def __init__(self, identity: bytes | None) -> None:
        self.identity = identity

    def opened(self) -> None:
        """A client that means this or another checkpoint is about to be told which one is here."""

    def agreed(self, client: int) -> None:
        """It means this one. `client`: as in wire.Agreement."""

    def refused(self) -> None:
        """It means another one."""

    def closing(self, client: int | None, flags: wire.CloseFlags) -> int:
        """A client says that it needs no more: the status for it. `client`: None for one that has not agreed."""
        del client, flags
        return 0


class PageConnection:
    """One client. `pages`: how many it was given; `closed`: it has said that it needs no more; `spoke`: it has sent
    a whole message; `ours`: it speaks more than CRIU's protocol, and comes back when a connection is lost;
    `client`: the number of one that has agreed on the checkpoint.

    `answerer`, if there is one for `sock`, takes most requests off our hands.
    """

    def __init__(
        self,
        sock: socket.socket,
        images: Pages,
        name: str,
        answerer: GetAnswerer | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._sock = sock
        self._reader = PatientReader(sock)
        self._images = images
        self._name = name
        self._answerer = answerer
        self._codec = ServerCodec(size=BUFFER_SIZE)
        self._compressor: Compressor | None = None
        self._pages = 0
        self._told_lost: set[tuple[int, int]] = set()
        self._gate = gate or Gate(None)
        self.client: int | None = None
        self.closed = self.spoke = self.ours = False

    @property
    def pages(self) -> int:
        return self._pages + (self._answerer.pages if self._answerer else 0)

    def run(self) -> bool:
        """Until the client has closed, or breaks the protocol. Whether it ended as it should."""
        try:
            while True:
                self._receive()
                while (event := self._codec.next_event()) is not None:
                    self._reader.message()
                    self.spoke = self.spoke or not isinstance(event, wire.Eof)
                    match event:
                        case Header(command=Command.GET):
                            if not self._get(event):
                                return False
                        case Header():
                            self._sock.sendall(self._answer(event))
                        case wire.Probed(features):
                            self.ours = True
                            self._probed(features)
                        case wire.Agreement(client, identity):
                            if not self._agree(client, identity):
                                return False
                        case wire.Eof(complete):
                            if not complete:
                                log.warning("%s: closed in the middle of a request", self._name)
                            return complete
        except SlowPeerError as error:
            log.warning("%s: %s", self._name, error)
            return self.closed
        except (LazyPagesError, ImageError) as error:
            log.error("%s: %s; closing", self._name, error)
        except OSError as error:
            log.warning("%s: %s", self._name, error.strerror or error)
        return False

    def _probed(self, features: Features) -> None:
        identity = self._gate.identity if features & Features.CHECKPOINT else None
        if identity is not None:
            self._gate.opened()
            self._sock.sendall(self._codec.answer_probe(features, identity))
        else:
            self._sock.sendall(self._codec.answer_probe(features & wire.ALL_FEATURES))

    def _agree(self, client: int, identity: bytes) -> bool:
        if identity != self._gate.identity:
            self._gate.refused()
            log.error(
                "%s: wants pages of another checkpoint (%s), not of the one that is here: refused",
                self._name,
                identity.hex(),
            )
            return False
        self._gate.agreed(client)
        self.client = client
        return True

    def _receive(self) -> None:
        """More bytes, that the codec has to deal with."""
        codec, answerer = self._codec, self._answerer
        if answerer is None or codec.layout is None or not codec.settled:
            self._reader.receive(codec)
            return
        rest, closed = answerer.run(codec.layout, codec.features, codec.take_rest())
        codec.receive(rest)
        if closed:
            codec.received(0)

    def _answer(self, header: Header) -> bytes:
        match header.command:
            case Command.CLOSE | Command.FORCE_CLOSE:
                self.closed = True
                agreed = self._codec.features & Features.CHECKPOINT
                flags = wire.CloseFlags(header.flags & wire.ALL_CLOSE_FLAGS if agreed else 0)
                return wire.answer_close(self._gate.closing(self.client, flags))
            case Command.PARENT:
                return wire.answer_parent(has_parent=False)
        raise RemoteProtocolError(
            f"sends {header.command.name}, but this server gives pages (--lazy-pages) and takes none"
        )

    def _get(self, request: Header) -> bool:
        data = self._read(request)
        pages = len(data) // PAGE_SIZE
        self._pages += pages
        granted = self._codec.features
        if not pages:
            if not granted & Features.MISSING:
                return False  # as CRIU's server does
            self._sock.sendall(self._codec.answer_get(request, 0))
            return True
        if granted & Features.ZERO and not data[0] and data.count(0) == len(data):
            self._sock.sendall(self._codec.answer_get(request, pages, zero=True))
        elif self._codec.may_compress(request) and (frame := self._compressed(data)):
            self._sock.sendall(self._codec.answer_compressed(request, pages, frame))
        else:
            self._send(self._codec.answer_get(request, pages), data)
        return True

    def _read(self, request: Header) -> bytes:
        """The first pages of the range, up to one that is not here or can't be read."""
        data: list[bytes | bytearray] = []
        try:
            for piece in self._images.find(request.dst_id, request.vaddr, min(request.nr_pages, MAX_ANSWER)):
                data.append(piece.read())
                if len(data[-1]) < piece.size:
                    break
        except UnreadableError as error:
            if not data:
                self._tell_lost(logging.ERROR, request, f"which can't be read, and is lost: {error}")
        else:
            if not data:
                self._tell_lost(logging.WARNING, request, "which is not here")
        return b"".join(data)

    def _tell_lost(self, level: int, request: Header, why: str) -> None:
        """Once for each page: its client asks for it again."""
        page = request.dst_id, request.vaddr
        if page not in self._told_lost:
            self._told_lost.add(page)
            log.log(level, "%s: asks for page %#x of task %d, %s", self._name, page[1], page[0], why)

    def _compressed(self, data: bytes) -> bytes | None:
        """None when that does not pay."""
        if self._compressor is None:
            self._compressor = Compressor()
        return self._compressor.compress(data)

    def _send(self, header: bytes, data: bytes) -> None:
        if isinstance(self._sock, ssl.SSLSocket):
            # Header and pages in records of their own: CRIU's client waits for the socket between the two, and would
            # not see what GnuTLS has taken from it already (observed with 4.1.1).
            self._sock.sendall(header)
            self._sock.sendall(data)
            return
        sent = self._sock.sendmsg([header, data])
        for part in (header[sent:], memoryview(data)[max(0, sent - len(header)) :]):
            if len(part):  # sending nothing fails too, where the client has all and has hung up
                self._sock.sendall(part)
