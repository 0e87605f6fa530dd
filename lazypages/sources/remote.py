"""Pages from page servers, one or several with the same content: carries out what pool.py plans.

A connection to a server becomes a channel of the engine's, which asks for the pages of faults and of the background,
and places them. What it can't settle comes here as an event, and goes to the pool; what the pool says is done here.
"""

from __future__ import annotations

import enum
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from lazypages.engine.channel import Channel as EngineChannel
from lazypages.engine.channel import ChannelEvent, ChannelEventKind
from lazypages.engine.task import ServedTask
from lazypages.net import wire
from lazypages.net.link import LinkError
from lazypages.net.tls import TlsError, TlsFiles
from lazypages.net.url import PageServerAddress, TcpServer
from lazypages.net.wire import PAGE_SIZE, CloseFlags, Features, RemoteProtocolError
from lazypages.sources import pool as planning
from lazypages.sources.base import Carrier, Connected, Source
from lazypages.sources.page_server import PageServerSource, RemoteOptions
from lazypages.sources.pool import Channel, Load, Outstanding, Pool, Server, log

NS_PER_S: Final = 1e9
CLOSE_TIMEOUT: Final = 5.0  # s for the servers' answers to CLOSE

CLOSED: Final = "closed by the server"
CUT_SHORT: Final = "closed in the middle of an answer"
ELSEWHERE: Final = "another destination has completed this dump and runs it"

#: Pages that can't be had: the task's pid, the address at dump time, how many, why.
OnLost = Callable[[int, int, int, str], None]


class Channels(Protocol):
    """What makes channels: the engine."""

    def channel(
        self,
        fd: int,
        *,
        header_size: int,
        max_pages: int,
        zeros: bool,
        background: bool,
        floor: int = 0,
        compress: bool = False,
    ) -> EngineChannel:
        """See Engine.channel."""


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


@dataclass(slots=True, eq=False)
class _Turn:
    """Of a task's background on a channel."""

    over: anyio.Event = field(default_factory=anyio.Event)
    pages: int = 0


@dataclass(slots=True, eq=False)
class _Connection:
    """What a channel of the pool's is in the engine, and on the network."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    carrier: Carrier | None = None
    engine: EngineChannel | None = None
    turn: _Turn | None = None
    hung_up: bool = False  # the other side, between two answers
    closed: anyio.Event = field(default_factory=anyio.Event)  # it has said how it went, or is no more


class RemotePages:
    """Brings pages from `sources`. Made by `open_remote`.

    All methods are for the event loop's thread. Addresses are those at dump time, in bytes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        on_lost: OnLost,
        *,
        group: TaskGroup,
        engine: Channels,
        deadline: float | None = None,
        checked: bool = False,
        told_at_the_end: bool = False,
    ) -> None:
        self._engine = engine
        self._on_lost = on_lost
        self._group = group
        self._told_at_the_end = told_at_the_end
        servers = [Server(source.name, source.once) for source in sources]
        self.pool = Pool(servers, time.monotonic(), deadline=deadline, checked=checked)
        self._sources = dict(zip(servers, sources, strict=True))
        self._past = {server: ServerStats(server.name) for server in servers}  # of channels that are no more
        self._connections: dict[Channel, _Connection] = {}
        self._line = anyio.Lock()  # of those who wait for a channel, first come, first served
        self._free = anyio.Event()
        self._happened = anyio.Event()
        self._ending = _Ending.COMPLETE
        self._completed = anyio.Event()

    # -- for the tasks ---------------------------------------------------------------------------------------

    def request(self, ranges: Iterable[tuple[int, int, int]], *, urgent: bool) -> None:
        """Ask for ranges of (pid, address, pages) that the engine could not ask for by itself.

        Faults are `urgent`: they go out before all others. Give what belongs together in one call, so that
        neighbours become one request.
        """
        with self._planning():
            self.pool.want(ranges, time.monotonic(), urgent=urgent)

    def forget(self, pid: int) -> None:
        """Nobody waits for any page of this task any more."""
        with self._planning():
            self.pool.forget(pid)

    async def bring(self, task: ServedTask, max_bytes: int) -> int:
        """Bring pages of `task` in the background; waits until it is this task's turn.

        Returns pages that were asked for, all of them if they are `max_bytes`; 0: nothing is left at the moment.
        """
        async with self._line:
            while (connection := self._free_connection()) is None:
                self._free = anyio.Event()
                await self._free.wait()
            connection.turn = turn = _Turn()
            assert connection.engine is not None
            connection.engine.set_budget(task, max_bytes)
        await turn.over.wait()
        return turn.pages

    def stats(self) -> list[ServerStats]:
        """Counts per server, in the order in which they were given."""
        return [self._counted(server) for server in self.pool.servers]

    # -- the end ---------------------------------------------------------------------------------------------

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
        if self._told_at_the_end:
            return any(channel.up for channel in self.pool.channels())
        return any(server.connections for server in self.pool.servers)

    @property
    def completed_elsewhere(self) -> bool:
        """Whether a server has said that; the last word comes when all is closed."""
        return self._completed.is_set()

    # -- for open_remote -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._happened = anyio.Event()
            due = self.pool.due(time.monotonic())
            if due == 0:
                with self._planning():
                    self.pool.tick(time.monotonic())
                await anyio.lowlevel.checkpoint()
            else:
                with anyio.move_on_after(float("inf") if due is None else due):
                    await self._happened.wait()

    async def close(self) -> None:
        """Tell all servers that this is the end, and wait a little for their answers."""
        self.pool.close()
        if self._ending is _Ending.ABANDONED:
            return
        told = CloseFlags.COMPLETE if self._ending is _Ending.COMPLETE else CloseFlags.UNUSED
        channels = [channel for channel in self.pool.channels() if channel.up]
        if self._ending is _Ending.UNUSED:
            channels = [channel for channel in channels if channel.agreed]
        connections = [self._connections[channel] for channel in channels]
        for channel, connection in zip(channels, connections, strict=True):
            assert connection.engine is not None
            flags = told if channel.agreed else wire.NO_CLOSE_FLAGS
            connection.engine.finish(force=channel.server.once, flags=flags)
        with anyio.move_on_after(CLOSE_TIMEOUT, shield=True):
            for connection in connections:
                await connection.closed.wait()

    # -- what the pool says ----------------------------------------------------------------------------------

    @contextmanager
    def _planning(self) -> Iterator[None]:
        """Something happens in the block; what follows from it is done at its end."""
        self._look()
        yield
        self.pool.plan(time.monotonic())
        while actions := self.pool.actions():
            for action in actions:
                self._do(action)
        if not self._free.is_set() and self._free_connection():
            self._free.set()
        self._happened.set()

    def _look(self) -> None:
        """What the engine says of the channels."""
        for channel, connection in self._connections.items():
            if connection.engine is not None:
                state = connection.engine.state()
                channel.load = Load(
                    state.outstanding,
                    state.urgent,
                    state.background,
                    state.limit,
                    state.round_trip / NS_PER_S,
                    state.heard / NS_PER_S,
                    state.oldest / NS_PER_S,
                    state.pages,
                )

    def _do(self, action: planning.Action) -> None:
        match action:
            case planning.Lost(pid, start, nr_pages, reason):
                self._on_lost(pid, start, nr_pages, reason)
            case planning.Connect(channel):
                self._connections[channel] = _Connection()
                self._group.start_soon(self._run_channel, channel)
            case planning.GiveUp(channel):
                self._connections[channel].scope.cancel()
            case planning.Hold(channel, held):
                self._channel_of(channel).pause(paused=held)
            case planning.Ask(channel, pid, start, nr_pages, urgent):
                self._channel_of(channel).ask(pid, start, nr_pages, urgent=urgent)
            case planning.TakeOver(channel):
                now = time.monotonic()
                self.pool.took_over(channel, _outstanding(self._channel_of(channel)), now)

    def _channel_of(self, channel: Channel) -> EngineChannel:
        engine = self._connections[channel].engine
        assert engine is not None
        return engine

    def _free_connection(self) -> _Connection | None:
        for channel in self.pool.background_channels():
            connection = self._connections[channel]
            if connection.turn is None:
                return connection
        return None

    # -- channels --------------------------------------------------------------------------------------------

    async def _run_channel(self, channel: Channel) -> None:
        """Connect, and serve as a channel until the connection ends."""
        connection = self._connections[channel]
        reason = ""
        try:
            with connection.scope:
                await self._connect(channel, connection)
                await self._hear(channel, connection)
            if connection.scope.cancelled_caught:
                reason = "given up for another connection"
        except CompletedError as error:
            reason = str(error)
            self._completed.set()
        except (LinkError, RemoteProtocolError, TlsError) as error:
            reason = str(error)
        finally:
            self.end(channel, reason)
            if connection.carrier is not None:
                with anyio.CancelScope(shield=True):
                    await connection.carrier.aclose()

    async def _connect(self, channel: Channel, connection: _Connection) -> None:
        """Raises LinkError, TlsError, RemoteProtocolError."""
        found = await self._sources[channel.server].connect(
            spare=channel.spare,
            urgent_only=channel.urgent_only,
            reached=lambda: self.pool.reached(channel, time.monotonic()),
        )
        connection.carrier = found.carrier
        features = found.features
        try:
            connection.engine = self._engine.channel(
                found.carrier.fileno(),
                header_size=found.layout.header_size,
                max_pages=planning.OUR_MAX_PAGES if features else planning.CRIU_MAX_PAGES,
                zeros=bool(features & Features.ZERO),
                background=not channel.urgent_only,
                floor=(
                    planning.ALONE_WINDOW
                    if features & Features.CONNECTIONS and not channel.urgent_only
                    else 0
                ),
                compress=found.compresses,
            )
        except OSError as error:
            raise LinkError(f"no channel: {error.strerror}") from None
        log.info("page server %s: connected (%s)", channel.server.name, _who(found))
        with self._planning():
            self.pool.connected(channel, features, time.monotonic(), answered=found.answered)

    async def _hear(self, channel: Channel, connection: _Connection) -> None:
        """What the engine tells of a channel, until the connection ends. Raises LinkError, RemoteProtocolError."""
        assert connection.engine is not None
        while True:
            await anyio.wait_readable(connection.engine.event_fd)
            with self._planning():
                for event in connection.engine.events():
                    if event.kind is ChannelEventKind.ENDED:
                        self._raise_end(connection, event)
                    if event.kind is ChannelEventKind.CLOSED:
                        self._hear_status(channel, event.status)
                        return
                    self._heard(channel, connection, event)

    def _heard(self, channel: Channel, connection: _Connection, event: ChannelEvent) -> None:
        match event.kind:
            case ChannelEventKind.ARRIVED:
                self.pool.arrived(event.tag, event.dump_addr, event.nr_pages)
            case ChannelEventKind.REFUSED:
                since = event.since / NS_PER_S
                pages = Outstanding(event.tag, event.dump_addr, event.nr_pages, since, event.reported)
                self.pool.refused(channel, pages, time.monotonic())
            case ChannelEventKind.HEARD:
                self.pool.heard(channel)
            case ChannelEventKind.BUDGET_SPENT if connection.turn is not None:
                connection.turn.pages = event.nr_pages
                connection.turn.over.set()
                connection.turn = None

    def _raise_end(self, connection: _Connection, event: ChannelEvent) -> None:
        assert connection.carrier is not None
        at_boundary = event.at_boundary and connection.carrier.at_boundary
        if event.status == errno.ESTALE:
            raise CompletedError(ELSEWHERE)
        if event.status == errno.EPROTO:
            raise RemoteProtocolError("the page server answers what it was not asked for")
        failure = connection.carrier.failure
        reset = os.strerror(errno.ECONNRESET)
        reason = os.strerror(event.status) if event.status else str(failure or "")
        connection.hung_up = at_boundary and reason in {"", reset}
        if failure is not None:
            raise failure
        raise LinkError(reason or (CLOSED if at_boundary else CUT_SHORT))

    def _hear_status(self, channel: Channel, status: int) -> None:
        """Of the answer to CLOSE."""
        if status == wire.ELSEWHERE:
            self._completed.set()
        elif status:
            log.warning("%s: status %d at the end", channel.server.name, status)

    def end(self, channel: Channel, reason: str) -> None:
        """A channel is no more, or is not to be: the pool has what it leaves unanswered."""
        connection = self._connections[channel]
        with self._planning():
            oldest = None
            if connection.engine is not None:
                oldest = self._last_words(channel, connection, connection.engine)
            now = time.monotonic()
            self.pool.ended(channel, reason, now, oldest=oldest, hung_up=connection.hung_up)
            self._past[channel.server] = self._counted(channel.server, [connection])
            del self._connections[channel]
        if connection.turn is not None:
            connection.turn.over.set()
        if connection.engine is not None:
            connection.engine.close()
        connection.closed.set()

    def _last_words(
        self, channel: Channel, connection: _Connection, engine: EngineChannel
    ) -> Outstanding | None:
        """What it leaves, and what it has said of pages and nobody has heard: nothing else tells of a refused one.

        Returns what should have come next.
        """
        engine.pause(paused=True)
        self.pool.adopt(channel, _outstanding(engine), time.monotonic())
        while events := engine.events():
            for event in events:
                if event.kind in {ChannelEventKind.ARRIVED, ChannelEventKind.REFUSED}:
                    self._heard(channel, connection, event)
        return next(iter(_outstanding(engine)), None)

    def _counted(self, server: Server, connections: Iterable[_Connection] | None = None) -> ServerStats:
        """What has come on channels that are no more, and on `connections`; None: on all that there are."""
        if connections is None:
            connections = [self._connections[channel] for channel in server.channels]
        stats = replace(self._past[server], connected=server.connected, connections=server.connections)
        for connection in connections:
            if connection.engine is None or connection.carrier is None:
                continue
            state = connection.engine.state()
            stats.requests += state.requests
            stats.pages += state.pages
            stats.bytes += state.pages * PAGE_SIZE
            stats.compressed_pages += connection.carrier.compressed_pages
            stats.compressed_bytes += connection.carrier.compressed_bytes
            stats.round_trip = state.round_trip / NS_PER_S or stats.round_trip
        return stats


def check_certificates(servers: Sequence[PageServerAddress], options: RemoteOptions | None) -> None:
    """Raises TlsError when a server wants certificates, and ours can't be used."""
    if any(isinstance(server, TcpServer) and server.tls for server in servers):
        ((options and options.tls) or TlsFiles()).client_context()


@asynccontextmanager
async def open_remote(
    servers: Sequence[PageServerAddress],
    on_lost: OnLost,
    options: RemoteOptions | None = None,
    *,
    engine: Channels,
) -> AsyncIterator[RemotePages]:
    """Connections to `servers`, all with the same content, while the context lasts; any event loop of anyio's.

    A server that can't be reached is tried again and again; nothing is raised for it. Raises TlsError when the
    certificates can't be used.
    """
    options = options or RemoteOptions()
    check_certificates(servers, options)
    client = int.from_bytes(os.urandom(8), "little")
    sources = [PageServerSource(server, options, client) for server in servers]
    checkpoint = options.checkpoint
    async with anyio.create_task_group() as group:
        remote = RemotePages(
            sources,
            on_lost,
            group=group,
            engine=engine,
            deadline=options.deadline,
            checked=checkpoint is not None,
            told_at_the_end=bool(checkpoint and checkpoint.by_dumptool),
        )
        group.start_soon(remote.run)
        yield remote
        await remote.close()
        group.cancel_scope.cancel()


def _outstanding(engine: EngineChannel) -> list[Outstanding]:
    """What has not come on a channel, the oldest first; from here on its arrival is told."""
    return [
        Outstanding(one.tag, one.dump_addr, one.nr_pages, one.since / NS_PER_S, one.reported)
        for one in engine.outstanding()
    ]


def _who(found: Connected) -> str:
    return "lazypages" if found.features else found.layout.value
