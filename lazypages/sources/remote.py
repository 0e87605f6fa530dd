"""Pages from one or several page servers with the same content: carries out the actions that pool.py plans.

A connection to a server becomes a channel of the engine's, which requests the pages of faults and of the background,
and places them. The channel's events (csrc/serve/channel.h) go to the pool.
"""

from __future__ import annotations

import enum
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, Unpack

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from lazypages.engine.channel import Channel as EngineChannel
from lazypages.engine.channel import ChannelEvent, ChannelEventKind, ChannelOptions
from lazypages.engine.task import ServedTask
from lazypages.errors import LazyPagesError
from lazypages.net import wire
from lazypages.net.link import HopelessError, LinkError
from lazypages.net.tls import TlsError, TlsFileError, TlsFiles
from lazypages.net.url import PageServerAddress, TcpServer
from lazypages.net.wire import PAGE_SIZE, CloseFlags, Features, RemoteProtocolError
from lazypages.sources import pool as planning
from lazypages.sources.base import Carrier, Connected, Source
from lazypages.sources.page_server import PageServerSource, RemoteOptions
from lazypages.sources.pool import Channel, Load, Outstanding, Pool, Server, log
from lazypages.sources.shortage import made

NS_PER_S: Final = 1e9
CLOSE_TIMEOUT: Final = 5.0  # s for the servers' answers to CLOSE

# s until readiness is signalled whatever is known of the servers; and s that a server of CRIU's, which delays its first
# answer by 200 ms, is waited for.
FIRST_ATTEMPTS: Final = 3.0
FIRST_ANSWER: Final = 0.02

CLOSED: Final = "closed by the server"
CUT_SHORT: Final = "closed in the middle of an answer"
ELSEWHERE: Final = "another destination has completed this dump and runs it"

#: Called for lost pages: the task's pid, the address at dump time, the number of pages, the reason.
OnLost = Callable[[int, int, int, str], None]


class Channels(Protocol):
    """A factory of channels: the engine."""

    def channel(self, fd: int, **options: Unpack[ChannelOptions]) -> EngineChannel:
        """See Engine.channel."""


class CompletedError(LinkError):
    """The server has reported that another destination has completed."""


class _Ending(enum.Enum):
    """What CLOSE reports to the servers."""

    COMPLETE = "complete"
    UNUSED = "unused"
    ABANDONED = "abandoned"


@dataclass(slots=True)
class ServerStats:
    """Counts of one server since the start. ``bytes``: size of ``pages``. ``round_trip``: seconds, None before the
    first answer."""

    address: str
    connected: bool = False
    connections: int = 0
    requests: int = 0
    pages: int = 0
    bytes: int = 0
    compressed_pages: int = 0  # of ``pages``
    compressed_bytes: int = 0  # their size on the wire
    round_trip: float | None = None


@dataclass(slots=True, eq=False)
class _Budget:
    """Permission for a task to transfer background pages on a channel. ``pages``: those that were requested with it."""

    spent: anyio.Event = field(default_factory=anyio.Event)
    pages: int = 0


@dataclass(slots=True, eq=False)
class _Connection:
    """The engine's channel and the network connection of a channel of the pool's."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    carrier: Carrier | None = None
    engine: EngineChannel | None = None
    budget: _Budget | None = None
    hung_up: bool = False  # the peer has closed between two answers
    closed: anyio.Event = field(
        default_factory=anyio.Event
    )  # the answer to CLOSE has come, or the channel has ended


@dataclass(slots=True)
class _First:
    """The first attempts to connect to a server. ``reached``: when a connection was established. ``reason``: why the
    last attempt failed. ``hopeless``: the next one would fail, too."""

    reached: float = float("inf")
    reason: str = ""
    hopeless: bool = False


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
        by_dumptool: bool = False,
    ) -> None:
        self._engine = engine
        self._on_lost = on_lost
        self._group = group
        self._by_dumptool = by_dumptool
        servers = [Server(source.name, source.once, source.kind) for source in sources]
        self.pool = Pool(servers, time.monotonic(), deadline=deadline, checked=checked)
        self._sources = dict(zip(servers, sources, strict=True))
        self._past = {server: ServerStats(server.name) for server in servers}  # of channels that have ended
        self._connections: dict[Channel, _Connection] = {}
        self._queue = anyio.Lock()  # callers of `bring` wait for a channel first in, first out
        self._free = anyio.Event()
        self._happened = anyio.Event()
        self._ending = _Ending.COMPLETE
        self._completed = anyio.Event()
        self._first = {server: _First() for server in servers}
        self._began = time.monotonic()
        #: Set when no server can ever be used, unless the user changes something.
        self.hopeless = anyio.Event()

    # -- before the first restore ----------------------------------------------------------------------------

    async def first_attempts(self) -> list[str]:
        """Waits until it is known of each server whether it can be used now, but no longer than FIRST_ATTEMPTS seconds.

        Returns one line for each server that can't.
        """
        self._began = time.monotonic()
        for server in self.pool.servers:
            server.complained = self._began  # the caller reports the first failure
        with anyio.move_on_after(FIRST_ATTEMPTS):
            while not all(self._is_known(server) for server in self.pool.servers):
                await anyio.sleep(0.002)
        reasons = self.reasons()
        for server in self.pool.servers:
            if not self._first[server].reason:  # the caller reports nothing: the log must
                server.complained = float("-inf")
        return reasons

    def reasons(self) -> list[str]:
        """One line for each server that could not be used so far: why."""
        return [
            f"{server.title}: {first.reason or f'no connection within {FIRST_ATTEMPTS:g} s'}"
            + (
                ""
                if first.hopeless or server.over
                else "; trying again, and tasks that are restored now wait for it"
            )
            for server, first in self._first.items()
            if not server.has_answered and (first.reason or first.reached == float("inf"))
        ]

    @property
    def is_hopeless(self) -> bool:
        """Whether `hopeless` is set, and no server has answered since."""
        return self.hopeless.is_set() and not any(server.has_answered for server in self.pool.servers)

    def _is_known(self, server: Server) -> bool:
        first = self._first[server]
        # dumptool's server answers at once; the time to connect shows how far away a server is
        near = FIRST_ANSWER + 2 * (first.reached - self._began)
        patience = FIRST_ATTEMPTS if self._by_dumptool else near
        return bool(server.has_answered or first.reason or time.monotonic() - first.reached > patience)

    def _failed(self, server: Server, error: LazyPagesError) -> None:
        """A connection has failed, or an attempt to connect, before the server has answered anything on it."""
        first = self._first[server]
        first.reason = str(error)
        first.hopeless = server.over or (
            isinstance(error, HopelessError | TlsError | RemoteProtocolError)
            and not isinstance(error, TlsFileError)  # they were read at the start
        )
        if not any(one.has_answered for one in self.pool.servers) and all(
            one.hopeless for one in self._first.values()
        ):
            self.hopeless.set()

    # -- for the tasks ---------------------------------------------------------------------------------------

    def request(self, ranges: Iterable[tuple[int, int, int]], *, urgent: bool) -> None:
        """Request ranges of (pid, address, pages) that the engine could not request by itself.

        Requests of faults are `urgent`: they are sent before all others. Pass neighbouring ranges in one call, so that
        they become one request.
        """
        with self._planning():
            self.pool.want(ranges, time.monotonic(), urgent=urgent)

    def forget(self, pid: int) -> None:
        """Remove all requests of this task."""
        with self._planning():
            self.pool.forget(pid)

    async def bring(self, task: ServedTask, max_bytes: int) -> int:
        """Transfer up to `max_bytes` of pages of `task` in the background; waits for a free channel.

        Returns the number of pages requested. Fewer than `max_bytes` (0 at the end): no more were pending at that time,
        or the channel was paused or ended.
        """
        async with self._queue:
            while (connection := self._free_connection()) is None:
                self._free = anyio.Event()
                await self._free.wait()
            connection.budget = budget = _Budget()
            assert connection.engine is not None
            connection.engine.set_budget(task, max_bytes)
        await budget.spent.wait()
        return budget.pages

    def stats(self) -> list[ServerStats]:
        """Counts per server, in the order of `sources`."""
        return [self._counted(server) for server in self.pool.servers]

    # -- the end ---------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """At the end only close the connections: CLOSE would make a server end the frozen task whose pages it has."""
        self._ending = _Ending.ABANDONED

    def unused(self) -> None:
        """At the end report that no restore has come. A server that does not know that report gets no CLOSE."""
        self._ending = _Ending.UNUSED

    async def wait_completed_elsewhere(self) -> None:
        """Waits until a server reports that another destination has all of the dump."""
        await self._completed.wait()

    @property
    def can_be_told(self) -> bool:
        """Whether the end can be reported. dumptool's server must be connected now; others must have been connected."""
        if self._by_dumptool:
            return any(channel.up for channel in self.pool.channels())
        return any(server.connections for server in self.pool.servers)

    @property
    def completed_elsewhere(self) -> bool:
        """Whether a server has reported that; final only after `close`."""
        return self._completed.is_set()

    # -- for open_remote -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the pool's timers until it is cancelled."""
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
        """Send CLOSE to all servers, and wait up to CLOSE_TIMEOUT for their answers."""
        self.pool.close()
        if self._ending is _Ending.ABANDONED:
            return
        outcome = CloseFlags.COMPLETE if self._ending is _Ending.COMPLETE else CloseFlags.UNUSED
        channels = [channel for channel in self.pool.channels() if channel.up]
        if self._ending is _Ending.UNUSED:
            channels = [channel for channel in channels if channel.agreed]
        connections = [self._connections[channel] for channel in channels]
        for channel, connection in zip(channels, connections, strict=True):
            assert connection.engine is not None
            flags = outcome if channel.agreed else wire.NO_CLOSE_FLAGS
            connection.engine.finish(force=channel.server.once, flags=flags)
        with anyio.move_on_after(CLOSE_TIMEOUT, shield=True):
            for connection in connections:
                await connection.closed.wait()

    # -- the pool's actions ----------------------------------------------------------------------------------

    @contextmanager
    def _planning(self) -> Iterator[None]:
        """The block passes events to the pool; at its end, plans and carries out the pool's actions."""
        self._update_loads()
        yield
        self.pool.plan(time.monotonic())
        while actions := self.pool.actions():
            for action in actions:
                self._do(action)
        if not self._free.is_set() and self._free_connection():
            self._free.set()
        self._happened.set()

    def _update_loads(self) -> None:
        """Copies the state of the engine's channels to those of the pool."""
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
            case planning.Pause(channel, paused):
                self._channel_of(channel).pause(paused=paused)
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
            if connection.budget is None:
                return connection
        return None

    # -- channels --------------------------------------------------------------------------------------------

    async def _run_channel(self, channel: Channel) -> None:
        """Connects, and handles the channel's events until the connection ends."""
        connection = self._connections[channel]
        reason = ""
        try:
            with connection.scope:
                try:
                    await self._connect(channel, connection)
                    await self._handle_events(channel, connection)
                except (LinkError, RemoteProtocolError, TlsError) as error:
                    if not channel.has_answered:
                        self._failed(channel.server, error)
                    raise
            if connection.scope.cancelled_caught:
                reason = "replaced by another connection"
        except CompletedError as error:
            reason = str(error)
            self._completed.set()
        except (LinkError, RemoteProtocolError, TlsError) as error:
            reason = str(error)
        except Exception as error:  # the other connections and all tasks go on
            reason = f"internal error: {error!r}"
            log.exception("%s: %s", channel.server.title, reason)
        finally:
            self.end(channel, reason)
            if connection.carrier is not None:
                with anyio.CancelScope(shield=True):
                    await connection.carrier.aclose()

    async def _connect(self, channel: Channel, connection: _Connection) -> None:
        """Raises LinkError, TlsError, RemoteProtocolError."""

        def reached() -> None:
            now = time.monotonic()
            self.pool.reached(channel, now)
            first = self._first[channel.server]
            first.reached = min(first.reached, now)

        found = await self._sources[channel.server].connect(
            spare=channel.spare, urgent_only=channel.urgent_only, reached=reached
        )
        connection.carrier = found.carrier
        features = found.features

        def open_channel() -> EngineChannel:
            return self._engine.channel(
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

        connection.engine = await made(open_channel, "a channel", channel.server.title, reached)
        pending = "" if found.answered else "; it has not answered yet"
        log.info("%s: connected (%s)%s", channel.server.title, _describe(found), pending)
        with self._planning():
            self.pool.connected(channel, features, time.monotonic(), answered=found.answered)

    async def _handle_events(self, channel: Channel, connection: _Connection) -> None:
        """Handles a channel's events until the connection ends. Raises LinkError, RemoteProtocolError."""
        assert connection.engine is not None
        while True:
            await anyio.wait_readable(connection.engine.event_fd)
            with self._planning():
                for event in connection.engine.events():
                    if event.kind is ChannelEventKind.ENDED:
                        self._raise_end(connection, event)
                    if event.kind is ChannelEventKind.CLOSED:
                        self._handle_status(channel, event.status)
                        return
                    self._handle_event(channel, connection, event)

    def _handle_event(self, channel: Channel, connection: _Connection, event: ChannelEvent) -> None:
        match event.kind:
            case ChannelEventKind.ARRIVED:
                self.pool.arrived(event.tag, event.dump_addr, event.nr_pages)
            case ChannelEventKind.REFUSED:
                since = event.since / NS_PER_S
                pages = Outstanding(event.tag, event.dump_addr, event.nr_pages, since, event.reported)
                self.pool.refused(channel, pages, time.monotonic())
            case ChannelEventKind.HEARD:
                self.pool.heard(channel)
            case ChannelEventKind.BUDGET_SPENT if connection.budget is not None:
                connection.budget.pages = event.nr_pages
                connection.budget.spent.set()
                connection.budget = None

    def _raise_end(self, connection: _Connection, event: ChannelEvent) -> None:
        assert connection.carrier is not None
        at_boundary = event.at_boundary and connection.carrier.at_boundary
        if event.status == errno.ESTALE:
            raise CompletedError(ELSEWHERE)
        if event.status == errno.EPROTO:
            raise RemoteProtocolError("the page server's answer does not match the request")
        failure = connection.carrier.failure
        reset = os.strerror(errno.ECONNRESET)
        # A translator's failure comes first: its end of the socket pair resets if it had unread requests.
        reason = str(failure) if failure else os.strerror(event.status) if event.status else ""
        connection.hung_up = at_boundary and reason in {"", reset}
        if failure is not None:
            raise failure
        raise LinkError(reason or (CLOSED if at_boundary else CUT_SHORT))

    def _handle_status(self, channel: Channel, status: int) -> None:
        """Handles the status in the answer to CLOSE."""
        if status == wire.ELSEWHERE:
            self._completed.set()
        elif status:
            log.warning("%s: answered CLOSE with status %d", channel.server.title, status)

    def end(self, channel: Channel, reason: str) -> None:
        """Closes a channel, connected or not, and returns its unanswered requests to the pool."""
        connection = self._connections[channel]
        with self._planning():
            oldest = None
            if connection.engine is not None:
                oldest = self._drain(channel, connection, connection.engine)
            now = time.monotonic()
            self.pool.ended(channel, reason, now, oldest=oldest, hung_up=connection.hung_up)
            self._past[channel.server] = self._counted(channel.server, [connection])
            del self._connections[channel]
        if connection.budget is not None:
            connection.budget.spent.set()
        if connection.engine is not None:
            connection.engine.close()
        connection.closed.set()

    def _drain(self, channel: Channel, connection: _Connection, engine: EngineChannel) -> Outstanding | None:
        """Takes over the unanswered requests of a channel, and handles the events of pages that are still queued:
        a refusal is reported only once.

        Returns the oldest unanswered request.
        """
        engine.pause(paused=True)
        self.pool.adopt(channel, _outstanding(engine), time.monotonic())
        while events := engine.events():
            for event in events:
                if event.kind in {ChannelEventKind.ARRIVED, ChannelEventKind.REFUSED}:
                    self._handle_event(channel, connection, event)
        return next(iter(_outstanding(engine)), None)

    def _counted(self, server: Server, connections: Iterable[_Connection] | None = None) -> ServerStats:
        """Counts of the channels that have ended and of `connections`; None: of all of the server's connections."""
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
    """Raises TlsError if a server needs TLS and our certificates can't be used."""
    if any(isinstance(server, TcpServer) and server.tls for server in servers):
        ((options and options.tls) or TlsFiles()).client_context()


@asynccontextmanager
async def open_remote(
    servers: Sequence[PageServerAddress],
    on_lost: OnLost,
    options: RemoteOptions | None = None,
    *,
    engine: Channels,
    others: Sequence[Source] = (),
) -> AsyncIterator[RemotePages]:
    """Keeps connections to `servers` and `others`, all with the same content, while the context lasts.

    An unreachable server raises nothing and is tried again. Raises TlsError if the certificates can't be used.
    """
    options = options or RemoteOptions()
    check_certificates(servers, options)
    client = int.from_bytes(os.urandom(8), "little")
    sources: list[Source] = [*others, *(PageServerSource(server, options, client) for server in servers)]
    checkpoint = options.checkpoint
    async with anyio.create_task_group() as group:
        remote = RemotePages(
            sources,
            on_lost,
            group=group,
            engine=engine,
            deadline=options.deadline,
            checked=checkpoint is not None,
            by_dumptool=bool(checkpoint and checkpoint.by_dumptool),
        )
        group.start_soon(remote.run)
        yield remote
        await remote.close()
        group.cancel_scope.cancel()


def _outstanding(engine: EngineChannel) -> list[Outstanding]:
    """The unanswered requests of a channel, oldest first; from now on the engine reports the arrival of their pages."""
    return [
        Outstanding(one.tag, one.dump_addr, one.nr_pages, one.since / NS_PER_S, one.reported)
        for one in engine.outstanding()
    ]


def _describe(found: Connected) -> str:
    return "lazypages" if found.features else found.layout.value
