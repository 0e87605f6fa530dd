"""Importing modules with the garbage collector off."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: Threshold of the youngest generation of the garbage collector. Python's default of 700 would start it many times for
#: each restored task, and hardly any of the objects is garbage.
GC_THRESHOLD = 20_000


@contextmanager
def importing() -> Iterator[None]:
    """Import modules in this block.

    Modules are never garbage; collecting among them takes a tenth of the time of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()
