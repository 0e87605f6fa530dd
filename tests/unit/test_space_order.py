"""Threads change the layout, a kernel tells of it late: the space has to find what happened when, and whether it did.

The kernel here is a model with the habits of the real ones that matter (csrc/serve/address_space.h,
csrc/serve/doubt.h): a change is made at once, but told of later, event by event, and a thread goes on only when the
last event of its change has been told. Calls fail after their event, memory grows without one, and a fork is told of
after what other threads have done since.

Where the model asks, a real kernel is asked by ``UFFDIO_COPY`` and ``UFFDIO_ZEROPAGE``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.space import PAGE, Change, Extent, Kind, Space

UNITS = 24  # of address space, a page each, half of them mapped at first
BASE = 0x100000


@dataclass
class Page:
    """``image``: the page of the dump that it holds, or None; ``there``: not missing; ``mapping``: a number."""

    image: int | None
    mapping: int
    owner: int
    there: bool = False
    grown: bool = False  # which no event told
    left: bool = False  # by MREMAP_DONTUNMAP, since the layout was at rest
    at_once: bool = False  # forked while it was being discarded: the child may find either


@dataclass
class Memory:
    """What one task has, unit by unit. As the tests' ``space.Memory``."""

    pages: dict[int, Page]

    def within(self, start: int, end: int) -> bool:
        units = range((start - BASE) // PAGE, (end - BASE) // PAGE)
        return len(
            {page.mapping if (page := self.pages.get(i)) else None for i in units} | {None}
        ) == 2 and all(i in self.pages for i in units)

    def zero(self, addr: int) -> bool:
        page = self.pages[(addr - BASE) // PAGE]
        assert page.image is None or page.there or page.at_once, "a page of zeros over one that is pending"
        was_there, page.there = page.there, True
        return not was_there


def units(change: Change) -> range:
    start = (change.start - BASE) // PAGE
    return range(start, start + change.length // PAGE)


@dataclass
class Thread:
    untold: deque[Change] = field(default_factory=deque)
    tells_of: set[int] = field(default_factory=set)  # the units that its change has left


@dataclass
class Kernel(Memory):
    """``old``: as Linux 6.1 and 6.12 tell of an mremap that shrinks."""

    threads: list[Thread]
    old: bool
    mappings: count[int]
    told: list[Change] = field(default_factory=list)
    nr_told: int = 0
    children: list[Memory] = field(default_factory=list)
    surprises: int = 0  # calls that failed, growth, forks: what may leave a doubt
    unclear: set[int] = field(default_factory=set)  # units where that was since the layout was at rest

    def tell(self, me: int) -> None:
        thread = self.threads[me]
        change = thread.untold.popleft()
        self.told.append(
            change._replace(to=self.nr_told) if change.kind in ("LP_FORKED", "LP_REMOVED") else change
        )
        self.nr_told += 1
        if change.kind == "LP_REMOVED":  # told before it is done
            forking = [
                other.uffd for each in self.threads for other in each.untold if other.kind == "LP_FORKED"
            ]
            for i in units(change):
                for child in forking:
                    for page in self.children[child].pages.values():
                        page.at_once |= page.image is not None and page.image == self.pages[i].image
                self.pages[i] = replace(self.pages[i], image=None, there=False)
        if not thread.untold:
            thread.tells_of.clear()

    def unmaps(self, me: int, unit: int, length: int) -> None:
        self.threads[me].untold.append(Change("LP_UNMAPPED", BASE + unit * PAGE, length * PAGE))

    def split(self, unit: int) -> None:
        """A mapping begins here, if one goes on here."""
        if unit in self.pages and unit - 1 in self.pages:
            old = self.pages[unit].mapping
            if self.pages[unit - 1].mapping == old:
                new = next(self.mappings)
                while (page := self.pages.get(unit)) and page.mapping == old:
                    page.mapping = new
                    unit += 1

    def change(self, me: int, what: str, unit: int, length: int, to: int, more: int) -> None:  # noqa: PLR0917
        """Only what a program may do: with memory of its own, to where it has memory itself or nobody has."""
        thread = self.threads[me]
        own = [i for i in range(UNITS + 8) if i in self.pages and self.pages[i].owner == me]
        if not own:
            return
        unit = own[unit % len(own)]
        while unit + length - 1 not in own:
            length -= 1
        source = set(range(unit, unit + length))
        if not source <= set(own):
            return
        others = [other for other in self.threads if other is not thread]
        # What has grown where another thread has not told of its leaving stays until it has: docs/kernel.md, "What
        # can't be told apart".
        if any(i in other.tells_of and self.pages[i].grown for other in others for i in source):
            return
        if what == "discard":
            thread.untold.append(Change("LP_REMOVED", BASE + unit * PAGE, length * PAGE))
        elif what == "fork":
            self.surprises += 1
            discarding = [
                change for other in others for change in other.untold if change.kind == "LP_REMOVED"
            ]
            at_once = {i for change in discarding for i in units(change)}
            self.children.append(
                Memory({i: replace(page, at_once=i in at_once) for i, page in self.pages.items()})
            )
            thread.untold.append(Change("LP_FORKED", uffd=len(self.children) - 1))
        elif what == "unmap":
            self.leave(me, unit, length)
        elif what == "fail":
            # docs/kernel.md, "What can't be told apart": a child would have what was moved and what was left
            if any(self.pages[i].left for i in source):
                return
            self.surprises += 1
            self.unclear |= source
            self.split(unit)
            if more % 2:
                self.split(unit + length)
            self.unmaps(me, unit, length)
        elif what == "grow":
            last = self.pages[unit]
            end = unit
            while end in self.pages and self.pages[end].mapping == last.mapping:
                end += 1
            if any(i in self.pages for i in range(end, end + more)):
                return
            self.surprises += 1
            self.unclear |= set(range(end, end + more))
            for i in range(end, end + more):
                self.pages[i] = Page(None, last.mapping, me, grown=True)
        else:
            self.move(me, what, unit, length, to, more)

    def leave(self, me: int, unit: int, length: int) -> None:
        """Unmaps, and has it told; what is not mapped is no matter."""
        self.split(unit)
        self.split(unit + length)
        self.unclear |= {i for i in range(unit, unit + length) if i in self.pages and self.pages[i].grown}
        left = {i for i in range(unit, unit + length) if self.pages.pop(i, None)}
        if left:
            self.unmaps(me, unit, length)
            self.threads[me].tells_of |= left

    def move(self, me: int, what: str, unit: int, length: int, to: int, more: int) -> None:  # noqa: PLR0917
        """mremap to a fixed place, as long as before, shorter, or longer."""
        new = {"shrink": max(1, length - more), "extend": length + more}.get(what, length)
        source, target = set(range(unit, unit + length)), set(range(to, to + new))
        if source & target or any(i in self.pages and self.pages[i].owner != me for i in target):
            return
        others = [other for other in self.threads if other is not self.threads[me]]
        if any(target & other.tells_of and target & self.pages.keys() for other in others):
            return
        # Likewise, what has grown unseen, or failed to leave before it did, leaves no place to others before rest.
        if any(target & other.tells_of & self.unclear for other in others):
            return
        if what == "extend":
            self.surprises += 1
            self.unclear |= target
        if len({self.pages[i].mapping for i in source}) > 1:  # EFAULT, before 6.18 with the place gone
            if self.old:
                self.leave(me, to, new)
            return
        self.leave(me, to, new)
        shorter = min(length, new)
        mapping = next(self.mappings)
        self.split(unit)
        self.split(unit + length)
        tail = {unit + i for i in range(shorter, length)}
        self.unclear |= {i for i in tail if self.pages[i].grown}
        for i in tail:
            del self.pages[i]
        left = next(self.mappings)
        self.unclear |= {i for i in source if i in self.pages and self.pages[i].grown}
        for i in range(new):
            page = self.pages.pop(unit + i) if i < shorter else Page(None, mapping, me)
            self.pages[to + i] = replace(page, mapping=mapping, grown=i >= shorter)
            if what == "leave empty" and i < shorter:
                self.pages[unit + i] = Page(None, left, me, left=True)
        told = length if self.old else shorter
        events = self.threads[me].untold
        events.append(Change("LP_REMAPPED", BASE + unit * PAGE, told * PAGE, BASE + to * PAGE))
        self.threads[me].tells_of |= source
        if tail:
            self.unmaps(me, unit + shorter, length - shorter)
        if what != "leave empty":
            self.unmaps(me, unit, shorter)


def check(space: Space, memory: Memory, who: str, *, sure: bool) -> None:
    """Nothing wrong is brought anywhere; and nothing is lost where nothing is in doubt."""
    for i in range(UNITS + 8):
        answer, page = space.lookup(BASE + i * PAGE), memory.pages.get(i)
        story = f"{who}: {answer.kind.name} of {answer.offset // PAGE} at {i}, where {page} is"
        if answer.kind is Kind.LOST:
            assert page or space.unsure, story  # poison finds nothing there: no harm
            assert not sure, story
        elif answer.kind is Kind.DATA:
            assert page, story
            assert (answer.offset // PAGE, page.there) == (page.image, False), story
        elif page and not page.at_once:
            refused = any(start <= BASE + i * PAGE < end for start, end in space.unsure)
            assert page.image is None or page.there or refused, story


def touch(space: Space, kernel: Kernel, unit: int) -> None:
    """A thread faults on a page and gets an answer."""
    page = kernel.pages.get(unit)
    answer = space.lookup(BASE + unit * PAGE)
    if page and not page.there and answer.kind in (Kind.ZERO, Kind.DATA):
        if answer.kind is Kind.DATA:
            space.claim(answer.dense, 1)
            space.commit(answer.dense, 1)
        page.there = True


ORDINARY = ["tell", "tell", "move", "move", "move", "leave empty", "unmap", "discard", "shrink", "extend"]
SURPRISING = ["fail", "fail", "grow", "fork"]


def steps(kinds: list[str]) -> st.SearchStrategy[list[tuple[int, str, int, int, int, int, bool]]]:
    return st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from([*kinds, "touch"]),
            st.integers(0, UNITS - 1),
            st.integers(1, 4),
            st.integers(0, UNITS - 1),
            st.integers(1, 3),
            st.booleans(),  # whether we look at this moment if the kernel is at rest
        ),
        max_size=60,
    )


def run(steps: list[tuple[int, str, int, int, int, int, bool]], *, old: bool) -> None:
    mapped = [i for i in range(UNITS) if i % 4 < 2]
    kernel = Kernel(
        {i: Page(i, i // 4, i // 4 % 3) for i in mapped}, [Thread() for _ in range(3)], old, count(UNITS)
    )
    space = Space(
        [Extent(BASE + i * PAGE, 1, offset=i * PAGE) for i in mapped],
        [(BASE + i * PAGE, BASE + (i + 2) * PAGE) for i in mapped[::2]],
    )

    def look(at_rest: bool) -> None:
        born = space.make(
            kernel.told, at_rest=at_rest, memory=kernel, children=kernel.children, old_length=old
        )
        if at_rest:
            kernel.unclear.clear()
            for page in kernel.pages.values():
                page.left = False
        for which, child in born:
            check(child, kernel.children[which], f"child {which}", sure=False)

    for me, what, unit, length, to, more, looks in steps:
        at_rest = looks and not any(thread.untold for thread in kernel.threads)
        if what == "touch":
            if at_rest:
                look(True)
                touch(space, kernel, unit)
            continue
        if kernel.threads[me].untold:
            kernel.tell(me)  # it can do nothing else
        elif what != "tell":
            kernel.change(me, what, unit, length, to, more)
        look(looks and not any(thread.untold for thread in kernel.threads))
    for me, thread in enumerate(kernel.threads):
        while thread.untold:
            kernel.tell(me)
    look(True)
    check(space, kernel, "the task", sure=not kernel.surprises and not space.times_unclear)


@pytest.mark.loop("6.18")
@settings(max_examples=examples(300))
@pytest.mark.parametrize("old", [False, True], ids=["6.18", "6.1"])
@given(steps(ORDINARY))
def test_layout_after_events_in_any_order(
    old: bool, steps: list[tuple[int, str, int, int, int, int, bool]]
) -> None:
    run(steps, old=old)


@pytest.mark.loop("6.18")
@settings(max_examples=examples(300))
@pytest.mark.parametrize("old", [False, True], ids=["6.18", "6.1"])
@given(steps(ORDINARY + SURPRISING))
def test_layout_after_calls_that_fail_and_memory_that_grows(
    old: bool, steps: list[tuple[int, str, int, int, int, int, bool]]
) -> None:
    run(steps, old=old)
