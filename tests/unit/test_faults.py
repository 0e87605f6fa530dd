"""csrc/serve/faults.c: faults that wait, against a list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.engine._uffd import ffi, lib

PAGE = 4096
#: Pages that collide with each other, and pages far apart.
addresses = st.one_of(
    st.integers(0, 40).map(lambda n: n * PAGE),
    st.integers(0, (1 << 47) // PAGE - 1).map(lambda n: n * PAGE),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), addresses),
        st.tuples(st.just("pop"), st.just(0)),
        st.tuples(st.just("sort"), addresses),
    ),
    max_size=400,
)


@pytest.fixture
def faults() -> Iterator[Any]:
    faults = ffi.new("struct lp_faults *")
    yield faults
    lib.lp_faults_free(faults)


def all_of(faults: Any) -> list[tuple[int, int, int]]:
    found = [lib.lp_faults_at(faults, n) for n in range(faults.nr)]
    return [(one.addr, one.since, one.times) for one in found]


@given(steps)
def test_as_a_list(steps: list[tuple[str, int]]) -> None:
    faults = ffi.new("struct lp_faults *")
    model: list[list[int]] = []
    for now, (what, addr) in enumerate(steps):
        if what == "push":
            assert lib.lp_faults_push(faults, (addr, now, 1))
            known = next((one for one in model if one[0] == addr), None)
            if known:
                known[2] += 1
            else:
                model.append([addr, now, 1])
        elif what == "sort":
            if model:
                lib.lp_faults_sort(faults, addr)
            model.sort(key=lambda one: (one[0] - addr) % (1 << 64))
        elif model:
            popped = lib.lp_faults_pop(faults)
            assert [popped.addr, popped.since, popped.times] == model.pop(0)
        assert all_of(faults) == [tuple(one) for one in model]
    lib.lp_faults_free(faults)


def test_many(faults: Any) -> None:
    """It grows, goes round, and finds each page again."""
    for turn in range(3):
        for page in range(5000):
            assert lib.lp_faults_push(faults, (page * 7919 % 5000 * PAGE, turn, 1))
            assert lib.lp_faults_push(faults, (page * 7919 % 5000 * PAGE, turn, 1))
        assert faults.nr == 5000
        lib.lp_faults_sort(faults, 1000 * PAGE)
        popped = [lib.lp_faults_pop(faults) for _ in range(5000)]
        assert [one.addr // PAGE for one in popped] == [*range(1000, 5000), *range(1000)]
        assert {one.times for one in popped} == {2}


def test_room_once_reserved(faults: Any) -> None:
    assert lib.lp_faults_reserve(faults, 300)
    for page in range(300):
        assert lib.lp_faults_push(faults, (page * PAGE, 0, 1))
    assert faults.nr == 300
