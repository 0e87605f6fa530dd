"""Binding of csrc/serve/channel.h: a connection to a page server on which the engine requests pages."""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict, Unpack

from lazypages.engine._uffd import ffi, lib

if TYPE_CHECKING:
    from lazypages.engine.task import ServedTask


class ChannelEventKind(enum.IntEnum):
    """``enum lp_channel_event_kind`` of csrc/serve/channel.h."""

    ARRIVED = 1
    REFUSED = 2
    HEARD = 3
    QUIET = 4
    BUDGET_SPENT = 5
    CLOSED = 6
    ENDED = 7


class ChannelEvent(NamedTuple):
    """``struct lp_channel_event`` of csrc/serve/channel.h, which says which fields each kind uses. ``dump_addr`` in
    bytes, ``since`` in ns."""

    kind: ChannelEventKind
    status: int
    at_boundary: bool
    reported: bool
    tag: int
    dump_addr: int
    nr_pages: int
    since: int


class ChannelRequest(NamedTuple):
    """Requested pages of a task, by its tag and their address at dump time. ``since``: when a thread began to wait,
    CLOCK_MONOTONIC in ns; 0: no thread waits. ``reported``: ARRIVED is reported for them."""

    tag: int
    dump_addr: int
    nr_pages: int
    since: int
    urgent: bool
    reported: bool


class ChannelOptions(TypedDict):
    """``struct lp_channel_options`` of csrc/serve/channel.h."""

    header_size: int
    max_pages: int
    zeros: bool
    background: bool
    floor: NotRequired[int]
    compress: NotRequired[bool]


class ChannelState(NamedTuple):
    """``struct lp_channel_state`` of csrc/serve/channel.h. ``outstanding``, ``requests``: numbers of requests;
    ``urgent``, ``background``, ``limit``, ``bytes``: bytes; ``heard``, ``oldest``, ``round_trip``: ns."""

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
    """A connected socket to a page server on which the engine requests pages; see csrc/serve/channel.h.

    Only for the event loop's thread; unusable after :meth:`close`. The constructor raises OSError.
    """

    _BATCH = 64
    #: The library with the functions of csrc/serve/channel.h.
    _ffi: Any = ffi
    _lib: Any = lib

    def __init__(self, channels: Any, fd: int, **options: Unpack[ChannelOptions]) -> None:
        raw = self._ffi.new("struct lp_channel_options *", dict(options))
        self._handle = self._lib.lp_channel_new(channels, fd, raw)
        if self._handle == self._ffi.NULL:
            raise OSError(self._ffi.errno, os.strerror(self._ffi.errno))
        self._events = self._ffi.new("struct lp_channel_event[]", self._BATCH)
        self._state = self._ffi.new("struct lp_channel_state *")

    @property
    def event_fd(self) -> int:
        """Readable when :meth:`events` has events to return. The channel owns it."""
        return int(self._lib.lp_channel_event_fd(self._handle))

    def events(self) -> list[ChannelEvent]:
        """Takes up to 64 events, oldest first; does not block."""
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
        """Requests pages; ARRIVED reports them. ``dump_addr`` in bytes."""
        self._lib.lp_channel_ask(self._handle, tag, dump_addr, nr_pages, urgent)

    def pause(self, *, paused: bool) -> None:
        """Pauses or resumes the channel. On a paused channel only :meth:`ask` sends requests."""
        self._lib.lp_channel_pause(self._handle, paused)

    def set_budget(self, task: ServedTask, max_bytes: int) -> None:
        """Lets the channel request up to ``max_bytes`` of `task` in the background, until BUDGET_SPENT.

        One task at a time: a new budget replaces the previous one.
        """
        self._lib.lp_channel_set_budget(self._handle, task.handle, max_bytes)

    def finish(self, *, force: bool, flags: int = 0) -> None:
        """Sends CLOSE (FORCE_CLOSE with ``force``) with ``flags`` (wire.CloseFlags); CLOSED reports the answer."""
        self._lib.lp_channel_finish(self._handle, force, flags)

    def outstanding(self) -> list[ChannelRequest]:
        """The unanswered requests, oldest first; from now on ARRIVED is reported for their pages."""
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
        """The channel's counters."""
        self._lib.lp_channel_state(self._handle, self._state)
        return ChannelState(*(int(getattr(self._state, name)) for name in ChannelState._fields))

    def close(self) -> None:
        """Closes the connection. Outstanding pages are dropped, without an event."""
        self._lib.lp_channel_close(self._handle)
