"""The tests' C programs, compiled when they are first needed."""

from __future__ import annotations

import atexit
import contextlib
import runpy
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

#: Those that tasks under test run.
PROGRAMS = Path(__file__).parent / "programs"
CSRC = Path(__file__).parents[2] / "csrc"
#: The channels, which work without the engine.
CHANNEL_SOURCES = tuple(
    str(CSRC / f"serve/{name}.c")
    for name in (
        *("channel", "channel_receive", "channel_requests", "channel_send", "channels"),
        *("deferred_pages", "pace"),
    )
)
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")


@cache
def csrc_modules() -> dict[str, Any]:
    """What csrc/modules.py defines: the builders of the cffi modules, and `declarations` of a header."""
    with contextlib.chdir(Path(__file__).parents[2]):
        return runpy.run_path("csrc/modules.py")


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="lazypages-programs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def compiled(source: Path, *flags: str, compiler: str = "gcc") -> Path:
    """The program of that source, with these flags behind the usual ones. It is there as long as this process."""
    program = Path(tempfile.mkdtemp(dir=_folder())) / source.stem
    subprocess.run([compiler, *FLAGS, *flags, "-o", program, source], check=True, timeout=120)
    return program
