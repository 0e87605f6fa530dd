"""What is done about a fault, as a value: csrc/serve/fault_plan.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lazypages.engine._uffd import ffi, lib
from tests.support.space import LOST, PAGE, REMOTE, Kind, Space

BASE = 0x10000
PAGES = 64


class Faults:
    """An address space whose faults are planned one after another."""

    def __init__(
        self, *extents: tuple[int, int, int], max_window: int = 16, unsure: Sequence[int] = ()
    ) -> None:
        """`extents`: (first page, pages, source). `unsure`: pages that must not be zeros where they are not known."""
        self.space = Space(
            [(self.addr(first), nr, first * PAGE, source, 1) for first, nr, source in extents],
            [(BASE, self.addr(PAGES))],
        )
        self._readahead: Any = ffi.new("struct lp_readahead *")
        lib.lp_readahead_init(self._readahead, max_window)
        self._ranges: Any = ffi.new("struct lp_range[]", [(self.addr(p), self.addr(p + 1)) for p in unsure])
        self._unsure: Any = ffi.new("struct lp_ranges *", (self._ranges, len(unsure), len(unsure)))

    @staticmethod
    def addr(page: int) -> int:
        return BASE + page * PAGE

    def plan(self, page: int) -> Any:
        return lib.lp_plan_fault(self.space._space, self._readahead, self._unsure, self.addr(page))

    def run(self, plan: Any) -> range:
        first = (plan.run.addr - BASE) // PAGE
        return range(first, first + plan.run.nr_pages)


def test_zeros_and_what_is_not_known() -> None:
    faults = Faults((0, 4, 0), unsure=[9])
    assert faults.plan(8).action == lib.LP_PLAN_ZERO
    assert faults.plan(9).action == lib.LP_PLAN_REFUSE


def test_no_source_has_it() -> None:
    assert Faults((0, 4, LOST)).plan(1).action == lib.LP_PLAN_LOST


def test_a_single_page() -> None:
    faults = Faults((0, 4, 0), (4, 4, REMOTE))
    plan = faults.plan(2)
    assert (plan.action, faults.run(plan), plan.single) == (lib.LP_PLAN_COPY, range(2, 3), True)
    plan = faults.plan(6)
    assert (plan.action, faults.run(plan), plan.single) == (lib.LP_PLAN_ASK, range(6, 7), True)


def test_another_thread_has_claimed_it() -> None:
    faults = Faults((0, 4, 0), (4, 4, REMOTE))
    faults.space.claim(0, 8)
    assert faults.plan(2).action == lib.LP_PLAN_DEFER
    assert faults.plan(6).action == lib.LP_PLAN_ESCALATE


def test_downwards_the_run_begins_before_the_page() -> None:
    faults = Faults((0, 32, 0))
    page = 31
    for _ in range(3):
        plan = faults.plan(page)
        run = faults.run(plan)
        assert (run[-1], plan.before) == (page, len(run) - 1)
        faults.space.claim(run[0], len(run))
        faults.space.commit(run[0], len(run))
        page = run[0] - 1
    assert len(run) > 1


@given(
    st.lists(st.sampled_from([0, 1, REMOTE, LOST]), min_size=PAGES, max_size=PAGES),
    st.lists(st.tuples(st.integers(0, PAGES - 1), st.sampled_from(["fault", "claim", "take"])), max_size=40),
)
def test_a_run_is_of_one_piece_and_can_be_claimed(sources: list[int], steps: list[tuple[int, str]]) -> None:
    faults = Faults(*((page, 1, source) for page, source in enumerate(sources)))
    for page, step in steps:
        if step != "fault":
            if faults.space.claim(page, 1) and step == "take":
                faults.space.commit(page, 1)
            continue
        before = [faults.space.lookup(faults.addr(i)).kind for i in range(PAGES)]
        plan = faults.plan(page)
        assert before == [faults.space.lookup(faults.addr(i)).kind for i in range(PAGES)]
        assert plan.page.addr == faults.addr(page)
        if plan.action not in {lib.LP_PLAN_COPY, lib.LP_PLAN_ASK}:
            assert before[page] not in {Kind.DATA, Kind.REMOTE}
            continue
        run = faults.run(plan)
        assert (page in run, page - run[0]) == (True, plan.before)
        assert {sources[i] for i in run} == {sources[page]}
        assert {before[i] for i in run} == {before[page]}
        assert plan.window.start <= plan.run.addr <= plan.page.addr < plan.window.end
        assert faults.space.claim(plan.run.index, plan.run.nr_pages) == len(run)
        faults.space.commit(plan.run.index, plan.run.nr_pages)
