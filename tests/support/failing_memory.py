"""The engine with an allocator that fails on demand: built once, used by a process of its own.

``python -m tests.support.failing_memory FOLDER SCENARIO`` runs a scenario again and again, each time with another of
its allocations failing, until none is left to fail.  The engine may not end the process; and each time either every
byte is right, or the engine says that the task can't go on (BROKEN), which costs this task alone.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.compiling import csrc_modules

ROOT = Path(__file__).parents[2]
NAME = "failing_uffd"
FUNCTIONS = ("malloc", "calloc", "realloc")
#: So many allocations in a row: one, and more than whoever tries again has tries for.
TIMES = (1, 40)


def build(folder: Path) -> None:
    """Compiles it into `folder`."""
    from cffi import FFI

    engine = csrc_modules()["engine"]
    _, source, _, options = engine._assigned_source
    ffi = FFI()
    for cdef in engine._cdefsources:
        ffi.cdef(cdef)
    ffi.cdef("void failing_memory(long after, long times); long failed_memory(void);")
    ffi.set_source(
        NAME,
        "void failing_memory(long after, long times);\nlong failed_memory(void);\n" + source,
        sources=[
            *(str(ROOT / name) for name in options["sources"]),
            str(ROOT / "tests/support/failing_memory.c"),
        ],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[(name, f"failing_{name}") for name in FUNCTIONS],
        extra_compile_args=options["extra_compile_args"],
    )
    ffi.compile(str(folder))


def load(folder: Path) -> Any:
    """Has whatever imports the engine from here on get this one; its library."""
    path = next(folder.glob(f"{NAME}.*so"))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["lazypages.engine._uffd"] = module
    return module.lib


def run(lib: Any, scenario: Callable[[Callable[[], None]], bool], check: Callable[[], None]) -> None:
    """`scenario` calls what it is given when allocations may fail; whether the task was said to be broken."""
    for times in TIMES:
        after = broken = 0
        while True:
            started = threading.Event()

            def begin(after: int = after, times: int = times, started: threading.Event = started) -> None:
                lib.failing_memory(after, times)
                started.set()

            result = scenario(begin)
            failed = int(lib.failed_memory())
            lib.failing_memory(0, 0)
            check()
            assert started.is_set()
            assert failed or not result, "broken, though all memory was there"
            broken += result
            if not failed:
                break
            after += 1 if times == 1 else 4
        print(f"{times}: {after} allocations, {broken} of them broke the task")
        assert after


def main() -> None:
    faulthandler.dump_traceback_later(100)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    lib = load(folder)
    from lazypages.engine.guard import Guard
    from tests.support import failing_scenarios, uffd

    with Guard(2) as guard:
        uffd.Service.guard = guard
        run(lib, getattr(failing_scenarios, name), lambda: check_descriptors(guard))


def check_descriptors(guard: Any) -> None:
    """The service has ended: the guard knows of each uffd that is still open."""
    left = guard.close_gone()
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    assert links.count("anon_inode:[userfaultfd]") == left


if __name__ == "__main__":
    main()
