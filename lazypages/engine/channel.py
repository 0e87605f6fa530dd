"""A connection to a page server on which the engine itself asks for pages; see csrc/serve/channel.h."""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from lazypages.engine._uffd import ffi, lib

if TYPE_CHECKING:
    from lazypages.engine.task import ServedTask


class ChannelEventKind(enum.IntEnum):
    """What a channel has to tell (``enum lp_channel_event_kind``, csrc/serve/channel.h)."""

    ARRIVED = 1
    REFUSED = 2
    HEARD = 3
    QUIET = 4
    BUDGET_SPENT = 5
    CLOSED = 6
    ENDED = 7


class ChannelEvent(NamedTuple):
    """``struct lp_channel_event`` of csrc/serve/channel.h: what each kind means, and what of the rest it has."""

    kind: ChannelEventKind
    status: int
    at_boundary: bool
    reported: bool
    tag: int
    dump_addr: int
    nr_pages: int
    since: int


class ChannelRequest(NamedTuple):
    """Pages of a task, by tag and address at dump time; ``since``: ns, 0 if no thread waits."""

    tag: int
    dump_addr: int
    nr_pages: int
    since: int
    urgent: bool
    reported: bool


class ChannelState(NamedTuple):
    """``struct lp_channel_state``: requests, bytes, ns."""

    outstanding: int
    urgent: int
    background: int
    limit: int
    heard: int
    oldest: int
    requests: int
    pages: int
    bytes: int
    round_trip: int


class Channel:
    """A connected socket to a page server on which the engine itself asks for pages; see csrc/serve/channel.h.

    For the event loop's thread, until :meth:`close`.
    """

    _BATCH = 64
    #: The library that has the channels.
    _ffi: Any = ffi
    _lib: Any = lib

    def __init__(
        self,
        channels: Any,
        fd: int,
        *,
        header_size: int,
        max_pages: int,
        zeros: bool,
        background: bool,
        floor: int,
        compress: bool,
    ) -> None:
        options = self._ffi.new(
            "struct lp_channel_options *", (header_size, max_pages, floor, zeros, background, compress)
        )
        self._handle = self._lib.lp_channel_new(channels, fd, options)
        if self._handle == self._ffi.NULL:
            raise OSError(self._ffi.errno, os.strerror(self._ffi.errno))
        self._events = self._ffi.new("struct lp_channel_event[]", self._BATCH)
        self._state = self._ffi.new("struct lp_channel_state *")

    @property
    def event_fd(self) -> int:
        """Readable when :meth:`events` has something to say. The channel owns it."""
        return int(self._lib.lp_channel_event_fd(self._handle))

    def events(self) -> list[ChannelEvent]:
        """Takes what has happened since the last call, in order; does not block."""
        nr = self._lib.lp_channel_events(self._handle, self._events, self._BATCH)
        return [
            ChannelEvent(
                ChannelEventKind(raw.kind),
                raw.status,
                raw.at_boundary,
                raw.reported,
                raw.tag,
                raw.dump_addr,
                raw.nr_pages,
                raw.since,
            )
            for raw in self._events[0:nr]
        ]

    def ask(self, tag: int, dump_addr: int, nr_pages: int, *, urgent: bool) -> None:
        """Asks for pages; ARRIVED tells of them."""
        self._lib.lp_channel_ask(self._handle, tag, dump_addr, nr_pages, urgent)

    def pause(self, *, paused: bool) -> None:
        """While it is paused, the channel sends nothing of its own accord."""
        self._lib.lp_channel_pause(self._handle, paused)

    def set_budget(self, task: ServedTask, max_bytes: int) -> None:
        """Brings pages of `task` in the background, until BUDGET_SPENT; one task at a time."""
        self._lib.lp_channel_set_budget(self._handle, task.handle, max_bytes)

    def finish(self, *, force: bool, flags: int = 0) -> None:
        """Tells the server that this is the end, with wire.CloseFlags; CLOSED is its answer."""
        self._lib.lp_channel_finish(self._handle, force, flags)

    def outstanding(self) -> list[ChannelRequest]:
        """What has not come yet, the oldest first; from now on its arrival is reported."""
        room = 64
        while True:
            requests = self._ffi.new("struct lp_request[]", room)
            nr = self._lib.lp_channel_outstanding(self._handle, requests, room)
            if nr <= room:
                return [
                    ChannelRequest(raw.tag, raw.dump_addr, raw.nr_pages, raw.since, raw.urgent, raw.reported)
                    for raw in requests[0:nr]
                ]
            room = nr + 64

    def state(self) -> ChannelState:
        self._lib.lp_channel_state(self._handle, self._state)
        return ChannelState(*(int(getattr(self._state, name)) for name in ChannelState._fields))

    def close(self) -> None:
        """Hangs up. What is outstanding does not come any more."""
        self._lib.lp_channel_close(self._handle)
