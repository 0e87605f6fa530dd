"""The server's side of one connection of `--lazy-pages`.

Each connection has a thread, so that a reader that waits for the disk does not delay the others. C code sends the pages
of images to a plain socket (`csrc/pageserver/pageserver.c`). This module handles everything else: the first
message, TLS, missing pages, CLOSE, and invalid messages.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol

from images_spec.errors import ImageError
from lazypages.errors import LazyPagesError, UnreadableError
from lazypages.net import wire
from lazypages.net._pageserver import lib
from lazypages.net.answerer import MAX_ANSWER, GetAnswerer
from lazypages.net.compression import Compressor
from lazypages.net.patience import PatientReader, SlowPeerError
from lazypages.net.refused import why_left
from lazypages.net.tls import TlsFiles
from lazypages.net.tls_errors import NO_TLS_ALERT, explain
from lazypages.net.wire import PAGE_SIZE, Command, Features, Header, RemoteProtocolError, ServerCodec

log = logging.getLogger("lazypages")

BUFFER_SIZE: Final = lib.LP_REQUESTS_SIZE  # bytes of requests that are received at once, at most


class Piece(Protocol):
    """A part of an answer: `size` bytes of pages."""

    @property
    def size(self) -> int: ...

    def read(self) -> bytes | bytearray:
        """The bytes before the first page that can't be read. Raises UnreadableError if there are none."""


class Pages(Protocol):
    """The pages that are served: of images, or of the memory of tasks."""

    def find(self, pid: int, address: int, nr_pages: int) -> Sequence[Piece]:
        """Pieces with the first pages of the range, at most all of them; none if the first page is not stored here.

        Raises UnreadableError if the first page is stored here but can't be read. Any other LazyPagesError or
        ImageError closes the connection.
        """


class Gate:
    """The identity of the served checkpoint, and callbacks of one connection about it (docs/protocol.md).

    `identity`: wire.IDENTITY_SIZE bytes; None: unknown. Without it our own clients take no page.
    """

    def __init__(self, identity: bytes | None) -> None:
        self.identity = identity

    def opened(self) -> None:
        """The identity is about to be sent to a client."""

    def agreed(self, client: int) -> None:
        """The client restores this checkpoint. `client`: as in wire.Agreement."""

    def refused(self) -> None:
        """The client restores another checkpoint."""

    def closing(self, client: int | None, flags: wire.CloseFlags) -> int:
        """A client sent CLOSE; returns the status to answer. `client`: None if it has not agreed."""
        del client, flags
        return 0


class PageConnection:
    """The connection of one client.

    `pages`: number of pages sent. `closed`: the client sent CLOSE. `spoke`: it sent a complete message. `ours`: it is a
    client of lazypages, which reconnects when a connection is lost. `client`: its number, once it has agreed on the
    checkpoint.

    `answerer`: answers plain GETs on `sock` in C; None: all are answered here. `tls`: our certificate, if `sock` uses
    TLS.
    """

    def __init__(
        self,
        sock: socket.socket,
        images: Pages,
        name: str,
        answerer: GetAnswerer | None = None,
        gate: Gate | None = None,
        *,
        tls: TlsFiles | None = None,
    ) -> None:
        self._tls = tls
        self._sock = sock
        self._reader = PatientReader(sock)
        self._images = images
        self._name = name
        self._answerer = answerer
        self._codec = ServerCodec(size=BUFFER_SIZE)
        self._compressor: Compressor | None = None
        self._pages = 0
        self._logged_lost: set[tuple[int, int]] = set()
        self._gate = gate or Gate(None)
        self.client: int | None = None
        self.closed = self.spoke = self.ours = False

    @property
    def pages(self) -> int:
        return self._pages + (self._answerer.pages if self._answerer else 0)

    def run(self) -> bool:
        """Serve until the client closes the connection or breaks the protocol. Returns whether it ended in order."""
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
                            if self._tls and not self.spoke:
                                log.warning("%s: %s", self._name, why_left(self._tls))
                            elif not complete:
                                log.warning("%s: closed in the middle of a request", self._name)
                            return complete
        except SlowPeerError as error:
            log.warning("%s: %s", self._name, error)
            return self.closed
        except (LazyPagesError, ImageError) as error:
            log.error("%s: %s; closing", self._name, error)
            if isinstance(error, wire.ClientUsesTlsError):
                with suppress(OSError):
                    self._sock.sendall(NO_TLS_ALERT)
        except OSError as error:
            log.warning("%s: %s", self._name, explain(error, "client"))
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
                "%s: refused: requests pages of another checkpoint (%s)",
                self._name,
                identity.hex(),
            )
            return False
        self._gate.agreed(client)
        self.client = client
        return True

    def _receive(self) -> None:
        """Receive more bytes into the codec; the answerer may answer requests first."""
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
            f"sent {header.command.name}, but this server sends pages (--lazy-pages) and receives none"
        )

    def _get(self, request: Header) -> bool:
        data = self._read(request)
        pages = len(data) // PAGE_SIZE
        self._pages += pages
        granted = self._codec.features
        if not pages:
            if not granted & Features.MISSING:
                return False  # close the connection, as CRIU's server does
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
        """The first pages of the range, before one that is not stored here or can't be read."""
        data: list[bytes | bytearray] = []
        try:
            for piece in self._images.find(request.dst_id, request.vaddr, min(request.nr_pages, MAX_ANSWER)):
                data.append(piece.read())
                if len(data[-1]) < piece.size:
                    break
        except UnreadableError as error:
            if not data:
                self._log_lost(logging.ERROR, request, f"which can't be read and is lost: {error}")
        else:
            if not data:
                self._log_lost(logging.WARNING, request, "which is not in the images")
        return b"".join(data)

    def _log_lost(self, level: int, request: Header, why: str) -> None:
        """Log each page once, since the client asks for it repeatedly."""
        page = request.dst_id, request.vaddr
        if page not in self._logged_lost:
            self._logged_lost.add(page)
            log.log(level, "%s: requests page %#x of task %d, %s", self._name, page[1], page[0], why)

    def _compressed(self, data: bytes) -> bytes | None:
        """The compressed pages; None if that does not make them shorter."""
        if self._compressor is None:
            self._compressor = Compressor()
        return self._compressor.compress(data)

    def _send(self, header: bytes, data: bytes) -> None:
        if isinstance(self._sock, ssl.SSLSocket):
            # Header and pages in separate TLS records: CRIU's client polls the socket between the two, and does not see
            # bytes that GnuTLS has already read from it (observed with 4.1.1).
            self._sock.sendall(header)
            self._sock.sendall(data)
            return
        sent = self._sock.sendmsg([header, data])
        for part in (header[sent:], memoryview(data)[max(0, sent - len(header)) :]):
            # An empty send fails with EPIPE if the client has closed (docs/kernel.md, "Page servers").
            if len(part):
                self._sock.sendall(part)
