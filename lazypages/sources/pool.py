"""Plans connections to page servers, and the requests that the engine can't handle alone.

Pure: no socket, no clock; events in, actions out. The caller passes the time with each event, in seconds.

The engine requests the pages of faults and of the background on every usable *channel* (a connection to a server):
csrc/serve/channel.h. It reports the rest here: a fault while no channel is usable, a page that a server refuses, a
silent channel, the end of a channel.

CRIU's server accepts one connection in its life, and ends its frozen tasks when that closes (unless dumped with -R). So
a silent channel is closed only after the server has answered on another one. Our own server accepts any number of
connections: faults get a channel of their own.

A refused page is requested again: from the other servers at once, from the same server after a growing pause. A page
is lost when every server has reported several times that it can't give it (CRIU's server does not report, it closes
the connection), or after the deadline, if there is one. No page ever becomes zeros here.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from lazypages.net import wire
from lazypages.net.wire import PAGE_SIZE, Features
from lazypages.sources.backlog import Backlog, Wanted
from lazypages.wording import count

log = logging.getLogger("lazypages")

# For each request CRIU's server copies all pages before the requested one in its pipe (up to 1 MiB); without
# CAP_SYS_RESOURCE it fails past the 16th page of a pipe (docs/criu.md, "Page server protocol").
CRIU_MAX_PAGES: Final = 64
OUR_MAX_PAGES: Final = 256
URGENT_MAX_PAGES: Final = 16  # pages of neighbouring faults in one request
MIN_PAGES: Final = 4  # of a background request
ALONE_WINDOW: Final = 1 << 20  # bytes: least background window of a channel without faults
URGENT_WINDOW: Final = 4 << 20  # bytes of faults in flight on one channel, at most

# A channel with unanswered requests is silent after SILENCE seconds without a byte, and at least so many round trips.
SILENCE: Final = 3.0
SILENT_ROUND_TRIPS: Final = 20
BACKOFF: Final = (0.02, 5.0)  # s: first and longest pause before a server is tried again
REFUSED_BACKOFF: Final = (0.2, 10.0)  # the same for a page that all servers refuse
# Rounds of refusals by all servers after which a page is lost: an error of a disk, or of reading a frozen task, may be
# temporary. With the pauses above that is about 3 s.
DENIED_ROUNDS: Final = 5
# s in which no refused page is requested on a new connection that has delivered nothing: the server may close it.
SUSPECT_PAUSE: Final = 0.5
LOOK: Final = 2e-6  # s that the check of one refused page takes
REFUSED_WINDOW: Final = 256  # requests for refused pages in flight on one channel
WARN_INTERVAL: Final = 30.0  # s
TICK: Final = 0.1  # s between two checks, while there are channels or requests
SHORTEST_TICK: Final = 0.01  # s between two checks, at least

UNANSWERED: Final = (
    "; it has answered nothing so far: if its CRIU is not the one that wrote the images, name its protocol with "
    "--page-server-protocol"
)
DENIED: Final = "no source can give it: see above, or the log of the page server"


class Load(NamedTuple):
    """Traffic of a channel. ``requests``: unanswered. ``urgent``, ``background``: bytes in flight for faults and for
    the background. ``limit``: bytes of background that may be in flight.

    ``round_trip``: s, 0 if not known. ``heard``: time of the last byte, or of the oldest unanswered request if that is
    later, s. ``oldest``: earliest time since which a thread waits for one of the pages, s; 0: no thread waits.
    ``pages``: received since the start.
    """

    requests: int = 0
    urgent: int = 0
    background: int = 0
    limit: int = 1
    round_trip: float = 0.0
    heard: float = 0.0
    oldest: float = 0.0
    pages: int = 0


@dataclass(slots=True, eq=False)
class Channel:
    """One connection to a server, from the attempt to connect until its end. The caller updates ``load``."""

    server: Server
    urgent_only: bool
    spare: bool  # another channel to the server exists, and may recover
    heard: float
    load: Load = field(default_factory=Load)
    features: Features = wire.NO_FEATURES
    greeted: bool = False  # the server's protocol is known
    answered: bool = False  # the peer has sent something, so it is a page server
    up: bool = False
    silent: bool = False
    paused: bool = False
    up_since: float = 0.0
    # a refused page that is requested alone, so that no other request fails if the server closes
    reserved: Wanted | None = None

    @property
    def usable(self) -> bool:
        return self.up and not self.silent and self.reserved is None

    @property
    def ours(self) -> bool:
        return bool(self.features)

    @property
    def agreed(self) -> bool:
        """Whether the server has confirmed that it has our checkpoint."""
        return bool(self.features & Features.CHECKPOINT)

    @property
    def used_up(self) -> bool:
        """Whether this is the single connection that a server of CRIU's accepts."""
        return self.greeted and not self.ours and self.has_answered

    @property
    def has_answered(self) -> bool:
        return self.answered or self.load.pages > 0

    @property
    def expected_wait(self) -> float:
        """Estimated seconds until the answer to a request sent now."""
        load = self.load
        return load.round_trip * (1 + (load.urgent + load.background) / load.limit)


@dataclass(slots=True)
class _Attempts:
    """Attempts to connect to a server: one count for its background channel, one for its channel for faults."""

    failures: int = 0
    retry_at: float = 0.0


@dataclass(eq=False)
class Server:
    """A page server, or another source. ``once``: it accepts a single connection in its life."""

    name: str
    once: bool = False
    kind: str = "page server"
    channels: list[Channel] = field(default_factory=list)
    tried: bool = False  # a connection was planned
    connections: int = 0  # established since the start
    has_answered: bool = False  # on any connection: it is a page server
    many: bool = False  # accepts more than one connection
    used_up: bool = False  # a server of CRIU's that has had its single connection
    given_up: bool = False  # not connected to again because of that; logged
    complained: float = float("-inf")
    attempts: dict[bool, _Attempts] = field(default_factory=lambda: {False: _Attempts(), True: _Attempts()})

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.kind} {self.name}"

    @property
    def connected(self) -> bool:
        return any(channel.up for channel in self.channels)

    @property
    def over(self) -> bool:
        """Whether no further connection will be attempted.

        The number of an inherited socket is used once: later it may be that of another socket.
        """
        return self.given_up or (self.once and self.tried)


class Outstanding(NamedTuple):
    """Pages that the engine has requested on a channel. ``since``: when a thread began to wait for them, s; 0: no
    thread waits. ``known``: they are in the backlog.
    """

    pid: int
    start: int
    nr_pages: int
    since: float
    known: bool


class Connect(NamedTuple):
    """Connect this new channel; then call `reached`, `connected` or `ended`."""

    channel: Channel


class GiveUp(NamedTuple):
    """Close the connection; then call `ended`."""

    channel: Channel


class Pause(NamedTuple):
    """Pause or resume the channel: on a paused one, the engine sends only the requests of `Ask`."""

    channel: Channel
    paused: bool


class TakeOver(NamedTuple):
    """Call `took_over` with the unanswered requests of the channel."""

    channel: Channel


class Ask(NamedTuple):
    """Request these pages on the channel; then call `arrived` or `refused`."""

    channel: Channel
    pid: int
    start: int
    nr_pages: int
    urgent: bool


class Lost(NamedTuple):
    """No server gives these pages."""

    pid: int
    start: int
    nr_pages: int
    reason: str


Action = Connect | GiveUp | Pause | TakeOver | Ask | Lost


class Pool:
    """Servers with the same content, their channels, and the backlog of requests. Addresses: at dump time, in bytes.

    ``checked``: after the connection to a server of CRIU's has ended, do not connect to its address again: the next
    server there may have another dump. ``deadline``: seconds after which pages that no server gives are lost; None:
    never. ``chance``: returns a random number between 0 and 1.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        now: float,
        *,
        deadline: float | None = None,
        checked: bool = False,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.servers = servers
        self.backlog = Backlog()
        self._deadline = deadline
        self._checked = checked
        self._chance = chance
        self._actions: list[Action] = []
        self._refused_at = 0.0  # time of the next check of refused pages
        self._warned = now
        self._ticked = now
        self._closing = False

    def actions(self) -> list[Action]:
        """Takes the actions that the caller must carry out, in this order."""
        actions, self._actions = self._actions, []
        return actions

    def due(self, now: float) -> float | None:
        """Seconds until `tick` must be called, if nothing else happens before; None: never."""
        moments = [self._ticked + TICK] if self.backlog or any(self.channels()) else []
        for server in self.servers:
            moments += [
                max(server.attempts[urgent_only].retry_at, self._ticked + SHORTEST_TICK)
                for urgent_only in ((False, True) if server.many else (False,))
                if not server.over and not self._channels_for(server, urgent_only=urgent_only)
            ]
        return max(min(moments) - now, 0.0) if moments else None

    def channels(self) -> Iterator[Channel]:
        for server in self.servers:
            yield from server.channels

    def background_channels(self) -> list[Channel]:
        return [channel for channel in self.channels() if channel.usable and not channel.urgent_only]

    # -- events ---------------------------------------------------------------------------------------------

    def want(self, ranges: Iterable[tuple[int, int, int]], now: float, *, urgent: bool) -> None:
        """Adds requests for ranges of (pid, address, pages). Pages that are in the backlog are not requested twice."""
        if not self.backlog:
            self._warned = now
        for pid, address, nr_pages in ranges:
            self.backlog.add(pid, address, address + nr_pages * PAGE_SIZE, urgent=urgent, now=now)
        self.plan(now)

    def forget(self, pid: int) -> None:
        """Removes all requests of this task."""
        self.backlog.drop_task(pid)

    def reached(self, channel: Channel, now: float) -> None:
        """The peer has accepted the connection, and has sent nothing yet."""
        channel.heard = now

    def connected(self, channel: Channel, features: Features, now: float, *, answered: bool) -> None:
        """The channel is connected, and the server's features are known."""
        if not channel.server.connected:
            self.backlog.ask_again(channel.server)
        channel.up, channel.greeted, channel.answered = True, True, answered
        channel.features = features
        channel.heard = channel.up_since = now
        channel.server.many = bool(features & Features.CONNECTIONS)
        channel.server.connections += 1
        channel.server.has_answered = channel.server.has_answered or answered

    def arrived(self, pid: int, start: int, nr_pages: int) -> None:
        """Pages of the backlog have arrived in their task."""
        self.backlog.arrived(pid, start, start + nr_pages * PAGE_SIZE)

    def refused(self, channel: Channel, pages: Outstanding, now: float) -> None:
        """The server has reported that it can't give the first of these pages."""
        self.adopt(channel, [pages], now)
        if channel.reserved is not None and channel.reserved.owner is channel:
            channel.reserved = None
        for wanted in self._owned(channel, pages):
            self._refuse(channel, wanted, said=True)

    def heard(self, channel: Channel) -> None:
        """A byte has come on a paused channel."""
        channel.silent = False

    def adopt(self, channel: Channel, outstanding: Iterable[Outstanding], now: float) -> None:
        """Adds requests that the engine has sent on `channel` by itself to the backlog."""
        for pages in outstanding:
            if not pages.known:
                end = pages.start + pages.nr_pages * PAGE_SIZE
                since, urgent = pages.since or now, bool(pages.since)
                self.backlog.add(pages.pid, pages.start, end, urgent=urgent, now=since, owner=channel)

    def took_over(self, channel: Channel, outstanding: Iterable[Outstanding], now: float) -> None:
        """The answer to TakeOver: adds these to the backlog, and queues them again if the channel is silent."""
        self.adopt(channel, outstanding, now)
        if channel.silent:
            self.backlog.give_back(channel)
        self.plan(now)

    def ended(
        self,
        channel: Channel,
        reason: str,
        now: float,
        *,
        oldest: Outstanding | None = None,
        hung_up: bool = False,
    ) -> None:
        """A channel, connected or not, has ended. ``oldest``: its oldest unanswered request.

        ``hung_up``: the server has closed between two answers, as CRIU's does when it lacks the page of the oldest
        request.
        """
        server, answered = channel.server, channel.has_answered
        was_up, was_good, channel.up = channel.up, channel.up and not channel.silent, False
        server.used_up = server.used_up or channel.used_up
        if reason and not self._closing:
            hint = UNANSWERED if was_up and not answered else ""
            self._complain(server, reason + hint, now, was_up=was_up and answered)
        if oldest is not None and answered and hung_up:
            for wanted in self._owned(channel, oldest)[:1]:
                self._refuse(channel, wanted, said=False)
        self.backlog.give_back(channel)
        server.channels.remove(channel)
        attempts = server.attempts[channel.urgent_only]
        if was_up and answered:
            attempts.failures = 0
        if was_good and not any(
            other.up for other in self._channels_for(server, urgent_only=channel.urgent_only)
        ):
            attempts.retry_at = now + self._pause(BACKOFF, attempts.failures)

    def tick(self, now: float) -> None:
        """Checks for silent channels, for pages that all servers refuse, and for pages past the deadline."""
        self._ticked = now
        for channel in self.channels():
            if channel.up:
                self._check_silence(channel, now)
            oldest = channel.load.oldest
            if self._deadline is not None and oldest and now - oldest > self._deadline:
                self._actions.append(TakeOver(channel))
        for wanted in [wanted for wanted in self.backlog.refused if self._denied(wanted)]:
            self._mark_lost(wanted, DENIED)
        if self._deadline is not None:
            for wanted in [wanted for wanted in self.backlog if now - wanted.since > self._deadline]:
                self._mark_lost(wanted, f"no page server gave it within {self._deadline:g} s")
        oldest = min((wanted.since for wanted in self.backlog), default=now)
        if now - max(oldest, self._warned) > WARN_INTERVAL:
            self._warned = now
            pages = sum(wanted.nr_pages for wanted in self.backlog)
            log.warning("still waiting for %s, longest %.0f s", count(pages, "page"), now - oldest)
        self.plan(now)

    def close(self) -> None:
        """Plans nothing more, and does not log the end of a channel: no server answers a request behind CLOSE."""
        self._closing = True

    def plan(self, now: float) -> None:
        """Plans connections and requests. The caller must call it after any event."""
        if self._closing:
            return
        for server in self.servers:
            server.has_answered = server.has_answered or any(one.load.pages for one in server.channels)
            for urgent_only in (False, True):
                self._plan_connections(server, now, urgent_only=urgent_only)
        self._plan_requests(now)

    # -- connections -------------------------------------------------------------------------------------------

    def _plan_connections(self, server: Server, now: float, *, urgent_only: bool) -> None:
        """Keeps one good channel to the server (or a second one, for faults only)."""
        channels = self._channels_for(server, urgent_only=urgent_only)
        good = [channel for channel in channels if channel.up and not channel.silent]
        attempts = server.attempts[urgent_only]
        if good:
            for channel in channels:
                if channel is not good[-1]:
                    self._actions.append(GiveUp(channel))
            return
        if len(channels) > 1 or now < attempts.retry_at or (urgent_only and not server.many):
            return
        if not all(channel.silent or now - channel.heard > SILENCE for channel in channels):
            return
        if self._is_used_up(server) or server.over:
            return
        channel = Channel(server, urgent_only, spare=bool(channels), heard=now)
        server.channels.append(channel)
        server.tried = True
        self._actions.append(Connect(channel))
        attempts.failures += 1
        attempts.retry_at = now + self._pause(BACKOFF, attempts.failures)

    def _is_used_up(self, server: Server) -> bool:
        """Whether the server is CRIU's and has had its single connection: a server there now has another dump.

        That server would take our connection for its single one, and its dump would fail when we close it.
        """
        if not self._checked:
            return False
        if not server.channels and server.used_up and not server.given_up:
            server.given_up = True
            log.error(
                "page server %s: CRIU's page server accepts one connection, which has ended; a new server there may "
                "have another dump: not connecting again. Missing pages must come from another source (--source)",
                server.name,
            )
        return server.used_up or any(channel.used_up for channel in server.channels)

    def _check_silence(self, channel: Channel, now: float) -> None:
        load = channel.load
        channel.heard = load.heard or channel.heard
        patience = max(SILENCE, SILENT_ROUND_TRIPS * load.round_trip)
        silent = load.requests > 0 and now - channel.heard > patience
        if channel.silent and not silent:
            # All answers had arrived before it was found silent, and were waiting for a task: no byte will come.
            channel.silent = False
        elif silent and not channel.silent:
            hint = "" if channel.has_answered else UNANSWERED
            log.warning("%s: silent for %.1f s%s", channel.server.title, now - channel.heard, hint)
            channel.silent = True
            channel.reserved = None  # the page may be requested on another channel
            if channel.has_answered:
                channel.server.attempts[channel.urgent_only].failures = 0
            self._update_pause(channel)
            self._actions.append(TakeOver(channel))

    def _complain(self, server: Server, reason: str, now: float, *, was_up: bool) -> None:
        waiting = sum(1 for _ in self.backlog)
        level = logging.INFO
        if was_up or now - server.complained > WARN_INTERVAL:
            level, server.complained = logging.WARNING, now
        again = f"; {count(waiting, 'request')} pending" if waiting else ""
        again += ", trying again" if waiting and not server.over else ""
        log.log(level, "%s: %s%s", server.title, reason, again)

    # -- requests ----------------------------------------------------------------------------------------------

    def _plan_requests(self, now: float) -> None:
        backlog = self.backlog
        for channel in self.channels():
            if channel.reserved is not None and channel.reserved.gone:
                channel.reserved = None
            self._update_pause(channel)
        while backlog.queued_pages(urgent=True) and (fastest := self._urgent_channel()):
            if (wanted := backlog.take(URGENT_MAX_PAGES, fastest, urgent=True)) is None:
                break
            self._ask(fastest, wanted)
        if backlog.refused and now >= self._refused_at:
            # A truncated file may cost thousands of pages: limit the share of the time that the checks take.
            self._refused_at = now + LOOK * max(0, len(backlog.refused) - 100)
            self._plan_refused(now)
        if backlog.queued_pages(urgent=False):
            for channel in sorted(self.background_channels(), key=lambda channel: channel.load.background):
                self._plan_background(channel)

    def _urgent_channel(self) -> Channel | None:
        best, best_wait = None, 0.0
        for server in self.servers:
            channels = [channel for channel in server.channels if channel.usable]
            for channel in [channel for channel in channels if channel.urgent_only] or channels:
                wait = channel.expected_wait
                if channel.load.urgent < URGENT_WINDOW and (best is None or wait < best_wait):
                    best, best_wait = channel, wait
        return best

    def _background_limit(self, channel: Channel) -> int:
        """Bytes of background that may be in flight: few while a fault waits on the same channel; at least ALONE_WINDOW
        if faults have a channel of their own."""
        if any(other.urgent_only and other.up for other in channel.server.channels):
            return max(channel.load.limit, ALONE_WINDOW)
        return MIN_PAGES * PAGE_SIZE if channel.load.urgent else channel.load.limit

    def _plan_background(self, channel: Channel) -> None:
        largest = OUR_MAX_PAGES if channel.ours else CRIU_MAX_PAGES
        while (limit := self._background_limit(channel)) > channel.load.background:
            pages = max(MIN_PAGES, min(largest, limit // 4 // PAGE_SIZE))
            wanted = self.backlog.take(pages, channel, urgent=False)
            if wanted is None:
                return
            self._ask(channel, wanted)

    def _plan_refused(self, now: float) -> None:
        """Requests refused pages from servers that have not refused them; each alone if the server may close for it."""
        up = [server for server in self.servers if server.connected]
        # servers that report a missing page; below, the number of requests that each may be sent
        answering: dict[Server, Channel] = {}
        for channel in self.background_channels():
            if channel.features & Features.MISSING:
                answering.setdefault(channel.server, channel)
        room = {channel: REFUSED_WINDOW - channel.load.requests for channel in answering.values()}
        for wanted in list(self.backlog.refused):
            if wanted.not_before > now:
                continue
            if up and len(answering) == len(up) and max(room.values()) <= 0:
                break
            candidates = [server for server in up if server not in wanted.refused]
            if up and not candidates:
                pause = self._pause(REFUSED_BACKOFF, wanted.attempts)
                self.backlog.end_round(wanted, self.servers, now + pause)
                continue
            if reporting := [answering[server] for server in candidates if server in answering]:
                channel = max(reporting, key=lambda channel: room[channel])
                if room[channel] > 0:
                    room[channel] -= 1
                    self.backlog.retake(wanted, channel)
                    self._ask(channel, wanted)
                continue
            self._plan_alone(wanted, candidates, now)

    def _plan_alone(self, wanted: Wanted, candidates: Sequence[Server], now: float) -> None:
        """Requests a page on a channel without other requests, since the server may close for it.

        Uses only channels that have delivered pages, or are older than SUSPECT_PAUSE: if each new connection began with
        such a page, no other page would ever come.
        """
        channels = [
            channel
            for server in candidates
            for channel in server.channels
            if not channel.urgent_only and (channel.load.pages or now - channel.up_since > SUSPECT_PAUSE)
        ]
        channels.sort(key=lambda channel: channel.reserved is None)  # reserved channels first
        for channel in channels:
            if channel.reserved is wanted or channel.usable:
                channel.reserved = wanted
                self._update_pause(channel)
                if not channel.load.requests:
                    self.backlog.retake(wanted, channel)
                    self._ask(channel, wanted)
                return

    def _ask(self, channel: Channel, wanted: Wanted) -> None:
        load, size = channel.load, wanted.end - wanted.start
        channel.load = load._replace(
            requests=load.requests + 1,
            urgent=load.urgent + (size if wanted.urgent else 0),
            background=load.background + (0 if wanted.urgent else size),
        )
        self._actions.append(Ask(channel, wanted.pid, wanted.start, wanted.nr_pages, wanted.urgent))

    def _update_pause(self, channel: Channel) -> None:
        """Pauses the channel unless it is usable: the engine sends requests of its own only on usable channels."""
        paused = not channel.usable
        if channel.up and paused is not channel.paused:
            channel.paused = paused
            self._actions.append(Pause(channel, paused))

    # -- pages -------------------------------------------------------------------------------------------------

    def _owned(self, channel: Channel, pages: Outstanding) -> list[Wanted]:
        return self.backlog.owned(channel, pages.pid, pages.start, pages.start + pages.nr_pages * PAGE_SIZE)

    def _refuse(self, channel: Channel, wanted: Wanted, *, said: bool) -> None:
        what = "can't give" if said else "seems not to have"
        log.info("%s: %s page %#x of task %d", channel.server.name, what, wanted.start, wanted.pid)
        self.backlog.refuse(wanted, channel.server, said=said)

    def _denied(self, wanted: Wanted) -> bool:
        """Whether every server has reported that it can't give the page, in DENIED_ROUNDS rounds."""
        return wanted.denials >= DENIED_ROUNDS

    def _mark_lost(self, wanted: Wanted, reason: str) -> None:
        self.backlog.drop(wanted)
        self._actions.append(Lost(wanted.pid, wanted.start, wanted.nr_pages, reason))

    def _channels_for(self, server: Server, *, urgent_only: bool) -> list[Channel]:
        return [channel for channel in server.channels if channel.urgent_only is urgent_only]

    def _pause(self, limits: tuple[float, float], attempt: int) -> float:
        """Seconds: doubles with each attempt up to a limit, times a random factor between 0.5 and 1.5."""
        first, longest = limits
        return min(longest, first * (1 << min(attempt, 16))) * (0.5 + self._chance())
