"""How much may be on its way on a connection: csrc/serve/pace.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypages.engine._uffd import ffi, lib

PAGE_SIZE = 4096
NS = 1e9


class Sent(NamedTuple):
    """What is remembered of a request."""

    time: float  # s
    delivered: int


class Pace:
    def __init__(self) -> None:
        self._pace: Any = ffi.new("struct lp_pace *")
        lib.lp_pace_init(self._pace)

    @property
    def limit(self) -> int:
        return int(self._pace.limit)

    def send(self, now: float) -> Sent:
        return Sent(now, self._pace.delivered)

    def answered(self, now: float, sent: Sent, size: int) -> None:
        lib.lp_pace_answered(self._pace, int(sent.time * NS), sent.delivered, int(now * NS), size)


def simulate(pace: Pace, *, rate: float, delay: float, seconds: float, start: float = 0.0) -> float:
    """As much on its way as may be, on a link of `rate` (bytes/s) and `delay` (s, there and back); the end, s."""
    now, link_free = start, start
    flying: list[tuple[float, Sent, int]] = []
    in_flight = 0
    while now < start + seconds:
        while in_flight < pace.limit:
            size = max(4 * PAGE_SIZE, pace.limit // 4)
            link_free = max(link_free, now + delay / 2) + size / rate
            flying.append((link_free + delay / 2, pace.send(now), size))
            in_flight += size
        now, sent, size = flying.pop(0)
        pace.answered(now, sent, size)
        in_flight -= size
    return now


@pytest.mark.parametrize("rate", [12.5e6, 125e6, 1.25e9])
@pytest.mark.parametrize("delay", [50e-6, 1e-3, 20e-3])
def test_it_fits_the_link(rate: float, delay: float) -> None:
    """It fills the link, and what is on its way delays a fault by no more than about a round trip."""
    pace = Pace()
    simulate(pace, rate=rate, delay=delay, seconds=100 * max(delay, 1e-3))
    capacity = min(rate * delay, lib.LP_PACE_MAX)
    assert pace.limit >= 0.9 * capacity
    piece = max(lib.LP_PACE_MIN, rate * lib.LP_PACE_SHORTEST / NS)
    assert pace.limit <= 3 * (rate * delay + piece)


def test_it_shrinks_with_the_rate() -> None:
    pace = Pace()
    end = simulate(pace, rate=1e9, delay=1e-3, seconds=0.5)
    fast = pace.limit
    simulate(pace, rate=1e7, delay=1e-3, seconds=5, start=end + 0.1)
    assert pace.limit < fast / 5


@given(st.lists(st.tuples(st.floats(1e-6, 10), st.integers(0, 1 << 22)), max_size=50))
def test_it_stays_in_its_bounds(answers: list[tuple[float, int]]) -> None:
    pace, now = Pace(), 0.0
    for elapsed, size in answers:
        sent = pace.send(now)
        now += elapsed
        pace.answered(now, sent, size)
        assert lib.LP_PACE_MIN <= pace.limit <= lib.LP_PACE_MAX
