"""Pages from page servers: CRIU's and ours, one or several with the same content.

No page is taken from a server of ours that has not said that it has this very checkpoint; CRIU's can't say it, and what
protects there is in docs/protocol.md.

A connection to a server is a *channel*. CRIU's servers take one connection in their whole life, and end a task that
they keep frozen when it closes; so a channel that has gone silent is given up only for another one of which the
server has answered the first question. Our own servers take any number: faults get a channel of their own.

Once a channel without TLS is connected and known to be good, the engine works on it (csrc/serve/channel.h): it asks for
the pages of faults by itself, and for those of the background as far as it is told to, and places them. What comes here
then is only what it can't settle: pages that were refused, silence, the end. All of a channel that has TLS is done
here.

What can't be had at the moment waits, and is asked for again: of the other servers at once, of the same one after
a pause that grows. Pages are lost when every server has said, again and again, that it can't give them (a server of
CRIU's only closes the connection, for whatever reason), or after a deadline, if there is one; nothing here ever makes
them zeros.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Final, NamedTuple

import anyio
from anyio.abc import TaskGroup

from images_spec.identity import Identity
from lazypages.engine.channel import Channel as EngineLane
from lazypages.engine.channel import ChannelEvent, ChannelEventKind, ChannelRequest
from lazypages.engine.engine import Engine
from lazypages.engine.task import ServedTask
from lazypages.net import wire
from lazypages.net.link import Link, LinkError, connect
from lazypages.net.tls import TlsError, TlsFiles
from lazypages.net.url import ConnectedSocket, PageServerAddress, TcpServer
from lazypages.net.wire import PAGE_SIZE, ClientCodec, CloseFlags, Features, Layout, RemoteProtocolError
from lazypages.sources.backlog import Backlog, Wanted
from lazypages.sources.trial import Trial
from lazypages.sources.window import Sent, Window

log = logging.getLogger("lazypages")

# For each request CRIU's server copies all pages before the requested one in its pipe (up to 1 MiB); without
# CAP_SYS_RESOURCE it fails past the 16th page of a pipe (docs/criu.md, "Page server protocol").
CRIU_MAX_PAGES: Final = 64
OUR_MAX_PAGES: Final = 256
URGENT_MAX_PAGES: Final = 16  # neighbouring faults that are asked for as one
MIN_PAGES: Final = 4  # of a background request
COMPRESSED_MIN_PAGES: Final = 16  # of a background request that is worth compressing
ALONE_WINDOW: Final = 1 << 20  # bytes of background on a channel without faults, at least
URGENT_WINDOW: Final = 4 << 20  # bytes of faults on their way on one channel

CONNECT_TIMEOUT: Final = 10.0  # s
SILENCE: Final = 3.0  # s without a byte, while answers are due, that make a channel suspect
SILENT_ROUND_TRIPS: Final = 20  # and so many round trips
BACKOFF: Final = (0.02, 5.0)  # s: first and longest pause before a server is tried again
REFUSED_BACKOFF: Final = (0.2, 10.0)  # the same for a page that all servers refuse
# Rounds after which a page is lost that every server has said it has not, or can't read: what was wrong with a disk, or
# with the memory of a frozen task, may pass. By the pauses above that is about 3 s.
DENIED_ROUNDS: Final = 5
SUSPECT_PAUSE: Final = (
    0.5  # s for which a new connection that has brought nothing is not risked for a refused page
)
REFUSED_WINDOW: Final = 256  # requests for refused pages that are on their way on one channel
WARN_INTERVAL: Final = 30.0  # s
TICK: Final = 0.1  # s between looks at what waits, while something does
NS_PER_S: Final = 1e9
CLOSE_TIMEOUT: Final = 5.0  # s for the server's answer to CLOSE
# How long a server of the old layout may take to answer the probe before it counts as new: the images were
# written by a new CRIU, or by an old one or nobody knows.
PROBE_PATIENCE: Final = {Layout.CRIU_4_2: 0.5, Layout.CRIU_4_1: 5.0, None: 2.0}

CLOSED: Final = "closed by the server"
DENIED: Final = "no page server can give it; their logs say why"
ELSEWHERE: Final = "another destination has completed this dump and runs it"

OnPages = Callable[[int, int, memoryview], Awaitable[None]]
OnLost = Callable[[int, int, int, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """``layout``: of the header, when the user has said it. ``written_by``: the layout of the CRIU that wrote the
    images, a hint for finding out. ``deadline``: seconds after which pages that can't be had are lost; None: never.
    ``checkpoint``: which one the pages must be of; None, for tests: of any.
    """

    layout: Layout | None = None
    written_by: Layout | None = None
    deadline: float | None = None
    tls: TlsFiles | None = None
    checkpoint: Identity | None = None


class CheckpointError(LinkError):
    """The server has another checkpoint, or can't say which one it has."""


class CompletedError(LinkError):
    """The server says that another destination has completed."""


class _Ending(enum.Enum):
    """What servers are told at the end."""

    COMPLETE = "complete"
    UNUSED = "unused"
    ABANDONED = "abandoned"


@dataclass(slots=True)
class ServerStats:
    """What one server has given: counts since the start; ``bytes`` are those of ``pages``; ``round_trip`` in seconds,
    None before the first answer."""

    address: str
    connected: bool = False
    connections: int = 0
    requests: int = 0
    pages: int = 0
    bytes: int = 0
    compressed_pages: int = 0  # of ``pages``
    compressed_bytes: int = 0  # that these took on the wire
    round_trip: float | None = None


class _Load(NamedTuple):
    """Requests on their way; bytes of faults, of background, of background that may be; s, 0 if not known."""

    requests: int
    urgent: int
    background: int
    limit: int
    round_trip: float


@dataclass(slots=True, eq=False)
class _Turn:
    """Of a task's background on a channel of the engine's."""

    over: anyio.Event = field(default_factory=anyio.Event)
    pages: int = 0


@dataclass(slots=True, eq=False)
class _Channel:
    """One connection to a server, from the attempt to connect until its end."""

    server: _Server
    urgent_only: bool
    second: bool  # there is another one already that may come back to life
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    link: Link | None = None
    codec: ClientCodec | None = None
    engine: EngineLane | None = None  # once it is up, unless we do its work
    turn: _Turn | None = None
    held: bool = False
    at_boundary: bool = False
    up: bool = False
    down: bool = False
    silent: bool = False
    answered: bool = False  # the server has said something, so it is one
    brought: bool = False  # pages, to us
    up_since: float = 0.0  # s
    heard: float = 0.0  # when the last byte came, or the first of what is due was asked for
    window: Window = field(default_factory=Window)
    trial: Trial = field(default_factory=Trial)
    sent: deque[tuple[Sent, int, bool]] = field(default_factory=deque)  # (when, bytes, urgent)
    background_bytes: int = 0
    urgent_bytes: int = 0
    reserved: Wanted | None = (
        None  # a refused page that goes alone: nothing else suffers if the server closes
    )
    unsent: bytearray = field(default_factory=bytearray)
    writable: anyio.Event = field(default_factory=anyio.Event)
    closed: anyio.Event = field(default_factory=anyio.Event)

    @property
    def usable(self) -> bool:
        return self.up and not self.silent and self.reserved is None

    @property
    def ours(self) -> bool:
        return self.codec is not None and bool(self.codec.features)

    @property
    def agreed(self) -> bool:
        """Whether the server has said that it has our checkpoint."""
        return self.codec is not None and bool(self.codec.features & Features.CHECKPOINT)

    @property
    def used_up(self) -> bool:
        """Whether this was the one connection that a server of CRIU's takes."""
        answered = self.answered or bool(self.engine and self.engine.state().pages)
        return self.codec is not None and not self.ours and answered

    @property
    def has_brought(self) -> bool:
        """Whether pages have come on it."""
        return self.brought or bool(self.engine and self.engine.state().pages)

    @property
    def answers_missing(self) -> bool:
        return self.codec is not None and bool(self.codec.features & Features.MISSING)

    @property
    def load(self) -> _Load:
        """What is on its way, and how much may be."""
        if self.engine is None:
            return _Load(
                len(self.sent),
                self.urgent_bytes,
                self.background_bytes,
                self.window.limit,
                self.window.smoothed or 0.0,
            )
        state = self.engine.state()
        return _Load(
            state.outstanding, state.urgent, state.background, state.limit, state.round_trip / NS_PER_S
        )

    @property
    def expected_wait(self) -> float:
        """Seconds until an answer to what is asked now, roughly."""
        load = self.load
        return load.round_trip * (1 + (load.urgent + load.background) / load.limit)

    def counted_in(self, stats: ServerStats) -> ServerStats:
        """`stats` and what the engine has counted on this channel."""
        if self.engine is None:
            return stats
        state = self.engine.state()
        return replace(
            stats,
            requests=stats.requests + state.requests,
            pages=stats.pages + state.pages,
            bytes=stats.bytes + state.bytes,
            round_trip=state.round_trip / NS_PER_S or stats.round_trip,
        )

    def hold(self) -> None:
        """The engine sends of its own accord only on a channel that is good for all."""
        held = not self.usable
        if self.engine is not None and held is not self.held:
            self.held = held
            self.engine.hold(held=held)


@dataclass(eq=False)
class _Server:
    address: PageServerAddress
    stats: ServerStats
    channels: list[_Channel] = field(default_factory=list)
    changed: anyio.Event = field(default_factory=anyio.Event)
    many: bool = False  # takes more than one connection
    agreed: bool = False  # has had our checkpoint
    used_up: bool = False  # CRIU's, and it has had its connection
    given_up: bool = False  # therefore, and that has been said
    complained: float = float("-inf")

    def notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class RemotePages:
    """Asks page servers for pages; answers come through the callbacks. Made by `open_remote`.

    All methods are for the event loop's thread. Addresses are those at dump time, in bytes.
    """

    def __init__(
        self,
        servers: Sequence[PageServerAddress],
        options: RemoteOptions,
        on_pages: OnPages,
        on_lost: OnLost,
        *,
        group: TaskGroup,
        engine: Engine | None,
    ) -> None:
        self._options = options
        self._engine = engine
        self._line = anyio.Lock()  # of those who wait for a channel of the engine's, first come, first served
        self._free = anyio.Event()
        self._on_pages, self._on_lost = on_pages, on_lost
        self._group = group
        self._servers = [_Server(address, ServerStats(str(address))) for address in servers]
        self._backlog = Backlog()
        self._wake = anyio.Event()
        self._room = anyio.Event()
        self._client = int.from_bytes(os.urandom(8), "little")
        self._refused_at = 0.0  # s: when refused pages are looked at next
        self._closing = False
        self._ending = _Ending.COMPLETE
        self._completed = anyio.Event()

    def request(self, ranges: Iterable[tuple[int, int, int]], *, urgent: bool) -> None:
        """Ask for ranges of (pid, address, pages); what is on its way already is not asked for again.

        Faults are `urgent`: they go out before all others. Give what belongs together in one call, so that
        neighbours become one request. Each page comes once, however often it was asked for before it came, or is
        lost.
        """
        now = time.monotonic()
        for pid, address, nr_pages in ranges:
            self._backlog.add(pid, address, address + nr_pages * PAGE_SIZE, urgent=urgent, now=now)
        self._wake.set()
        self._dispatch()

    def forget(self, pid: int) -> None:
        """Nobody waits for any page of this task any more."""
        self._backlog.drop_task(pid)
        self._notice_room()

    @property
    def room(self) -> int:
        """Pages that the background may ask for now without a fault waiting for them longer than it must."""
        room = 0
        for channel in self._background_channels():
            if channel.engine is None:
                room += max(0, self._background_limit(channel) - channel.background_bytes)
        return max(0, room // PAGE_SIZE - self._backlog.queued_pages(urgent=False))

    async def wait_for_room(self) -> int:
        """Wait until `room` is at least one page, and return it."""
        while not (room := self.room):
            if self._room.is_set():
                self._room = anyio.Event()  # one for all who wait
            await self._room.wait()
        return room

    async def bring(self, task: ServedTask, max_bytes: int) -> int:
        """Bring pages of `task` in the background, in the engine; waits until it is this task's turn.

        Returns pages that were asked for, all of them if they are `max_bytes`; 0: nothing is left at the moment.
        """
        async with self._line:
            while (channel := self._free_channel()) is None:
                self._free = anyio.Event()
                await self._free.wait()
            channel.turn = turn = _Turn()
            assert channel.engine is not None
            channel.engine.turn(task, max_bytes)
        await turn.over.wait()
        return turn.pages

    def _free_channel(self) -> _Channel | None:
        for channel in self._background_channels():
            if channel.engine is not None and channel.turn is None:
                return channel
        return None

    def stats(self) -> list[ServerStats]:
        """Counts per server, in the order in which they were given."""
        return [
            reduce(lambda stats, channel: channel.counted_in(stats), server.channels, server.stats)
            for server in self._servers
        ]

    def _start(self) -> None:
        for server in self._servers:
            self._group.start_soon(partial(self._keep_connected, server, urgent_only=False))
            self._group.start_soon(partial(self._keep_connected, server, urgent_only=True))
        self._group.start_soon(self._tend)

    # -- sending -------------------------------------------------------------------------------------------

    def _background_channels(self) -> list[_Channel]:
        return [
            channel
            for server in self._servers
            for channel in server.channels
            if channel.usable and not channel.urgent_only
        ]

    def _background_limit(self, channel: _Channel) -> int:
        """Bytes of background that may be on their way: little while a fault waits on the same channel, and more than
        needed where faults have a channel of their own."""
        if any(other.urgent_only and other.up for other in channel.server.channels):
            return max(channel.window.limit, ALONE_WINDOW)
        load = channel.load
        return MIN_PAGES * PAGE_SIZE if load.urgent else load.limit

    def _urgent_channel(self) -> _Channel | None:
        best, best_wait = None, 0.0
        for server in self._servers:
            channels = [channel for channel in server.channels if channel.usable]
            for channel in [channel for channel in channels if channel.urgent_only] or channels:
                wait = channel.expected_wait
                if channel.load.urgent < URGENT_WINDOW and (best is None or wait < best_wait):
                    best, best_wait = channel, wait
        return best

    def _dispatch(self) -> None:
        """Send what may be sent now."""
        backlog = self._backlog
        for server in self._servers:
            for channel in server.channels:
                if channel.reserved is not None and channel.reserved.gone:
                    channel.reserved = None
                channel.hold()
        while backlog.queued_pages(urgent=True) and (fastest := self._urgent_channel()):
            if (wanted := backlog.take(URGENT_MAX_PAGES, fastest, urgent=True)) is None:
                break
            self._send(fastest, wanted)
        if backlog.refused and (now := time.monotonic()) >= self._refused_at:
            self._dispatch_refused(now)
            # A file that was cut short may cost thousands: looking at them is not to take all our time.
            after = time.monotonic()
            self._refused_at = 2 * after - now
        if backlog.queued_pages(urgent=False):
            for channel in sorted(self._background_channels(), key=lambda channel: channel.load.background):
                self._dispatch_background(channel)

    def _dispatch_background(self, channel: _Channel) -> None:
        largest = OUR_MAX_PAGES if channel.ours else CRIU_MAX_PAGES
        while self._background_limit(channel) > channel.load.background:
            pages = max(MIN_PAGES, min(largest, self._background_limit(channel) // 4 // PAGE_SIZE))
            wanted = self._backlog.take(pages, channel, urgent=False)
            if wanted is None:
                return
            self._send(channel, wanted)

    def _dispatch_refused(self, now: float) -> None:
        """Pages that a server has refused go to a server that has not; alone, if it may close for them, too."""
        up = [server for server in self._servers if any(channel.up for channel in server.channels)]
        answering: dict[
            _Server, _Channel
        ] = {}  # that answer when a page is missing, and how much they may be sent
        for channel in self._background_channels():
            if channel.answers_missing:
                answering.setdefault(channel.server, channel)
        room = {channel: REFUSED_WINDOW - channel.load.requests for channel in answering.values()}
        for wanted in list(self._backlog.refused):
            if wanted.not_before > now:
                continue
            if up and len(answering) == len(up) and max(room.values()) <= 0:
                break
            candidates = [server for server in up if server not in wanted.refused]
            if up and not candidates:
                wanted.refused.clear()  # refused by all: each gets another chance, later
                wanted.not_before = now + _pause(REFUSED_BACKOFF, wanted.attempts)
                wanted.attempts += 1
                continue
            if told := [answering[server] for server in candidates if server in answering]:
                channel = max(told, key=lambda channel: room[channel])
                if room[channel] > 0:
                    room[channel] -= 1
                    self._backlog.retake(wanted, channel)
                    self._send(channel, wanted)
                continue
            # First what else a connection is good for: if each began with such a page, nothing else would ever come.
            channels = [
                channel
                for server in candidates
                for channel in server.channels
                if not channel.urgent_only and (channel.has_brought or now - channel.up_since > SUSPECT_PAUSE)
            ]
            channels.sort(key=lambda channel: channel.reserved is None)  # the one that is kept free for it
            for channel in [channel for channel in channels if channel.reserved is wanted or channel.usable][
                :1
            ]:
                channel.reserved = wanted
                channel.hold()
                if not channel.load.requests:
                    self._backlog.retake(wanted, channel)
                    self._send(channel, wanted)

    def _send(self, channel: _Channel, wanted: Wanted) -> None:
        if channel.engine is not None:
            channel.engine.ask(wanted.pid, wanted.start, wanted.nr_pages, urgent=wanted.urgent)
            return
        assert channel.codec is not None
        now = time.monotonic()
        size = wanted.end - wanted.start
        if not channel.sent:
            channel.heard = now
        channel.sent.append((channel.window.send(now), size, wanted.urgent))
        if wanted.urgent:
            channel.urgent_bytes += size
        else:
            channel.background_bytes += size
        channel.server.stats.requests += 1
        compress = (
            channel.trial.compress
            and not wanted.urgent
            and wanted.nr_pages >= COMPRESSED_MIN_PAGES
            and bool(channel.codec.features & Features.COMPRESSED)
        )
        self._write(channel, channel.codec.get(wanted.pid, wanted.start, wanted.nr_pages, compress=compress))

    def _write(self, channel: _Channel, data: bytes) -> None:
        """Send, at once if the socket takes it. An error is left for the channel's reader to find."""
        assert channel.link is not None
        if not channel.unsent:
            try:
                data = data[channel.link.send(data) :]
            except LinkError:
                return
        if data:
            channel.unsent += data
            channel.writable.set()

    async def _write_rest(self, channel: _Channel) -> None:
        assert channel.link is not None
        while True:
            channel.writable = anyio.Event()
            await channel.writable.wait()
            while channel.unsent:
                await channel.link.wait_writable()
                try:
                    del channel.unsent[: channel.link.send(channel.unsent)]
                except LinkError:
                    return

    # -- receiving -----------------------------------------------------------------------------------------

    async def _receive(self, channel: _Channel) -> None:
        """Until the connection ends. Raises LinkError, RemoteProtocolError."""
        link, codec = channel.link, channel.codec
        assert link is not None
        assert codec is not None
        while True:
            await link.wait_readable()
            count = link.recv_into(codec.writable())
            if count is None:
                continue
            codec.received(count)
            channel.answered = channel.answered or count > 0
            channel.heard = time.monotonic()
            if channel.silent:
                channel.silent = False
                channel.server.notify()
            while (event := codec.next_event()) is not None:
                match event:
                    case wire.Pages(pid, address, data):
                        await self._deliver(channel, pid, address, data)
                    case wire.ZeroPages(pid, address, nr_pages):
                        await self._deliver(channel, pid, address, memoryview(bytes(nr_pages * PAGE_SIZE)))
                    case wire.Answered():
                        self._answered(channel, event)
                    case wire.Closed(status):
                        self._hear_status(channel, status)
                        channel.closed.set()
                        return
                    case wire.Completed():
                        raise CompletedError(ELSEWHERE)
                    case wire.Eof(complete):
                        raise LinkError(CLOSED if complete else "closed in the middle of an answer")
            self._dispatch()
            self._notice_room()

    async def _hear(self, channel: _Channel) -> None:
        """As _receive, for a channel of the engine's."""
        assert channel.engine is not None
        while True:
            await anyio.wait_readable(channel.engine.event_fd)
            for event in channel.engine.events():
                if self._heard(channel, event):
                    return
            self._dispatch()
            self._notice_room()

    def _heard(self, channel: _Channel, event: ChannelEvent) -> bool:
        """What the engine tells of a channel; true at its regular end. Raises LinkError, RemoteProtocolError."""
        pid, start, end = event.tag, event.image, event.image + event.nr_pages * PAGE_SIZE
        match event.kind:
            case ChannelEventKind.ARRIVED:
                self._backlog.arrived(pid, start, end)
            case ChannelEventKind.REFUSED:
                if not event.told:
                    self._adopt(channel, pid, start, end, event.since)
                if channel.reserved is not None and channel.reserved.owner is channel:
                    channel.reserved = None
                for rest in self._backlog.owned(channel, pid, start, end):
                    self._refused(channel, rest, said=True)
            case ChannelEventKind.HEARD:
                if channel.silent:
                    channel.silent = False
                    channel.server.notify()
            case ChannelEventKind.TURN_OVER:
                self._turn_over(channel, event.nr_pages)
            case ChannelEventKind.CLOSED:
                self._hear_status(channel, event.status)
                return True
            case ChannelEventKind.ENDED:
                channel.at_boundary = event.at_boundary
                if event.status == errno.ESTALE:
                    raise CompletedError(ELSEWHERE)
                if event.status == errno.EPROTO:
                    raise RemoteProtocolError("the page server answers what it was not asked for")
                if event.status:
                    raise LinkError(os.strerror(event.status))
                raise LinkError(CLOSED if event.at_boundary else "closed in the middle of an answer")
        return False

    def _hear_status(self, channel: _Channel, status: int) -> None:
        """Of the answer to CLOSE."""
        if status == wire.ELSEWHERE:
            self._completed.set()
        elif status:
            log.warning("%s: status %d at the end", channel.server.address, status)

    def _adopt(self, channel: _Channel, pid: int, start: int, end: int, since: int) -> None:
        """The engine has asked `channel` for these; from here on it is our business that they come."""
        when = since / NS_PER_S or time.monotonic()
        self._backlog.add(pid, start, end, urgent=bool(since), now=when, owner=channel)

    def _adopt_all(self, channel: _Channel) -> None:
        if channel.engine is not None:
            for request in channel.engine.outstanding():
                end = request.image + request.nr_pages * PAGE_SIZE
                if not request.told:
                    self._adopt(channel, request.tag, request.image, end, request.since)

    def _hear_rest(self, channel: _Channel, engine: EngineLane) -> None:
        """What it has said of pages and nobody has heard: of one that was refused nothing else tells."""
        while events := engine.events():
            for event in events:
                if event.kind in {ChannelEventKind.ARRIVED, ChannelEventKind.REFUSED}:
                    self._heard(channel, event)

    def _turn_over(self, channel: _Channel, pages: int) -> None:
        if channel.turn is not None:
            channel.turn.pages = pages
            channel.turn.over.set()
            channel.turn = None

    async def _deliver(self, channel: _Channel, pid: int, address: int, data: memoryview) -> None:
        stats = channel.server.stats
        stats.pages += len(data) // PAGE_SIZE
        stats.bytes += len(data)
        for start, end in self._backlog.arrived(pid, address, address + len(data)):
            await self._on_pages(pid, start, data[start - address : end - address])

    def _answered(self, channel: _Channel, answer: wire.Answered) -> None:
        asked, nr_pages, frame = answer
        channel.brought = channel.brought or nr_pages > 0
        now = time.monotonic()
        sent, size, urgent = channel.sent.popleft()
        if urgent:
            channel.urgent_bytes -= size
        else:
            channel.background_bytes -= size
        if not channel.sent and channel.reserved is not None and channel.reserved.owner is channel:
            channel.reserved = None
        channel.window.answered(now, sent, nr_pages * PAGE_SIZE)
        channel.server.stats.round_trip = channel.window.smoothed
        if not urgent and asked.nr_pages >= COMPRESSED_MIN_PAGES:
            channel.trial.answered(now, nr_pages * PAGE_SIZE, compress=asked.compress, idle=not channel.sent)
        if frame:
            channel.server.stats.compressed_pages += nr_pages
            channel.server.stats.compressed_bytes += frame
        start, end = asked.vaddr + nr_pages * PAGE_SIZE, asked.vaddr + asked.nr_pages * PAGE_SIZE
        for rest in self._backlog.owned(channel, asked.pid, start, end):
            if nr_pages:
                self._backlog.again(rest)  # a short answer: the server had no more in one piece
            else:
                self._refused(channel, rest, said=True)

    def _refused(self, channel: _Channel, wanted: Wanted, *, said: bool) -> None:
        what = "can't give" if said else "seems not to have"
        log.info("%s: %s page %#x of task %d", channel.server.address, what, wanted.start, wanted.pid)
        self._backlog.refuse(wanted, channel.server, said=said)

    def _denied(self, wanted: Wanted) -> bool:
        """Whether every server has said that it can't give the page, often enough."""
        return wanted.attempts >= DENIED_ROUNDS and wanted.denied.issuperset(self._servers)

    def _notice_room(self) -> None:
        if not self._room.is_set() and self.room:
            self._room.set()
        if not self._free.is_set() and self._free_channel():
            self._free.set()

    # -- channels ---------------------------------------------------------------------------------------------

    async def _run_channel(self, channel: _Channel) -> None:
        """Connect, and serve as a channel until the connection ends; puts back what it leaves unanswered."""
        reason = ""
        try:
            with channel.scope:
                await self._connect(channel)
                async with anyio.create_task_group() as group:
                    group.start_soon(self._write_rest, channel)
                    self._wake.set()
                    self._dispatch()
                    self._notice_room()
                    try:
                        await (self._receive(channel) if channel.engine is None else self._hear(channel))
                    finally:
                        group.cancel_scope.cancel()
            if channel.scope.cancelled_caught:
                reason = "given up for another connection"
        except* (LinkError, RemoteProtocolError, TlsError) as errors:
            reason = str(_first(errors))
            if isinstance(_first(errors), CompletedError):
                self._completed.set()
        finally:
            self._channel_ended(channel, reason)

    def _channel_ended(self, channel: _Channel, reason: str) -> None:
        channel.answered = channel.answered or bool(channel.engine and channel.engine.state().pages)
        was_up, channel.up, channel.down = channel.up and channel.answered, False, True
        channel.server.used_up = channel.server.used_up or channel.used_up
        if reason and not self._closing:
            self._complain(channel, reason, was_up=was_up)
        oldest: ChannelRequest | wire.Get | None = None
        if channel.engine is not None:
            channel.hold()
            self._adopt_all(channel)
            self._hear_rest(channel, channel.engine)
            oldest = next(iter(channel.engine.outstanding()), None)
        elif channel.codec is not None:
            channel.at_boundary = channel.codec.at_boundary
            oldest = channel.codec.oldest
        if (
            oldest is not None
            and channel.answered
            and channel.at_boundary
            and reason in {CLOSED, os.strerror(errno.ECONNRESET)}
        ):
            # So a server of CRIU's says that it hasn't got the page that it was asked for first.
            pid, start, nr_pages = oldest[:3]
            for wanted in self._backlog.owned(channel, pid, start, start + nr_pages * PAGE_SIZE)[:1]:
                self._refused(channel, wanted, said=False)
        self._backlog.give_back(channel)
        if channel.engine is not None:
            self._turn_over(channel, 0)
            channel.server.stats = channel.counted_in(channel.server.stats)
            channel.engine.close()
        if channel.link is not None:
            channel.link.close()
        channel.server.channels.remove(channel)
        channel.server.stats.connected = any(other.up for other in channel.server.channels)
        channel.closed.set()
        channel.server.notify()
        self._dispatch()

    def _complain(self, channel: _Channel, reason: str, *, was_up: bool) -> None:
        now = time.monotonic()
        waiting = sum(1 for _ in self._backlog)
        level = logging.INFO
        if was_up or now - channel.server.complained > WARN_INTERVAL:
            level, channel.server.complained = logging.WARNING, now
        log.log(
            level,
            "page server %s: %s%s",
            channel.server.address,
            reason,
            f"; {waiting} requests wait, trying again" if waiting else "",
        )

    async def _connect(self, channel: _Channel) -> None:
        """Raises LinkError, TlsError, RemoteProtocolError."""
        with anyio.move_on_after(CONNECT_TIMEOUT):
            channel.link = await connect(channel.server.address, self._options.tls)
        if channel.link is None:
            raise LinkError(f"no connection within {CONNECT_TIMEOUT:g} s")
        channel.heard = time.monotonic()
        if channel.second:
            with anyio.move_on_after(CONNECT_TIMEOUT):
                await self._probe(channel, channel.link)
            if channel.codec is None:
                raise LinkError(f"no answer within {CONNECT_TIMEOUT:g} s")
        else:
            await self._probe(channel, channel.link)
        assert channel.codec is not None
        channel.heard = time.monotonic()
        self._hand_over(channel)
        channel.up, channel.silent, channel.up_since = True, False, channel.heard
        channel.server.many = bool(channel.codec.features & Features.CONNECTIONS)
        channel.server.stats.connected = True
        channel.server.stats.connections += 1
        log.info(
            "page server %s: connected (%s)",
            channel.server.address,
            "lazypages" if channel.codec.features else channel.codec.layout.value,
        )
        channel.server.notify()

    def _hand_over(self, channel: _Channel) -> None:
        """The engine asks for pages on this channel from now on, if it can. Raises LinkError.

        It can't undo compression: a channel for the background to another host, where that may pay, stays ours.
        """
        assert channel.link is not None
        assert channel.codec is not None
        fd, features = channel.link.plain_fd, channel.codec.features
        compresses = (
            features & Features.COMPRESSED and not channel.urgent_only and not channel.link.within_host
        )
        if self._engine is None or fd is None or compresses:
            return
        try:
            channel.engine = self._engine.channel(
                fd,
                header_size=channel.codec.layout.header_size,
                max_pages=OUR_MAX_PAGES if channel.ours else CRIU_MAX_PAGES,
                zeros=bool(features & Features.ZERO),
                background=not channel.urgent_only,
                floor=ALONE_WINDOW if features & Features.CONNECTIONS and not channel.urgent_only else 0,
            )
        except OSError as error:
            raise LinkError(f"no channel: {error.strerror}") from None

    async def _probe(self, channel: _Channel, link: Link) -> None:
        """Find out who answers, and how: see wire. Also shows that somebody does.

        A server that the user has named is taken for it: CRIU's holds its answer back for 200 ms (it corks its socket,
        and only pages uncork it; seen with strace, 4.1.1).
        """
        told, checkpoint = self._options.layout, self._options.checkpoint
        must_agree = channel.server.agreed or bool(checkpoint and checkpoint.by_dumptool)
        # A second one must show that it is better than the first.
        if told and not (must_agree or channel.second):
            channel.codec = ClientCodec(told)
            return
        address = channel.server.address
        guessed = told is None and isinstance(address, TcpServer) and address.tls
        if guessed:  # see wire; the images' word has to do, and the old layout without it
            told = self._options.written_by or Layout.CRIU_4_1
        wanted = wire.ALL_FEATURES | (Features.CHECKPOINT if checkpoint else wire.NO_FEATURES)
        unsent = wire.probe_first(wanted) + (wire.PROBE_REST if told is Layout.CRIU_4_2 else b"")
        await _send_all(link, unsent)
        patience = PROBE_PATIENCE[self._options.written_by] + 8 * (link.round_trip() or 0.0)
        answer = bytearray()
        layout = told or Layout.CRIU_4_1
        if told is None:
            with anyio.move_on_after(patience):
                await _receive_all(link, answer)
            if not answer:
                await _send_all(link, wire.PROBE_REST)
                layout = Layout.CRIU_4_2
        try:
            await _receive_all(link, answer)
        except LinkError as error:
            if guessed:
                raise LinkError(f"{error}; {wire.GUESSED.format(layout=layout)}") from None
            raise
        channel.answered = True
        features = wire.probe_answer(bytes(answer))
        if checkpoint and (features is not None or must_agree):
            await self._agree(link, checkpoint, features or wire.NO_FEATURES)
            channel.server.agreed = True
        if features is None:
            channel.codec = ClientCodec(layout)
        else:
            channel.codec = ClientCodec(Layout.CRIU_4_2, features)

    async def _agree(self, link: Link, checkpoint: Identity, features: Features) -> None:
        """Raises CheckpointError unless the server has this checkpoint."""
        if not features & Features.CHECKPOINT:
            raise CheckpointError("can't say which dump it has the pages of: none is taken from it")
        theirs = bytearray()
        await _receive_all(link, theirs, wire.IDENTITY_SIZE)
        await _send_all(link, wire.checkpoint_message(checkpoint.digest, self._client))
        if theirs != checkpoint.digest:
            raise CheckpointError(
                f"has the pages of another dump ({theirs.hex()}; the images: {checkpoint.digest.hex()}): "
                "none is taken from it"
            )

    async def _keep_connected(self, server: _Server, *, urgent_only: bool) -> None:
        """See to it that there is one good channel (or a second one, for faults only)."""
        failures, retry_at = 0, 0.0
        while not self._closing:
            channels = [channel for channel in server.channels if channel.urgent_only is urgent_only]
            good = [channel for channel in channels if channel.up and not channel.silent]
            if good:
                for channel in channels:
                    if channel is not good[-1]:
                        channel.scope.cancel()
                await server.changed.wait()
                if any(channel.answered for channel in channels):
                    failures = 0
                if not any(channel.up for channel in channels):
                    retry_at = time.monotonic() + _pause(BACKOFF, failures)
                continue
            now = time.monotonic()
            hopeless = [channel for channel in channels if now - channel.heard > SILENCE or channel.silent]
            wanted = not urgent_only or server.many
            if wanted and len(hopeless) == len(channels) < 2 and now >= retry_at:
                connected = isinstance(server.address, ConnectedSocket) and server.stats.connections
                if connected or self._is_used_up(server):
                    await server.changed.wait()
                    continue
                channel = _Channel(server, urgent_only, second=bool(channels), heard=now)
                server.channels.append(channel)
                self._group.start_soon(self._run_channel, channel)
                failures += 1
                retry_at = now + _pause(BACKOFF, failures)
                channels.append(channel)
            with anyio.move_on_after(max(0.02, min(1.0, retry_at - time.monotonic())) if wanted else 3600):
                await server.changed.wait()

    def _is_used_up(self, server: _Server) -> bool:
        """Whether it has been CRIU's, which takes one connection in its life: who answers there now has another dump.

        A connection would even be the only one of that server, and the end of it the end of its dump, which fails.
        """
        if self._options.checkpoint is None:
            return False
        if not server.channels and server.used_up and not server.given_up:
            server.given_up = True
            log.error(
                "page server %s: a page server of CRIU's takes one connection, and that has ended. Whoever listens "
                "there now may have another dump: not connecting again. Pages that are still missing must come from "
                "elsewhere (--source)",
                server.address,
            )
        return server.used_up or any(channel.used_up for channel in server.channels)

    # -- what waits ----------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """Notice what waits for too long: channels that are silent, refused pages, pages past the deadline."""
        warned = time.monotonic()
        while True:
            channels = [channel for server in self._servers for channel in server.channels]
            if not self._backlog and not any(channel.engine for channel in channels):
                self._wake = anyio.Event()
                await self._wake.wait()
                warned = time.monotonic()
            await anyio.sleep(TICK)
            now = time.monotonic()
            deadline = self._options.deadline
            for channel in [channel for server in self._servers for channel in server.channels]:
                self._check_silence(channel, now)
                if deadline is not None and channel.engine is not None:
                    first = channel.engine.state().oldest
                    if first and now - first / NS_PER_S > deadline:
                        self._adopt_all(channel)
            for wanted in [wanted for wanted in self._backlog.refused if self._denied(wanted)]:
                self._backlog.drop(wanted)
                await self._on_lost(wanted.pid, wanted.start, wanted.nr_pages, DENIED)
            if deadline is not None:
                for wanted in [wanted for wanted in self._backlog if now - wanted.since > deadline]:
                    self._backlog.drop(wanted)
                    reason = f"no page server gave it within {deadline:g} s"
                    await self._on_lost(wanted.pid, wanted.start, wanted.nr_pages, reason)
            oldest = min((wanted.since for wanted in self._backlog), default=now)
            if now - max(oldest, warned) > WARN_INTERVAL:
                warned = now
                pages = sum(wanted.nr_pages for wanted in self._backlog)
                log.warning(
                    "%d pages are awaited from page servers, for up to %.0f s; still trying",
                    pages,
                    now - oldest,
                )
            self._dispatch()
            self._notice_room()

    def _check_silence(self, channel: _Channel, now: float) -> None:
        if not channel.up:
            return
        load = channel.load
        if channel.engine is not None:
            channel.heard = channel.engine.state().heard / NS_PER_S
        patience = max(SILENCE, SILENT_ROUND_TRIPS * load.round_trip)
        silent = load.requests > 0 and now - channel.heard > patience
        if channel.silent and not silent:
            # All answers had come before it was found silent, and waited for a task: no byte will tell.
            channel.silent = False
            channel.server.notify()
        elif silent and not channel.silent:
            log.warning("page server %s: silent for %.1f s", channel.server.address, now - channel.heard)
            channel.silent = True
            channel.reserved = None  # another one may take the page
            channel.hold()
            self._adopt_all(channel)
            self._backlog.give_back(channel)
            channel.server.notify()

    # -- the end -------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """At the end only hang up: a server that hears CLOSE ends the task whose pages it has."""
        self._ending = _Ending.ABANDONED

    def unused(self) -> None:
        """At the end say that no restore has come; who can't be told that is hung up on."""
        self._ending = _Ending.UNUSED

    async def wait_completed_elsewhere(self) -> None:
        """Until a server says that another destination has all of the dump."""
        await self._completed.wait()

    @property
    def can_be_told(self) -> bool:
        """Whether a server that must hear the end can hear it now: dumptool's. Others only must have been there."""
        if self._options.checkpoint and self._options.checkpoint.by_dumptool:
            return any(channel.up for server in self._servers for channel in server.channels)
        return any(server.stats.connections for server in self._servers)

    @property
    def completed_elsewhere(self) -> bool:
        """Whether a server has said that; the last word comes when all is closed."""
        return self._completed.is_set()

    async def _close(self) -> None:
        """Tell all servers that this is the end, and wait a little for their answers."""
        self._closing = True
        if self._ending is _Ending.ABANDONED:
            return
        told = CloseFlags.COMPLETE if self._ending is _Ending.COMPLETE else CloseFlags.UNUSED
        channels = [channel for server in self._servers for channel in server.channels if channel.up]
        if self._ending is _Ending.UNUSED:
            channels = [channel for channel in channels if channel.agreed]
        for channel in channels:
            force = isinstance(channel.server.address, ConnectedSocket)
            flags = told if channel.agreed else wire.NO_CLOSE_FLAGS
            if channel.engine is not None:
                channel.engine.finish(force=force, flags=flags)
            elif channel.codec is not None:
                self._write(channel, channel.codec.close(force=force, flags=flags))
        with anyio.move_on_after(CLOSE_TIMEOUT, shield=True):
            for channel in channels:
                await channel.closed.wait()


def check_certificates(servers: Sequence[PageServerAddress], options: RemoteOptions | None) -> None:
    """Raises TlsError when a server wants certificates, and ours can't be used."""
    if any(isinstance(server, TcpServer) and server.tls for server in servers):
        ((options and options.tls) or TlsFiles()).client_context()


@asynccontextmanager
async def open_remote(
    servers: Sequence[PageServerAddress],
    on_pages: OnPages,
    on_lost: OnLost,
    options: RemoteOptions | None = None,
    engine: Engine | None = None,
) -> AsyncIterator[RemotePages]:
    """Connections to `servers`, all with the same content, while the context lasts; any event loop of anyio's.

    `on_pages(pid, address, data)` is awaited for pages as they arrive; nothing more is received on that connection
    until it returns, and `data` is good only until then. `on_lost(pid, address, nr_pages, reason)`: the deadline has
    passed. A server that can't be reached is tried again and again; nothing is raised for it. Raises TlsError when
    the certificates can't be used.
    """
    options = options or RemoteOptions()
    check_certificates(servers, options)
    async with anyio.create_task_group() as group:
        remote = RemotePages(servers, options, on_pages, on_lost, group=group, engine=engine)
        remote._start()
        yield remote
        await remote._close()
        group.cancel_scope.cancel()


async def _send_all(link: Link, data: bytes) -> None:
    while data := data[link.send(data) :]:
        await link.wait_writable()


async def _receive_all(link: Link, answer: bytearray, size: int = wire.PROBE_ANSWER_SIZE) -> None:
    """The rest of an answer to the probe. What has arrived is in `answer` also when this is cancelled."""
    room = memoryview(bytearray(size))
    while missing := size - len(answer):
        await link.wait_readable()
        count = link.recv_into(room[:missing])
        if count == 0:
            raise LinkError("closed by the server before it answered")
        answer += room[: count or 0]


def _pause(limits: tuple[float, float], attempt: int) -> float:
    """Seconds: twice as long each time, up to a limit, give or take a half."""
    first, longest = limits
    return min(longest, first * (1 << min(attempt, 16))) * random.uniform(0.5, 1.5)  # noqa: S311


def _first(errors: BaseExceptionGroup[Exception]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
