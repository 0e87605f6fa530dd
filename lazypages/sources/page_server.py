"""A page server as a source, CRIU's or ours: connects, and detects the server's kind and its protocol.

A server of ours must identify its checkpoint before any page is requested from it. CRIU's can't identify theirs;
docs/protocol.md describes what protects against another dump there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import anyio

from images_spec.identity import Identity
from lazypages.net import wire
from lazypages.net.link import ClosedError, HopelessError, Link, LinkError, connect
from lazypages.net.refused import why_closed
from lazypages.net.relay import Direct, Relay
from lazypages.net.tls import TlsFiles
from lazypages.net.trial import Trial
from lazypages.net.url import ConnectedSocket, PageServerAddress
from lazypages.net.wire import ClientCodec, Features, Layout
from lazypages.sources.base import Carrier, Connected
from lazypages.sources.shortage import made

log = logging.getLogger("lazypages")

T = TypeVar("T")

CONNECT_TIMEOUT: Final = 10.0  # s
# s that a server of the old layout may take to answer the probe before it counts as new, by the layout of the CRIU that
# wrote the images (None: not known). Too early, the rest of the probe ends a server of the old layout, and its tasks:
# where the user has named the new one and the images have the old one, the longest. Where the user has named the old
# one, the rest is never sent, and the silence is explained after SILENCE_EXPLAINED s.
PROBE_PATIENCE: Final = {Layout.CRIU_4_2: 0.5, Layout.CRIU_4_1: 5.0, None: 2.0}
SILENCE_EXPLAINED: Final = 3.0
SILENT: Final = (
    "page server %s: no answer for %g s. A page server of CRIU from 4.2 on, which wrote the images, never answers in "
    "criu-4.1: if it is one, end this, and leave out --page-server-protocol"
)


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """``layout``: of the header, if the user has named it. ``written_by``: the layout of the CRIU that wrote the
    images: a hint for the detection, and for whether the user is right. ``deadline``: seconds after which pages that no
    server gives are lost; None: never. ``checkpoint``: the one that the pages must be of; None (in tests): any.
    """

    layout: Layout | None = None
    written_by: Layout | None = None
    deadline: float | None = None
    tls: TlsFiles | None = None
    checkpoint: Identity | None = None


class CheckpointError(HopelessError):
    """The server has another checkpoint, or does not identify its own."""


class PageServerSource:
    """``client``: a number that identifies this destination, the same on all its connections."""

    kind = "page server"

    def __init__(self, address: PageServerAddress, options: RemoteOptions, client: int) -> None:
        self.name = str(address)
        self.once = isinstance(address, ConnectedSocket)
        self._address = address
        self._options = options
        self._client = client
        self._agreed = (
            False  # a server at this address had our checkpoint: any later one there must have it, too
        )
        self._shook_hands = False  # a TLS handshake at this address was complete

    async def connect(self, *, spare: bool, urgent_only: bool, reached: Callable[[], None]) -> Connected:
        """Raises LinkError, TlsError, RemoteProtocolError."""
        link = await _within(CONNECT_TIMEOUT, connect(self._address, self._options.tls), "connection")
        try:
            reached()
            # No time-out for a first connection: a server of CRIU's accepts no second one.
            limit = CONNECT_TIMEOUT if spare else float("inf")
            codec, answered = await _within(limit, self._greet(link, spare=spare), "answer")
            compresses = (
                bool(codec.features & Features.COMPRESSED) and not urgent_only and not link.within_host
            )
            carrier: Carrier
            title = f"{self.kind} {self.name}"
            if link.encrypted or compresses:
                carrier = await made(lambda: Relay(link, codec, Trial()), "a translator", title, reached)
                layout = Layout.CRIU_4_2
            else:
                carrier, layout = Direct(link), codec.layout
        except BaseException:
            link.close()
            raise
        return Connected(carrier, layout, codec.features, answered, compresses)

    async def _greet(self, link: Link, *, spare: bool) -> tuple[ClientCodec, bool]:
        """Detects the server's protocol (see wire). Returns a codec for it, and whether the server has answered.

        A layout that the user has named needs no probe (CRIU's server delays its answer by 200 ms: it corks its socket,
        and only pages uncork it; seen with strace, 4.1.1), unless the images are of a CRIU with the other layout: it
        may never answer requests in a wrong one. With TLS only an answer shows that it accepts our certificate: a
        server that closes right after the first handshake refuses it, or the protocol; later, it may have ended.

        Raises LinkError, TlsError, RemoteProtocolError.
        """
        named, written_by = self._options.layout, self._options.written_by
        checkpoint, tls = self._options.checkpoint, link.encrypted
        must_agree = self._agreed or bool(checkpoint and checkpoint.by_dumptool)
        confirmed = named is not None and written_by in {named, None}
        if named and confirmed and not (must_agree or spare or tls):
            return ClientCodec(named), False
        first_handshake = tls and not self._shook_hands
        self._shook_hands = self._shook_hands or tls
        layout = named if confirmed else None
        guessed = tls and named is None
        if tls:  # detection is impossible (see wire): use the images' layout, else the old one
            layout = named or written_by or Layout.CRIU_4_1
        wanted = wire.own_features() | (Features.CHECKPOINT if checkpoint else wire.NO_FEATURES)
        answer = bytearray()
        try:
            rest = wire.PROBE_REST if layout is Layout.CRIU_4_2 else b""
            await _send_all(link, wire.probe_first(wanted) + rest)
            if layout is None:
                layout = await self._detect(link, answer)
            await _receive_all(link, answer)
        except ClosedError as error:
            if answer:
                raise
            spoken = layout or Layout.CRIU_4_1
            why = why_closed(self._address, self._options.tls, spoken, guessed=guessed, named=confirmed)
            raise (HopelessError if first_handshake else LinkError)(f"{error}: {why}") from None
        features = wire.probe_answer(bytes(answer))
        if checkpoint and (features is not None or must_agree):
            await self._agree(link, checkpoint, features or wire.NO_FEATURES)
            self._agreed = True
        if features is None:
            if named not in {layout, None}:
                log.warning(
                    "page server %s: speaks %s, not %s as --page-server-protocol says: using %s",
                    *(self.name, layout.value, named.value, layout.value),
                )
            return ClientCodec(layout), True
        return ClientCodec(Layout.CRIU_4_2, features), True

    async def _detect(self, link: Link, answer: bytearray) -> Layout:
        """After the first part of the probe: the layout of the server, which has answered into `answer`, or will.

        Raises LinkError.
        """
        named, written_by = self._options.layout, self._options.written_by
        distance = 8 * (link.round_trip() or 0.0)
        if named is Layout.CRIU_4_1:
            with anyio.move_on_after(SILENCE_EXPLAINED + distance):
                await _receive_all(link, answer)
            if not answer:
                log.warning(SILENT, self.name, SILENCE_EXPLAINED)
            return Layout.CRIU_4_1
        with anyio.move_on_after(PROBE_PATIENCE[Layout.CRIU_4_1 if named else written_by] + distance):
            await _receive_all(link, answer)
        if answer:
            return Layout.CRIU_4_1
        await _send_all(link, wire.PROBE_REST)
        return Layout.CRIU_4_2

    async def _agree(self, link: Link, checkpoint: Identity, features: Features) -> None:
        """Compares identities with the server. Raises CheckpointError unless it has this checkpoint."""
        if not features & Features.CHECKPOINT:
            raise CheckpointError("does not identify its dump: not using its pages")
        theirs = bytearray()
        await _receive_all(link, theirs, wire.IDENTITY_SIZE)
        await _send_all(link, wire.checkpoint_message(checkpoint.digest, self._client))
        if theirs != checkpoint.digest:
            raise CheckpointError(
                f"has the pages of another dump ({theirs.hex()}; the images: {checkpoint.digest.hex()}): "
                "not using its pages"
            )


async def _within(seconds: float, doing: Awaitable[T], what: str) -> T:
    """Awaits `doing`. Raises LinkError if that takes longer than `seconds`."""
    with anyio.move_on_after(seconds):
        return await doing
    raise LinkError(f"no {what} within {seconds:g} s")


async def _send_all(link: Link, data: bytes) -> None:
    while data := data[link.send(data) :]:
        await link.wait_writable()


async def _receive_all(link: Link, answer: bytearray, size: int = wire.PROBE_ANSWER_SIZE) -> None:
    """Receives until `answer` has `size` bytes. If this is cancelled, `answer` has the bytes received so far.

    Raises LinkError.
    """
    room = memoryview(bytearray(size))
    while missing := size - len(answer):
        await link.wait_readable()
        count = link.recv_into(room[:missing])
        if count == 0:
            raise ClosedError("closed by the server before it answered")
        answer += room[: count or 0]
