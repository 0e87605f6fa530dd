"""How many bytes may be on their way on a connection, so that a fault never waits long behind the background."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

MIN_WINDOW = 16 << 10  # bytes: below this, headers and round trips cost more than the wait is worth
MAX_WINDOW = 16 << 20
SHORTEST = 200e-6  # s: shorter round trips are reckoned as this; below, schedulers matter more than queues
ROUND_TRIP_MEMORY = 10.0  # s after which a short round trip is forgotten
RATE_MEMORY = 2.0  # s after which a high rate is forgotten


class Sent(NamedTuple):
    """What has to be remembered of a request until its answer: the time (s), and bytes delivered by then."""

    time: float
    delivered: int


class _Extreme:
    """The smallest value of the last `memory` seconds."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._values: deque[tuple[float, float]] = deque()  # increasing in time and in value

    def add(self, now: float, value: float) -> float:
        while self._values and self._values[-1][1] >= value:
            self._values.pop()
        self._values.append((now, value))
        while self._values[0][0] < now - self._memory:
            self._values.popleft()
        return self._values[0][1]


class Window:
    """`limit` is twice what the connection holds: the best rate of late times the shortest round trip of late.

    So there is always enough on its way to keep the connection busy, and what is asked for now waits for about
    one round trip's worth of data before it. A moment in which somebody else has the CPU changes neither. Pure:
    times in seconds come from the caller.
    """

    def __init__(self) -> None:
        self.limit = MIN_WINDOW
        self.smoothed: float | None = None  # round trip, s
        self._delivered = 0
        self._shortest = _Extreme(ROUND_TRIP_MEMORY)
        self._slowness = _Extreme(RATE_MEMORY)  # seconds a byte: the smallest is the best rate

    def send(self, now: float) -> Sent:
        """A request goes out."""
        return Sent(now, self._delivered)

    def answered(self, now: float, sent: Sent, size: int) -> None:
        """Its answer of `size` bytes is complete."""
        self._delivered += size
        elapsed = max(now - sent.time, 1e-6)
        self.smoothed = elapsed if self.smoothed is None else self.smoothed * 0.875 + elapsed * 0.125
        shortest = self._shortest.add(now, elapsed)
        if delivered := self._delivered - sent.delivered:
            slowness = self._slowness.add(now, elapsed / delivered)
            limit = 2 * max(shortest, SHORTEST) / slowness
            self.limit = int(min(max(limit, MIN_WINDOW), MAX_WINDOW))
