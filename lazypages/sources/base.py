"""What a source of remote pages is: something that can be connected to and then answers GETs on a canonical stream.

The canonical stream is CRIU's protocol with the 32-byte header, uncompressed (lazypages/net/wire.py,
docs/protocol.md). A source that speaks something else translates: ``lazypages/net/relay.py`` does so for TLS and
compression. A new kind of source is one file with a class that has ``connect``; it gives the engine one end of a
socket pair and answers at the other. Neither the loop nor the engine learns of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lazypages.errors import LazyPagesError
from lazypages.net.wire import NO_FEATURES, Features, Layout


class Carrier(Protocol):
    """What carries a canonical stream: a plain socket, or a socket pair with a translator behind it."""

    #: Why the stream ended, where its end alone does not say that.
    failure: LazyPagesError | None
    #: Whether the stream ended between two answers, as far as the engine can't see that.
    at_boundary: bool
    #: Pages that crossed the network compressed, and the bytes that they took there.
    compressed_pages: int
    compressed_bytes: int

    def fileno(self) -> int:
        """The engine's end."""

    async def aclose(self) -> None:
        """Hangs up. Returns when nothing is left of it."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A source that is ready for requests.

    ``layout``: of the header; CRIU_4_2 but for a plain connection to a server of CRIU up to 4.1.1, the one exception
    from the canonical stream (docs/architecture.md). ``features``: what the server can do beyond CRIU; none for a
    server of CRIU's. ``answered``: whether the other side has said anything, so that it is known to be a page server.
    ``compresses``: whether what the background asks for may cross the network compressed.
    """

    carrier: Carrier
    layout: Layout = Layout.CRIU_4_2
    features: Features = NO_FEATURES
    answered: bool = False
    compresses: bool = False


class Source(Protocol):
    """One of several places with the same pages."""

    #: How it is called in messages.
    name: str
    #: Whether it can be connected to only once, ever.
    once: bool

    async def connect(self, *, spare: bool, urgent_only: bool, reached: Callable[[], None]) -> Connected:
        """``spare``: there is another connection, which may come back to life; this one must show first that it is
        better. ``urgent_only``: it is for faults alone. ``reached`` is called when the other side has accepted, before
        it has said anything.

        Raises LinkError, TlsError, RemoteProtocolError.
        """
