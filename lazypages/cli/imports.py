"""Importing quickly."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: New objects before the garbage collector looks among them. Python's own 700 are much below what a task of a thousand
#: makes, and next to nothing of that is garbage.
GC_THRESHOLD = 20_000


@contextmanager
def importing() -> Iterator[None]:
    """For what is imported in it.

    Modules stay: to look for garbage among them, now and ever again, takes a tenth of the time of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()
