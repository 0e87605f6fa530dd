"""What waits for page servers, against a dictionary of pages."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lazypages.net.wire import PAGE_SIZE
from lazypages.sources.backlog import Backlog, Wanted

SPACE = 24  # pages of each task, few enough for everything to collide
pids = st.integers(1, 2)
ranges = st.tuples(st.integers(0, SPACE - 1), st.integers(1, SPACE)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], SPACE))
)
owners = st.sampled_from(["a", "b"])


class BacklogMachine(RuleBasedStateMachine):
    """The model: for each page that is waited for, who owns it (None: queued), and whether it is refused."""

    @initialize()
    def start(self) -> None:
        self.backlog = Backlog()
        self.pages: dict[tuple[int, int], str | None] = {}
        self.urgent: set[tuple[int, int]] = set()
        self.refused: set[tuple[int, int]] = set()

    def _places(self, wanted: Wanted) -> list[tuple[int, int]]:
        return [(wanted.pid, page) for page in range(wanted.start // PAGE_SIZE, wanted.end // PAGE_SIZE)]

    def _any(self, condition: Callable[[Wanted], bool]) -> Wanted | None:
        return next((wanted for wanted in self.backlog if condition(wanted)), None)

    @rule(pid=pids, pages=ranges, urgent=st.booleans())
    def add(self, pid: int, pages: tuple[int, int], urgent: bool) -> None:
        first, last = pages
        known = [(pid, page) for page in range(first, last) if (pid, page) in self.pages]
        self.backlog.add(pid, first * PAGE_SIZE, last * PAGE_SIZE, urgent=urgent, now=0.0)
        for page in range(first, last):
            self.pages.setdefault((pid, page), None)
            if urgent and (pid, page) not in known:
                self.urgent.add((pid, page))
        if urgent:
            self.urgent.update(
                place for place in known if self.pages[place] is None and place not in self.refused
            )

    @rule(urgent=st.booleans(), size=st.integers(1, 6), owner=owners)
    def take(self, urgent: bool, size: int, owner: str) -> None:
        queued = {
            place
            for place, by in self.pages.items()
            if by is None and place not in self.refused and (place in self.urgent) is urgent
        }
        wanted = self.backlog.take(size, owner, urgent=urgent)
        assert (wanted is None) == (not queued)
        if wanted is not None:
            places = self._places(wanted)
            assert 0 < len(places) <= size
            assert set(places) <= queued
            self.pages.update(dict.fromkeys(places, owner))

    @rule(pid=pids, pages=ranges)
    def arrived(self, pid: int, pages: tuple[int, int]) -> None:
        first, last = pages
        pieces = self.backlog.arrived(pid, first * PAGE_SIZE, last * PAGE_SIZE)
        got = [page for start, end in pieces for page in range(start // PAGE_SIZE, end // PAGE_SIZE)]
        assert got == [page for page in range(first, last) if (pid, page) in self.pages]
        for page in got:
            self._forget((pid, page))

    def _forget(self, place: tuple[int, int]) -> None:
        del self.pages[place]
        self.urgent.discard(place)
        self.refused.discard(place)

    @rule(owner=owners)
    def give_back(self, owner: str) -> None:
        self.backlog.give_back(owner)
        for place, by in self.pages.items():
            if by == owner:
                self.pages[place] = None
        self._learn_urgency()

    def _learn_urgency(self) -> None:
        """A range on its way that was hurried in part is urgent as a whole; the model takes that over."""
        for wanted in self.backlog:
            for place in self._places(wanted):
                (self.urgent.add if wanted.urgent else self.urgent.discard)(place)

    @rule(owner=owners)
    def refuse(self, owner: str) -> None:
        wanted = self._any(lambda wanted: wanted.owner == owner)
        if wanted is not None:
            places = self._places(wanted)
            self.backlog.refuse(wanted, "server")
            self.pages.update(dict.fromkeys(places))
            self.refused.add(places[0])
            for place in places[1:]:
                self.refused.discard(place)
            self._learn_urgency()

    @rule(owner=owners)
    def retake(self, owner: str) -> None:
        if self.backlog.refused:
            wanted = next(iter(self.backlog.refused))
            (place,) = self._places(wanted)
            self.backlog.retake(wanted, owner)
            self.pages[place] = owner

    @rule(pid=pids)
    def drop_task(self, pid: int) -> None:
        self.backlog.drop_task(pid)
        for place in [place for place in self.pages if place[0] == pid]:
            self._forget(place)

    @invariant()
    def agrees(self) -> None:
        self._learn_urgency()
        found = {place: wanted.owner for wanted in self.backlog for place in self._places(wanted)}
        assert found == self.pages
        assert sum(wanted.nr_pages for wanted in self.backlog) == len(self.pages)
        waiting = {place for wanted in self.backlog.refused for place in self._places(wanted)}
        assert waiting <= self.refused
        for urgent in (True, False):
            queued = [
                place
                for place, by in self.pages.items()
                if by is None and place not in waiting and (place in self.urgent) is urgent
            ]
            assert self.backlog.queued_pages(urgent=urgent) == len(queued)
        self.refused &= waiting | {place for place, by in self.pages.items() if by is not None}
        assert bool(self.backlog) == bool(self.pages)


TestBacklog = BacklogMachine.TestCase


def test_order() -> None:
    """Urgent first come, first served; what was asked for in vain goes first; neighbours go together."""
    backlog = Backlog()
    backlog.add(1, 8 * PAGE_SIZE, 9 * PAGE_SIZE, urgent=True, now=1)
    backlog.add(1, 4 * PAGE_SIZE, 5 * PAGE_SIZE, urgent=True, now=1.2)
    backlog.add(1, 9 * PAGE_SIZE, 10 * PAGE_SIZE, urgent=True, now=1.3)
    first = backlog.take(16, "a", urgent=True)
    assert first is not None
    assert (first.start, first.end, first.since) == (8 * PAGE_SIZE, 10 * PAGE_SIZE, 1)
    backlog.again(first)
    assert backlog.take(16, "a", urgent=True) is first


def test_hurry() -> None:
    """A fault on a page that waits in a long background range does not drag the range along."""
    backlog = Backlog()
    backlog.add(1, 0, 100 * PAGE_SIZE, urgent=False, now=1)
    backlog.add(1, 50 * PAGE_SIZE, 51 * PAGE_SIZE, urgent=True, now=2)
    hurried = backlog.take(16, "a", urgent=True)
    assert hurried is not None
    assert (hurried.start, hurried.nr_pages) == (50 * PAGE_SIZE, 1)
    assert backlog.queued_pages(urgent=False) == 99
