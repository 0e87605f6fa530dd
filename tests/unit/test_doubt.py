"""Whether what an UNMAP event tells has happened, what old kernels tell of a move, whose a fork is (doubt.h)."""

from __future__ import annotations

from itertools import product

import pytest

from lazypages.engine._uffd import ffi, lib
from tests.support.space import PAGE, Change, Extent, Kind, Space

PLACE, OTHER, FAR = 0x100000, 0x200000, 0x300000
PAGES = 8
LENGTH = PAGES * PAGE

GONE, STAYS, UNKNOWN = lib.LP_IS_GONE, lib.LP_STAYS, lib.LP_UNKNOWN
EVIDENCE = ("here", "present", "attached", "below", "alike", "grows")


def verdict(*evidence: str, unsure: bool = False, edge: int = PLACE) -> int:
    doubt = ffi.new("struct lp_doubt *", [PLACE, PLACE + LENGTH, PLACE, edge, PLACE + LENGTH, unsure])
    return int(lib.lp_verdict(doubt, ffi.new("struct lp_evidence *", dict.fromkeys(evidence, True))))


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        ((), GONE),
        (("here",), STAYS),
        (("here", "present"), STAYS),
        (("here", "present", "attached"), STAYS),
        (("here", "attached"), GONE),
        (("here", "below"), UNKNOWN),
        (("here", "below", "alike"), STAYS),
        (("here", "below", "attached"), GONE),
        (("here", "grows"), UNKNOWN),
    ],
)
def test_verdict(evidence: tuple[str, ...], expected: int) -> None:
    assert verdict(*evidence) == expected


def test_verdict_is_careful() -> None:
    """Where nothing is registered nothing stays, and what is not sure stays only if a page proves it."""
    for bits in product([False, True], repeat=len(EVIDENCE)):
        evidence = [name for name, bit in zip(EVIDENCE, bits, strict=True) if bit]
        if "here" not in evidence:
            assert verdict(*evidence) == GONE
        elif "present" not in evidence:
            assert verdict(*evidence, unsure=True) != STAYS
            assert verdict(*evidence, edge=lib.LP_NO_EDGE) == UNKNOWN


class Registered:
    """A task's memory: mappings, and which pages are there."""

    def __init__(self, *mappings: tuple[int, int], there: set[int] | None = None) -> None:
        self.mappings, self.there, self.zeroed = mappings, there or set(), set[int]()

    def within(self, start: int, end: int) -> bool:
        return any(a <= start and end <= b for a, b in self.mappings)

    def zero(self, addr: int) -> bool:
        if addr in self.there:
            return False
        self.zeroed.add(addr)
        return True


def unmapped(start: int, length: int = LENGTH) -> Change:
    return Change("LP_UNMAPPED", start, length)


def moved(start: int, to: int, length: int = LENGTH) -> Change:
    return Change("LP_REMAPPED", start, length, to)


def forked(told: int = 0) -> Change:
    return Change("LP_FORKED", to=told)


def new_space() -> Space:
    return Space(
        [Extent(PLACE, PAGES), Extent(OTHER, PAGES, offset=LENGTH)],
        [(PLACE, PLACE + LENGTH), (OTHER, OTHER + LENGTH)],
    )


def found(space: Space, start: int, pages: int = PAGES) -> list[int | None]:
    """The offset, in pages, of what each page waits for; None: nothing; -1: lost."""
    answers = [space.lookup(start + page * PAGE) for page in range(pages)]
    return [
        answer.offset // PAGE if answer.kind is Kind.DATA else -1 if answer.kind is Kind.LOST else None
        for answer in answers
    ]


HERE, THERE, NOTHING = list(range(PAGES)), list(range(PAGES, 2 * PAGES)), [None] * PAGES


def test_nothing_is_asked_of_what_nobody_waits_for() -> None:
    space = new_space()
    space.remove(PLACE, PLACE + LENGTH)
    changes = [unmapped(PLACE)]
    space.make(changes, at_rest=False)
    assert changes == []


def test_what_is_unmapped_waits_until_it_can_be_asked() -> None:
    space = new_space()
    changes = [unmapped(PLACE), Change("LP_REMOVED", OTHER, LENGTH)]
    space.make(changes, at_rest=False)
    assert len(changes) == 2
    assert found(space, PLACE) == HERE


@pytest.mark.parametrize(
    ("mappings", "there", "expected"),
    [
        ([], set(), NOTHING),
        ([(PLACE, PLACE + LENGTH)], set(), HERE),
        ([(PLACE - PAGE, PLACE + LENGTH)], set(), NOTHING),  # has grown
        ([(PLACE, PLACE + LENGTH - PAGE)], set(), NOTHING),
        ([(PLACE - PAGE, PLACE + LENGTH)], {PLACE}, [None, *HERE[1:]]),
    ],
    ids=["gone", "stays", "grown", "a part", "a page is there"],
)
def test_unmapped(mappings: list[tuple[int, int]], there: set[int], expected: list[int | None]) -> None:
    space = new_space()
    space.claim(0, 1)
    space.commit(0, 1)  # the first page has been brought
    if expected == HERE:
        expected = [None, *HERE[1:]]
    memory = Registered(*mappings, there=there)
    space.make([unmapped(PLACE)], at_rest=True, memory=memory)
    assert found(space, PLACE) == expected
    assert found(space, OTHER) == THERE
    assert memory.zeroed <= {PLACE}


def test_a_move_to_where_it_grows_as_well() -> None:
    """mremap tells the length from before: the rest of the new place, once another's, is new."""
    space = new_space()
    memory = Registered((OTHER, OTHER + LENGTH))
    changes = [unmapped(OTHER), moved(PLACE, OTHER, 4 * PAGE), unmapped(PLACE, 4 * PAGE)]
    space.make(changes, at_rest=True, memory=memory)
    assert found(space, OTHER) == [*HERE[:4], None, None, None, None]


def test_what_grew_and_was_moved_is_not_what_was_unmapped() -> None:
    half = LENGTH // 2
    space = new_space()
    changes = [unmapped(PLACE + half, half), moved(PLACE, FAR), unmapped(PLACE)]
    space.make(changes, at_rest=True, memory=Registered((FAR, FAR + LENGTH)))
    assert found(space, FAR) == [*HERE[: PAGES // 2], None, None, None, None]


def test_what_may_have_been_unmapped_before_it_was_moved_is_lost() -> None:
    half = LENGTH // 2
    space = new_space()
    changes = [unmapped(PLACE + half, half), moved(PLACE + half, FAR, half), unmapped(PLACE + half, half)]
    space.make(changes, at_rest=True, memory=Registered((FAR, FAR + half), (PLACE, PLACE + half)))
    assert found(space, FAR, PAGES // 2) == [-1] * (PAGES // 2)
    assert found(space, PLACE, PAGES // 2) == HERE[: PAGES // 2]


@pytest.mark.parametrize("after", [False, True], ids=["new", "old"])
def test_lengths_of_old_kernels(after: bool) -> None:
    """A move of 8 pages that shrinks them to 3, to where other memory follows."""
    rest = LENGTH - 3 * PAGE
    space = new_space()
    told = LENGTH if after else 3 * PAGE
    changes = [
        moved(PLACE, OTHER - 3 * PAGE, told),
        unmapped(PLACE + 3 * PAGE, rest),
        unmapped(PLACE, 3 * PAGE),
    ]
    memory = Registered((OTHER - 3 * PAGE, OTHER), (OTHER, OTHER + LENGTH))
    space.make(changes, at_rest=True, memory=memory, old_length=after)
    assert found(space, OTHER - 3 * PAGE, 3) == HERE[:3]
    assert found(space, OTHER) == THERE


def test_a_plain_move_of_an_old_kernel() -> None:
    space = new_space()
    space.make([moved(PLACE, FAR), unmapped(PLACE)], at_rest=True, old_length=True)
    assert found(space, FAR) == HERE


def test_as_many_moves_as_there_are() -> None:
    """Each waits for its second event, when all have told of the first."""
    many = 200
    space = Space([Extent(PLACE, many)], [(PLACE, PLACE + many * PAGE)])
    to = [FAR + (i ^ 1) * PAGE for i in range(many)]
    changes = [
        *[moved(PLACE + i * PAGE, to[i], PAGE) for i in range(many)],
        # others go to where they were
        *[moved(to[i], PLACE + i * PAGE, PAGE) for i in range(many)],
        *[unmapped(PLACE + i * PAGE, PAGE) for i in range(many)],
        *[unmapped(to[i], PAGE) for i in range(many)],
    ]
    space.make(changes, at_rest=True)
    assert found(space, PLACE, many) == list(range(many))


@pytest.mark.parametrize(
    ("changes", "parent", "child", "expected"),
    [
        pytest.param(
            [unmapped(PLACE), forked()], [OTHER], [PLACE, OTHER], [HERE, THERE, NOTHING], id="fork first"
        ),
        pytest.param(
            [unmapped(PLACE), forked()], [OTHER], [OTHER], [NOTHING, THERE, NOTHING], id="munmap first"
        ),
        pytest.param(
            [forked(), unmapped(PLACE)], [OTHER], [OTHER], [NOTHING, THERE, NOTHING], id="told late"
        ),
        pytest.param(
            [moved(PLACE, FAR), unmapped(PLACE), forked()],
            [FAR, OTHER],
            [PLACE, OTHER],
            [HERE, THERE, NOTHING],
            id="fork before the move",
        ),
        pytest.param(
            [moved(PLACE, FAR), forked(), unmapped(PLACE)],
            [FAR, OTHER],
            [FAR, OTHER],
            [NOTHING, THERE, HERE],
            id="fork after the move",
        ),
        pytest.param(
            [forked(), unmapped(OTHER), moved(PLACE, OTHER), unmapped(PLACE)],
            [OTHER],
            [PLACE, OTHER],
            [HERE, THERE, NOTHING],
            id="fork before the move onto other memory",
        ),
        pytest.param(
            [unmapped(OTHER), moved(PLACE, OTHER), forked(), unmapped(PLACE)],
            [OTHER],
            [OTHER],
            [NOTHING, HERE, NOTHING],
            id="fork after the move onto other memory",
        ),
    ],
)
def test_what_a_child_has(
    changes: list[Change], parent: list[int], child: list[int], expected: list[list[int | None]]
) -> None:
    space = new_space()
    memory = Registered(*[(start, start + LENGTH) for start in parent])
    theirs = Registered(*[(start, start + LENGTH) for start in child])
    ((_, born),) = space.make(changes, at_rest=True, memory=memory, children=[theirs])
    assert [found(born, start) for start in (PLACE, OTHER, FAR)] == expected


@pytest.mark.parametrize("told", [0, 2])
def test_what_is_discarded_after_a_fork_is_the_childs(told: int) -> None:
    space = new_space()
    changes = [Change("LP_REMOVED", PLACE, LENGTH, to=1), forked(told)]
    ((_, born),) = space.make(changes, at_rest=True, memory=Registered(), children=[Registered()])
    assert found(born, PLACE) == (HERE if told == 0 else NOTHING)
