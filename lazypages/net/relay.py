"""Translates a connection that the engine can't read itself (TLS, compressed answers) to the canonical stream.

The canonical stream has the 32-byte header and is uncompressed. A relay is a thread between the connection and a socket
pair: it decrypts, decompresses and writes canonical headers. It never waits for the event loop. Both the codec here and
the engine check each answer against its request.

The kernel could decrypt instead (kTLS), without a copy through Python. Python's ssl supports that from 3.12 on
(``OP_ENABLE_KTLS``), if its OpenSSL was built for it and the kernel has the module ``tls``; we support 3.11.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Final

import anyio

from lazypages.errors import LazyPagesError
from lazypages.net import wire
from lazypages.net.link import Link, LinkError
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

log = logging.getLogger("lazypages")

COMPRESSED_MIN_PAGES: Final = 16  # of a background request whose answer may be compressed
RECORD: Final = 16 << 10  # bytes of a full TLS record, the most that one receive returns (RFC 8446, 5.1)
AT_ONCE: Final = 128 << 10  # bytes that are received before they are forwarded
REQUESTS: Final = 64 << 10  # bytes of the buffer for requests
JOIN_PAUSE: Final = 0.002  # s between two looks whether the thread has ended


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


class Relay:
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
        self.failure: LazyPagesError | None = None
        self.at_boundary = True
        self.compressed_pages = self.compressed_bytes = 0
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._inner, self._engine_end = socket.socketpair()
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:  # threading's for EAGAIN of pthread_create
            self._inner.close()
            self._engine_end.close()
            raise OSError(errno.EAGAIN, str(error)) from None

    def fileno(self) -> int:
        return self._engine_end.fileno()

    @property
    def alive(self) -> bool:
        """Whether the relay's thread is running."""
        return self._thread.is_alive()

    async def aclose(self) -> None:
        with suppress(OSError):
            self._engine_end.shutdown(socket.SHUT_RDWR)
        while (
            self.alive
        ):  # it ends at once; a thread that waits for it could not be started for lack of memory
            await anyio.sleep(JOIN_PAUSE)
        self._engine_end.close()

    def _run(self) -> None:
        try:
            self._pump()
        except LazyPagesError as error:
            self.failure = error
        except OSError as error:  # the engine has closed its end
            self.failure = LinkError(error.strerror or str(error))
        except Exception as error:
            log.exception("a translator failed")
            self.failure = LinkError(f"internal error: {error!r}")
        finally:
            self.at_boundary = self.codec.at_boundary
            self._inner.close()  # the event loop reads `failure` and `at_boundary` at the end of the stream
            self._link.close()

    def _pump(self) -> None:
        """Forwards in both directions until either side ends. Raises LinkError, RemoteProtocolError, OSError."""
        inner, outer = self._inner.fileno(), self._link.fileno()
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
            data = self._inner.recv(REQUESTS // 2, socket.MSG_DONTWAIT)
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
            self._forward(parts)

    def _answered(self, asked: wire.Get, nr_pages: int, frame: int) -> None:
        if self._background.popleft():
            idle = not self.codec.outstanding
            self._trial.answered(time.monotonic(), nr_pages * PAGE_SIZE, compress=asked.compress, idle=idle)
        if frame:
            self.compressed_pages += nr_pages
            self.compressed_bytes += frame

    def _forward(self, parts: list[bytes | memoryview]) -> None:
        """Sends to the engine. May block: answers are in order, so a later one can't overtake."""
        for first in range(0, len(parts), 512):  # the kernel accepts up to 1024 (UIO_MAXIOV)
            some = parts[first : first + 512]
            sent = self._inner.sendmsg(some)
            if sent < sum(map(len, some)):
                self._inner.sendall(b"".join(some)[sent:])


def _header(pid: int, vaddr: int, nr_pages: int, flags: PageFlags) -> bytes:
    return Layout.CRIU_4_2.pack(Header(Command.ADD_F, nr_pages, vaddr, pid, flags))
