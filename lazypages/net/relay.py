"""Carries a connection that the engine can't use as it is: TLS, and compressed answers.

The engine speaks one canonical stream: the 32-byte header, uncompressed. A relay has the connection at one side and a
socket pair at the other, and a thread in between that decrypts, decompresses and writes canonical headers. The thread
never waits for the event loop. Each answer is checked against its request twice: here by the codec, and by the engine.

The kernel could decrypt instead (kTLS), and nothing would have to be copied through Python. Python's ssl can ask for
that from 3.12 on (``OP_ENABLE_KTLS``), if its OpenSSL was built for it and the kernel has the module ``tls``; we
support 3.11.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Final

from anyio import CapacityLimiter, to_thread

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

COMPRESSED_MIN_PAGES: Final = 16  # of a background request that is worth compressing
RECORD: Final = 16 << 10  # bytes of a full TLS record, the most that one receive gives (RFC 8446, 5.1)
AT_ONCE: Final = 128 << 10  # bytes that are received before they are passed on
REQUESTS: Final = 64 << 10  # bytes of requests that are read at once


class Direct:
    """A plain connection: the engine uses it as it is."""

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
    """Between `link` and the engine.

    ``codec``: what the server speaks; no request may be on its way yet. ``trial``: whether compression pays.
    """

    def __init__(self, link: Link, codec: ClientCodec, trial: Trial) -> None:
        self._link = link
        self.codec = codec
        self._requests = ServerCodec(Layout.CRIU_4_2, size=REQUESTS)
        self._trial = trial
        self._background: deque[bool] = deque()  # of each request on its way: whether it may be compressed
        self._unsent = bytearray()
        self._closing = False
        self._inner, self._engine_end = socket.socketpair()
        self.failure: LazyPagesError | None = None
        self.at_boundary = True
        self.compressed_pages = self.compressed_bytes = 0
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._engine_end.fileno()

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    async def aclose(self) -> None:
        with suppress(OSError):
            self._engine_end.shutdown(socket.SHUT_RDWR)
        await to_thread.run_sync(self._thread.join, limiter=CapacityLimiter(1))
        self._engine_end.close()

    def _run(self) -> None:
        try:
            self._pump()
        except LazyPagesError as error:
            self.failure = error
        except OSError as error:  # of the engine's side, which is gone then
            self.failure = LinkError(error.strerror or str(error))
        finally:
            self.at_boundary = self.codec.at_boundary
            self._inner.close()  # the engine looks at the rest when it sees this
            self._link.close()

    def _pump(self) -> None:
        """Until either side is at its end. Raises LinkError, RemoteProtocolError, OSError."""
        inner, outer = self._inner.fileno(), self._link.fileno()
        poll = select.poll()
        poll.register(inner, select.POLLIN)
        poll.register(outer, select.POLLIN)
        sending = False
        # CRIU's servers do not put together what comes in two records (docs/criu.md).
        together = RECORD // self.codec.layout.header_size * self.codec.layout.header_size
        while True:
            waits = bool(self._unsent)
            if waits is not sending:
                poll.modify(outer, select.POLLIN | (select.POLLOUT if waits else 0))
                sending = waits
            ready = dict(poll.poll(0 if self._link.pending else None))
            if inner in ready and not self._take_requests():
                return
            if self._unsent:
                del self._unsent[: self._link.send(self._unsent[:together])]
            if (outer in ready or self._link.pending) and not self._take_answers():
                return

    def _take_requests(self) -> bool:
        """What the engine asks for; False when it has hung up."""
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
        if self._closing:
            return b""  # the rest of a short answer, which the engine asks for by itself; no server answers it any more
        if header.command is not Command.GET:
            self._closing, force = True, header.command is Command.FORCE_CLOSE
            return self.codec.close(force=force, flags=CloseFlags(header.flags))
        background = bool(header.flags & PageFlags.ZSTD) and header.nr_pages >= COMPRESSED_MIN_PAGES
        self._background.append(background)
        compress = background and self._trial.compress
        return self.codec.get(header.dst_id, header.vaddr, header.nr_pages, compress=compress)

    def _take_answers(self) -> bool:
        """What the server says; False at its end."""
        got = 0
        while got < AT_ONCE:
            count = self._link.recv_into(self.codec.writable())
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
            return True
        finally:
            self._pass_on(parts)

    def _answered(self, asked: wire.Get, nr_pages: int, frame: int) -> None:
        if self._background.popleft():
            idle = not self.codec.outstanding
            self._trial.answered(time.monotonic(), nr_pages * PAGE_SIZE, compress=asked.compress, idle=idle)
        if frame:
            self.compressed_pages += nr_pages
            self.compressed_bytes += frame

    def _pass_on(self, parts: list[bytes | memoryview]) -> None:
        """Waits while the engine takes nothing: then no answer to a later request could reach it either."""
        for first in range(0, len(parts), 512):  # as many as the kernel takes at once are 1024 (UIO_MAXIOV)
            some = parts[first : first + 512]
            sent = self._inner.sendmsg(some)
            if sent < sum(map(len, some)):
                self._inner.sendall(b"".join(some)[sent:])


def _header(pid: int, vaddr: int, nr_pages: int, flags: PageFlags) -> bytes:
    return Layout.CRIU_4_2.pack(Header(Command.ADD_F, nr_pages, vaddr, pid, flags))
