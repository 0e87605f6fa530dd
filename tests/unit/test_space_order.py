"""Threads change the layout, a kernel tells of it late: ``lp_space_next_change`` has to find what happened when.

The kernel here is a model with the habits of the real one that matter (csrc/space.h): a change is made at once, but
told of later, event by event, and a thread goes on only when the last event of its change has been told.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.space import PAGE, Change, Extent, Kind, Space

UNITS = 24  # of address space, a page each, half of them mapped at first
BASE = 0x100000


@dataclass
class Thread:
    untold: deque[Change] = field(default_factory=deque)
    tells_of: set[int] = field(default_factory=set)  # the units that its change has left


@dataclass
class Kernel:
    """``pages``: what is where, None: a page of zeros; ``owner``: whose it is."""

    pages: dict[int, int | None]
    owner: dict[int, int]
    threads: list[Thread]
    told: list[Change] = field(default_factory=list)

    def event(self, kind: str, unit: int, length: int, to: int = 0) -> Change:
        return Change(
            kind, BASE + unit * PAGE, length * PAGE, BASE + to * PAGE if kind == "LP_REMAPPED" else 0
        )

    def tell(self, me: int) -> None:
        thread = self.threads[me]
        self.told.append(thread.untold.popleft())
        if not thread.untold:
            thread.tells_of.clear()

    def change(self, me: int, what: str, unit: int, length: int, to: int) -> None:
        """Only what a program may do: with memory of its own, to where it has memory itself or nobody has."""
        thread = self.threads[me]
        source, target = set(range(unit, unit + length)), set(range(to, to + length))
        if any(self.owner.get(i) != me for i in source):
            return
        # What has arrived where another thread has not told of its leaving stays until it has. Else both tell of
        # leaving the same place, and nothing says who was there first (csrc/space.h).
        if any(source & other.tells_of for other in self.threads if other is not thread):
            return
        if what == "discard":
            for i in source:
                self.pages[i] = None
            thread.untold.append(self.event("LP_REMOVED", unit, length))
            return
        if what == "unmap":
            for i in source:
                del self.pages[i], self.owner[i]
            thread.untold.append(self.event("LP_UNMAPPED", unit, length))
            thread.tells_of |= source
            return
        if source & target or any(self.owner.get(i, me) != me for i in target):
            return
        if any(
            target & other.tells_of and target & self.pages.keys()
            for other in self.threads
            if other is not thread
        ):
            return
        if target & self.pages.keys():
            thread.untold.append(self.event("LP_UNMAPPED", to, length))
            thread.tells_of |= target & self.pages.keys()
        for i in range(length):
            self.pages[to + i], self.owner[to + i] = self.pages[unit + i], me
            if what == "move":
                del self.pages[unit + i], self.owner[unit + i]
            else:
                self.pages[unit + i] = None
        thread.untold.append(self.event("LP_REMAPPED", unit, length, to))
        thread.tells_of |= source
        if what == "move":
            thread.untold.append(self.event("LP_UNMAPPED", unit, length))


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["tell", "tell", "move", "move", "move", "leave empty", "unmap", "discard"]),
        st.integers(0, UNITS - 1),
        st.integers(1, 4),
        st.integers(0, UNITS - 1),
        st.booleans(),  # whether we look at this moment if the kernel is at rest
    ),
    max_size=60,
)


@settings(max_examples=600)
@given(STEPS)
def test_layout_after_events_in_any_order(steps: list[tuple[int, str, int, int, int, bool]]) -> None:
    mapped = [i for i in range(UNITS) if i % 4 < 2]
    kernel = Kernel({i: i for i in mapped}, {i: i // 4 % 3 for i in mapped}, [Thread() for _ in range(3)])
    space = Space(
        [Extent(BASE + i * PAGE, 1, offset=i * PAGE) for i in mapped],
        [(BASE + i * PAGE, BASE + (i + 2) * PAGE) for i in mapped[::2]],
    )
    for me, what, unit, length, to, looks in steps:
        if kernel.threads[me].untold:
            kernel.tell(me)  # it can do nothing else
        elif what != "tell":
            kernel.change(me, what, unit, length, to)
        space.make(kernel.told, at_rest=looks and not any(thread.untold for thread in kernel.threads))
    for me, thread in enumerate(kernel.threads):
        while thread.untold:
            kernel.tell(me)
    space.make(kernel.told, at_rest=True)
    found = {}
    for i in range(UNITS + 4):
        answer = space.lookup(BASE + i * PAGE)
        if answer.kind is Kind.DATA:
            found[i] = answer.offset // PAGE
    assert found == {i: page for i, page in kernel.pages.items() if page is not None}
