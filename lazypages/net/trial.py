"""Measures whether compression pays on a connection, and repeats the measurement from time to time."""

from __future__ import annotations

FAST = 300e6  # bytes of pages per second from which on compression is not tried: the compressor would be the limit
GAIN = 1.2  # least ratio of the rates with and without compression
PHASE_BYTES = 1 << 20  # a rate is measured over at least so many bytes of pages
PHASE_ANSWERS = 4  # and over at least so many answers
PLAIN_AGAIN = 10.0  # s of compression after which plain pages are tried again
PAUSE = (1.0, 60.0)  # s before compression is tried again after it did not pay: first and longest


class Trial:
    """`compress`: whether the next large request should ask for a compressed answer.

    A rate is pages per time, from one answer to the next, while further answers are outstanding. So it includes the
    cost of compression on both sides, and a slow reader does not make a fast link look slow for long. Pure: the caller
    passes times, in seconds.
    """

    def __init__(self) -> None:
        self.compress = False
        self._plain_rate = 0.0
        self._pause = PAUSE[0]
        self._again = 0.0  # time at which the alternative is tried
        self._began: float | None = None
        self._bytes = self._answers = 0

    def answered(self, now: float, size: int, *, compress: bool, idle: bool) -> None:
        """`size` bytes of pages have come for a large request.

        `compress`: whether it asked for compression. `idle`: no further answer is outstanding.
        """
        if compress is self.compress:
            if self._began is None:
                self._began = now
            else:
                self._bytes += size
                self._answers += 1
                if self._bytes >= PHASE_BYTES and self._answers >= PHASE_ANSWERS:
                    self._decide(now, self._bytes / max(now - self._began, 1e-6))
                    self._restart(now if self.compress is compress else None)
        if idle:
            self._restart(None)

    def _restart(self, began: float | None) -> None:
        self._began, self._bytes, self._answers = began, 0, 0

    def _decide(self, now: float, rate: float) -> None:
        if not self.compress:
            self._plain_rate = rate
            self.compress = rate < FAST and now >= self._again
            if self.compress:
                self._again = now + PLAIN_AGAIN
        elif rate < GAIN * self._plain_rate:
            self.compress = False
            self._again = now + self._pause
            self._pause = min(2 * self._pause, PAUSE[1])
        else:
            self._pause = PAUSE[0]
            if now >= self._again:
                self.compress = False
                self._again = now
