"""Whether pages are likely to come from a disk: csrc/serve/cold.h."""

from __future__ import annotations

from typing import Any

import pytest

from lazypages.engine._uffd import ffi, lib

READS = int(lib.LP_COLD_READS)
TRIES = int(lib.LP_COLD_TRIES)
FAST, SLOW = 1_500, 60_000  # ns, of one page
LONG = 8_000_000  # ns
SECOND = 1_000_000_000


@pytest.fixture
def cold() -> Any:
    return ffi.new("struct lp_cold *")


def read(cold: Any, ns: int, times: int = 1, *, now: int = 0, pages: int = 1) -> None:
    for _ in range(times):
        lib.lp_cold_read(cold, now, ns, pages)


def test_at_first_reads_are_expected_to_be_slow(cold: Any) -> None:
    assert lib.lp_cold_expected(cold)


def test_as_long_as_some_are(cold: Any) -> None:
    for _ in range(10):
        read(cold, FAST, READS - 1)
        read(cold, SLOW)
    assert lib.lp_cold_expected(cold)
    read(cold, FAST, READS)
    assert not lib.lp_cold_expected(cold)


def test_a_read_of_many_pages_may_take_longer(cold: Any) -> None:
    read(cold, SLOW, READS, pages=64)
    assert not lib.lp_cold_expected(cold)


def test_around_what_was_slow(cold: Any) -> None:
    """As long as it pays: in an image where hardly anything is found by later faults it ends soon."""
    around = 0
    for _ in range(10_000):
        read(cold, SLOW)
        around += lib.lp_cold_around(cold)
    assert around == 8 << 20
    read(cold, FAST)
    assert lib.lp_cold_around(cold) == 0
    read(cold, SLOW)
    assert lib.lp_cold_around(cold) > 0


def test_a_long_wait_has_a_few_reads_tried(cold: Any) -> None:
    read(cold, FAST, READS)
    now = SECOND
    lib.lp_cold_waited(cold, now, LONG // 100)
    assert not lib.lp_cold_expected(cold)
    lib.lp_cold_waited(cold, now, LONG)
    assert lib.lp_cold_expected(cold)
    read(cold, FAST, TRIES, now=now)
    assert not lib.lp_cold_expected(cold)


def test_waits_that_have_other_reasons_have_fewer_and_fewer(cold: Any) -> None:
    read(cold, FAST, READS)
    tried = 0
    for now in range(0, 60 * SECOND, SECOND // 1000):
        lib.lp_cold_waited(cold, now, LONG)
        while lib.lp_cold_expected(cold):
            read(cold, FAST, now=now)
            tried += 1
    assert 60 * TRIES <= tried <= 70 * TRIES
    lib.lp_cold_waited(cold, 61 * SECOND, LONG)
    read(cold, SLOW)
    assert lib.lp_cold_expected(cold)
