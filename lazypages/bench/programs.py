"""The C programs of the bench, compiled when they are needed."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lazypages.bench.errors import BenchError

SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")


@dataclass(frozen=True, slots=True)
class Programs:
    """Paths of the executables: the task that faults, the bare loop, the writer of pages files, the delayed link."""

    task: Path
    loop: Path
    fill: Path
    delay: Path

    @classmethod
    def compile(cls, folder: Path) -> Self:
        """Compile them into `folder`, with $CC or cc. Raises BenchError."""
        return cls(*(_compile(name, folder) for name in ("task", "loop", "fill", "delay")))

    def fill_pages(
        self, path: Path, runs: Iterable[tuple[int, int, int, int, int]], order: Path | None
    ) -> None:
        """Write a pages file from runs of (offset in the file, tag, first page, count, step), all in pages.

        ``order``: file with the order of a pointer chase through the pages. Raises BenchError.
        """
        text = "".join(" ".join(map(str, run)) + "\n" for run in runs)
        _run([self.fill, path, *([order] if order else [])], text)


def _compile(name: str, folder: Path) -> Path:
    target = folder / name
    _run([*shlex.split(os.environ.get("CC", "cc")), *FLAGS, "-o", target, SOURCES / f"{name}.c"], "")
    return target


def _run(command: list[str | Path], text: str) -> None:
    try:
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)
    except OSError as error:
        raise BenchError(f"the bench needs a C compiler: {command[0]}: {error.strerror} (set CC)") from None
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{shlex.join(map(str, command))}: {error.stderr.strip()}") from None
