"""Interface of a source of remote pages: it can be connected to, and then answers GETs on a canonical stream.

The canonical stream is CRIU's protocol with the 32-byte header, uncompressed (lazypages/net/wire.py,
docs/protocol.md). A source that speaks another protocol translates: ``lazypages/net/relay.py`` does so for TLS and
compression. A new kind of source is one file with a class that has ``connect``: it gives the engine one end of a
socket pair and answers at the other. The loop and the engine need no change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lazypages.errors import LazyPagesError
from lazypages.net.wire import NO_FEATURES, Features, Layout


class Carrier(Protocol):
    """The transport of a canonical stream: a plain socket, or a socket pair with a translator behind it."""

    #: Why the stream ended, if the engine's errno does not show it.
    failure: LazyPagesError | None
    #: Whether the translator's input ended between two answers; always True without a translator.
    at_boundary: bool
    #: Pages that crossed the network compressed, and their size there in bytes.
    compressed_pages: int
    compressed_bytes: int

    def fileno(self) -> int:
        """The file descriptor of the engine's end."""

    async def aclose(self) -> None:
        """Closes the connection, and waits for the end of the translator's thread."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A source that is ready for requests.

    ``layout``: of the header. CRIU_4_2, except on a plain connection to a server of CRIU up to 4.1.1: the one exception
    from the canonical stream (docs/architecture.md). ``features``: the server's extensions of CRIU's protocol; none
    for a server of CRIU's. ``answered``: whether the peer has sent anything, and so is known to be a page server.
    ``compresses``: whether pages of the background may cross the network compressed.
    """

    carrier: Carrier
    layout: Layout = Layout.CRIU_4_2
    features: Features = NO_FEATURES
    answered: bool = False
    compresses: bool = False


class Source(Protocol):
    """One of several places with the same pages."""

    #: Its name in messages, and what it is there.
    name: str
    kind: str
    #: Whether it accepts a single connection in its life.
    once: bool

    async def connect(self, *, spare: bool, urgent_only: bool, reached: Callable[[], None]) -> Connected:
        """``spare``: another connection to this source exists and may recover. The new one must have an answer before
        it replaces the other. ``urgent_only``: the connection is for faults only. ``reached``: called when the peer has
        accepted, before it has sent anything.

        Raises LinkError, TlsError, RemoteProtocolError.
        """
