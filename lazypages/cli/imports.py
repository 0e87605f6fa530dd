"""Importing modules with the garbage collector off."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Threshold of the youngest generation of the garbage collector. Python's default of 700 would start it many times for
#: each restored task, and hardly any of the objects is garbage.
GC_THRESHOLD = 20_000

#: The modules in C (csrc/modules.py).
COMPILED = frozenset(
    ("dumptool._ptrace", "images_spec._pagemap", "lazypages.engine._uffd", "lazypages.net._pageserver")
)


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


@contextmanager
def importing_command() -> Iterator[None]:
    """As `importing`, of a command. A module in C that was not built ends the program with one line."""
    with importing():
        try:
            yield
        except ModuleNotFoundError as error:
            if error.name not in COMPILED:
                raise
            sys.exit(f"{error.name} is not built: run `.ci/venv` in the clone, or install lazypages again")
