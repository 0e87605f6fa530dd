"""Plans what becomes of pages, servers and connections. Pure: no socket, no clock; events in, actions out.

The engine asks for the pages of faults and of the background by itself, on every *channel* (a connection to a server)
that is good (csrc/serve/channel.h). What comes here is what it can't settle: a fault while no channel is good, pages
that a server refuses, silence, the end of a channel. Time is given with each event, in seconds.

CRIU's servers take one connection in their whole life, and end a task that they keep frozen when it closes; so a
channel that has gone silent is given up only for another one of which the server has answered the first question. Our
own servers take any number: faults get a channel of their own.

What can't be had at the moment waits, and is asked for again: of the other servers at once, of the same one after
a pause that grows. Pages are lost when every server has said, again and again, that it can't give them (a server of
CRIU's only closes the connection, for whatever reason), or after a deadline, if there is one; nothing here ever makes
them zeros.
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

log = logging.getLogger("lazypages")

# For each request CRIU's server copies all pages before the requested one in its pipe (up to 1 MiB); without
# CAP_SYS_RESOURCE it fails past the 16th page of a pipe (docs/criu.md, "Page server protocol").
CRIU_MAX_PAGES: Final = 64
OUR_MAX_PAGES: Final = 256
URGENT_MAX_PAGES: Final = 16  # neighbouring faults that are asked for as one
MIN_PAGES: Final = 4  # of a background request
ALONE_WINDOW: Final = 1 << 20  # bytes of background on a channel without faults, at least
URGENT_WINDOW: Final = 4 << 20  # bytes of faults on their way on one channel

SILENCE: Final = 3.0  # s without a byte, while answers are due, that make a channel suspect
SILENT_ROUND_TRIPS: Final = 20  # and so many round trips
BACKOFF: Final = (0.02, 5.0)  # s: first and longest pause before a server is tried again
REFUSED_BACKOFF: Final = (0.2, 10.0)  # the same for a page that all servers refuse
# Rounds after which a page is lost that every server has said it has not, or can't read: what was wrong with a disk, or
# with the memory of a frozen task, may pass. By the pauses above that is about 3 s.
DENIED_ROUNDS: Final = 5
# s for which a new connection that has brought nothing is not risked for a refused page
SUSPECT_PAUSE: Final = 0.5
LOOK: Final = 2e-6  # s that it takes to look at a refused page
REFUSED_WINDOW: Final = 256  # requests for refused pages that are on their way on one channel
WARN_INTERVAL: Final = 30.0  # s
TICK: Final = 0.1  # s between looks at channels and at what waits, while there is any
SHORTEST_TICK: Final = 0.01  # s, at least

DENIED: Final = "no page server can give it; their logs say why"


class Load(NamedTuple):
    """What a channel has on its way: requests, bytes of faults, of the background, of the background that may be.

    ``round_trip``: s, 0 if not known. ``heard``: when the last byte came, or the first of what is due was asked for.
    ``oldest``: since when a thread waits for any of it; 0: none does. ``pages``: that have come, ever.
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
    """One connection to a server, from the attempt to connect until its end. ``load`` is told from outside."""

    server: Server
    urgent_only: bool
    spare: bool  # there is another one already that may come back to life
    heard: float
    load: Load = field(default_factory=Load)
    features: Features = wire.NO_FEATURES
    greeted: bool = False  # it is known what the server speaks
    answered: bool = False  # the server has said something, so it is one
    up: bool = False
    silent: bool = False
    held: bool = False
    up_since: float = 0.0
    # a refused page that goes alone: nothing else suffers if the server closes
    reserved: Wanted | None = None

    @property
    def usable(self) -> bool:
        return self.up and not self.silent and self.reserved is None

    @property
    def ours(self) -> bool:
        return bool(self.features)

    @property
    def agreed(self) -> bool:
        """Whether the server has said that it has our checkpoint."""
        return bool(self.features & Features.CHECKPOINT)

    @property
    def used_up(self) -> bool:
        """Whether this was the one connection that a server of CRIU's takes."""
        return self.greeted and not self.ours and self.has_answered

    @property
    def has_answered(self) -> bool:
        return self.answered or self.load.pages > 0

    @property
    def expected_wait(self) -> float:
        """Seconds until an answer to what is asked now, roughly."""
        load = self.load
        return load.round_trip * (1 + (load.urgent + load.background) / load.limit)


@dataclass(slots=True)
class _Attempts:
    """To connect to a server, for the background or for faults."""

    failures: int = 0
    retry_at: float = 0.0


@dataclass(eq=False)
class Server:
    """``once``: it can be connected to only once, ever."""

    name: str
    once: bool = False
    channels: list[Channel] = field(default_factory=list)
    connections: int = 0  # that were good
    many: bool = False  # takes more than one connection
    used_up: bool = False  # CRIU's, and it has had its connection
    given_up: bool = False  # therefore, and that has been said
    complained: float = float("-inf")
    attempts: dict[bool, _Attempts] = field(default_factory=lambda: {False: _Attempts(), True: _Attempts()})

    @property
    def connected(self) -> bool:
        return any(channel.up for channel in self.channels)

    @property
    def over(self) -> bool:
        """Whether it is never connected to again."""
        return self.given_up or (self.once and self.connections > 0)


class Outstanding(NamedTuple):
    """Pages that the engine has asked for on a channel: `since`: when a thread began to wait for them, s; 0: none does.

    ``known``: they are in our books.
    """

    pid: int
    start: int
    nr_pages: int
    since: float
    known: bool


class Connect(NamedTuple):
    """Connect this new channel; then say `reached`, `connected` or `ended`."""

    channel: Channel


class GiveUp(NamedTuple):
    """Hang up; then say `ended`."""

    channel: Channel


class Hold(NamedTuple):
    """The engine sends of its own accord on it, or does not."""

    channel: Channel
    held: bool


class TakeOver(NamedTuple):
    """Say what is outstanding on it: `took_over`."""

    channel: Channel


class Ask(NamedTuple):
    """Have the engine ask for these; then say `arrived` or `refused`."""

    channel: Channel
    pid: int
    start: int
    nr_pages: int
    urgent: bool


class Lost(NamedTuple):
    """Nobody gives these."""

    pid: int
    start: int
    nr_pages: int
    reason: str


Action = Connect | GiveUp | Hold | TakeOver | Ask | Lost


class Pool:
    """Servers with the same content, their channels, and the pages that wait. Addresses: at dump time, in bytes.

    ``checked``: a connection to a server of CRIU's that has ended is not made again, since who listens there may have
    another dump. ``deadline``: seconds after which pages that can't be had are lost; None: never. ``chance``: between
    0 and 1.
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
        self._refused_at = 0.0  # when refused pages are looked at next
        self._warned = now
        self._ticked = now
        self._closing = False

    def actions(self) -> list[Action]:
        """What is to be done, in this order; each is given once."""
        actions, self._actions = self._actions, []
        return actions

    def due(self, now: float) -> float | None:
        """Seconds until `tick` must be called, if nothing else happens before; None: never."""
        moments = [self._ticked + TICK] if self.backlog or any(self.channels()) else []
        for server in self.servers:
            moments += [
                max(server.attempts[urgent_only].retry_at, self._ticked + SHORTEST_TICK)
                for urgent_only in ((False, True) if server.many else (False,))
                if not server.over and not self._purpose(server, urgent_only=urgent_only)
            ]
        return max(min(moments) - now, 0.0) if moments else None

    def channels(self) -> Iterator[Channel]:
        for server in self.servers:
            yield from server.channels

    def background_channels(self) -> list[Channel]:
        return [channel for channel in self.channels() if channel.usable and not channel.urgent_only]

    # -- events ---------------------------------------------------------------------------------------------

    def want(self, ranges: Iterable[tuple[int, int, int]], now: float, *, urgent: bool) -> None:
        """Ranges of (pid, address, pages) are wanted; what is on its way already is not asked for again."""
        if not self.backlog:
            self._warned = now
        for pid, address, nr_pages in ranges:
            self.backlog.add(pid, address, address + nr_pages * PAGE_SIZE, urgent=urgent, now=now)
        self.plan(now)

    def forget(self, pid: int) -> None:
        """Nobody waits for any page of this task any more."""
        self.backlog.drop_task(pid)

    def reached(self, channel: Channel, now: float) -> None:
        """The other side has accepted; it has said nothing yet."""
        channel.heard = now

    def connected(self, channel: Channel, features: Features, now: float, *, answered: bool) -> None:
        """The channel is good; it is known what the server can do."""
        channel.up, channel.greeted, channel.answered = True, True, answered
        channel.features = features
        channel.heard = channel.up_since = now
        channel.server.many = bool(features & Features.CONNECTIONS)
        channel.server.connections += 1

    def arrived(self, pid: int, start: int, nr_pages: int) -> None:
        """Pages that were in our books are in their place."""
        self.backlog.arrived(pid, start, start + nr_pages * PAGE_SIZE)

    def refused(self, channel: Channel, pages: Outstanding, now: float) -> None:
        """The server has said that it can't give the first of these."""
        self.adopt(channel, [pages], now)
        if channel.reserved is not None and channel.reserved.owner is channel:
            channel.reserved = None
        for rest in self._owned(channel, pages):
            self._refuse(channel, rest, said=True)

    def heard(self, channel: Channel) -> None:
        """A byte has come on a held channel."""
        channel.silent = False

    def adopt(self, channel: Channel, outstanding: Iterable[Outstanding], now: float) -> None:
        """The engine has asked `channel` for these; from here on it is our business that they come."""
        for pages in outstanding:
            if not pages.known:
                end = pages.start + pages.nr_pages * PAGE_SIZE
                since, urgent = pages.since or now, bool(pages.since)
                self.backlog.add(pages.pid, pages.start, end, urgent=urgent, now=since, owner=channel)

    def took_over(self, channel: Channel, outstanding: Iterable[Outstanding], now: float) -> None:
        """The answer to TakeOver: from here on it is our business that these come."""
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
        """A channel, connected or not, is no more; `oldest` should have come next on it.

        ``hung_up``: the server has closed between two answers: so a server of CRIU's says that it has not the page that
        it was asked for first.
        """
        server, answered = channel.server, channel.has_answered
        was_up, was_good, channel.up = channel.up, channel.up and not channel.silent, False
        server.used_up = server.used_up or channel.used_up
        if reason and not self._closing:
            self._complain(server, reason, now, was_up=was_up and answered)
        if oldest is not None and answered and hung_up:
            for wanted in self._owned(channel, oldest)[:1]:
                self._refuse(channel, wanted, said=False)
        self.backlog.give_back(channel)
        server.channels.remove(channel)
        attempts = server.attempts[channel.urgent_only]
        if was_up and answered:
            attempts.failures = 0
        if was_good and not any(other.up for other in self._purpose(server, urgent_only=channel.urgent_only)):
            attempts.retry_at = now + self._pause(BACKOFF, attempts.failures)

    def tick(self, now: float) -> None:
        """Notices what lasts too long: silence, pages that are refused, pages past the deadline."""
        self._ticked = now
        for channel in self.channels():
            if channel.up:
                self._check_silence(channel, now)
            oldest = channel.load.oldest
            if self._deadline is not None and oldest and now - oldest > self._deadline:
                self._actions.append(TakeOver(channel))
        for wanted in [wanted for wanted in self.backlog.refused if self._denied(wanted)]:
            self._lose(wanted, DENIED)
        if self._deadline is not None:
            for wanted in [wanted for wanted in self.backlog if now - wanted.since > self._deadline]:
                self._lose(wanted, f"no page server gave it within {self._deadline:g} s")
        oldest = min((wanted.since for wanted in self.backlog), default=now)
        if now - max(oldest, self._warned) > WARN_INTERVAL:
            self._warned = now
            pages = sum(wanted.nr_pages for wanted in self.backlog)
            log.warning(
                "%d pages are awaited from page servers, for up to %.0f s; still trying", pages, now - oldest
            )
        self.plan(now)

    def close(self) -> None:
        """Nothing is connected any more; the end of a channel is nothing to complain about."""
        self._closing = True

    def plan(self, now: float) -> None:
        """Connections that are needed, and requests that may be sent. To be called after any event."""
        if not self._closing:
            for server in self.servers:
                for urgent_only in (False, True):
                    self._plan_connections(server, now, urgent_only=urgent_only)
        self._plan_requests(now)

    # -- connections -------------------------------------------------------------------------------------------

    def _plan_connections(self, server: Server, now: float, *, urgent_only: bool) -> None:
        """See to it that there is one good channel (or a second one, for faults only)."""
        channels = self._purpose(server, urgent_only=urgent_only)
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
        self._actions.append(Connect(channel))
        attempts.failures += 1
        attempts.retry_at = now + self._pause(BACKOFF, attempts.failures)

    def _is_used_up(self, server: Server) -> bool:
        """Whether it has been CRIU's, which takes one connection in its life: who answers there now has another dump.

        A connection would even be the only one of that server, and the end of it the end of its dump, which fails.
        """
        if not self._checked:
            return False
        if not server.channels and server.used_up and not server.given_up:
            server.given_up = True
            log.error(
                "page server %s: a page server of CRIU's takes one connection, and that has ended. Whoever listens "
                "there now may have another dump: not connecting again. Pages that are still missing must come from "
                "elsewhere (--source)",
                server.name,
            )
        return server.used_up or any(channel.used_up for channel in server.channels)

    def _check_silence(self, channel: Channel, now: float) -> None:
        load = channel.load
        channel.heard = load.heard or channel.heard
        patience = max(SILENCE, SILENT_ROUND_TRIPS * load.round_trip)
        silent = load.requests > 0 and now - channel.heard > patience
        if channel.silent and not silent:
            # All answers had come before it was found silent, and waited for a task: no byte will tell.
            channel.silent = False
        elif silent and not channel.silent:
            log.warning("page server %s: silent for %.1f s", channel.server.name, now - channel.heard)
            channel.silent = True
            channel.reserved = None  # another one may take the page
            if channel.has_answered:
                channel.server.attempts[channel.urgent_only].failures = 0
            self._hold(channel)
            self._actions.append(TakeOver(channel))

    def _complain(self, server: Server, reason: str, now: float, *, was_up: bool) -> None:
        waiting = sum(1 for _ in self.backlog)
        level = logging.INFO
        if was_up or now - server.complained > WARN_INTERVAL:
            level, server.complained = logging.WARNING, now
        again = f"; {waiting} requests wait, trying again" if waiting else ""
        log.log(level, "page server %s: %s%s", server.name, reason, again)

    # -- requests ----------------------------------------------------------------------------------------------

    def _plan_requests(self, now: float) -> None:
        backlog = self.backlog
        for channel in self.channels():
            if channel.reserved is not None and channel.reserved.gone:
                channel.reserved = None
            self._hold(channel)
        while backlog.queued_pages(urgent=True) and (fastest := self._urgent_channel()):
            if (wanted := backlog.take(URGENT_MAX_PAGES, fastest, urgent=True)) is None:
                break
            self._ask(fastest, wanted)
        if backlog.refused and now >= self._refused_at:
            # A file that was cut short may cost thousands: looking at them is not to take all our time.
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
        """Bytes of background that may be on their way: little while a fault waits on the same channel, and more than
        needed where faults have a channel of their own."""
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
        """Pages that a server has refused go to a server that has not; alone, if it may close for them, too."""
        up = [server for server in self.servers if server.connected]
        # that answer when a page is missing, and how much they may be sent
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
                wanted.refused.clear()  # refused by all: each gets another chance, later
                wanted.not_before = now + self._pause(REFUSED_BACKOFF, wanted.attempts)
                wanted.attempts += 1
                continue
            if told := [answering[server] for server in candidates if server in answering]:
                channel = max(told, key=lambda channel: room[channel])
                if room[channel] > 0:
                    room[channel] -= 1
                    self.backlog.retake(wanted, channel)
                    self._ask(channel, wanted)
                continue
            self._plan_alone(wanted, candidates, now)

    def _plan_alone(self, wanted: Wanted, candidates: Sequence[Server], now: float) -> None:
        """First what else a connection is good for: if each began with such a page, nothing else would ever come."""
        channels = [
            channel
            for server in candidates
            for channel in server.channels
            if not channel.urgent_only and (channel.load.pages or now - channel.up_since > SUSPECT_PAUSE)
        ]
        channels.sort(key=lambda channel: channel.reserved is None)  # the one that is kept free for it
        for channel in channels:
            if channel.reserved is wanted or channel.usable:
                channel.reserved = wanted
                self._hold(channel)
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

    def _hold(self, channel: Channel) -> None:
        """The engine sends of its own accord only on a channel that is good for all."""
        held = not channel.usable
        if channel.up and held is not channel.held:
            channel.held = held
            self._actions.append(Hold(channel, held))

    # -- pages -------------------------------------------------------------------------------------------------

    def _owned(self, channel: Channel, pages: Outstanding) -> list[Wanted]:
        return self.backlog.owned(channel, pages.pid, pages.start, pages.start + pages.nr_pages * PAGE_SIZE)

    def _refuse(self, channel: Channel, wanted: Wanted, *, said: bool) -> None:
        what = "can't give" if said else "seems not to have"
        log.info("%s: %s page %#x of task %d", channel.server.name, what, wanted.start, wanted.pid)
        self.backlog.refuse(wanted, channel.server, said=said)

    def _denied(self, wanted: Wanted) -> bool:
        """Whether every server has said that it can't give the page, often enough."""
        return wanted.attempts >= DENIED_ROUNDS and wanted.denied.issuperset(self.servers)

    def _lose(self, wanted: Wanted, reason: str) -> None:
        self.backlog.drop(wanted)
        self._actions.append(Lost(wanted.pid, wanted.start, wanted.nr_pages, reason))

    def _purpose(self, server: Server, *, urgent_only: bool) -> list[Channel]:
        return [channel for channel in server.channels if channel.urgent_only is urgent_only]

    def _pause(self, limits: tuple[float, float], attempt: int) -> float:
        """Seconds: twice as long each time, up to a limit, give or take a half."""
        first, longest = limits
        return min(longest, first * (1 << min(attempt, 16))) * (0.5 + self._chance())
