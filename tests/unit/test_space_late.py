"""Several have left a place where other memory arrived meanwhile, and tell so in any order (csrc/serve/late.h).

The events are the same for several histories. Whatever the space makes of them must be right in each: the bytes that
are there, or none.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import pytest

from tests.support.space import PAGE, Change, Extent, Kind, Memory, Nothing, Silent, Space

PLACE, OTHER, ASIDE, ONWARD = (0x100000 * i for i in range(1, 5))
LENGTH = 4 * PAGE


def moved(start: int, to: int, *, awaited: bool = False) -> Change:
    return Change("LP_REMAPPED", start, LENGTH, to, awaited=awaited)


def gone(start: int) -> Change:
    return Change("LP_UNMAPPED", start, LENGTH)


ARRIVES = [moved(OTHER, PLACE), gone(OTHER)]
#: What the thread does that leaves, and where what was in PLACE is then.
LEAVES = {
    "unmapped": ([gone(PLACE)], None),
    "moved": ([moved(PLACE, ASIDE), gone(PLACE)], ASIDE),
}
#: What the other thread does with what has arrived.
GOES = {
    "moves on": ([moved(PLACE, ONWARD), gone(PLACE)], ONWARD),
    "is unmapped": ([gone(PLACE)], None),
    "stays": ([], PLACE),
}


def mixed(one: Sequence[Change], other: Sequence[Change]) -> Iterator[list[Change]]:
    """In all orders that keep those of each."""
    for places in combinations(range(len(one) + len(other)), len(one)):
        a, b = iter(one), iter(other)
        yield [next(a) if i in places else next(b) for i in range(len(one) + len(other))]


def new_space() -> Space:
    return Space([Extent(PLACE, 4), Extent(OTHER, 4)], [(PLACE, PLACE + LENGTH), (OTHER, OTHER + LENGTH)])


def check(told: list[Change], places: dict[int, int | None]) -> bool:
    """``places``: where the memory is that was there. Whether all of it is known."""
    space, known = new_space(), True
    history = list(told)
    space.make(told, at_rest=False)
    space.make(told, at_rest=True, memory=Nothing())
    for was, now in places.items():
        if now is None:
            continue
        for at in range(0, LENGTH, PAGE):
            answer = space.lookup(now + at)
            if any(start <= now + at < end for start, end in space.unsure):
                assert answer.kind in (Kind.ZERO, Kind.LOST), history
                known = False
            else:
                assert (answer.kind, answer.image) == (Kind.DATA, was + at), history
    return known


@pytest.mark.parametrize("goes", GOES)
@pytest.mark.parametrize("leaves", LEAVES)
def test_every_order_of_the_reports(leaves: str, goes: str) -> None:
    (leaving, aside), (going, onward) = LEAVES[leaves], GOES[goes]
    outcomes = [
        (told, check([*told], {PLACE: aside, OTHER: onward})) for told in mixed(leaving, ARRIVES + going)
    ]
    for told, known in outcomes:
        in_order = told[0] == leaving[0]
        assert known or not in_order, f"lost, though it was told in order: {told}"
        # what is told before the mremap has returned is not about what it has brought
        early = ARRIVES[1] in told[told.index(leaving[0]) :]
        assert known or not early, f"lost, though only one can have left so early: {told}"
        assert known or goes != "stays"


def test_the_report_that_was_once_misread() -> None:
    """The thread that had unmapped the place was far slower than the other: seen on 7.2, where it gave zeros."""
    told = [*ARRIVES, moved(PLACE, ONWARD), gone(PLACE), gone(PLACE)]
    assert not check([*told], {OTHER: ONWARD, PLACE: None})
    # the same reports, if who had moved it was late and the other thread has unmapped what arrived
    assert not check([*told], {PLACE: ONWARD, OTHER: None})


@pytest.mark.parametrize("leaves", LEAVES)
def test_a_late_report_that_was_awaited_is_the_first(leaves: str) -> None:
    leaving, aside = LEAVES[leaves]
    arrives = [moved(OTHER, PLACE, awaited=True), gone(OTHER)]
    for rest in mixed(leaving[1:], [moved(PLACE, ONWARD), gone(PLACE)]):
        assert check([*arrives, leaving[0], *rest], {PLACE: aside, OTHER: ONWARD})


def test_what_is_lost_because_nobody_knows_where_it_is_does_not_come_back() -> None:
    """As it would when a page server that was away is there again: the pages would be brought to the wrong place."""
    told = [*ARRIVES, moved(PLACE, ONWARD), gone(PLACE), gone(PLACE)]
    space = new_space()
    space.make(told, at_rest=True, memory=Nothing())
    lost = space.lost
    assert lost
    assert (space.regain(), space.lost) == (0, lost)


def test_awaited_beside_an_mremap_that_reports_no_departure() -> None:
    """MREMAP_DONTUNMAP has returned once its move is read, so it may be its own thread that waits in PLACE."""
    told = [moved(OTHER, PLACE, awaited=True), moved(PLACE, ONWARD), gone(PLACE), gone(PLACE)]
    assert not check([*told], {OTHER: ONWARD, PLACE: None})


@dataclass(frozen=True)
class Mapped:
    """These ranges are registered, each of them one mapping, with nothing missing that could be seen."""

    ranges: tuple[tuple[int, int], ...]

    def within(self, start: int, end: int) -> bool:
        return any(first <= start and end <= last for first, last in self.ranges)

    def zero(self, addr: int) -> bool:
        return True


@pytest.mark.parametrize("error", [0, errno.EAGAIN, errno.ESRCH])
def test_a_child_whose_parent_can_not_be_asked(error: int) -> None:
    """PLACE was moved to ASIDE, other memory grew to PLACE, and the child has both; reported with its fork."""
    both = Mapped(((PLACE, PLACE + LENGTH), (ASIDE, ASIDE + LENGTH)))
    parent: Memory = Silent(error) if error else both
    child = Space([Extent(PLACE, 4)], [(PLACE, PLACE + LENGTH)]).clone()
    child.replay([moved(PLACE, ASIDE), gone(PLACE)], 5, both, parent)
    assert child.lookup(PLACE, 4).kind is Kind.LOST
    assert (ASIDE, ASIDE + LENGTH) in child.unsure


@pytest.mark.parametrize("error", [0, errno.EAGAIN, errno.ESRCH])
def test_a_child_with_grown_memory_whose_parent_can_not_be_asked(error: int) -> None:
    """PLACE was unmapped, and what lies below it grew over it."""
    grown = Mapped(((PLACE - LENGTH, PLACE + LENGTH),))
    parent: Memory = Silent(error) if error else grown
    child = Space([Extent(PLACE, 4)], [(PLACE, PLACE + LENGTH)]).clone()
    child.replay([gone(PLACE)], 5, grown, parent)
    assert child.lookup(PLACE, 4).kind is Kind.LOST
