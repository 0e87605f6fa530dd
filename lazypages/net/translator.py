"""A thread that speaks the canonical stream to the engine, on a socket pair, for pages that come in another form.

It never waits for the event loop, which only reads how it has ended.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import anyio

from lazypages.errors import LazyPagesError
from lazypages.net.link import LinkError

log = logging.getLogger("lazypages")

JOIN_PAUSE: Final = 0.002  # s between two looks whether the thread has ended
BUFFERS: Final = 512  # in one call: the kernel accepts up to 1024 (UIO_MAXIOV)


class Translator(ABC):
    """See ``Carrier`` in sources/base.py. ``inner``: this end of the socket pair.

    The thread runs ``pump`` at once, so whatever that needs must be there before. Raises OSError: it can't start, and
    may be made again.
    """

    def __init__(self, name: str) -> None:
        self.failure: LazyPagesError | None = None
        self.at_boundary = True
        self.compressed_pages = self.compressed_bytes = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.inner, self._engine_end = socket.socketpair()
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:  # threading's for EAGAIN of pthread_create
            self.inner.close()
            self._engine_end.close()
            raise OSError(errno.EAGAIN, str(error)) from None

    @abstractmethod
    def pump(self) -> None:
        """Translates until either side ends, and releases what it has used. Raises LazyPagesError, OSError."""

    def fileno(self) -> int:
        return self._engine_end.fileno()

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    async def aclose(self) -> None:
        with suppress(OSError):
            self._engine_end.shutdown(socket.SHUT_RDWR)
        while (
            self.alive
        ):  # it ends at once; a thread that waits for it could not be started for lack of memory
            await anyio.sleep(JOIN_PAUSE)
        self._engine_end.close()

    def forward(self, parts: Sequence[bytes | memoryview]) -> None:
        """Sends to the engine. May block: answers are in order, so a later one can't overtake."""
        for first in range(0, len(parts), BUFFERS):
            some = parts[first : first + BUFFERS]
            sent = self.inner.sendmsg(some)
            if sent < sum(map(len, some)):
                self.inner.sendall(b"".join(some)[sent:])

    def _run(self) -> None:
        try:
            self.pump()
        except LazyPagesError as error:
            self.failure = error
        except OSError as error:  # the engine has closed its end
            self.failure = LinkError(error.strerror or str(error))
        except Exception as error:
            log.exception("a translator failed")
            self.failure = LinkError(f"internal error: {error!r}")
        finally:
            self.inner.close()  # the event loop reads `failure` and `at_boundary` at the end of the stream
