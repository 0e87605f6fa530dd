"""Translates a connection that the engine can't read itself (TLS, compressed answers) to the canonical stream.

The canonical stream has the 32-byte header and is uncompressed. A relay decrypts, decompresses and writes canonical
headers. Both the codec here and the engine check each answer against its request.

The kernel could decrypt instead (kTLS), without a copy through Python. Python's ssl supports that from 3.12 on
(``OP_ENABLE_KTLS``), if its OpenSSL was built for it and the kernel has the module ``tls``; we support 3.11.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from typing import Final

from lazypages.errors import LazyPagesError
from lazypages.net import wire
from lazypages.net.link import Link, LinkError
from lazypages.net.translator import Translator
from lazypages.net.trial import Trial
from lazypages.net.wire import (
    PAGE_SIZE,
    ClientCodec,
    CloseFlags,
    Command,
    Header,
    Layout,
    PageFlags,
    ServerCodec,
)

COMPRESSED_MIN_PAGES: Final = 16  # of a background request whose answer may be compressed
RECORD: Final = 16 << 10  # bytes of a full TLS record, the most that one receive returns (RFC 8446, 5.1)
AT_ONCE: Final = 128 << 10  # bytes that are received before they are forwarded
REQUESTS: Final = 64 << 10  # bytes of the buffer for requests


class Direct:
    """A plain connection: the engine uses it without translation."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.failure: LazyPagesError | None = None
        self.at_boundary = True
        self.compressed_pages = self.compressed_bytes = 0

    def fileno(self) -> int:
        return self._link.fileno()

    async def aclose(self) -> None:
        self._link.close()


class Relay(Translator):
    """A translator between `link` and the engine.

    ``codec``: for the server's protocol, without outstanding requests. ``trial``: measures whether compression pays.

    The relay owns `link` unless it raises OSError: it can't start, and may be made again.
    """

    def __init__(self, link: Link, codec: ClientCodec, trial: Trial) -> None:
        self._link = link
        self.codec = codec
        self._requests = ServerCodec(Layout.CRIU_4_2, size=REQUESTS)
        self._trial = trial
        self._background: deque[bool] = (
            deque()
        )  # per outstanding request: whether the answer may be compressed
        self._unsent = bytearray()
        super().__init__("relay")

    def pump(self) -> None:
        """Raises LinkError, RemoteProtocolError, OSError."""
        try:
            self._translate()
        finally:
            self.at_boundary = self.codec.at_boundary
            self._link.close()

    def _translate(self) -> None:
        """Forwards in both directions until either side ends. Raises LinkError, RemoteProtocolError, OSError."""
        inner, outer = self.inner.fileno(), self._link.fileno()
        poll = select.poll()
        poll.register(inner, select.POLLIN)
        poll.register(outer, select.POLLIN)
        sending = False
        # Send whole headers in each record: CRIU's servers do not join a message from two records (docs/criu.md).
        most = RECORD // self.codec.layout.header_size * self.codec.layout.header_size
        while True:
            waits = bool(self._unsent)
            if waits is not sending:
                poll.modify(outer, select.POLLIN | (select.POLLOUT if waits else 0))
                sending = waits
            ready = dict(poll.poll(0 if self._link.pending else None))
            if inner in ready and not self._take_requests():
                return
            # Receive first: a failure to send must not lose answers that have already come.
            if (outer in ready or self._link.pending) and not self._take_answers():
                return
            if self._unsent:
                try:
                    del self._unsent[: self._link.send(self._unsent[:most])]
                except LinkError:
                    if self._take_last_answers():
                        raise
                    return

    def _take_last_answers(self) -> bool:
        """After a failure to send: takes the answers that have come. False at the end of the stream.

        Raises LinkError, RemoteProtocolError, OSError.
        """
        poll = select.poll()
        poll.register(self._link.fileno(), select.POLLIN)
        while self._link.pending or poll.poll(0):
            if not self._take_answers():
                return False
        return True

    def _take_requests(self) -> bool:
        """Translates the engine's requests; False if it has closed its end."""
        try:
            data = self.inner.recv(REQUESTS // 2, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        if not data:
            return False
        self._requests.receive(data)
        while isinstance(header := self._requests.next_event(), Header):
            self._unsent += self._translated(header)
        return True

    def _translated(self, header: Header) -> bytes:
        if header.command is not Command.GET:  # the last one: the codec returns nothing after it
            force = header.command is Command.FORCE_CLOSE
            return self.codec.close(force=force, flags=CloseFlags(header.flags))
        background = bool(header.flags & PageFlags.ZSTD) and header.nr_pages >= COMPRESSED_MIN_PAGES
        self._background.append(background)
        compress = background and self._trial.compress
        return self.codec.get(header.dst_id, header.vaddr, header.nr_pages, compress=compress)

    def _take_answers(self) -> bool:
        """Translates the server's answers; False at the end of the stream.

        Raises LinkError, after the translation of what came before; RemoteProtocolError, OSError.
        """
        got, failure = 0, None
        while got < AT_ONCE:
            try:
                count = self._link.recv_into(self.codec.writable())
            except LinkError as error:
                failure = error
                break
            if count is None:
                break
            self.codec.received(count)
            got += count
            if count < RECORD:
                break
        parts: list[bytes | memoryview] = []
        try:
            while (event := self.codec.next_event()) is not None:
                match event:
                    case wire.Pages(pid, vaddr, data):
                        if (answer := self.codec.answering) and answer.request.vaddr == vaddr:
                            parts.append(_header(pid, vaddr, answer.nr_pages, PageFlags.PRESENT))
                        parts.append(data)
                    case wire.ZeroPages(pid, vaddr, nr_pages):
                        parts.append(_header(pid, vaddr, nr_pages, PageFlags.ZERO))
                    case wire.Answered(asked, nr_pages, frame):
                        if not nr_pages:
                            parts.append(_header(asked.pid, asked.vaddr, 0, PageFlags(0)))
                        self._answered(asked, nr_pages, frame)
                    case wire.Closed(status):
                        parts.append(wire.answer_close(status))
                    case wire.Completed():
                        parts.append(wire.completed_message())
                        return False
                    case wire.Eof():
                        return False
            if failure is not None:
                raise failure
            return True
        finally:
            self.forward(parts)

    def _answered(self, asked: wire.Get, nr_pages: int, frame: int) -> None:
        if self._background.popleft():
            idle = not self.codec.outstanding
            self._trial.answered(time.monotonic(), nr_pages * PAGE_SIZE, compress=asked.compress, idle=idle)
        if frame:
            self.compressed_pages += nr_pages
            self.compressed_bytes += frame


def _header(pid: int, vaddr: int, nr_pages: int, flags: PageFlags) -> bytes:
    return Layout.CRIU_4_2.pack(Header(Command.ADD_F, nr_pages, vaddr, pid, flags))
