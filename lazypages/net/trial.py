"""Whether compression pays on a connection: tried out, and tried again now and then."""

from __future__ import annotations

FAST = 300e6  # bytes of pages a second: no compressor keeps up with that
GAIN = 1.2  # compression must bring pages so many times as fast
PHASE_BYTES = 1 << 20  # a rate is measured over so much, at least,
PHASE_ANSWERS = 4  # and so many answers
PLAIN_AGAIN = 10.0  # s of compression after which plain pages are tried again
PAUSE = (1.0, 60.0)  # s until compression is tried again that did not pay: first and longest


class Trial:
    """`compress` is what the next large request should ask for.

    Rates are those of pages, from one answer to the next, while answers are due all the time. So what compression
    costs on either side counts, and a slow reader does not make a fast link look slow for long. Pure: times in
    seconds come from the caller.
    """

    def __init__(self) -> None:
        self.compress = False
        self._plain_rate = 0.0
        self._pause = PAUSE[0]
        self._again = 0.0  # when the other way is to be tried
        self._began: float | None = None
        self._bytes = self._answers = 0

    def answered(self, now: float, size: int, *, compress: bool, idle: bool) -> None:
        """`size` bytes of pages have come for a large request.

        `compress`: what it asked for. `idle`: no more answers are due.
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
