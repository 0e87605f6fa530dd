"""How much is read ahead of a fault: csrc/serve/readahead.h."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.engine._uffd import ffi, lib

STREAMS = 4
PAGES = st.one_of(st.integers(0, 40), st.integers(0, (1 << 52) - 1))
WINDOWS = st.one_of(st.integers(0, 3), st.integers(0, 1 << 40))


class Plan:
    def __init__(self, max_window: int) -> None:
        self._plan: Any = ffi.new("struct lp_readahead *")
        lib.lp_readahead_init(self._plan, max_window)

    def fault(self, page: int) -> range:
        """The pages to bring for a fault."""
        window = lib.lp_readahead_fault(self._plan, page)
        return range(window.first, window.first + window.nr)


@given(WINDOWS, st.lists(PAGES, max_size=60))
def test_a_window_holds_its_page_and_no_more_than_allowed(max_window: int, pages: list[int]) -> None:
    plan = Plan(max_window)
    for page in pages:
        window = plan.fault(page)
        assert page in window
        assert len(window) <= max(1, max_window)
        assert page in {window[0], window[-1]}


@given(st.integers(1, 300), st.integers(0, 1 << 51), st.integers(1, 12))
def test_upwards(max_window: int, start: int, faults: int) -> None:
    """Each fault of a thread that goes up continues what has come; windows double and leave nothing out."""
    plan, page, expected = Plan(max_window), start, 1
    for _ in range(faults):
        window = plan.fault(page)
        assert window == range(page, page + expected)
        page, expected = window.stop, min(expected * 2, max_window)


@given(st.integers(1, 300), st.integers(0, 1 << 51), st.integers(1, 12))
def test_downwards(max_window: int, start: int, faults: int) -> None:
    """The same downwards, and no page below the first one."""
    plan, page, expected = Plan(max_window), start, 1
    for _ in range(faults):
        window = plan.fault(page)
        assert window.stop == page + 1
        assert len(window) == min(expected, page + 1)
        if not window.start:
            break
        page, expected = window.start - 1, min(expected * 2, max_window)


@given(
    st.permutations([(100_000 * i, step) for i in range(1, STREAMS + 1) for step in (1, -1)][: 2 * STREAMS]),
    st.lists(st.integers(0, STREAMS - 1), max_size=60),
)
def test_streams_do_not_disturb_each_other(places: list[tuple[int, int]], turns: list[int]) -> None:
    """As many streams as a plan knows, up and down, in any order: each gets what it would get alone."""
    plan = Plan(64)
    alone = [Plan(64) for _ in range(STREAMS)]
    at = [place for place, _ in places[:STREAMS]]
    if len({place for place, _ in places[:STREAMS]}) < STREAMS:
        return
    for turn in turns:
        window = plan.fault(at[turn])
        assert window == alone[turn].fault(at[turn])
        at[turn] = window.stop if places[turn][1] > 0 else window.start - 1


@given(st.lists(st.integers(0, 1 << 40).map(lambda page: page * 3), unique=True, max_size=40))
def test_faults_here_and_there_bring_one_page_each(pages: list[int]) -> None:
    plan = Plan(64)
    for page in pages:
        assert plan.fault(page) == range(page, page + 1)


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize(("skipped", "expected"), [(0, 8), (4, 8), (5, 1)])
def test_a_stream_goes_on_past_what_is_there_already(step: int, skipped: int, expected: int) -> None:
    """By no more pages than the last window had, and not before it has become a stream."""
    plan = Plan(64)
    for done, window in ((0, 1), (1, 2), (3, 4)):
        assert len(plan.fault(1000 + step * done)) == window
    assert len(plan.fault(1000 + step * (7 + skipped))) == expected
    young = Plan(64)
    young.fault(1000)
    young.fault(1000 + step)
    assert len(young.fault(1000 + step * 4)) == 1


def test_a_stream_is_forgotten_for_newer_ones() -> None:
    plan = Plan(64)
    plan.fault(1000)
    for i in range(STREAMS):
        plan.fault(2000 + 100 * i)
    assert len(plan.fault(1001)) == 1


@pytest.mark.parametrize("max_window", [0, 1])
def test_no_readahead(max_window: int) -> None:
    plan = Plan(max_window)
    assert [len(plan.fault(page)) for page in (5, 6, 7, 6, 5)] == [1] * 5
