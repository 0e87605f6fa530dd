"""Pages that were asked for and have not come: who waits, in what order they are sent, what is sent already.

Pure: no clock, no socket. No object per page; one per range that is on its way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from lazypages.net.wire import PAGE_SIZE


@dataclass(slots=True, eq=False)
class Wanted:
    """The pages [start, end) of a task, addresses at dump time; `since`: when they were first asked for, s.

    `owner`: the connection that they were asked of; None while they are queued or refused.
    """

    pid: int
    start: int
    end: int
    urgent: bool
    since: float
    owner: object = None
    suspect: bool = False  # a server seems not to have its first page: it is asked for alone
    refused: set[object] = field(default_factory=set)  # the servers that seem not to have it
    denied: set[object] = field(default_factory=set)  # those that have said so
    attempts: int = 0  # times that all servers have refused it
    not_before: float = 0.0  # s: refused pages wait until then
    gone: bool = False  # not waited for any more; may still lie about in a queue

    @property
    def nr_pages(self) -> int:
        return (self.end - self.start) // PAGE_SIZE


def _start(wanted: Wanted) -> int:
    return wanted.start


def _end(wanted: Wanted) -> int:
    return wanted.end


class Backlog:
    """All ranges that are waited for; those of one task are disjoint.

    A range is queued (urgent or background, each first come, first served), owned by a connection, or refused.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, list[Wanted]] = {}  # sorted by address
        self._queues: dict[bool, deque[Wanted]] = {True: deque(), False: deque()}
        self._queued_pages = {True: 0, False: 0}
        self.refused: dict[Wanted, None] = {}  # in this order

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def __iter__(self) -> Iterator[Wanted]:
        for ranges in list(self._tasks.values()):
            yield from list(ranges)

    def queued_pages(self, *, urgent: bool) -> int:
        """Pages that wait to be sent."""
        return self._queued_pages[urgent]

    def add(self, pid: int, start: int, end: int, *, urgent: bool, now: float, owner: object = None) -> None:
        """Want [start, end). What is waited for already is not asked for twice, but queued pages are hurried.

        `owner`: the connection that has been asked for it without our doing.
        """
        place = start
        for known in self._overlapping(pid, start, end):
            if place < known.start:
                self._add(Wanted(pid, place, known.start, urgent, now, owner))
            place = known.end
            if urgent and not known.urgent:
                self._hurry(known, start, end)
        if place < end:
            self._add(Wanted(pid, place, end, urgent, now, owner))

    def _add(self, wanted: Wanted) -> None:
        self._insert(wanted)
        if wanted.owner is None:
            self._enqueue(wanted)

    def take(self, max_pages: int, owner: object, *, urgent: bool) -> Wanted | None:
        """The next range to send, at most `max_pages`, now owned; queued neighbours are made one with it."""
        wanted = self._pop(urgent)
        if wanted is None:
            return None
        ranges = self._tasks[wanted.pid]
        following = bisect_right(ranges, wanted.start, key=_start)
        while wanted.nr_pages < max_pages and following < len(ranges):
            neighbour = ranges[following]
            if (
                neighbour.start != wanted.end
                or neighbour.owner is not None
                or neighbour.suspect
                or neighbour.urgent is not urgent
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
        """The pages [start, end) are there; returns the parts of them that were waited for."""
        pieces = []
        for known in self._overlapping(pid, start, end):
            first, last = max(start, known.start), min(end, known.end)
            pieces.append((first, last))
            if known.owner is None and known not in self.refused:
                self._queued_pages[known.urgent] -= (last - first) // PAGE_SIZE
            if last < known.end:
                rest = known if first == known.start else self._split_owned(known, last)
                if rest is known:
                    known.start = last
                    continue
            if first > known.start:
                known.end = first
            else:
                self._remove(known)
        return pieces

    def owned(self, owner: object, pid: int, start: int, end: int) -> list[Wanted]:
        """What of [start, end) `owner` has been asked for and has not brought."""
        return [wanted for wanted in self._overlapping(pid, start, end) if wanted.owner is owner]

    def again(self, wanted: Wanted) -> None:
        """`wanted` was asked for in vain; it is the next to be sent."""
        wanted.owner = None
        if wanted.suspect:
            self.refused[wanted] = None
        else:
            self._enqueue(wanted, first=True)

    def give_back(self, owner: object) -> None:
        """All that `owner` has been asked for was asked in vain."""
        for wanted in reversed(list(self)):
            if wanted.owner is owner:
                self.again(wanted)

    def refuse(self, wanted: Wanted, server: object, *, said: bool = False) -> None:
        """`server` seems not to have the first page of the owned `wanted`, or has said so; the rest of it is queued
        again.
        """
        if wanted.nr_pages > 1:
            self.again(self._split(wanted, wanted.start + PAGE_SIZE))
        wanted.owner = None
        wanted.suspect = True
        wanted.refused.add(server)
        if said:
            wanted.denied.add(server)
        self.refused[wanted] = None

    def retake(self, wanted: Wanted, owner: object) -> None:
        """A refused range is sent once more."""
        del self.refused[wanted]
        wanted.owner = owner

    def drop(self, wanted: Wanted) -> None:
        """Nobody waits for it any more."""
        if wanted.owner is None and wanted not in self.refused:
            self._queued_pages[wanted.urgent] -= wanted.nr_pages
        self._remove(wanted)

    def drop_task(self, pid: int) -> None:
        """Nobody waits for any page of this task any more."""
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
            # Hurried, owned or gone in the meantime: it is in another queue then, or in none.
            if wanted.urgent is urgent and wanted.owner is None and not wanted.gone and not wanted.suspect:
                self._queued_pages[urgent] -= wanted.nr_pages
                return wanted
        return None

    def _split(self, wanted: Wanted, place: int) -> Wanted:
        """Cut `wanted` at `place`: the rest, in no queue."""
        rest = Wanted(wanted.pid, place, wanted.end, wanted.urgent, wanted.since, wanted.owner)
        wanted.end = place
        return self._insert(rest)

    def _split_owned(self, wanted: Wanted, place: int) -> Wanted:
        """As _split; the rest is queued if `wanted` is."""
        rest = self._split(wanted, place)
        if rest.owner is None:
            self._queued_pages[rest.urgent] -= rest.nr_pages
            self._enqueue(rest)
        return rest

    def _hurry(self, wanted: Wanted, start: int, end: int) -> None:
        """The part of a background range that lies in [start, end) is urgent now."""
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
