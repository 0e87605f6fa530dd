"""Requests for pages that have not been answered: their order, their state, and the connection that each was sent on.

Pure: no clock, no socket. One object per range of pages, never one per page.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from lazypages.net.wire import PAGE_SIZE

MERGE_WITHIN: Final = 1.0  # s between two requests that may become one


@dataclass(slots=True, eq=False)
class Wanted:
    """The pages [start, end) of a task, addresses at dump time in bytes; `since`: time of the first request, s.

    `owner`: the connection on which the request was sent; None while the range is queued or refused.
    """

    pid: int
    start: int
    end: int
    urgent: bool
    since: float
    owner: object = None
    suspect: bool = False  # a server seems to lack its first page: a request covers this page only
    # A round lasts until all connected servers have refused the page; then all are asked again.
    refused: set[object] = field(default_factory=set)  # servers that seem to lack it, of this round
    denied: set[object] = field(
        default_factory=set
    )  # servers that have reported that they lack it, of this round
    attempts: int = 0  # rounds so far
    denials: int = 0  # rounds in which all servers, connected or not, have reported that they lack it
    not_before: float = 0.0  # s: earliest time of the next request after a refusal
    gone: bool = False  # removed from the backlog; a queue may still contain it

    @property
    def nr_pages(self) -> int:
        return (self.end - self.start) // PAGE_SIZE


def _start(wanted: Wanted) -> int:
    return wanted.start


def _end(wanted: Wanted) -> int:
    return wanted.end


class Backlog:
    """All requested ranges; those of one task are disjoint.

    A range is queued (in the urgent or the background queue, both first in, first out), owned by a connection, or
    refused.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, list[Wanted]] = {}  # sorted by address
        self._queues: dict[bool, deque[Wanted]] = {True: deque(), False: deque()}
        self._queued_pages = {True: 0, False: 0}
        self.refused: dict[Wanted, None] = {}  # an ordered set, oldest refusal first

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def __iter__(self) -> Iterator[Wanted]:
        for ranges in list(self._tasks.values()):
            yield from list(ranges)

    def queued_pages(self, *, urgent: bool) -> int:
        """Pages whose request has not been sent."""
        return self._queued_pages[urgent]

    def add(self, pid: int, start: int, end: int, *, urgent: bool, now: float, owner: object = None) -> None:
        """Adds a request for [start, end). Pages that are in the backlog already keep their request; an urgent request
        escalates it.

        `owner`: the connection on which the engine has sent the request already.
        """
        place = start
        for known in self._overlapping(pid, start, end):
            if place < known.start:
                self._add(Wanted(pid, place, known.start, urgent, now, owner))
            place = known.end
            if urgent and not known.urgent:
                self._escalate(known, start, end)
        if place < end:
            self._add(Wanted(pid, place, end, urgent, now, owner))

    def _add(self, wanted: Wanted) -> None:
        self._insert(wanted)
        if wanted.owner is None:
            self._enqueue(wanted)

    def take(self, max_pages: int, owner: object, *, urgent: bool) -> Wanted | None:
        """Dequeues the next range, of at most `max_pages`, for `owner`.

        Merges queued neighbours into it, but none much older or newer: the deadline of the oldest page is that of all.
        """
        wanted = self._pop(urgent)
        if wanted is None:
            return None
        ranges = self._tasks[wanted.pid]
        following = bisect_right(ranges, wanted.start, key=_start)
        first_since = wanted.since
        while wanted.nr_pages < max_pages and following < len(ranges):
            neighbour = ranges[following]
            if (
                neighbour.start != wanted.end
                or neighbour.owner is not None
                or neighbour.suspect
                or neighbour.urgent is not urgent
                or abs(neighbour.since - first_since) > MERGE_WITHIN
            ):
                break
            self._queued_pages[urgent] -= neighbour.nr_pages
            wanted.end = neighbour.end
            wanted.since = min(wanted.since, neighbour.since)
            neighbour.gone = True
            del ranges[following]
        if wanted.nr_pages > max_pages:
            self._enqueue(self._split(wanted, wanted.start + max_pages * PAGE_SIZE), first=True)
        wanted.owner = owner
        return wanted

    def arrived(self, pid: int, start: int, end: int) -> list[tuple[int, int]]:
        """Removes the pages [start, end), which have arrived; returns the parts of them that were in the backlog."""
        pieces = []
        for known in self._overlapping(pid, start, end):
            first, last = max(start, known.start), min(end, known.end)
            pieces.append((first, last))
            if known.owner is None and known not in self.refused:
                self._queued_pages[known.urgent] -= (last - first) // PAGE_SIZE
            if last < known.end:
                tail = known if first == known.start else self._split_owned(known, last)
                if tail is known:
                    known.start = last
                    continue
            if first > known.start:
                known.end = first
            else:
                self._remove(known)
        return pieces

    def owned(self, owner: object, pid: int, start: int, end: int) -> list[Wanted]:
        """The unanswered ranges in [start, end) that were requested on `owner`."""
        return [wanted for wanted in self._overlapping(pid, start, end) if wanted.owner is owner]

    def again(self, wanted: Wanted) -> None:
        """Puts `wanted` at the head of its queue: its request will not be answered."""
        wanted.owner = None
        if wanted.suspect:
            self.refused[wanted] = None
        else:
            self._enqueue(wanted, first=True)

    def give_back(self, owner: object) -> None:
        """Queues again all unanswered ranges that were requested on `owner`."""
        for wanted in reversed(list(self)):
            if wanted.owner is owner:
                self.again(wanted)

    def refuse(self, wanted: Wanted, server: object, *, said: bool = False) -> None:
        """Marks the first page of the owned `wanted` refused by `server`, and queues the other pages again.

        `said`: the server has reported that it lacks the page; otherwise it has closed the connection.
        """
        if wanted.nr_pages > 1:
            self.again(self._split(wanted, wanted.start + PAGE_SIZE))
        wanted.owner = None
        wanted.suspect = True
        wanted.refused.add(server)
        if said:
            wanted.denied.add(server)
        self.refused[wanted] = None

    def end_round(self, wanted: Wanted, servers: Iterable[object], not_before: float) -> None:
        """All connected servers have refused a page: they may be asked again, from `not_before` on."""
        wanted.denials += wanted.denied.issuperset(servers)
        wanted.attempts += 1
        wanted.refused.clear()
        wanted.denied.clear()
        wanted.not_before = not_before

    def ask_again(self, server: object) -> None:
        """A server has been connected to again, perhaps another process: what it has reported no longer counts."""
        for wanted in self:
            if server in wanted.denied:
                wanted.denied.discard(server)
                wanted.refused.discard(server)

    def retake(self, wanted: Wanted, owner: object) -> None:
        """Gives a refused range to `owner`, which requests it once more."""
        del self.refused[wanted]
        wanted.owner = owner

    def drop(self, wanted: Wanted) -> None:
        """Removes a range whose task does not need it any more."""
        if wanted.owner is None and wanted not in self.refused:
            self._queued_pages[wanted.urgent] -= wanted.nr_pages
        self._remove(wanted)

    def drop_task(self, pid: int) -> None:
        """Removes all ranges of this task."""
        for wanted in list(self._tasks.get(pid, ())):
            self.drop(wanted)

    def _overlapping(self, pid: int, start: int, end: int) -> list[Wanted]:
        ranges = self._tasks.get(pid, [])
        return ranges[bisect_right(ranges, start, key=_end) : bisect_left(ranges, end, key=_start)]

    def _insert(self, wanted: Wanted) -> Wanted:
        ranges = self._tasks.setdefault(wanted.pid, [])
        ranges.insert(bisect_left(ranges, wanted.start, key=_start), wanted)
        return wanted

    def _enqueue(self, wanted: Wanted, *, first: bool = False) -> None:
        queue = self._queues[wanted.urgent]
        if first:
            queue.appendleft(wanted)
        else:
            queue.append(wanted)
        self._queued_pages[wanted.urgent] += wanted.nr_pages

    def _pop(self, urgent: bool) -> Wanted | None:
        queue = self._queues[urgent]
        while queue:
            wanted = queue.popleft()
            # Skip stale entries: a range that was escalated, requested or removed since it was queued here.
            if wanted.urgent is urgent and wanted.owner is None and not wanted.gone and not wanted.suspect:
                self._queued_pages[urgent] -= wanted.nr_pages
                return wanted
        return None

    def _split(self, wanted: Wanted, place: int) -> Wanted:
        """Cuts `wanted` at `place`. Returns the second part, which is in no queue."""
        tail = Wanted(wanted.pid, place, wanted.end, wanted.urgent, wanted.since, wanted.owner)
        wanted.end = place
        return self._insert(tail)

    def _split_owned(self, wanted: Wanted, place: int) -> Wanted:
        """As _split; the second part is queued if `wanted` is."""
        tail = self._split(wanted, place)
        if tail.owner is None:
            self._queued_pages[tail.urgent] -= tail.nr_pages
            self._enqueue(tail)
        return tail

    def _escalate(self, wanted: Wanted, start: int, end: int) -> None:
        """Makes the part of a background range that is in [start, end) urgent."""
        if wanted.owner is not None or wanted.suspect:
            wanted.urgent = True
            return
        if end < wanted.end:
            self._split_owned(wanted, end)
        if wanted.start < start:
            wanted = self._split(wanted, start)
        self._queued_pages[False] -= wanted.nr_pages
        wanted.urgent = True
        self._enqueue(wanted)

    def _remove(self, wanted: Wanted) -> None:
        wanted.gone = True
        if wanted in self.refused:
            del self.refused[wanted]
        ranges = self._tasks[wanted.pid]
        del ranges[bisect_left(ranges, wanted.start, key=_start)]
        if not ranges:
            del self._tasks[wanted.pid]
