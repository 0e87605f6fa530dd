"""Answering plain GETs in C with the GIL released (csrc/pageserver/pageserver.h)."""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from lazypages.errors import LazyPagesError
from lazypages.net import patience
from lazypages.net._pageserver import ffi, lib
from lazypages.net.wire import Features, Layout

MAX_ANSWER: Final = 1024  # pages of one answer; the client asks again for the rest
POLL: Final = 50_000  # ns: initial time that a connection polls for the next request before it sleeps


class GetAnswerer:
    """Answers GETs of one client from the images that `served` describes. `images` keeps these alive.

    `pages`: number of pages sent.
    """

    def __init__(self, images: object, served: Any, fd: int) -> None:
        self._images = images
        self._served = served
        self._client = ffi.new("struct lp_client *")
        self._client.fd, self._client.max_pages, self._client.poll_ns = fd, MAX_ANSWER, POLL
        self._client.patience_ns = int(patience.MESSAGE_TIMEOUT * 1e9)

    @property
    def pages(self) -> int:
        count: int = self._client.pages
        return count

    def run(self, layout: Layout, features: Features, received: bytes) -> tuple[bytes, bool]:
        """Answer the requests in `received` and those that follow, up to one that is not a GET of readable pages.

        Returns the bytes from that request on, and whether the client has closed the connection.

        Raises OSError of the connection; SlowPeerError; LazyPagesError if an answer could not be completed.
        """
        client = self._client
        client.header_size, client.features = layout.header_size, features
        client.start, client.end = 0, len(received)
        ffi.memmove(client.requests, received, len(received))
        result = lib.lp_answer_gets(client, self._served)
        if result == -errno.EFAULT:
            raise LazyPagesError(
                "cannot complete an answer: a page in it can't be read; the next ones are shorter"
            )
        if result == -errno.ETIMEDOUT and client.end:
            raise patience.SlowPeerError(patience.MESSAGE_TIMEOUT)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        rest = bytes(ffi.buffer(client.requests)[client.start : client.end])
        return rest, result == lib.LP_CLIENT_EOF
